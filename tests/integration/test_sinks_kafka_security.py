"""The Kafka sink against a broker that asks who is there: let in, refused, and told why."""

import asyncio
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from cluster.kafka_security import Credentials, SecuredBroker
from confluent_kafka.admin import (
    AdminClient,
    ScramCredentialInfo,
    ScramMechanism,
    UserScramCredentialUpsertion,
)
from fakes.certificates import Authority
from fakes.gateway import eventually
from fakes.kafka_sink import read_topic, running_sink
from fakes.sink_suite import SinkCase, batch, names, origin
from outrider_operator.core.sink import Origin
from outrider_operator.settings_kafka import KafkaSecuritySettings, KafkaSinkSettings
from outrider_operator.sinks.kafka_reader import pieces
from outrider_proto.output import Wanted

PASSWORD = "open sesame"


@dataclass
class Secured:
    broker: SecuredBroker
    folder: Path

    def security(self, protocol: str, **fields: Any) -> KafkaSecuritySettings:
        """Settings with all files, in the way a mounted Secret has them."""
        files: dict[str, Any] = {"ca_file": str(self.folder / "ca.crt")}
        if protocol.startswith("sasl"):
            files |= {
                "username_file": str(self.folder / "username"),
                "password_file": str(self.folder / "password"),
            }
        return KafkaSecuritySettings(protocol=protocol, **(files | fields))  # type: ignore[arg-type]

    @property
    def client(self) -> dict[str, str]:
        return {
            "cert_file": str(self.folder / "tls.crt"),
            "key_file": str(self.folder / "tls.key"),
        }


@pytest.fixture(scope="module")
def secured(kafka_jars_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    authority, folder = Authority(), tmp_path_factory.mktemp("secret")
    certificate, key = authority.issue("broker")
    mine, my_key = authority.issue("client")
    files = {"ca.crt": authority.pem, "tls.crt": mine, "tls.key": my_key}
    files |= {"username": b"alice\n", "password": PASSWORD.encode() + b"\n"}
    for name, content in files.items():
        (folder / name).write_bytes(content)
    known = Credentials(
        "alice", PASSWORD, authority.pem.decode(), certificate.decode(), key.decode()
    )
    with SecuredBroker(tmp_path_factory.mktemp("secured-kafka"), known) as broker:
        yield Secured(broker, folder)


def reason(case: SinkCase) -> str:
    (condition,) = case.health.readiness()
    return condition.reason


@pytest.mark.parametrize("mechanism", ["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"])
async def test_a_password_lets_in(secured: Secured, kafka_topic: str, mechanism: str) -> None:
    security = secured.security("sasl_ssl", mechanism=mechanism)
    async with running_sink(secured.broker.sasl, kafka_topic, security=security) as case:
        await case.sink.store(origin(), batch(1))
        assert case.health.ready
    assert names(await read_topic(secured.broker.bootstrap, kafka_topic)) == {("uid-1", 3, 1)}
    # What reads back goes by the same settings, in another library's words.
    settings = KafkaSinkSettings(
        bootstrap_servers=[secured.broker.sasl], topic=kafka_topic, security=security
    )
    wanted = Wanted("uid", "node-of-uid-1")
    assert [piece async for piece in pieces(settings, wanted, [])] == []


async def test_a_certificate_lets_in(secured: Secured, kafka_topic: str) -> None:
    security = secured.security("ssl", **secured.client)
    async with running_sink(secured.broker.tls, kafka_topic, security=security) as case:
        await case.sink.store(Origin("a", "n", time.time_ns()), batch(1))
        assert case.health.ready


async def test_a_wrong_password_is_said_and_a_right_one_taken_without_a_restart(
    secured: Secured, kafka_topic: str, tmp_path: Path
) -> None:
    file = tmp_path / "password"
    file.write_text("wrong-secret-word")
    security = secured.security("sasl_ssl", password_file=str(file))
    async with running_sink(
        secured.broker.sasl,
        kafka_topic,
        security=security,
        request_timeout_seconds=2.0,
        retry_cap_seconds=0.5,
    ) as case:
        await eventually(lambda: "refuse this user" in reason(case))
        assert "sink.kafka.security" in reason(case)
        assert "wrong-secret-word" not in reason(case)
        storing = asyncio.ensure_future(case.sink.store(origin(), batch(1)))
        file.write_text(PASSWORD)
        await asyncio.wait_for(storing, 30)
        assert case.health.ready


async def test_a_password_that_changes_later_is_taken_without_a_restart(
    secured: Secured, kafka_topic: str, tmp_path: Path
) -> None:
    file = tmp_path / "password"
    file.write_text(PASSWORD)
    security = secured.security("sasl_ssl", mechanism="SCRAM-SHA-256", password_file=str(file))
    fields: dict[str, Any] = {"request_timeout_seconds": 2.0, "retry_cap_seconds": 0.5}
    async with running_sink(secured.broker.sasl, kafka_topic, security=security, **fields) as case:
        await case.sink.store(origin(), batch(1))
        await asyncio.to_thread(change_password, secured.broker, "sesame 2")
        try:
            await asyncio.to_thread(secured.broker.kill)  # who is logged in stays so
            await asyncio.to_thread(secured.broker.resume)
            await eventually(lambda: "refuse this user" in reason(case), 30)
            file.write_text("sesame 2")
            await eventually(lambda: case.health.ready, 30)
            await case.sink.store(origin(), batch(2))
        finally:
            await asyncio.to_thread(change_password, secured.broker, PASSWORD)


def change_password(broker: SecuredBroker, password: str) -> None:
    admin = AdminClient({"bootstrap.servers": broker.bootstrap})
    how = ScramCredentialInfo(ScramMechanism.SCRAM_SHA_256, 4096)
    change = UserScramCredentialUpsertion("alice", how, password.encode())
    for done in admin.alter_user_scram_credentials([change]).values():
        done.result(30)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"ca_file": "another"}, "certificate verify failed"),
        ({"ca_file": "/no/such/file"}, r"sink.kafka.security.caFile: /no/such/file cannot be read"),
        ({"ca_file": "username"}, "ssl.ca.pem"),
    ],
)
async def test_what_is_wrong_with_certificates_is_said(
    secured: Secured, kafka_topic: str, fields: dict[str, str], words: str
) -> None:
    (secured.folder / "another").write_bytes(Authority().pem)
    fields = {
        name: value if value.startswith("/") else str(secured.folder / value)
        for name, value in fields.items()
    }
    security = secured.security("sasl_ssl", **fields)
    async with running_sink(
        secured.broker.sasl, kafka_topic, security=security, request_timeout_seconds=2.0
    ) as case:
        await eventually(lambda: words in reason(case))


async def test_without_a_certificate_nobody_is_let_in(secured: Secured, kafka_topic: str) -> None:
    security = secured.security("ssl")
    async with running_sink(
        secured.broker.tls, kafka_topic, security=security, request_timeout_seconds=2.0
    ) as case:
        await eventually(lambda: "no Kafka broker answers" in reason(case))

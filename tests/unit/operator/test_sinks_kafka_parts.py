"""Parts of the Kafka sink that need no broker: messages, secrets from files, settings, its log."""

import asyncio
import logging
from pathlib import Path
from typing import Any

import pytest
from fakes import sink_suite
from hypothesis import given
from hypothesis import strategies as st
from outrider_operator.core.routing import Routes
from outrider_operator.core.sink import Envelope, Origin
from outrider_operator.settings_kafka import (
    KafkaRoute,
    KafkaSecuritySettings,
    KafkaSinkSettings,
    check_kafka,
)
from outrider_operator.sinks.kafka_log import BrokerLog
from outrider_operator.sinks.kafka_messages import HEADER_CUT, Headers, Messages, one_by_one
from outrider_operator.sinks.kafka_records import SLICE, RecordWriter
from outrider_operator.sinks.kafka_security import SecurityError, for_aiokafka, for_librdkafka
from outrider_operator.sinks.kafka_sending import Sending
from outrider_proto import batches, limits, records
from outrider_proto.v1.agent_pb2 import CODEC_NONE, CODEC_ZSTD, EncodedRecord, RecordBatch
from outrider_proto.v1.sink_pb2 import MQData
from outrider_runtime.settings import SettingsError

NUMBERS = st.integers(1, 2**63)
BATCHES = st.builds(
    RecordBatch,
    epoch=NUMBERS,
    seq=NUMBERS,
    codec=st.sampled_from([CODEC_NONE, CODEC_ZSTD]),
    records=st.binary(min_size=1, max_size=20),
    count=st.integers(1, 10_000),
    decompressed_bytes=st.integers(1, 2**24),
    data_types=st.lists(st.integers(0, 30_000), max_size=5),
)
ORIGINS = st.builds(
    Origin, st.sampled_from(["a", "b"]), st.sampled_from(["n", "m"]), st.integers(1, 2**62)
)


@given(st.lists(st.tuples(ORIGINS, BATCHES), min_size=1, max_size=5))
def test_headers_made_fast_are_those_of_the_contract(pairs: list[tuple[Origin, Any]]) -> None:
    messages = Messages()
    for origin, batch in pairs:
        key, found = messages.batch(origin, batch)
        wanted = records.headers(origin.agent_id, origin.node, batch, origin.received_unix_nanos)
        assert {name: value.encode() for name, value in found} == dict(wanted)
        assert len(found) == len(wanted)
        assert key == origin.agent_id.encode()


def test_a_dead_letter_is_cut_to_what_fits_and_says_so() -> None:
    unknown: Any = 77
    batch = RecordBatch(epoch=1, seq=1, codec=unknown, records=b"x" * 100, count=1)
    origin = Origin("a", "n", 1)
    _, headers, value = Messages().dead_letter(origin, batch, "r" * 5000, 10)
    found = dict(headers)
    assert value == b"x" * 10
    assert found[HEADER_CUT] == "100"
    assert found[records.HEADER_REASON] == "r" * 1000
    assert found[records.HEADER_CODEC] == "77"
    _, headers, value = Messages().dead_letter(origin, batch, "why", 100)
    assert value == batch.records
    assert HEADER_CUT not in dict(headers)


def test_one_message_for_each_record() -> None:
    made = [EncodedRecord(data_type=7 + n, timestamp=n, data=bytes([n])) for n in range(3)]
    batch = batches.encode(made, epoch=3, seq=9, codec=CODEC_ZSTD, created_unix_nanos=1)
    envelope = Envelope("10.0.0.1", "1.2.3.4", "fd00::1", "2001:db8::1", "host", "1.0", "agent")
    origin = Origin("uid", "node", 5_000_000_001, envelope)
    found = list(one_by_one(origin, batch, batches.decode(batch)))
    assert [data_type for data_type, _, _ in found] == [7, 8, 9]
    data = MQData.FromString(found[1][2])
    assert data == MQData(
        data_type=8,
        agent_time=1,
        body=b"\x01",
        agent_id="uid",
        intranet_ipv4="10.0.0.1",
        extranet_ipv4="1.2.3.4",
        intranet_ipv6="fd00::1",
        extranet_ipv6="2001:db8::1",
        hostname="host",
        version="1.0",
        product="agent",
        svr_time=5,
    )
    decoded = records.decode_message([(n, v.encode()) for n, v in found[1][1]], found[1][2])
    assert (decoded.agent_id, decoded.node, decoded.seq, decoded.index) == ("uid", "node", 9, 1)


def test_a_record_cannot_speak_for_the_server() -> None:
    forged = MQData(data_type=1, body=b"x", agent_id="another", product="forged", hostname="h")
    record = EncodedRecord.FromString(forged.SerializeToString())
    batch = RecordBatch(epoch=1, seq=1, codec=CODEC_NONE, records=b"x", count=1)
    ((_, _, value),) = one_by_one(Origin("uid", "n", 10**9), batch, [record])
    assert MQData.FromString(value) == MQData(data_type=1, body=b"x", agent_id="uid", svr_time=1)


# ------------------------------------------------------------------ secrets


def secured(folder: Path, **fields: Any) -> KafkaSinkSettings:
    (folder / "username").write_text("alice\n")
    (folder / "password").write_text(" se cret \n")
    security = KafkaSecuritySettings(
        username_file=str(folder / "username"), password_file=str(folder / "password"), **fields
    )
    return KafkaSinkSettings(security=security)


def test_name_and_password_come_from_files(tmp_path: Path) -> None:
    settings = secured(tmp_path, protocol="sasl_plaintext", mechanism="SCRAM-SHA-256")
    found = for_librdkafka(settings)
    assert (found["sasl.username"], found["sasl.password"]) == ("alice", " se cret ")
    assert found["sasl.mechanism"] == "SCRAM-SHA-256"
    other = for_aiokafka(settings)
    assert (other["sasl_plain_username"], other["sasl_plain_password"]) == ("alice", " se cret ")
    assert (other["security_protocol"], other["sasl_mechanism"]) == (
        "SASL_PLAINTEXT",
        "SCRAM-SHA-256",
    )
    (tmp_path / "password").write_text("new")
    assert for_librdkafka(settings)["sasl.password"] == "new"


@pytest.mark.parametrize("content", [None, "", "\n", b"\xff\xfe"])
def test_a_file_that_cannot_be_used_names_the_setting(tmp_path: Path, content: Any) -> None:
    settings = secured(tmp_path, protocol="sasl_ssl")
    file = tmp_path / "password"
    file.unlink()
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(SecurityError, match=r"sink\.kafka\.security\.passwordFile") as raised:
        for_librdkafka(settings)
    assert "password" in str(raised.value)


def test_plaintext_reads_no_file(tmp_path: Path) -> None:
    found = for_librdkafka(KafkaSinkSettings())
    assert found["security.protocol"] == "plaintext"
    assert not [name for name in found if name.startswith(("sasl", "ssl"))]


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"security": KafkaSecuritySettings(protocol="sasl_ssl")}, "usernameFile"),
        ({"security": KafkaSecuritySettings(cert_file="/x")}, "keyFile"),
        ({"topic": "a", "dead_letter_topic": "a"}, "deadLetterTopic"),
        (
            {"dead_letter_topic": "b", "routes": [KafkaRoute(data_types=[1], topic="b")]},
            "deadLetterTopic",
        ),
        ({"topic": "t" * 245}, "deadLetterTopic"),
    ],
)
def test_settings_that_contradict_each_other(fields: dict[str, Any], names: str) -> None:
    with pytest.raises(SettingsError, match=rf"sink\.kafka\..*{names}"):
        check_kafka(KafkaSinkSettings(**fields))


def test_the_same_line_is_logged_seldom(caplog: pytest.LogCaptureFixture) -> None:
    now = [0.0]
    handler = BrokerLog(lambda: now[0])

    def say(text: str) -> None:
        handler.handle(logging.LogRecord("x", logging.ERROR, "", 0, text, None, None))

    with caplog.at_level(logging.WARNING, logger="kafka.client"):
        for port in range(20):
            say(f"connect to 127.0.0.1:{port} failed (after {port}ms)")
        say("something else")
        assert len(caplog.records) == 2
        now[0] = 31.0
        say("something else")
        assert len(caplog.records) == 3


async def test_many_small_batches_do_not_hold_the_loop_either() -> None:
    ended: list[Sending] = []
    handed: list[int] = []

    def produce(topic: str, key: bytes, value: bytes, headers: Headers, sending: Sending) -> None:
        handed[-1] += 1
        sending(None, None)

    writer = RecordWriter(Routes([], "T"), produce, lambda _: limits.MIB)
    for seq in range(1, 101):
        writer.put(
            Sending(10, 10, ("",), ended.append),
            sink_suite.origin(),
            sink_suite.batch(seq, records=50),
        )
    writing = asyncio.create_task(writer.run())
    while len(ended) < 100:
        handed.append(0)  # of this turn of the loop
        await asyncio.sleep(0)
    writing.cancel()
    assert sum(handed) == 5000
    assert max(handed) <= SLICE

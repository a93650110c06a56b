"""Addresses by DNS (a real resolver against a small DNS server on loopback), and back-off."""

import asyncio
import random

import dns.asyncresolver
import dns.flags
import dns.message
import dns.resolver
import dns.rrset
import pytest
from hypothesis import given
from hypothesis import strategies as st
from outrider_runtime.backoff import Backoff
from outrider_runtime.discovery import Address, DiscoveryError, check_target, resolve
from outrider_runtime.settings import SettingsError


class Answers(asyncio.DatagramProtocol):
    """Knows one SRV name with three targets, two of which resolve."""

    def connection_made(self, transport) -> None:
        self.transport = transport

    def datagram_received(self, data, addr) -> None:
        query = dns.message.from_wire(data)
        answer = dns.message.make_response(query)
        if query.question[0].name.to_text() == "_grpc._tcp.server.test.":
            answer.answer.append(
                dns.rrset.from_text(
                    "_grpc._tcp.server.test.",
                    5,
                    "IN",
                    "SRV",
                    "0 1 8443 127.0.0.2.",
                    "0 1 8444 127.0.0.3.",
                    "0 1 1 no-such-host.invalid.",
                )
            )
        else:
            answer.set_rcode(dns.rcode.NXDOMAIN)
        self.transport.sendto(answer.to_wire(), addr)


@pytest.fixture
async def dns_server(monkeypatch):
    transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(
        Answers, local_addr=("127.0.0.1", 0)
    )
    resolver = dns.asyncresolver.Resolver(configure=False)
    resolver.nameservers = ["127.0.0.1"]
    resolver.port = transport.get_extra_info("sockname")[1]
    monkeypatch.setattr(dns.asyncresolver, "default_resolver", resolver)
    yield
    transport.close()


async def test_srv_gives_hosts_and_ports_and_forgives_one_dead_name(dns_server) -> None:
    found = await resolve("srv:_grpc._tcp.server.test", timeout=10)
    assert sorted(found) == [Address("127.0.0.2", 8443), Address("127.0.0.3", 8444)]


async def test_unknown_srv_is_named(dns_server) -> None:
    with pytest.raises(DiscoveryError, match="_grpc._tcp.other.test"):
        await resolve("srv:_grpc._tcp.other.test", timeout=10)


async def test_plain_addresses_are_shuffled_and_bounded() -> None:
    target = ",".join(f"10.0.0.{i}:1" for i in range(20))
    orders = {tuple(await resolve(target, rng=random.Random(seed))) for seed in range(5)}
    assert len(orders) == 5
    assert {len(order) for order in orders} == {10}


async def test_names_by_the_system_resolver() -> None:
    assert Address("127.0.0.1", 99) in await resolve("dns:localhost:99")


@pytest.mark.parametrize("target", ["srv:server", "dns:host", "host", ":80", "a:1,b"])
def test_impossible_targets_are_refused_at_once(target) -> None:
    with pytest.raises(SettingsError, match='"server.target"'):
        check_target(target, setting="server.target")


@given(st.integers(), st.floats(0.01, 10), st.floats(10, 1000), st.integers(1, 200))
def test_waits_stay_within_bounds_for_ever(seed, base, cap, tries) -> None:
    backoff = Backoff(base, cap, random.Random(seed))
    for attempt in range(tries):
        assert 0 <= backoff.next() <= min(cap, base * 2**attempt)
    backoff.reset()
    assert backoff.next() <= base

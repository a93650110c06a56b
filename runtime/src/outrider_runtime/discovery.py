"""Find the addresses behind a target by DNS: SRV records, or A and AAAA records of a name.

Targets are written "srv:_grpc._tcp.NAME", "dns:HOST:PORT", or plain "HOST:PORT", with "," between
several of the last kind. Connects to nothing.
"""

import asyncio
import random
import socket
from dataclasses import dataclass

from outrider_runtime.settings import SettingsError, address


class DiscoveryError(Exception):
    """A name could not be resolved; the text says which and why. Worth another try."""


@dataclass(frozen=True, order=True)
class Address:
    """Where to connect to: an IP address or host name, and a port."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def check_target(target: str, *, setting: str) -> None:
    """Refuse a target that can never be resolved.

    Raises:
        SettingsError: It has none of the forms above.
    """
    if target.startswith("srv:"):
        if not target.removeprefix("srv:").startswith("_"):
            raise SettingsError(
                f'setting "{setting}": expected "srv:_SERVICE._tcp.NAME", got {target!r}'
            )
        return
    for part in target.removeprefix("dns:").split(","):
        if not address(part.strip(), setting=setting)[0]:
            raise SettingsError(f'setting "{setting}": expected a host before ":", got {target!r}')


async def resolve(
    target: str, *, limit: int = 10, timeout: float = 3.0, rng: random.Random | None = None
) -> list[Address]:
    """The addresses behind a target, in random order, at most `limit` of them.

    Args:
        target: See the module.
        limit: Most addresses to return.
        timeout: Most seconds to wait for all of it.
        rng: Where the order comes from.

    Raises:
        DiscoveryError: Nothing was found, or not in time.
    """
    try:
        async with asyncio.timeout(timeout):
            if target.startswith("srv:"):
                found = await _srv(target.removeprefix("srv:"))
            elif target.startswith("dns:"):
                found = await _hosts(*address(target.removeprefix("dns:"), setting="target"))
            else:
                pairs = [address(p.strip(), setting="target") for p in target.split(",")]
                found = [Address(host, port) for host, port in pairs]
    except TimeoutError:
        raise DiscoveryError(f"{target}: no answer from DNS within {timeout:g} s") from None
    except SettingsError as error:
        raise DiscoveryError(str(error)) from None
    unique = sorted(set(found))
    (rng or random).shuffle(unique)
    return unique[:limit]


async def _srv(name: str) -> list[Address]:
    # Not before it is needed: it takes 3 MiB, which whoever knows the addresses can spare.
    import dns.asyncresolver
    import dns.exception
    import dns.rdatatype
    from dns.rdtypes.IN.SRV import SRV

    try:
        answer = await dns.asyncresolver.resolve(name, dns.rdatatype.SRV, search=True)
    except (dns.exception.DNSException, OSError) as error:
        raise DiscoveryError(f"srv:{name}: {' '.join(str(error).split())}") from None
    targets = {
        (record.target.to_text(omit_final_dot=True), record.port)
        for record in answer
        if isinstance(record, SRV)
    }
    found: list[Address] = []
    problems: list[str] = []
    for host, port in sorted(targets):
        try:
            found += await _hosts(host, port)
        except DiscoveryError as error:
            problems.append(str(error))
    if not found:
        raise DiscoveryError(f"srv:{name}: none of its hosts resolves: {'; '.join(problems)}")
    return found


async def _hosts(host: str, port: int) -> list[Address]:
    try:
        infos = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise DiscoveryError(f"dns:{host}: {error.strerror or error}") from None
    return [Address(str(info[4][0]), port) for info in infos]

"""What there is on a host, as entries by name, and what became different: pure functions.

An inventory is a mapping from a name to a text of JSON, an object of strings. It is told whole or
as its difference from what was told before, in pieces of bounded size; whoever gets all pieces can
put them together and check the result by its id. What a host says is not trusted: names and values
are cut, and made valid text. Reads nothing.
"""

import hashlib
import ipaddress
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

#: Most entries of one inventory.
MAX_ENTRIES = 20_000
#: Most entries and bytes of JSON in one piece, so that each is a record of moderate size.
PIECE_ENTRIES = 256
PIECE_BYTES = 64 * 1024
#: Most characters of a name and of one value.
NAME_CHARACTERS = 256
VALUE_CHARACTERS = 256

Entries = dict[str, str]


@dataclass(frozen=True)
class Changes:
    """What to do to an inventory; as a whole one, what to do to an empty one."""

    added: Entries = field(default_factory=dict)
    changed: Entries = field(default_factory=dict)
    removed: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.added or self.changed or self.removed)

    def fields(self) -> dict[str, str]:
        """As fields of a record: two JSON objects and a JSON list, where there are any."""
        found = {"added": _object(self.added), "changed": _object(self.changed)}
        found["removed"] = json.dumps(self.removed, ensure_ascii=False) if self.removed else ""
        return {name: text for name, text in found.items() if text}


def _object(entries: Entries) -> str:
    if not entries:
        return ""
    pairs = (f"{json.dumps(name, ensure_ascii=False)}:{text}" for name, text in entries.items())
    return "{" + ",".join(pairs) + "}"


def clean(text: str, most: int = VALUE_CHARACTERS) -> str:
    """Text that can be stored and shown: cut, no control characters, valid as UTF-8."""
    cut = text[:most]
    if cut.isascii() and cut.isprintable():
        return cut
    valid = cut.encode("utf-8", "replace").decode()
    return "".join(c if c.isprintable() else "\ufffd" for c in valid)


def entry(**values: str) -> str:
    """An entry's values; empty ones are left out."""
    kept = {name: clean(value) for name, value in values.items() if value}
    return json.dumps(kept, ensure_ascii=False, separators=(",", ":"))


def bounded(pairs: Iterable[tuple[str, str]], most: int = MAX_ENTRIES) -> tuple[Entries, int]:
    """The first entries, and how many more there are."""
    found: Entries = {}
    left_out = 0
    for raw, text in pairs:
        name = clean(raw, NAME_CHARACTERS)
        if name in found or len(found) < most:
            found[name] = text
        else:
            left_out += 1
    return found, left_out


def identity(entries: Mapping[str, str]) -> str:
    """The same for the same entries, whatever their order: 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for name in sorted(entries):
        digest.update(f"{name}\0{entries[name]}\0".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:16]


def difference(old: Mapping[str, str], new: Mapping[str, str]) -> Changes:
    """What makes `new` of `old`."""
    return Changes(
        added={name: text for name, text in new.items() if name not in old},
        changed={n: text for n, text in new.items() if n in old and old[n] != text},
        removed=[name for name in old if name not in new],
    )


def applied(old: Mapping[str, str], changes: Changes) -> Entries:
    """`old` with the changes made."""
    gone = set(changes.removed)
    kept = {name: text for name, text in old.items() if name not in gone}
    return {**kept, **changes.changed, **changes.added}


def pieces(
    changes: Changes, most_entries: int = PIECE_ENTRIES, most_bytes: int = PIECE_BYTES
) -> list[Changes]:
    """The changes in pieces of bounded size, at least one; each can be applied by itself."""
    made: list[Changes] = []
    current, count, size = Changes(), 0, 0
    for kind, name, text in _steps(changes):
        step = len(name.encode("utf-8", "surrogatepass")) + len(text.encode()) + 8
        if count and (count >= most_entries or size + step > most_bytes):
            made.append(current)
            current, count, size = Changes(), 0, 0
        if kind == "removed":
            current.removed.append(name)
        else:
            (current.added if kind == "added" else current.changed)[name] = text
        count, size = count + 1, size + step
    return [*made, current]


def _steps(changes: Changes) -> Iterator[tuple[str, str, str]]:
    for name in changes.removed:
        yield "removed", name, ""
    for name, text in changes.changed.items():
        yield "changed", name, text
    for name, text in changes.added.items():
        yield "added", name, text


# ---------------------------------------------------------------- what hosts' files say


def _stanzas(lines: Iterable[str], wanted: tuple[str, ...]) -> Iterator[dict[str, str]]:
    """Blocks of lines "NAME: value" with empty lines between them."""
    found: dict[str, str] = {}
    for line in lines:
        if not line.strip():
            if found:
                yield found
            found = {}
            continue
        name, colon, value = line.partition(":")
        if colon and name in wanted:
            found.setdefault(name, value.strip())
    if found:
        yield found


def dpkg(lines: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Installed packages of dpkg's status file."""
    for found in _stanzas(lines, ("Package", "Status", "Version", "Architecture")):
        name, architecture = found.get("Package", ""), found.get("Architecture", "")
        if name and found.get("Status", "").endswith(" installed"):
            text = entry(manager="dpkg", version=found.get("Version", ""), arch=architecture)
            yield f"{name}:{architecture}", text


def apk(lines: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Installed packages of apk's database."""
    for found in _stanzas(lines, ("P", "V", "A")):
        if found.get("P"):
            text = entry(manager="apk", version=found.get("V", ""), arch=found.get("A", ""))
            yield f"{found['P']}:{found.get('A', '')}", text


#: What rpm is to print for `rpm`.
RPM_FORMAT = r"%{NAME}\t%{VERSION}-%{RELEASE}\t%{ARCH}\n"


def rpm(lines: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Installed packages as rpm prints them; of several versions all but one are in the name."""
    seen: set[str] = set()
    for line in sorted(lines):
        words = line.rstrip("\n").split("\t")
        if len(words) != 3 or not words[0]:
            continue
        name, version, architecture = words
        key = f"{name}:{architecture}"
        yield (
            f"{key}={version}" if key in seen else key,
            entry(manager="rpm", version=version, arch=architecture),
        )
        seen.add(key)


def users(lines: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Accounts of a passwd file."""
    for line in lines:
        words = line.rstrip("\n").split(":")
        if len(words) >= 7 and words[0]:
            text = entry(uid=words[2], gid=words[3], home=words[5], shell=words[6])
            yield f"user:{words[0]}", text


def groups(lines: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Groups of a group file, with their members."""
    for line in lines:
        words = line.rstrip("\n").split(":")
        if len(words) >= 4 and words[0]:
            yield f"group:{words[0]}", entry(gid=words[2], members=words[3])


def modules(lines: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Kernel modules of /proc/modules, without what changes all the time, such as users' counts."""
    for line in lines:
        words = line.split()
        if len(words) >= 5:
            taints = words[6].strip("()") if len(words) > 6 else ""
            yield words[0], entry(bytes=words[1], state=words[4], taints=taints)


@dataclass(frozen=True)
class Listener:
    """A socket that takes what comes."""

    protocol: str
    address: str
    port: int
    uid: str
    inode: str

    @property
    def name(self) -> str:
        """Such as "tcp 0.0.0.0:22" and "udp6 [::]:53"."""
        host = f"[{self.address}]" if ":" in self.address else self.address
        return f"{self.protocol} {host}:{self.port}"


def listeners(
    protocol: str, lines: Iterable[str], ephemeral: tuple[int, int]
) -> Iterator[Listener]:
    """The listening sockets of a table such as /proc/net/tcp.

    Args:
        protocol: tcp, tcp6, udp or udp6.
        lines: The table. Those of tcp have their listening sockets first: no more is read.
        ephemeral: Ports that are given to whoever asks: those of udp are clients, not services.
    """
    tcp = protocol.startswith("tcp")
    wanted = "0A" if tcp else "07"
    for line in lines:
        words = line.split()
        if len(words) < 10 or not words[0].endswith(":"):
            continue
        if words[3] != wanted:
            if tcp:
                return
            continue
        found = _listener(protocol, words)
        if found and (tcp or not ephemeral[0] <= found.port <= ephemeral[1]):
            yield found


def _listener(protocol: str, words: list[str]) -> Listener | None:
    address, _, port = words[1].partition(":")
    try:
        raw = bytes.fromhex(address)
        if sys.byteorder == "little":  # each group of four bytes is as the machine has it
            raw = b"".join(raw[n : n + 4][::-1] for n in range(0, len(raw), 4))
        host = str(ipaddress.ip_address(raw))
        return Listener(protocol, host, int(port, 16), words[7], words[9])
    except ValueError:
        return None


def port_entries(found: Iterable[Listener], processes: Mapping[str, str]) -> Entries:
    """Entries of listening sockets; `processes` has the names of processes by inode."""
    made: dict[str, tuple[str, set[str]]] = {}
    for one in found:
        names = made.setdefault(one.name, (one.uid, set()))[1]
        if one.inode in processes:
            names.add(processes[one.inode])
    return {
        name: entry(uid=uid, process=",".join(sorted(names))) for name, (uid, names) in made.items()
    }

"""Records for people and programs: names of data types, and one record as a line."""

import base64
import json
from datetime import UTC, datetime
from typing import Final

from outrider_proto.lines import Line
from outrider_proto.records import NAMES

from outrider_cli.core.text import clipped, printable

#: Characters of a value that are shown to people; programs get all.
SHOWN: Final = 200
#: Bytes that are shown of what holds no names and values.
SHOWN_BYTES: Final = 16
_BY_NAME: Final = {name.replace(" ", "-"): number for number, name in NAMES.items()}


def type_name(data_type: int) -> str:
    """What people call a data type, such as "host-metrics"; its number if it has no name."""
    name = NAMES.get(data_type)
    return name.replace(" ", "-") if name else str(data_type)


def data_types(words: list[str]) -> list[int]:
    """Data types from numbers and names, with commas or one by one.

    Raises:
        ValueError: One is neither.
    """
    found = []
    for word in (part.strip() for text in words for part in text.split(",")):
        name = "-".join(word.lower().replace("_", " ").split())
        if word.isascii() and word.isdecimal() and int(word) < 2**31:
            found.append(int(word))
        elif name in _BY_NAME:
            found.append(_BY_NAME[name])
        else:
            known = ", ".join(sorted(_BY_NAME))
            raise ValueError(f"{word!r} is no data type: give a number, or one of {known}")
    return found


def for_people(line: Line) -> str:
    """A record as one line: time, node, type, names and values; long values are cut."""
    try:
        made = datetime.fromtimestamp(line.timestamp, UTC)
        when = made.strftime("%Y-%m-%dT%H:%M:%SZ")
    except (ValueError, OverflowError, OSError):
        when = str(line.timestamp)
    if line.fields is None:
        more = "…" if len(line.data) > SHOWN_BYTES else ""
        said = f"{len(line.data)} bytes: {line.data[:SHOWN_BYTES].hex()}{more}"
    else:
        said = " ".join(f"{clipped(k, SHOWN)}={_value(v)}" for k, v in sorted(line.fields.items()))
    return f"{when} {printable(line.node, line=True)} {type_name(line.data_type)} {said}".rstrip()


def _value(text: str) -> str:
    shown = clipped(text, SHOWN)
    return json.dumps(shown, ensure_ascii=False) if not shown or " " in shown else shown


def for_programs(line: Line) -> str:
    """A record as a line of JSON, whole."""
    found: dict[str, object] = {
        "agent": line.agent,
        "node": line.node,
        "type": line.data_type,
        "timestamp": line.timestamp,
        "server_time": line.server_unix_nanos / 1e9,
    }
    if line.fields is not None:
        found["fields"] = line.fields
    else:
        found["data"] = base64.b64encode(line.data).decode("ascii")
    return json.dumps(found, ensure_ascii=False)

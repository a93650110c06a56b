"""How much of a message is anything but the content of batches: seen at a glance, not parsed.

Counting the fields of a large message one by one costs more than all else that is done with it.
Of a message of batches nearly all is their `records`, which stay bytes when the message is parsed:
when the rest is small there is nothing to count. One match for each batch; knows the order in
which the usual libraries write, and takes everything else for the rest.
"""

import re
from typing import Final

#: The beginning of a PackagedData.batches entry: its tag and length (1), its epoch, seq and codec,
#: then the tag and the length (2) of its records.
_BATCH: Final = re.compile(
    rb"\x8a\x01([\x80-\xff]{0,4}[\x00-\x7f])"
    rb"(?:[\x08\x10\x18][\x80-\xff]{0,9}[\x00-\x7f]){0,3}"
    rb"\x22([\x80-\xff]{0,4}[\x00-\x7f])"
)


def besides_records(data: bytes) -> int:
    """Bytes of a serialized PackagedData that are not `records` of its batches; at most all."""
    place, end, rest = 0, len(data), 0
    match = _BATCH.match
    while place < end:
        found = match(data, place)
        if found is None:
            return rest + end - place
        content = found.end()
        after = found.end(1) + _number(found[1])
        records = _number(found[2])
        if after > end or content + records > after:
            return rest + end - place
        rest += after - place - records
        place = after
    return rest


def _number(varint: bytes) -> int:
    value = 0
    for shift, byte in enumerate(varint):
        value |= (byte & 0x7F) << (7 * shift)
    return value

"""Look at a serialized message before it is parsed: how many entries would come of it?

A message of 10 MiB can hold five million empty entries, which take sixty times as much once they
are parsed. So what comes from outside and is large is counted first. Only counts; protobuf itself
says whether the bytes are a message.
"""

from collections.abc import Iterator


def too_many(data: bytes, path: tuple[int, ...], limit: int) -> bool:
    """Whether more than `limit` length-delimited fields lie at a path of field numbers.

    Args:
        data: A serialized message. Bytes that are none are not counted further.
        path: Field numbers from the outside, such as (18, 1) for run_report.runs.
        limit: Counting ends just past it.
    """
    for _count in _at(memoryview(data), path, limit):
        limit -= 1
        if limit < 0:
            return True
    return False


def _at(data: memoryview, path: tuple[int, ...], limit: int) -> Iterator[None]:
    for content in _contents(data, path[0]):
        if len(path) == 1:
            yield None
        else:
            yield from _at(content, path[1:], limit)


def _contents(data: memoryview, wanted: int) -> Iterator[memoryview]:
    """The contents of all length-delimited fields of a number, up to the first rubbish."""
    place, end = 0, len(data)
    while place < end:
        tag, place = _varint(data, place)
        number, kind = tag >> 3, tag & 7
        if kind == 0:
            _, place = _varint(data, place)
        elif kind == 1:
            place += 8
        elif kind == 5:
            place += 4
        elif kind == 2:
            length, place = _varint(data, place)
            if number == wanted:
                yield data[place : place + length]
            place += length
        else:
            return


def _varint(data: memoryview, place: int) -> tuple[int, int]:
    value = shift = 0
    for at in range(place, min(place + 10, len(data))):
        value |= (data[at] & 0x7F) << shift
        if data[at] < 0x80:
            return value, at + 1
        shift += 7
    return 0, len(data)  # rubbish: there is nothing more to count

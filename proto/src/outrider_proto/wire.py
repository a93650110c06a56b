"""Look at a serialized message before it is parsed: how many fields would come of it?

A message of 10 MiB can hold five million empty entries, which take sixty times as much once they
are parsed. So what comes from outside and is large is counted first, in one pass that ends as soon
as a bound is passed. Only counts; protobuf itself says whether the bytes are a message.
"""

from collections.abc import Iterator, Mapping

#: Most fields of a message (or of an entry that is looked into) that no bound is given for.
OTHER_FIELDS = 1000


def beyond(data: bytes, bounds: Mapping[tuple[int, ...], int]) -> tuple[int, ...] | None:
    """The path of a field that occurs too often, () for fields without a bound, None if none does.

    Args:
        data: A serialized message. It is counted up to the first byte that makes no sense.
        bounds: Most occurrences by path of field numbers: (18, 1) is run_report.runs.
    """
    return _beyond(memoryview(data), bounds, (), {})


def _beyond(
    data: memoryview,
    bounds: Mapping[tuple[int, ...], int],
    here: tuple[int, ...],
    counts: dict[tuple[int, ...], int],
) -> tuple[int, ...] | None:
    for number, content in _fields(data):
        path = (*here, number)
        key = path if path in bounds else ()
        counts[key] = counts.get(key, 0) + 1
        if counts[key] > bounds.get(key, OTHER_FIELDS):
            return key
        if any(len(bound) > len(path) and bound[: len(path)] == path for bound in bounds):
            found = _beyond(content, bounds, path, counts)
            if found is not None:
                return found
    return None


def _fields(data: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Number and content of each field; the content is empty but for length-delimited ones."""
    place, end = 0, len(data)
    nothing = data[:0]
    while place < end:
        tag, place = _varint(data, place)
        content = nothing
        match tag & 7:
            case 0:
                _, place = _varint(data, place)
            case 1:
                place += 8
            case 2:
                length, place = _varint(data, place)
                content = data[place : place + length]
                place += length
            case 5:
                place += 4
            case 3:
                pass  # a group: protobuf reads over it, so what is in it and behind it counts
            case 4:
                continue
            case _:
                return
        yield tag >> 3, content


def _varint(data: memoryview, place: int) -> tuple[int, int]:
    value = shift = 0
    for at in range(place, min(place + 10, len(data))):
        value |= (data[at] & 0x7F) << shift
        if data[at] < 0x80:
            return value, at + 1
        shift += 7
    return 0, len(data)  # rubbish: there is nothing more to count

"""What a batch becomes in Kafka: key, headers and values of its messages.

Does what it can once for each agent instead of once for each message, and keeps no batch.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Final

from outrider_proto import records
from outrider_proto.v1.agent_pb2 import Codec, EncodedRecord, RecordBatch
from outrider_proto.v1.sink_pb2 import MQData

from outrider_operator.core.batch import Batch
from outrider_operator.core.sink import Origin

Headers = list[tuple[str, str]]

#: Agents whose constant headers are remembered.
MAX_AGENTS: Final = 16_384
#: Sets of data types whose header is remembered: agents use few.
MAX_TYPES: Final = 4096
#: Longest reason that is written to a dead letter, characters.
MAX_REASON: Final = 1000
#: Header of a dead letter that was cut: bytes of the whole.
HEADER_CUT: Final = "outrider-cut-from"


class _Fixed:
    """What all messages of one agent have in common."""

    __slots__ = ("by_codec", "epoch", "epoch_header", "key", "node")

    def __init__(self, origin: Origin) -> None:
        self.node = origin.node
        self.key = origin.agent_id.encode()
        self.by_codec: dict[int, Headers] = {}
        # Of the last batch: mostly the next one's as well.
        self.epoch = 0
        self.epoch_header = (records.HEADER_EPOCH, "0")


class Messages:
    """Makes keys and headers; one object for a sink."""

    def __init__(self) -> None:
        self._agents: dict[str, _Fixed] = {}
        # Batches that came in one message have one origin.
        self._origin: Origin | None = None
        self._time_header = (records.HEADER_TIME, "")

    def batch(self, origin: Origin, batch: Batch) -> tuple[bytes, Headers]:
        """Key and headers of the message whose value is `batch.records`."""
        fixed = self._agents.get(origin.agent_id)
        if fixed is None or fixed.node != origin.node:
            fixed = self._remember(origin)
        constant = fixed.by_codec.get(batch.codec)
        if constant is None:
            constant = fixed.by_codec[batch.codec] = _constant(origin, batch.codec)
        if fixed.epoch != batch.epoch:
            fixed.epoch = batch.epoch
            fixed.epoch_header = (records.HEADER_EPOCH, str(batch.epoch))
        if origin is not self._origin:
            self._origin = origin
            self._time_header = (records.HEADER_TIME, str(origin.received_unix_nanos))
        return fixed.key, [
            *constant,
            fixed.epoch_header,
            (records.HEADER_SEQ, str(batch.seq)),
            (records.HEADER_COUNT, str(batch.count)),
            (records.HEADER_BYTES, str(batch.decompressed_bytes)),
            _types_header(tuple(batch.data_types)),
            self._time_header,
        ]

    def dead_letter(
        self, origin: Origin, batch: Batch, reason: str, room: int
    ) -> tuple[bytes, Headers, bytes]:
        """Key, headers and value of what is set aside; the value has at most `room` bytes."""
        key, headers = self.batch(origin, batch)
        value = batch.records
        headers.append((records.HEADER_REASON, reason[:MAX_REASON]))
        if len(value) > room:
            headers.append((HEADER_CUT, str(len(value))))
            value = value[:room]
        return key, headers, value

    def _remember(self, origin: Origin) -> _Fixed:
        if len(self._agents) >= MAX_AGENTS:
            self._agents.clear()
        fixed = self._agents[origin.agent_id] = _Fixed(origin)
        return fixed


@functools.lru_cache(MAX_TYPES)
def _types_header(types: tuple[int, ...]) -> tuple[str, str]:
    return (records.HEADER_TYPES, ",".join(map(str, types)))


def _constant(origin: Origin, codec: int) -> Headers:
    try:
        name = Codec.Name(codec).removeprefix("CODEC_").lower()  # type: ignore[arg-type]
    except ValueError:  # only of what is set aside
        name = str(codec)
    return [
        (records.HEADER_AGENT, origin.agent_id),
        (records.HEADER_NODE, origin.node),
        (records.HEADER_CODEC, name),
        (records.HEADER_CONTENT_TYPE, records.CONTENT_TYPE),
    ]


def one_by_one(
    origin: Origin, batch: RecordBatch, opened: Sequence[EncodedRecord]
) -> Iterator[tuple[int, Headers, bytes]]:
    """Data type, headers and value (an MQData) of each record of an opened batch."""
    envelope = origin.envelope
    common = MQData(
        agent_id=origin.agent_id,
        intranet_ipv4=envelope.intranet_ipv4,
        extranet_ipv4=envelope.extranet_ipv4,
        intranet_ipv6=envelope.intranet_ipv6,
        extranet_ipv6=envelope.extranet_ipv6,
        hostname=envelope.hostname,
        version=envelope.version,
        product=envelope.product,
        svr_time=origin.received_unix_nanos // 1_000_000_000,
    ).SerializeToString()
    constant = [
        (name, value.decode())
        for name, value in records.record_headers(origin.agent_id, origin.node, batch, 0)
        if name != records.HEADER_INDEX
    ]
    for index, record in enumerate(opened):
        # Fields that are not known here could be taken for those of MQData.
        record.DiscardUnknownFields()
        headers = [*constant, (records.HEADER_INDEX, str(index))]
        # The three fields of a record have the numbers and types of MQData's first three; messages
        # that are put one behind the other are one.
        yield record.data_type, headers, record.SerializeToString() + common

"""What records there are, and how to read them back from Kafka messages and from files.

python -m outrider_proto.records FILE...     prints the records of the file sink as JSON lines
"""

import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Final

from google.protobuf.message import DecodeError

from outrider_proto import batches, limits
from outrider_proto.v1.agent_pb2 import Codec, EncodedRecord, Payload, RecordBatch
from outrider_proto.v1.sink_pb2 import StoredBatch

# Data types. Those below 20000 have the numbers that agents of the Elkeid family use.
#: State of the agent: once a minute.
AGENT_HEARTBEAT: Final = 1000
#: State of a plug-in: once a minute.
PLUGIN_HEARTBEAT: Final = 1001
#: A line of the agent's own log.
AGENT_LOG: Final = 1010
#: Output of a run; fields task_uid, namespace, task, attempt, offset, output, and encoding:
#: "utf-8", or "base64" where the bytes are no text.
TASK_OUTPUT: Final = 5100
#: Metrics of the host: CPU, memory, disks, network.
HOST_METRICS: Final = 20000
#: Something that happened to the agent itself, such as records dropped.
AGENT_EVENT: Final = 20001
# What there is on a host, whole or as what changed; docs/records.md tells the fields.
#: Installed packages.
INVENTORY_PACKAGES: Final = 20002
#: Users and groups.
INVENTORY_ACCOUNTS: Final = 20003
#: Listening ports.
INVENTORY_PORTS: Final = 20004
#: Mounted file systems.
INVENTORY_MOUNTS: Final = 20005
#: Loaded kernel modules.
INVENTORY_MODULES: Final = 20006

#: Names of the data types, for people.
NAMES: Final[Mapping[int, str]] = {
    AGENT_HEARTBEAT: "agent heart-beat",
    PLUGIN_HEARTBEAT: "plug-in heart-beat",
    AGENT_LOG: "agent log",
    TASK_OUTPUT: "task output",
    HOST_METRICS: "host metrics",
    AGENT_EVENT: "agent event",
    INVENTORY_PACKAGES: "packages",
    INVENTORY_ACCOUNTS: "users and groups",
    INVENTORY_PORTS: "listening ports",
    INVENTORY_MOUNTS: "mounts",
    INVENTORY_MODULES: "kernel modules",
}

# Headers of a Kafka message, all as ASCII text.
HEADER_AGENT: Final = "outrider-agent"
HEADER_NODE: Final = "outrider-node"
HEADER_EPOCH: Final = "outrider-epoch"
HEADER_SEQ: Final = "outrider-seq"
HEADER_COUNT: Final = "outrider-count"
HEADER_CODEC: Final = "outrider-codec"
HEADER_BYTES: Final = "outrider-decompressed-bytes"
HEADER_TYPES: Final = "outrider-data-types"
HEADER_TIME: Final = "outrider-server-time"
HEADER_CONTENT_TYPE: Final = "content-type"
#: Value of the content type header.
CONTENT_TYPE: Final = "application/vnd.outrider.record-list.v1+protobuf"


def payload(data_type: int, timestamp: int, fields: Mapping[str, str]) -> EncodedRecord:
    """A record of names and values; `timestamp` in seconds since the Unix epoch."""
    data = Payload(fields=fields).SerializeToString()
    return EncodedRecord(data_type=data_type, timestamp=timestamp, data=data)


def fields_of(record: EncodedRecord) -> dict[str, str]:
    """Names and values of a record made by `payload`.

    Raises:
        batches.BatchError: Its data is something else.
    """
    try:
        return dict(Payload.FromString(record.data).fields)
    except DecodeError:
        raise batches.BatchError(f"record of type {record.data_type} holds no payload") from None


@dataclass(frozen=True)
class Decoded:
    """A batch with where it came from, opened."""

    agent_id: str
    node: str
    epoch: int
    seq: int
    server_unix_nanos: int
    records: list[EncodedRecord]


def headers(
    agent_id: str, node: str, batch: RecordBatch, server_unix_nanos: int
) -> list[tuple[str, bytes]]:
    """The headers of the Kafka message whose value is `batch.records`."""
    pairs = [
        (HEADER_AGENT, agent_id),
        (HEADER_NODE, node),
        (HEADER_EPOCH, str(batch.epoch)),
        (HEADER_SEQ, str(batch.seq)),
        (HEADER_COUNT, str(batch.count)),
        (HEADER_CODEC, Codec.Name(batch.codec).removeprefix("CODEC_").lower()),
        (HEADER_BYTES, str(batch.decompressed_bytes)),
        (HEADER_TYPES, ",".join(map(str, batch.data_types))),
        (HEADER_TIME, str(server_unix_nanos)),
        (HEADER_CONTENT_TYPE, CONTENT_TYPE),
    ]
    return [(name, value.encode()) for name, value in pairs]


def decode_message(message_headers: Sequence[tuple[str, bytes]], value: bytes) -> Decoded:
    """Open a Kafka message.

    Raises:
        batches.BatchError: A header is missing or wrong, or the value cannot be opened.
    """
    found = {name: raw.decode("utf-8", "replace") for name, raw in message_headers}
    try:
        batch = RecordBatch(
            epoch=int(found[HEADER_EPOCH]),
            seq=int(found[HEADER_SEQ]),
            codec=Codec.Value("CODEC_" + found[HEADER_CODEC].upper()),
            records=value,
            count=int(found[HEADER_COUNT]),
            decompressed_bytes=int(found[HEADER_BYTES]),
        )
        agent_id, node = found[HEADER_AGENT], found[HEADER_NODE]
        time = int(found[HEADER_TIME])
    except KeyError as error:
        raise batches.BatchError(f"the header {error} is missing") from None
    except ValueError as error:
        raise batches.BatchError(f"a header is wrong: {error}") from None
    return Decoded(agent_id, node, batch.epoch, batch.seq, time, batches.decode(batch))


def decode_stored(stored: StoredBatch) -> Decoded:
    """Open a batch of the file sink.

    Raises:
        batches.BatchError: It cannot be opened.
    """
    batch = stored.batch
    opened = batches.decode(batch)
    return Decoded(
        stored.agent_id, stored.node, batch.epoch, batch.seq, stored.server_unix_nanos, opened
    )


def frame(stored: StoredBatch) -> bytes:
    """A batch as it stands in a file: its length as a varint, then the message."""
    body = stored.SerializeToString()
    length, prefix = len(body), bytearray()
    while length > 0x7F:
        prefix.append(length & 0x7F | 0x80)
        length >>= 7
    prefix.append(length)
    return bytes(prefix) + body


def read_stored(file: IO[bytes]) -> Iterator[StoredBatch]:
    """The batches of a file, up to its end or to a frame that was not written whole.

    Raises:
        batches.BatchError: A frame is damaged.
    """
    while head := _read_varint(file):
        if head > limits.MESSAGE_BYTES:
            raise batches.BatchError(f"a frame states {head} bytes")
        body = file.read(head)
        if len(body) < head:
            return
        try:
            yield StoredBatch.FromString(body)
        except DecodeError:
            raise batches.BatchError("a frame does not hold a batch") from None


def _read_varint(file: IO[bytes]) -> int:
    """The next length, or 0 at the end."""
    value = shift = 0
    while byte := file.read(1):
        value |= (byte[0] & 0x7F) << shift
        if not byte[0] & 0x80:
            return value
        shift += 7
        if shift > 28:
            raise batches.BatchError("a frame has no length")
    return 0


def first_seen(decoded: Iterable[Decoded]) -> Iterator[Decoded]:
    """Drop repeats: batches whose (agent, epoch, seq) came before.

    Keeps a number per batch: for bounded streams such as files, not for endless ones.
    """
    seen: set[tuple[str, int, int]] = set()
    for batch in decoded:
        name = (batch.agent_id, batch.epoch, batch.seq)
        if name not in seen:
            seen.add(name)
            yield batch


def as_json(batch: Decoded) -> Iterator[str]:
    """Each record of a batch as one line of JSON."""
    for record in batch.records:
        line: dict[str, object] = {
            "agent": batch.agent_id,
            "node": batch.node,
            "type": record.data_type,
            "timestamp": record.timestamp,
        }
        try:
            line["fields"] = fields_of(record)
        except batches.BatchError:
            line["data"] = record.data.hex()
        yield json.dumps(line, ensure_ascii=False)


def main(names: Sequence[str]) -> int:
    """Print the records of files; the exit code is 1 if one could not be read whole."""
    status = 0
    for name in names:
        try:
            with open(name, "rb") as file:  # noqa: PTH123 - a name from the command line
                for batch in first_seen(map(decode_stored, read_stored(file))):
                    for line in as_json(batch):
                        sys.stdout.write(line + "\n")
        except (OSError, batches.BatchError) as error:
            sys.stderr.write(f"{name}: {error}\n")
            status = 1
    return status


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

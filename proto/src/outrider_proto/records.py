"""What records there are, and how to read them back from Kafka messages and from files.

For a consumer of its own: `decode_message` opens what is in Kafka in either form, `read_stored`
and `decode_stored` what is in files, `first_seen` drops repeats, `fields_of` has what a record
says. docs/records.md has an example. Knows no broker, and reads files that it is given.

python -m outrider_proto.records FILE...     prints the records of the file sink as JSON lines
"""

import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from google.protobuf.message import DecodeError

from outrider_proto import batches
from outrider_proto.repeats import Repeats
from outrider_proto.stored import frame as frame  # noqa: PLC0414 - part of this API
from outrider_proto.stored import read_stored as read_stored  # noqa: PLC0414 - likewise
from outrider_proto.v1.agent_pb2 import Codec, EncodedRecord, Payload, RecordBatch
from outrider_proto.v1.sink_pb2 import MQData, StoredBatch

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
#: What a program on the node handed to a listener of the agent; fields listener, source (the
#: program's address), report, and encoding: "utf-8", or "base64" where the report is no text.
LOCAL_REPORT: Final = 20007

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
    LOCAL_REPORT: "local report",
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
#: Where each record is a message of its own: its place in its batch, from 0.
HEADER_INDEX: Final = "outrider-index"
#: Why a message is in a dead-letter topic.
HEADER_REASON: Final = "outrider-reason"
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
    """Records with where they came from: a whole batch, or one record of it.

    Attributes:
        agent_id: UID of the Node.
        node: Name of the Node.
        epoch: The life of the agent's outbox; with `agent_id` and `seq` it names the batch.
        seq: Number of the batch in that life.
        server_unix_nanos: When the server took it, nanoseconds since the Unix epoch.
        records: Oldest first; one where each record is a message of its own.
        index: Place of that one record in its batch; None for a whole batch.
        count: Records of the whole batch; 0 where that is not known.
        reason: Why it was set aside; empty for all others.
    """

    agent_id: str
    node: str
    epoch: int
    seq: int
    server_unix_nanos: int
    records: list[EncodedRecord]
    index: int | None = None
    count: int = 0
    reason: str = ""


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


def record_headers(
    agent_id: str, node: str, batch: RecordBatch, index: int
) -> list[tuple[str, bytes]]:
    """The headers of the Kafka message whose value is one record of a batch, an MQData."""
    pairs = [
        (HEADER_AGENT, agent_id),
        (HEADER_NODE, node),
        (HEADER_EPOCH, str(batch.epoch)),
        (HEADER_SEQ, str(batch.seq)),
        (HEADER_COUNT, str(batch.count)),
        (HEADER_INDEX, str(index)),
    ]
    return [(name, value.encode()) for name, value in pairs]


def decode_message(message_headers: Sequence[tuple[str, bytes]], value: bytes) -> Decoded:
    """Open a Kafka message, one that holds a batch or one that holds a record.

    Args:
        message_headers: Names and values, as clients of Kafka give them.
        value: The message's value.

    Raises:
        batches.BatchError: A header is missing or wrong, or the value cannot be opened.
    """
    found = {name: raw.decode("utf-8", "replace") for name, raw in message_headers}
    try:
        if HEADER_INDEX in found:
            return _one(found, value)
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
    except batches.BatchError:
        raise
    except ValueError as error:
        raise batches.BatchError(f"a header is wrong: {error}") from None
    opened = batches.decode(batch)
    return Decoded(
        agent_id,
        node,
        batch.epoch,
        batch.seq,
        time,
        opened,
        count=len(opened),
        reason=found.get(HEADER_REASON, ""),
    )


def _one(found: Mapping[str, str], value: bytes) -> Decoded:
    """The message of one record. Raises KeyError and ValueError for headers that are wrong."""
    try:
        data = MQData.FromString(value)
    except DecodeError:
        raise batches.BatchError("the message does not hold a record") from None
    record = EncodedRecord(data_type=data.data_type, timestamp=data.agent_time, data=data.body)
    return Decoded(
        found[HEADER_AGENT],
        found[HEADER_NODE],
        int(found[HEADER_EPOCH]),
        int(found[HEADER_SEQ]),
        data.svr_time * 1_000_000_000,
        [record],
        index=int(found[HEADER_INDEX]),
        count=int(found.get(HEADER_COUNT, "0")),
        reason=found.get(HEADER_REASON, ""),
    )


def decode_stored(stored: StoredBatch) -> Decoded:
    """Open a batch of the file sink.

    Raises:
        batches.BatchError: It cannot be opened.
    """
    batch = stored.batch
    opened = batches.decode(batch)
    return Decoded(
        stored.agent_id,
        stored.node,
        batch.epoch,
        batch.seq,
        stored.server_unix_nanos,
        opened,
        count=len(opened),
        reason=stored.reason,
    )


def first_seen(decoded: Iterable[Decoded], repeats: Repeats | None = None) -> Iterator[Decoded]:
    """Drop repeats, also from streams that never end.

    Args:
        decoded: Batches and single records, in any order.
        repeats: What is remembered, for bounds of your own or to go on with what came before.
    """
    seen = Repeats() if repeats is None else repeats
    for item in decoded:
        if seen.is_new(item.agent_id, item.epoch, item.seq, item.index, item.count):
            yield item


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
        if batch.reason:
            line["setAside"] = batch.reason
        yield json.dumps(line, ensure_ascii=False)


def main(names: Sequence[str]) -> int:
    """Print the records of files; the exit code is 1 if one could not be read whole."""
    status = 0
    for name in names:
        repeats = Repeats()
        try:
            with open(name, "rb") as file:  # noqa: PTH123 - a name from the command line
                for stored in read_stored(file):
                    status |= _print(name, stored, repeats)
        except (OSError, batches.BatchError) as error:
            sys.stderr.write(f"{name}: {error}\n")
            status = 1
    return status


def _print(name: str, stored: StoredBatch, repeats: Repeats) -> int:
    """Print one batch; 1 if it cannot be opened, which nobody on the way finds out."""
    try:
        batch = decode_stored(stored)
    except batches.BatchError as error:
        which = f"batch {stored.batch.epoch}/{stored.batch.seq} of {stored.node}"
        sys.stderr.write(f"{name}: {which}: {error}\n")
        return 1
    for item in first_seen([batch], repeats):
        for line in as_json(item):
            sys.stdout.write(line + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

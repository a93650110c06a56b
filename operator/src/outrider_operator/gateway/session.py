"""The protocol of an agent's stream, without input or output.

Feed it the messages as they came off the wire, read what each of them means; the shell around it
(transfer.py) acts on that. Nothing an agent says of itself is believed: its node is the one in
its token, and another one is refused.
"""

import enum
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from google.protobuf.message import DecodeError
from outrider_proto import batches, limits
from outrider_proto.v1.agent_pb2 import (
    ConfigReport,
    EncodedRecord,
    Heartbeat,
    Hello,
    PackagedData,
    RecordBatch,
    RunReport,
)
from outrider_proto.wire import beyond

from outrider_operator.core.batch import Batch, SeenBatch
from outrider_operator.core.identity import Identity
from outrider_operator.core.sink import NO_ENVELOPE, Envelope
from outrider_operator.gateway.glance import Glance, besides_records

#: Longest texts in a Hello, characters: they end up in Agent objects.
HELLO_TEXT_LENGTH: Final = 128
HELLO_RUN_KINDS: Final = 16
#: Longest task UID and reason in a run report, characters.
UID_LENGTH: Final = 64
REASON_LENGTH: Final = 64
#: Most differences in a config report; longest hash, name and version in it, characters.
CONFIG_DRIFTS: Final = 16
HASH_LENGTH: Final = 64
PLUGIN_TEXT_LENGTH: Final = 128
#: Longest list of addresses and longest text of an Envelope, characters; the rest is cut off.
ENVELOPE_ADDRESSES_LENGTH: Final = 1024
ENVELOPE_TEXT_LENGTH: Final = 253
#: How a gzip file begins. No message does: it would be a field of a kind that there is not.
GZIP_MAGIC: Final = b"\x1f\x8b"
#: Messages with more than this besides the records of batches are counted before they are parsed,
#: bytes.
COUNTED_BYTES: Final = 16 * limits.KIB
#: Most entries of repeated fields by their path; () is any other field.
ENTRIES: Final = {
    (1,): limits.BATCH_RECORDS,
    (3,): 64,
    (4,): 64,
    (5,): 64,
    (6,): 64,
    (16, 8): HELLO_RUN_KINDS,
    (17,): limits.BATCHES_PER_MESSAGE,
    (17, 7): limits.BATCHES_PER_MESSAGE * limits.BATCH_DATA_TYPES,
    (18, 1): limits.RUNS_PER_MESSAGE,
    (20, 5): limits.PLUGINS,
    (20, 6): CONFIG_DRIFTS,
}


#: The kinds of messages but for batches, by their fields.
KINDS: Final = ("hello", "run_report", "config_report", "heartbeat")


@dataclass(frozen=True)
class Opened:
    """The first message was a good hello."""

    hello: Hello
    envelope: Envelope


@dataclass(frozen=True)
class BatchesCame:
    """Batches to store, in this order; they keep the limits, and were not opened.

    Attributes:
        batches: each with its size in bytes, all of it.
        records: how many records they state.
        size: of all of them, bytes.
    """

    batches: Sequence[tuple[Batch, int]]
    records: int
    size: int


@dataclass(frozen=True)
class PlainCame:
    """Plain records, from an agent of another kind; their number keeps the limits."""

    records: list[EncodedRecord]
    envelope: Envelope


@dataclass(frozen=True)
class RunsReported:
    """States of runs to pass on to the leader."""

    report: RunReport


@dataclass(frozen=True)
class ConfigReported:
    """How the agent stands to its configuration; a serialized ConfigReport within its limits."""

    report: bytes


@dataclass(frozen=True)
class HeartbeatCame:
    """A sign of life to answer."""

    heartbeat: Heartbeat


@dataclass(frozen=True)
class Refused:
    """The stream is to end: the peer broke the contract.

    Attributes:
        code: gRPC status code by name.
        reason: a CamelCase word of a small fixed set, for metrics.
        message: what was wrong and what was expected, for people.
    """

    code: str
    reason: str
    message: str


Event = Opened | BatchesCame | RunsReported | ConfigReported | HeartbeatCame | PlainCame | Refused


class State(enum.Enum):
    """Where a stream stands."""

    AWAITING_HELLO = "awaiting hello"
    OPEN = "open"
    PLAIN = "plain records"
    ENDED = "ended"


class SessionProtocol:
    """One agent's stream, seen from the server.

    Args:
        identity: who the agent is, from its token.
        plain: whether a stream may have plain records, without hello, instead.
    """

    __slots__ = ("_glance", "_identity", "_plain", "state")

    def __init__(self, identity: Identity, *, plain: bool = False) -> None:
        self._identity = identity
        self._plain = plain
        self._glance = Glance()
        self.state = State.AWAITING_HELLO

    def receive(self, data: bytes) -> Event:
        """Take one message as it came; say what it means.

        After `Refused` the stream has ended and takes no more.

        Raises:
            ValueError: the stream has ended before.
        """
        if self.state is State.ENDED:
            raise ValueError("the stream has ended")
        event = self._understand(data)
        if isinstance(event, Refused):
            self.state = State.ENDED
        elif isinstance(event, Opened):
            self.state = State.OPEN
        elif isinstance(event, PlainCame):
            self.state = State.PLAIN
        return event

    def _understand(self, data: bytes) -> Event:
        if self._plain and data.startswith(GZIP_MAGIC):
            unpacked = _gunzip(data)
            if isinstance(unpacked, Refused):
                return unpacked
            data = unpacked
        if len(data) > limits.MESSAGE_BYTES:
            return Refused(
                "RESOURCE_EXHAUSTED",
                "TooLarge",
                f"a message of {len(data)} bytes; at most {limits.MESSAGE_BYTES}",
            )
        if self.state is State.OPEN and (seen := self._glance.batches(data)):
            return BatchesCame(
                seen,
                records=sum(batch.count for batch, _ in seen),
                size=sum(size for _, size in seen),
            )
        if len(data) > COUNTED_BYTES and besides_records(data) > COUNTED_BYTES:
            path = beyond(data, ENTRIES)
            if path is not None:
                field = ".".join(map(str, path)) or "that is unknown"
                return _invalid("TooManyEntries", f"too many entries in a field {field}")
        try:
            message = PackagedData.FromString(data)
        except DecodeError:
            return _invalid("Unparsable", "the message is no PackagedData")
        if message.agent_id and message.agent_id != self._identity.node_uid:
            return _denied("ForeignAgentId", "agent_id is not the one in the token")
        kinds = [name for name in KINDS if message.HasField(name)]
        if message.batches:
            kinds.append("batches")
        if len(kinds) > 1:
            return _invalid("SeveralKinds", f"a message holds one of {', '.join(kinds)}")
        if self.state is State.PLAIN or (
            self._plain and self.state is State.AWAITING_HELLO and not kinds
        ):
            return _plain_records(message, kinds)
        if self.state is State.AWAITING_HELLO:
            return self._open(message)
        return self._content(message, kinds[0] if kinds else "")

    def _open(self, message: PackagedData) -> Event:
        if not message.HasField("hello"):
            return _invalid("NoHello", "the first message must hold hello")
        hello = message.hello
        if hello.node != self._identity.node:
            return _denied("ForeignNode", "hello.node is not the node in the token")
        # Fields that are not known here count as well: they are kept and passed on.
        if hello.ByteSize() > limits.HELLO_BYTES:
            return _invalid("BadHello", f"a hello has at most {limits.HELLO_BYTES} bytes")
        texts = [hello.version, hello.net_mode, hello.instance, hello.platform, hello.kernel]
        texts += hello.run_kinds
        if len(hello.run_kinds) > HELLO_RUN_KINDS or any(
            len(text) > HELLO_TEXT_LENGTH for text in texts
        ):
            return _invalid(
                "BadHello",
                f"at most {HELLO_RUN_KINDS} run_kinds, and {HELLO_TEXT_LENGTH} characters a text",
            )
        return Opened(hello, envelope(message))

    def _content(self, message: PackagedData, kind: str) -> Event:
        if kind == "batches":
            return _batches(list(message.batches))
        if kind == "run_report":
            problem = check_report(message.run_report)
            return (
                _invalid("BadRunReport", problem) if problem else RunsReported(message.run_report)
            )
        if kind == "config_report":
            problem = check_config_report(message.config_report)
            if problem:
                return _invalid("BadConfigReport", problem)
            return ConfigReported(message.config_report.SerializeToString())
        if kind == "heartbeat":
            return HeartbeatCame(message.heartbeat)
        if kind == "hello":
            return _invalid("SecondHello", "hello is only for the first message")
        if message.records:
            return _invalid("PlainRecords", "plain records are not accepted here, send batches")
        return _invalid("Empty", "the message holds nothing that is known here")


def envelope(message: PackagedData) -> Envelope:
    """What an agent says of its host, cut to a size that can go with every record."""

    def addresses(found: Iterable[str]) -> str:
        joined = ",".join(found)
        if len(joined) <= ENVELOPE_ADDRESSES_LENGTH:
            return joined
        return joined[:ENVELOPE_ADDRESSES_LENGTH].rpartition(",")[0]

    made = Envelope(
        intranet_ipv4=addresses(message.intranet_ipv4),
        extranet_ipv4=addresses(message.extranet_ipv4),
        intranet_ipv6=addresses(message.intranet_ipv6),
        extranet_ipv6=addresses(message.extranet_ipv6),
        hostname=message.hostname[:ENVELOPE_TEXT_LENGTH],
        version=message.version[:ENVELOPE_TEXT_LENGTH],
        product=message.product[:ENVELOPE_TEXT_LENGTH],
    )
    return NO_ENVELOPE if made == NO_ENVELOPE else made


def check_report(report: RunReport) -> str | None:
    """Why a run report is beyond the limits; None when it keeps them."""
    if report.ByteSize() > limits.RUN_REPORT_BYTES:
        return f"a report of {report.ByteSize()} bytes; at most {limits.RUN_REPORT_BYTES}"
    if len(report.runs) > limits.RUNS_PER_MESSAGE:
        return f"{len(report.runs)} runs; at most {limits.RUNS_PER_MESSAGE}"
    for run in report.runs:
        if not run.id.task_uid or len(run.id.task_uid) > UID_LENGTH or run.id.attempt == 0:
            return "a run is named by task_uid and an attempt above 0"
        if len(run.preview) > limits.PREVIEW_BYTES:
            return f"a preview of {len(run.preview)} bytes; at most {limits.PREVIEW_BYTES}"
        if len(run.message) > limits.RUN_MESSAGE_BYTES or len(run.reason) > REASON_LENGTH:
            return (
                f"a reason has at most {REASON_LENGTH} characters, "
                f"a message {limits.RUN_MESSAGE_BYTES} bytes"
            )
    return None


def check_config_report(report: ConfigReport) -> str | None:
    """Why a config report is beyond the limits; None when it keeps them."""
    if report.ByteSize() > limits.CONFIG_REPORT_BYTES:
        return f"a report of {report.ByteSize()} bytes; at most {limits.CONFIG_REPORT_BYTES}"
    if len(report.plugins) > limits.PLUGINS or len(report.drift) > CONFIG_DRIFTS:
        return f"at most {limits.PLUGINS} plug-ins and {CONFIG_DRIFTS} differences"
    if len(report.hash) > HASH_LENGTH or len(report.tried_hash) > HASH_LENGTH:
        return f"a hash has at most {HASH_LENGTH} characters"
    sentences = [report.message, *report.drift, *(plugin.message for plugin in report.plugins)]
    if any(len(text) > limits.CONFIG_MESSAGE_BYTES for text in sentences):
        return f"a message has at most {limits.CONFIG_MESSAGE_BYTES} bytes"
    names = [text for p in report.plugins for text in (p.name, p.version, p.reason)]
    if any(len(text) > PLUGIN_TEXT_LENGTH for text in names):
        return f"names, versions and reasons have at most {PLUGIN_TEXT_LENGTH} characters"
    return None


def _batches(came: list[RecordBatch]) -> Event:
    if len(came) > limits.BATCHES_PER_MESSAGE:
        return _invalid(
            "TooManyBatches", f"{len(came)} batches; at most {limits.BATCHES_PER_MESSAGE} a message"
        )
    sized: list[tuple[Batch, int]] = []
    records = size = 0
    for batch in came:
        problem = batches.check(batch)
        if problem:
            return _invalid("BadBatch", problem)
        one = batch.ByteSize()
        # A copy of its own: the batches of a parsed message are kept as long as one of them is.
        sized.append((SeenBatch.of(batch), one))
        records += batch.count
        size += one
    return BatchesCame(sized, records, size)


def _plain_records(message: PackagedData, kinds: list[str]) -> Event:
    if kinds:
        return _invalid("SeveralKinds", "a stream holds plain records only, or begins with hello")
    for record in message.records:
        if len(record.data) > limits.RECORD_BYTES:
            return _invalid(
                "BadRecord",
                f"a record of {len(record.data)} bytes; at most {limits.RECORD_BYTES}",
            )
    return PlainCame(list(message.records), envelope(message))


def _gunzip(data: bytes) -> bytes | Refused:
    """What a message compressed by grpc itself holds, with the same bound as any other."""
    unpacker = zlib.decompressobj(zlib.MAX_WBITS | 16)
    try:
        unpacked = unpacker.decompress(data, limits.MESSAGE_BYTES + 1)
    except zlib.error as error:
        return _invalid("Unparsable", f"the message is no gzip data: {error}")
    if len(unpacked) > limits.MESSAGE_BYTES:
        return Refused(
            "RESOURCE_EXHAUSTED",
            "TooLarge",
            f"a message that unpacks to more than {limits.MESSAGE_BYTES} bytes",
        )
    if not unpacker.eof:
        return _invalid("Unparsable", "the message is gzip data without an end")
    if unpacker.unused_data:
        return _invalid("Unparsable", "the message is more than one gzip member: send one")
    return unpacked


def _invalid(reason: str, message: str) -> Refused:
    return Refused("INVALID_ARGUMENT", reason, message)


def _denied(reason: str, message: str) -> Refused:
    return Refused("PERMISSION_DENIED", reason, message)

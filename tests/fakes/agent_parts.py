"""Parts of the agent that its tests put together again and again."""

import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from outrider_agent.core.batching import Held
from outrider_agent.core.records import RecordClass
from outrider_agent.metrics import AgentMetrics
from outrider_agent.store.outbox import NewBatch
from outrider_agent.store.store import Store, StoreLimits, open_store
from outrider_proto import batches, limits, records
from outrider_proto.v1 import agent_pb2 as pb
from prometheus_client import CollectorRegistry

LIMITS = StoreLimits(max_outbox_bytes=1024 * 1024, tombstone_seconds=3600, max_tombstones=100)


def value(metrics_registry: CollectorRegistry, name: str, **labels: str) -> float:
    """A metric's value, 0 for one that was not touched."""
    return metrics_registry.get_sample_value(name, labels) or 0.0


@contextlib.asynccontextmanager
async def store_in(
    directory: Path, limits: StoreLimits = LIMITS, registry: CollectorRegistry | None = None
) -> AsyncIterator[Store]:
    """An open store."""
    metrics = AgentMetrics(registry or CollectorRegistry())
    async with open_store(directory, limits, metrics) as store:
        yield store


def run_state(
    uid: str, phase: pb.RunPhase.ValueType = pb.RUN_PHASE_ACCEPTED, attempt: int = 1
) -> pb.RunState:
    return pb.RunState(id=pb.RunId(task_uid=uid, attempt=attempt), phase=phase)


def held_of(made: Sequence[pb.EncodedRecord]) -> Held:
    """Records as a batcher holds them."""
    held = Held()
    for record in made:
        held.add(batches.entry(record), record.data_type)
    return held


def new_batch(
    made: Sequence[pb.EncodedRecord],
    record_class: RecordClass = RecordClass.LOG,
    codec: pb.Codec.ValueType = pb.CODEC_NONE,
    max_bytes: int = limits.BATCH_BYTES,
) -> NewBatch:
    return NewBatch(held_of(made), record_class, codec, time.time_ns(), max_bytes)


def batch_of(text: str, record_class: RecordClass = RecordClass.LOG, count: int = 1) -> NewBatch:
    return new_batch([records.payload(records.AGENT_LOG, 1, {"text": text})] * count, record_class)


class ListSink:
    """Takes records into a list; as a core.records.RecordSink."""

    def __init__(self) -> None:
        self.records: list[tuple[pb.EncodedRecord, RecordClass]] = []

    def submit(self, record: pb.EncodedRecord, record_class: RecordClass) -> bool:
        self.records.append((record, record_class))
        return True

    async def put(self, record: pb.EncodedRecord, record_class: RecordClass) -> None:
        self.submit(record, record_class)

    async def flush(self, record_class: RecordClass) -> None:
        pass

    def fields(self, data_type: int) -> list[dict[str, str]]:
        return [records.fields_of(r) for r, _ in self.records if r.data_type == data_type]

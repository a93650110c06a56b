"""Every metric of the agent's own, in one place: names, help, and constant, bounded label sets.

Holds no values of parts that know them: those are read when scraped, by functions set here.
"""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

#: Bounds for things that go to disk or to the network, seconds.
_FAST = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
#: Bounds for runs, seconds.
_RUN = (0.01, 0.05, 0.1, 0.5, 1, 5, 10, 30, 60, 300, 900, 3600)


class AgentMetrics:
    """The agent's metrics, made once and passed to its parts."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.info = Gauge(
            "outrider_agent_info",
            "Always 1; the version is in its label.",
            ["version"],
            registry=registry,
        )
        self.shut_down = Gauge(
            "outrider_agent_shut_down",
            "1 while the agent stays away, as a Shutdown told it to.",
            registry=registry,
        )
        self._uplink(registry)
        self._records(registry)
        self._store(registry)
        self._runs(registry)
        self.collections = Histogram(
            "outrider_agent_collection_seconds",
            "Time that gathering took, by collector.",
            ["collector"],
            buckets=_FAST,
            registry=registry,
        )
        self.collection_failures = Counter(
            "outrider_agent_collection_failures_total",
            "Collections that failed, by collector.",
            ["collector"],
            registry=registry,
        )

        self.inventory_left_out = Gauge(
            "outrider_agent_inventory_left_out",
            "Entries of the inventory beyond its bound, by kind.",
            ["kind"],
            registry=registry,
        )

    def _uplink(self, registry: CollectorRegistry) -> None:
        self.connected = Gauge(
            "outrider_agent_connected", "1 while a server has taken our stream.", registry=registry
        )
        self.connects = Counter(
            "outrider_agent_connects_total",
            "Tries to connect, by net mode (sd, private, public) and result (ok, unreachable, "
            "refused, pushed_back, failed).",
            ["net_mode", "result"],
            registry=registry,
        )
        self.disconnects = Counter(
            "outrider_agent_disconnects_total",
            "Ends of streams, by reason.",
            ["reason"],
            registry=registry,
        )
        self.discovery_failures = Counter(
            "outrider_agent_discovery_failures_total",
            "Look-ups of servers that found none.",
            registry=registry,
        )
        self.sent_bytes = Counter(
            "outrider_agent_sent_bytes_total", "Bytes of messages sent.", registry=registry
        )
        self.received_bytes = Counter(
            "outrider_agent_received_bytes_total", "Bytes of messages received.", registry=registry
        )
        self.sent_messages = Counter(
            "outrider_agent_sent_messages_total",
            "Messages sent, by kind (hello, report, changes, heartbeat, batches).",
            ["kind"],
            registry=registry,
        )
        self.received_messages = Counter(
            "outrider_agent_received_messages_total", "Messages received.", registry=registry
        )
        self.sent_records = Counter(
            "outrider_agent_sent_records_total",
            "Records sent, also those sent again.",
            registry=registry,
        )
        self.acked_batches = Counter(
            "outrider_agent_acked_batches_total", "Batches acknowledged.", registry=registry
        )
        self.rejected_batches = Counter(
            "outrider_agent_rejected_batches_total",
            "Batches that a server does not take as they are, by what became of them (too_large: "
            "made into smaller ones; indivisible and other: kept).",
            ["reason"],
            registry=registry,
        )
        self.in_flight_bytes = Gauge(
            "outrider_agent_in_flight_bytes",
            "Bytes of batches sent and not acknowledged yet.",
            registry=registry,
        )
        self.slowed_seconds = Counter(
            "outrider_agent_slowed_seconds_total",
            "Time in which a server wanted no batches.",
            registry=registry,
        )

    def _records(self, registry: CollectorRegistry) -> None:
        self.records = Counter(
            "outrider_agent_records_total", "Records taken, by class.", ["class"], registry=registry
        )
        self.dropped_records = Counter(
            "outrider_agent_dropped_records_total",
            "Records given up, by class and reason (queue_full, refused, outbox_full, disk_low, "
            "too_large, damaged, stopping).",
            ["class", "reason"],
            registry=registry,
        )
        self.queue_bytes = Gauge(
            "outrider_agent_queue_bytes",
            "Bytes of records that wait to be stored.",
            registry=registry,
        )

    def _store(self, registry: CollectorRegistry) -> None:
        self.outbox_bytes = Gauge(
            "outrider_agent_outbox_bytes", "Bytes of batches in the outbox.", registry=registry
        )
        self.outbox_batches = Gauge(
            "outrider_agent_outbox_batches", "Batches in the outbox.", registry=registry
        )
        self.outbox_limit_bytes = Gauge(
            "outrider_agent_outbox_limit_bytes",
            "Bound of the outbox: the setting, or less while the disk has little room.",
            registry=registry,
        )
        self.split_batches = Counter(
            "outrider_agent_split_batches_total",
            "Batches that were made smaller because a server does not take them.",
            registry=registry,
        )
        self.commits = Histogram(
            "outrider_agent_store_commit_seconds",
            "Time of a commit of the agent's file, for a group of operations.",
            buckets=_FAST,
            registry=registry,
        )
        self.syncs = Counter(
            "outrider_agent_store_syncs_total",
            "Commits of the agent's file that waited for the disk.",
            registry=registry,
        )
        self.store_operations = Counter(
            "outrider_agent_store_operations_total", "Operations on the file.", registry=registry
        )
        self.store_failures = Counter(
            "outrider_agent_store_failures_total",
            "Operations on the file that failed.",
            registry=registry,
        )
        self.store_queue = Gauge(
            "outrider_agent_store_queue", "Operations that wait for the file.", registry=registry
        )
        self.damaged_files = Counter(
            "outrider_agent_store_damaged_total",
            "Damaged files that were set aside.",
            registry=registry,
        )

    def _runs(self, registry: CollectorRegistry) -> None:
        self.runs = Counter(
            "outrider_agent_runs_total", "Runs that ended, by phase.", ["phase"], registry=registry
        )
        self.runs_repeated = Counter(
            "outrider_agent_runs_repeated_total",
            "Commands for runs that were known already, and were not run again.",
            registry=registry,
        )
        self.runs_active = Gauge(
            "outrider_agent_runs_active", "Runs whose process is there.", registry=registry
        )
        self.runs_queued = Gauge(
            "outrider_agent_runs_queued", "Runs that wait for a place.", registry=registry
        )
        self.run_seconds = Histogram(
            "outrider_agent_run_seconds", "Duration of runs.", buckets=_RUN, registry=registry
        )
        self.run_output_bytes = Counter(
            "outrider_agent_run_output_bytes_total", "Bytes that runs printed.", registry=registry
        )
        self.reaped = Counter(
            "outrider_agent_reaped_total",
            "Ended processes of runs that nobody else waited for.",
            registry=registry,
        )

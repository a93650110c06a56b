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
        self._plugins(registry)
        self._config(registry)
        self._listeners(registry)
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
            "Messages sent, by kind (hello, report, changes, config, heartbeat, batches).",
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

    def _config(self, registry: CollectorRegistry) -> None:
        self.config_info = Gauge(
            "outrider_agent_config_info",
            "Always 1; the hash of the configuration in force is in its label, empty for none.",
            ["hash"],
            registry=registry,
        )
        self.config_phase = Gauge(
            "outrider_agent_config_phase",
            "1 for how the agent stands to its configuration (none, applying, applied, failed).",
            ["phase"],
            registry=registry,
        )
        self.config_applies = Counter(
            "outrider_agent_config_applies_total",
            "Configurations that were tried, by result (applied, failed, superseded).",
            ["result"],
            registry=registry,
        )
        self.config_drift = Gauge(
            "outrider_agent_config_drift",
            "Things that differ from the configuration in force.",
            registry=registry,
        )
        self.own_limit = Gauge(
            "outrider_agent_limit_enforced",
            "For a limit of the agent's own use that is asked for (cpu, memory): 1 if the kernel "
            "holds the agent to it, 0 if not; -1: none is asked for.",
            ["resource"],
            registry=registry,
        )

    def _listeners(self, registry: CollectorRegistry) -> None:
        self.listener_connections = Gauge(
            "outrider_agent_listener_connections",
            "Connections of local programs, by listener.",
            ["listener"],
            registry=registry,
        )
        self.listener_packets = Counter(
            "outrider_agent_listener_packets_total",
            "Packets taken, by listener and kind (heartbeat, report).",
            ["listener", "kind"],
            registry=registry,
        )
        self.listener_closed = Counter(
            "outrider_agent_listener_closed_total",
            "Connections that we closed, by listener and reason (rubbish, idle, crowded, slow, "
            "moved).",
            ["listener", "reason"],
            registry=registry,
        )

    def _plugins(self, registry: CollectorRegistry) -> None:
        """Of plug-ins, by name; what is known of one goes with it."""

        def gauge(name: str, text: str) -> Gauge:
            full = f"outrider_agent_plugin_{name}"
            return Gauge(full, text, ["plugin"], registry=registry)

        def counter(name: str, text: str, *more: str) -> Counter:
            full = f"outrider_agent_plugin_{name}"
            return Counter(full, text, ["plugin", *more], registry=registry)

        self.plugin_up = gauge("up", "1 while it runs.")
        self.plugin_healthy = gauge("healthy", "1 once it has run for a while without ending.")
        self.plugin_rss = gauge("resident_memory_bytes", "Resident memory of its processes.")
        self.plugin_cpu = gauge(
            "cpu_seconds", "Processor time of the processes it has now, and of their children."
        )
        self.plugin_descriptors = gauge("open_fds", "Open descriptors of its processes.")
        self.plugin_restarts = counter("restarts_total", "How often it was started again.")
        self.plugin_records = counter("records_total", "Records taken from it.")
        self.plugin_bytes = counter("bytes_total", "Bytes of records taken from it.")
        self.plugin_faults = counter(
            "faults_total",
            "What it did wrong (framing, record, reserved_type, torn, memory, cpu); "
            "look: the agent could not look at it.",
            "kind",
        )
        self.plugin_throttled = counter(
            "throttled_seconds_total", "Time it was not read because of its limits of records."
        )
        self.plugin_lines = counter(
            "log_lines_total", "Lines it printed (logged, suppressed).", "result"
        )
        self.plugin_tasks = counter(
            "tasks_total", "Tasks for it, by result (answered, no_answer, full, ended).", "result"
        )

    def forget_plugin(self, name: str) -> None:
        """Take away what is known of a plug-in that is not there any more."""
        for metric in (
            self.plugin_up,
            self.plugin_healthy,
            self.plugin_rss,
            self.plugin_cpu,
            self.plugin_descriptors,
            self.plugin_restarts,
            self.plugin_records,
            self.plugin_bytes,
            self.plugin_faults,
            self.plugin_throttled,
            self.plugin_lines,
            self.plugin_tasks,
        ):
            metric.remove_by_labels({"plugin": name})

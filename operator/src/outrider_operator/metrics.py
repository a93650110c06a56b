"""Every metric of the server, in one place, so that names and label sets stay constant and bounded.

Labels take values from small fixed sets only: never a node, a task, an address or a text from the
wire. A part is handed the object and uses its fields; it makes no metric of its own.
"""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

STORE_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class ServerMetrics:
    """The server's metrics, registered in `registry`.

    Args:
        registry: where they are collected; one object per registry.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        self._add_gateway()
        self._add_authentication()
        self._add_link()
        self._add_sink()
        self._add_leader()
        self._add_configs()
        self._add_schedules()
        self._add_api_server()

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"outrider_server_{name}", text, labels, registry=self._registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(f"outrider_server_{name}", text, labels, registry=self._registry)

    def _histogram(
        self, name: str, text: str, buckets: tuple[float, ...] = STORE_SECONDS
    ) -> Histogram:
        return Histogram(f"outrider_server_{name}", text, buckets=buckets, registry=self._registry)

    def _add_gateway(self) -> None:
        self.streams = self._gauge("streams", "Agent streams open.")
        self.stream_ends = self._counter(
            "stream_ends_total", "Agent streams that ended after hello, by reason.", "reason"
        )
        self.refusals = self._counter(
            "refusals_total", "Calls and streams refused, by status code and reason.", "code",
            "reason",
        )  # fmt: skip
        self.messages = self._counter("messages_total", "Messages of agent streams.", "direction")
        self.bytes = self._counter("bytes_total", "Bytes of agent streams' messages.", "direction")
        # Looked up once: they are counted with every message.
        self.messages_up, self.messages_down = map(self.messages.labels, ("up", "down"))
        self.bytes_up, self.bytes_down = map(self.bytes.labels, ("up", "down"))
        self.records = self._counter("records_total", "Records in stored batches.")
        self.batches = self._counter("batches_total", "Record batches, by result.", "result")
        self.inflight_bytes = self._gauge(
            "batches_inflight_bytes",
            "Memory of batches taken and not stored yet, bytes: records and 8 KiB each.",
        )
        self.inflight_limit = self._gauge(
            "batches_inflight_limit_bytes", "Most bytes of batches taken and not stored yet."
        )
        self.store_seconds = self._histogram(
            "batch_store_seconds", "Time from taking a message's first batch until the sink has it."
        )
        self.batches_retrying = self._gauge(
            "batches_retrying", "Batches that the sink did not take, and that are tried again."
        )
        self.batch_rejects = self._counter(
            "batch_rejects_total",
            "Batches the sink never takes as they are, by reason and what was done.",
            "reason",
            "action",
        )
        self.slow_downs = self._counter(
            "slow_downs_total", "Times an agent was told to pause its batches, by reason.", "reason"
        )
        self.held_reads = self._counter(
            "held_reads_total", "Times a stream was not read because its agent did not pause."
        )
        self.connects = self._counter(
            "connects_total", "Streams that asked to begin, by admission.", "result"
        )
        self.plain_streams = self._gauge("plain_streams", "Streams of plain records open.")
        self.plain_records = self._counter("plain_records_total", "Plain records taken.")
        self.plain_lost = self._counter(
            "plain_lost_total",
            "Plain records that were read and given up: the stream or the server ended.",
        )
        self.plain_held_bytes = self._gauge(
            "plain_held_bytes", "Memory of plain messages that are being taken, bytes."
        )
        self.pings = self._counter("pings_total", "Pings answered.")
        self.certificate_expiry = self._gauge(
            "tls_certificate_expiry_timestamp_seconds", "When the certificate in use expires."
        )
        self.certificate_loads = self._counter(
            "tls_certificate_loads_total", "Certificate files read, by result.", "result"
        )

    def _add_authentication(self) -> None:
        self.reviews = self._counter("token_reviews_total", "TokenReviews, by result.", "result")
        self.review_seconds = self._histogram("token_review_seconds", "Time of a TokenReview.")
        self.reviews_waiting = self._gauge(
            "token_reviews_waiting", "TokenReviews under way or waiting for their turn."
        )
        self.token_cache_hits = self._counter(
            "token_cache_hits_total", "Calls whose token was reviewed before."
        )
        self.token_cache_entries = self._gauge(
            "token_cache_entries", "Reviews of tokens that are remembered."
        )

    def _add_link(self) -> None:
        self.links = self._gauge("links", "Links of leaders to this gateway that are open.")
        self.link_ends = self._counter("link_ends_total", "Links that ended, by reason.", "reason")
        self.run_reports = self._counter(
            "run_reports_total", "Run reports of agents, by result.", "result"
        )
        self.config_reports = self._counter(
            "config_reports_total",
            "Reports of agents on their configuration that a gateway took, by result.",
            "result",
        )
        self.link_pending = self._gauge(
            "link_pending_bytes", "Bytes of run reports that the leader has not taken yet."
        )
        self.commands = self._counter(
            "commands_total", "Commands of the leader for agents, by result.", "result"
        )

    def _add_sink(self) -> None:
        self.sink_ready = self._gauge("sink_ready", "1 while the sink takes batches, else 0.")
        self.sink_stores = self._counter(
            "sink_stores_total", "Batches handed to the sink, by result.", "result"
        )
        self.sink_bytes = self._counter("sink_stored_bytes_total", "Bytes the sink has stored.")
        self.sink_pending = self._gauge("sink_pending_bytes", "Bytes that wait in the sink.")
        self.sink_restarts = self._counter(
            "sink_restarts_total", "Times the sink was opened anew, by reason.", "reason"
        )
        self.sink_messages = self._counter(
            "sink_messages_total", "Messages handed to Kafka, by topic of the settings.", "topic"
        )
        self.sink_errors = self._counter(
            "sink_errors_total", "Batches that Kafka did not store, by kind of error.", "kind"
        )
        self.sink_files = self._gauge("sink_files", "Files of the file sink.")
        self.sink_file_bytes = self._gauge("sink_file_bytes", "Bytes in files of the file sink.")
        self.sink_free_bytes = self._gauge(
            "sink_free_bytes", "Bytes that are free where the file sink's files are."
        )
        self.sink_removed_bytes = self._counter(
            "sink_removed_bytes_total", "Bytes of old files that the file sink deleted."
        )

    def _add_leader(self) -> None:
        self.leads = self._gauge("leader", "1 while this replica leads, else 0.")
        self.leader_terms = self._counter("leader_terms_total", "Times this replica began to lead.")
        self.leader_links = self._gauge("leader_links", "Links to gateways that are open.")
        self.leader_commands = self._counter(
            "leader_commands_total", "Commands for agents handed to links, by result.", "result"
        )
        self.agents = self._gauge("agents", "Agents known to the leader, by state.", "state")
        self.tasks = self._gauge("tasks", "AgentTasks known to the leader, by state.", "state")
        self.tasks_ended = self._counter(
            "tasks_ended_total", "AgentTasks ended, by phase.", "phase"
        )
        self.retries = self._counter(
            "node_retries_total", "Attempts that failed and whose node is to try again."
        )
        self.reconciles = self._counter(
            "task_reconciles_total", "Times a task was looked at, by result.", "result"
        )
        self.reconcile_seconds = self._histogram(
            "task_reconcile_seconds", "Time of looking at a task, with all its writes."
        )
        self.work_waiting = self._gauge("work_waiting", "Tasks that wait to be looked at.")
        self.orphans = self._gauge("orphan_runs", "Runs agents report that no task is known of.")
        self.reports_dropped = self._counter(
            "run_reports_dropped_total", "Runs in reports not taken for want of room."
        )
        self.agent_writes = self._counter(
            "agent_writes_total", "Writes of Agent objects, by result.", "result"
        )

    def _add_configs(self) -> None:
        self.configs = self._gauge("configs", "AgentConfigs known to the leader.")
        self.rollouts = self._gauge("config_rollouts", "AgentConfigs, by phase.", "phase")
        self.config_sends = self._counter(
            "config_sends_total",
            "Configurations sent to agents: first, or again for want of an answer.",
            "result",
        )
        self.config_told = self._counter(
            "config_states_total", "Reports of agents the leader took, by their phase.", "phase"
        )
        self.config_settle_seconds = self._histogram(
            "config_settle_seconds",
            "Time from the beginning of a change until it has settled.",
            (1, 2.5, 5, 10, 15, 30, 60, 120, 300, 600, 1800, 3600, 14400, 86400),
        )

    def _add_schedules(self) -> None:
        self.schedules = self._gauge("schedules", "AgentTaskSchedules known to the leader.")
        self.schedule_reconciles = self._counter(
            "schedule_reconciles_total", "Times a schedule was looked at, by result.", "result"
        )
        self.schedule_tasks = self._counter(
            "schedule_tasks_total", "Tasks of schedules, by what was done.", "result"
        )
        self.schedule_missed = self._counter(
            "schedule_missed_total", "Due times that went by without a task."
        )
        self.schedule_delay_seconds = self._histogram(
            "schedule_delay_seconds", "Time from a due time until its task was made."
        )

    def _add_api_server(self) -> None:
        self.api_requests = self._counter(
            "api_requests_total", "Requests to the API server, by result.", "result"
        )
        self.events_posted = self._counter(
            "events_total", "Kubernetes Events, by result.", "result"
        )
        self.watch_events = self._counter(
            "watch_events_total", "Objects seen by the watches, by kind.", "kind"
        )
        self.watch_last = self._gauge(
            "watch_last_event_timestamp_seconds", "When a watch last said something."
        )
        self.watch_restarts = self._counter(
            "watch_restarts_total", "Times the watches were begun anew, by reason.", "reason"
        )

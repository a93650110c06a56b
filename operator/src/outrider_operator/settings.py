"""The server's settings: one typed schema, read once at start and passed in.

Every field says its unit and meaning; that text is also what `--help` shows. Nothing here reads
files or has state: a part gets its own section and never the whole.
"""

from typing import Annotated, Literal

from msgspec import Meta, field
from outrider_proto import limits
from outrider_runtime.logs import LogSettings
from outrider_runtime.ops import OpsSettings
from outrider_runtime.settings import Section, SettingsError

from outrider_operator.settings_kafka import (
    KafkaSinkSettings as KafkaSinkSettings,  # noqa: PLC0414 - a section like the others here
)

Seconds = Annotated[float, Meta(gt=0, le=86_400)]
"""A time span above 0 and at most a day."""

Count = Annotated[int, Meta(ge=1, le=1_000_000)]
"""A number of things, at least one."""

ServiceAccounts = Annotated[
    list[Annotated[str, Meta(pattern=r"^[a-z0-9.-]{1,253}/[a-z0-9.-]{1,253}$")]],
    Meta(min_length=1, max_length=64),
]
"""ServiceAccounts as namespace/name."""


class TlsSettings(Section, frozen=True):
    """The gateway's certificate. Changed files are used without a restart."""

    cert_file: Annotated[
        str, Meta(min_length=1, description="PEM file with the certificate, then its issuers.")
    ] = "/etc/outrider/tls/tls.crt"
    key_file: Annotated[
        str, Meta(min_length=1, description="PEM file with the certificate's private key.")
    ] = "/etc/outrider/tls/tls.key"
    check_seconds: Annotated[
        Seconds, Meta(description="Time between two looks at the files, seconds.")
    ] = 10.0


class KeepaliveSettings(Section, frozen=True):
    """How dead peers are found, and peers that ping too often refused."""

    time_seconds: Annotated[
        Seconds, Meta(description="A connection silent for so long is pinged, seconds.")
    ] = 30.0
    timeout_seconds: Annotated[
        Seconds, Meta(description="A ping not answered within this ends the connection, seconds.")
    ] = 10.0
    min_interval_seconds: Annotated[
        Seconds, Meta(description="A peer that pings more often than this is sent away, seconds.")
    ] = 10.0
    max_idle_seconds: Annotated[
        Seconds, Meta(description="A connection without any call is closed after this, seconds.")
    ] = 60.0
    handshake_seconds: Annotated[
        Seconds, Meta(description="A new connection must finish its handshake in this, seconds.")
    ] = 10.0


Rate = Annotated[float, Meta(ge=0, le=1e12)]
"""So many a second; 0: no limit."""


class LimitSettings(Section, frozen=True):
    """How much agents may send. Who sends more is told to slow down; nothing is thrown away."""

    agent_records_per_second: Annotated[
        Rate, Meta(description="Records one agent may send, per second; 0: no limit.")
    ] = 50_000.0
    agent_bytes_per_second: Annotated[
        Rate, Meta(description="Compressed bytes of batches one agent may send, per second.")
    ] = float(16 * limits.MIB)
    records_per_second: Annotated[
        Rate, Meta(description="Records all agents of this replica may send, per second.")
    ] = 0.0
    bytes_per_second: Annotated[
        Rate, Meta(description="Compressed bytes all agents of this replica may send, per second.")
    ] = 0.0
    burst_seconds: Annotated[
        float,
        Meta(gt=0, le=3600, description="Unused shares are saved up for so long, seconds."),
    ] = 10.0


class GatewaySettings(Section, frozen=True):
    """The port that agents and the other replicas connect to."""

    address: Annotated[
        str, Meta(min_length=1, description="Where to listen, host:port or :port.")
    ] = ":8443"
    advertise_name: Annotated[
        str,
        Meta(
            max_length=253,
            description="Name of this replica in statuses and logs; empty: the host's name.",
        ),
    ] = ""
    tls: TlsSettings = field(default_factory=TlsSettings)
    keepalive: KeepaliveSettings = field(default_factory=KeepaliveSettings)
    max_connections: Annotated[
        Count, Meta(description="Connections at once; more are refused.")
    ] = 6000
    connect_rate: Annotated[
        float,
        Meta(
            gt=0,
            le=100_000,
            description="Streams that may begin per second; others are told when to come back.",
        ),
    ] = 100.0
    connect_burst: Annotated[
        Count, Meta(description="Streams that may begin at once after a quiet time.")
    ] = 200
    accept_plain_records: Annotated[
        bool,
        Meta(description="Take plain records, of agents that send no hello and no batches."),
    ] = False
    hello_timeout_seconds: Annotated[
        Seconds, Meta(description="A stream must say hello within this, seconds.")
    ] = 10.0
    write_timeout_seconds: Annotated[
        Seconds, Meta(description="A peer that takes no message for so long is ended, seconds.")
    ] = 20.0
    window_bytes: Annotated[
        int,
        Meta(
            ge=64 * limits.KIB,
            le=64 * limits.MIB,
            description="Batches one stream may have in flight, bytes (one batch always may); "
            "with many streams their agents are given less.",
        ),
    ] = limits.MIB
    max_inflight_bytes: Annotated[
        int,
        Meta(
            ge=limits.BATCH_BYTES,
            le=64 * 1024 * limits.MIB,
            description="Memory for batches of all streams, bytes: with the sink's copies and what "
            "waits for room.",
        ),
    ] = 128 * limits.MIB
    drain_seconds: Annotated[
        Seconds, Meta(description="Time agents have to leave when the server stops, seconds.")
    ] = 20.0
    drain_spread_seconds: Annotated[
        float,
        Meta(ge=0, le=600, description="Agents told to leave spread over this time, seconds."),
    ] = 3.0
    # The last one: from here on the name hides the module of limits.
    limits: LimitSettings = field(default_factory=LimitSettings)


class AuthSettings(Section, frozen=True):
    """Whose tokens are taken."""

    audience: Annotated[
        str, Meta(min_length=1, max_length=253, description="Audience a token must be made for.")
    ] = "outrider"
    agent_service_accounts: Annotated[
        ServiceAccounts, Meta(description="ServiceAccounts of agents, as namespace/name.")
    ] = field(default_factory=lambda: ["outrider/outrider-agent"])
    server_service_accounts: Annotated[
        ServiceAccounts, Meta(description="ServiceAccounts of servers, as namespace/name.")
    ] = field(default_factory=lambda: ["outrider/outrider-server"])
    cache_entries: Annotated[
        Count, Meta(description="Tokens whose review is remembered; the oldest go.")
    ] = 20_000
    cache_seconds: Annotated[
        Seconds,
        Meta(description="A review is remembered so long, or until the token expires, seconds."),
    ] = 300.0
    refusal_cache_seconds: Annotated[
        Seconds, Meta(description="A refusal is remembered so long, seconds.")
    ] = 10.0
    max_reviews: Annotated[Count, Meta(description="TokenReviews under way at once.")] = 16
    max_waiting: Annotated[
        Count, Meta(description="Calls that may wait for a TokenReview; more are sent away.")
    ] = 5000
    review_timeout_seconds: Annotated[
        Seconds, Meta(description="A TokenReview must be answered within this, seconds.")
    ] = 10.0
    expiry_grace_seconds: Annotated[
        float,
        Meta(ge=0, le=3600, description="A stream outlives its token by this at most, seconds."),
    ] = 60.0


class FileSinkSettings(Section, frozen=True):
    """Records in rotated files on this replica: for installs without a broker."""

    directory: Annotated[
        str, Meta(min_length=1, description="Where the files are; made if it is not there.")
    ] = "/var/lib/outrider/records"
    max_file_bytes: Annotated[
        int,
        Meta(ge=limits.MIB, le=2**40, description="A file is closed at this size, bytes."),
    ] = 64 * limits.MIB
    max_file_seconds: Annotated[
        Seconds, Meta(description="A file is closed at this age, seconds.")
    ] = 3600.0
    max_total_bytes: Annotated[
        int,
        Meta(
            ge=2 * limits.MIB,
            le=2**50,
            description="All files together, bytes; past it the oldest are deleted.",
        ),
    ] = 1024 * limits.MIB
    max_age_seconds: Annotated[
        float,
        Meta(ge=0, le=1e9, description="Older files are deleted, seconds; 0: none for its age."),
    ] = 0.0
    min_free_bytes: Annotated[
        int,
        Meta(
            ge=0,
            le=2**50,
            description="With less free disk batches are not taken and stay with agents, bytes.",
        ),
    ] = 128 * limits.MIB
    compression: Annotated[
        Literal["zstd", "none"], Meta(description="How files are compressed.")
    ] = "zstd"
    fsync: Annotated[
        Literal["always", "interval", "never"],
        Meta(
            description="always: batches are on the disk before they are acknowledged; interval: "
            "a power loss may take those of the last fsyncIntervalSeconds; never: those of the "
            "kernel's last half minute."
        ),
    ] = "always"
    fsync_interval_seconds: Annotated[
        Seconds, Meta(description="With interval: time between two flushes to the disk, seconds.")
    ] = 1.0


class SinkSettings(Section, frozen=True):
    """Where record batches are stored."""

    kind: Annotated[
        Literal["file", "kafka"], Meta(description="Which of the sinks below is used.")
    ] = "file"
    file: FileSinkSettings = field(default_factory=FileSinkSettings)
    kafka: KafkaSinkSettings = field(default_factory=KafkaSinkSettings)


class KubeSettings(Section, frozen=True):
    """How the API server is reached."""

    kubeconfig: Annotated[
        str, Meta(description="Path of a kubeconfig file; empty: the Pod's ServiceAccount.")
    ] = ""
    request_timeout_seconds: Annotated[
        Seconds, Meta(description="A request must be answered within this, seconds.")
    ] = 10.0


class LeaderSettings(Section, frozen=True):
    """Which replica leads: the one that holds a Lease."""

    enabled: Annotated[
        bool, Meta(description="Take part in the election; without it, only a gateway.")
    ] = True
    lease_name: Annotated[
        str, Meta(min_length=1, max_length=253, description="Name of the Lease.")
    ] = "outrider-leader"
    lease_namespace: Annotated[
        str, Meta(max_length=63, description="Namespace of the Lease; empty: the Pod's own.")
    ] = ""
    lease_duration_seconds: Annotated[
        int, Meta(ge=3, le=600, description="Others wait this long for a dead leader, seconds.")
    ] = 15
    renew_deadline_seconds: Annotated[
        int, Meta(ge=2, le=600, description="A leader that cannot renew stops after this, seconds.")
    ] = 10
    retry_period_seconds: Annotated[
        int, Meta(ge=1, le=60, description="Time between two tries to take or renew, seconds.")
    ] = 2


class FleetSettings(Section, frozen=True):
    """How the leader reaches the gateways of all replicas, its own included."""

    gateways: Annotated[
        str,
        Meta(
            min_length=1,
            description='Where they are: "srv:_NAME._tcp.HOST", "dns:HOST:PORT" or "HOST:PORT,…".',
        ),
    ] = "127.0.0.1:8443"
    ca_file: Annotated[
        str, Meta(min_length=1, description="PEM file with the issuers of their certificates.")
    ] = "/etc/outrider/tls/ca.crt"
    server_name: Annotated[
        str, Meta(min_length=1, description="Name their certificates must have.")
    ] = "outrider-server"
    token_file: Annotated[
        str, Meta(min_length=1, description="The replica's own token, with auth.audience.")
    ] = "/var/run/secrets/outrider/token"  # noqa: S105 - a path
    resolve_seconds: Annotated[
        Seconds, Meta(description="Time between two looks for gateways, seconds.")
    ] = 5.0
    max_gateways: Annotated[
        int, Meta(ge=1, le=1000, description="Most gateways that are linked to.")
    ] = 64


class TaskSettings(Section, frozen=True):
    """How tasks are carried out."""

    lost_after_seconds: Annotated[
        Seconds, Meta(description="A node whose agent is away for so long is Lost, seconds.")
    ] = 300.0
    batch_millis: Annotated[
        int, Meta(ge=10, le=10_000, description="Results are gathered this long, milliseconds.")
    ] = 200
    max_active: Annotated[
        Count, Meta(description="Tasks that are carried out at once; more wait.")
    ] = 1000
    end_runs_seconds: Annotated[
        Seconds, Meta(description="A deleted task waits this long for its runs, seconds.")
    ] = 30.0
    retry_backoff_seconds: Annotated[
        Seconds,
        Meta(description="Second attempt after so long; each further wait is doubled, seconds."),
    ] = 5.0
    retry_backoff_cap_seconds: Annotated[
        Seconds, Meta(description="Longest wait before an attempt, seconds.")
    ] = 300.0


class AgentSettings(Section, frozen=True):
    """The Agent objects."""

    remove_after_seconds: Annotated[
        Seconds, Meta(description="An Agent is removed this long after its Node, seconds.")
    ] = 600.0
    writes_at_once: Annotated[
        int, Meta(ge=1, le=100, description="Writes of Agent objects under way at once.")
    ] = 8


class ServerSettings(Section, frozen=True):
    """Everything the server can be told."""

    log: LogSettings = field(default_factory=LogSettings)
    ops: OpsSettings = field(default_factory=OpsSettings)
    gateway: GatewaySettings = field(default_factory=GatewaySettings)
    auth: AuthSettings = field(default_factory=AuthSettings)
    sink: SinkSettings = field(default_factory=SinkSettings)
    kube: KubeSettings = field(default_factory=KubeSettings)
    leader: LeaderSettings = field(default_factory=LeaderSettings)
    fleet: FleetSettings = field(default_factory=FleetSettings)
    tasks: TaskSettings = field(default_factory=TaskSettings)
    agents: AgentSettings = field(default_factory=AgentSettings)


def check_lease_times(settings: LeaderSettings) -> None:
    """Refuse times with which two could lead at once, or none for long.

    Raises:
        SettingsError: They contradict each other.
    """
    if settings.lease_duration_seconds <= settings.renew_deadline_seconds:
        raise SettingsError(
            'setting "leader.leaseDurationSeconds": expected more than '
            f"leader.renewDeadlineSeconds, {settings.renew_deadline_seconds}"
        )
    if settings.renew_deadline_seconds <= 1.2 * settings.retry_period_seconds:
        raise SettingsError(
            'setting "leader.renewDeadlineSeconds": expected more than 1.2 times '
            f"leader.retryPeriodSeconds, {settings.retry_period_seconds}"
        )

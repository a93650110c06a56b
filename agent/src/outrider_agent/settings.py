"""Every setting of the agent: one typed schema, with unit, default and meaning at each field.

Settings are passed in, never global. What one file cannot know (does the certificate exist, is
the node named) is checked by `check`, before anything starts.
"""

from typing import Annotated, Literal

from msgspec import Meta, field
from outrider_runtime.discovery import check_target
from outrider_runtime.logs import LogSettings
from outrider_runtime.settings import Section, SettingsError, address, readable

from outrider_agent.core.policy import (
    BELOW,
    DEFAULT_KINDS,
    EVERY_USER,
    RUN_KINDS,
    pattern_fault,
    user_name,
)
from outrider_agent.settings_collectors import (
    CollectorsSettings,
    HeartbeatSettings,
    check_collectors,
)
from outrider_agent.settings_config import ConfigSettings, ListenersSettings

MIB = 1024 * 1024


class OpsSettings(Section, frozen=True):
    """The listener for metrics and health."""

    address: Annotated[
        str, Meta(description='Where /metrics, /healthz and /readyz are served, "host:port".')
    ] = ":8081"


class NodeSettings(Section, frozen=True):
    """The node that the agent runs on."""

    name: Annotated[
        str, Meta(description="Name of the Node object; must be the one in the token. Required.")
    ] = ""
    pod_uid: Annotated[
        str,
        Meta(
            description="UID of the agent's Pod: how long a Shutdown lasts. Empty: as long as the "
            "process."
        ),
    ] = ""
    proc: Annotated[
        str,
        Meta(description="Where the proc file system of the host is mounted; for metrics only."),
    ] = "/proc"
    sys: Annotated[
        str, Meta(description="Where the sysfs of the host is mounted; for metrics only.")
    ] = "/sys"
    root: Annotated[
        str, Meta(description="Where the root of the host is mounted; for metrics only.")
    ] = "/"


class ServerSettings(Section, frozen=True):
    """Where the servers are, and how the agent proves itself."""

    target: Annotated[
        str,
        Meta(
            description='How servers are found: "srv:_grpc._tcp.NAME", "dns:HOST:PORT" or '
            '"HOST:PORT,HOST:PORT"; up to 10 addresses, shuffled. Empty: not by DNS.'
        ),
    ] = "srv:_grpc._tcp.outrider-server.outrider.svc"
    private: Annotated[
        dict[str, str],
        Meta(description='Private address by region, "host:port"; tried after the target.'),
    ] = field(default_factory=dict)
    public: Annotated[
        dict[str, str],
        Meta(description='Public address by region, "host:port"; tried last.'),
    ] = field(default_factory=dict)
    region: Annotated[
        str, Meta(description="Region of this node: picks among private and public addresses.")
    ] = ""
    ca_file: Annotated[
        str, Meta(description="Certificates (PEM) that the server's must come from; read anew.")
    ] = "/etc/outrider/tls/ca.crt"
    server_name: Annotated[
        str, Meta(min_length=1, description="Name that the server's certificate must have.")
    ] = "outrider-server.outrider.svc"
    token_file: Annotated[
        str,
        Meta(description="ServiceAccount token with the audience of the servers; read anew."),
    ] = "/var/run/secrets/outrider/token"  # noqa: S105 - a path
    dial_timeout_seconds: Annotated[
        float, Meta(gt=0, le=60, description="Longest wait for one address to connect, seconds.")
    ] = 3.0
    backoff_base_seconds: Annotated[
        float, Meta(gt=0, le=60, description="Bound of the first wait after a failure, seconds.")
    ] = 0.5
    backoff_cap_seconds: Annotated[
        float, Meta(gt=0, le=3600, description="Bound that waits grow to, seconds.")
    ] = 30.0
    max_bytes_per_second: Annotated[
        int,
        Meta(
            ge=0,
            description="Most bytes of records sent per second; results of runs go first and "
            "count. 0: no limit.",
        ),
    ] = 0


class StateSettings(Section, frozen=True):
    """What the agent keeps on disk."""

    directory: Annotated[
        str, Meta(min_length=1, description="Directory of the agent's file; must survive the Pod.")
    ] = "/var/lib/outrider"
    max_outbox_bytes: Annotated[
        int,
        Meta(
            ge=MIB,
            description="Most bytes of records that wait for a server; past it the oldest of the "
            "least class go, results never.",
        ),
    ] = 256 * MIB
    result_reserve_bytes: Annotated[
        int,
        Meta(
            ge=0,
            description="How many bytes of results may be beyond max_outbox_bytes; past that they "
            "wait, and runs that print with them.",
        ),
    ] = 64 * MIB
    min_free_bytes: Annotated[
        int,
        Meta(
            ge=0,
            description="Free bytes that the outbox leaves on its disk; with less it gets smaller.",
        ),
    ] = 256 * MIB
    min_free_percent: Annotated[
        float,
        Meta(
            ge=0,
            le=90,
            description="The same as a share of the disk's size, percent; the larger one counts.",
        ),
    ] = 2.0
    durability: Annotated[
        Literal["full", "relaxed"],
        Meta(
            description="full: records are synced to disk before they count as stored; relaxed: "
            "within a second, which a power loss may cost. The journal of runs is always synced."
        ),
    ] = "full"


class BatchSettings(Section, frozen=True):
    """How records become batches."""

    max_delay_millis: Annotated[
        int, Meta(ge=1, le=60_000, description="Longest wait of a record, milliseconds.")
    ] = 100
    max_bytes: Annotated[
        int,
        Meta(ge=1024, le=2 * MIB, description="Size before compression that closes a batch."),
    ] = 512 * 1024
    codec: Annotated[
        Literal["zstd", "lz4", "none"],
        Meta(description="How batches are compressed: zstd, lz4 (less processor time) or none."),
    ] = "zstd"
    max_queue_bytes: Annotated[
        int,
        Meta(
            ge=2 * MIB,
            le=256 * MIB,
            description="Most bytes of one class of records that wait in memory to be stored.",
        ),
    ] = 8 * MIB


class TasksSettings(Section, frozen=True):
    """What the agent runs, and within which limits."""

    allowed_kinds: Annotated[
        tuple[str, ...],
        Meta(description=f"Kinds of run this node allows, of {', '.join(RUN_KINDS)}."),
    ] = DEFAULT_KINDS
    allowed_executables: Annotated[
        tuple[str, ...],
        Meta(
            description="Patterns of the paths of programs and interpreters this node allows: *, ? "
            f"and [] within a part, {BELOW} as the last part for all below."
        ),
    ] = (f"/{BELOW}",)
    allowed_users: Annotated[
        tuple[str, ...],
        Meta(
            description="Users, by name or number as tasks give them, that runs may be of besides "
            f"the agent's own; {EVERY_USER} is all."
        ),
    ] = ()
    allow_host: Annotated[
        bool,
        Meta(
            description="Whether runs may enter the host's namespaces. Needs a privileged Pod in "
            "the host's process namespace; whoever may make tasks is root on this node then."
        ),
    ] = False
    max_concurrent: Annotated[
        int, Meta(ge=1, le=1024, description="Most runs at once; further ones wait.")
    ] = 16
    max_queued: Annotated[
        int, Meta(ge=0, le=4096, description="Most runs that wait; further ones are rejected.")
    ] = 256
    work_directory: Annotated[
        str,
        Meta(
            description="Where scripts are put while they run. Empty: the directory `runs` in "
            "state.directory."
        ),
    ] = ""
    termination_grace_seconds: Annotated[
        float, Meta(ge=0, le=300, description="Time between TERM and KILL for a run, seconds.")
    ] = 5.0
    drain_seconds: Annotated[
        float,
        Meta(ge=0, le=3600, description="Time for runs to end when the agent stops, seconds."),
    ] = 10.0
    tombstone_seconds: Annotated[
        int,
        Meta(ge=60, description="How long acknowledged runs are remembered, seconds."),
    ] = 604_800
    max_tombstones: Annotated[
        int, Meta(ge=100, description="Most acknowledged runs that are remembered.")
    ] = 50_000


class PluginsSettings(Section, frozen=True):
    """Programs that run beside the agent, as AgentConfigs name them, and within which limits."""

    enabled: Annotated[bool, Meta(description="Whether there may be any on this node.")] = True
    allowed_names: Annotated[
        tuple[str, ...],
        Meta(description="Patterns of the names of plug-ins that this node allows: *, ? and []."),
    ] = ("*",)
    allowed_users: Annotated[
        tuple[str, ...],
        Meta(
            description="Users, by name or number as configurations give them, that plug-ins may "
            f"be of besides the agent's own; {EVERY_USER} is all."
        ),
    ] = ()
    max_plugins: Annotated[int, Meta(ge=0, le=64, description="Most plug-ins at once.")] = 16
    directory: Annotated[
        str,
        Meta(
            description="Where packages and working directories are; other users must be able to "
            "enter it where plug-ins are theirs. Empty: the directory `plugins` in state.directory."
        ),
    ] = ""
    ca_file: Annotated[
        str,
        Meta(
            description="Certificates (PEM) that servers of packages must have theirs from. Empty: "
            "those of the system."
        ),
    ] = ""
    public_keys: Annotated[
        tuple[str, ...],
        Meta(
            description="Files with an Ed25519 public key each (PEM, or base64 of 32 bytes); one "
            "of them must have signed a package that has a signature."
        ),
    ] = ()
    require_signature: Annotated[
        bool, Meta(description="Whether packages without a signature are refused.")
    ] = False
    fetch_timeout_seconds: Annotated[
        float, Meta(gt=0, le=86_400, description="Longest time to fetch one package, seconds.")
    ] = 600.0
    max_package_bytes: Annotated[
        int, Meta(ge=1024, description="Largest package that is fetched, bytes.")
    ] = 256 * MIB
    max_unpacked_bytes: Annotated[
        int, Meta(ge=1024, description="Most bytes of all files of one package.")
    ] = 1024 * MIB
    cache_bytes: Annotated[
        int,
        Meta(
            ge=0,
            description="Most bytes of fetched packages that are kept for going back; those in "
            "use always are.",
        ),
    ] = 512 * MIB
    max_records_per_second: Annotated[
        int,
        Meta(
            ge=0,
            description="Most records per second that are taken from one plug-in, which waits "
            "then. 0: no limit.",
        ),
    ] = 5000
    max_bytes_per_second: Annotated[
        int, Meta(ge=0, description="The same in bytes. 0: no limit.")
    ] = 4 * MIB
    termination_grace_seconds: Annotated[
        float, Meta(ge=0, le=300, description="Time between TERM and KILL for a plug-in, seconds.")
    ] = 5.0
    healthy_seconds: Annotated[
        float,
        Meta(
            ge=0,
            le=3600,
            description="A plug-in counts as healthy once it has run so long without ending.",
        ),
    ] = 10.0
    heartbeat_seconds: Annotated[
        float,
        Meta(ge=1, le=3600, description="Time between two heart-beat records of a plug-in."),
    ] = 60.0


class AgentSettings(Section, frozen=True):
    """All settings of the agent."""

    log: LogSettings = field(default_factory=LogSettings)
    ops: OpsSettings = field(default_factory=OpsSettings)
    node: NodeSettings = field(default_factory=NodeSettings)
    server: ServerSettings = field(default_factory=ServerSettings)
    state: StateSettings = field(default_factory=StateSettings)
    heartbeat: HeartbeatSettings = field(default_factory=HeartbeatSettings)
    collectors: CollectorsSettings = field(default_factory=CollectorsSettings)
    config: ConfigSettings = field(default_factory=ConfigSettings)
    listeners: ListenersSettings = field(default_factory=ListenersSettings)
    batch: BatchSettings = field(default_factory=BatchSettings)
    tasks: TasksSettings = field(default_factory=TasksSettings)
    plugins: PluginsSettings = field(default_factory=PluginsSettings)


def check(settings: AgentSettings) -> None:
    """Refuse settings that the schema cannot: names, addresses, files.

    Raises:
        SettingsError: With the setting's name and what was expected.
    """
    if not settings.node.name:
        raise SettingsError('setting "node.name": expected the name of this Node, got nothing')
    server = settings.server
    if server.target:
        check_target(server.target, setting="server.target")
    for name, table in (("private", server.private), ("public", server.public)):
        for region, text in table.items():
            if not address(text, setting=f"server.{name}.{region}")[0]:
                raise SettingsError(
                    f'setting "server.{name}.{region}": expected a host before ":", got {text!r}'
                )
    if not (server.target or server.region in server.private or server.region in server.public):
        raise SettingsError(
            'setting "server.target": expected a way to find servers, and there is no private or '
            f"public address for region {server.region!r} either"
        )
    ca = readable(server.ca_file, setting="server.caFile")
    if b"-----BEGIN CERTIFICATE-----" not in ca:
        raise SettingsError(
            f'setting "server.caFile": expected PEM certificates in {server.ca_file!r}'
        )
    readable(server.token_file, setting="server.tokenFile")
    unknown = sorted(set(settings.tasks.allowed_kinds) - set(RUN_KINDS))
    if unknown:
        raise SettingsError(
            f'setting "tasks.allowedKinds": expected some of {", ".join(RUN_KINDS)}, '
            f"got {', '.join(unknown)}"
        )
    check_collectors(settings.collectors)
    for pattern in settings.tasks.allowed_executables:
        fault = pattern_fault(pattern)
        if fault:
            raise SettingsError(f'setting "tasks.allowedExecutables": {pattern!r}: {fault}')
    _check_plugins(settings)


def _check_plugins(settings: AgentSettings) -> None:
    """Refuse users, keys and files of plug-ins that are none, and users of runs."""
    for name, users in (
        ("tasks", settings.tasks.allowed_users),
        ("plugins", settings.plugins.allowed_users),
    ):
        for user in users:
            if user != EVERY_USER and not user_name(user):
                raise SettingsError(
                    f'setting "{name}.allowedUsers": expected names or numbers of users, '
                    f"got {user!r}"
                )
    for key in settings.plugins.public_keys:
        readable(key, setting="plugins.publicKeys")
    if settings.plugins.ca_file:
        readable(settings.plugins.ca_file, setting="plugins.caFile")
    if settings.plugins.require_signature and not settings.plugins.public_keys:
        raise SettingsError(
            'setting "plugins.requireSignature": expected a key in plugins.publicKeys as well, '
            "else no plug-in could run"
        )

"""Makes a program of a run: which file, as which user, in whose namespaces, with which environment.

What is checked here is what is started: the same path, the same user. Starts nothing itself.
"""

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from outrider_proto.v1 import agent_pb2 as pb

from outrider_agent.core import accounts, policy
from outrider_agent.core.accounts import Account
from outrider_agent.core.outcome import Outcome
from outrider_agent.core.policy import Policy
from outrider_agent.core.runs import key_of
from outrider_agent.tasks import lookup, processes
from outrider_agent.tasks.program import Program, StartError

#: What programs find in PATH unless the task says otherwise.
DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
#: Begin of the names in the work directory that are ours: it may be one that others use too.
SCRIPT_PREFIX = "outrider-run-"
#: The host's namespaces, but for those of users, which a node has one of, and of control groups,
#: so that a run on the host still counts against the limits of the agent's Pod.
NAMESPACES = ("mount", "uts", "ipc", "net", "pid")


@dataclass(frozen=True)
class Place:
    """What a run's program is made with.

    Attributes:
        node: Name of the node.
        work_directory: Where scripts are put.
        grace: Seconds between TERM and KILL.
        policy: What the node's settings allow.
        host_pid: A process in the host's namespaces.
    """

    node: str
    work_directory: Path
    grace: float
    policy: Policy
    host_pid: int = 1

    def root(self, command: pb.RunCommand) -> str:
        """What a run sees as "/"; empty for what the agent itself does."""
        return f"/proc/{self.host_pid}/root" if command.host else ""


@contextlib.contextmanager
def placed(command: pb.RunCommand, place: Place) -> Iterator[Program]:
    """The program of a command or script, with all that it needs meanwhile. Blocks.

    Raises:
        StartError: It cannot be started, or the node's policy is against it.
        OSError: The script's file could not be made.
    """
    if command.host:
        _check_host(place)
    account = _account(command, place)
    with _argv(command, place.work_directory, account) as (argv, script):
        env = environment(command, place.node, account)
        path = _checked(argv[0], env["PATH"], command, place)
        yield Program(
            argv=_entered(argv, path, account, place) if command.host else argv,
            environment=env,
            mark=processes.mark_for(key_of(command.id), place.node),
            timeout=command.timeout_seconds,
            grace=place.grace,
            executable=_nsenter() if command.host else path,
            account=None if command.host else account,
            inherited=() if script is None else (script,),
            everywhere=command.host,
        )


def _checked(name: str, search: str, command: pb.RunCommand, place: Place) -> str:
    """The file to start, once the policy has seen it."""
    root = place.root(command)
    path = lookup.locate(name, search, root)
    if path is None:
        raise StartError(_failure("CommandNotFound", f"{name!r}: not found"))
    refusal = policy.refuse_executable(path, place.policy)
    if refusal is not None:
        raise StartError(refusal)
    if root and not lookup.executable(path, root):
        # Else the kernel says it, and better; but there nsenter would, as output.
        raise StartError(_failure("NotExecutable", f"{name!r}: is no executable file on the host"))
    return path


def _account(command: pb.RunCommand, place: Place) -> Account | None:
    """Whom to become; None: nobody else."""
    user = command.user
    if not user or user in place.policy.own:
        return None
    root = place.root(command)
    found = accounts.find(
        user, passwd=lookup.text_of("/etc/passwd", root), group=lookup.text_of("/etc/group", root)
    )
    if found is None:
        where = "of the host" if command.host else "of the agent's container"
        raise StartError(_failure("UserNotFound", f"user {user}: not in /etc/passwd {where}"))
    return found


def _check_host(place: Place) -> None:
    """Refuse where the host's namespaces cannot be entered anyhow, and say what it takes."""
    try:
        os.stat(f"/proc/{place.host_pid}/ns/mnt")  # noqa: PTH116 - one question
        os.stat(f"/proc/{place.host_pid}/root/")  # noqa: PTH116 - likewise
    except OSError as error:
        text = (
            f"the host's namespaces cannot be entered: {error.strerror}; the agent's Pod must be "
            "privileged and in the host's process namespace (chart value agent.hostAccess: full)"
        )
        raise StartError(_failure("NoHostAccess", text)) from None


def _nsenter() -> str:
    path = shutil.which("nsenter", path=DEFAULT_PATH)
    if path is None:
        text = "the agent's image lacks the program nsenter (util-linux), which enters the host"
        raise StartError(_failure("NoHostAccess", text))
    return path


def _entered(
    argv: Sequence[str], path: str, account: Account | None, place: Place
) -> Sequence[str]:
    """The arguments of nsenter, which becomes the user only once it is inside."""
    ids = [] if account is None else [f"--setuid={account.uid}", f"--setgid={account.gid}"]
    spaces = [f"--{name}" for name in NAMESPACES]
    return ["nsenter", f"--target={place.host_pid}", *spaces, *ids, "--", path, *argv[1:]]


def _failure(reason: str, message: str) -> Outcome:
    return Outcome(pb.RUN_PHASE_FAILED, reason, message)


def environment(command: pb.RunCommand, node: str, account: Account | None) -> dict[str, str]:
    """The whole environment of a run; little of it is the agent's, and no secret of its."""
    own = {
        # First: it is looked for in every process that a run may have left.
        processes.MARK: processes.mark_for(key_of(command.id), node),
        "OUTRIDER_NODE": node,
        "OUTRIDER_TASK": f"{command.namespace}/{command.name}",
        "OUTRIDER_ATTEMPT": str(command.id.attempt),
    }
    base = {
        "PATH": DEFAULT_PATH,
        "HOME": os.path.expanduser("~"),  # noqa: PTH111 - a string is wanted
        "LANG": os.environ.get("LANG", "C.UTF-8"),
    }
    if account is not None:
        base |= {"HOME": account.home, "USER": account.name, "LOGNAME": account.name}
    return {**own, **base, **command.env, **own}


@contextlib.contextmanager
def _argv(
    command: pb.RunCommand, work_directory: Path, account: Account | None
) -> Iterator[tuple[Sequence[str], int | None]]:
    """The arguments of a run, and the descriptor that must stay open in it."""
    if command.WhichOneof("run") == "command":
        yield list(command.command.argv), None
        return
    interpreter = command.script.interpreter
    if command.host or account is not None:
        with _script_in_memory(command.script.source) as fd:
            yield [*interpreter, f"/proc/self/fd/{fd}"], fd
        return
    with _script_file(command.script.source, work_directory) as path:
        yield [*interpreter, path], None


@contextlib.contextmanager
def _script_file(source: str, work_directory: Path) -> Iterator[str]:
    """The script in a file that only we can read."""
    work_directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    directory = Path(tempfile.mkdtemp(prefix=SCRIPT_PREFIX, dir=work_directory))
    try:
        script = directory / "script"
        fd = os.open(script, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o700)
        with os.fdopen(fd, "w", encoding="utf-8") as file:
            file.write(source)
        yield str(script)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@contextlib.contextmanager
def _script_in_memory(source: str) -> Iterator[int]:
    """The script where also another user, and a process that sees other folders, can open it.

    It has no path, and it is sealed: not even its user can change it while it runs.
    """
    fd = os.memfd_create("script", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        with os.fdopen(fd, "wb", closefd=False) as file:
            file.write(source.encode())
        os.fchmod(fd, 0o555)
        seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
        yield fd
    finally:
        os.close(fd)


def clear_scripts(work_directory: Path) -> None:
    """Remove the scripts that an agent that was killed left behind. Blocks."""
    for left in work_directory.glob(f"{SCRIPT_PREFIX}*"):
        shutil.rmtree(left, ignore_errors=True)

"""What a node allows, whatever a server says: kinds, executables, users, the host."""

import posixpath
from fnmatch import fnmatchcase

import pytest
from hypothesis import given
from hypothesis import strategies as st
from outrider_agent.core import accounts, leaving, policy, runs
from outrider_agent.core.accounts import Account
from outrider_agent.core.leaving import Absence
from outrider_agent.core.policy import DEFAULT_KINDS, RUN_KINDS, Load, Policy
from outrider_proto.v1 import agent_pb2 as pb

FREE = Load(held=0, limit=10)
OWN = frozenset({"0", "root"})
COMMAND = pb.Exec(argv=["true"])
PLUGIN = pb.PluginTask(name="fim", data_type=1)


def run_of(**fields: object) -> pb.RunCommand:
    run = pb.RunCommand(id=pb.RunId(task_uid="t", attempt=1), timeout_seconds=5)
    run.MergeFrom(pb.RunCommand(**fields))  # type: ignore[arg-type] # fields by name
    return run


def reason(run: pb.RunCommand, allowed: Policy) -> str:
    found = policy.refuse(run, now_nanos=1, policy=allowed, load=FREE)
    return found.reason if found else ""


@pytest.mark.parametrize(
    ("fields", "allowed", "setting"),
    [
        ({"command": COMMAND}, Policy(DEFAULT_KINDS), ""),
        ({"command": COMMAND}, Policy(["script"]), "tasks.allowedKinds"),
        ({"plugin": PLUGIN}, Policy(DEFAULT_KINDS), ""),
        ({"plugin": PLUGIN}, Policy(["command"]), "tasks.allowedKinds"),
        ({"builtin": pb.BUILTIN_RESTART}, Policy(DEFAULT_KINDS), "tasks.allowedKinds"),
        ({"builtin": pb.BUILTIN_SHUTDOWN}, Policy(DEFAULT_KINDS), "tasks.allowedKinds"),
        ({"builtin": pb.BUILTIN_RESTART}, Policy(["builtin/Restart"]), ""),
        ({"builtin": pb.BUILTIN_SHUTDOWN}, Policy(["builtin/Restart"]), "tasks.allowedKinds"),
        ({"command": COMMAND, "host": True}, Policy(RUN_KINDS), "tasks.allowHost"),
        ({"command": COMMAND, "host": True}, Policy(RUN_KINDS, host=True), ""),
        ({"command": COMMAND, "user": "root"}, Policy(RUN_KINDS, own=OWN), ""),
        ({"command": COMMAND, "user": "0"}, Policy(RUN_KINDS, own=OWN), ""),
        ({"command": COMMAND, "user": "00"}, Policy(RUN_KINDS, own=OWN), "tasks.allowedUsers"),
        ({"command": COMMAND, "user": "nobody"}, Policy(RUN_KINDS), "tasks.allowedUsers"),
        ({"command": COMMAND, "user": "nobody"}, Policy(RUN_KINDS, users=["nobody"]), ""),
        ({"command": COMMAND, "user": "65534"}, Policy(RUN_KINDS, users=["*"]), ""),
        # Being allowed a user is not being allowed the host.
        (
            {"command": COMMAND, "user": "nobody", "host": True},
            Policy(RUN_KINDS, users=["*"]),
            "tasks.allowHost",
        ),
    ],
)
def test_what_is_not_allowed_is_refused_and_the_setting_named(
    fields: dict[str, object], allowed: Policy, setting: str
) -> None:
    found = policy.refuse(run_of(**fields), now_nanos=1, policy=allowed, load=FREE)
    if not setting:
        assert found is None
        return
    assert found is not None
    assert (found.phase, found.reason) == (pb.RUN_PHASE_REJECTED, "NotAllowed")
    assert setting in found.message


@pytest.mark.parametrize(
    "fields",
    [
        {"command": COMMAND, "user": "-1"},
        {"command": COMMAND, "user": "a b"},
        {"command": COMMAND, "user": "a\n"},
        {"command": COMMAND, "user": "a:0"},
        {"command": COMMAND, "user": "x" * 65},
        {"builtin": pb.BUILTIN_PING, "user": "nobody"},
        {"builtin": pb.BUILTIN_PING, "host": True},
    ],
)
def test_what_makes_no_sense_is_refused_even_where_all_is_allowed(
    fields: dict[str, object],
) -> None:
    assert reason(run_of(**fields), Policy(RUN_KINDS, users=["*"], host=True)) == "InvalidRun"


@given(
    kinds=st.sets(st.sampled_from(RUN_KINDS)),
    users=st.sets(st.sampled_from(["nobody", "1000", "*"])),
    host=st.booleans(),
    run=st.builds(
        run_of,
        command=st.just(COMMAND),
        user=st.sampled_from(["", "0", "root", "nobody", "1000", "daemon"]),
        host=st.booleans(),
    ),
)
def test_nothing_is_taken_that_one_setting_forbids(
    kinds: set[str], users: set[str], host: bool, run: pb.RunCommand
) -> None:
    taken = reason(run, Policy(kinds, users=users, own=OWN, host=host)) == ""
    allowed_user = run.user in {"", "0", "root", *users} or "*" in users
    assert taken == ("command" in kinds and allowed_user and (host or not run.host))


@pytest.mark.parametrize(
    ("path", "pattern", "fits"),
    [
        ("/usr/bin/uptime", "/usr/bin/uptime", True),
        ("/usr/bin/uptime", "/usr/bin/*", True),
        ("/usr/bin/uptime", "/usr/*", False),
        ("/usr/bin/uptime", "/usr/**", True),
        ("/usr/bin/uptime", "/**", True),
        ("/usr", "/usr/**", False),
        ("/usr-local/bin/x", "/usr/**", False),
        ("/opt/a/bin/x", "/opt/*/bin/x", True),
        ("/opt/a/b/bin/x", "/opt/*/bin/x", False),
        ("/usr/bin/python3", "/usr/bin/python[23]", True),
        ("/usr/bin/UPTIME", "/usr/bin/uptime", False),
        ("/tmp/usr/bin/uptime", "/usr/bin/uptime", False),
        ("/usr/bin/uptime/x", "/usr/bin/uptime", False),
    ],
)
def test_patterns(path: str, pattern: str, fits: bool) -> None:
    assert policy.pattern_fault(pattern) is None
    assert policy.matches(path, pattern) is fits


NAMES = st.text("ab", min_size=1, max_size=3)
PARTS = st.lists(NAMES, min_size=1, max_size=4)


@given(PARTS, st.lists(st.sampled_from(["a", "*", "?", "ab", "[ab]"]), min_size=1, max_size=4))
def test_a_star_never_spans_folders(parts: list[str], wanted: list[str]) -> None:
    found = policy.matches("/" + "/".join(parts), "/" + "/".join(wanted))
    assert found == (
        len(parts) == len(wanted)
        and all(fnmatchcase(p, w) for p, w in zip(parts, wanted, strict=True))
    )


@given(PARTS, PARTS)
def test_everything_below_is_below(folder: list[str], parts: list[str]) -> None:
    base, path = "/" + "/".join(folder), "/" + "/".join(parts)
    assert policy.matches(path, base + "/**") == (
        path != base and posixpath.commonpath([path, base]) == base
    )


@pytest.mark.parametrize(
    "pattern", ["usr/bin/x", "", "/", "/usr//bin", "/usr/../bin", "/usr/./x", "/**/x", "/usr/**x"]
)
def test_patterns_that_could_never_fit_are_faults(pattern: str) -> None:
    assert policy.pattern_fault(pattern)


def test_an_executable_no_pattern_fits_is_named() -> None:
    found = policy.refuse_executable("/usr/bin/rm", Policy(RUN_KINDS, executables=["/usr/bin/ls"]))
    assert found is not None
    assert (found.phase, found.reason) == (pb.RUN_PHASE_REJECTED, "NotAllowed")
    assert "tasks.allowedExecutables" in found.message
    assert "/usr/bin/rm" in found.message
    # A run that is in the journal may still be refused so.
    runs.advance(runs.accepted(pb.RunId(task_uid="t", attempt=1)), found.phase)
    assert policy.refuse_executable("/usr/bin/rm", Policy(RUN_KINDS)) is None


# Accounts.

PASSWD = """\
root:x:0:0:root:/root:/bin/bash
broken line
bad:x:minus:1::/:
nobody:x:65534:65533::/nonexistent:/usr/sbin/nologin
app:x:1000:1001:An app:/srv/app:/bin/sh
1001:x:7:7::/:
late:x:1001:1002:::
"""
GROUP = """\
root:x:0:
app:x:1001:app
docker:x:999:other,app
wheel:x:10:application
"""


@pytest.mark.parametrize(
    ("user", "account"),
    [
        ("root", Account("root", 0, 0, (), "/root")),
        ("app", Account("app", 1000, 1001, (999,), "/srv/app")),
        ("1000", Account("app", 1000, 1001, (999,), "/srv/app")),
        ("nobody", Account("nobody", 65534, 65533, (), "/nonexistent")),
        # Names go before numbers.
        ("1001", Account("1001", 7, 7)),
        ("late", Account("late", 1001, 1002)),
        ("4242", Account("4242", 4242, 4242)),
        ("4294967294", Account("4294967294", 2**32 - 2, 2**32 - 2)),
        # To the kernel this is "leave it as it is", which is root.
        ("4294967295", None),
        ("4294967296", None),
        ("99999999999999999999", None),
        ("bad", None),
        ("stranger", None),
        ("", None),
        ("٣", None),
    ],
)
def test_users(user: str, account: Account | None) -> None:
    assert accounts.find(user, passwd=PASSWD, group=GROUP) == account


@given(st.text(), st.text(), st.text(max_size=12))
def test_whatever_the_files_hold_ids_are_in_range(passwd: str, group: str, user: str) -> None:
    found = accounts.find(user, passwd=passwd, group=group)
    if found is not None:
        assert all(0 <= n <= accounts.MAX_ID for n in (found.uid, found.gid, *found.groups))


@given(st.integers(-(2**40), 2**40))
def test_numbers_that_are_no_ids_are_no_users(number: int) -> None:
    found = accounts.find(str(number), passwd="", group="")
    assert (found is not None) == (0 <= number <= accounts.MAX_ID)


# Leaving.


def left(phase: runs.Phase, why: str) -> pb.RunState:
    return pb.RunState(id=pb.RunId(task_uid="t", attempt=1), phase=phase, reason=why)


@pytest.mark.parametrize(
    ("phase", "why", "marker", "succeeded"),
    [
        (pb.RUN_PHASE_RUNNING, leaving.RESTARTING, None, True),
        (pb.RUN_PHASE_RUNNING, leaving.SHUTTING_DOWN, "t/1", True),
        # It was killed before it noted that it goes; or another one had it go.
        (pb.RUN_PHASE_RUNNING, leaving.SHUTTING_DOWN, None, False),
        (pb.RUN_PHASE_RUNNING, leaving.SHUTTING_DOWN, "t/2", False),
        (pb.RUN_PHASE_ACCEPTED, "", "t/1", False),
        (pb.RUN_PHASE_RUNNING, "", "t/1", False),
    ],
)
def test_what_becomes_of_a_run_whose_agent_went(
    phase: runs.Phase, why: str, marker: str | None, succeeded: bool
) -> None:
    absence = Absence("pod-1", marker, 1) if marker else None
    found = leaving.outcome_after(left(phase, why), "t/1", absence)
    assert (found is not None and found.phase == pb.RUN_PHASE_SUCCEEDED) == succeeded


@given(st.text(), st.text(), st.integers(0, 2**40))
def test_a_marker_is_read_as_written(pod: str, by: str, since: int) -> None:
    absence = Absence(pod, by, since)
    assert leaving.read(leaving.write(absence)) == absence
    assert leaving.stays_away(absence, pod) == bool(pod)
    assert not leaving.stays_away(absence, pod + "x")


@given(st.binary())
def test_a_damaged_marker_is_none(content: bytes) -> None:
    found = leaving.read(content)
    assert found is None or isinstance(found, Absence)


def test_other_tasks_of_other_servers_are_no_shutdown() -> None:
    assert leaving.is_shutdown(pb.Task(data_type=1060, object_name="outrider-agent"))
    assert not leaving.is_shutdown(pb.Task(data_type=1060, object_name="fim"))
    assert not leaving.is_shutdown(pb.Task(data_type=6003, object_name="outrider-agent"))

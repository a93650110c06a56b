"""kubectl outrider against a real API server, with a server and agents as processes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from cluster import toolchain
from cluster.controlplane import ControlPlane
from cluster.paths import ROOT
from cluster.programs import NAMESPACE, Programs
from cluster.supervised import wait_for
from fakes.terminal import CTRL_C, CTRL_D, Terminal

PLUGIN = Path(sys.executable).parent / "kubectl-outrider"
NODES = ("alpha", "beta", "gamma")
#: Has a Node, and never an agent that runs.
SILENT = "silent"
WAIT = 60.0
AT_ONCE = ("--max-concurrent", "100%")


@pytest.fixture(scope="module")
def fleet(
    control_plane_programs: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Programs]:
    with ControlPlane(tmp_path_factory.mktemp("plane")) as plane:
        programs = Programs(plane)
        programs.install()
        programs.start(programs.server())
        for node in NODES:
            labels = {"tier": "odd" if node == "beta" else "even"}
            programs.start(programs.agent(node, labels), ready=False)
        programs.agent(SILENT)
        programs.wait_agents_ready(len(NODES))
        yield programs


def environ(fleet: Programs) -> dict[str, str]:
    return {**os.environ, "KUBECONFIG": str(fleet.plane.kubeconfig), "LANG": "C.UTF-8"}


def outrider(
    fleet: Programs, *words: str, code: int = 0, stdin: str = "", text: bool = True
) -> subprocess.CompletedProcess[Any]:
    done = subprocess.run(
        [PLUGIN, *words],
        env=environ(fleet),
        input=stdin if text else stdin.encode(),
        capture_output=True,
        text=text,
        timeout=WAIT,
        check=False,
    )
    assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
    return done


def fresh(prefix: str = "cli") -> str:
    return f"{prefix}-{uuid.uuid4().hex[:8]}"


def spec(fleet: Programs, name: str) -> dict[str, Any]:
    task = json.loads(fleet.plane.kubectl("get", "agenttask", name, "-o", "json"))
    return dict(task["spec"])


def phase(fleet: Programs, name: str) -> str:
    task = json.loads(fleet.plane.kubectl("get", "agenttask", name, "-o", "json"))
    return str(task.get("status", {}).get("phase", ""))


def tasks(fleet: Programs) -> set[str]:
    found = json.loads(fleet.plane.kubectl("get", "agenttasks", "-o", "json"))
    return {item["metadata"]["name"] for item in found["items"]}


def records(fleet: Programs) -> str:
    return str(fleet.folder / "server-0" / "records")


# ---------------------------------------------------------------- run and results


def test_run_groups_like_results_and_answers_with_zero(fleet) -> None:
    nodes = ",".join(NODES)
    done = outrider(fleet, "run", "--node", nodes, *AT_ONCE, "--", "sh", "-c", "echo same; exit 0")
    assert done.stdout == "--- 3 nodes · Succeeded · exit code 0 --- alpha, beta, gamma\nsame\n"
    assert "Succeeded (AllNodesSucceeded): 3 of 3 nodes done: 3 succeeded" in done.stderr


def test_run_tells_differing_results_apart_and_answers_with_one(fleet) -> None:
    name = fresh()
    script = 'echo on $OUTRIDER_NODE; [ "$OUTRIDER_NODE" = beta ] && exit 7; true'
    done = outrider(
        fleet,
        *("run", "--name", name, "-l", "tier", "--max-failures", "100%", *AT_ONCE),
        *("--", "/bin/sh", "-c", script),
        code=1,
    )
    assert "--- 1 node · Failed · exit code 7 · NonZeroExit --- beta\n" in done.stdout
    assert "on beta" in done.stdout
    assert "on alpha" in done.stdout
    table = outrider(fleet, "results", name).stdout.splitlines()
    assert table[0].split() == ["NODE", "PHASE", "EXIT", "REASON", "OUTPUT"]
    assert [line.split()[:3] for line in table[1:]] == [
        ["alpha", "Succeeded", "0"],
        ["beta", "Failed", "7"],
        ["gamma", "Succeeded", "0"],
    ]
    failed = outrider(fleet, "results", f"agenttask/{name}", "--failed", "-o", "name")
    assert failed.stdout == "beta\n"
    wide = outrider(fleet, "results", name, "-o", "wide").stdout.splitlines()
    assert wide[0].split()[4:7] == ["ATTEMPT", "TOOK", "BYTES"]
    as_json = json.loads(outrider(fleet, "results", name, "-o", "json").stdout)
    assert as_json == yaml.safe_load(outrider(fleet, "results", name, "-o", "yaml").stdout)
    assert as_json["counts"]["failed"] == 1
    assert {row["node"] for row in as_json["nodes"]} == set(NODES)
    grouped = outrider(fleet, "results", name, "-o", "group").stdout
    assert grouped == done.stdout


def test_flags_become_the_task(fleet) -> None:
    name = fresh()
    outrider(
        fleet,
        *("run", "--name", name, "-l", "tier=even,kubernetes.io/os!=plan9", "--sample", "50%"),
        *("--max-concurrent", "7", "--max-failures", "3", "--timeout", "1m30s", "--keep"),
        *("--env", "A=b=c", "--", "sh", "-c", 'test "$A" = b=c'),
    )
    made = spec(fleet, name)
    assert made["target"]["sample"] == "50%"
    assert made["target"]["nodeSelector"] == {
        "matchLabels": {"tier": "even"},
        "matchExpressions": [{"key": "kubernetes.io/os", "operator": "NotIn", "values": ["plan9"]}],
    }
    assert made["rollout"]["maxConcurrent"] == 7
    assert made["rollout"]["maxFailures"] == 3
    assert made["rollout"]["waves"] == ["100%"]
    assert made["timeoutSeconds"] == 90
    assert made["ttlSecondsAfterFinished"] == 315_360_000


def test_a_script_from_a_file_with_its_interpreter_and_from_stdin(fleet, tmp_path) -> None:
    script = tmp_path / "script"
    script.write_text("#!/usr/bin/env -S sed -n 2p\nthe second line\n")
    done = outrider(fleet, "run", "--node", "alpha", "--script", str(script))
    assert done.stdout.endswith("the second line\n")
    done = outrider(
        fleet, "run", "--node", "alpha", "--script", "-", stdin="echo by $0 | cut -c1-4"
    )
    assert "by /" in done.stdout


def test_a_node_without_its_agent_is_named_while_it_is_waited_for(fleet) -> None:
    name = fresh()
    done = outrider(
        fleet,
        *("run", "--name", name, "--node", f"alpha,{SILENT}", "--deadline", "4s", *AT_ONCE),
        *("--", "true"),
        code=1,
    )
    assert re.search(rf"waiting: 1 node AgentNotConnected \(.*\): {SILENT}\n", done.stderr)
    assert outrider(fleet, "results", name, "--failed", "-o", "name").stdout == ""
    wide = outrider(fleet, "results", name).stdout
    assert SILENT in wide


def test_results_names_the_absent_while_the_task_runs(fleet) -> None:
    name = fresh()
    task = {
        "apiVersion": "outrider.dev/v1alpha1",
        "kind": "AgentTask",
        "metadata": {"name": name},
        "spec": {
            "run": {"builtin": "Ping"},
            "target": {"nodeNames": ["alpha", SILENT, "nowhere"]},
            "rollout": {"waves": ["100%"], "maxConcurrent": "100%"},
        },
    }
    fleet.plane.kubectl("apply", "-f", "-", stdin=json.dumps(task))
    wait_for("it runs", lambda: phase(fleet, name) == "Running", WAIT, 0.1)
    done = outrider(fleet, "results", name, "--absent", "-o", "name")
    assert done.stdout == f"nowhere\n{SILENT}\n"
    assert re.search(rf"waiting: 1 node AgentNotConnected \(.*\): {SILENT}\n", done.stderr)
    assert re.search(r"waiting: 1 node NodeNotFound \(.*\): nowhere\n", done.stderr)
    done = outrider(fleet, "cancel", name, "--wait")
    assert "Cancelled (TaskCancelled)" in done.stderr
    assert "has ended before" in outrider(fleet, "cancel", name).stderr


def test_no_node_fits_is_said(fleet) -> None:
    done = outrider(fleet, "run", "-l", "tier=none", "--", "true", code=1)
    assert "NoMatchingNodes" in done.stderr


def test_kubectl_finds_it_as_its_plug_in(fleet) -> None:
    path = f"{PLUGIN.parent}:/usr/bin:/bin"
    done = subprocess.run(
        [fleet.plane.program("kubectl"), "outrider", "agents", "-o", "name"],
        env={**environ(fleet), "PATH": path},
        capture_output=True,
        text=True,
        timeout=WAIT,
        check=True,
    )
    assert set(done.stdout.split()) >= set(NODES)


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["run"], 2, "give one thing to run"),
        (["run", "--builtin", "Ping", "--", "true"], 2, "give one thing to run"),
        (["run", "-l", "a b", "--", "true"], 2, "is no condition on a label"),
        (["run", "--max-failures", "x%", "--", "true"], 2, "neither a number"),
        (["run", "--timeout", "soon", "--", "true"], 2, "is no time"),
        (["run", "--script", "/none", "--interpreter", "a"], 2, "No such file"),
        (["run", "--waves", "5,1", "--", "true"], 3, "must go up"),
        (["run", "--name", "No_Name", "--", "true"], 3, "metadata.name"),
        (["results", "nothing"], 3, "there is no AgentTask default/nothing"),
        (["cancel", "nothing"], 3, "there is no AgentTask default/nothing"),
        (["output", "nothing", "alpha"], 3, "there is no AgentTask default/nothing"),
        (["agents", "--context", "none"], 2, "kubeconfig cannot be used"),
        (["agents", "--", "x"], 2, "takes nothing after --"),
        (["frob"], 2, "invalid choice"),
        (["results", "--frob", "x"], 2, "unrecognized arguments"),
    ],
)
def test_errors_are_one_line(fleet, words, code, said) -> None:
    done = outrider(fleet, *words, code=code)
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert said in line


def test_an_api_server_that_is_away_is_named(fleet, tmp_path) -> None:
    config = yaml.safe_load(fleet.plane.kubeconfig.read_text())
    config["clusters"][0]["cluster"]["server"] = "https://127.0.0.1:9"
    file = tmp_path / "config"
    file.write_text(yaml.safe_dump(config))
    done = outrider(fleet, "--kubeconfig", str(file), "agents", code=3)
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: the API server https://127.0.0.1:9 does not answer: ")


def test_a_name_that_is_taken(fleet) -> None:
    name = fresh()
    outrider(fleet, "run", "--name", name, "--node", "alpha", "--", "true")
    done = outrider(fleet, "run", "--name", name, "--node", "alpha", "--", "true", code=3)
    assert f"there is an AgentTask default/{name} already" in done.stderr


# ---------------------------------------------------------------- agents and ping


def test_agents(fleet) -> None:
    done = outrider(fleet, "agents")
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["NODE", "READY", "REASON", "SINCE", "VERSION", "SERVER"]
    assert {line.split()[0]: line.split()[1] for line in lines[1:]}.items() >= dict.fromkeys(
        NODES, "True"
    ).items()
    assert done.stderr.endswith(" 3 connected\n")
    found = json.loads(outrider(fleet, "agents", "-o", "json").stdout)
    assert {agent["metadata"]["name"] for agent in found} >= set(NODES)


def test_ping_answers_with_times_and_takes_its_task_away(fleet) -> None:
    before = tasks(fleet)
    done = outrider(fleet, "ping", "--node", ",".join(NODES))
    lines = done.stdout.splitlines()
    assert {line.split()[0] for line in lines[1:4]} == set(NODES)
    assert lines[-1].startswith("min ")
    assert "p99 " in lines[-1]
    assert "3 of 3 nodes answered" in done.stderr
    assert tasks(fleet) == before
    found = json.loads(outrider(fleet, "ping", "-l", "tier", "-o", "json").stdout)
    assert set(found["nodes"]) == set(NODES)
    shares = found["seconds"]
    assert 0 < shares["min"] <= shares["p50"] <= shares["p99"] <= shares["max"] < 10


def test_ping_names_who_is_away_and_does_not_wait_for_them(fleet) -> None:
    done = outrider(fleet, "ping", "--node", f"alpha,{SILENT}", "--timeout", "30s", code=1)
    assert "alpha" in done.stdout
    assert re.search(rf"no answer, AgentNotConnected \(.*\): {SILENT}\n", done.stderr)
    assert "1 of 2 nodes answered" in done.stderr


# ---------------------------------------------------------------- output


def test_output_is_whole_byte_by_byte(fleet) -> None:
    name = fresh()
    source = "i=0; while [ $i -lt 40000 ]; do i=$((i+1)); echo line $i; done; printf '\\377\\000'"
    outrider(
        fleet, "run", "--name", name, "--node", "alpha,beta", *AT_ONCE, "--", "sh", "-c", source
    )
    wanted = b"".join(b"line %d\n" % number for number in range(1, 40001)) + b"\xff\x00"
    done = outrider(fleet, "output", name, "alpha", "--records", records(fleet), text=False)
    assert done.stdout == wanted


def test_output_that_stands_in_the_report_needs_no_records(fleet) -> None:
    name = fresh()
    outrider(fleet, "run", "--name", name, "--node", "alpha", "--", "echo", "short")
    assert outrider(fleet, "output", name, "alpha").stdout == "short\n"


def test_output_says_what_is_missing_and_of_whom_there_is_none(fleet, tmp_path) -> None:
    name = fresh()
    outrider(fleet, "run", "--name", name, "--node", "alpha", "--", "seq", "1", "9000")
    empty = ["--records", str(tmp_path), "--wait", "1"]
    done = outrider(fleet, "output", name, "alpha", *empty, code=4)
    waiting, error = done.stderr.splitlines()
    assert "waiting: 43,893 of 43,893 bytes are still on their way from the agent" in waiting
    assert "these are missing: 0-43,893" in error
    assert "is not for a node beta" in outrider(fleet, "output", name, "beta", code=3).stderr
    done = outrider(fleet, "output", name, "alpha", code=3)
    assert "no server Pod runs in the namespace outrider" in done.stderr
    done = outrider(fleet, "output", name, "alpha", "--attempt", "2", code=2)
    assert "the last one on alpha was 1" in done.stderr


def test_output_beyond_the_limit_is_said_to_be_gone(fleet) -> None:
    name = fresh()
    task = {
        "apiVersion": "outrider.dev/v1alpha1",
        "kind": "AgentTask",
        "metadata": {"name": name},
        "spec": {
            "run": {"command": ["seq", "1", "9000"]},
            "target": {"nodeNames": ["alpha"]},
            "output": {"previewBytes": 10, "maxBytes": 5000},
        },
    }
    fleet.plane.kubectl("apply", "-f", "-", stdin=json.dumps(task))
    wait_for("it has ended", lambda: phase(fleet, name) == "Succeeded", WAIT, 0.1)
    done = outrider(fleet, "output", name, "alpha", "--records", records(fleet))
    assert len(done.stdout) == 5000
    assert "printed 43,893 bytes: those after 5,000 were thrown away" in done.stderr


# ---------------------------------------------------------------- at a terminal


def run_at_terminal(fleet: Programs, name: str, *words: str, **options: Any) -> Terminal:
    command = [str(PLUGIN), "run", "--name", name, "--node", ",".join(NODES), *AT_ONCE, *words]
    return Terminal(command, environ(fleet), **options)


def wait_running(fleet: Programs, name: str) -> None:
    def running() -> bool:
        found = json.loads(fleet.plane.kubectl("get", "agenttask", name, "-o", "json"))
        return bool(found.get("status", {}).get("counts", {}).get("running") == 3)

    wait_for("it runs everywhere", running, WAIT, 0.1)


def test_a_bar_on_a_terminal_and_results_alone_on_stdout(fleet, tmp_path) -> None:
    name, file = fresh(), tmp_path / "out"
    with run_at_terminal(fleet, name, "--", "sh", "-c", "sleep 1; echo ok", stdout=file) as screen:
        screen.expect("0 of 3 nodes done")
        screen.expect("3 succeeded")
        assert screen.end() == 0
    assert file.read_text() == "--- 3 nodes · Succeeded · exit code 0 --- alpha, beta, gamma\nok\n"


def test_ctrl_c_and_leave(fleet) -> None:
    name = fresh()
    with run_at_terminal(fleet, name, "--", "sleep", "3") as screen:
        screen.expect("3 running")
        screen.press(CTRL_C)
        screen.expect("[l]eave it running, [c]ancel it, or go on to [w]atch?")
        screen.press(b"l\n")
        screen.expect(f"left: AgentTask default/{name} goes on")
        assert screen.end() == 130
    wait_for("it went on to its end", lambda: phase(fleet, name) == "Succeeded", WAIT, 0.2)


def test_ctrl_c_and_cancel(fleet) -> None:
    name = fresh()
    with run_at_terminal(fleet, name, "--", "sleep", "600") as screen:
        screen.expect("3 running")
        screen.press(CTRL_C)
        screen.expect("[w]atch?")
        screen.press(b"c\n")
        screen.expect("cancelling: what runs is ended")
        screen.expect("3 nodes · Cancelled")
        screen.expect("Cancelled (TaskCancelled)")
        assert screen.end() == 1
    assert phase(fleet, name) == "Cancelled"


def test_ctrl_c_and_watch_on(fleet) -> None:
    name = fresh()
    with run_at_terminal(fleet, name, "--", "sh", "-c", "sleep 3; echo slept") as screen:
        screen.expect("3 running")
        screen.press(CTRL_C)
        screen.expect("[w]atch?")
        screen.press(b"what\n")
        screen.expect("[w]atch?")
        screen.press(b"w\n")
        screen.expect("slept")
        assert screen.end() == 0


@pytest.mark.parametrize("keys", [CTRL_C, CTRL_D])
def test_a_second_ctrl_c_leaves(fleet, keys) -> None:
    name = fresh()
    with run_at_terminal(fleet, name, "--", "sleep", "600") as screen:
        screen.expect("3 running")
        screen.press(CTRL_C)
        screen.expect("[w]atch?")
        screen.press(keys)
        screen.expect("goes on")
        assert screen.end() == 130
    assert phase(fleet, name) == "Running"
    outrider(fleet, "cancel", name, "--wait")


def test_ctrl_c_after_cancel_leaves(fleet) -> None:
    name = fresh()
    trap = 'trap "" TERM; sleep 600 & wait; sleep 600'
    with run_at_terminal(fleet, name, "--", "sh", "-c", trap) as screen:
        screen.expect("3 running")
        screen.press(CTRL_C)
        screen.expect("[w]atch?")
        screen.press(b"c\n")
        screen.expect("(Ctrl-C leaves)\r\n")
        # The agents wait 5 s before they kill what does not end by itself.
        screen.expect("nodes ending it: alpha, beta, gamma")
        screen.press(CTRL_C)
        screen.expect("is being cancelled")
        assert screen.end() == 130
    wait_for("it is cancelled", lambda: phase(fleet, name) == "Cancelled", WAIT, 0.2)


def test_without_a_terminal_the_signal_leaves_at_once(fleet) -> None:
    name = fresh()
    words = ["run", "--name", name, "--node", ",".join(NODES), *AT_ONCE, "--", "sleep", "600"]
    process = subprocess.Popen(
        [PLUGIN, *words],
        env=environ(fleet),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        wait_for("it is made", lambda: name in tasks(fleet), WAIT, 0.1)
        wait_running(fleet, name)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert f"left: AgentTask default/{name} goes on" in errors
    assert phase(fleet, name) == "Running"
    outrider(fleet, "cancel", name, "--wait")


def test_what_nodes_print_cannot_steer_the_terminal(fleet) -> None:
    name = fresh()
    evil = r"printf '\033[2J\033]0;title\007end\n'"
    done = outrider(fleet, "run", "--name", name, "--node", "alpha", "--", "sh", "-c", evil)
    assert "\x1b" not in done.stdout
    assert "\x07" not in done.stdout
    assert "end" in done.stdout
    # As it was printed for who asks for it.
    assert "\x1b[2J" in outrider(fleet, "output", name, "alpha").stdout


# ---------------------------------------------------------------- rights


@pytest.fixture(scope="module")
def helm() -> Path:
    return toolchain.ensure(["helm"])["helm"]


def bind(fleet: Programs, helm: Path, role: str) -> str:
    """A ServiceAccount with one of the chart's roles in the namespace default; its kubeconfig."""
    command = [helm, "template", "outrider", ROOT / "charts" / "outrider", "--namespace", NAMESPACE]
    rendered = subprocess.run(
        [
            *map(str, command),
            *("--show-only", "templates/user-roles.yaml"),
            *("--kube-version", toolchain.version("kubernetes")),
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    fleet.plane.kubectl("apply", "-f", "-", stdin=rendered.stdout)
    account = fresh("user")
    fleet.plane.make_service_account(NAMESPACE, account)
    words = ["--clusterrole", role, "--serviceaccount", f"{NAMESPACE}:{account}", "-n", "default"]
    fleet.plane.kubectl("create", "rolebinding", account, *words)
    token = fleet.plane.token(NAMESPACE, account, audience="")
    return str(fleet.plane.kubeconfig_for(account, token))


def test_the_editor_may_run_and_the_viewer_may_look(fleet, helm) -> None:
    editor = bind(fleet, helm, "outrider-task-editor")
    viewer = bind(fleet, helm, "outrider-task-viewer")
    name = fresh()
    words = ["run", "--name", name, "--node", "alpha", "--", "echo", "may"]
    assert "may\n" in outrider(fleet, "--kubeconfig", editor, *words).stdout
    outrider(fleet, "--kubeconfig", editor, "ping", "--node", "alpha")
    outrider(fleet, "--kubeconfig", editor, "cancel", name)
    assert "alpha" in outrider(fleet, "--kubeconfig", viewer, "results", name).stdout
    for wrong in (["run", "--", "true"], ["cancel", fresh()], ["agents"], ["ping"]):
        done = outrider(fleet, "--kubeconfig", viewer, *wrong, code=3)
        (line,) = done.stderr.splitlines()
        assert "forbidden" in line or "there is no AgentTask" in line


# ---------------------------------------------------------------- when nobody answers


def test_an_api_server_that_goes_away_meanwhile_is_waited_for(fleet) -> None:
    name = fresh()
    with run_at_terminal(fleet, name, "--", "sh", "-c", "sleep 2; echo back") as screen:
        screen.expect("3 running")
        fleet.plane.kill_part("kube-apiserver")
        try:
            screen.expect("waiting: the API server https://127.0.0.1")
        finally:
            fleet.plane.start_part("kube-apiserver")
        screen.expect("back", WAIT)
        assert screen.end() == 0


def test_a_server_that_is_away_is_said_and_waited_for(fleet) -> None:
    server = fleet.servers["server-0"]
    fleet.plane.processes.kill(server.name)
    name = fresh()
    try:
        with run_at_terminal(fleet, name, "--", "echo", "back") as screen:
            screen.expect("no server has begun with the task")
            fleet.start(server)
            screen.expect("back", WAIT)
            assert screen.end() == 0
    finally:
        if not fleet.plane.processes.running(server.name):
            fleet.start(server)

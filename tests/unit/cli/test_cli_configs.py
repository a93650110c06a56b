"""AgentConfigs as the commands see them: revisions, rollbacks, progress, and merging."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from outrider_cli.core import config_effective as effective
from outrider_cli.core import config_progress, config_table
from outrider_cli.core.config_progress import Outcome
from outrider_cli.core.config_report import Report, report_of
from outrider_cli.core.config_words import ACTIONS, arranged
from outrider_cli.core.configs import Config, Revision, config_of, earlier, pick, revisions_of
from outrider_cli.core.configs import state as state_of
from outrider_proto.effective import pack
from outrider_proto.merging import merge, read

NOW = 1_000_000.0


def interval(seconds: int, **more: Any) -> dict[str, Any]:
    return {"selector": {}, "collectors": {"host": {"intervalSeconds": seconds}}, **more}


def body(target: str, settled: str, phase: str, *history: tuple[str, str], **more: Any) -> Any:
    """An AgentConfig; `history`: revisions and results, the newest first."""
    reason, message = more.pop("ready", ("", ""))
    return {
        "metadata": {"name": "web", "uid": "u", "generation": 2},
        "spec": more.pop("spec", interval(int(target[-1]), rollout={"maxUnavailable": 1})),
        "status": {
            "observedGeneration": more.pop("observed", 2),
            "conditions": [
                {"type": "Progressing", "reason": "Other"},
                {"type": "Ready", "reason": reason, "message": message},
            ],
            "revision": target,
            "settledRevision": settled,
            "counts": {"targeted": 4, "applied": 2, "pending": 2, "absent": 1},
            "history": [{"revision": r, "result": result} for r, result in history],
            "rollout": {"phase": phase, "settled": settled, **more},
        },
    }


def kept(*names: str, uid: str = "u") -> list[dict[str, Any]]:
    owners = [{"kind": "AgentConfig", "name": "web", "uid": uid}]
    return [
        {
            "metadata": {"name": f"web-{name}", "ownerReferences": owners},
            "revision": number,
            "data": interval(int(name[-1])),
        }
        for number, name in enumerate(names, start=1)
    ]


def known(whole: Any, *names: str) -> tuple[Config, list[Revision]]:
    config = config_of(whole)
    return config, revisions_of(config, kept(*names))


# ---------------------------------------------------------------- words


@pytest.mark.parametrize(
    ("words", "made"),
    [
        ("config n1", "config node n1"),
        ("config -o yaml n1 --diff", "config node -o yaml n1 --diff"),
        ("config --diff n1", "config node --diff n1"),
        ("--context config config n1", "--context config config node n1"),
        ("config -n ns history web", "config -n ns history web"),
        ("config node/history", "config node node/history"),
        ("config node n1", "config node n1"),
        ("config --help", "config --help"),
        ("config", "config"),
        ("config status web --watch=false", "config status web --no-watch"),
        ("results config", "results config"),
        ("run --name config", "run --name config"),
    ],
)
def test_a_node_may_stand_where_an_action_does(words, made) -> None:
    assert arranged(words.split()) == made.split()


def test_every_action_has_a_module() -> None:
    from outrider_cli.commands import config

    assert set(ACTIONS) == set(config._MODULES)


# ---------------------------------------------------------------- revisions


def test_revisions_come_oldest_first_with_what_became_of_them() -> None:
    history = [("a1", "Applied"), ("a3", "RolledBack"), ("a2", "Applied")]
    config, found = known(body("a1", "a1", "Settled", *history), "a1", "a2", "a3", "a4")
    assert [(r.name, r.result, r.spec is not None) for r in found] == [
        ("a4", "", True),
        ("a2", "Applied", True),
        ("a3", "RolledBack", True),
        ("a1", "Applied", True),
    ]
    assert [state_of(r, config) for r in found] == ["", "", "", "settled"]


def test_a_revision_whose_object_is_gone_is_still_named() -> None:
    _, found = known(body("a2", "a2", "Settled", ("a2", "Applied"), ("a1", "Applied")), "a2")
    assert [(r.name, r.spec is None) for r in found] == [("a1", True), ("a2", False)]


def test_revisions_of_an_earlier_object_of_the_name_do_not_count() -> None:
    config = config_of(body("a1", "a1", "Settled"))
    assert revisions_of(config, kept("a1", uid="other")) == []


@pytest.mark.parametrize(
    ("phase", "expected"),
    [
        ("Canary", ["settled", "in trial (Canary)"]),
        ("Paused", ["settled", "in trial (Paused)"]),
        ("RolledBack", ["settled", "asked for"]),
    ],
)
def test_states_tell_what_counts_now(phase, expected) -> None:
    whole = body("a2", "a1", phase, ("a2", ""), ("a1", "Applied"), revision="a2")
    config, found = known(whole, "a1", "a2")
    assert [state_of(r, config) for r in found] == expected


def test_the_first_digits_are_enough() -> None:
    revisions = [Revision("ab12"), Revision("ab34"), Revision("ab")]
    assert pick(revisions, "ab1").name == "ab12"
    assert pick(revisions, "ab").name == "ab"
    with pytest.raises(ValueError, match="several revisions begin with 'a': ab12, ab34, ab"):
        pick(revisions, "a")
    with pytest.raises(ValueError, match="there is no revision 'x'; there are: ab12, ab34, ab"):
        pick(revisions, "x")


# ---------------------------------------------------------------- where a rollback goes


def test_a_change_on_its_way_goes_back_to_the_settled_revision() -> None:
    for phase in ("Canary", "Rolling", "Paused", "RolledBack"):
        history = [("a3", ""), ("a2", "Applied"), ("a1", "Applied")]
        config, found = known(body("a3", "a2", phase, *history, revision="a3"), "a1", "a2", "a3")
        goal = earlier(config, found)
        assert goal is not None
        assert goal.name == "a2"


def test_a_settled_change_goes_back_to_the_one_that_settled_before() -> None:
    history = [("a4", "Applied"), ("a3", "RolledBack"), ("a2", "Superseded"), ("a1", "Applied")]
    config, found = known(body("a4", "a4", "Settled", *history), "a1", "a2", "a3", "a4")
    goal = earlier(config, found)
    assert goal is not None
    assert goal.name == "a1"


def test_there_may_be_nowhere_to_go() -> None:
    only = known(body("a1", "a1", "Settled", ("a1", "Applied")), "a1")
    assert earlier(*only) is None
    gone = known(body("a2", "a2", "Settled", ("a2", "Applied"), ("a1", "Applied")), "a2")
    assert earlier(*gone) is None


def test_a_spec_that_no_server_has_seen_goes_back_too() -> None:
    whole = body("a2", "a2", "Settled", ("a2", "Applied"), observed=1, spec=interval(9))
    goal = earlier(*known(whole, "a2"))
    assert goal is not None
    assert goal.name == "a2"


# ---------------------------------------------------------------- progress


@pytest.mark.parametrize(
    ("whole", "outcome", "text"),
    [
        ({"metadata": {"name": "web", "generation": 1}}, Outcome.GOING, "no server has looked"),
        (body("a2", "a1", "Settled", observed=1), Outcome.GOING, "no server has looked"),
        (body("a2", "a1", "Settled"), Outcome.GOING, "has not begun"),
        (
            body("a2", "a1", "Soaking", revision="a2", message="1 node runs it"),
            Outcome.GOING,
            'Waiting for rollout of "web" revision a2 to finish: Soaking: 1 node runs it '
            "(2 of 4 nodes run it, 1 pending, 1 not connected)",
        ),
        (body("a2", "a1", "RollingBack", revision="a2"), Outcome.GOING, "RollingBack"),
        (
            body("a2", "a2", "Settled"),
            Outcome.DONE,
            'agentconfig "web" successfully rolled out: revision a2 '
            "(2 of 4 nodes run it, 1 pending, 1 not connected)",
        ),
        (
            body("a2", "a2", "Settled", ready=("NodesFailed", "1 of 4 nodes could not take it")),
            Outcome.FAILED,
            'agentconfig "web" rolled out, but 1 of 4 nodes could not take it',
        ),
        (
            # What was settled before stays in force, and is what the status speaks of.
            body("a1", "a1", "Settled", ready=("Invalid", "spec: bad; revision a1 stays")),
            Outcome.FAILED,
            'agentconfig "web" cannot be used: spec: bad; revision a1 stays',
        ),
        (
            body("a2", "a1", "RolledBack", revision="a2", message="2 nodes failed with it: n1, n2"),
            Outcome.FAILED,
            'agentconfig "web" was rolled back: 2 nodes failed with it: n1, n2',
        ),
        (body("a2", "a1", "Paused", revision="a2"), Outcome.FAILED, "is paused"),
    ],
)
def test_progress_ends_when_the_rollout_does(whole, outcome, text) -> None:
    found = config_progress.progress(config_of(whole))
    assert found.outcome is outcome
    assert text in found.line


def agent(name: str, config: Any = None, *, connected: bool = True) -> dict[str, Any]:
    condition = {"type": "Ready", "status": "True"}
    if not connected:
        condition = {
            "type": "Ready",
            "status": "False",
            "message": "its stream ended",
            "lastTransitionTime": "1970-01-12T13:45:00Z",
        }
    status: dict[str, Any] = {"conditions": [condition]}
    if config is not None:
        status["config"] = config
    return {"metadata": {"name": name}, "status": status}


def test_nodes_that_are_waited_for_are_named_with_the_reason() -> None:
    parts = [{"name": "web", "revision": "a2"}]
    ill = {"name": "fim", "healthy": False, "phase": "Starting", "message": "no sign of life"}
    agents = [
        agent("n1", {"phase": "Applied", "revisions": parts}),
        agent("n2", {"phase": "Applying", "revisions": parts}),
        agent("n3", {"phase": "Failed", "message": "bad field", "revisions": parts}),
        agent("n4", {"phase": "Applied", "revisions": parts, "plugins": [ill]}),
        agent("n5", {"phase": "Applied", "revisions": parts}, connected=False),
        agent("n6", {"phase": "Applying", "revisions": [{"name": "web", "revision": "a1"}]}),
        *(agent(f"x{n}", {"phase": "Applying", "revisions": parts}) for n in range(4)),
    ]
    config = config_of(body("a2", "a1", "Rolling", revision="a2"))
    assert config_progress.waits(config, agents, NOW) == [
        "5 nodes: Applying: n2, x0, x1 and 2 more",
        "1 node: Failed: bad field: n3",
        "1 node: its agent is not connected: n5",
        "1 node: plug-in fim: no sign of life: n4",
    ]


# ---------------------------------------------------------------- what a node is to run

SPECS = {
    ("web", "a5"): interval(5, agent={"logLevel": "debug"}),
    ("web", "a7"): interval(7),
    ("base", "b1"): interval(30, agent={"logLevel": "info"}, priority=10),
    ("also", "c1"): interval(9),
}


def test_values_come_with_where_they_come_from() -> None:
    made = effective.wanted([("web", "a7"), ("base", "b1"), ("also", "c1")], SPECS)
    assert (
        made.hash
        == pack(merge(read(n, s) for (n, r), s in SPECS.items() if r != "a5").effective).hash
    )
    text = config_table.node("n1", Report(), made, "wide")
    assert [line.split() for line in text.splitlines()] == [
        ["FIELD", "VALUE", "FROM", "REVISION", "PRIORITY", "NOT", "HEARD"],
        ["agent.logLevel", "info", "base", "b1", "10"],
        ["collectors.host.intervalSeconds", "9", "also", "c1", "100", "web"],
    ]
    (line,) = config_table.remarks(made, Report(drift=()))
    assert "conflict: collectors.host.intervalSeconds: also is heard, not web" in line


def test_plug_ins_are_shown_with_how_they_are() -> None:
    source = {"urls": ["https://example.org/x"], "sha256": "0" * 64}
    plugin = {"name": "fim", "version": "1.2.0", "source": source, "resources": {"cpu": "100m"}}
    made = effective.wanted([("p", "1")], {("p", "1"): {"plugins": [plugin]}})
    seen = {"name": "fim", "version": "1.1.0", "phase": "Running", "healthy": False, "restarts": 4}
    report = Report(plugins=[seen], drift=["the listener is closed"])
    table = config_table.node("n1", report, made, "table").splitlines()
    assert table[1].split() == ["plugins.fim", "1.2.0", "p"]
    assert table[-1].split() == ["fim", "1.1.0", "Running", "False", "4"]
    assert '"cpuMillis": 100' in config_table.node("n1", report, made, "json")
    assert "drift: the listener is closed" in config_table.remarks(made, report)


def test_what_is_too_large_is_said() -> None:
    def large(name: str) -> dict[str, Any]:
        source = {"urls": ["https://example.org/x"], "sha256": "0" * 64}
        detail = {"version": "1", "source": source, "detail": "x" * 65_000}
        return {"plugins": [{"name": f"{name}{n}", **detail} for n in range(20)]}

    specs = {(name, "1"): large(name) for name in "ab"}
    made = effective.wanted(specs, specs)
    assert (made.content, made.values) == ({}, ())
    assert "cannot be made" in config_table.remarks(made, Report())[0]


@pytest.mark.parametrize(
    ("config", "same", "text"),
    [
        (None, False, "never reported"),
        ({"phase": "None"}, False, "never reported"),
        ({"phase": "Applied", "hash": "HASH"}, True, "runs it (hash "),
        ({"phase": "Applied", "hash": "0f0f"}, False, "runs 0f0f, and is to run "),
        ({"phase": "Applying", "hash": "0f0f"}, False, "is applying"),
        (
            {"phase": "Failed", "hash": "0f0f", "message": "bad"},
            False,
            "refused the configuration, what it ran before stays in force: bad",
        ),
        ({"phase": "Failed", "message": "bad"}, False, "it runs its own settings: bad"),
    ],
)
def test_how_the_agent_stands_is_a_sentence(config, same, text) -> None:
    made = effective.wanted([("web", "a5")], SPECS)
    if config and config.get("hash") == "HASH":
        config = {**config, "hash": made.hash}
    report = report_of(agent("n1", config), NOW)
    assert text in effective.standing(report, made)
    assert effective.runs(report, made) is same


def test_an_agent_that_is_away_says_since_when() -> None:
    report = report_of(agent("n1", connected=False), NOW)
    assert report.away == "its agent is not connected since 100s: its stream ended"


@given(st.lists(st.sampled_from(sorted(SPECS)), unique_by=lambda part: part[0]))
def test_what_an_agent_runs_is_found_by_its_hash(parts) -> None:
    running = effective.wanted(parts, SPECS)
    desired = effective.wanted([("web", "a5"), ("base", "b1")], SPECS)
    revisions = {"web": ["a7", "a5"], "base": ["b1"], "also": ["c1"]}
    found = effective.found_by_hash(running.hash, desired, revisions, SPECS)
    assert found is not None
    assert found.content == running.content
    assert bool(effective.difference("n1", found, desired)) is (running.hash != desired.hash)


def test_what_no_kept_revision_makes_is_not_guessed() -> None:
    desired = effective.wanted([("web", "a5")], SPECS)
    many = {f"c{n}": ["1", "2", "3"] for n in range(50)}
    specs = {(name, r): interval(int(r)) for name, rs in many.items() for r in rs}
    found = effective.found_by_hash("f" * 64, desired, {"web": ["a5"], **many}, {**SPECS, **specs})
    assert found is None

"""kubectl outrider config against an API server in memory: what is written, said and answered."""

from __future__ import annotations

import json
from typing import Any

import pytest
from fakes.cli_cluster import ConfigCluster
from outrider_cli import terminal
from outrider_cli.commands import config, config_status
from outrider_cli.core import config_effective
from outrider_cli.core.config_words import arranged
from outrider_cli.errors import (
    ClusterError,
    ConflictError,
    IncompleteError,
    NotFoundError,
    UnavailableError,
)
from outrider_cli.main import _parser

ROLLOUT = {"maxUnavailable": 1, "canary": {"nodes": 2}}


def spec(seconds: int, **more: Any) -> dict[str, Any]:
    return {"priority": 100, "collectors": {"host": {"intervalSeconds": seconds}}, **more}


@pytest.fixture
def cluster() -> ConfigCluster:
    """AgentConfig web: 5 s settled first, then 10 s, and 15 s is asked for and was taken back."""
    made = ConfigCluster()
    made.add_config("web", {**spec(15), "rollout": ROLLOUT})
    for revision, seconds in (("aaa1", 5), ("bbb2", 10), ("ccc3", 15)):
        made.keep("web", revision, spec(seconds))
    stands(made, "ccc3", "bbb2", "RolledBack", message="1 node failed with it: n1 (bad)")
    return made


def stands(cluster: ConfigCluster, target: str, settled: str, phase: str, **more: Any) -> None:
    results = {"ccc3": "RolledBack", "bbb2": "Applied", "aaa1": "Applied"}
    cluster.set_status(
        "web",
        observedGeneration=cluster.configs["web"]["metadata"]["generation"],
        revision=target,
        settledRevision=settled,
        history=[{"revision": r, "result": result} for r, result in results.items()],
        rollout={"phase": phase, "settled": settled, "revision": target, **more},
        counts={"targeted": 3, "applied": 2, "failed": 1},
    )


def run(cluster: ConfigCluster, words: str) -> int:
    given = arranged(["config", *words.split()])
    return config.run(cluster, _parser(given).parse_args(given))  # type: ignore[arg-type] # a fake


def reporting(cluster: ConfigCluster, *parts: tuple[str, str], **more: Any) -> None:
    cluster.agent_objects["n1"] = {
        "metadata": {"name": "n1"},
        "status": {
            "conditions": [{"type": "Ready", "status": "True"}],
            "config": {"revisions": [{"name": n, "revision": r} for n, r in parts], **more},
        },
    }


def hash_of(*parts: tuple[str, int]) -> str:
    named = {(name, str(seconds)): spec(seconds) for name, seconds in parts}
    return config_effective.wanted(named, named).hash


# ---------------------------------------------------------------- history


def test_history_shows_what_became_of_each_revision(cluster, capsys) -> None:
    assert run(cluster, "history web") == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        ["REVISION", "AGE", "RESULT", "STATE"],
        ["aaa1", "Applied"],
        ["bbb2", "Applied", "settled"],
        ["ccc3", "RolledBack", "asked", "for"],
    ]
    assert run(cluster, "history ac/web -o json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [entry["spec"] for entry in found] == [spec(5), spec(10), spec(15)]


def test_one_revision_is_shown_with_what_it_changed(cluster, capsys) -> None:
    assert run(cluster, "history web --revision b -o json") == 0
    assert json.loads(capsys.readouterr().out) == spec(10)
    assert run(cluster, "history web --revision bbb2 --diff") == 0
    out = capsys.readouterr().out
    assert out.startswith("--- web@aaa1\n+++ web@bbb2\n")
    assert "-    intervalSeconds: 5\n+    intervalSeconds: 10\n" in out
    assert run(cluster, "history web --diff") == 0
    assert "-    intervalSeconds: 10\n+    intervalSeconds: 15\n" in capsys.readouterr().out
    assert run(cluster, "history web --revision aaa1 --diff") == 0
    first = capsys.readouterr().out
    assert first.startswith("--- web before it was made\n+++ web@aaa1\n")
    assert "+    intervalSeconds: 5\n" in first
    with pytest.raises(ClusterError, match="no revision 'x'; there are: aaa1, bbb2, ccc3"):
        run(cluster, "history web --revision x")
    del cluster.revisions["web-aaa1"]
    for words in ("--revision aaa1", "--revision bbb2 --diff"):
        with pytest.raises(ClusterError, match="aaa1 asked for is not kept"):
            run(cluster, f"history web {words}")


# ---------------------------------------------------------------- rollback


def test_rollback_goes_back_to_what_is_settled_and_keeps_the_rollout(cluster, capsys) -> None:
    assert run(cluster, "rollback web") == 0
    assert cluster.configs["web"]["spec"] == {**spec(10), "rollout": ROLLOUT}
    said = capsys.readouterr()
    assert said.out == "agentconfig.outrider.dev/web rolled back\n"
    assert "web: from web@ccc3 to web@bbb2 (settled)" in said.err
    # Nothing was settled meanwhile: it is there already.
    cluster.set_status("web", observedGeneration=2, revision="bbb2")
    assert run(cluster, "rollback web --to bbb2") == 0
    assert "skipped rollback (it asks for revision bbb2 already)" in capsys.readouterr().out


def test_rollback_goes_where_it_is_told(cluster, capsys) -> None:
    assert run(cluster, "rollback web --to aaa") == 0
    assert cluster.configs["web"]["spec"] == {**spec(5), "rollout": ROLLOUT}
    capsys.readouterr()


@pytest.mark.parametrize(("kind", "writes"), [("client", 0), ("server", 1)])
def test_a_dry_run_shows_the_change_and_writes_nothing(cluster, capsys, kind, writes) -> None:
    before = json.dumps(cluster.configs)
    assert run(cluster, f"rollback web --dry-run={kind}") == 0
    said = capsys.readouterr().out
    assert "-    intervalSeconds: 15\n+    intervalSeconds: 10\n" in said
    note = {"client": "(dry run)", "server": "(server dry run)"}[kind]
    assert said.endswith(f"agentconfig.outrider.dev/web rolled back {note}\n")
    assert run(cluster, f"retry web --dry-run={kind}") == 0
    assert json.dumps(cluster.configs) == before
    assert cluster.requests.count("replace_agent_config") == writes
    assert cluster.requests.count("annotate_agent_config") == writes


def test_asking_for_what_was_taken_back_says_how_to_try_it_again(cluster, capsys) -> None:
    assert run(cluster, "rollback web --to ccc3") == 0
    said = capsys.readouterr()
    assert "skipped rollback" in said.out
    assert "kubectl outrider config retry web" in said.err


def test_a_status_that_is_written_meanwhile_is_no_conflict(cluster, capsys) -> None:
    def meanwhile(name: str) -> None:
        if name == "replace_agent_config" and cluster.requests.count(name) == 1:
            cluster.set_status("web", counts={"targeted": 4})

    cluster.before = meanwhile
    assert run(cluster, "rollback web") == 0
    assert cluster.configs["web"]["spec"]["collectors"]["host"]["intervalSeconds"] == 10
    capsys.readouterr()


def test_a_spec_that_is_changed_meanwhile_stays(cluster) -> None:
    def meanwhile(name: str) -> None:
        if name == "replace_agent_config" and cluster.requests.count(name) == 1:
            cluster.change("web", spec(99))

    cluster.before = meanwhile
    with pytest.raises(ConflictError, match="web was changed by somebody else"):
        run(cluster, "rollback web")
    assert cluster.configs["web"]["spec"] == spec(99)


def test_nowhere_to_go_back_to_is_said(cluster) -> None:
    stands(cluster, "aaa1", "aaa1", "Settled")
    with pytest.raises(NotFoundError, match="no earlier revision that settled"):
        run(cluster, "rollback web")
    with pytest.raises(NotFoundError, match="no AgentConfig db"):
        run(cluster, "rollback db")


# ---------------------------------------------------------------- retry


def test_retry_sets_a_new_value_each_time(cluster, capsys, monkeypatch) -> None:
    values = set()
    for _ in range(2):
        assert run(cluster, "retry web") == 0
        values.add(cluster.configs["web"]["metadata"]["annotations"]["outrider.dev/retry"])
        monkeypatch.setattr(terminal, "say", lambda text: None)
    assert len(values) == 2
    assert "agentconfig.outrider.dev/web retried\n" in capsys.readouterr().out


def test_there_is_nothing_to_try_again_once_it_is_settled(cluster, capsys) -> None:
    stands(cluster, "bbb2", "bbb2", "Settled")
    cluster.set_status("web", counts={"targeted": 3, "applied": 3, "failed": 0})
    assert run(cluster, "retry web") == 0
    assert "skipped retry (revision bbb2 is settled)" in capsys.readouterr().out
    assert "annotations" not in cluster.configs["web"]["metadata"]
    cluster.change("web", spec(20))
    with pytest.raises(ClusterError, match="no server has looked"):
        run(cluster, "retry web")


def test_nodes_that_failed_though_it_settled_are_asked_again(cluster, capsys) -> None:
    stands(cluster, "bbb2", "bbb2", "Settled")
    assert run(cluster, "retry web") == 0
    assert cluster.configs["web"]["metadata"]["annotations"]["outrider.dev/retry"]
    assert "revision bbb2: 1 node that could not take it: asked again" in capsys.readouterr().err


# ---------------------------------------------------------------- status


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config_status, "POLL_SECONDS", 0)
    monkeypatch.setattr(config_status, "STALLED_SECONDS", 0)


def steps(cluster: ConfigCluster, *acts: Any) -> None:
    """Each look at the AgentConfig finds what the next act made of it."""
    left = list(acts)

    def act(name: str) -> None:
        if name == "agent_config" and left:
            found = left.pop(0)
            if isinstance(found, Exception):
                raise found
            found()

    cluster.before = act


def test_status_follows_a_change_until_it_has_settled(cluster, capsys, quick) -> None:
    reporting(cluster, ("web", "ccc3"), phase="Applying", hash="0f")
    away = UnavailableError("the API server does not answer")
    steps(
        cluster,
        lambda: cluster.set_status("web", observedGeneration=0),
        lambda: stands(cluster, "ccc3", "bbb2", "Canary", message="tried on 1 nodes first"),
        away,
        lambda: stands(cluster, "ccc3", "bbb2", "Rolling", message="given to 2 of 3 nodes"),
        lambda: stands(cluster, "ccc3", "ccc3", "Settled"),
    )
    assert run(cluster, "status web") == 0
    said = capsys.readouterr()
    lines = said.out.splitlines()
    assert lines[0].endswith("no server has looked at it yet...")
    assert "Canary: tried on 1 nodes first" in lines[1]
    assert "Rolling: given to 2 of 3 nodes" in lines[2]
    assert lines[3].startswith('agentconfig "web" successfully rolled out: revision ccc3')
    assert "web: waiting: no server has looked at it: is one the leader?" in said.err
    assert "web: waiting: the API server does not answer" in said.err


def test_status_names_the_nodes_it_waits_for(cluster, capsys, quick) -> None:
    reporting(cluster, ("web", "ccc3"), phase="Applying", hash="0f")
    steps(
        cluster,
        lambda: stands(cluster, "ccc3", "bbb2", "Rolling"),
        lambda: stands(cluster, "ccc3", "bbb2", "RollingBack", message="1 node failed"),
        lambda: stands(cluster, "ccc3", "bbb2", "RolledBack", message="1 node failed with it"),
    )
    assert run(cluster, "status web") == 1
    said = capsys.readouterr()
    assert "web: waiting: 1 node: Applying: n1\n" in said.err
    assert 'error: agentconfig "web" was rolled back: 1 node failed with it\n' in said.err


def test_status_has_an_end_also_where_the_change_has_none(cluster, capsys, quick) -> None:
    stands(cluster, "ccc3", "bbb2", "Rolling")
    with pytest.raises(IncompleteError, match="timed out waiting for the condition"):
        run(cluster, "status web --timeout 1")
    steps(cluster, lambda: None, NotFoundError("gone"))
    with pytest.raises(NotFoundError, match="AgentConfig web was deleted"):
        run(cluster, "status web")
    with pytest.raises(NotFoundError, match="there is no AgentConfig db"):
        run(cluster, "status db")
    capsys.readouterr()


@pytest.mark.parametrize(("phase", "code"), [("Rolling", 0), ("Paused", 1), ("RolledBack", 1)])
def test_one_look_is_enough_if_asked(cluster, capsys, phase, code) -> None:
    stands(cluster, "ccc3", "bbb2", phase)
    assert run(cluster, "status web --watch=false") == code
    assert capsys.readouterr().out.startswith("Waiting for") is (code == 0)


# ---------------------------------------------------------------- a node


def test_a_node_that_runs_what_it_is_to_run(cluster, capsys) -> None:
    reporting(cluster, ("web", "bbb2"), phase="Applied", hash=hash_of(("web", 10)))
    assert run(cluster, "n1") == 0
    said = capsys.readouterr()
    assert said.out.splitlines()[1].split() == ["collectors.host.intervalSeconds", "10", "web"]
    assert "n1: its agent runs it (hash " in said.err
    assert run(cluster, "n1 --diff") == 0
    assert "n1: no difference" in capsys.readouterr().err


def test_a_node_that_still_runs_an_earlier_revision(cluster, capsys) -> None:
    reporting(cluster, ("web", "ccc3"), phase="Applying", hash=hash_of(("web", 5)))
    assert run(cluster, "node/n1 --diff") == 1
    said = capsys.readouterr()
    assert said.out.splitlines()[0].endswith("(web@aaa1)")
    assert "-    intervalSeconds: 5\n+    intervalSeconds: 15\n" in said.out
    assert "n1: its agent is applying" in said.err


def test_a_node_that_refused(cluster, capsys) -> None:
    reporting(cluster, ("web", "ccc3"), phase="Failed", message="no such field", hash="")
    assert run(cluster, "n1 --diff") == 1
    said = capsys.readouterr()
    assert "+    intervalSeconds: 15\n" in said.out
    assert "it runs its own settings: no such field" in said.err


def test_what_an_agent_runs_may_not_be_known(cluster) -> None:
    reporting(cluster, ("web", "ccc3"), phase="Applying", hash="ab" * 32)
    with pytest.raises(ClusterError, match="n1 runs ababababab and is to run .* nothing else"):
        run(cluster, "n1 --diff")


def test_a_node_of_whom_nothing_is_asked(cluster, capsys) -> None:
    cluster.agent_objects["n1"] = {"metadata": {"name": "n1"}}
    assert run(cluster, "n1") == 0
    said = capsys.readouterr()
    assert said.out == ""
    assert "n1: its agent is not connected: reason unknown" in said.err
    assert "nothing is asked of it so far (1 AgentConfig: none selects it" in said.err
    assert run(cluster, "n1 --diff") == 0
    assert "never reported a configuration" in capsys.readouterr().err
    with pytest.raises(NotFoundError, match="there is no Agent n2"):
        run(cluster, "n2")


def test_a_revision_that_is_gone_is_named(cluster) -> None:
    reporting(cluster, ("web", "ddd4"), phase="Applied", hash="0f")
    with pytest.raises(ClusterError, match="revision ddd4 of AgentConfig web is not kept"):
        run(cluster, "n1")


def test_what_a_later_version_asks_for_is_not_shown_half(cluster) -> None:
    cluster.keep("web", "eee5", {"agent": {"colour": "red"}})
    reporting(cluster, ("web", "eee5"), phase="Applied", hash="0f")
    with pytest.raises(ClusterError, match="cannot read it: .*colour"):
        run(cluster, "n1")

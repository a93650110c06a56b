"""Following a task: trouble on the way, and what is told meanwhile."""

from typing import Any

import pytest
from outrider_cli import follow
from outrider_cli.errors import ClusterError, LeftError, NotFoundError, UnavailableError
from outrider_cli.follow import Follower, patiently

AWAY = UnavailableError("the API server does not answer")
GONE = NotFoundError("there is no AgentTask default/t")


def task(phase: str, **counts: int) -> dict[str, Any]:
    status = {"phase": phase, "counts": counts} if phase else {}
    return {"metadata": {"name": "t", "uid": "u"}, "status": status}


class Cluster:
    """A cluster that answers as a list says; the last answer stays."""

    namespace = "default"

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)
        self.cancelled = 0
        row = {"node": "n1", "phase": "Pending", "reason": "AgentNotConnected", "message": "away"}
        self.found = [{"task": {"uid": "u"}, "nodes": [row]}]

    def task(self, name: str) -> Any:
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def reports(self, name: str) -> Any:
        return self.found

    def cancel_task(self, name: str) -> Any:
        self.cancelled += 1


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow, "POLL_SECONDS", 0)
    monkeypatch.setattr(follow, "STALLED_SECONDS", 0)
    monkeypatch.setattr("outrider_cli.follow.time.sleep", lambda seconds: None)


def following(*answers: Any, **options: Any) -> Follower:
    return Follower(Cluster(*answers), "t", **options)  # type: ignore[arg-type] # a fake


def test_trouble_is_told_and_outlived(capsys: pytest.CaptureFixture[str]) -> None:
    waiting = task("Running", targeted=1, pending=1)
    end = task("Succeeded", targeted=1, succeeded=1)
    assert following(task(""), AWAY, waiting, AWAY, end).to_end() == end
    told = capsys.readouterr().err
    assert "t: waiting: no server has begun with the task" in told
    assert "t: waiting: the API server does not answer" in told
    assert "t: waiting: 1 node AgentNotConnected (away): n1" in told
    assert "t: 1 of 1 node done: 1 succeeded" in told


def test_a_task_that_is_deleted_meanwhile_ends_it() -> None:
    with pytest.raises(ClusterError, match="AgentTask default/t was deleted"):
        following(task("Running"), GONE).to_end()


def test_ctrl_c_without_a_terminal_leaves_and_says_how_to_come_back() -> None:
    follower = following(task("Running"), KeyboardInterrupt())
    with pytest.raises(LeftError, match="goes on .*kubectl outrider cancel t -n default"):
        follower.to_end()


def test_patience_ends() -> None:
    answers: list[Any] = [AWAY, AWAY, "there"]

    def read() -> Any:
        answer = answers.pop(0)
        if isinstance(answer, BaseException):
            raise answer
        return answer

    assert patiently(read) == "there"
    answers = [AWAY] * 100
    with pytest.raises(UnavailableError):
        patiently(read)
    assert len(answers) == 100 - follow.TRIES

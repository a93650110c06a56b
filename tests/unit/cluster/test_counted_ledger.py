"""The ledger finds what is missing, what came again, and what must never be."""

from __future__ import annotations

import pytest
from counted.agents import Notes
from counted.ledger import accepted_ids, account
from outrider_proto import records
from outrider_proto.records import Decoded


def batch(seq: int, *ids: str, agent: str = "a") -> Decoded:
    made = [records.payload(records.AGENT_LOG, 1, {"id": one}) for one in ids]
    return Decoded(agent, agent, 7, seq, 0, made)


def test_all_there_and_one_batch_twice() -> None:
    found = account(["x", "y", "z"], [batch(1, "x", "y"), batch(2, "z"), batch(1, "x", "y")])
    assert (found.accepted, found.arrived, found.repeats, found.batches) == (3, 3, 1, 2)
    assert "accepted 3, arrived 3, lost 0; batches 2, repeats 1" in found.line
    found.check()


@pytest.mark.parametrize(
    ("accepted", "arrived", "aside"),
    [
        (["x", "y"], [batch(1, "x")], []),  # lost
        (["x", "y"], [batch(1, "x"), batch(1, "y")], []),  # a name with two contents
        (["x"], [batch(1, "x"), batch(2, "x")], []),  # a record in two batches
        (["x"], [batch(1, "x"), batch(1, "x", agent="b")], []),  # and of two agents
        (["x", "x"], [batch(1, "x")], []),  # accepted twice
        (["x"], [batch(1, "x")], [batch(2, "y")]),  # set aside
        ([], [], []),  # nothing was tested
    ],
)
def test_what_must_not_be_is_found(accepted, arrived, aside) -> None:
    with pytest.raises(AssertionError):
        account(accepted, arrived, aside).check()


def test_a_record_that_arrives_without_a_note_is_no_loss() -> None:
    found = account(["x"], [batch(1, "x", "y")])
    assert found.unnoted == 1
    found.check()


def test_half_a_line_that_a_kill_left_does_not_count(tmp_path) -> None:
    file = tmp_path / "ids"
    Notes(file).add(["n/1/1", "n/1/12"])
    with file.open("a") as out:
        out.write("n/1/1")  # of n/1/13
    Notes(file).add(["n/2/1"])
    assert accepted_ids([file], {}) == ["n/1/1", "n/1/12", "n/2/1"]

"""Who is connected, and what Agent objects say."""

from dataclasses import replace

from outrider_operator.core.registry import Departure, Registry, Session, agent_status

OLD = Session("a", "uid", 10, "g1", "server-1", 100.0, version="1", address="10.0.0.1:5")
NEW = replace(OLD, session=20, gateway="g2", server="server-2")


def test_the_newest_stream_wins_in_any_order() -> None:
    for order in ((OLD, NEW), (NEW, OLD)):
        registry = Registry(0.0)
        for session in order:
            registry.joined(session)
        assert registry.sessions["a"] == NEW


def test_the_end_of_an_older_stream_changes_nothing() -> None:
    registry = Registry(0.0)
    registry.joined(NEW)
    assert not registry.left("a", 10, "Replaced", 5.0)
    assert "a" in registry.sessions
    assert registry.left("a", 20, "Closed", 6.0)
    assert registry.departures["a"] == Departure(6.0, "Closed")


def test_a_stream_that_looks_older_by_its_gateways_clock_is_not_forgotten() -> None:
    """The agent went from g2, whose clock is ahead, to g1."""
    registry = Registry(0.0)
    registry.joined(NEW)
    assert not registry.joined(OLD)
    assert registry.left("a", 20, "Closed", 6.0)
    assert registry.sessions["a"] == replace(OLD, since=6.0)
    assert registry.departures == {}
    assert registry.left("a", 10, "Closed", 7.0)
    assert registry.roster([], {}).away == {"a": 7.0}


def test_streams_of_a_gateway_that_ended_unseen_do_not_come_back() -> None:
    for end in (
        lambda registry: registry.left("a", 10, "Closed", 5.0),
        lambda registry: registry.gateway_lost("g1", 5.0),
    ):
        registry = Registry(0.0)
        registry.joined(OLD)
        registry.joined(NEW)
        assert [s.session for s in registry.at("g1")] == [10]
        end(registry)
        assert registry.at("g1") == []
        assert registry.left("a", 20, "Closed", 6.0)
        assert "a" not in registry.sessions


def test_a_lost_gateway_takes_only_its_own_along() -> None:
    registry = Registry(0.0)
    registry.joined(OLD)
    registry.joined(replace(NEW, node="b"))
    assert registry.gateway_lost("g1", 9.0) == ["a"]
    assert set(registry.sessions) == {"b"}
    assert registry.roster([], {}).away == {"a": 9.0}


def test_reports_of_older_streams_are_not_complete() -> None:
    registry = Registry(0.0)
    registry.joined(NEW)
    assert not registry.complete_report("a", 10, 5.0)
    assert registry.roster([], {}).agents["a"].reported is None
    assert registry.complete_report("a", 20, 5.0)
    assert registry.roster([], {}).agents["a"].reported == 5.0


def test_a_new_leader_takes_over_since_when_agents_are_away() -> None:
    registry = Registry(1000.0)
    since = agent_status(None, Departure(500.0, "PeerGone"), {}, 1, 500.0)
    registry.remember("gone", since)
    registry.remember("was-there", agent_status(OLD, None, {}, 1, 500.0))
    assert registry.roster([], {}).away == {"gone": 500.0, "was-there": 1000.0}


def test_nothing_is_written_without_a_change() -> None:
    first = agent_status(OLD, None, {}, 1, 100.0)
    assert first["conditions"][0]["status"] == "True"
    assert agent_status(OLD, None, first, 1, 999.0) == first
    gone = agent_status(None, Departure(200.0, "PeerGone"), first, 1, 201.0)
    assert gone["conditions"][0]["reason"] == "PeerGone"
    assert gone["server"] == "server-1", "where it last was"
    assert agent_status(None, Departure(200.0, "PeerGone"), gone, 1, 999.0) == gone
    assert first["conditions"][0]["status"] == "True", "the old status is not changed"

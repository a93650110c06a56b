"""What every agent is to run, against the plainest way to find it out."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st
from outrider_operator.core.config_count import Counts, count, count_settled
from outrider_operator.core.config_plan import (
    Config,
    Desired,
    Merger,
    NodeState,
    PluginView,
    Report,
    Revision,
    conflicts,
    picture,
    stand,
    views,
)
from outrider_operator.core.config_rollout import (
    IN_TRIAL,
    NodeView,
    Plan,
    Rollout,
    RolloutPhase,
    Standing,
    place_of,
    step,
)
from outrider_operator.core.model import LabelSelector
from outrider_operator.core.targeting import matches
from outrider_proto.effective import pack
from outrider_proto.merging import merge, read

ALL = LabelSelector()
ZONE_A = LabelSelector(match_labels={"zone": "a"})
SOURCE = {"urls": ["https://example.org/x"], "sha256": "0" * 64}


def revision(
    config: str, number: int, selector: LabelSelector = ALL, priority: int = 100
) -> Revision:
    spec = {"priority": priority, "collectors": {"host": {"intervalSeconds": number + 1}}}
    return Revision(str(number), read(config, spec), selector)


def made(name: str, rollout: Rollout, target: str, *revisions: Revision) -> Config:
    return Config(name, f"uid-{name}", Plan(), target, "", rollout, {r.name: r for r in revisions})


places = st.sampled_from(["", "4", "8", "c", "g"])
selectors = st.builds(
    LabelSelector, match_labels=st.dictionaries(st.just("zone"), st.sampled_from("ab"), max_size=1)
)
rollouts = st.builds(
    Rollout,
    phase=st.sampled_from(RolloutPhase),
    settled=st.sampled_from(["", "0", "1"]),
    trial=st.just("2"),
    through=places,
    started=st.just(100.0),
)


@st.composite
def configs(draw: st.DrawFn, name: str) -> Config:
    own = [revision(name, n, draw(selectors), draw(st.integers(0, 1))) for n in range(3)]
    return made(name, draw(rollouts), draw(st.sampled_from("012")), *own)


nodes = st.dictionaries(
    st.from_regex(r"n[0-9]", fullmatch=True),
    st.builds(
        NodeState,
        labels=st.dictionaries(st.just("zone"), st.sampled_from("ab"), max_size=1),
        created=st.sampled_from([0.0, 200.0]),
    ),
    max_size=6,
)


@given(st.tuples(configs("a"), configs("b")), nodes)
def test_each_node_is_to_run_what_its_revisions_ask(
    found: tuple[Config, Config], fleet: dict[str, NodeState]
) -> None:
    now = picture({config.name: config for config in found}, fleet, Merger())
    assert set(now.desired) == set(fleet)
    for name, node in fleet.items():
        chosen = []
        for config in found:
            view = NodeView(name, place_of(config.uid, name), node.created, Standing.ABSENT, 0)
            rollout = config.rollout
            wanted = rollout.trial if rollout.in_trial(view) else rollout.settled
            if wanted and matches(config.revisions[wanted].selector, node.labels):
                chosen.append((config.name, wanted))
        assert now.desired[name].parts == tuple(sorted(chosen))
        by_name = {config.name: config for config in found}
        asked = [by_name[c].revisions[r].asked for c, r in chosen]
        assert now.desired[name].packed == pack(merge(asked).effective)


def test_a_first_revision_is_tried_on_nodes_it_selects() -> None:
    config = made("a", Rollout(), "1", revision("a", 1))
    fleet = {"n": NodeState({}, connected=5.0)}
    now = picture({"a": config}, fleet, Merger())
    assert now.desired["n"].packed.content == b"{}"
    after = step(config.rollout, "1", config.plan, list(views(config, fleet, now)), 10.0)
    assert after.phase is RolloutPhase.CANARY
    assert after.through == place_of("uid-a", "n")


def wanted(**spec: object) -> Desired:
    asked = read("a", spec)
    return Desired(pack(merge([asked]).effective), (("a", "1"),), merge([asked]))


WANTED = wanted(collectors={"host": {"enabled": True}})
HASH = WANTED.packed.hash
NAMES = frozenset({"fim"})


def standing(node: NodeState, desired: Desired = WANTED) -> Standing:
    return stand(node, desired, NAMES, 100.0)[0]


def with_report(**fields: object) -> NodeState:
    return NodeState({}, connected=110.0, report=Report(**fields))  # type: ignore[arg-type]


def test_standing() -> None:
    assert standing(NodeState({})) is Standing.ABSENT
    assert standing(NodeState({}, left=50.0)) is Standing.ABSENT
    assert standing(NodeState({}, left=150.0)) is Standing.LEFT
    assert standing(NodeState({}, connected=110.0)) is Standing.APPLYING
    assert standing(with_report()) is Standing.APPLYING
    assert standing(with_report(hash=HASH, tried=HASH, applied=True)) is Standing.WELL
    assert standing(with_report(hash="x", tried=HASH, refused=True)) is Standing.FAILED
    assert standing(with_report(hash="x", tried="x", applied=True)) is Standing.APPLYING
    # What it refused was another one, and it still runs what it is to have.
    assert standing(with_report(hash=HASH, tried="x", refused=True)) is Standing.WELL


def test_plugins_count_only_where_they_are_asked_for() -> None:
    def node(name: str, *, healthy: bool, failed: bool) -> NodeState:
        plugins = {name: PluginView(healthy, failed, "CrashLoop")}
        return with_report(hash=HASH, tried=HASH, applied=True, plugins=plugins)

    assert standing(node("fim", healthy=True, failed=False)) is Standing.WELL
    assert standing(node("fim", healthy=False, failed=False)) is Standing.UNHEALTHY
    assert standing(node("fim", healthy=False, failed=True)) is Standing.FAILED
    assert standing(node("other", healthy=False, failed=True)) is Standing.WELL


def test_an_agent_without_configuration_need_not_be_told_nothing() -> None:
    nothing = wanted()
    assert standing(with_report(), nothing) is Standing.WELL
    assert standing(with_report(hash="x", tried="x", applied=True), nothing) is Standing.APPLYING


def test_what_is_too_large_fails_its_nodes() -> None:
    env = {f"V{n}": "x" * 32_768 for n in range(70)}
    plugin = {"name": "a", "version": "1", "source": SOURCE, "env": env}
    big = Revision("1", read("a", {"plugins": [plugin]}), ALL)
    config = made("a", Rollout(settled="1"), "1", big)
    fleet = {"n": NodeState({}, connected=5.0)}
    now = picture({"a": config}, fleet, Merger())
    (view,) = views(config, fleet, now)
    assert view.standing is Standing.FAILED
    assert "at most" in view.reason


def test_counts() -> None:
    config = made("a", Rollout(settled="1"), "1", revision("a", 1))
    stood = [Standing.WELL, Standing.WELL, Standing.FAILED, Standing.APPLYING, Standing.ABSENT]
    found = [NodeView(str(n), str(n), 0, standing, 0) for n, standing in enumerate(stood)]
    assert count(config, found) == Counts(5, updated=5, applied=2, failed=1, pending=2, absent=1)
    waiting = made("a", Rollout(RolloutPhase.CANARY, "0", "1", "", "1", started=1), "1")
    assert count(waiting, found) == Counts(5, updated=2, applied=2, failed=0, pending=3, absent=1)


def test_conflicts_are_told_to_all_that_take_part() -> None:
    one = made("a", Rollout(settled="1"), "1", revision("a", 1))
    other = made("b", Rollout(settled="2"), "2", revision("b", 2))
    now = picture({"a": one, "b": other}, {"n": NodeState({})}, Merger())
    found = conflicts(now)
    assert set(found) == {"a", "b"}
    (conflict,) = found["b"].values()
    assert (conflict.heard, conflict.unheard) == ("a", ("b",))


@given(st.tuples(configs("a"), configs("b")), nodes, st.data())
def test_counting_all_at_once_is_counting_each(
    found: tuple[Config, Config], fleet: dict[str, NodeState], data: st.DataObject
) -> None:
    every = {config.name: config for config in found}
    now = picture(every, fleet, Merger())
    whole = {
        name: replace(
            node,
            connected=data.draw(st.sampled_from([None, 5.0])),
            report=data.draw(reports(now.desired[name])),
        )
        for name, node in fleet.items()
    }
    settled = [c for c in found if c.rollout.phase not in IN_TRIAL]
    counts = count_settled(settled, whole, now)
    assert counts == {c.name: count(c, views(c, whole, now)) for c in settled}


@st.composite
def reports(draw: st.DrawFn, wanted: Desired) -> Report | None:
    plugin = PluginView(draw(st.booleans()), draw(st.booleans()))
    applied = draw(st.booleans())
    own = draw(st.sampled_from(["", wanted.packed.hash, "x"]))
    some = Report(own, own, applied, not applied, plugins={"p": plugin})
    return draw(st.sampled_from([None, some]))


def test_what_was_refused_before_it_was_asked_again_does_not_count() -> None:
    asked = wanted()
    report = Report(hash="old", tried=asked.packed.hash, refused=True, at=10.0)
    before = NodeState({}, connected=1.0, told=5.0, report=report)
    assert stand(before, asked, frozenset(), 0.0)[0] is Standing.FAILED
    again = replace(before, told=20.0)
    assert stand(again, asked, frozenset(), 0.0) == (Standing.APPLYING, 20.0, "")


def test_what_is_lost_leaves_its_nodes_alone_and_says_so() -> None:
    gone = Revision("1", read("a", {}), ALL, lost="revision 1 of a is gone")
    config = made("a", Rollout(settled="1"), "1", gone)
    fleet = {"n": NodeState({}, connected=5.0)}
    now = picture({"a": config}, fleet, Merger())
    assert now.desired["n"].problem == "revision 1 of a is gone"
    (view,) = views(config, fleet, now)
    assert (view.standing, view.reason) == (Standing.FAILED, "revision 1 of a is gone")


def test_sorting_the_nodes_again_sees_what_has_changed() -> None:
    merger = Merger()
    config = made("a", Rollout(settled="1"), "1", revision("a", 1, ZONE_A))
    fleet = {"n": NodeState({"zone": "a"})}
    assert picture({"a": config}, fleet, merger).selected == {"a": ["n"]}
    assert picture({"a": config}, {"n": NodeState({})}, merger).selected == {"a": []}
    everybody = made("a", Rollout(settled="2"), "2", revision("a", 2))
    assert picture({"a": everybody}, {"n": NodeState({})}, merger).selected == {"a": ["n"]}

"""Which topics a batch goes to: no record misses a topic its type has, and none goes nowhere."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from outrider_operator.core.routing import Routes
from outrider_proto import limits
from outrider_proto.records import TASK_OUTPUT

DEFAULT = "records"
TYPES = st.sampled_from([1000, 1001, 1010, TASK_OUTPUT, 20000, 20001])
TOPICS = st.sampled_from([DEFAULT, "a", "b", "c"])
RULES = st.lists(st.tuples(st.lists(TYPES, min_size=1, max_size=4), TOPICS), max_size=6)


def test_without_rules_everything_goes_to_one_topic() -> None:
    routes = Routes([], DEFAULT)
    assert routes.of([1000, TASK_OUTPUT]) == routes.of([0]) == routes.of([]) == (DEFAULT,)
    assert (routes.topics, routes.separate) == ((DEFAULT,), ())


def test_output_of_tasks_is_in_the_default_topic_too() -> None:
    routes = Routes([([TASK_OUTPUT, 1010], "a")], DEFAULT)
    assert routes.of([TASK_OUTPUT]) == routes.of_type(TASK_OUTPUT) == (DEFAULT, "a")
    assert routes.of([1010]) == ("a",)
    assert routes.separate == ((1010,), (TASK_OUTPUT,))


@pytest.mark.parametrize("types", [[], [0], [0, 1010]])
def test_types_that_are_not_named_may_be_any(types: list[int]) -> None:
    routes = Routes([([1010], "a"), ([20000], "b")], DEFAULT)
    assert routes.of(types) == (DEFAULT, "a", "b")


@given(RULES, st.lists(TYPES, min_size=1, max_size=4))
def test_a_batch_goes_to_every_topic_of_each_of_its_types_and_no_other(rules, types) -> None:
    routes = Routes(rules, DEFAULT)
    wanted = set()
    for data_type in types:
        named = {topic for listed, topic in rules if data_type in listed} or {DEFAULT}
        if data_type == TASK_OUTPUT:
            named.add(DEFAULT)
        assert set(routes.of_type(data_type)) == named
        wanted |= named
    found = routes.of(types)
    assert set(found) == wanted
    assert len(found) == len(set(found))
    assert set(found) <= set(routes.topics)
    assert routes.of([0, *types]) == routes.topics


@given(RULES)
def test_types_in_a_group_have_the_same_topics_and_are_in_no_other(rules) -> None:
    routes = Routes(rules, DEFAULT)
    grouped = [data_type for group in routes.separate for data_type in group]
    assert len(grouped) == len(set(grouped))
    for group in routes.separate:
        assert len({frozenset(routes.of_type(data_type)) for data_type in group}) == 1
    # A batch of one group goes nowhere but where each of its records belongs.
    for data_type in {1000, 1001, 1010, TASK_OUTPUT, 20000, 20001} - set(grouped):
        assert routes.of_type(data_type) == (DEFAULT,)


def test_groups_stay_within_what_agents_take() -> None:
    many = [([start + n for n in range(64)], f"t{start % 7}") for start in range(1, 5000, 64)]
    routes = Routes(many, DEFAULT)
    assert len(routes.separate) == limits.DATA_TYPE_GROUPS
    assert all(len(group) <= limits.BATCH_DATA_TYPES for group in routes.separate)

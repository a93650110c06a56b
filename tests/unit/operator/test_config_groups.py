"""Which AgentConfigs are for which nodes."""

from hypothesis import given
from hypothesis import strategies as st
from outrider_operator.core.config_groups import group
from outrider_operator.core.model import LabelSelector, Requirement
from outrider_operator.core.targeting import matches

keys = st.sampled_from("abc")
values = st.sampled_from("xyz")
labels = st.dictionaries(keys, values, max_size=3)
requirements = st.builds(
    Requirement,
    key=keys,
    operator=st.sampled_from(["In", "NotIn", "Exists", "DoesNotExist"]),
    values=st.lists(values, max_size=2),
)
selectors = st.builds(
    LabelSelector,
    match_labels=st.dictionaries(keys, values, max_size=2),
    match_expressions=st.lists(requirements, max_size=2),
)


@given(
    st.dictionaries(st.from_regex(r"n[0-9]", fullmatch=True), labels, max_size=8),
    st.dictionaries(st.from_regex(r"c[0-9]", fullmatch=True), selectors, max_size=6),
)
def test_each_node_stands_with_the_configs_that_select_it(
    nodes: dict[str, dict[str, str]], configs: dict[str, LabelSelector]
) -> None:
    found = group(nodes, configs)
    expected: dict[tuple[str, ...], list[str]] = {}
    for name in sorted(nodes):
        own = tuple(c for c in sorted(configs) if matches(configs[c], nodes[name]))
        expected.setdefault(own, []).append(name)
    assert found == expected

"""Layouts from numbers alone."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_train.errors import ConfigError
from moe_train.parallel.layout_plan import LayoutPlan, plan_layout


@given(
    nodes=st.integers(1, 6),
    per_node=st.sampled_from([1, 2, 3, 4, 8]),
    data=st.data(),
    experts_each=st.integers(1, 5),
    two_level=st.booleans(),
)
def test_every_group_holds_every_expert_once(
    nodes: int, per_node: int, data: st.DataObject, experts_each: int, two_level: bool
) -> None:
    world = nodes * per_node
    sizes = [n for n in range(1, world + 1) if world % n == 0 and (per_node % n == 0 or n % per_node == 0)]
    size = data.draw(st.sampled_from(sizes))
    experts = size * experts_each
    plan = plan_layout(world, per_node, size, experts, two_level)
    for rank in range(world):
        group, replicas = plan.group(rank), plan.replicas_of(rank)
        assert rank in group and rank in replicas and set(group) & set(replicas) == {rank}
        assert [e for r in group for e in plan.experts(r, experts)] == list(range(experts))
        assert all(plan.experts(r, experts) == plan.experts(rank, experts) for r in replicas)
        assert len(replicas) == plan.replicas
        if size <= per_node:
            assert {plan.node(r) for r in group} == {plan.node(rank)}
        if plan.dispatches_by_node:
            across, local = plan.across_peers(rank), plan.node_peers(rank)
            assert len(across) == plan.nodes_per_group and len({plan.node(r) for r in across}) == len(across)
            assert len(local) == per_node and set(across) & set(local) == {rank}
            # Experts of a node are contiguous, in the order of its ranks: what the two-step exchange counts on.
            held = [e for r in local for e in plan.experts(r, experts)]
            assert held == list(range(held[0], held[-1] + 1))


KEY = "layout.expert_parallel"
REFUSED = [
    ((4, 4, 8, 16), f"{KEY}=8 is above the 4 ranks. Set {KEY} to 1, 2 or 4"),
    ((6, 6, 4, 16), f"{KEY}=4 does not divide 6 ranks. Set {KEY} to 1 or 2"),
    ((4, 4, 4, 6), f"6 experts cannot be divided over {KEY}=4 ranks. Set {KEY} to 1 or 2"),
    ((4, 4, 4, [16, 6]), f"6 experts cannot be divided over {KEY}=4 ranks. Set {KEY} to 1 or 2"),
    ((12, 6, 4, 12), f"neither divides a node's 6 ranks nor fills whole nodes. Set {KEY} to 1, 2, 3, 6 or 12"),
    ((6, 4, 2, 4), "6 ranks are not whole nodes of 4"),
    ((0, 1, 1, 4), "must be 1 or more"),
]


@pytest.mark.parametrize(("numbers", "complaint"), REFUSED, ids=str)
def test_invalid_layout_names_valid_sizes(numbers: tuple, complaint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        plan_layout(*numbers)
    assert complaint in str(caught.value)


def test_describe() -> None:
    assert plan_layout(4, 2, 2, 8).describe(8).splitlines() == [
        "4 ranks = 2 replicas x 2 expert-parallel (8 experts, 4 a rank)",
        "node 0",
        "  rank 0  group 0  experts 0-3",
        "  rank 1  group 0  experts 4-7",
        "node 1",
        "  rank 2  group 1  experts 0-3",
        "  rank 3  group 1  experts 4-7",
    ]
    assert plan_layout(2, 2, 2, 8).describe(8).startswith("2 ranks = 1 replica x 2 expert-parallel")


def test_a_layout_that_tears_groups_warns() -> None:
    assert plan_layout(4, 4, 4, 16).split_groups(16, 4) is None
    assert plan_layout(4, 4, 4, 16).split_groups(16, 8) is None
    warning = plan_layout(4, 4, 4, 16).split_groups(16, 2)
    assert warning is not None and warning.endswith("layout.expert_parallel up to 2")
    # With two-level dispatch, groups as large as a node are not split.
    assert plan_layout(4, 2, 4, 16, two_level=True).split_groups(16, 2) is None
    assert plan_layout(4, 2, 4, 16).split_groups(16, 2) is not None


def test_links() -> None:
    plan = LayoutPlan(4, 4, 2)
    assert [plan.link(1, other) for other in range(4)] == ["node", "local", "across", "across"]

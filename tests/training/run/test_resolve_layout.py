"""From config to layout: what is chosen, refused, warned of and kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moe_train.config import LayoutConfig, RunConfig, build
from moe_train.errors import ConfigError
from moe_train.parallel.dispatch_options import DispatchOptions
from moe_train.parallel.traffic import TrafficCounters
from moe_train.training.run.recorded_config import recorded_config, to_record
from moe_train.training.run.resolve_layout import dispatch_options, layout_warnings, pictures, plan_run, resolve_config
from moe_train.training.run.run_folder import differing_keys


def config(routing: dict[str, Any] | None = None, model: dict[str, Any] | None = None, **layout: Any) -> RunConfig:
    """Two sparse layers, one in the encoder and one in the decoder, unless said otherwise."""
    given = {"name": "switch", "num_experts": 8, **(routing or {})}
    size = {"encoder_layers": 2, "decoder_layers": 2, "sparse_layers": "odd", **(model or {})}
    return build(RunConfig, {"data": "d", "routing": given, "model": size, "layout": layout})


@pytest.mark.parametrize(
    ("layout", "world", "per_node", "experts", "want"),
    [
        ({}, 4, 4, 8, (1, 4)),
        ({"expert_parallel": 2}, 4, 4, 8, (2, 4)),
        ({"name": "expert_parallel", "expert_parallel": 0}, 4, 4, 8, (4, 4)),
        ({"name": "expert_parallel", "expert_parallel": 0}, 4, 4, 6, (2, 4)),
        ({"name": "expert_parallel", "expert_parallel": 0}, 6, 6, 8, (2, 6)),
        ({"name": "node", "expert_parallel": 0}, 8, 4, 16, (4, 4)),
        ({"name": "node", "expert_parallel": 0, "ranks_per_node": 2}, 8, 8, 16, (2, 2)),
        ({"name": "node", "expert_parallel": 2}, 8, 4, 16, (2, 4)),
        ({"name": "two_level", "expert_parallel": 0, "two_level": True}, 8, 4, 16, (8, 4)),
    ],
)
def test_the_layout_that_a_config_means(
    layout: dict[str, Any], world: int, per_node: int, experts: int, want: tuple[int, int]
) -> None:
    plan = plan_run(config({"num_experts": experts}, **layout), world, per_node)
    assert (plan.expert_parallel, plan.ranks_per_node) == want
    assert plan.world == world and plan.dispatches_by_node == bool(layout.get("two_level"))


@pytest.mark.parametrize(
    ("layout", "routing", "said"),
    [
        ({"expert_parallel": 8}, {}, ["above the 4 ranks", "to 1, 2 or 4, or start 8 processes (launch.processes=8"]),
        ({"expert_parallel": 6}, {}, ["above the 4 ranks. Set layout.expert_parallel to 1, 2 or 4."]),
        ({"expert_parallel": 3}, {}, ["does not divide 4 ranks", "1, 2 or 4"]),
        ({"expert_parallel": 4}, {"num_experts": 6}, ["6 experts cannot be divided", "1 or 2"]),
        ({"expert_parallel": 4, "ranks_per_node": 3}, {}, ["4 ranks are not whole nodes of 3"]),
        ({"name": "node", "expert_parallel": 4, "ranks_per_node": 2}, {}, ["inside a node of 2 ranks", "to 2 or less"]),
        (
            {"expert_parallel": 4},
            {"num_experts": 4, "decoder": {"name": "top_k", "num_experts": 2}},
            ["2 experts cannot be divided", "1 or 2"],
        ),
    ],
)
def test_what_cannot_be_is_refused_with_what_would_work(
    layout: dict[str, Any], routing: dict[str, Any], said: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        plan_run(config(routing, **layout), 4, 4)
    assert all(text in str(caught.value) for text in said), str(caught.value)


def test_negative_sizes_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"layout.expert_parallel' must not be negative"):
        LayoutConfig(expert_parallel=-1)


def test_how_exchanges_go_is_the_layouts_to_say() -> None:
    asked = config(expert_parallel=2, overlap=True, fixed_rows=64)
    assert dispatch_options(asked) == DispatchOptions(overlap=True, fixed_rows=64)
    with pytest.raises(
        ConfigError, match=r"layout.fixed_rows.*one dispatch level.*Set layout.fixed_rows=0 or layout.two_level=false"
    ):
        LayoutConfig("two_level", 4, 2, True, fixed_rows=64)


def test_groups_by_place_become_a_number_once() -> None:
    asked = config({"name": "sam", "top_k": 1, "num_groups": "rank"}, expert_parallel=4)
    first = resolve_config(asked, plan_run(asked, 4, 4), None)
    assert first.routing["num_groups"] == 4 and first.layout.name == "expert_parallel"
    assert (first.layout.expert_parallel, first.layout.ranks_per_node) == (4, 4)
    later = config({"name": "sam", "top_k": 1, "num_groups": "rank"}, expert_parallel=2)
    again = resolve_config(later, plan_run(later, 4, 2), first)
    assert again.routing["num_groups"] == 4 and again.layout.expert_parallel == 2
    assert not differing_keys({"routing": dict(first.routing)}, {"routing": dict(again.routing)})


def test_groups_by_node_and_of_the_decoder() -> None:
    decoder = {"name": "sam", "num_experts": 8, "top_k": 1, "num_groups": "rank"}
    asked = config(
        {"name": "sam", "num_groups": "node", "decoder": decoder},
        name="two_level", expert_parallel=4, ranks_per_node=2, two_level=True,
    )  # fmt: skip
    first = resolve_config(asked, plan_run(asked, 4, 4), None)
    assert first.routing["num_groups"] == 2 and first.routing["decoder"]["num_groups"] == 4
    single = config({"name": "sam", "num_groups": "node", "decoder": decoder})
    again = resolve_config(single, plan_run(single, 1, 1), first)
    assert again.routing == first.routing


def test_a_number_that_the_user_changes_is_not_hidden() -> None:
    first = config({"name": "sam", "num_groups": 4})
    other = config({"name": "sam", "num_groups": 2})
    assert resolve_config(other, plan_run(other, 1, 1), first).routing["num_groups"] == 2


@pytest.mark.parametrize(
    ("routing", "layout", "said"),
    [
        ({"name": "sam", "num_groups": 2}, {"expert_parallel": 4}, "groups are not split with"),
        ({"name": "sam", "num_groups": 4}, {"expert_parallel": 4}, None),
        ({"name": "sam", "num_groups": 2}, {"expert_parallel": 1}, None),
        (
            {"name": "sam", "num_groups": 2},
            {"name": "two_level", "expert_parallel": 4, "ranks_per_node": 2, "two_level": True},
            None,
        ),
        ({"name": "thor"}, {"expert_parallel": 2}, "routing.draw=sentence or token"),
        ({"name": "thor", "draw": "token"}, {"expert_parallel": 2}, None),
        ({"name": "thor"}, {}, None),
        ({"name": "dense"}, {"expert_parallel": 2}, "has no experts"),
        ({"name": "switch"}, {"expert_parallel": 2}, None),
    ],
)
def test_what_works_but_perhaps_not_as_meant(routing: dict[str, Any], layout: dict[str, Any], said: str | None) -> None:
    asked = config(routing, **layout)
    found = layout_warnings(asked, plan_run(asked, 4, 4))
    assert len(found) == (said is not None) and (said is None or said in found[0])


def test_one_picture_for_each_number_of_experts() -> None:
    asked = config({"num_experts": 4, "decoder": {"name": "top_k", "num_experts": 8}}, expert_parallel=2)
    drawn = pictures(asked, plan_run(asked, 4, 2))
    assert ["4 experts, 2 a rank" in drawn[0], "8 experts, 4 a rank" in drawn[1], len(drawn)] == [True, True, 2]
    assert not pictures(config(), plan_run(config(), 4, 4))
    wide = config({"num_experts": 64}, expert_parallel=64)
    assert pictures(wide, plan_run(wide, 64, 8))[0].endswith("and 33 lines more")


def test_counters_travel_as_numbers() -> None:
    one = TrafficCounters()
    one.add(("local", "node", "across"), dispatched_rows=(1, 2, 3), metadata_bytes=(4, 5, 6))
    one.add_dropped(torch.tensor(7))
    numbers = one.numbers()
    assert len(numbers) == 13 and TrafficCounters.of_numbers(numbers).dropped == 7
    assert TrafficCounters.of_numbers([float(n) for n in numbers]).as_dict() == one.as_dict()
    both = one + TrafficCounters.of_numbers(one.take(torch.device("cpu")).tolist())
    assert both.as_dict()["across"] == {
        "dispatched_rows": 3,
        "returned_rows": 0,
        "payload_bytes": 0,
        "metadata_bytes": 6,
    }
    assert both.counted and not one.counted and (both.dropped, one.dropped) == (7, 0)


def test_a_run_of_an_earlier_version_keeps_what_its_slots_did() -> None:
    """Earlier versions let weight decay take Soft MoE's slots, and recorded no ``decayed``."""
    keys = {"name": "soft_moe", "decoder": "top_k"}
    now = config({**keys, "decayed": None})
    recorded = to_record(config(keys))
    assert recorded["routing"]["decayed"] is None, "recorded, so that it is not taken for an earlier version's"
    plan = plan_run(now, 1, 1)
    assert resolve_config(now, plan, recorded_config(recorded)).routing["decayed"] is None
    del recorded["routing"]["decayed"]
    for later in (now, config(keys)):  # with or without the key on the way to it
        assert resolve_config(later, plan, recorded_config(recorded)).routing["decayed"] == "slots"
    assert (
        resolve_config(config({**keys, "decayed": "scale"}), plan, recorded_config(recorded)).routing["decayed"]
        == "scale"
    )

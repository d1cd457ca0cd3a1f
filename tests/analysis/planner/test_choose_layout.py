"""Plans: what is tried, what is chosen, and that the estimates move the way they must."""

from __future__ import annotations

import runpy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from moe_train.analysis.planner.choose_layout import Candidate, compare_layouts
from moe_train.analysis.planner.cost_shape import decoder_only, model_shape
from moe_train.analysis.planner.plan_tables import as_mapping
from moe_train.config import ModelConfig, build
from moe_train.config.planner import ClusterConfig, PlanConfig
from moe_train.errors import ConfigError
from moe_train.models import build_model
from moe_train.models.accounting import account
from moe_train.routing import routing_config
from tests.models.helpers import Words

ROOT = Path(__file__).resolve().parents[3]
BASE = {"embed_dim": 64, "ffn_dim": 128, "num_heads": 4, "encoder_layers": 4, "decoder_layers": 4}


def cluster(name: str = "dgx_a100") -> ClusterConfig:
    return build(ClusterConfig, yaml.safe_load((ROOT / "configs" / "cluster" / f"{name}.yaml").read_text()))


def config(world: int = 16, experts: int = 16, name: str = "top_k", on: str = "dgx_a100", **changes: Any) -> PlanConfig:
    keys = {"name": name, "num_experts": experts, **changes.pop("routing", {})}
    groups = {"layout": {"world": world, **changes.pop("layout", {})}, "routing": keys, "model": BASE, **changes}
    return build(PlanConfig, {"cluster": vars(cluster(on)), "vocabulary": 1000, **groups})


def layouts(candidates: tuple[Candidate, ...]) -> set[tuple[int, bool]]:
    return {(c.layout.expert_parallel, c.layout.dispatches_by_node) for c in candidates}


def only(**changes: Any) -> Candidate:
    """One layout, the one that is named."""
    plan = compare_layouts(config(**changes))
    (same,) = [c for c in plan.candidates if c.same_model]
    return same


def test_it_tries_every_layout_that_can_be() -> None:
    plan = compare_layouts(config())
    assert layouts(plan.candidates) == {(1, False), (2, False), (4, False), (8, False), (16, False), (16, True)}
    assert plan.chosen is plan.candidates[0]
    assert compare_layouts(config(layout={"ranks_per_node": 2})).chosen.layout.ranks_per_node == 2


def test_sam_is_tried_with_groups_as_ranks_and_as_nodes() -> None:
    plan = compare_layouts(config(name="sam", routing={"num_groups": 4, "top_k": 1}))
    of_whole_world = {(c.groups, c.same_model) for c in plan.candidates if c.layout.expert_parallel == 16}
    assert of_whole_world == {(4, True), (16, False), (2, False)}
    assert plan.chosen.same_model
    by_rank = compare_layouts(
        config(name="sam", routing={"num_groups": "rank", "top_k": 1}, layout={"expert_parallel": 8})
    )
    assert by_rank.chosen.groups == 8 and by_rank.chosen.same_model


def test_sam_saves_what_flat_choices_cost() -> None:
    layout = {"expert_parallel": 16, "two_level": False}
    sent = {}
    for k in (1, 2, 4):
        sam = only(name="sam", experts=64, routing={"num_groups": 16, "top_k": k}, layout=layout)
        flat = only(experts=64, routing={"top_k": k, "normalise": "none"}, layout=layout)
        sent[k] = (sam.traffic.sent.dispatched_rows, flat.traffic.sent.dispatched_rows)
        assert flat.traffic.sent.metadata_bytes == pytest.approx(sam.traffic.sent.metadata_bytes)
    assert sent[1][0] == pytest.approx(sent[2][0]) == pytest.approx(sent[4][0]) == pytest.approx(sent[1][1])
    assert sent[1][1] < sent[2][1] < sent[4][1] <= 4 * sent[1][1]


@pytest.mark.parametrize("name", ["dense", "switch", "top_k", "smoe", "thor", "sam", "expert_choice", "hash"])
def test_parameters_are_those_of_the_accounting(name: str) -> None:
    model = ModelConfig(**BASE, decoder_sparse_layers="none" if name == "expert_choice" else None)
    shape = model_shape(model, {"name": name, "num_experts": 8}, 1000)
    with torch.device("meta"):
        found = account(
            build_model(model, routing_config({"name": name, "num_experts": 8}), Words(1000), Words(1000), seed=1)
        )
    assert shape.dense_parameters + shape.expert_parameters == found.parameters_total
    assert shape.expert_parameters == found.parameters_experts
    assert shape.active_parameters == found.parameters_active
    flops = shape.output_flops + sum(stack.flops for stack in shape.stacks)
    for block in shape.sparse:
        flops += block.pairs * block.spec.flops_per_row
        flops += block.router.router_flops_per_token(block.routing, block.spec.dim)
    assert flops == pytest.approx(found.flops_per_token)


def test_the_language_model_of_fairseqs_logs() -> None:
    """Its README names 908,423,168 parameters that are not experts' and 402,776,064 of experts per GPU."""
    shape = decoder_only(
        ModelConfig(embed_dim=2048, ffn_dim=8192, num_heads=32, decoder_layers=24),
        {"name": "top_k", "num_experts": 8},
        50000,
    )
    assert shape.dense_parameters == 908_423_168
    assert shape.expert_parameters == 8 * 402_776_064


def test_states_are_divided_as_zero_says() -> None:
    layout = {"expert_parallel": 8}
    plain = only(layout=layout).memory
    states = {
        stage: only(layout=layout, engine={"name": "deepspeed", "zero_stage": stage}).memory for stage in (0, 1, 2)
    }
    shape = only(layout=layout).shape
    dense, held = shape.dense_parameters, shape.expert_parameters / 8
    assert plain.parameters == plain.gradients == 4 * (dense + held) and plain.optimizer == 8 * (dense + held)
    assert states[0].parameters == states[0].gradients == 4 * (dense + held)
    assert states[1].optimizer == pytest.approx(12 * (dense / 16 + held / 2))
    assert states[2].gradients == pytest.approx(4 * (dense / 16 + held / 2))
    assert states[1].gradients == states[0].gradients
    assert only(layout=layout, engine={"zero_stage": 1}).memory.optimizer == pytest.approx(8 * (dense / 16 + held / 2))
    assert (
        only(layout=layout, engine={"name": "deepspeed", "zero_stage": 1, "offload_optimizer": True}).memory.optimizer
        == 0
    )


def test_recomputation_trades_time_and_bytes_for_memory() -> None:
    layout = {"expert_parallel": 16, "two_level": False}
    kept, again = only(layout=layout), only(layout=layout, training={"recompute": True})
    assert again.memory.activations < 0.5 * kept.memory.activations
    assert again.time.dense > kept.time.dense
    assert again.traffic.sent.payload_bytes == pytest.approx(1.5 * kept.traffic.sent.payload_bytes)


def test_micro_batches_multiply_traffic_and_not_activations() -> None:
    layout = {"expert_parallel": 16, "two_level": False}
    one = only(layout=layout, training={"tokens_per_update": 16 * 512})
    two = only(layout=layout, training={"tokens_per_update": 16 * 1024, "accumulation": 2})
    assert two.traffic.sent.payload_bytes == pytest.approx(2 * one.traffic.sent.payload_bytes)
    assert two.traffic.sent.gradient_bytes == one.traffic.sent.gradient_bytes
    assert two.memory.activations == one.memory.activations


def test_a_slow_link_between_nodes_keeps_experts_inside_them() -> None:
    fast, slow = (compare_layouts(config(on="dgx_a100")), compare_layouts(config(on="ethernet")))
    for plan in (fast, slow):
        across = [c.time.exchange_across for c in plan.candidates if c.layout.expert_parallel == 16]
        assert min(across) > 0
    assert slow.chosen.layout.nodes_per_group == 1
    assert any("next best" in reason for reason in slow.reasons)


def test_a_plan_says_what_a_strategy_says_of_the_layout() -> None:
    """Of the chosen layout where it divides experts, and nothing of one that does not."""
    torn = {"name": "sam", "routing": {"num_groups": 2, "top_k": 1}}
    for keys, words in ((torn, "the 2 groups of 8 experts are split"), ({"name": "thor"}, "routing.draw=batch")):
        for expert_parallel in (1, 16):
            reasons = compare_layouts(
                config(layout={"expert_parallel": expert_parallel, "two_level": False}, **keys)
            ).reasons
            assert any(words in reason for reason in reasons) == (expert_parallel > 1)
    whole = {**torn, "routing": {"num_groups": 16, "top_k": 1}}
    reasons = compare_layouts(config(layout={"expert_parallel": 16, "two_level": False}, **whole)).reasons
    assert not any("split" in reason for reason in reasons)


def test_memory_forces_experts_apart() -> None:
    free = config(world=8, experts=64)
    plan = compare_layouts(free)
    smallest = min(plan.candidates, key=lambda c: c.memory.total)
    assert smallest.layout.expert_parallel == 8
    tight = replace(free, cluster=replace(free.cluster, memory_gb=smallest.memory.total * 1.01 / 1e9))
    assert compare_layouts(tight).chosen.layout.expert_parallel == 8
    none = compare_layouts(replace(free, cluster=replace(free.cluster, memory_gb=0.001)))
    assert not none.chosen.fits and "no layout fits" in none.reasons[0]


def test_thor_that_draws_by_batch_waits_for_one_rank() -> None:
    layout = {"expert_parallel": 16, "two_level": False}
    batch, token = (only(name="thor", routing={"draw": draw}, layout=layout) for draw in ("batch", "token"))
    assert batch.traffic.by_link == token.traffic.by_link
    assert batch.time.experts > 4 * token.time.experts and batch.time.exchange > token.time.exchange


def test_4096_ranks_are_planned_without_any() -> None:
    plan = compare_layouts(config(world=4096, experts=4096, name="switch"))
    assert {c.layout.expert_parallel for c in plan.candidates} == {2**n for n in range(13)}
    assert plan.candidates[-1].time.total > plan.chosen.time.total
    content = as_mapping(plan)
    assert content["chosen"]["world"] == 4096 and len(content["layouts"]) == len(plan.candidates)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"layout": {"expert_parallel": 3}}, "does not divide"),
        ({"world": 12, "experts": 12}, "whole nodes"),
        ({"engine": {"zero_stage": 2}}, "DeepSpeed"),
        ({"engine": {"name": "deepspeed", "zero_stage": 3}}, "zero_stage"),
        ({"batch": {"load": [1.0, 2.0]}}, "16 experts"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        compare_layouts(config(**changes))


def test_predictions_beside_published_figures_are_those_of_the_document() -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "predict_scaling.py"))
    table = "\n".join(script["published_table"](script["published_rows"]()))
    assert table in (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")

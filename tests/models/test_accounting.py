"""Parameters and FLOPs in closed form, against the tables of the papers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from moe_train.config import ModelConfig
from moe_train.layers import EncoderLayer, EncoderStack, FeedForward, LayerShape, MoELayer
from moe_train.models import build_model
from moe_train.models.accounting import Accounting, account
from moe_train.routing import routing_config
from tests.models.helpers import Words, sentences, small_model

M = 1e6
BASE = {"embed_dim": 512, "ffn_dim": 2048, "num_heads": 8}
BIG = {"embed_dim": 1024, "ffn_dim": 4096, "num_heads": 16}
THIRTY_TWO_THOUSAND = Words(32000)


def accounted(routing: dict[str, Any], **shape: Any) -> Accounting:
    with torch.device("meta"):
        words = THIRTY_TWO_THOUSAND
        return account(build_model(ModelConfig(**shape), routing_config(routing), words, words, seed=1))


def smoe(*strata: int) -> dict[str, Any]:
    return {"name": "smoe", "num_experts": sum(strata), "strata": list(strata)}


def top_2(experts: int) -> dict[str, Any]:
    return {"name": "top_k", "top_k": 2, "num_experts": experts}


def switch(experts: int) -> dict[str, Any]:
    return {"name": "switch", "num_experts": experts}


# SMoE tables 1 and 2: parameters, and FLOPs per token above the dense row's, both in millions. The FLOPs of strata are
# those of the closed form that the tables round (4-4: 217.2 M and so on), since a rounding to 1 M is more than 1 %.
TABLE_1 = [
    (switch(8), 148, 0.0),
    (top_2(8), 148, 192.03 - 166.87),
    (smoe(4, 4), 148, 217.2 - 166.87),
    (smoe(2, 2, 2, 2), 148, 246.5 - 166.87),
]
TABLE_2 = [
    (switch(16), 963, 0.0),
    (top_2(16), 963, 606 - 505.3),
    (smoe(4, 12), 963, 656.3 - 505.3),
    (smoe(12, 4), 963, 757.0 - 505.3),
    (smoe(8, 8), 963, 706.7 - 505.3),
    (smoe(4, 4, 8), 963, 723.4 - 505.3),
    (smoe(4, 4, 4, 4), 963, 824.1 - 505.3),
    (top_2(32), 1770, 606 - 505.3),
]


@pytest.mark.parametrize(
    ("routing", "parameters", "extra_flops", "shape", "dense_parameters"),
    [(*row, BASE, 60) for row in TABLE_1] + [(*row, BIG, 209) for row in TABLE_2],
)
def test_smoe_tables_1_and_2(
    routing: dict[str, Any], parameters: float, extra_flops: float, shape: dict[str, Any], dense_parameters: float
) -> None:
    dense, sparse = accounted({"name": "dense"}, **shape), accounted(routing, **shape)
    assert dense.parameters_total == pytest.approx(dense_parameters * M, rel=0.01)
    assert sparse.parameters_total == pytest.approx(parameters * M, rel=0.01)
    more = sparse.flops_per_token - dense.flops_per_token
    # Where nothing is added the routers remain, below a tenth of a per cent of the model.
    assert more == pytest.approx(extra_flops * M, rel=0.01, abs=0.001 * dense.flops_per_token * (extra_flops == 0))


def test_dense_flops_are_those_of_the_matrices() -> None:
    dense = accounted({"name": "dense"}, **BASE)
    d, hidden = 512, 2048
    assert dense.flops_encoder == 6 * 2 * (4 * d * d + 2 * d * hidden)
    assert dense.flops_decoder == 6 * 2 * (8 * d * d + 2 * d * hidden)
    assert dense.flops_output == 2 * 32000 * d
    assert dense.parameters_active == dense.parameters_total and dense.parameters_experts == 0


def test_xmoe_adds_453_million() -> None:
    shape = {
        "encoder_layers": 12, "decoder_layers": 1, "embed_dim": 768, "ffn_dim": 3072, "num_heads": 12,
        "sparse_layers": "insert_after:6", "decoder_sparse_layers": "none",
    }  # fmt: skip
    dense = accounted({"name": "dense"}, **shape)
    xmoe = accounted({"name": "xmoe", "num_experts": 32, "expert_sublayers": 3}, **shape)
    assert xmoe.parameters_total - dense.parameters_total == pytest.approx(453 * M, rel=0.01)
    router = 768 * 16 + 32 * 16
    extra = xmoe.flops_per_token - dense.flops_per_token
    assert extra == pytest.approx(3 * 4 * 768 * 3072 + 2 * router, rel=1e-9)


@pytest.mark.parametrize("experts", [2, 4])
def test_thors_formula(experts: int) -> None:
    """(N-1) · layers · (2 d h + h + d) more than dense, 6.30 M per expert in fairseq's iwslt shape, at dense FLOPs."""
    shape = {"embed_dim": 512, "ffn_dim": 1024, "num_heads": 4, "sparse_layers": "even"}
    dense, thor = accounted({"name": "dense"}, **shape), accounted({"name": "thor", "num_experts": experts}, **shape)
    more = thor.parameters_total - dense.parameters_total
    assert more == (experts - 1) * 6 * (2 * 512 * 1024 + 1024 + 512)
    assert more == pytest.approx((experts - 1) * 6.30 * M, rel=0.01)
    assert thor.flops_per_token == dense.flops_per_token
    assert thor.parameters_active == dense.parameters_total


def test_thor_has_nothing_to_route_with() -> None:
    names = [name for name, _ in small_model("thor").named_parameters()]
    assert any("pool" in name for name in names)
    assert not [name for name in names if any(word in name for word in ("gate", "router", "wg"))]


@pytest.mark.parametrize(("size", "parameters"), [("S", 933), ("B", 3700)])
def test_soft_moes_vision_transformers(size: str, parameters: float) -> None:
    """Puigcerver et al., tables 1 and 8: 128 experts in the second half, and JFT's 29,593 classes."""
    dim, heads = {"S": (384, 6), "B": (768, 12)}[size]
    shape = LayerShape(dim, heads)
    routing = {"name": "soft_moe", "num_experts": 128, "num_slots": 128}
    with torch.device("meta"):
        blocks = [FeedForward(dim, 4 * dim) for _ in range(6)]
        blocks += [MoELayer(dim, 4 * dim, routing, layer=i).block for i in range(6)]  # type: ignore[misc]
        stack = EncoderStack(shape, [EncoderLayer(shape, block) for block in blocks])
        patches, head = nn.Linear(16 * 16 * 3, dim), nn.Linear(dim, 29593)
    total = sum(p.numel() for part in (stack, patches, head) for p in part.parameters()) + 196 * dim
    assert total == pytest.approx(parameters * M, rel=0.01)


def test_the_count_is_that_of_a_built_model() -> None:
    model = small_model(top_2(4), sparse_layers="odd")
    counted = account(model)
    assert counted.parameters_total == sum(p.numel() for p in model.parameters())
    one_expert = (2 * 16 * 32 + 16 + 32) * 2  # one sparse layer on each side
    assert counted.parameters_experts == 4 * one_expert
    assert counted.parameters_total - counted.parameters_active == 2 * one_expert
    assert [block.layer for block in counted.blocks] == [0, 1]


@pytest.mark.parametrize("strata", [(4, 4), (2, 6), (2, 2, 4), (2, 2, 2, 2)])
def test_strata_have_the_experts_of_a_vanilla_model(strata: tuple[int, ...]) -> None:
    stratified, vanilla = (account(small_model(routing, sparse_layers="odd")) for routing in (smoe(*strata), top_2(8)))
    assert stratified.parameters_experts == vanilla.parameters_experts > 0


def test_more_experts_of_soft_moe_at_as_many_slots_cost_no_flops() -> None:
    """In closed form, and with the loads of a forward pass; all parameters grow."""
    forms, measured, parameters = set(), set(), []
    for experts in (1, 2, 4, 8, 16):
        routing = {"name": "soft_moe", "num_experts": experts, "num_slots": 16, "decoder": "dense"}
        model = small_model(routing).eval()
        _, extra = model(sentences([9, 7]), None, sentences([8, 8]))
        loads = {r.layer: float(r.statistics.load.sum() / r.statistics.tokens) for r in extra["routing"]}
        forms.add(account(model).flops_per_token)
        measured.add(account(model, loads).flops_per_token)
        assert set(loads.values()) == {2 * 16 / 16}  # 16 slots for each of two sentences of 9 and 7 tokens
        parameters.append(account(model).parameters_total)
    assert len(forms) == len(measured) == 1
    assert parameters == sorted(parameters) and parameters[0] < parameters[-1]


def test_measured_loads_take_the_place_of_the_expectation() -> None:
    model = small_model(smoe(2, 2)).eval()
    _, extra = model(sentences([9, 7]), None, sentences([8, 8]))
    measured = {r.layer: float(r.statistics.load.sum() / r.statistics.tokens) for r in extra["routing"]}
    expected, seen = account(model), account(model, measured)
    assert expected.blocks[0].experts_per_token == 3.0
    spec = 4 * 16 * 32
    difference = sum(measured.values()) - 3.0 * len(measured)
    assert seen.flops_per_token - expected.flops_per_token == pytest.approx(difference * spec)


def test_it_can_be_written_as_json() -> None:
    import json

    values = json.loads(json.dumps(account(small_model("switch")).to_mapping()))
    assert values["flops_per_token"] > 0 and len(values["blocks"]) == 4


def test_other_models_are_refused() -> None:
    with pytest.raises(TypeError, match="Linear"):
        account(nn.Linear(2, 2))

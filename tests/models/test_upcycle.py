"""A dense model's weights as the start of a sparse one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moe_train.errors import CheckpointError
from moe_train.models import TransformerModel
from moe_train.models.upcycle import upcycle
from tests.models.helpers import PAD, routing_keys, sentences, small_model

SUM_TO_ONE: list[dict[str, Any]] = [
    {"name": "thor", "num_experts": 4},
    {"name": "random", "num_experts": 4},
    {"name": "hash", "num_experts": 4},
    {"name": "top_k", "num_experts": 4, "top_k": 2},
]


def logits(model: TransformerModel) -> torch.Tensor:
    target = sentences([5, 8, 3])
    with torch.no_grad():
        return model.eval()(sentences([7, 4, 6]), None, target)[0][target.ne(PAD)]


@pytest.mark.parametrize("routing", SUM_TO_ONE, ids=lambda keys: keys["name"])
@pytest.mark.parametrize("norm_order", ["pre", "post"])
def test_the_function_is_unchanged_where_weights_sum_to_one(routing: dict[str, Any], norm_order: str) -> None:
    dense = small_model("dense", seed=11, norm_order=norm_order)
    sparse = small_model(routing, seed=12, norm_order=norm_order, sparse_layers="odd")
    assert not torch.allclose(logits(sparse), logits(dense), atol=0.1)
    upcycle(dense.state_dict(), sparse)
    torch.testing.assert_close(logits(sparse), logits(dense), atol=1e-5, rtol=1e-5)


def test_every_expert_is_a_copy_of_its_own() -> None:
    dense, sparse = small_model("dense", seed=11), small_model("switch", seed=12)
    upcycle(dense.state_dict(), sparse)
    pool = sparse.encoder.stack.layers[0].feed_forward.block.pool
    weight = pool.sublayers[0].fc1_weight
    expected = dense.encoder.stack.layers[0].feed_forward.block.fc1.weight.t()
    assert all(torch.equal(weight[e], expected) for e in range(4))
    with torch.no_grad():
        weight[0].add_(1.0)
    assert torch.equal(weight[1], expected)
    assert weight.is_leaf and weight.requires_grad


def test_strata_take_over_the_norm() -> None:
    dense, sparse = small_model("dense", seed=11), small_model(routing_keys("smoe"), seed=12)
    with torch.no_grad():
        for name, parameter in dense.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    upcycle(dense.state_dict(), sparse)
    norms = sparse.decoder.stack.layers[1].feed_forward.block.norms
    expected = dense.decoder.stack.layers[1].feed_forward.residual.norm
    assert all(torch.equal(norm.weight, expected.weight) and torch.equal(norm.bias, expected.bias) for norm in norms)


def test_inserted_blocks_stay_fresh_and_the_rest_is_copied() -> None:
    dense = small_model("dense", seed=11)
    sparse = small_model("switch", seed=12, sparse_layers="insert_after:1")
    before = sparse.encoder.stack.layers[0].inserted.block.pool.sublayers[0].fc1_weight.clone()
    upcycle(dense.state_dict(), sparse)
    assert torch.equal(sparse.encoder.stack.layers[0].inserted.block.pool.sublayers[0].fc1_weight, before)
    state = sparse.state_dict()
    assert all(torch.equal(state[name], value) for name, value in dense.state_dict().items())


def test_models_of_another_shape_are_refused() -> None:
    dense = small_model("dense").state_dict()
    with pytest.raises(CheckpointError, match=r"\[32, 16\].*\[48, 16\]|\[16, 32\].*\[16, 48\]"):
        upcycle(dense, small_model({"name": "switch", "num_experts": 4, "expert_ffn_dim": 48}))
    with pytest.raises(CheckpointError, match=r"has no decoder\.stack\.layers\.2"):
        upcycle(dense, small_model("switch", decoder_layers=3))
    with pytest.raises(CheckpointError, match=r"no tensor decoder\.stack\.layers\.1"):
        upcycle(dense, small_model("switch", decoder_layers=1))
    with pytest.raises(CheckpointError, match="sub-layers"):
        upcycle(dense, small_model({"name": "xmoe", "num_experts": 4, "expert_sublayers": 3}))

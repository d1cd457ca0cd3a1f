"""The sparse layer, its kinds, and the public MoELayer."""

from __future__ import annotations

import pytest
import torch

from moe_train.errors import ConfigError
from moe_train.layers import BatchInfo, MoELayer, RoutingSettings, SparseLayer, batch_context, kinds, register_kind
from moe_train.layers.transformer import BlockResidual, LayerShape

SWITCH = {"name": "switch", "num_experts": 4}


def test_it_computes_the_weighted_sum_of_its_experts() -> None:
    layer, x = MoELayer(8, 16, {"name": "top_k", "num_experts": 4, "top_k": 2}), torch.randn(2, 3, 8)
    y, record = layer(x)
    assert record is not None and isinstance(layer.block, SparseLayer)
    pairs, rows = record.routing[0].assignment, x.view(6, 8)
    expected = torch.zeros(6, 8)
    for token, expert, weight in zip(pairs.token, pairs.expert, pairs.weight, strict=True):
        one = type(pairs)(token[None] * 0, expert[None], torch.ones(1))
        expected[token] += weight * layer.block.pool(rows[token][None], one)[0]
    torch.testing.assert_close(y.view(6, 8), expected)


def test_padding_is_not_routed_and_gets_nothing() -> None:
    layer, x = MoELayer(8, 16, SWITCH), torch.randn(2, 5, 8)
    padding = torch.tensor([[False] * 5, [False] * 2 + [True] * 3])
    y, record = layer(x, padding)
    assert record is not None
    assert record.statistics.tokens == 7 and record.statistics.load.sum() == 7
    assert not y[padding].any()
    torch.testing.assert_close(y[1:, :2], layer(x[1:, :2])[0])
    x[padding] = torch.nan
    assert layer(x, padding)[0][~padding].isfinite().all()


def test_a_capacity_is_a_share_of_the_tokens_that_are_there() -> None:
    """fairseq's gates count and serve padded rows too: of 20 rows an expert would take 5, of 4 tokens it takes 1."""
    layer, x = MoELayer(8, 16, {**SWITCH, "capacity_factor": 1.0}).train(), torch.ones(1, 20, 8)
    padding = torch.arange(20)[None] >= 4
    _, record = layer(x, padding)
    assert record is not None
    assert record.statistics.tokens == 4 and record.statistics.load.sum() == 1, "all four want one expert"


def test_total_loss_weighs_the_losses() -> None:
    layer = MoELayer(8, 16, {**SWITCH, "balance_weight": 0.5})
    _, record = layer(torch.randn(2, 5, 8))
    assert record is not None
    expected = sum(loss.weight * loss.value for loss in record.losses.values())
    assert record.losses and record.total_loss == expected and expected > 0


def test_layers_of_other_numbers_draw_differently() -> None:
    x = torch.randn(4, 50, 8)
    choices = []
    for number in (0, 1):
        _, record = MoELayer(8, 16, {"name": "random", "num_experts": 4}, layer=number)(x)
        assert record is not None and record.layer == number
        choices.append(record.routing[0].choices)
    assert not torch.equal(*choices)


def test_an_unknown_strategy_or_key_is_named() -> None:
    with pytest.raises(ConfigError, match="switch"):
        MoELayer(8, 16, {"name": "swich"})
    with pytest.raises(ConfigError, match="num_experts"):
        MoELayer(8, 16, {"name": "switch", "num_expert": 4})


def test_every_kind_of_every_strategy_is_built_by_name() -> None:
    assert {"dense", "sparse"} <= kinds().keys()
    with pytest.raises(ValueError, match="twice"):
        register_kind("sparse")(kinds()["sparse"])


@pytest.mark.parametrize("norm_order", ["pre", "post"])
def test_a_stack_of_sublayers_norms_itself(norm_order: str) -> None:
    """X-MoE: three residual sub-layers per expert bring their own norms, so that the layer's frame only adds."""
    shape = LayerShape(dim=8, num_heads=2, norm_order=norm_order, dropout=0.0)
    x = torch.randn(2, 3, 8)
    context = batch_context(None, (2, 3), RoutingSettings(), BatchInfo())
    stacked = MoELayer(8, 16, {**SWITCH, "expert_sublayers": 3}).block
    frame = BlockResidual(shape, stacked)
    assert frame.residual is None
    torch.testing.assert_close(frame(x, context)[0], x + stacked(x, context)[0])
    assert BlockResidual(shape, MoELayer(8, 16, SWITCH).block).residual is not None


def test_positions_and_context_of_padded_batches() -> None:
    padding = torch.tensor([[True, False, False], [False, False, True]])
    info = BatchInfo(sentence_uid=torch.tensor([40, 50]), language=torch.tensor([3, 4]))
    tokens = torch.tensor([[1, 11, 12], [13, 14, 1]])
    context = batch_context(padding, (2, 3), RoutingSettings(seed=9, update=5), info, token_ids=tokens, training=True)
    assert context.real is not None and context.real.tolist() == [1, 2, 3, 4]
    routing = context.routing
    assert routing.position.tolist() == [0, 1, 0, 1]
    assert routing.sentence.tolist() == [0, 0, 1, 1]
    assert routing.sentence_uid.tolist() == [40, 40, 50, 50]
    assert routing.token_id.tolist() == [11, 12, 13, 14]
    assert routing.language.tolist() == [3, 3, 4, 4]
    assert (routing.seed, routing.update, routing.training, routing.num_sentences) == (9, 5, True, 2)
    x = torch.randn(2, 3, 4)
    assert torch.equal(context.unpack(context.pack(x)), x.masked_fill(padding[..., None], 0))
    wide = x.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda given: context.unpack(context.pack(given).square()), (wide,))
    evaluated = batch_context(padding, (2, 3), RoutingSettings(seed=9, update=5), info)
    assert evaluated.routing.update == 0

"""SMoE's block: passes, norms, residuals, capacity, causality; against a masked dense reference."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moe_train.layers import (
    BatchContext,
    BatchInfo,
    RoutingSettings,
    StratifiedLayer,
    batch_context,
    requested_capacity,
    start_losses,
)
from moe_train.layers.block import RoutingRecord
from moe_train.layers.registry import BlockInputs, build_block
from moe_train.routing import LocalReduction, routing_config
from moe_train.routing.strategies.smoe import expected_visits
from tests.routing.helpers import on_ranks, shares

DIM = 12
strata_sizes = st.lists(st.integers(2, 4), min_size=1, max_size=4)


def make(sizes: list[int], seed: int = 0, **keys: Any) -> StratifiedLayer:
    torch.manual_seed(seed)
    config = routing_config({"name": "smoe", "num_experts": sum(sizes), "strata": sizes, **keys})
    layer = build_block(config, BlockInputs(DIM, 16, layer=3))
    assert isinstance(layer, StratifiedLayer)
    layer = layer.double()
    with torch.no_grad():
        for norm in layer.norms:
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.uniform_(-0.5, 0.5)
    return layer


def inputs(batch: int, length: int, seed: int = 1) -> Tensor:
    return torch.randn(batch, length, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def context_of(x: Tensor, padding: Tensor | None = None, training: bool = False, **settings: Any) -> BatchContext:
    info = BatchInfo(sentence_uid=torch.arange(100, 100 + x.shape[0]))
    return batch_context(padding, (x.shape[0], x.shape[1]), RoutingSettings(**settings), info, training=training)


def balance(record: RoutingRecord, context: BatchContext) -> Tensor:
    """The block's balance loss: this rank's share."""
    return start_losses((record,), context.routing.ranks)[0].losses["balance_loss"].value


def masked_dense(layer: StratifiedLayer, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Every expert on every token in every pass, masked: (rows after the block [T, d], passes per token [T])."""
    config, total = layer.router.config, sum(layer.router.config.sizes)
    state = torch.zeros(rows.shape[0], dtype=torch.int64)
    passes = torch.zeros_like(state)
    bounds = torch.tensor(config.sizes).cumsum(0)
    stack = layer.pool.sublayers[0]
    for i in range(len(config.sizes)):
        h = layer.norms[i](rows) if i == 0 or config.norm == "paper" else rows
        scores = torch.zeros(rows.shape[0], total, dtype=rows.dtype)
        scores[:, total - layer.router.strata[i].num_experts :] = torch.softmax(
            h @ layer.router.strata[i].gate.weight.T, -1
        )
        best = scores.topk(config.top_k).indices
        weight = torch.zeros_like(scores).scatter(1, best, scores.gather(1, best))
        if config.normalise != "none":
            weight = weight / weight.sum(-1, keepdim=True)
        outputs = torch.stack(
            [
                torch.relu(h @ stack.fc1_weight[e] + stack.fc1_bias[e]) @ stack.fc2_weight[e] + stack.fc2_bias[e]
                for e in range(total)
            ],
            dim=1,
        )
        active = state == i
        new = rows + (weight.unsqueeze(2) * outputs).sum(1)
        rows = torch.where(active.unsqueeze(1), new, rows)
        onward = torch.bucketize(best[:, 0].contiguous(), bounds, right=True) + 1
        state = torch.where(active, onward, state)
        passes += active
        if config.norm == "official":
            for s in range(i + 1, len(config.sizes) + 1):
                entering = (active & (state == s)).unsqueeze(1)
                rows = torch.where(entering, layer.norms[s](rows), rows)
    return rows, passes


@given(
    strata_sizes,
    st.sampled_from([{}, {"norm": "official", "normalise": "after_drop"}]),
    st.integers(0, 5),
    st.integers(1, 8),
    st.integers(0, 100),
)
@settings(max_examples=20)
def test_compact_passes_equal_masked_dense_ones(
    sizes: list[int], keys: dict[str, Any], batch: int, length: int, seed: int
) -> None:
    layer, x = make(sizes, seed, **keys), inputs(batch, length, seed)
    y, record = layer(x, context_of(x))
    expected, passes = masked_dense(layer, x.reshape(-1, DIM))
    torch.testing.assert_close(y.reshape(-1, DIM), expected, rtol=1e-12, atol=1e-12)
    assert record is not None
    assert torch.equal(requested_capacity(record.routing), passes)
    histogram = torch.bincount(passes - 1, minlength=len(sizes))
    assert torch.equal(record.statistics.extra["passes"], histogram)


@given(strata_sizes, st.integers(0, 100), st.sampled_from(["paper", "official"]))
def test_passes_strictly_climb(sizes: list[int], seed: int, norm: str) -> None:
    layer, x = make(sizes, seed, norm=norm), inputs(2, 6, seed)
    record = layer(x, context_of(x, training=True))[1]
    requested = requested_capacity(record.routing)
    assert requested.min() >= 1 and requested.max() <= len(sizes)
    stratum_of = layer.router.stratum_of
    reached = torch.full((12,), -1)
    for i, routing in enumerate(record.routing):
        active = routing.choices[:, 0] >= 0
        assert (reached[active] < i).all()
        first = stratum_of[routing.choices[active, 0]]
        assert (first >= i).all(), "never back"
        reached[active] = first
    assert (reached == len(sizes) - 1).all(), "a token leaves through the last stratum"
    at_once = stratum_of[record.routing[0].choices[:, 0]] == len(sizes) - 1
    assert torch.equal(requested == 1, at_once)


def top_two(num_experts: int) -> Any:
    """A vanilla MoE layer of as many experts."""
    config = routing_config({"name": "top_k", "num_experts": num_experts, "normalise": "none"})
    return build_block(config, BlockInputs(DIM, 16, layer=3)).double()


@given(st.integers(2, 9), st.integers(1, 3), st.integers(1, 6), st.integers(0, 100))
@settings(max_examples=20)
def test_one_stratum_is_top_two_behind_a_norm_with_a_residual(
    num_experts: int, batch: int, length: int, seed: int
) -> None:
    layer, x, vanilla = make([num_experts], seed), inputs(batch, length, seed), top_two(num_experts)
    y, _ = layer(x, context_of(x))
    vanilla.router.gate.load_state_dict(layer.router.strata[0].gate.state_dict())
    vanilla.pool.load_state_dict(layer.pool.state_dict())
    expected = x + vanilla(layer.norms[0](x), context_of(x))[0]
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)


@given(strata_sizes)
@settings(max_examples=15)
def test_strata_have_the_experts_of_a_vanilla_layer_and_only_gates_and_norms_of_their_own(sizes: list[int]) -> None:
    layer, vanilla = make(sizes), top_two(sum(sizes))
    shapes = [{n: p.shape for n, p in block.pool.named_parameters()} for block in (layer, vanilla)]
    assert shapes[0] == shapes[1] and shapes[0]
    beside = sum(p.numel() for n, p in layer.named_parameters() if not n.startswith("pool."))
    assert beside == DIM * sum(sum(sizes[i:]) for i in range(len(sizes))) + 2 * DIM * len(layer.norms)


def silence(layer: StratifiedLayer) -> StratifiedLayer:
    with torch.no_grad():
        for stack in layer.pool.sublayers:
            stack.fc2_weight.zero_()
            stack.fc2_bias.zero_()
    return layer


@given(strata_sizes.filter(lambda sizes: len(sizes) > 1), st.integers(0, 100))
@settings(max_examples=20)
def test_silent_experts_leave_the_stream_alone_in_the_paper_and_normalise_it_in_the_code(
    sizes: list[int], seed: int
) -> None:
    x = 3 * inputs(3, 5, seed)
    assert torch.equal(silence(make(sizes, seed))(x, context_of(x))[0], x)
    official = silence(make(sizes, seed, norm="official"))
    for norm in official.norms:
        torch.nn.init.ones_(norm.weight)
        torch.nn.init.zeros_(norm.bias)
    y = official(x, context_of(x))[0]
    torch.testing.assert_close(y.mean(-1), torch.zeros(3, 5, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(y.var(-1, unbiased=False), torch.ones(3, 5, dtype=torch.float64), atol=1e-3, rtol=0)


@pytest.mark.parametrize("sizes", [[4, 4], [4, 12], [2, 2, 2, 2]])
def test_random_gates_give_the_expected_number_of_passes(sizes: list[int]) -> None:
    """All but zero gates: probabilities are uniform, and who is first is drawn with the gate.

    Rows of a random gate are exchangeable, so that over gates every visible expert is equally often first.
    """
    found = []
    for seed in range(40):
        layer, x = silence(make(sizes, seed)), inputs(1, 30, seed)
        for gate in layer.router.strata:
            torch.nn.init.normal_(gate.gate.weight, std=1e-7)
        routing = layer(x, context_of(x))[1].routing
        first = routing[0].statistics
        assert (first.entropy / first.tokens).item() == pytest.approx(math.log(sum(sizes)))
        found.append(requested_capacity(routing).double().mean())
    assert torch.stack(found).mean().item() == pytest.approx(sum(expected_visits(sizes)), rel=0.07)


@given(strata_sizes)
@settings(max_examples=10)
def test_gates_of_exactly_zero_send_every_token_through_all_strata(sizes: list[int]) -> None:
    """Of equal scores the first is taken: ties are not drawn, and these gates stay above the mean of random ones."""
    layer, x = silence(make(sizes)), inputs(2, 4)
    for gate in layer.router.strata:
        torch.nn.init.zeros_(gate.gate.weight)
    passes = requested_capacity(layer(x, context_of(x))[1].routing)
    assert (passes == len(sizes)).all()
    assert len(sizes) == 1 or len(sizes) > sum(expected_visits(sizes))


def test_a_dropped_token_keeps_its_residual_and_still_goes_on() -> None:
    layer, x = make([2, 4], capacity_factor=0.5), torch.ones(1, 12, DIM, dtype=torch.float64)  # everybody alike
    record = layer(x, context_of(x, training=True))[1]
    y = layer(x, context_of(x, training=True))[0].view(12, DIM)
    first = record.routing[0]
    assert first.kept.sum(0).tolist() == [2, 2]  # ⌈0.5 · 2 · ⌈12 / 6⌉⌉ places at each of two experts
    state = layer.router.next_stratum(first.choices)
    assert (state == state[0]).all(), "dropped or not"
    untouched = ~torch.stack([r.kept for r in record.routing]).any(0).any(1)
    assert untouched.sum() >= 8
    assert torch.equal(y[untouched], x.view(12, DIM)[untouched])
    assert int(record.statistics.dropped) == int(record.statistics.requested.sum() - record.statistics.load.sum())


@given(strata_sizes, st.integers(1, 14), st.sampled_from([0.3, 0.5, 1.0]), st.booleans(), st.integers(0, 100))
@settings(max_examples=25)
def test_who_is_dropped_everywhere_keeps_its_residual_and_all_go_on_by_their_choices(
    sizes: list[int], count: int, factor: float, alike: bool, seed: int
) -> None:
    layer, x = make(sizes, seed, capacity_factor=factor), inputs(1, count, seed)
    if alike:  # then all want the same two experts of the first pass
        x = x[:, :1].expand(1, count, DIM).contiguous()
    y, record = layer(x, context_of(x, training=True))
    untouched = ~torch.stack([r.kept for r in record.routing]).any(0).any(1)
    assert torch.equal(y[0, untouched], x[0, untouched])
    assert not (y[0, ~untouched] == x[0, ~untouched]).all(-1).any()
    state = torch.zeros(count, dtype=torch.int64)
    for i, routing in enumerate(record.routing):
        active = routing.choices[:, 0] >= 0
        assert torch.equal(active, state == i), "dropped or not"
        limit = math.ceil(factor * 2 * math.ceil(int(active.sum()) / sum(sizes[i:])))
        assert routing.statistics.load.max() <= limit
        if alike and i == 0:
            assert routing.kept.sum(0).tolist() == [min(limit, count)] * 2
        state = torch.where(active, layer.router.next_stratum(routing.choices), state)
    assert (state == len(sizes)).all()


@given(strata_sizes, st.integers(1, 7), st.integers(0, 100))
@settings(max_examples=20)
def test_a_later_token_changes_nothing_before_it(sizes: list[int], cut: int, seed: int) -> None:
    layer, x = make(sizes, seed), inputs(2, 8, seed)
    changed = x.clone()
    changed[:, cut:] = inputs(2, 8 - cut, seed=seed + 1000)
    y, z = (layer(v, context_of(v))[0] for v in (x, changed))
    torch.testing.assert_close(y[:, :cut], z[:, :cut], rtol=1e-13, atol=1e-13)
    steps = torch.cat([layer(x[:, t : t + 1], context_of(x[:, t : t + 1]))[0] for t in range(8)], dim=1)
    torch.testing.assert_close(y, steps, rtol=1e-12, atol=1e-12)


@given(st.sampled_from(["paper", "official"]), st.integers(0, 6), st.integers(0, 6), st.integers(0, 100))
@settings(max_examples=20)
def test_padding_changes_nothing_and_stays_as_it_is(norm: str, first: int, second: int, seed: int) -> None:
    layer, x = make([2, 4], seed, norm=norm, capacity_factor=1.0), inputs(2, 6, seed)
    padding = torch.arange(6) >= torch.tensor([[first], [second]])
    context = context_of(x, padding, training=True)
    y, record = layer(x, context)
    assert torch.equal(y[padding], x[padding])
    garbage = x.masked_fill(padding.unsqueeze(2), 1e9)
    z, other = layer(garbage, context)
    assert torch.equal(y[~padding], z[~padding])
    assert torch.equal(balance(record, context), balance(other, context))
    assert int(record.statistics.tokens) == first + second


@pytest.mark.parametrize("balance_over", ["strata", "executed"])
def test_the_balance_loss_is_a_mean_over_gates(balance_over: str) -> None:
    layer, x = make([2, 2, 4], balance_over=balance_over), inputs(2, 8)
    with torch.no_grad():
        layer.router.strata[0].gate.weight.zero_()
        layer.router.strata[0].gate.weight[6] = 50 * inputs(1, 1)[0, 0]
    x = inputs(1, 1).expand(2, 8, DIM).clone()  # all tokens alike: one direction, one expert
    context = context_of(x, training=True)
    record = layer(x, context)[1]
    values = [shares(r)["balance_loss"].value for r in record.routing]
    executed = [v for v, r in zip(values, record.routing, strict=True) if (r.choices >= 0).any()]
    count = 3 if balance_over == "strata" else len(executed)
    torch.testing.assert_close(balance(record, context), torch.stack(values).sum() / count)
    assert record.router_losses["balance_loss"].weight == 0.01


@pytest.mark.parametrize("norm", ["paper", "official"])
def test_gradients_against_finite_differences(norm: str) -> None:
    layer = make([2, 4], norm=norm)
    x = inputs(1, 4).requires_grad_()
    context = context_of(x, training=True)

    def function(x: Tensor, *_: Tensor) -> Tensor:
        y, record = layer(x, context)
        return torch.cat((y.reshape(-1), balance(record, context).reshape(1)))

    assert torch.autograd.gradcheck(function, (x, *layer.parameters()), eps=1e-7, atol=1e-5, fast_mode=True)


@pytest.mark.parametrize("norm", ["paper", "official"])
def test_recomputation_gives_the_same_gradients(norm: str) -> None:
    found = []
    for recompute in (False, True):
        layer, x = make([2, 2, 4], norm=norm, second_expert="sampling", jitter=0.1), inputs(2, 6).requires_grad_()
        context = context_of(x, training=True, update=5)

        def run(x: Tensor, layer: Any = layer, context: Any = context) -> Tensor:
            y, record = layer(x, context)
            return y.square().sum() + balance(record, context)

        (checkpoint(run, x, use_reentrant=False) if recompute else run(x)).backward()
        found.append([x.grad, *[p.grad for p in layer.parameters()]])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("training", [True, False])
def test_no_tokens_still_run_every_pass_and_reach_every_parameter(training: bool) -> None:
    for norm in ("paper", "official"):
        layer, x = make([2, 2, 4], norm=norm, capacity_factor=1.0), inputs(0, 1)
        y, record = layer(x, context_of(x, training=training))
        assert len(record.routing) == 3
        (y.sum() + start_losses((record,), LocalReduction())[0].total_loss).backward()
        missing = [n for n, p in layer.named_parameters() if p.grad is None]
        assert not missing or (not training and all("gate" in n for n in missing))


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("balance_over", ["strata", "executed"])
def test_the_number_of_ranks_changes_nothing(size: int, balance_over: str) -> None:
    keys = {"capacity_factor": 0.7, "capacity_group": "global", "balance_over": balance_over}
    x, alone = inputs(5, 4), make([2, 2, 4], **keys)
    layers = [make([2, 2, 4], **keys) for _ in range(size)]
    padding = torch.zeros(5, 4, dtype=torch.bool)
    padding[1, 2:] = padding[4, 1:] = True

    def run(layer: StratifiedLayer, rows: slice, **settings: Any) -> tuple[Tensor, Tensor]:
        info = BatchInfo(sentence_uid=torch.arange(100, 105)[rows])
        part = x[rows]
        context = batch_context(padding[rows], part.shape[:2], RoutingSettings(**settings), info, training=True)
        y, record = layer(part, context)
        y = y.masked_fill(padding[rows].unsqueeze(2), 0)
        loss = y.square().sum() + 3 * balance(record, context)
        loss.backward()
        return y.detach(), loss.detach()

    whole, loss = run(alone, slice(None))
    parts = on_ranks(size, lambda ranks: run(layers[ranks.rank], slice(ranks.rank, None, size), ranks=ranks))
    for rank, (y, _) in enumerate(parts):
        torch.testing.assert_close(y, whole[rank::size], rtol=1e-12, atol=1e-12)
    assert sum(p[1].item() for p in parts) == pytest.approx(loss.item(), rel=1e-12)
    for name, parameter in alone.named_parameters():
        total = sum(layer.get_parameter(name).grad for layer in layers)
        torch.testing.assert_close(total, parameter.grad, rtol=1e-9, atol=1e-11)


def test_dropout_is_of_each_pass() -> None:
    torch.manual_seed(0)
    config = routing_config({"name": "smoe", "num_experts": 4})
    layer = build_block(config, BlockInputs(DIM, 16, dropout=0.5)).double()
    x = inputs(4, 10)
    y = layer(x, context_of(x, training=True))[0]
    assert 0.2 < (y == x).double().mean().item() < 0.6
    layer.eval()
    assert torch.equal(layer(x, context_of(x))[0], layer(x, context_of(x))[0])


def test_frozen_blocks_have_no_gradients() -> None:
    config = routing_config({"name": "smoe", "frozen": True})
    layer = build_block(config, BlockInputs(DIM, 16))
    assert not any(p.requires_grad for p in layer.parameters())
    thawed = build_block(dataclasses.replace(config, frozen=False), BlockInputs(DIM, 16))
    assert all(p.requires_grad for p in thawed.parameters())

"""Soft MoE: the two mixes, their symmetries, masks, and the layer around the pool."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from moe_train.errors import ConfigError
from moe_train.layers import BatchContext, BatchInfo, MoELayer, RoutingSettings, SoftLayer, batch_context
from moe_train.layers.registry import BlockInputs, build_block
from moe_train.routing import decoder_config, routing_config, strategy

DIM = 10


def make(seed: int = 0, dim: int = DIM, **keys: Any) -> SoftLayer:
    torch.manual_seed(seed)
    config = routing_config({"name": "soft_moe", "num_experts": 3, "slots_per_expert": 2, **keys})
    layer = build_block(config, BlockInputs(dim, 8)).double()
    assert isinstance(layer, SoftLayer)
    return layer


def inputs(batch: int, length: int, seed: int = 1, dim: int = DIM) -> Tensor:
    return torch.randn(batch, length, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def context_of(x: Tensor, padding: Tensor | None = None, training: bool = False) -> BatchContext:
    return batch_context(padding, (x.shape[0], x.shape[1]), RoutingSettings(), BatchInfo(), training=training)


def run(layer: SoftLayer, x: Tensor, padding: Tensor | None = None) -> Tensor:
    return layer(x, context_of(x, padding))[0]


def expert(layer: SoftLayer, e: int, x: Tensor) -> Tensor:
    stack = layer.pool.sublayers[0]
    return torch.relu(x @ stack.fc1_weight[e] + stack.fc1_bias[e]) @ stack.fc2_weight[e] + stack.fc2_bias[e]


def test_the_layer_follows_its_equations() -> None:
    layer, x = make(), inputs(1, 5)
    with torch.no_grad():
        layer.router.scale.fill_(3.0)
    rows, phi = x[0], layer.router.phi
    unit = rows / (rows.norm(dim=1, keepdim=True) + 1e-6)
    logits = 3.0 * unit @ (phi / (phi.norm(dim=1, keepdim=True) + 1e-6)).T
    dispatch, combine = torch.softmax(logits, 0), torch.softmax(logits, 1)
    slots = dispatch.T @ rows  # the un-normalised rows
    outputs = torch.cat([expert(layer, s // 2, slots[s : s + 1]) for s in range(6)])
    torch.testing.assert_close(run(layer, x)[0], combine @ outputs)


@given(st.integers(1, 9), st.integers(0, 100), st.floats(0.1, 30))
def test_mixes_sum_to_one_and_nothing_is_dropped(length: int, seed: int, scale: float) -> None:
    layer, x = make(seed), inputs(2, length, seed)
    with torch.no_grad():
        layer.router.scale.fill_(scale)
    mixes = layer.router.mixes(x, None)
    one = torch.ones((), dtype=torch.float64)
    torch.testing.assert_close(mixes.dispatch.sum(1), one.expand(2, 6))
    torch.testing.assert_close(mixes.combine.sum(2), one.expand(2, length))
    assert (mixes.dispatch > 0).all() and (mixes.combine > 0).all()
    assert layer.router.logits(x).abs().max() <= scale + 1e-9
    statistics = layer(x, context_of(x))[1].statistics
    assert statistics.load.tolist() == [4, 4, 4]  # p slots of each of two sentences
    assert int(statistics.dropped) == 0


@given(st.permutations(range(6)))
def test_tokens_may_be_permuted(order: list[int]) -> None:
    layer, x = make(), inputs(1, 6)
    torch.testing.assert_close(run(layer, x[:, order]), run(layer, x)[:, order])


@given(
    st.lists(st.permutations(range(2)), min_size=3, max_size=3),
    st.permutations(range(3)),
    st.integers(1, 6),
    st.integers(0, 50),
)
@settings(max_examples=20)
def test_slots_of_an_expert_and_experts_with_their_weights_may_be_permuted(
    slots: list[list[int]], experts: list[int], length: int, seed: int
) -> None:
    layer, x = make(seed), inputs(2, length, seed)
    before = run(layer, x)
    with torch.no_grad():
        layer.router.phi.copy_(layer.router.phi[[2 * e + s for e, order in enumerate(slots) for s in order]])
        torch.testing.assert_close(run(layer, x), before)
        layer.router.phi.copy_(layer.router.phi.view(3, 2, DIM)[experts].reshape(6, DIM))
        assert length == 1 or experts == [0, 1, 2] or not torch.allclose(run(layer, x), before)
        for parameter in layer.pool.parameters():
            parameter.copy_(parameter[experts])
        torch.testing.assert_close(run(layer, x), before)


@given(st.integers(1, 4), st.integers(1, 6), st.integers(0, 4), st.integers(0, 50))
def test_batch_mates_and_padding_change_nothing(mates: int, length: int, pad: int, seed: int) -> None:
    layer, x = make(seed), inputs(1, length, seed)
    alone = run(layer, x)
    batch = torch.cat((inputs(mates, length + pad, seed + 1), torch.zeros(1, length + pad, DIM, dtype=torch.float64)))
    batch[-1, :length] = x[0]
    batch[-1, length:] = 1e30  # garbage
    padding = torch.zeros(mates + 1, length + pad, dtype=torch.bool)
    padding[-1, length:] = True
    y = run(layer, batch, padding)
    torch.testing.assert_close(y[-1, :length], alone[0])
    assert not y[-1, length:].any()
    assert torch.isfinite(y).all()


def test_a_sentence_of_padding_alone_gives_zeros_and_finite_gradients() -> None:
    layer, x = make(), inputs(2, 4).requires_grad_()
    padding = torch.tensor([[False] * 4, [True] * 4])
    y = run(layer, x, padding)
    y.square().sum().backward()
    assert not y[1].any()
    assert torch.isfinite(x.grad).all() and not x.grad[1].any()
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters())


@given(st.integers(1, 8), st.integers(0, 50))
@settings(max_examples=15)
def test_one_slot_gives_every_token_the_same_output(length: int, seed: int) -> None:
    y = run(make(seed, num_experts=1, slots_per_expert=1), inputs(2, length, seed))
    torch.testing.assert_close(y, y[:, :1].expand_as(y))


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 8), st.integers(0, 50))
@settings(max_examples=15)
def test_identity_experts_leave_the_two_mixes(num_experts: int, slots: int, length: int, seed: int) -> None:
    layer, x = make(seed, num_experts=num_experts, slots_per_expert=slots), inputs(2, length, seed)
    layer.pool = _Identity(layer.pool.spec)  # type: ignore[assignment]
    mixes = layer.router.mixes(x, None)
    torch.testing.assert_close(run(layer, x), mixes.combine @ (mixes.dispatch.transpose(1, 2) @ x))


class _Identity(nn.Module):
    def __init__(self, spec: object) -> None:
        super().__init__()
        self.spec = spec

    def forward(self, x: Tensor, assignment: object) -> Tensor:
        return x


@given(st.floats(0.5, 50), st.integers(0, 50), st.sampled_from(["paper", "official"]))
def test_lengths_do_not_matter_to_the_logits(factor: float, seed: int, normalisation: str) -> None:
    layer, x = make(seed, normalisation=normalisation), inputs(1, 5, seed)
    before = layer.router.logits(x)
    token, slot = torch.ones(1, 5, 1, dtype=torch.float64), torch.ones(6, 1, dtype=torch.float64)
    token[0, 2], slot[3] = factor, factor
    with torch.no_grad():
        layer.router.phi.mul_(slot)
    torch.testing.assert_close(layer.router.logits(x * token), before, rtol=2e-5, atol=1e-6)


def test_without_normalisation_they_do() -> None:
    layer, x = make(normalisation="none"), inputs(1, 5)
    torch.testing.assert_close(layer.router.logits(2 * x), 2 * layer.router.logits(x))


@given(st.integers(2, 8), st.integers(0, 50))
@settings(max_examples=15)
def test_gradients_reach_every_expert_slot_and_the_scale(length: int, seed: int) -> None:
    layer, x = make(seed), inputs(2, length, seed)
    run(layer, x).square().sum().backward()
    assert layer.router.scale.grad.abs() > 0
    assert (layer.router.phi.grad.abs().sum(1) > 0).all()
    for name, parameter in layer.pool.named_parameters():
        assert (parameter.grad.flatten(1).abs().sum(1) > 0).all(), name


@given(st.integers(1, 6), st.integers(0, 50))
@settings(max_examples=15)
def test_an_earlier_output_sees_a_later_token(before: int, seed: int) -> None:
    """Why a decoder refuses it."""
    layer, x = make(seed), inputs(1, before + 1, seed)
    changed = x.clone()
    changed[0, before] += 1
    assert ((run(layer, x) - run(layer, changed))[0, :before].abs().amax(-1) > 1e-6).all()


def test_decoders_refuse_it_with_the_reason_and_a_way_out() -> None:
    with pytest.raises(ConfigError, match=r"later tokens.*routing\.decoder=top_k"):
        decoder_config(routing_config({"name": "soft_moe"}))
    assert decoder_config(routing_config({"name": "soft_moe", "decoder": "dense"})).name == "dense"


def test_gradients_against_finite_differences() -> None:
    layer, x = make(dim=4), inputs(2, 3, dim=4).requires_grad_()
    padding = torch.tensor([[False, False, False], [False, False, True]])
    function = lambda x, *_: run(layer, x, padding)  # noqa: E731
    assert torch.autograd.gradcheck(function, (x, *layer.parameters()), eps=1e-7, atol=1e-5, fast_mode=True)


def test_recomputation_gives_the_same_gradients() -> None:
    found = []
    for recompute in (False, True):
        layer, x = make(), inputs(2, 4).requires_grad_()
        y = checkpoint(run, layer, x, use_reentrant=False) if recompute else run(layer, x)
        y.square().sum().backward()
        found.append([x.grad, *[p.grad for p in layer.parameters()]])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("shape", [(0, 1), (0, 0), (2, 0)])
def test_no_tokens_at_all(shape: tuple[int, int]) -> None:
    layer, x = make(), inputs(*shape)
    y = run(layer, x)
    assert y.shape == x.shape
    y.sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in layer.parameters())


def test_sentences_split_over_ranks_compute_the_same() -> None:
    """Each sentence on its own: nothing is exchanged between ranks here, and gradients add up."""
    whole, x = make(), inputs(5, 4)
    run(whole, x).square().sum().backward()
    total = [torch.zeros_like(p) for p in whole.parameters()]
    for rank in range(2):
        part = make()
        torch.testing.assert_close(run(part, x[rank::2]), run(whole, x)[rank::2])
        run(part, x[rank::2]).square().sum().backward()
        for sum_, parameter in zip(total, part.parameters(), strict=True):
            sum_ += parameter.grad
    for sum_, parameter in zip(total, whole.parameters(), strict=True):
        torch.testing.assert_close(sum_, parameter.grad)


def test_mixes_are_fp32_in_half_precision_and_under_autocast() -> None:
    torch.manual_seed(0)
    layer = MoELayer(DIM, 8, {"name": "soft_moe", "num_experts": 3})
    x = inputs(2, 5).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer.block.router.mixes(x, None).combine.dtype == torch.float32
        assert torch.isfinite(layer(x)[0]).all()
    half = layer.bfloat16()
    assert half.block.router.phi.dtype == torch.float32
    y, _ = half(x.bfloat16())
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(
        y.float(), MoELayer(DIM, 8, {"name": "soft_moe", "num_experts": 3})(x)[0], atol=0.05, rtol=0.1
    )


def test_identical_experts_start_alike_and_others_do_not() -> None:
    alike, apart = make(identical_experts=True), make()
    for parameter in alike.pool.parameters():
        assert torch.equal(parameter, parameter[:1].expand_as(parameter))
    assert not torch.equal(apart.pool.sublayers[0].fc1_weight[0], apart.pool.sublayers[0].fc1_weight[1])
    x = inputs(1, 5)
    run(alike, x).square().sum().backward()
    gradient = alike.pool.sublayers[0].fc1_weight.grad
    assert not torch.allclose(gradient[0], gradient[1]), "other slots part them"


def test_initial_slots_and_scale() -> None:
    layer = make(dim=400, num_experts=64)
    assert layer.router.scale.item() == 1
    assert layer.router.phi.std().item() == pytest.approx(400**-0.5, rel=0.02)
    assert layer.router.phi.abs().max() <= 2 * 400**-0.5 / 0.8796 + 1e-9


def test_official_slots_start_as_the_released_code_draws_them() -> None:
    """vmoe's mu [d, n, p] is lecun_normal, whose fan-in there is n · d: a slot is 1 / √n long."""
    phi = make(dim=400, num_experts=64, normalisation="official").router.phi
    assert phi.std().item() == pytest.approx((64 * 400) ** -0.5, rel=0.02)
    assert phi.norm(dim=1).mean().item() == pytest.approx(64**-0.5, rel=0.02)
    assert torch.allclose(phi * 8, make(dim=400, num_experts=64).router.phi), "the same draws, of another length"


@pytest.mark.parametrize("slots", [1, 3])
def test_official_mixes_are_the_released_code_s(slots: int) -> None:
    """vmoe/projects/soft_moe/router.py on mu [d, n, p], as it is written there; short slots make its epsilon count."""
    layer, x = make(num_experts=4, slots_per_expert=slots, normalisation="official"), inputs(2, 5)
    with torch.no_grad():
        layer.router.phi.mul_(0.01)
        layer.router.scale.fill_(3.0)

    def normalize(values: Tensor, axis: int) -> Tensor:
        return values * torch.rsqrt(values.square().sum(axis, keepdim=True) + 1e-6)

    mu = layer.router.phi.T.reshape(DIM, 4, slots)
    logits = torch.einsum("gmd,dnp->gmnp", normalize(x, -1), normalize(mu, 0) * 3.0)
    dispatch, combine = torch.softmax(logits, 1), torch.softmax(logits.flatten(2), 2)
    mixes = layer.router.mixes(x, None)
    torch.testing.assert_close(mixes.dispatch, dispatch.flatten(2))
    torch.testing.assert_close(mixes.combine, combine)
    other = make(num_experts=4, slots_per_expert=slots)
    other.load_state_dict(layer.state_dict())
    assert not torch.allclose(other.router.mixes(x, None).combine, combine, rtol=1e-4), "the paper's epsilon is another"


def test_the_slots_say_how_much_mixes_have_collapsed() -> None:
    layer, x = make(), inputs(2, 5)
    record = layer(x, context_of(x))[1]
    extra = record.statistics.extra
    assert int(extra["slots"]) == 12
    mixes = layer.router.mixes(x, None)
    torch.testing.assert_close(extra["dispatch_max"] / 10, mixes.dispatch.amax(1).mean())
    torch.testing.assert_close(extra["combine_max"] / 10, mixes.combine.amax(2).mean())
    padding = torch.tensor([[False] * 5, [False] * 2 + [True] * 3])
    dispatch = layer.router.mixes(x, padding).dispatch.amax(1).mean(1)
    found = layer(x, context_of(x, padding))[1].statistics
    torch.testing.assert_close(found.extra["dispatch_max"] / 7, (5 * dispatch[0] + 2 * dispatch[1]) / 7)
    assert record.routing == () and not record.router_losses
    assert int(record.statistics.tokens) == 10


@given(st.integers(1, 9), st.integers(0, 50))
@settings(max_examples=4)
def test_the_cost_of_a_forward_pass_depends_on_slots_and_not_on_experts(length: int, seed: int) -> None:
    """Counted products, and rows that went through experts, of 1 to 12 experts with 12 slots in all."""
    x, found = inputs(2, length, seed), set()
    for num_experts in (1, 2, 3, 4, 6, 12):
        layer = make(seed, num_experts=num_experts, slots_per_expert=12 // num_experts)
        with FlopCounterMode(display=False) as counter:
            _, record = layer(x, context_of(x))
        found.add((counter.get_total_flops(), int(record.statistics.load.sum())))
    ((flops, rows),) = found
    assert rows == 2 * 12
    assert flops == 2 * 12 * (6 * length * DIM + 4 * DIM * 8), "logits, dispatch, combine; two matrices of each expert"


def test_accounting() -> None:
    router = strategy("soft_moe").router
    config = routing_config({"name": "soft_moe", "num_experts": 8, "num_slots": 32, "expected_tokens": 64})
    assert (config.p, config.slots) == (4, 32)
    assert router.experts_per_token(config) == 0.5
    assert router.router_flops_per_token(config, 512) == 6 * 512 * 32
    other = routing_config({"name": "soft_moe", "num_experts": 16, "num_slots": 32, "expected_tokens": 64})
    assert router.experts_per_token(other) == 0.5, "the same at a fixed number of slots"
    assert routing_config({"name": "soft_moe", "num_experts": 64}).p == 1


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"num_slots": 12}, ["routing.num_slots=12", "8"]),
        ({"num_slots": 16, "slots_per_expert": 2}, ["twice", "null"]),
        ({"slots_per_expert": 0}, ["routing.slots_per_expert", "above 0"]),
        ({"normalisation": "l2"}, ["routing.normalisation"]),
        ({"slot_per_expert": 2}, ["'slots_per_expert'"]),
    ],
)
def test_wrong_use_is_named_with_a_remedy(keys: dict[str, object], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        routing_config({"name": "soft_moe", **keys})
    for word in words:
        assert word in str(caught.value)

"""Attention and dense feed-forward against torch's and fairseq's own."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from moe_train.kernels.cpu import attention_kernel
from moe_train.layers import CrossAttention, FeedForward, SelfAttention
from moe_train.layers.positions import SinusoidalPositions


def _reference(weights: list[torch.Tensor], biases: list[torch.Tensor], out: nn.Linear) -> nn.MultiheadAttention:
    attention = nn.MultiheadAttention(16, 4, batch_first=True)
    attention.in_proj_weight.data = torch.cat(weights)
    attention.in_proj_bias.data = torch.cat(biases)
    attention.out_proj.load_state_dict(out.state_dict())
    return attention


@pytest.mark.parametrize("causal", [False, True])
def test_self_attention_is_torchs_without_key_bias(causal: bool) -> None:
    ours, x = SelfAttention(16, 4), torch.randn(3, 5, 16)
    key_bias = torch.randn(16)  # softmax takes it away again
    reference = _reference([ours.qkv_weight], [ours.query_bias, key_bias, ours.value_bias], ours.out)
    padding = torch.zeros(3, 5, dtype=torch.bool)
    padding[1, 3:] = True
    future = torch.ones(5, 5, dtype=torch.bool).triu(1) if causal else None
    expected, _ = reference(x, x, x, key_padding_mask=None if causal else padding, attn_mask=future)
    got = ours(x, mask=None if causal else ~padding[:, None, None], causal=causal)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_cross_attention_is_torchs() -> None:
    ours, x, memory = CrossAttention(16, 4), torch.randn(3, 5, 16), torch.randn(3, 7, 16)
    reference = _reference(
        [ours.query_weight, ours.key_value_weight], [ours.query_bias, torch.randn(16), ours.value_bias], ours.out
    )
    padding = torch.zeros(3, 7, dtype=torch.bool)
    padding[2, 4:] = True
    expected, _ = reference(x, memory, memory, key_padding_mask=padding)
    torch.testing.assert_close(ours(x, memory, ~padding[:, None, None]), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kernel", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_bf16_on_the_cpu_has_gradients_of_fp32s_accuracy(
    causal: bool, kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the C kernel, or in torch's fp32 backward with few keys; without gradients all of it is torch's."""
    if not kernel:
        monkeypatch.setattr(attention_kernel, "is_supported", lambda *_: False)
    elif not attention_kernel.is_supported(*torch.zeros(2, 1, 1, 1)):
        pytest.skip("needs a CPU with AMX, Linux, and a C compiler")
    function = "_PackedAttention" if kernel else "_Fp32Backward"
    attention, x = SelfAttention(16, 2).bfloat16(), torch.randn(3, 9, 16, dtype=torch.bfloat16)
    mask = None if causal else torch.tensor([9, 4, 1])[:, None, None, None] > torch.arange(9)
    y = attention(x.requires_grad_(), mask, causal)
    with torch.no_grad():
        torch.testing.assert_close(y, attention(x, mask, causal), rtol=2e-2, atol=2e-2)
    assert function in _graph(y)
    gradient = torch.randn_like(y)
    (got,) = torch.autograd.grad(y, x, gradient)
    precise = copy.deepcopy(attention).double()
    wide = x.detach().double().requires_grad_()
    (want,) = torch.autograd.grad(precise(wide, mask, causal), wide, gradient.double())
    assert (got - want).norm() < 0.01 * want.norm()
    long = torch.randn(1, 513 if kernel else 129, 16, dtype=torch.bfloat16, requires_grad=True)
    assert function not in _graph(attention(long))
    attention.dropout = 0.1  # of which neither knows
    assert function not in _graph(attention(x, mask, causal))


def _graph(y: torch.Tensor) -> str:
    """Names of all autograd functions behind y."""
    nodes: dict[torch.autograd.graph.Node, None] = {}
    found = [y.grad_fn]
    while found:
        node = found.pop()
        if node is not None and node not in nodes:
            nodes[node] = None
            found += [parent for parent, _ in node.next_functions]
    return " ".join(node.name() for node in nodes)


def test_feed_forward_relu_and_gelu() -> None:
    x = torch.randn(3, 5, 8)
    for name, function in (("relu", torch.relu), ("gelu", nn.functional.gelu)):
        layer = FeedForward(8, 16, activation=name)
        y, record = layer(x)
        assert record is None
        torch.testing.assert_close(y, layer.fc2(function(layer.fc1(x))))


def test_positions_are_fairseqs() -> None:
    from moe_train.fairseq_compat import apply

    apply()
    from fairseq.modules import SinusoidalPositionalEmbedding

    tokens = torch.tensor([[5, 6, 7, 1], [1, 1, 8, 9]])
    expected = SinusoidalPositionalEmbedding(10, padding_idx=1, init_size=20)(tokens)
    got = SinusoidalPositions(10, 16, padding_index=1)(4, padding=tokens.eq(1))
    torch.testing.assert_close(got[tokens.ne(1)], expected[tokens.ne(1)])
    torch.testing.assert_close(SinusoidalPositions(10, 16, 1)(2, start=1), expected[0, 1:3])

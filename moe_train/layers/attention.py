"""Multi-head attention over torch's scaled_dot_product_attention, or in training on a CPU over a C kernel; batch first.

There is no key bias: it adds the same number to all scores of a query, which softmax cancels. Its true gradient is
zero, and Adam would only add noise to it.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from moe_train.kernels.cpu import attention_kernel
from moe_train.kernels.varlen import Sequences
from moe_train.layers.linear import linear

# All but cuDNN's, which plans on the host for each new shape: 9 ms per call and again in backward on an H200, where the
# kernels of an update take 40 ms in all. Varying sentence lengths make new shapes all the time.
_KERNELS = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)


# torch's bf16 backward on the CPU takes 1.2 to 6 times as long as its fp32 one with 16 to 64 keys, casts included, and
# as long with 256 (measured with 2,048 and 8,192 tokens, heads of 56, 64 and 128, in one thread).
_MAX_KEYS_FOR_FP32_BACKWARD = 128


def _split(projected: Tensor, parts: int, heads: int) -> tuple[Tensor, ...]:
    """[B, S, parts · d] → ``parts`` views [B, H, S, d / H]; packed rows [R, parts · d] → [R, H, d / H]."""
    if projected.dim() == 2:
        return tuple(projected.unflatten(1, (parts, heads, -1)).unbind(1))
    batch, length, width = projected.shape
    return projected.view(batch, length, parts, heads, width // (parts * heads)).permute(2, 0, 3, 1, 4).unbind(0)


class _Attention(nn.Module):
    """Base class. Initialised as in fairseq: Xavier, with a gain of 1/√2 for query, key and value."""

    computes_in_16_bits: ClassVar[bool] = True

    def __init__(self, dim: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.dim, self.heads, self.dropout = dim, heads, dropout
        self.query_bias = nn.Parameter(torch.empty(dim))
        self.value_bias = nn.Parameter(torch.empty(dim))
        self.out = nn.Linear(dim, dim)
        for bias in (self.query_bias, self.value_bias):
            nn.init.uniform_(bias, -1 / math.sqrt(dim), 1 / math.sqrt(dim))
        nn.init.xavier_uniform_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def _stacked(self, parts: int) -> nn.Parameter:
        weight = torch.empty(parts * self.dim, self.dim)
        for part in weight.chunk(parts):
            nn.init.xavier_uniform_(part, gain=1 / math.sqrt(2))
        return nn.Parameter(weight)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        """q [B, H, S, d/H], k and v [B, H, K, d/H] → [B, S, d]; ``mask`` [.., S, K], True: visible."""
        dropout = self.dropout if self.training else 0.0
        if _prefers_fp32_backward(q, k, dropout):
            attended: Tensor = _Fp32Backward.apply(q, k, v, mask, causal)  # type: ignore[no-untyped-call]
        else:
            with sdpa_kernel(list(_KERNELS)) if q.device.type == "cuda" else nullcontext():
                attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal)
        return linear(attended.transpose(1, 2).flatten(2), self.out.weight, self.out.bias)

    def attend_projections(self, projected: tuple[Tensor, ...], mask: Tensor | None, causal: bool = False) -> Tensor:
        """:meth:`attend` for what the projections give: ([B, S, 3d],), or ([B, S, d], [B, K, 2d])."""
        query, key = projected[0], projected[-1]
        by_key = mask is None or mask.shape == (key.shape[0], 1, 1, key.shape[1])
        dropped = self.dropout and self.training
        if torch.is_grad_enabled() and by_key and not dropped and attention_kernel.is_supported(query, key):
            mask = None if mask is None else mask.flatten(1)
            attended: Tensor = _PackedAttention.apply(mask, causal, self.heads, *projected)  # type: ignore[no-untyped-call]
            return linear(attended, self.out.weight, self.out.bias)
        q, k, v = (part for x in projected for part in _split(x, x.shape[-1] // self.dim, self.heads))
        return self.attend(q, k, v, mask, causal)

    def attend_rows(
        self, q: Tensor, k: Tensor, v: Tensor, queries: Sequences, keys: Sequences, causal: bool = False
    ) -> Tensor:
        """q [R, H, d/H], k and v [K, H, d/H] → [R, d]; each query sequence attends to the key sequence of its number.

        Raises:
            ValueError: there is dropout, for which there is no kernel.
        """
        if self.dropout and self.training:
            raise ValueError("attention over packed rows has no dropout: set model.attention_dropout=0")
        starts, longest = (queries.starts, keys.starts), (queries.longest, keys.longest)
        attended = queries.attend(q, k, v, *starts, *longest, window_size=(-1, 0) if causal else (-1, -1))
        return linear(attended.flatten(1), self.out.weight, self.out.bias)


class SelfAttention(_Attention):
    """Self-attention; query, key and value are computed in one product."""

    def __init__(self, dim: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__(dim, heads, dropout)
        self.qkv_weight = self._stacked(3)

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        """x [B, S, d] → query, key, value, each [B, H, S, d/H]."""
        return _split(self._project(x), 3, self.heads)

    def _project(self, x: Tensor) -> Tensor:
        bias = torch.cat((self.query_bias, torch.zeros_like(self.query_bias), self.value_bias))
        return linear(x, self.qkv_weight, bias)

    def forward(self, x: Tensor, mask: Tensor | Sequences | None = None, causal: bool = False) -> Tensor:
        """x [B, S, d] → [B, S, d], or with sequences as ``mask`` packed rows [R, d] → [R, d].

        ``causal``: position i attends to 0 .. i only (then ``mask`` must be no tensor).
        """
        if isinstance(mask, Sequences):
            q, k, v = self.project(x)
            return self.attend_rows(q, k, v, mask, mask, causal)
        return self.attend_projections((self._project(x),), mask, causal)


class CrossAttention(_Attention):
    """Attention over the encoder's output, whose keys and values can be computed once and kept."""

    def __init__(self, dim: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__(dim, heads, dropout)
        self.query_weight = self._stacked(1)
        self.key_value_weight = self._stacked(2)

    def project_query(self, x: Tensor) -> Tensor:
        """x [B, S, d] → [B, H, S, d/H]."""
        return _split(self._project_query(x), 1, self.heads)[0]

    def _project_query(self, x: Tensor) -> Tensor:
        return linear(x, self.query_weight, self.query_bias)

    def project_memory(self, memory: Tensor) -> tuple[Tensor, ...]:
        """memory [B, K, d] → key, value, each [B, H, K, d/H]."""
        return _split(self._project_memory(memory), 2, self.heads)

    def _project_memory(self, memory: Tensor) -> Tensor:
        bias = torch.cat((torch.zeros_like(self.value_bias), self.value_bias))
        return linear(memory, self.key_value_weight, bias)

    def forward(
        self, x: Tensor, memory: Tensor, mask: Tensor | Sequences | None = None, queries: Sequences | None = None
    ) -> Tensor:
        """x [B, S, d] over memory [B, K, d] → [B, S, d]; ``mask`` [B, 1, 1, K], true = visible.

        Packed rows: x [R, d] with ``queries``, memory [K, d] with its sequences as ``mask``.
        """
        if isinstance(mask, Sequences):
            assert queries is not None
            keys, values = self.project_memory(memory)
            return self.attend_rows(self.project_query(x), keys, values, queries, mask)
        return self.attend_projections((self._project_query(x), self._project_memory(memory)), mask)


def _prefers_fp32_backward(q: Tensor, k: Tensor, dropout: float) -> bool:
    return (
        q.device.type == "cpu"
        and q.dtype == torch.bfloat16
        and torch.is_grad_enabled()
        and q.requires_grad
        and not dropout  # it has no fused kernel
        and q.numel() > 0
        and 0 < k.shape[2] <= _MAX_KEYS_FOR_FP32_BACKWARD
    )


class _PackedAttention(torch.autograd.Function):
    """The C kernel on projections as they are: [B, S, 3d], or [B, S, d] and [B, K, 2d]."""

    @staticmethod
    def forward(ctx: Any, mask: Tensor | None, causal: bool, heads: int, *projected: Tensor) -> Tensor:
        ctx.causal, ctx.heads = causal, heads
        out, log_sums = attention_kernel.attend(*_parts(projected), mask, causal, heads)
        ctx.save_for_backward(mask, out, log_sums, *projected)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        mask, out, log_sums, *projected = ctx.saved_tensors
        into = tuple(map(torch.empty_like, projected))
        attention_kernel.gradients(
            _parts(into), grad, out, log_sums, _parts(tuple(projected)), mask, ctx.causal, ctx.heads
        )
        return None, None, None, *into


def _parts(projected: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Views of query, key and value, [B, .., d]."""
    if len(projected) == 1:
        query, key, value = projected[0].chunk(3, -1)
        return query, key, value
    key, value = projected[1].chunk(2, -1)
    return projected[0], key, value


class _Fp32Backward(torch.autograd.Function):
    """torch's fused attention on the CPU, forward in bf16 and backward in fp32."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        if mask is not None:
            mask = torch.zeros(mask.shape).masked_fill_(~mask, float("-inf"))
        attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, log_sum_exp = attend(q, k, v, 0.0, causal, attn_mask=mask)
        ctx.save_for_backward(q, k, v, out, log_sum_exp, mask)
        ctx.causal = causal
        return out  # type: ignore[no-any-return]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, log_sum_exp, mask = ctx.saved_tensors
        backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        inputs = (tensor.float() for tensor in (grad, q, k, v, out))
        gradients = backward(*inputs, log_sum_exp, 0.0, ctx.causal, attn_mask=mask)
        return *(gradient.to(q.dtype) for gradient in gradients), None, None

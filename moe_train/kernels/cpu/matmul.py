"""Matrix products of one expert, by the fastest road that torch ships for them."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from moe_train.kernels.cpu.cpu_info import processor_maker
from moe_train.kernels.cpu.huge_pages import empty

# Below this many rows BLAS, straight into its place, beats oneDNN and a copy for a weight gradient (measured).
_ONEDNN_CONTRACTION = 512

_TILE = 32  # rows and columns of the matrix units that multiply 16-bit types (AMX)
# Mean rows up to which padding costs less than a product apiece, and how much of it: measured at 128 rows, where 1.25
# pays, and at 1,024, where it does not (docs/decisions/0008).
_SMALL, _PADDING = 512, 1.3


@functools.cache
def has_onednn_linear() -> bool:
    """Whether this build of torch has the oneDNN linear that its own compiler emits."""
    return bool(torch.backends.mkldnn.is_available()) and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@functools.cache
def mkl_on_intel() -> bool:
    """Whether the BLAS behind ``torch.mm`` is MKL on a processor of its own maker."""
    return bool(torch.backends.mkl.is_available()) and processor_maker() == "GenuineIntel"


def prefers_onednn(like: Tensor) -> bool:
    """Whether oneDNN's fp32 linear serves here. Where a build lacks it, ``torch.mm`` does.

    On the CPUs measured it is 0.9 to 1.4 times as fast as the BLAS behind ``torch.mm`` where the weight stands as in
    ``nn.Linear``, and it adds bias and ReLU on the way out. (In bf16 ``torch.mm`` is oneDNN already.)
    """
    return like.device.type == "cpu" and like.dtype == torch.float32 and has_onednn_linear()


def fuses_relu(like: Tensor) -> bool:
    """Whether oneDNN's linear serves in bf16 too, for the sake of the bias and ReLU that it adds on the way out."""
    return like.device.type == "cpu" and like.dtype == torch.bfloat16 and has_onednn_linear()


def prefers_onednn_for_experts(like: Tensor) -> bool:
    """The same for experts' weights, which stand the other way round: there MKL, where it is at home, is the faster.

    Measured on 8, 32 and 64 experts: all six products of a step take 1.02 to 1.06 of ``torch.bmm``'s time by MKL, and
    1.18 to 1.30 by oneDNN's linear.
    """
    return prefers_onednn(like) and not mkl_on_intel()


def row_alignment(like: Tensor, mean_rows: float) -> int:
    """Rows per expert are padded to a multiple of this.

    oneDNN generates code for every new shape (0.7 ms each, measured) and keeps 1,024 of them; loads differ from batch
    to batch, so without rounding nearly every product of a training step would meet a new shape. A 32nd of the mean
    load wastes 1.5 % of the rows. Whole tiles spare 16-bit products their slow remainders, worth up to an eighth of
    the rows. MKL generates nothing. On a GPU, grouped products want groups that start at multiples of 16 bytes.

    Args:
        like: the rows' type and device.
        mean_rows: rows per expert.
    """
    if like.device.type == "cuda":
        return 16
    if like.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return 1
    if like.dtype == torch.float32 and not prefers_onednn_for_experts(like):
        return 1
    if like.dtype != torch.float32 and mean_rows >= 4 * _TILE:
        return _TILE
    return int(2 ** max(0, math.floor(math.log2(max(mean_rows, 1) / 32))))


def max_padding_for_batched(like: Tensor, mean_rows: float) -> float:
    """How many times the pairs the rows may be, where padding all experts alike makes one batched product of them.

    In 16-bit types a product of few rows is waiting for its weights, so that more rows cost little, and a product
    apiece costs its own overhead. In fp32 padding costs what it computes. 0: never.
    """
    batched = like.device.type == "cpu" and like.dtype == torch.bfloat16 and mean_rows <= _SMALL
    return _PADDING if batched else 0.0


def onednn_linear(x: Tensor, w: Tensor, bias: Tensor | None, relu: bool = False) -> Tensor:
    """x @ w + bias, and ReLU of it if asked for, by oneDNN. x [n, k], w [k, m], bias [m]."""
    fused = "relu" if relu else "none"
    return torch.ops.mkldnn._linear_pointwise(x, w.t(), bias, fused, [], "")  # type: ignore[no-any-return]


def linear(x: Tensor, w: Tensor, bias: Tensor | None, relu: bool = False) -> Tensor:
    """x @ w + bias, and ReLU of it if asked for. x [n, k], w [k, m], bias [m]."""
    if prefers_onednn_for_experts(x) or (relu and fuses_relu(x)):
        return onednn_linear(x, w, bias, relu)
    y = torch.mm(x, w) if bias is None else torch.addmm(bias, x, w)
    return y.relu_() if relu else y


def linear_into(out: Tensor, x: Tensor, w: Tensor, bias: Tensor | None = None) -> None:
    """out [n, m] = x @ w + bias."""
    if prefers_onednn_for_experts(x):
        out.copy_(onednn_linear(x, w, bias))
    elif bias is None:
        torch.mm(x, w, out=out)
    else:
        torch.addmm(bias, x, w, out=out)


def weight_grad_into(out: Tensor, x: Tensor, grad: Tensor) -> None:
    """out [k, m] = xᵀ @ grad, the gradient of a weight. x [n, k], grad [n, m]."""
    if prefers_onednn_for_experts(x) and x.shape[0] >= _ONEDNN_CONTRACTION:
        out.copy_(onednn_linear(x.t(), grad, None))
    else:
        torch.mm(x.t(), grad, out=out)


def batched(x: Tensor, w: Tensor, out: Tensor | None = None) -> Tensor:
    """x @ w of every expert at once, into ``out`` if given. x [E, n, k], w [E, k, m]."""
    return torch.bmm(x, w, out=empty((*x.shape[:2], w.shape[2]), x) if out is None else out)


def batched_linear(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    """x @ w + bias of every expert at once. x [E, n, k], w [E, k, m], bias [E, m]."""
    if bias is None:
        return batched(x, w)
    return torch.baddbmm(bias.unsqueeze(1), x, w, out=empty((*x.shape[:2], w.shape[2]), x))


def bag_sums(x: Tensor, rows: Tensor, starts: Tensor) -> Tensor:
    """Sums of rows of x [n, m], in fp32 inside: bag i holds ``rows[starts[i]:starts[i + 1]]``. Gives [bags, m].

    The gradient of biases. That kernel is several times as fast as ``sum`` or a product with ones (measured).
    """
    if rows.numel() == 0:
        return x.new_zeros(starts.shape[0], x.shape[1])
    sums: Tensor = torch.embedding_bag(x, rows, starts, False, 0, False, None)[0]
    return sums

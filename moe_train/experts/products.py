"""Matrix products of one expert, by the fastest road that torch ships for them."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

# Below this many rows BLAS, straight into its place, beats oneDNN and a copy for a weight gradient (measured).
_ONEDNN_CONTRACTION = 512


@functools.cache
def has_onednn_linear() -> bool:
    """Whether this build of torch has the oneDNN linear that its own compiler emits."""
    return bool(torch.backends.mkldnn.is_available()) and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def prefers_onednn(like: Tensor) -> bool:
    """Whether oneDNN's fp32 linear serves here.

    On the CPUs measured it is 1.0 to 1.4 times as fast as the BLAS behind ``torch.mm``, and it adds bias and ReLU on
    the way out. (In bf16 ``torch.mm`` is oneDNN already.) Where a build lacks it, ``torch.mm`` serves.
    """
    return like.device.type == "cpu" and like.dtype == torch.float32 and has_onednn_linear()


def fuses_relu(like: Tensor) -> bool:
    """Whether oneDNN's linear serves in bf16 too, for the sake of the bias and ReLU that it adds on the way out."""
    return like.device.type == "cpu" and like.dtype == torch.bfloat16 and has_onednn_linear()


def row_alignment(like: Tensor, mean_rows: float) -> int:
    """Rows per expert are padded to a multiple of this.

    oneDNN generates code for every new shape (0.7 ms each, measured) and keeps 1,024 of them; loads differ from batch
    to batch, so without rounding nearly every product of a training step would meet a new shape. A 32nd of the mean
    load wastes 1.5 % of the rows. On a GPU, grouped products want groups that start at multiples of 16 bytes.

    Args:
        like: the rows' type and device.
        mean_rows: rows per expert.
    """
    if like.device.type == "cuda":
        return 16
    if like.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return 1
    return int(2 ** max(0, math.floor(math.log2(max(mean_rows, 1) / 32))))


def affine(x: Tensor, w: Tensor, bias: Tensor | None, relu: bool = False) -> Tensor:
    """x @ w + bias, and ReLU of it if asked for. x [n, k], w [k, m], bias [m]."""
    if prefers_onednn(x) or (relu and fuses_relu(x)):
        fused = "relu" if relu else "none"
        return torch.ops.mkldnn._linear_pointwise(x, w.t(), bias, fused, [], "")  # type: ignore[no-any-return]
    y = torch.mm(x, w) if bias is None else torch.addmm(bias, x, w)
    return y.relu_() if relu else y


def affine_into(out: Tensor, x: Tensor, w: Tensor, bias: Tensor | None = None) -> None:
    """out [n, m] = x @ w + bias."""
    if prefers_onednn(x):
        out.copy_(affine(x, w, bias))
    elif bias is None:
        torch.mm(x, w, out=out)
    else:
        torch.addmm(bias, x, w, out=out)


def outer_into(out: Tensor, x: Tensor, grad: Tensor) -> None:
    """out [k, m] = xᵀ @ grad, the gradient of a weight. x [n, k], grad [n, m]."""
    if prefers_onednn(x) and x.shape[0] >= _ONEDNN_CONTRACTION:
        out.copy_(torch.ops.mkldnn._linear_pointwise(x.t(), grad.t(), None, "none", [], ""))
    else:
        torch.mm(x.t(), grad, out=out)


def bag_sums(x: Tensor, rows: Tensor, starts: Tensor) -> Tensor:
    """Sums of rows of x [n, m], in fp32 inside: bag i holds ``rows[starts[i]:starts[i + 1]]``. Gives [bags, m].

    The gradient of biases. That kernel is several times as fast as ``sum`` or a product with ones (measured).
    """
    if rows.numel() == 0:
        return x.new_zeros(starts.shape[0], x.shape[1])
    sums: Tensor = torch.embedding_bag(x, rows, starts, False, 0, False, None)[0]
    return sums

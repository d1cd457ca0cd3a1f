"""Matrix products of experts on the CPU, by the fastest implementation that torch provides."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from moe_train.kernels.cpu.cpu_info import processor_vendor
from moe_train.kernels.cpu.huge_pages import empty

# With fewer rows, a weight gradient by BLAS directly into its place is faster than by oneDNN with a copy (measured).
_MIN_ONEDNN_WEIGHT_GRAD_ROWS = 512

_TILE = 32  # rows and columns of the matrix units for 16-bit types (AMX)
# Up to this many mean rows, and up to this factor, padding for one batched product costs less than one product per
# expert: measured at 128 rows, where a factor of 1.25 pays, and at 1,024, where it does not (docs/decisions/0008).
_MAX_BATCHED_ROWS, _MAX_PADDING = 512, 1.3


@functools.cache
def has_onednn_linear() -> bool:
    """Whether this build of torch has oneDNN's linear operator, which torch.compile uses."""
    return bool(torch.backends.mkldnn.is_available()) and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@functools.cache
def mkl_on_intel() -> bool:
    """Whether the BLAS behind ``torch.mm`` is MKL, on an Intel processor."""
    return bool(torch.backends.mkl.is_available()) and processor_vendor() == "GenuineIntel"


def prefers_onednn(like: Tensor) -> bool:
    """Whether to use oneDNN's linear: fp32 on the CPU, if this build of torch has it.

    On the CPUs measured it is 0.9 to 1.4 times as fast as the BLAS behind ``torch.mm`` for weights stored as in
    ``nn.Linear``, and it fuses bias and ReLU. (In bf16 ``torch.mm`` is oneDNN already.)
    """
    return like.device.type == "cpu" and like.dtype == torch.float32 and has_onednn_linear()


def fuses_relu(like: Tensor) -> bool:
    """Whether to use oneDNN's linear in bf16, for its fused bias and ReLU."""
    return like.device.type == "cpu" and like.dtype == torch.bfloat16 and has_onednn_linear()


def prefers_onednn_for_experts(like: Tensor) -> bool:
    """:func:`prefers_onednn` for experts' weights, which are stored transposed: there MKL on Intel is faster.

    Measured with 8, 32 and 64 experts: all six products of a step take 1.02 to 1.06 times ``torch.bmm``'s time with
    MKL, and 1.18 to 1.30 times with oneDNN's linear.
    """
    return prefers_onednn(like) and not mkl_on_intel()


def row_alignment(like: Tensor, mean_rows: float) -> int:
    """The rows of each expert are padded to a multiple of this.

    oneDNN generates code for every new shape (0.7 ms each, measured) and caches 1,024 of them; loads differ from batch
    to batch, so without rounding nearly every product of a training step would have a new shape. Rounding to a 32nd of
    the mean load wastes 1.5 % of the rows. 16-bit products are slow on partial tiles, so padding up to an eighth of the
    rows pays there. MKL generates no code. On a GPU it is 16 for products that are not
    grouped; grouped ones need no alignment.

    Args:
        like: gives type and device of the rows.
        mean_rows: mean rows per expert.
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
    """Maximum ratio of rows to pairs for padding all experts to the same size, to use one batched product. 0: never.

    In 16-bit types a product of few rows waits for its weights, so more rows cost little, while each separate product
    has overhead. In fp32 the time is proportional to the rows.
    """
    batched = like.device.type == "cpu" and like.dtype == torch.bfloat16 and mean_rows <= _MAX_BATCHED_ROWS
    return _MAX_PADDING if batched else 0.0


def onednn_linear(x: Tensor, w: Tensor, bias: Tensor | None, relu: bool = False) -> Tensor:
    """x @ w + bias, optionally with ReLU, by oneDNN. x [n, k], w [k, m], bias [m]."""
    fused = "relu" if relu else "none"
    return torch.ops.mkldnn._linear_pointwise(x, w.t(), bias, fused, [], "")  # type: ignore[no-any-return]


def linear(x: Tensor, w: Tensor, bias: Tensor | None, relu: bool = False) -> Tensor:
    """x @ w + bias, optionally with ReLU. x [n, k], w [k, m], bias [m]."""
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
    if prefers_onednn_for_experts(x) and x.shape[0] >= _MIN_ONEDNN_WEIGHT_GRAD_ROWS:
        out.copy_(onednn_linear(x.t(), grad, None))
    else:
        torch.mm(x.t(), grad, out=out)


def batched(x: Tensor, w: Tensor, out: Tensor | None = None) -> Tensor:
    """x @ w of all experts in one product, into ``out`` if given. x [E, n, k], w [E, k, m]."""
    return torch.bmm(x, w, out=empty((*x.shape[:2], w.shape[2]), x) if out is None else out)


def batched_linear(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    """x @ w + bias of all experts in one product. x [E, n, k], w [E, k, m], bias [E, m]."""
    if bias is None:
        return batched(x, w)
    return torch.baddbmm(bias.unsqueeze(1), x, w, out=empty((*x.shape[:2], w.shape[2]), x))


def bag_sums(x: Tensor, rows: Tensor, starts: Tensor) -> Tensor:
    """[bags, m]: bag i is the sum of the rows ``rows[starts[i]:starts[i + 1]]`` of x [n, m], accumulated in fp32.

    Computes the gradients of biases; several times as fast as ``sum`` or a product with ones (measured).
    """
    if rows.numel() == 0:
        return x.new_zeros(starts.shape[0], x.shape[1])
    sums: Tensor = torch.embedding_bag(x, rows, starts, False, 0, False, None)[0]
    return sums

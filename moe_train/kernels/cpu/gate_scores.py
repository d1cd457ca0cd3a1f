"""Scores of bf16 rows by an fp32 gate, and softmax over few experts, by C kernels (gate_scores.c), with gradients."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_train.kernels.cpu.compile import library, library_for
from moe_train.kernels.cpu.thread_pool import parallel_for, parallel_ranges

_SOURCE = Path(__file__).with_name("gate_scores.c")
_MAX_EXPERTS = 16  # with more, the products of BLAS are faster, conversions included (measured)
_ROWS = 1024  # sums of this many rows are added up at a time, so that a gradient does not depend on the threads
_COST = 4.0  # FLOPs of a matrix product in the time that one multiplication and addition takes here
_SOFTMAX_COST = 2000.0  # … that one row of a softmax takes


def is_supported(x: Tensor, weight: Tensor) -> bool:
    """Whether :func:`scores` can be used for x [T, d] and weight [E, d] in this process."""
    return (
        weight.dtype == torch.float32
        and weight.shape[0] <= _MAX_EXPERTS
        and x.dim() == 2
        and library_for(x, _SOURCE) is not None
    )


def scores(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """[T, E] fp32: x weightᵀ (+ bias), of x [T, d] bf16, weight [E, d] and bias [E] fp32; accumulated in fp32.

    Raises:
        ValueError: shapes or types do not match.
    """
    wanted = {"x": (x.shape[0], weight.shape[1]), "weight": tuple(weight.shape), "bias": (weight.shape[0],)}
    types = {"x": torch.bfloat16, "weight": torch.float32, "bias": torch.float32}
    for tensor, (name, shape) in zip((x, weight, bias), wanted.items(), strict=True):
        if tensor is not None and (tensor.shape != shape or tensor.dtype != types[name]):
            raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, not {types[name]} {shape}")
    return _Scores.apply(x, weight, bias)  # type: ignore[no-any-return, no-untyped-call]


def softmax(scores: Tensor) -> Tensor:
    """Softmax of scores [..., E] over the experts; by the kernel for fp32 on the CPU and up to 16 experts."""
    few = scores.shape[-1] <= _MAX_EXPERTS and scores.dtype == torch.float32
    if few and library_for(scores, _SOURCE, torch.float32) is not None:
        return _Softmax.apply(scores)  # type: ignore[no-any-return, no-untyped-call]
    return torch.softmax(scores, dim=-1)


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor) -> Tensor:
        out = _by_rows("moe_gate_softmax", scores)
        ctx.save_for_backward(out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _by_rows("moe_gate_softmax_gradient", grad, *ctx.saved_tensors)


def _by_rows(name: str, *inputs: Tensor) -> Tensor:
    """Calls a kernel on all rows of inputs [..., E]."""
    inputs = tuple(tensor.contiguous() for tensor in inputs)
    experts = inputs[0].shape[-1]
    rows = inputs[0].numel() // experts
    out, function = torch.empty_like(inputs[0]), _functions()[name]
    pointers = [tensor.data_ptr() for tensor in (out, *inputs)]
    parallel_ranges(lambda start, end: function(*pointers, start, end, experts), rows, _SOFTMAX_COST)
    return out


class _Scores(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        x, weight = x.contiguous(), weight.contiguous()
        ctx.save_for_backward(x, weight)
        ctx.biased = bias is not None
        out = weight.new_empty(x.shape[0], weight.shape[0])
        function = _functions()["moe_gate_scores"]
        pointers = [None if tensor is None else tensor.data_ptr() for tensor in (out, x, weight, bias)]
        _by_parts(lambda part, start, end: function(*pointers, start, end, *reversed(weight.shape)), x, weight)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        grad = grad.contiguous()
        by_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        parts = -(-x.shape[0] // _ROWS)
        by_weight = weight.new_zeros(parts, *weight.shape) if ctx.needs_input_grad[1] else None
        function = _functions()["moe_gate_gradients"]
        first, *others = (None if tensor is None else tensor.data_ptr() for tensor in (by_x, grad, x, weight))

        def work(part: int, start: int, end: int) -> None:
            sums = None if by_weight is None else by_weight[part].data_ptr()
            function(first, sums, *others, start, end, *reversed(weight.shape))

        _by_parts(work, x, weight)
        by_bias = grad.sum(0) if ctx.biased and ctx.needs_input_grad[2] else None
        return by_x, None if by_weight is None else by_weight.sum(0), by_bias


def _by_parts(work: Callable[[int, int, int], None], x: Tensor, weight: Tensor) -> None:
    """Calls ``work(part, start, end)`` on parts of the rows, in several threads if that is faster."""
    rows = x.shape[0]
    starts = range(0, rows, _ROWS)

    def call(parts: Iterable[int]) -> None:
        for part in parts:
            work(part, starts[part], min(starts[part] + _ROWS, rows))

    parallel_for(call, [min(_ROWS, rows - start) for start in starts], _COST * weight.numel())


@functools.cache
def _functions() -> Mapping[str, Callable[..., None]]:
    kernels = library(_SOURCE)
    assert kernels is not None
    functions = {  # pointers; then the rows, d (for scores) and E
        "moe_gate_scores": (4, 4),
        "moe_gate_gradients": (5, 4),
        "moe_gate_softmax": (2, 3),
        "moe_gate_softmax_gradient": (3, 3),
    }
    for name, (pointers, sizes) in functions.items():
        function = getattr(kernels, name)
        function.argtypes, function.restype = [ctypes.c_void_p] * pointers + [ctypes.c_long] * sizes, None
    return {name: getattr(kernels, name) for name in functions}

"""Packed weights, and lists of stages that decoder.c runs: products, norms and attention of a decoder's step."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_train.kernels.cpu import amx_mlp
from moe_train.kernels.cpu.compile import library_for
from moe_train.kernels.cpu.thread_pool import parallel_for

WeightFormat = Literal["fp32", "bf16", "int8"]

_SOURCE = Path(__file__).with_name("decoder.c")
_KINDS = ("embed", "product", "norm", "self_attention", "cross_attention")  # as in decoder.c
_FORMATS: tuple[WeightFormat, ...] = ("fp32", "bf16", "int8")
_PANEL, _TILE_ROWS = 32, 16  # outputs of a panel, and of a tile
_ROW_BLOCK = 32  # rows of activations are padded to a multiple

_size, _pointer, _float = ctypes.c_long, ctypes.c_void_p, ctypes.c_float


class Stage(ctypes.Structure):
    """``Stage`` of decoder.c."""

    _fields_ = [
        *((name, _size) for name in ("kind", "format", "inputs", "outputs")),
        *((name, _pointer) for name in ("source", "to", "weight", "bias", "scale", "norm", "shift", "keys", "values")),
        *((name, _size) for name in ("relu", "add")),
        *((name, _float) for name in ("factor", "eps")),
    ]


class State(ctypes.Structure):
    """``State`` of decoder.c."""

    _fields_ = [
        *((n, _size) for n in ("sentences", "beam", "position", "heads", "dim", "room", "slots", "threads")),
        *((name, _pointer) for name in ("place", "table", "source_start", "source_length", "token")),
    ]


@dataclass(frozen=True)
class PackedWeight:
    """A matrix [outputs, inputs] in the order in which decoder.c reads it; ``scale`` [outputs] of int8 values."""

    format: WeightFormat
    inputs: int
    outputs: int
    values: Tensor
    scale: Tensor | None = None


def is_supported(like: Tensor) -> bool:
    """Whether the kernels can be used for fp32 tensors on the device of ``like`` in this process."""
    if like.dtype != torch.float32:
        return False
    half = like.new_empty(0, dtype=torch.bfloat16)
    return amx_mlp.is_supported(half) and library_for(half, _SOURCE) is not None


def pack(weight: Tensor, format: WeightFormat) -> PackedWeight:
    """The packed form of a weight [outputs, inputs] fp32."""
    outputs, inputs = weight.shape
    panels = -(-outputs // _PANEL)
    weight, scale = weight.detach(), None
    if format == "fp32":
        rows = F.pad(weight, (0, 0, 0, panels * _PANEL - outputs)).view(panels, _PANEL, inputs)
        return PackedWeight(format, inputs, outputs, rows.transpose(1, 2).contiguous())
    together = 2 if format == "bf16" else 4  # numbers of one output that are neighbours in a tile
    depth = -(-inputs // (_TILE_ROWS * together))
    if format == "int8":
        scale = (weight.abs().amax(1) / 127).clamp_(min=torch.finfo(torch.float32).tiny)
        weight = (weight / scale.unsqueeze(1)).round_()
    padded = F.pad(weight, (0, depth * _TILE_ROWS * together - inputs, 0, panels * _PANEL - outputs))
    tiles = padded.view(panels, 2, _TILE_ROWS, depth, _TILE_ROWS, together).permute(0, 3, 1, 4, 2, 5)
    values = tiles.to(torch.bfloat16 if format == "bf16" else torch.int8).contiguous()
    return PackedWeight(format, inputs, outputs, values, scale)


class Program:
    """Stages that run one after another.

    All tensors are fp32 and contiguous; they are kept, and read and written at each :meth:`run`.

    Args:
        rows: most rows N that any run has.
    """

    def __init__(self, rows: int) -> None:
        self._rows = rows
        self._stages: list[Stage] = []
        self._kept: list[Tensor] = []
        self._flops = 0.0

    def embed(self, to: Tensor, table: Tensor, positions: Tensor, factor: float) -> None:
        """to [N, d] = factor · table[token] + positions[position]."""
        self._add("embed", outputs=to.shape[1], to=to, weight=table, bias=positions, factor=factor)

    def product(
        self,
        source: Tensor,
        weight: PackedWeight,
        to: Tensor,
        bias: Tensor | None = None,
        norm: torch.nn.LayerNorm | None = None,
        relu: bool = False,
        add: bool = False,
    ) -> None:
        """to [N, outputs] = act(norm(source) weightᵀ + bias), or added to it."""
        self._flops += 2.0 * weight.inputs * weight.outputs
        self._add(
            "product",
            norm,
            source=source,
            to=to,
            relu=int(relu),
            add=int(add),
            **_of_weight(weight, bias),
        )

    def normalise(self, x: Tensor, norm: torch.nn.LayerNorm) -> None:
        """Overwrites x [N, d] by its layer norm."""
        self._add("norm", norm, outputs=x.shape[1], source=x, to=x)

    def self_attention(self, qkv: Tensor, keys: Tensor, values: Tensor, to: Tensor) -> None:
        """Keeps the position's keys and values of qkv [N, 3 d] in keys and values [sentences, slots, d]; to [N, d]."""
        self._add("self_attention", source=qkv, keys=keys, values=values, to=to)

    def cross_attention(self, query: Tensor, memory: Tensor, to: Tensor) -> None:
        """Attention of query [N, d] over the keys and values of all sources, memory [rows, 2 d]; to [N, d]."""
        width = memory.shape[1] // 2
        self._add("cross_attention", source=query, keys=memory, values=memory[:, width:], to=to)

    def _add(self, kind: str, norm: torch.nn.LayerNorm | None = None, **fields: Tensor | float | None) -> None:
        if norm is not None:
            fields |= {"norm": norm.weight.detach(), "shift": norm.bias.detach(), "eps": norm.eps}
        self._kept += [value for value in fields.values() if isinstance(value, Tensor)]
        self._stages.append(_stage(kind, **fields))

    def run(self, state: State) -> None:
        """Runs all stages, in torch's number of threads where that pays."""
        if not self._stages or not state.sentences:
            return
        stages, scratch, progress = self._ready
        state.threads = len(scratch)
        ctypes.memset(progress, 0, ctypes.sizeof(progress))

        def work(numbers: Iterable[int]) -> None:
            for number in numbers:
                _library().moe_run_stages(
                    ctypes.byref(stages), ctypes.byref(progress), len(stages), ctypes.byref(state), *scratch[number][1:]
                )

        rows = state.sentences * state.beam
        parallel_for(work, [rows] * len(scratch), self._flops / len(scratch))

    @functools.cached_property
    def _ready(self) -> tuple[ctypes.Array[Stage], list[tuple[Tensor, int, int, int]], ctypes.Array[ctypes.c_long]]:
        """The stages as an array, each thread's scratch memory with its addresses, and the counters."""
        widest = -(-max(stage.inputs for stage in self._stages) // 64) * 64
        rows = -(-self._rows // _ROW_BLOCK) * _ROW_BLOCK
        scratch = []
        for _ in range(torch.get_num_threads()):
            memory = torch.empty(rows * widest + rows + widest)
            start = memory.data_ptr()
            scales = start + 4 * rows * widest
            scratch.append((memory, start, scales, scales + 4 * rows))
        return (Stage * len(self._stages))(*self._stages), scratch, (ctypes.c_long * (2 * len(self._stages)))()


def _stage(kind: str, **fields: Tensor | float | None) -> Stage:
    stage = Stage(kind=_KINDS.index(kind))
    for name, value in fields.items():
        if value is not None:
            setattr(stage, name, value.data_ptr() if isinstance(value, Tensor) else value)
    return stage


def _of_weight(weight: PackedWeight, bias: Tensor | None) -> dict[str, Tensor | float | None]:
    shape = {"format": _FORMATS.index(weight.format), "inputs": weight.inputs, "outputs": weight.outputs}
    return {**shape, "weight": weight.values, "scale": weight.scale, "bias": bias}


class PackedExperts:
    """Feed-forwards of E experts with ReLU.

    Args:
        first, second: weights of each expert, [h, d] and [d, h].
        first_bias, second_bias: [E, h] and [E, d], contiguous; None: no biases.
    """

    def __init__(
        self,
        first: Sequence[PackedWeight],
        first_bias: Tensor | None,
        second: Sequence[PackedWeight],
        second_bias: Tensor | None,
    ) -> None:
        self._kept = first, first_bias, second, second_bias
        self._dim, self._hidden = first[0].inputs, first[0].outputs
        self._stages = [
            (_stage("product", relu=1, **_of_weight(one, b1)), _stage("product", **_of_weight(two, b2)))
            for one, two, b1, b2 in zip(
                first,
                second,
                first_bias if first_bias is not None else [None] * len(first),
                second_bias if second_bias is not None else [None] * len(first),
                strict=True,
            )
        ]

    def run(self, x: Tensor, counts: Sequence[int]) -> Tensor:
        """x [N, d] in the order of experts, ``counts[e]`` rows each → y [N, d]."""
        y, dim = torch.empty_like(x), self._dim
        starts = [0, *accumulate(counts)]
        largest = -(-max(counts) // _ROW_BLOCK) * _ROW_BLOCK
        widest = -(-max(dim, self._hidden) // 64) * 64

        def work(experts: Iterable[int]) -> None:
            scratch = torch.empty(largest * (widest + self._hidden + 1))
            hidden = scratch.data_ptr() + 4 * largest * widest
            for expert in experts:
                offset = 4 * dim * starts[expert]
                first, second = self._stages[expert]
                _library().moe_run_expert(
                    ctypes.byref(first),
                    ctypes.byref(second),
                    counts[expert],
                    x.data_ptr() + offset,
                    hidden,
                    y.data_ptr() + offset,
                    scratch.data_ptr(),
                    hidden + 4 * largest * self._hidden,
                )

        parallel_for(work, counts, 4.0 * dim * self._hidden)
        return y


def continue_hypotheses(state: State, rows: Tensor | None, sentences: int) -> None:
    """Hypothesis i continues the former ``rows[i]``, int64 [sentences · beam] (None: itself), and gets a free slot.

    Raises:
        ValueError: a hypothesis continues one of another sentence than its neighbours, or sentences changed order.
    """
    old = torch.empty(state.beam * max(state.position, 1), dtype=torch.int32)
    used = torch.empty(state.slots, dtype=torch.int8)
    rows = None if rows is None else rows.contiguous()
    address = None if rows is None else rows.data_ptr()
    found = _library().moe_continue(ctypes.byref(state), address, sentences, old.data_ptr(), used.data_ptr())
    if found < 0:
        raise ValueError(
            "the beams of one sentence must continue hypotheses of one sentence, in the order of sentences"
        )


@functools.cache
def _library() -> ctypes.CDLL:
    half = torch.empty(0, dtype=torch.bfloat16)
    found = library_for(half, _SOURCE)
    assert found is not None and amx_mlp.is_supported(half)  # which asks for the matrix unit
    found.moe_run_stages.argtypes = [_pointer, _pointer, _size, _pointer, _pointer, _pointer, _pointer]
    found.moe_run_stages.restype = None
    found.moe_run_expert.argtypes = [_pointer, _pointer, _size, *[_pointer] * 5]
    found.moe_run_expert.restype = None
    found.moe_continue.argtypes = [_pointer, _pointer, _size, _pointer, _pointer]
    found.moe_continue.restype = _size
    return found


def addresses(**tensors: Tensor) -> dict[str, int]:
    """Fields of :class:`State`; the caller keeps the tensors."""
    return {name: tensor.data_ptr() for name, tensor in tensors.items()}

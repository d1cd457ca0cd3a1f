"""The best continuations at a step of beam search by a C kernel (best_continuations.c)."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from moe_train.kernels.cpu.compile import library_for
from moe_train.kernels.cpu.thread_pool import parallel_ranges

_SOURCE = Path(__file__).with_name("best_continuations.c")
_BLOCK = 64  # as in best_continuations.c
_COST = 100.0  # FLOPs of a matrix product in the time that one logit takes here

_size, _pointer = ctypes.c_long, ctypes.c_void_p


class Choice(ctypes.Structure):
    """``Choice`` of best_continuations.c: which symbols may be chosen. ``count``: candidates of a sentence."""

    _fields_ = [
        *((name, _size) for name in ("vocabulary", "beam", "count", "pad", "unk", "eos")),
        ("unk_penalty", ctypes.c_float),
        ("may_end", _size),
    ]


def is_supported(logits: Tensor) -> bool:
    """Whether the kernel can be used for these logits in this process."""
    half = logits.new_empty(0, dtype=torch.bfloat16)
    return logits.dtype == torch.float32 and logits.is_contiguous() and library_for(half, _SOURCE) is not None


def search(
    logits: Tensor, scores: Tensor, must_end: Tensor | None, choice: Choice
) -> tuple[Tensor, Tensor, Tensor, bool]:
    """Score fp32, token and beam int64 [B, count] of the best continuations, best first, and whether all are finite.

    Args:
        logits: [B · k, V] fp32, contiguous; they are overwritten.
        scores: [B, k] summed log-probabilities so far; -inf for an unused beam.
        must_end: [B] bool, sentences whose hypotheses all end now; None: none.

    Where fewer can be chosen, the last ones have the score -inf and the padding symbol.
    """
    sentences = scores.shape[0]
    scores, must_end = scores.contiguous(), None if must_end is None else must_end.contiguous()
    score = scores.new_empty(sentences, choice.count)
    token, beam = torch.empty(2, sentences, choice.count, dtype=torch.int64).unbind(0)
    ends = None if must_end is None else must_end.data_ptr()
    sound: list[int] = []
    function, blocks = _function(), -(-choice.vocabulary // _BLOCK)

    def call(start: int, end: int) -> None:
        largest = torch.empty(blocks)
        tensors = (tensor.data_ptr() for tensor in (score, token, beam, largest))
        given = logits.data_ptr(), scores.data_ptr(), ends, ctypes.byref(choice)
        sound.append(function(*given, *tensors, start, end))

    parallel_ranges(call, sentences, _COST * choice.vocabulary * choice.beam)
    return score, token, beam, all(sound)


@functools.cache
def _function() -> ctypes._NamedFuncPointer:
    found = library_for(torch.empty(0, dtype=torch.bfloat16), _SOURCE)
    assert found is not None
    function = found.moe_best_continuations
    function.argtypes, function.restype = [_pointer] * 8 + [_size] * 2, _size
    return function

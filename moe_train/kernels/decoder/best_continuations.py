"""A step of beam search by C kernels (best_continuations.c): the best continuations, and the beams that follow."""

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
    """Whether the kernels can be used for logits of this type and device in this process."""
    half = logits.new_empty(0, dtype=torch.bfloat16)
    return logits.dtype == torch.float32 and library_for(half, _SOURCE) is not None


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
    function, blocks = _functions().moe_best_continuations, -(-choice.vocabulary // _BLOCK)

    def call(start: int, end: int) -> None:
        largest = torch.empty(blocks)
        tensors = (tensor.data_ptr() for tensor in (score, token, beam, largest))
        given = logits.data_ptr(), scores.data_ptr(), ends, ctypes.byref(choice)
        sound.append(function(*given, *tensors, start, end))

    parallel_ranges(call, sentences, _COST * choice.vocabulary * choice.beam)
    return score, token, beam, all(sound)


class Tables(ctypes.Structure):
    """``Tables`` of best_continuations.c: hypotheses that continue, and those that have ended."""

    _fields_ = [
        *((name, _size) for name in ("beam", "eos", "step", "room", "length")),
        ("divisor", ctypes.c_float),
        *((name, _pointer) for name in ("sentence", "limit", "scores", "tokens")),
        *((name, _pointer) for name in ("ended_tokens", "ended_lengths", "ended_scores", "ended_count")),
    ]


def advance(tables: Tables, found: tuple[Tensor, Tensor, Tensor], sentences: int) -> tuple[int, Tensor, Tensor]:
    """Takes the candidates of a step (score, token and beam [sentences, 2 k]) into the tables.

    Returns:
        The number of sentences S' that are not done, which now come first in the tables; the former hypothesis that
        each of theirs continues, and its new symbol, [S' · k] int64 each.
    """
    rows, following = torch.empty(2, sentences * tables.beam, dtype=torch.int64).unbind(0)
    old = torch.empty(tables.beam * tables.room, dtype=torch.int64)
    tensors = (tensor.data_ptr() for tensor in (*found, rows, following, old))
    score, token, beam, *others = tensors
    kept = _functions().moe_advance_beams(ctypes.byref(tables), score, token, beam, sentences, *others)
    return kept, rows[: kept * tables.beam], following[: kept * tables.beam]


@functools.cache
def _functions() -> ctypes.CDLL:
    found = library_for(torch.empty(0, dtype=torch.bfloat16), _SOURCE)
    assert found is not None
    found.moe_best_continuations.argtypes = [_pointer] * 8 + [_size] * 2
    found.moe_best_continuations.restype = _size
    found.moe_advance_beams.argtypes = [*[_pointer] * 4, _size, *[_pointer] * 3]
    found.moe_advance_beams.restype = _size
    return found

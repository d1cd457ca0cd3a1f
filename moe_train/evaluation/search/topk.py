"""Selects the best continuations at a step of beam search. Shapes: B sentences, k beams, V symbols, N = B·k rows."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 64  # symbols per block of the two-stage search for the largest
_SMALL_VOCABULARY = 8 * BLOCK


class Candidates(NamedTuple):
    """The best continuations of each sentence, best first.

    Attributes:
        score: [B, 2k] fp32, summed log-probability.
        token: [B, 2k] int64.
        beam: [B, 2k] int64 in 0 .. k - 1, the beam that is continued.
    """

    score: Tensor
    token: Tensor
    beam: Tensor

    def select(self, sentences: Tensor) -> Candidates:
        """The candidates of some sentences, [S] int64."""
        return Candidates(self.score[sentences], self.token[sentences], self.beam[sentences])


def log_probabilities(logits: Tensor) -> Tensor:
    """log softmax in fp32 over the last dimension of [N, V]; fp32 logits are overwritten."""
    if logits.dtype == torch.float32 and logits.is_contiguous():
        return torch.log_softmax(logits, dim=-1, out=logits)
    return torch.log_softmax(logits, dim=-1, dtype=torch.float32)


def best_candidates(log_probs: Tensor, scores: Tensor, count: int) -> Candidates:
    """The ``count`` best continuations per sentence over all its beams.

    On a CPU, topk over k·V numbers costs more than the log softmax. The largest numbers are in the blocks with the
    largest maxima: block maxima (one vectorised pass) are ranked first, then only those blocks are searched.

    Args:
        log_probs: [N, V] fp32, contiguous.
        scores: [B, k] summed log-probabilities so far; -inf for an unused beam.
    """
    sentences, beams = scores.shape
    vocabulary = log_probs.shape[1]
    count = min(count, beams * vocabulary)
    if vocabulary < _SMALL_VOCABULARY:
        total = (log_probs.view(sentences, beams, vocabulary) + scores.unsqueeze(-1)).view(sentences, -1)
        score, flat = total.topk(count, dim=1)
    else:
        score, flat = _topk_by_blocks(log_probs, scores, count)
    beam = flat.div(vocabulary, rounding_mode="floor")
    return Candidates(score, flat - beam * vocabulary, beam)


def _topk_by_blocks(log_probs: Tensor, scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(values, indices into k·V), both [B, count]."""
    (sentences, beams), vocabulary = scores.shape, log_probs.shape[1]
    maxima = _block_maxima(log_probs).view(sentences, beams, -1)
    blocks = maxima.shape[2]
    maxima = (maxima + scores.unsqueeze(-1)).view(sentences, -1)
    chosen = maxima.topk(min(count, maxima.shape[1]), dim=1).indices
    beam = chosen.div(blocks, rounding_mode="floor")
    inside = torch.arange(BLOCK, device=scores.device)
    symbol = ((chosen - beam * blocks) * BLOCK).unsqueeze(-1) + inside
    flat = beam.unsqueeze(-1) * vocabulary + symbol.clamp(max=vocabulary - 1)
    values = log_probs.view(sentences, -1).gather(1, flat.view(sentences, -1)).view_as(flat)
    values = (values + scores.gather(1, beam).unsqueeze(-1)).masked_fill_(symbol >= vocabulary, -torch.inf)
    best, where = values.view(sentences, -1).topk(count, dim=1)
    return best, flat.view(sentences, -1).gather(1, where)


def _block_maxima(values: Tensor) -> Tensor:
    """[N, ceil(V / BLOCK)] largest value of each block of [N, V]."""
    whole = values.shape[1] // BLOCK
    maxima = values[:, : whole * BLOCK].unflatten(1, (whole, BLOCK)).amax(-1)
    rest = values[:, whole * BLOCK :]
    return maxima if rest.shape[1] == 0 else torch.cat([maxima, rest.amax(-1, keepdim=True)], dim=1)

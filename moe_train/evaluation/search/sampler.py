"""Draws continuations instead of choosing the best, by the rules of fairseq's Sampling.

A draw is a hash of (search.seed, the sentence's number, the sample, the step), as those of routers are: a sentence gets
the same samples in any batch, in any process and on any number of ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_train.config import SearchConfig
from moe_train.evaluation.search.topk import Candidates
from moe_train.routing.counter_rng import combine, hash_numbers, uniform_from

_STREAM = 7001  # distinguishes these draws from others with the same seed


class Sampler:
    """Draws of one search.

    Args:
        config: ``top_k``, ``top_p`` and ``seed``; the temperature is in the logits already.
        uids: [B] int64, a number for each sentence; None: its row.
        sentences: B.
    """

    def __init__(self, config: SearchConfig, uids: Tensor | None, sentences: int) -> None:
        self._config = config
        self._uids = torch.arange(sentences) if uids is None else uids

    def draw(self, log_probs: Tensor, scores: Tensor, sentence: Tensor, step: int) -> Candidates:
        """One continuation of each sample; the score is its log-probability among all symbols.

        Args:
            log_probs: [S · k, V] fp32 of the symbols that may follow, -inf for others.
            scores: [S, k] summed log-probabilities so far.
            sentence: [S], rows of the batch.
        """
        beams = torch.arange(scores.shape[1], device=scores.device).expand(scores.shape)
        ranked, symbols = self._allowed(log_probs)
        chances = (ranked.double() - ranked.amax(1, keepdim=True)).exp_().cumsum_(1)
        total = chances[:, -1:]
        wanted = self.uniform(sentence, beams, step).reshape(-1, 1) * total
        # Below the total even after rounding, so that a symbol of chance 0 is never drawn.
        place = torch.searchsorted(chances, wanted.minimum(total.nextafter(torch.zeros_like(total))), right=True)
        token = place if symbols is None else symbols.gather(1, place)
        score = log_probs.gather(1, token).view_as(scores) + scores
        return Candidates(score, token.view(scores.shape), beams)

    def uniform(self, sentence: Tensor, sample: Tensor, step: int) -> Tensor:
        """fp64 in [0, 1), [S, k], for sentences [S] and samples [S, k]."""
        uids = self._uids.to(sample.device)[sentence].unsqueeze(1)
        start = hash_numbers(self._config.seed, _STREAM, step)
        return uniform_from(combine(combine(start, uids), sample))

    def _allowed(self, log_probs: Tensor) -> tuple[Tensor, Tensor | None]:
        """Log-probabilities [N, n] of the symbols to draw from and the symbols; None: all in their order."""
        if self._config.top_p < 1.0:
            ranked, symbols = log_probs.sort(dim=1, descending=True)
            before = ranked.exp().cumsum_(1)[:, :-1] >= self._config.top_p  # the mass is reached without the next ones
            ranked[:, 1:].masked_fill_(before, -torch.inf)
            return ranked, symbols
        if self._config.top_k:
            found = log_probs.topk(min(self._config.top_k, log_probs.shape[1]), dim=1)
            return found.values, found.indices
        return log_probs, None

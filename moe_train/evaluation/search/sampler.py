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
_NARROW = 256  # symbols that mostly have the probability top_p together


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
        uniform = self.uniform(sentence, beams, step).reshape(-1, 1)
        token = self._draw(log_probs, uniform)
        score = log_probs.gather(1, token).view_as(scores) + scores
        return Candidates(score, token.view(scores.shape), beams)

    def _draw(self, log_probs: Tensor, uniform: Tensor) -> Tensor:
        """[N, 1] symbols. How a row is drawn does not depend on the others, not even among equal chances."""
        config, symbols = self._config, log_probs.shape[1]
        if config.top_k:
            return _drawn(*log_probs.topk(min(config.top_k, symbols), dim=1), uniform)
        if config.top_p == 1.0:
            return _inverse(log_probs, uniform)
        ranked, order = log_probs.topk(min(_NARROW, symbols), dim=1)
        wide = (ranked.exp().sum(1) < config.top_p).nonzero().squeeze(1)
        token = _drawn(_nucleus(ranked, config.top_p), order, uniform)
        if wide.numel():
            ranked, order = log_probs[wide].sort(dim=1, descending=True)
            token[wide] = _drawn(_nucleus(ranked, config.top_p), order, uniform[wide])
        return token

    def uniform(self, sentence: Tensor, sample: Tensor, step: int) -> Tensor:
        """fp64 in [0, 1), [S, k], for sentences [S] and samples [S, k]."""
        uids = self._uids.to(sample.device)[sentence].unsqueeze(1)
        start = hash_numbers(self._config.seed, _STREAM, step)
        return uniform_from(combine(combine(start, uids), sample))


def _nucleus(ranked: Tensor, mass: float) -> Tensor:
    """[N, n] log-probabilities, largest first, without those that follow when ``mass`` is reached; overwrites them."""
    reached = ranked.exp().cumsum_(1)[:, :-1] >= mass
    ranked[:, 1:].masked_fill_(reached, -torch.inf)
    return ranked


def _drawn(log_probs: Tensor, symbols: Tensor, uniform: Tensor) -> Tensor:
    """[N, 1] of the symbols [N, n] with log-probabilities [N, n] up to a constant."""
    return symbols.gather(1, _inverse(log_probs, uniform))


def _inverse(log_probs: Tensor, uniform: Tensor) -> Tensor:
    """[N, 1] places at which the distribution function of log-probabilities [N, n] exceeds ``uniform`` [N, 1]."""
    sums = (log_probs - log_probs.amax(1, keepdim=True)).exp_().cumsum(1, dtype=torch.float64)
    total = sums[:, -1:]
    # Below the total even after rounding, so that a symbol of chance 0 is never drawn.
    wanted = (uniform * total).minimum(total.nextafter(torch.zeros_like(total)))
    return torch.searchsorted(sums, wanted, right=True)

"""Hypotheses of a batch in tensors, those that continue and finished ones, without a Python loop over sentences."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Hypotheses:
    """Result of a search: up to k hypotheses for each of B sentences, best first.

    Attributes:
        tokens: [B, k, L] int64 without the end symbol, padded.
        lengths: [B, k] int64, tokens of each.
        scores: [B, k] fp32: summed log-probability (end symbol included) divided by (length + 1)^length_penalty;
            -inf where fewer than k hypotheses were found.
    """

    tokens: Tensor
    lengths: Tensor
    scores: Tensor

    def best(self) -> list[list[int]]:
        """The best hypothesis of each sentence."""
        return [row[:n] for row, n in zip(self.tokens[:, 0].tolist(), self.lengths[:, 0].tolist(), strict=True)]

    def best_scores(self) -> list[float]:
        """Its score, nats per token where the length penalty is 1."""
        return [float(s) for s in self.scores[:, 0].tolist()]


@dataclass
class Beams:
    """State of a search: S sentences that are not done, k beams each.

    ``sentence`` [S] rows of the batch, ``scores`` [S, k], ``tokens`` [S, k, room], ``limit`` [S] longest lengths;
    ``stops`` are all values of ``limit``, on the host, so that most steps need no synchronisation.
    """

    sentence: Tensor
    scores: Tensor
    tokens: Tensor
    limit: Tensor
    stops: frozenset[int]


class Finished:
    """Collects hypotheses in the order in which they end; a sentence takes the first ``beam`` of them.

    Args:
        sentences: B.
        beam: k.
        length: room for tokens per hypothesis.
    """

    def __init__(self, sentences: int, beam: int, length: int, pad: int, device: torch.device) -> None:
        self.beam = beam
        self.tokens = torch.full((sentences, beam, length), pad, dtype=torch.int64, device=device)
        self.lengths = torch.zeros((sentences, beam), dtype=torch.int64, device=device)
        self.scores = torch.full((sentences, beam), -torch.inf, device=device)
        self.count = torch.zeros(sentences, dtype=torch.int64, device=device)

    def add(self, sentence: Tensor, ended: Tensor, beams: Tensor, scores: Tensor, tokens: Tensor) -> None:
        """Adds the hypotheses that end at one step.

        Args:
            sentence: [S] index of the sentence of each row below.
            ended: [S, k] bool, best first; those above ``beam`` hypotheses of a sentence are left out.
            beams: [S, k] the beam that each hypothesis continues.
            scores: [S, k] final scores.
            tokens: [S, k, t] tokens of the beams, end symbol not included.
        """
        slots = self.count[sentence].unsqueeze(1) + ended.cumsum(1) - 1
        row, rank = (ended & (slots < self.beam)).nonzero(as_tuple=True)
        place = sentence[row], slots[row, rank]
        length = tokens.shape[2]
        self.tokens[place[0], place[1], :length] = tokens[row, beams[row, rank]]
        self.lengths[place] = length
        self.scores[place] = scores[row, rank]
        self.count[sentence] = (self.count[sentence] + ended.sum(1)).clamp(max=self.beam)

    def sorted(self) -> Hypotheses:
        """All hypotheses, best first; equal scores keep the order in which they ended."""
        scores, order = self.scores.sort(dim=1, descending=True, stable=True)
        tokens = self.tokens.gather(1, order.unsqueeze(-1).expand_as(self.tokens))
        return Hypotheses(tokens, self.lengths.gather(1, order), scores)

"""Hypotheses of a batch in tensors, those that continue and finished ones, without a Python loop over sentences."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

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
        token_scores: [B, k, L + 1] fp32, log-probability of each token and of the end symbol; None: not asked for.
    """

    tokens: Tensor
    lengths: Tensor
    scores: Tensor
    token_scores: Tensor | None = None

    def best(self) -> list[list[int]]:
        """The best hypothesis of each sentence."""
        return [row[:n] for row, n in zip(self.tokens[:, 0].tolist(), self.lengths[:, 0].tolist(), strict=True)]

    def best_scores(self) -> list[float]:
        """Its score, nats per token where the length penalty is 1."""
        return [float(s) for s in self.scores[:, 0].tolist()]

    def lists(self, count: int) -> list[list[Found]]:
        """The ``count`` best hypotheses of each sentence: fewer where fewer were found, and at least one."""
        tokens, lengths = self.tokens[:, :count].tolist(), self.lengths[:, :count].tolist()
        scores = self.scores[:, :count].tolist()
        per_token = None if self.token_scores is None else self.token_scores[:, :count].tolist()
        found = []
        for row, own in enumerate(scores):
            number = max(1, sum(score > -math.inf for score in own))
            ends = lengths[row][:number]
            given = [[]] * number if per_token is None else [per_token[row][i][: n + 1] for i, n in enumerate(ends)]
            found.append([Found(tokens[row][i][:n], own[i], given[i]) for i, n in enumerate(ends)])
        return found


class Found(NamedTuple):
    """A hypothesis: its tokens without the end, its score, and log-probabilities of tokens and end if asked for."""

    tokens: list[int]
    score: float
    token_scores: list[float]


@dataclass
class Beams:
    """State of a search: S sentences that are not done, k beams each.

    ``sentence`` [S] rows of the batch, ``scores`` [S, k], ``tokens`` [S, k, room], ``limit`` [S] longest lengths;
    ``stops`` are all values of ``limit``, on the host, so that most steps need no synchronisation. ``token_scores``
    [S, k, room] are log-probabilities of the tokens; None: not kept.
    """

    sentence: Tensor
    scores: Tensor
    tokens: Tensor
    limit: Tensor
    stops: frozenset[int]
    token_scores: Tensor | None = None

    def select(self, kept: Tensor) -> None:
        """Keeps the sentences ``kept`` [S'] int64."""
        self.sentence, self.limit = self.sentence[kept], self.limit[kept]
        self.scores, self.tokens = self.scores[kept], self.tokens[kept]
        if self.token_scores is not None:
            self.token_scores = self.token_scores[kept]

    def continued_scores(self, beam: Tensor, scores: Tensor, step: int) -> Tensor:
        """[S, c, step + 1] token scores of c continuations of ``beam`` [S, c] with summed ``scores`` [S, c]."""
        assert self.token_scores is not None
        earlier = self.token_scores[:, :, :step].gather(1, beam.unsqueeze(-1).expand(-1, -1, step))
        return torch.cat((earlier, (scores - self.scores.gather(1, beam)).unsqueeze(-1)), dim=2)


class Finished:
    """Collects hypotheses in the order in which they end; a sentence takes the first ``beam`` of them.

    Args:
        sentences: B.
        beam: k.
        length: room for tokens per hypothesis.
        token_scores: whether those of each token are kept.
    """

    def __init__(
        self, sentences: int, beam: int, length: int, pad: int, device: torch.device, token_scores: bool = False
    ) -> None:
        self.beam = beam
        self.tokens = torch.full((sentences, beam, length), pad, dtype=torch.int64, device=device)
        self.lengths = torch.zeros((sentences, beam), dtype=torch.int64, device=device)
        self.scores = torch.full((sentences, beam), -torch.inf, device=device)
        self.count = torch.zeros(sentences, dtype=torch.int64, device=device)
        self.token_scores = torch.zeros((sentences, beam, length + 1), device=device) if token_scores else None

    def add(
        self,
        sentence: Tensor,
        ended: Tensor,
        beams: Tensor,
        scores: Tensor,
        tokens: Tensor,
        token_scores: Tensor | None = None,
    ) -> None:
        """Adds the hypotheses that end at one step.

        Args:
            sentence: [S] index of the sentence of each row below.
            ended: [S, k] bool, best first; those above ``beam`` hypotheses of a sentence are left out.
            beams: [S, k] the beam that each hypothesis continues.
            scores: [S, k] final scores.
            tokens: [S, k, t] tokens of the beams, end symbol not included.
            token_scores: [S, k, t + 1] of the hypotheses that end.
        """
        slots = self.count[sentence].unsqueeze(1) + ended.cumsum(1) - 1
        row, rank = (ended & (slots < self.beam)).nonzero(as_tuple=True)
        place = sentence[row], slots[row, rank]
        length = tokens.shape[2]
        self.tokens[place[0], place[1], :length] = tokens[row, beams[row, rank]]
        self.lengths[place] = length
        self.scores[place] = scores[row, rank]
        if self.token_scores is not None and token_scores is not None:
            self.token_scores[place[0], place[1], : length + 1] = token_scores[row, rank]
        self.count[sentence] = (self.count[sentence] + ended.sum(1)).clamp(max=self.beam)

    def sorted(self) -> Hypotheses:
        """All hypotheses, best first; equal scores keep the order in which they ended."""
        scores, order = self.scores.sort(dim=1, descending=True, stable=True)
        tokens = self.tokens.gather(1, order.unsqueeze(-1).expand_as(self.tokens))
        per_token = self.token_scores
        if per_token is not None:
            per_token = per_token.gather(1, order.unsqueeze(-1).expand_as(per_token))
        return Hypotheses(tokens, self.lengths.gather(1, order), scores, per_token)

"""Batched beam search with the semantics of fairseq's SequenceGenerator, on the model's own decoding path.

At each step a sentence considers its 2k best continuations; those among the first k that end are finished hypotheses
(score / length^penalty), the k best that do not end continue. A sentence is done with k finished hypotheses, or at its
longest length, and leaves the batch. Differences from fairseq 0.12.2, so that no result depends on batch mates: the
longest length follows from the sentence's own source length, not from the batch's, and is never below ``min_length``
(fairseq ends with an assertion) or below a forced prefix (which fairseq cuts); tokens that start the decoder are not
scored; tokens of a forced prefix are not blocked as repeated n-grams, and the shortest length holds after any
(fairseq counts from the longest of the batch); draws of sampling are counted.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from moe_train.config import SearchConfig
from moe_train.errors import CheckpointError, ConfigError
from moe_train.evaluation.search.constraints import block_repeats, only_forced
from moe_train.evaluation.search.hypotheses import Beams, Finished, Hypotheses
from moe_train.evaluation.search.kernel_steps import KernelSteps
from moe_train.evaluation.search.sampler import Sampler
from moe_train.evaluation.search.topk import Candidates, best_candidates, log_probabilities
from moe_train.kernels.decoder.best_continuations import is_supported
from moe_train.routing.context import RankReduction

T = TypeVar("T")


class ReorderableState(Protocol):
    """Cached keys and values of N = B·k rows; the beams of a sentence are consecutive."""

    def reorder(self, rows: Tensor) -> None:
        """Selects ``rows`` [N'] int64 of the N, some of them several times; whole sentences may be removed."""


class DecodableModel(Protocol):
    """Interface of a model for the search, implemented in ``moe_train.models``."""

    training: bool

    def eval(self) -> Any:
        """As in torch."""

    def train(self, mode: bool = True) -> Any:
        """As in torch."""

    @property
    def encoder(self) -> Any:
        """Called with ``net_input`` except ``prev_output_tokens``."""

    def start_decoding(self, encoder_out: Any, beam: int, max_length: int) -> Any:
        """A :class:`ReorderableState` of B·beam rows for at most ``max_length`` steps."""

    def decode_step(self, tokens: Tensor, state: Any) -> Tensor:
        """Next symbols' logits [N, V] after tokens [N]; the search may overwrite them."""

    def max_decoder_positions(self) -> int:
        """Longest decoder input."""


class SpecialSymbols(Protocol):
    """The part of fairseq's Dictionary that the search uses."""

    def pad(self) -> int:
        """Number of the padding symbol."""

    def eos(self) -> int:
        """Number of the end symbol."""

    def unk(self) -> int:
        """Number of the symbol for unknown words."""

    def __len__(self) -> int: ...


class BeamSearch:
    """Finds translations of a batch.

    Args:
        model: see :class:`DecodableModel`; set to eval mode during the search. Its decoder's weights may be packed here
            for all searches.
        dictionary: the target dictionary.
        config: beam, penalties, shortest and longest length.
        group: the ranks over which the model's experts are divided. They search at the same time; a rank that is done
            (or has no sentences) continues with zero rows until all are done, since all must take part in the exchange
            of tokens. None: the whole model is on this rank.

    Raises:
        ConfigError: ``search.min_length`` is beyond the model's positions, or ``search.weights`` does not fit.
    """

    def __init__(
        self,
        model: DecodableModel,
        dictionary: SpecialSymbols,
        config: SearchConfig,
        group: RankReduction | None = None,
    ) -> None:
        self.model, self.group = model, group
        self.pad, self.eos, self.unk = dictionary.pad(), dictionary.eos(), dictionary.unk()
        self._symbols = len(dictionary)
        self._set(config)
        self._packed = self._pack()

    def with_config(self, config: SearchConfig) -> BeamSearch:
        """A search by the same model with other settings; packed weights of the same type are shared."""
        other = copy.copy(self)
        other._set(config)
        if config.weights != self.config.weights:
            other._packed = other._pack()
        return other

    def _set(self, config: SearchConfig) -> None:
        if config.min_length >= (positions := self.model.max_decoder_positions()):
            raise ConfigError(
                f"search.min_length={config.min_length} does not fit into the model's {positions} positions",
                remedy=f"set search.min_length to {positions - 1} or less",
            )
        self.config, self.beam = config, min(config.beam, self._symbols - 1)

    @torch.no_grad()
    def __call__(
        self, net_input: Mapping[str, Any], prefix: Tensor | None = None, token_scores: bool = False
    ) -> Hypotheses:
        """Searches for a batch.

        Args:
            net_input: ``src_tokens`` [B, S] and other inputs of the encoder, and ``prev_output_tokens`` [B, P], with
                which every hypothesis starts: the end symbol or a language tag, then further tokens if P > 1. They are
                no part of the hypothesis. ``sentence_uid`` [B], if there, is what sampling draws by.
            prefix: [B, F] padded on the right, tokens with which each sentence's hypotheses begin, scored as their
                own choices are; cut to the model's positions.
            token_scores: whether the result has the log-probability of each token.

        Raises:
            CheckpointError: the model's output is not finite.
        """
        was_training = self.model.training
        self.model.eval()
        try:
            return self._search(dict(net_input), prefix, token_scores)
        finally:
            self.model.train(was_training)

    def _search(self, net_input: dict[str, Any], prefix: Tensor | None, token_scores: bool) -> Hypotheses:
        first = net_input.pop("prev_output_tokens")
        sentences, device, room = first.shape[0], first.device, self._room(first.shape[1])
        limit = self._limits(net_input["src_tokens"], room)
        if prefix is not None:
            prefix = prefix[:, :room]
            limit = limit.maximum(prefix.ne(self.pad).sum(1))
        longest = int(limit.max()) if sentences else 0
        finished = Finished(sentences, self.beam, max(longest, 1), self.pad, device, token_scores)
        if sentences == 0 and self.group is None:
            return finished.sorted()
        start = self._packed.start_decoding if self._packed else self.model.start_decoding
        state = start(self._encode(net_input), self.beam, longest + first.shape[1])
        inputs = self._force(first, state)
        beams, step = self._start(sentences, limit, longest, device, token_scores), 0
        sampler = Sampler(self.config, net_input.get("sentence_uid"), sentences) if self.config.sampling else None
        kernels, by_kernels = KernelSteps(beams, finished, self.config, self.pad, self.unk, self.eos), False
        # The kernels know the default rules only.
        default = prefix is None and sampler is None and not (token_scores or self.config.no_repeat_ngram)
        while self._any_unfinished(beams):
            logits = self.model.decode_step(inputs, state)
            if before := beams.sentence.numel():
                by_kernels = default and is_supported(logits) if step == 0 else by_kernels
                if self.config.temperature != 1.0:
                    logits = logits.div_(self.config.temperature)
                if by_kernels:
                    rows, inputs = self._checked(kernels.run(logits, step))
                else:
                    forced = None if prefix is None else prefix[beams.sentence, step : step + 1]
                    candidates = self._candidates(logits, beams, step, forced, sampler)
                    rows, inputs = self._step(candidates, beams, finished, step)
                changed = self.beam > 1 or beams.sentence.numel() < before
                if changed and (rows.numel() or self.group is not None):
                    state.reorder(rows)
            step += 1
        return finished.sorted()

    def _encode(self, net_input: Mapping[str, Any]) -> Any:
        """The encoder's output, computed in bf16 unless the weights are fp32."""
        half = self._packed is not None and self.config.weights != "fp32"
        with torch.autocast("cpu", torch.bfloat16) if half else nullcontext():
            return self.model.encoder(**net_input)

    def _any_unfinished(self, beams: Beams) -> bool:
        """Whether any rank has sentences that are not done."""
        if self.group is None:
            return beams.sentence.numel() > 0
        return bool(self.group.max(torch.tensor(beams.sentence.numel(), device=beams.sentence.device)) > 0)

    def _step(self, candidates: Candidates, beams: Beams, finished: Finished, step: int) -> tuple[Tensor, Tensor]:
        """Extends, finishes and reorders the beams; returns what :meth:`KernelSteps.run` does."""
        kept = self._finish(candidates, beams, finished, step)
        if kept is not None:
            beams.select(kept)
            candidates = candidates.select(kept)
        return self._advance(candidates, beams, step, kept), beams.tokens[:, :, step].reshape(-1)

    @staticmethod
    def _checked(found: T | None) -> T:
        """The result of a step if there is one."""
        if found is None:
            raise CheckpointError(
                "the model's output is not a number", remedy="choose an earlier checkpoint: the training diverged"
            )
        return found

    def _room(self, first: int) -> int:
        """Longest hypothesis that the model has positions for after ``first`` tokens, end symbol not counted."""
        return max(1, self.config.min_length, self.model.max_decoder_positions() - first)

    def _limits(self, src_tokens: Tensor, room: int) -> Tensor:
        """[B] longest hypothesis of each sentence, end symbol not counted."""
        lengths = src_tokens.ne(self.pad).sum(1).double()
        shortest = max(1, self.config.min_length)
        limit = lengths * self.config.max_length_ratio + self.config.max_length_offset
        return limit.clamp(min=shortest, max=room).long()  # before the conversion: a huge number would overflow

    def _pack(self) -> Any:
        """The model's decoder with packed weights; None if it has none, or its kernels cannot be used here."""
        if pack := getattr(self.model, "pack_decoder", None):
            return pack(self.config.weights)
        if self.config.weights != "fp32":
            raise ConfigError(
                f"this model cannot search with search.weights={self.config.weights}", remedy="set search.weights=fp32"
            )
        return None

    def _force(self, first: Tensor, state: ReorderableState) -> Tensor:
        """Feeds all but the last forced token; returns the last, [N]."""
        columns = first.repeat_interleave(self.beam, dim=0).unbind(1)
        for column in columns[:-1]:
            self.model.decode_step(column, state)
        return columns[-1]

    def _start(self, sentences: int, limit: Tensor, longest: int, device: torch.device, token_scores: bool) -> Beams:
        # All beams are equal at the start, so only the first one is used at the first step, unless each is drawn.
        scores = torch.full((sentences, self.beam), 0.0 if self.config.sampling else -torch.inf, device=device)
        scores[:, 0] = 0.0
        tokens = torch.full((sentences, self.beam, longest + 1), self.pad, dtype=torch.int64, device=device)
        kept = torch.zeros(tokens.shape, device=device) if token_scores else None
        return Beams(torch.arange(sentences, device=device), scores, tokens, limit, frozenset(limit.tolist()), kept)

    def _candidates(
        self, logits: Tensor, beams: Beams, step: int, forced: Tensor | None, sampler: Sampler | None
    ) -> Candidates:
        """The continuations, chosen or drawn, where ``forced`` [S, 1 or 0] has none but padding."""
        log_probs = log_probabilities(logits)
        if forced is None or forced.shape[1] == 0:
            self._mask(log_probs, beams, step)
        else:
            rows = forced.repeat_interleave(self.beam, dim=0)
            chosen = log_probs.gather(1, rows) - self.config.unk_penalty * rows.eq(self.unk)
            self._mask(log_probs, beams, step)
            only_forced(log_probs, rows, chosen, rows.ne(self.pad))
        if sampler is not None:
            return sampler.draw(log_probs, beams.scores, beams.sentence, step)
        return best_candidates(log_probs, beams.scores, 2 * self.beam)

    def _mask(self, log_probs: Tensor, beams: Beams, step: int) -> None:
        """Overwrites the log-probabilities of symbols that may not follow."""
        log_probs[:, self.pad] = -torch.inf
        log_probs[:, self.unk] -= self.config.unk_penalty
        if step < self.config.min_length:
            log_probs[:, self.eos] = -torch.inf
        if self.config.no_repeat_ngram:
            block_repeats(log_probs, beams.tokens[:, :, :step].flatten(0, 1), self.config.no_repeat_ngram)
        if step in beams.stops:
            rows = (beams.limit == step).repeat_interleave(self.beam)
            ends = log_probs[rows, self.eos]
            log_probs[rows] = -torch.inf
            log_probs[rows, self.eos] = ends

    def _finish(self, candidates: Candidates, beams: Beams, finished: Finished, step: int) -> Tensor | None:
        """Collects hypotheses that end; returns the sentences [S'] that continue, or None if all do."""
        first = (slice(None), slice(self.beam))
        ended = (candidates.token[first] == self.eos) & (candidates.score[first] > -torch.inf)
        is_broken, some_end = torch.stack((candidates.score.isnan().any(), ended.any())).tolist()  # one read of a GPU
        self._checked(None if is_broken else candidates)
        if some_end:
            scores = candidates.score[first] / (step + 1) ** self.config.length_penalty
            per_token = None
            if beams.token_scores is not None:
                per_token = beams.continued_scores(candidates.beam[first], candidates.score[first], step)
            finished.add(beams.sentence, ended, candidates.beam[first], scores, beams.tokens[:, :, :step], per_token)
        elif step not in beams.stops:
            return None
        done = (finished.count[beams.sentence] >= self.beam) | (beams.limit <= step)
        return (~done).nonzero().squeeze(1) if bool(done.any()) else None

    def _advance(self, candidates: Candidates, beams: Beams, step: int, kept: Tensor | None) -> Tensor:
        """Makes the k best candidates that do not end the new beams; returns the old rows [N'] that they continue."""
        ends = candidates.token == self.eos
        if self.config.sampling:  # each sample keeps its place, by which it is drawn
            order = candidates.beam
        else:
            order = ends.to(torch.int8).argsort(dim=1, stable=True)[:, : self.beam]
        beam, scores = candidates.beam.gather(1, order), candidates.score.gather(1, order)
        if beams.token_scores is not None:
            beams.token_scores[:, :, : step + 1] = beams.continued_scores(beam, scores, step)
        # Samples that have ended, and with a tiny vocabulary beams without a continuation, get -inf.
        beams.scores = scores.masked_fill_(ends.gather(1, order), -torch.inf)
        beams.tokens[:, :, :step] = beams.tokens[:, :, :step].gather(1, beam.unsqueeze(-1).expand(-1, -1, step))
        beams.tokens[:, :, step] = candidates.token.gather(1, order)
        old = torch.arange(beam.shape[0], device=beam.device) if kept is None else kept
        return (old.unsqueeze(1) * self.beam + beam).reshape(-1)

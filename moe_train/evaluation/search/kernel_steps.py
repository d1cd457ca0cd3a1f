"""The steps of a beam search by C kernels on the CPU, on the tables that torch's operators use otherwise."""

from __future__ import annotations

from torch import Tensor

from moe_train.config import SearchConfig
from moe_train.evaluation.search.hypotheses import Beams, Finished
from moe_train.kernels.decoder.best_continuations import Choice, Tables, advance, search


class KernelSteps:
    """Steps of one search.

    Args:
        beams, finished: as they are before the first step; their tensors are written to.
        pad, unk, eos: numbers of special symbols.
    """

    def __init__(self, beams: Beams, finished: Finished, config: SearchConfig, pad: int, unk: int, eos: int) -> None:
        self._beams, self._config = beams, config
        self._kept = beams.sentence, beams.limit, beams.scores, beams.tokens, finished
        beam, room = beams.tokens.shape[1:]
        self._choice = Choice(0, beam, 2 * beam, pad, unk, eos, config.unk_penalty, 0)
        self._tables = Tables(
            beam=beam,
            eos=eos,
            room=room,
            length=finished.tokens.shape[2],
            sentence=beams.sentence.data_ptr(),
            limit=beams.limit.data_ptr(),
            scores=beams.scores.data_ptr(),
            tokens=beams.tokens.data_ptr(),
            ended_tokens=finished.tokens.data_ptr(),
            ended_lengths=finished.lengths.data_ptr(),
            ended_scores=finished.scores.data_ptr(),
            ended_count=finished.count.data_ptr(),
        )

    def run(self, logits: Tensor, step: int) -> tuple[Tensor, Tensor] | None:
        """One step from logits [S · k, V], which are overwritten.

        Returns:
            The former hypotheses that those of the sentences that are not done continue, and their new symbols, [N']
            each; None: a logit is not a number.
        """
        beams, choice, tables = self._beams, self._choice, self._tables
        choice.vocabulary, choice.may_end = logits.shape[1], int(step >= self._config.min_length)
        must_end = beams.limit == step if step in beams.stops else None
        score, token, beam, finite = search(logits.contiguous(), beams.scores, must_end, choice)
        if not finite:
            return None
        tables.step, tables.divisor = step, (step + 1) ** self._config.length_penalty
        kept, rows, following = advance(tables, (score, token, beam), beams.sentence.shape[0])
        if kept != beams.sentence.shape[0]:
            beams.sentence, beams.limit = beams.sentence[:kept], beams.limit[:kept]
            beams.scores, beams.tokens = beams.scores[:kept], beams.tokens[:kept]
        return rows, following

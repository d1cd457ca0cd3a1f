"""The state of step-by-step decoding: what the beam search holds in its hand."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from moe_train.layers.batch_context import BatchInfo
from moe_train.layers.decoder_cache import DecoderCache


class DecoderState:
    """N = sentences · beam hypotheses, the beams of a sentence beside each other.

    Attributes:
        cache: keys and values of the tokens written so far and of the source.
        info: for each hypothesis, its sentence's uid, language and pass, [N] each: beams inherit them.
    """

    def __init__(self, cache: DecoderCache, info: BatchInfo) -> None:
        self.cache = cache
        self.info = info

    @property
    def step(self) -> int:
        """Tokens written so far."""
        return self.cache.length

    @property
    def beam(self) -> int:
        """Hypotheses per sentence."""
        return self.cache.beam

    @property
    def rows(self) -> int:
        """N."""
        return self.cache.rows

    def reorder(self, rows: Tensor) -> None:
        """Hypothesis i now continues what was hypothesis ``rows[i]``.

        Args:
            rows: [M] int64; sentences that are finished may be left out, and sentences may change places, but the beams
                of one group of ``beam`` rows continue hypotheses of one sentence.

        Raises:
            ValueError: they do not.
        """
        if self.cache.reorder(rows) is not None:
            self.info = select_rows(self.info, rows)


def select_rows(info: BatchInfo, rows: Tensor) -> BatchInfo:
    """The same facts for rows [M] of the batch."""
    values = {f.name: getattr(info, f.name) for f in dataclasses.fields(info)}
    return BatchInfo(**{n: None if v is None else v.index_select(0, rows) for n, v in values.items()})


def repeat_rows(info: BatchInfo, times: int) -> BatchInfo:
    """Each row ``times`` times, copies beside each other."""
    values = {f.name: getattr(info, f.name) for f in dataclasses.fields(info)}
    return BatchInfo(**{n: None if v is None else v.repeat_interleave(times, 0) for n, v in values.items()})

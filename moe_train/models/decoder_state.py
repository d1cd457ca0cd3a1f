"""State of step-by-step decoding, used by the beam search."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from moe_train.layers.batch_context import BatchInfo
from moe_train.layers.decoder_cache import DecoderCache


class DecoderState:
    """State of N = sentences · beam hypotheses; the beams of a sentence are adjacent.

    Attributes:
        cache: keys and values of the tokens decoded so far and of the source.
        info: uid, language and pass of each hypothesis's sentence, [N] each.
    """

    def __init__(self, cache: DecoderCache, info: BatchInfo) -> None:
        self.cache = cache
        self.info = info

    @property
    def step(self) -> int:
        """Tokens decoded so far."""
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
        """Reorders hypotheses: hypothesis i continues the former hypothesis ``rows[i]``.

        Args:
            rows: [M] int64; finished sentences may be left out and sentences reordered, but each group of ``beam`` rows
                must belong to one sentence.

        Raises:
            ValueError: a group contains rows of different sentences.
        """
        if self.cache.reorder(rows) is not None:
            self.info = select_rows(self.info, rows)


def select_rows(info: BatchInfo, rows: Tensor) -> BatchInfo:
    """The metadata of rows [M] of the batch."""
    values = {f.name: getattr(info, f.name) for f in dataclasses.fields(info)}
    return BatchInfo(**{n: None if v is None else v.index_select(0, rows) for n, v in values.items()})


def repeat_rows(info: BatchInfo, times: int) -> BatchInfo:
    """The metadata with each row repeated ``times`` times, copies adjacent."""
    values = {f.name: getattr(info, f.name) for f in dataclasses.fields(info)}
    return BatchInfo(**{n: None if v is None else v.repeat_interleave(times, 0) for n, v in values.items()})

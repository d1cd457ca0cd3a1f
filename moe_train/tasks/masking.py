"""Draws the tokens that a masked language model must predict (BERT, Devlin et al., 2019, §3.1)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moe_train.config.tasks import LanguageModelConfig
from moe_train.tasks.seeded_uniform import MASKED, PIECE, REPLACEMENT, draws

Tokens = NDArray[np.int64]


@dataclass(frozen=True)
class Masking:
    """How tokens are masked.

    Attributes:
        mask, pad: dictionary ids.
        first_piece, last_piece: ids of pieces, the last one excluded; others (ends, tags) are never masked.
    """

    keys: LanguageModelConfig
    mask: int
    pad: int
    first_piece: int
    last_piece: int

    def apply(self, tokens: Tokens, uids: NDArray[np.int64], seed: int, update: int) -> tuple[Tokens, Tokens]:
        """Masks a batch.

        Args:
            tokens: [B, S].
            uids: [B] numbers of the sentences.
            seed, update: of the draws.

        Returns:
            The input [B, S], and the targets [B, S], padding where nothing is predicted. At least one piece of every
            sentence that has one is predicted.
        """
        width, keys = tokens.shape[1], self.keys
        uniform = np.where(self._is_piece(tokens), draws(seed, update, uids, width, MASKED), np.inf)
        lowest = uniform.min(axis=1, keepdims=True, initial=np.inf)
        asked = np.isfinite(uniform) & ((uniform < keys.mask_probability) | (uniform == lowest))
        how = draws(seed, update, uids, width, REPLACEMENT)
        random = self.first_piece + np.floor(
            draws(seed, update, uids, width, PIECE) * (self.last_piece - self.first_piece)
        ).astype(np.int64)
        replaced = np.where(how < keys.mask_share, self.mask, random)
        replaced = np.where(how < keys.mask_share + keys.random_share, replaced, tokens)
        return np.where(asked, replaced, tokens), np.where(asked, tokens, self.pad)

    def _is_piece(self, tokens: Tokens) -> NDArray[np.bool_]:
        return (tokens >= self.first_piece) & (tokens < self.last_piece)

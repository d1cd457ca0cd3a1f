"""Keys and values kept while a decoder writes, for many hypotheses (beams) per sentence.

Reordering beams moves no keys. The hypotheses of a sentence share one table of slots, (position, beam) → key, and each
attends to the slots of its own ancestors: what is reordered is a bit mask. All beams of a sentence are the queries of
one attention product, over the sentence's slots as over the encoder's output, whose keys and values stand once per
sentence.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

KeysValues = tuple[Tensor, Tensor]


class DecoderCache:
    """The cache of a decoder stack. N = B · beam rows, the beams of a sentence beside each other.

    Args:
        memory: for each layer, keys and values of the encoder's output, [B, H, K, d/H] each.
        memory_mask: [B, 1, 1, K] bool, true = visible; None where all is.
        beam: hypotheses per sentence.
        max_length: positions to make room for at first (the cache grows where more are written).
    """

    def __init__(self, memory: Sequence[KeysValues], memory_mask: Tensor | None, beam: int, max_length: int) -> None:
        self.memory = list(memory)
        self.memory_mask = memory_mask
        self.beam = beam
        self.length = 0
        keys = self.memory[0][0]
        batch, heads, _, width = keys.shape
        slots = max(max_length, 1) * beam
        self._slots = keys.new_empty(len(self.memory), 2, batch, heads, slots, width)
        self._visible = torch.zeros(batch, beam, slots, dtype=torch.bool, device=keys.device)

    @property
    def batch(self) -> int:
        """B, sentences."""
        return self._slots.shape[2]

    @property
    def rows(self) -> int:
        """N = B · beam."""
        return self.batch * self.beam

    def by_sentence(self, x: Tensor) -> Tensor:
        """[N, 1, d] → [B, beam, d]."""
        return x.view(self.batch, self.beam, x.shape[-1])

    @property
    def visible(self) -> Tensor:
        """[B, 1, beam, used slots] bool: the slots of each hypothesis's ancestors and its own."""
        return self._visible[:, None, :, : self.length * self.beam]

    def advance(self) -> None:
        """Opens the next position; call it once before the layers of a step."""
        start = self.length * self.beam
        if start == self._slots.shape[4]:
            self._grow()
        own = torch.arange(self.beam, device=self._visible.device)
        self._visible[:, own, start + own] = True
        self.length += 1

    def append(self, layer: int, k: Tensor, v: Tensor) -> KeysValues:
        """Writes k, v [B, H, beam, d/H] of the open position; returns all so far, [B, H, used slots, d/H] each."""
        end = self.length * self.beam
        keys, values = self._slots[layer]
        keys[:, :, end - self.beam : end] = k
        values[:, :, end - self.beam : end] = v
        return keys[:, :, :end], values[:, :, :end]

    def reorder(self, rows: Tensor) -> Tensor | None:
        """Row i continues what was row ``rows[i]``.

        Args:
            rows: [M] int64, M = (sentences kept) · beam; the beams of a group continue hypotheses of one sentence.

        Returns:
            The sentences kept, [M / beam] int64, or None where all stay in their place.

        Raises:
            ValueError: the rows of a group stem from different sentences.
        """
        parents = rows.view(-1, self.beam)
        sentences = parents // self.beam
        if not bool((sentences == sentences[:, :1]).all()):
            raise ValueError("the beams of one sentence must continue hypotheses of one sentence")
        kept = sentences[:, 0]
        moved = kept.shape[0] != self.batch or not torch.equal(kept, torch.arange(self.batch, device=kept.device))
        if moved:
            self._keep(kept)
        if self.beam > 1:
            used = self.length * self.beam
            ancestors = self._visible[:, :, :used]
            index = (parents % self.beam).unsqueeze(-1).expand(-1, -1, used)
            self._visible[:, :, :used] = ancestors.gather(1, index)
        return kept if moved else None

    def _keep(self, sentences: Tensor) -> None:
        used = self.length * self.beam
        kept = self._slots.new_empty(*self._slots.shape[:2], sentences.shape[0], *self._slots.shape[3:])
        kept[..., :used, :] = self._slots[..., :used, :].index_select(2, sentences)
        self._slots = kept
        self._visible = self._visible.index_select(0, sentences)
        self.memory = [(k.index_select(0, sentences), v.index_select(0, sentences)) for k, v in self.memory]
        if self.memory_mask is not None:
            self.memory_mask = self.memory_mask.index_select(0, sentences)

    def _grow(self) -> None:
        slots = torch.empty_like(self._slots)
        self._slots = torch.cat((self._slots, slots), dim=4)
        self._visible = torch.cat((self._visible, torch.zeros_like(self._visible)), dim=2)

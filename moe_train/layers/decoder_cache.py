"""Key-value cache of a decoder with many hypotheses (beams) per sentence.

Reordering beams moves no keys. The hypotheses of a sentence share one table of slots, and each attends to the slots of
its ancestors, so only a bit mask is reordered. All beams of a sentence are the queries of one attention product, over
the sentence's slots and over the encoder's output, whose keys and values are stored once per sentence. Beams soon share
most ancestors, so every few steps the cache is compacted: slots that no hypothesis descends from are removed, and
little more than the slots of one hypothesis remains.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

KeysValues = tuple[Tensor, Tensor]


class DecoderCache:
    """The cache of a decoder stack. N = B · beam rows; the beams of a sentence are adjacent.

    Args:
        memory: for each layer, keys and values of the encoder's output, [B, H, K, d/H] each.
        memory_mask: [B, 1, 1, K] bool, True = visible; None if all are visible.
        beam: hypotheses per sentence.
        max_length: positions allocated at first (the cache grows if more are written).

    Attributes:
        length: positions written so far.
        compact_interval: steps between two compactions.
    """

    def __init__(self, memory: Sequence[KeysValues], memory_mask: Tensor | None, beam: int, max_length: int) -> None:
        self.memory = list(memory)
        self.memory_mask = memory_mask
        self.beam = beam
        self.length = 0
        self.compact_interval = 8
        keys = self.memory[0][0]
        batch, heads, _, width = keys.shape
        capacity = max(max_length, 1) * beam
        # [layers, keys and values, B, slots, H, d/H]: the slots of a sentence are adjacent, so that they move as rows.
        self._slots = keys.new_empty(len(self.memory), 2, batch, capacity, heads, width)
        self._visible = torch.zeros(batch, beam, capacity, dtype=torch.bool, device=keys.device)
        self._used = 0
        self._compact_at = self.compact_interval * beam

    @property
    def batch(self) -> int:
        """B, sentences."""
        return self._slots.shape[2]

    @property
    def rows(self) -> int:
        """N = B · beam."""
        return self.batch * self.beam

    @property
    def used(self) -> int:
        """Slots of a sentence in use."""
        return self._used

    def by_sentence(self, x: Tensor) -> Tensor:
        """[N, 1, d] → [B, beam, d]."""
        return x.view(self.batch, self.beam, x.shape[-1])

    @property
    def visible(self) -> Tensor | None:
        """[B, 1, beam, used] bool: slots that each hypothesis attends to (its own and its ancestors'); None if all."""
        return None if self.beam == 1 else self._visible[:, None, :, : self._used]

    def advance(self) -> None:
        """Allocates the slots of the next position; call it once before the layers of a step."""
        if self._used + self.beam > self._slots.shape[3]:
            self._grow()
        own = torch.arange(self.beam, device=self._visible.device)
        self._visible[:, own, self._used + own] = True
        self._used += self.beam
        self.length += 1

    def append(self, layer: int, k: Tensor, v: Tensor) -> KeysValues:
        """Writes k, v [B, H, beam, d/H] of the current position; returns all so far, [B, H, used, d/H] each."""
        start, end = self._used - self.beam, self._used
        keys, values = self._slots[layer]
        keys[:, start:end] = k.transpose(1, 2)
        values[:, start:end] = v.transpose(1, 2)
        return keys[:, :end].transpose(1, 2), values[:, :end].transpose(1, 2)

    def reorder(self, rows: Tensor) -> Tensor | None:
        """Reorders hypotheses: row i continues the former row ``rows[i]``.

        Args:
            rows: [M] int64, M = (sentences kept) · beam; each group of ``beam`` rows belongs to one sentence.

        Returns:
            The sentences kept, [M / beam] int64, or None if all keep their positions.

        Raises:
            ValueError: the rows of a group belong to different sentences.
        """
        parents = rows.view(-1, self.beam)
        sentences = parents // self.beam
        kept = sentences[:, 0]
        together = (sentences == kept.unsqueeze(1)).all()
        places = torch.arange(kept.shape[0], device=kept.device)
        is_sound, stay = torch.stack((together, (kept == places).all())).tolist()  # one read of a GPU
        if not is_sound:
            raise ValueError("the beams of one sentence must continue hypotheses of one sentence")
        moved = kept.shape[0] != self.batch or not stay
        if moved:
            self._select(kept)
        if self.beam > 1:
            ancestors = self._visible[:, :, : self._used]
            index = (parents % self.beam).unsqueeze(-1).expand(-1, -1, self._used)
            self._visible[:, :, : self._used] = ancestors.gather(1, index)
            if self._used >= self._compact_at and self.batch:
                self._compact()
        return kept if moved else None

    def _select(self, sentences: Tensor) -> None:
        kept = self._slots.new_empty(*self._slots.shape[:2], sentences.shape[0], *self._slots.shape[3:])
        kept[:, :, :, : self._used] = self._slots[:, :, :, : self._used].index_select(2, sentences)
        self._slots = kept
        self._visible = self._visible.index_select(0, sentences)
        self.memory = [(k.index_select(0, sentences), v.index_select(0, sentences)) for k, v in self.memory]
        if self.memory_mask is not None:
            self.memory_mask = self.memory_mask.index_select(0, sentences)

    def _compact(self) -> None:
        """Moves the slots that some hypothesis attends to to the front, and discards the others."""
        visible = self._visible[:, :, : self._used]
        live = visible.any(1)
        count = int(live.sum(1).max())
        order = live.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :count]
        capacity = self._slots.shape[3]
        flat = (order + capacity * torch.arange(self.batch, device=order.device).unsqueeze(1)).view(-1)
        chosen = self._slots.flatten(2, 3).index_select(2, flat)
        self._slots[:, :, :, :count] = chosen.unflatten(2, (self.batch, count))
        seen = visible.gather(2, order.unsqueeze(1).expand(-1, self.beam, -1))
        self._visible[:, :, :count] = seen
        self._visible[:, :, count:] = False
        self._used = count
        self._compact_at = count + self.compact_interval * self.beam

    def _grow(self) -> None:
        self._slots = torch.cat((self._slots, torch.empty_like(self._slots)), dim=3)
        self._visible = torch.cat((self._visible, torch.zeros_like(self._visible)), dim=2)

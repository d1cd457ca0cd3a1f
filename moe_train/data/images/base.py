"""What every source of images gives: splits of labelled images of one size."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from moe_train.data.verification import InputFiles
from moe_train.errors import DataError

Pixels = NDArray[np.uint8]
Indices = NDArray[np.int64]

SPLITS = ("train", "valid", "test")
# The same held-out images for every seed, so that runs can be compared.
_HELD_OUT = 20240601


class PixelStore(Protocol):
    """Images by number."""

    def __len__(self) -> int: ...

    def read(self, indices: Indices) -> Pixels:
        """[B, H, W, C] of these images."""


@dataclass(frozen=True)
class InMemory:
    """Images that fit into memory, [N, H, W, C]."""

    pixels: Pixels

    def __len__(self) -> int:
        return len(self.pixels)

    def read(self, indices: Indices) -> Pixels:
        """[B, H, W, C] of these images."""
        return self.pixels[indices]


@dataclass(frozen=True)
class ImageSet:
    """One split.

    Attributes:
        store: where its pixels are; may hold more images than the split.
        rows: [N] numbers of the split's images in the store.
        labels: [N] int64.
        first_uid: number of the store's first image among all images of the data; random routing and augmentation know
            an image by ``first_uid`` + its number.
    """

    store: PixelStore
    rows: Indices
    labels: Indices
    first_uid: int = 0

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, indices: Indices) -> Pixels:
        """Images [B, H, W, C] of the split."""
        return self.store.read(self.rows[indices])

    def uids(self, indices: Indices) -> Indices:
        """[B] numbers that stay with the images."""
        return self.first_uid + self.rows[indices]


@dataclass(frozen=True)
class Images:
    """Everything that the task needs to know of its data.

    Attributes:
        path: where it lies (a name, for data that comes with a library).
        height, width, channels: of every image.
        classes: names, in the order of the labels.
        splits: by name; ``train`` and ``valid`` always.
        fingerprint: equal for equal data.
        inputs: the files that it is read from.
    """

    path: Path
    height: int
    width: int
    channels: int
    classes: tuple[str, ...]
    splits: Mapping[str, ImageSet]
    fingerprint: str
    inputs: InputFiles = field(default_factory=lambda: InputFiles(Path()))


def hold_out(images: ImageSet, shares: Sequence[float]) -> list[ImageSet]:
    """Takes shares of a split away, the same images whatever the run's seed.

    Returns:
        What remains, then a split per share.

    Raises:
        DataError: too few images for that.
    """
    order = np.random.default_rng(_HELD_OUT).permutation(len(images))
    counts = [max(1, round(share * len(images))) for share in shares]
    if sum(counts) >= len(images):
        raise DataError(f"{len(images)} images are too few to hold some out", remedy="give more, or a valid split")
    edges = np.cumsum([0, *counts])
    chosen = [order[edges[-1] :], *(order[lo:hi] for lo, hi in itertools.pairwise(edges))]
    return [_taken(images, np.sort(rows)) for rows in chosen]


def _taken(images: ImageSet, rows: Indices) -> ImageSet:
    return ImageSet(images.store, images.rows[rows], images.labels[rows], images.first_uid)

"""Interface of all image sources: splits of labelled images of one size."""

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
# Seed of the choice of held-out images: the same for every seed of a run, so that runs can be compared.
_HELD_OUT_SEED = 20240601


class PixelStore(Protocol):
    """Access to images by index."""

    def __len__(self) -> int: ...

    def read(self, indices: Indices) -> Pixels:
        """[B, H, W, C] of these images."""


@dataclass(frozen=True)
class InMemory:
    """Images in memory, [N, H, W, C]."""

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
        store: of its pixels; may contain more images than the split.
        rows: [N] indices of the split's images in the store.
        labels: [N] int64.
        first_uid: id of the store's first image among all images of the data; random routing and augmentation identify
            an image by ``first_uid`` + its index.
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
        """[B] ids of the images."""
        return self.first_uid + self.rows[indices]


@dataclass(frozen=True)
class Images:
    """The data of an image task.

    Attributes:
        path: its folder (a name, for data that comes with a library).
        height, width, channels: of every image.
        classes: names, in the order of the labels.
        splits: by name; ``train`` and ``valid`` always.
        fingerprint: equal for equal data.
        inputs: its files.
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
    """Splits off shares of a split; the same images for every seed of a run.

    Returns:
        The remaining images, then a split per share.

    Raises:
        DataError: there are too few images.
    """
    order = np.random.default_rng(_HELD_OUT_SEED).permutation(len(images))
    counts = [max(1, round(share * len(images))) for share in shares]
    if sum(counts) >= len(images):
        raise DataError(f"{len(images)} images are too few to hold some out", remedy="add images, or a valid split")
    edges = np.cumsum([0, *counts])
    chosen = [order[edges[-1] :], *(order[lo:hi] for lo, hi in itertools.pairwise(edges))]
    return [
        ImageSet(images.store, images.rows[rows], images.labels[rows], images.first_uid)
        for rows in map(np.sort, chosen)
    ]

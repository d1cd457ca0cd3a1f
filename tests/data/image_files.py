"""Writes small image data of every format for tests."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


def write_idx(values: NDArray[np.uint8]) -> bytes:
    """The bytes of an IDX file."""
    header = struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape)
    return header + values.tobytes()


def write_idx_folder(
    folder: Path,
    train: NDArray[np.uint8],
    train_labels: NDArray[np.uint8],
    test: NDArray[np.uint8],
    test_labels: NDArray[np.uint8],
    compressed: bool = False,
) -> None:
    """The four files of MNIST."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {
        "train-images-idx3-ubyte": train,
        "train-labels-idx1-ubyte": train_labels,
        "t10k-images-idx3-ubyte": test,
        "t10k-labels-idx1-ubyte": test_labels,
    }
    for name, values in files.items():
        content = write_idx(values)
        if compressed:
            (folder / f"{name}.gz").write_bytes(gzip.compress(content))
        else:
            (folder / name).write_bytes(content)


def write_class_folders(folder: Path, counts: dict[str, int], size: tuple[int, int]) -> dict[str, list[Any]]:
    """PNG files of noise, ``CLASS/0.png`` …; ``size``: width and height. Returns the pixels of each class."""
    from PIL import Image

    draws, written = np.random.default_rng(5), {}
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        written[name] = [draws.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8) for _ in range(count)]
        for number, pixels in enumerate(written[name]):
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return written


def coloured_squares(count: int, size: int = 8, classes: int = 3, seed: int = 1) -> tuple[Any, Any]:
    """Images [N, size, size] that a model can learn: where the bright square stands is the class. And labels [N]."""
    draws = np.random.default_rng(seed)
    labels = draws.integers(0, classes, count)
    images = draws.integers(0, 90, (count, size, size))
    half = size // 2
    corners = [(0, 0), (0, half), (half, 0), (half, half)]
    for image, label in zip(images, labels, strict=True):
        top, left = corners[label]
        image[top : top + half, left : left + half] += 120
    return images.astype(np.uint8), labels.astype(np.uint8)

"""Reads IDX files (MNIST, Fashion-MNIST), plain or compressed by gzip.

Format: two zero bytes, a type (8: unsigned bytes), the number of dimensions, each dimension as a big-endian 32-bit
number, then the values. Debian's ``dataset-fashion-mnist`` installs such files in /usr/share/datasets/fashion-mnist.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moe_train.config.tasks import ImageConfig
from moe_train.data.images.base import Images, ImageSet, InMemory, hold_out
from moe_train.data.text.compressed import DamagedFile, content_of_misnamed, open_bytes
from moe_train.data.text.lines import sha256
from moe_train.data.verification import InputFiles
from moe_train.errors import DataError

_UNSIGNED_BYTES = 8
_PREFIXES = {"train": "train", "test": "t10k"}


def has_idx(path: Path) -> bool:
    """Whether the folder contains IDX files of training images."""
    return _find(path, "train", "images", 3) is not None


def open_idx(path: Path, config: ImageConfig) -> Images:
    """Reads ``train-images-idx3-ubyte``, ``train-labels-idx1-ubyte`` and, where they exist, those of ``t10k``.

    Raises:
        DataError: a file is missing, cut short or of another kind; the numbers of images and labels differ; a test
            label is not in training.
    """
    train, files = _read_split(path, "train", 0)
    classes = int(train.labels.max(initial=-1)) + 1
    rest, valid = hold_out(train, [config.valid_share])
    splits = {"train": rest, "valid": valid}
    if _find(path, "test", "images", 3) is not None:
        splits["test"], more = _read_split(path, "test", len(train))
        files += more
        _check_labels(splits["test"], classes, more[1])
    _, height, width, channels = train.store.pixels.shape  # type: ignore[attr-defined]
    names = tuple(str(label) for label in range(classes))
    inputs = InputFiles(path, tuple(file.name for file in files))
    fingerprint = " ".join(sha256(file)[:16] for file in files)
    return Images(path, height, width, channels, names, splits, fingerprint, inputs)


def read_idx(path: Path) -> NDArray[np.uint8]:
    """The array of an IDX file of unsigned bytes.

    Raises:
        DataError: it is not such a file, or it is cut short (the bytes expected and found are named).
    """
    content = _content(path)
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] != _UNSIGNED_BYTES or content[3] not in (1, 3):
        raise DataError("this is not an IDX file of unsigned bytes", str(path), "use files in MNIST's format")
    dimensions = content[3]
    header = 4 + 4 * dimensions
    if len(content) < header:
        raise DataError(f"the IDX file ends within its header of {header} bytes", str(path), "download the file again")
    shape = np.frombuffer(content[4:header], dtype=">u4")
    if not shape.all():
        raise DataError(f"the IDX file is empty: its shape is {shape.tolist()}", str(path), "download the file again")
    expected, found = header + math.prod(int(size) for size in shape), len(content)
    if expected != found:
        what = "cut short" if found < expected else "longer than its header says"
        raise DataError(
            f"the IDX file is {what}: {expected} bytes expected, {found} found", str(path), "download the file again"
        )
    return np.frombuffer(content, dtype=np.uint8, offset=header).reshape([int(size) for size in shape])


def _content(path: Path) -> bytes:
    try:
        with open_bytes(path) as stream:
            return stream.read()
    except DamagedFile as error:
        if other := content_of_misnamed(path):
            what = f"it is not a {path.suffix} file, but {other}"
            raise DataError(what, str(path), "rename it to end as its content needs") from None
        found = path.stat().st_size
        raise DataError(
            f"the compressed file is cut short or damaged ({error}); it has {found} bytes",
            str(path),
            "download the file again",
        ) from None


def _find(path: Path, split: str, what: str, dimensions: int) -> Path | None:
    name = f"{_PREFIXES[split]}-{what}-idx{dimensions}-ubyte"
    return next((path / f for f in (name, f"{name}.gz") if (path / f).is_file()), None)


def _read_split(path: Path, split: str, first_uid: int) -> tuple[ImageSet, list[Path]]:
    files = []
    for what, dimensions in (("images", 3), ("labels", 1)):
        found = _find(path, split, what, dimensions)
        if found is None:
            name = f"{_PREFIXES[split]}-{what}-idx{dimensions}-ubyte"
            raise DataError(f"the file {name} (or {name}.gz) is missing", str(path), "correct data=…")
        files.append(found)
    pixels, labels = (read_idx(file) for file in files)
    if pixels.ndim != 3 or labels.ndim != 1:
        raise DataError(f"images of {pixels.ndim - 1} and labels of {labels.ndim - 1} dimensions", str(files[0]))
    if len(pixels) != len(labels):
        raise DataError(f"{len(pixels)} images and {len(labels)} labels", str(files[1]), "download the files again")
    rows = np.arange(len(labels), dtype=np.int64)
    return ImageSet(InMemory(pixels[..., None]), rows, labels.astype(np.int64), first_uid), files


def _check_labels(images: ImageSet, classes: int, file: Path) -> None:
    unknown = np.flatnonzero(images.labels >= classes)
    if len(unknown):
        item = int(unknown[0])
        raise DataError(
            f"unknown label {images.labels[item]} of item {item}: training has labels 0 to {classes - 1}", str(file)
        )

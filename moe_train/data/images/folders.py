"""Reads a folder of class folders: ``{train,valid,test}/CLASS/*.png``, or ``CLASS/*.png`` without splits."""

from __future__ import annotations

import hashlib
import itertools
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moe_train.config.tasks import ImageConfig
from moe_train.data.images.base import Images, ImageSet, Indices, Pixels, hold_out
from moe_train.data.images.pixels import check_depth, decode_image, has_colours, opened, upright_size
from moe_train.data.verification import InputFiles
from moe_train.errors import DataError, did_you_mean

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".pgm", ".ppm")
_SPLITS = {"train": "train", "valid": "valid", "val": "valid", "test": "test"}
_GREY = ("1", "L", "LA", "P", "I", "I;16", "I;16B", "I;16L")  # a palette may be grey or coloured
MAX_RECORDED = 50_000  # files; above, checksums of all files would take as long as training
LOG = logging.getLogger("moe_train")


@dataclass(frozen=True)
class FileStore:
    """Image files, opened when they are read.

    Attributes:
        shape: height and width of every image.
        resize: whether images are resized to ``shape``, a square; False: all have that size.
    """

    files: tuple[Path, ...]
    channels: int
    shape: tuple[int, int]
    resize: bool

    def __len__(self) -> int:
        return len(self.files)

    def read(self, indices: Indices) -> Pixels:
        """[B, H, W, C] of these files (at least one).

        Raises:
            DataError: one cannot be decoded, or its size differs from ``shape``.
        """
        return np.stack([self._one(self.files[int(i)]) for i in indices])

    def _one(self, path: Path) -> Pixels:
        with opened(path) as image:
            pixels = decode_image(image, self.channels, self.shape[0] if self.resize else None)
        if pixels.shape[:2] != self.shape:
            raise _of_another_size(path, pixels.shape[1::-1], self.shape[::-1])
        return pixels


def open_folders(path: Path, config: ImageConfig) -> Images:
    """Lists the files of all splits and reads their headers. Files that are ignored are named in a warning.

    Raises:
        DataError: no images; images below subfolders of a class folder; a class of a held-out split that is not in
            training; an image of another size (named, with both sizes).
    """
    unread: list[Path] = []
    listed = {split: _listing(folder, unread) for split, folder in _splits(path, unread).items()}
    listed = listed or {"train": _listing(path, unread)}
    if not listed.get("train"):
        raise DataError("there are no images to train on", str(path), f"give train/CLASS/*{SUFFIXES[0]}")
    if unread:
        more = f" and {len(unread) - 1:,} more" if len(unread) > 1 else ""
        LOG.warning("ignored, since it is not an image in a class folder: %s%s", unread[0], more)
    classes = tuple(sorted({file.parent.name for file in listed["train"]}))
    for split, files in listed.items():
        _check_classes(files, classes, split)
    height, width, channels = _check_sizes(listed, config)
    splits, uid = {}, 0
    for split, files in listed.items():
        store = FileStore(tuple(files), channels, (height, width), config.resize)
        labels = np.array([classes.index(file.parent.name) for file in files], np.int64)
        splits[split] = ImageSet(store, np.arange(len(files), dtype=np.int64), labels, uid)
        uid += len(files)
    if "valid" not in splits:
        splits["train"], splits["valid"] = hold_out(splits["train"], [config.valid_share])
    return Images(path, height, width, channels, classes, splits, _fingerprint(path, listed), _inputs(path, listed))


def _splits(path: Path, unread: list[Path]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    folders = [folder for folder in sorted(path.iterdir()) if folder.is_dir() and not folder.name.startswith(".")]
    for folder in folders:
        split = _SPLITS.get(folder.name)
        if split in found:
            what = f"both '{found[split].name}' and '{folder.name}' are there, which are the same split"
            raise DataError(what, str(path), "keep one of them, or merge them")
        if split is not None:
            found[split] = folder
    if found:
        unread += [folder for folder in folders if folder.name not in _SPLITS]
    return found


def _listing(folder: Path, unread: list[Path]) -> list[Path]:
    """Images of all classes; other files, and class folders without images, are appended to ``unread``."""
    files: list[Path] = []
    for entry in sorted(folder.iterdir()):
        if entry.is_dir() and not entry.name.startswith("."):
            images, others = _images_of_class(entry)
            files += images
            unread += others if images else [entry]
        elif entry.suffix.lower() in SUFFIXES:
            unread.append(entry)
    return files


def _images_of_class(folder: Path) -> tuple[list[Path], list[Path]]:
    images, others = [], []
    for entry in sorted(folder.iterdir()):
        if entry.suffix.lower() in SUFFIXES:
            images.append(entry)
        elif not entry.name.startswith("."):
            if entry.is_dir():
                _refuse_images_below(entry)
            others.append(entry)
    return images, others


def _refuse_images_below(folder: Path) -> None:
    for place, _, names in os.walk(folder):
        for name in names:
            if Path(name).suffix.lower() in SUFFIXES:
                raise DataError(
                    "an image below a subfolder of a class folder",
                    str(Path(place, name)),
                    "move it: images are in train/CLASS, valid/CLASS, test/CLASS, or all in CLASS",
                )


def _check_classes(files: list[Path], classes: tuple[str, ...], split: str) -> None:
    for file in files:
        if file.parent.name not in classes:
            what = f"unknown label '{file.parent.name}': training has no such class"
            raise DataError(what, str(file.parent), did_you_mean(file.parent.name, classes))


def _check_sizes(listed: dict[str, list[Path]], config: ImageConfig) -> tuple[int, int, int]:
    """Height, width and channels of all images."""
    first = listed["train"][0]
    with opened(first) as image:
        check_depth(image)
        size, channels = upright_size(image), config.channels or (3 if has_colours(image) else 1)
    if config.resize:
        side = config.image_size
        if side is None:
            raise DataError("resizing needs a size", str(first), "set task.image_size=…")
        return side, side, channels
    coloured = None
    for file in itertools.chain.from_iterable(listed.values()):
        with opened(file) as image:
            check_depth(image)
            if upright_size(image) != size:
                raise _of_another_size(file, upright_size(image), size)
            coloured = coloured or (file if image.mode not in _GREY else None)
    if channels == 1 and config.channels is None and coloured is not None:
        LOG.warning("%s is read as grey, since %s is; set task.channels=3", coloured, first)
    return size[1], size[0], channels


def _of_another_size(file: Path, found: Sequence[int], wanted: Sequence[int]) -> DataError:
    return DataError(
        f"an image of {found[0]} x {found[1]} pixels among images of {wanted[0]} x {wanted[1]}",
        str(file),
        "set task.resize=true task.image_size=…, or make all images the same size",
    )


def _inputs(path: Path, listed: dict[str, list[Path]]) -> InputFiles:
    """Files of which a run keeps checksums: all, or none above :data:`MAX_RECORDED`."""
    files = [str(file.relative_to(path)) for split in listed.values() for file in split]
    return InputFiles(path, tuple(files) if len(files) <= MAX_RECORDED else ())


def _fingerprint(path: Path, listed: dict[str, list[Path]]) -> str:
    """Checksum of names and sizes, so that a million files need not be read."""
    digest = hashlib.sha256()
    for split, files in sorted(listed.items()):
        for file in files:
            line = f"{split}/{file.relative_to(path)} {file.stat().st_size}\n"
            digest.update(line.encode(errors="surrogateescape"))  # names need not be UTF-8
    return digest.hexdigest()

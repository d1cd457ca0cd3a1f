"""A folder of class folders: ``{train,valid,test}/CLASS/*.png``, or ``CLASS/*.png`` where nothing is split yet."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moe_train.config.tasks import ImageConfig
from moe_train.data.images.base import Images, ImageSet, Indices, Pixels, hold_out
from moe_train.errors import DataError, MissingDependency, did_you_mean

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".pgm", ".ppm")
_SPLITS = {"train": "train", "valid": "valid", "val": "valid", "test": "test"}
_MODES = {1: "L", 3: "RGB"}


@dataclass(frozen=True)
class FileStore:
    """Image files, opened when they are wanted.

    Attributes:
        size: pixels of a side that every image is brought to; None: images are of one size already.
    """

    files: tuple[Path, ...]
    channels: int
    size: int | None

    def __len__(self) -> int:
        return len(self.files)

    def read(self, indices: Indices) -> Pixels:
        """[B, H, W, C] of these files (at least one)."""
        return np.stack([self._one(self.files[int(i)]) for i in indices])

    def _one(self, path: Path) -> Pixels:
        with _opened(path) as image:
            if self.size is not None:
                image = _squared(image, self.size)
            pixels = np.asarray(image.convert(_MODES[self.channels]), dtype=np.uint8)
        return pixels.reshape(*pixels.shape[:2], self.channels)


def open_folders(path: Path, config: ImageConfig) -> Images:
    """Lists the files of all splits and reads their headers.

    Raises:
        DataError: no images; a class of a held-out split that training has not; an image of another size than the rest
            (named, with both sizes).
    """
    found = {_SPLITS[p.name]: p for p in sorted(path.iterdir()) if p.is_dir() and p.name in _SPLITS}
    listed = {split: _listing(folder) for split, folder in found.items()} or {"train": _listing(path)}
    if not listed.get("train"):
        raise DataError("there are no images to train on", str(path), f"give train/CLASS/*{SUFFIXES[0]}")
    classes = tuple(sorted({file.parent.name for file in listed["train"]}))
    for split, files in listed.items():
        _check_classes(files, classes, split)
    height, width, channels = _check_sizes(listed, config)
    splits, uid = {}, 0
    for split, files in listed.items():
        store = FileStore(tuple(files), channels, config.image_size if config.resize else None)
        labels = np.array([classes.index(file.parent.name) for file in files], np.int64)
        splits[split] = ImageSet(store, np.arange(len(files), dtype=np.int64), labels, uid)
        uid += len(files)
    if "valid" not in splits:
        splits["train"], splits["valid"] = hold_out(splits["train"], [config.valid_share])
    return Images(path, height, width, channels, classes, splits, _fingerprint(path, listed))


def _listing(folder: Path) -> list[Path]:
    classes = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    return [f for c in classes for f in sorted(c.iterdir()) if f.suffix.lower() in SUFFIXES]


def _check_classes(files: list[Path], classes: tuple[str, ...], split: str) -> None:
    for file in files:
        if file.parent.name not in classes:
            what = f"unknown label '{file.parent.name}': training has no such class"
            raise DataError(what, str(file.parent), did_you_mean(file.parent.name, classes))


def _check_sizes(listed: dict[str, list[Path]], config: ImageConfig) -> tuple[int, int, int]:
    """Height, width and channels of all images."""
    first = listed["train"][0]
    with _opened(first) as image:
        (width, height), bands = image.size, len(image.getbands())
    channels = config.channels or (1 if bands == 1 else 3)
    if config.resize:
        size = config.image_size
        if size is None:
            raise DataError("images cannot be resized to nothing", str(first), "set task.image_size=…")
        return size, size, channels
    for files in listed.values():
        for file in files:
            with _opened(file) as image:
                if image.size != (width, height):
                    raise DataError(
                        f"an image of {image.size[0]} x {image.size[1]} pixels among images of {width} x {height}",
                        str(file),
                        "set task.resize=true task.image_size=…, or bring the images to one size",
                    )
    return height, width, channels


def _opened(path: Path) -> Any:
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError:
        raise MissingDependency("images in files need Pillow", remedy="install it: pip install pillow") from None
    try:
        return Image.open(path)
    except (OSError, UnidentifiedImageError) as error:
        raise DataError(f"the image cannot be read ({error})", str(path), "remove the file or fetch it again") from None


def _squared(image: Any, size: int) -> Any:
    """The shorter side scaled to ``size``, the middle of the longer one."""
    from PIL import Image

    width, height = image.size
    scale = size / min(width, height)
    scaled = image.resize(
        (max(size, round(width * scale)), max(size, round(height * scale))), Image.Resampling.BILINEAR
    )
    left, top = (scaled.size[0] - size) // 2, (scaled.size[1] - size) // 2
    return scaled.crop((left, top, left + size, top + size))


def _fingerprint(path: Path, listed: dict[str, list[Path]]) -> str:
    """Of names and sizes: a million files are not read for it."""
    digest = hashlib.sha256()
    for split, files in sorted(listed.items()):
        for file in files:
            digest.update(f"{split}/{file.relative_to(path)} {file.stat().st_size}\n".encode())
    return digest.hexdigest()

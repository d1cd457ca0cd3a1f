"""Opens images of any supported format, chosen by the config or by the content of the folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from moe_train.config.tasks import ImageConfig
from moe_train.data.images.base import Images, ImageSet, InMemory, hold_out
from moe_train.data.images.folders import open_folders
from moe_train.data.images.idx import has_idx, open_idx
from moe_train.data.text.lines import reading
from moe_train.data.verification import InputFiles
from moe_train.errors import DataError, MissingDependency

DIGITS = "digits"
_DIGITS_FILE = "digits.csv.gz"
_TEST_SHARE = 0.2


def open_images(data: str, config: ImageConfig) -> Images:
    """Opens the data that ``data=`` names: a folder, or ``digits``.

    Raises:
        DataError: the folder is missing or damaged, or images have another size than ``task.image_size``.
        MissingDependency: digits without scikit-learn.
    """
    path = Path(data)
    if data != DIGITS and not path.is_dir():
        raise DataError(
            "the folder of images does not exist", data, f"correct data=…, or data={DIGITS} for scikit-learn's"
        )
    kind = config.format
    if kind == "auto":
        kind = DIGITS if data == DIGITS else "idx" if has_idx(path) else "class_folders"  # type: ignore[assignment]
    with reading(path):
        images = _FORMATS[kind](path, config)
    _check_size(images, config)
    return images


def _check_size(images: Images, config: ImageConfig) -> None:
    wanted = config.image_size
    if wanted is not None and (images.height, images.width) != (wanted, wanted):
        raise DataError(
            f"images of {images.width} x {images.height} pixels, not {wanted} x {wanted} as in task.image_size",
            str(images.path),
            "omit task.image_size, or (class folders) set task.resize=true",
        )
    if config.channels is not None and images.channels != config.channels:
        raise DataError(f"images of {images.channels} channels, not {config.channels}", str(images.path))


def open_digits(path: Path, config: ImageConfig) -> Images:
    """scikit-learn's 1,797 handwritten digits of 8 x 8 pixels; a fixed fifth of them is the test split."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        remedy = "install it: pip install scikit-learn"
        raise MissingDependency(f"data={DIGITS} needs scikit-learn", remedy=remedy) from None
    values, labels = load_digits(return_X_y=True)
    pixels = np.rint(values.reshape(-1, 8, 8, 1) * (255.0 / 16.0)).astype(np.uint8)
    rows = np.arange(len(labels), dtype=np.int64)
    whole = ImageSet(InMemory(pixels), rows, np.asarray(labels, np.int64))
    train, valid, test = hold_out(whole, [config.valid_share, _TEST_SHARE])
    splits = {"train": train, "valid": valid, "test": test}
    fingerprint = f"scikit-learn digits {len(labels)}"
    return Images(path, 8, 8, 1, tuple("0123456789"), splits, fingerprint, _digits_file())


def _digits_file() -> InputFiles:
    """The file of the library with the digits."""
    import sklearn.datasets

    folder = Path(sklearn.datasets.__file__).parent / "data"
    return InputFiles(folder, (_DIGITS_FILE,) if (folder / _DIGITS_FILE).is_file() else ())


_FORMATS: dict[str, Callable[[Path, ImageConfig], Images]] = {
    "idx": open_idx,
    "class_folders": open_folders,
    DIGITS: open_digits,
}

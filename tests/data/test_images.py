"""Images from IDX files, class folders and scikit-learn: what is read, what is refused and how it is said."""

from __future__ import annotations

import gzip
import os
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from moe_train.config import ImageConfig
from moe_train.data.images import open_images
from moe_train.data.images.base import hold_out
from moe_train.errors import DataError, MissingDependency
from tests.data.image_files import write_class_folders, write_idx, write_idx_folder

PIXELS = np.arange(40 * 6 * 5, dtype=np.int64).reshape(40, 6, 5).astype(np.uint8)
LABELS = (np.arange(40) % 4).astype(np.uint8)


@pytest.fixture
def idx(tmp_path: Path) -> Path:
    write_idx_folder(tmp_path, PIXELS, LABELS, PIXELS[:8], LABELS[:8])
    return tmp_path


def everything(data: Path) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Pixels and labels of train and valid, by the images' own numbers."""
    images = open_images(str(data), ImageConfig())
    splits = [images.splits[name] for name in ("train", "valid")]
    uids = np.concatenate([s.uids(np.arange(len(s))) for s in splits])
    pixels = np.concatenate([s.read(np.arange(len(s))) for s in splits])
    labels = np.concatenate([s.labels for s in splits])
    order = np.argsort(uids)
    assert (uids[order] == np.arange(len(uids))).all()
    return pixels[order], labels[order]


@pytest.mark.parametrize("compressed", [False, True])
def test_idx_files_are_read_as_they_were_written(tmp_path: Path, compressed: bool) -> None:
    write_idx_folder(tmp_path, PIXELS, LABELS, PIXELS[:8], LABELS[:8], compressed)
    pixels, labels = everything(tmp_path)
    assert (pixels == PIXELS[..., None]).all() and (labels == LABELS).all()
    images = open_images(str(tmp_path), ImageConfig(valid_share=0.25))
    assert {name: len(split) for name, split in images.splits.items()} == {"train": 30, "valid": 10, "test": 8}
    assert (images.height, images.width, images.channels, images.classes) == (6, 5, 1, ("0", "1", "2", "3"))
    assert images.splits["test"].uids(np.arange(8)).min() == 40


def test_the_held_out_images_are_the_same_every_time(idx: Path) -> None:
    first, second = (open_images(str(idx), ImageConfig()).splits["valid"].rows for _ in range(2))
    assert (first == second).all()


@pytest.mark.parametrize("cut", [1, 700])
def test_an_idx_file_cut_short_is_named_with_its_bytes(idx: Path, cut: int) -> None:
    file = idx / "train-images-idx3-ubyte"
    whole = 16 + PIXELS.size
    file.write_bytes(file.read_bytes()[:-cut])
    with pytest.raises(DataError) as raised:
        open_images(str(idx), ImageConfig())
    assert raised.value.where == str(file)
    assert f"{whole} bytes expected, {whole - cut} found" in raised.value.what


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"\0\0\x08\x03\0\0\0\x28\0\0", "ends within its header of 16 bytes"),
        (b"\0\0\x08\xff", "not an IDX file of unsigned bytes"),
        (b"\0\0\x08\x00", "not an IDX file of unsigned bytes"),
        (b"\0\0\x08\x03" + 12 * b"\xff", "bytes expected, 16 found"),
        (b"\0\0\x08\x03" + 8 * b"\xff" + 4 * b"\0", "IDX file is empty"),
        (b"\0\0\x08\x03\0\0\0\x28\0\0\0\0\0\0\0\0", "IDX file is empty"),
    ],
)
def test_an_idx_header_that_cannot_be_is_named(idx: Path, header: bytes, message: str) -> None:
    file = idx / "train-images-idx3-ubyte"
    file.write_bytes(header)
    with pytest.raises(DataError, match=message) as raised:
        open_images(str(idx), ImageConfig())
    assert raised.value.where == str(file)


def test_a_folder_that_is_deleted_while_it_is_opened(idx: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(open_images(str(idx), ImageConfig()).inputs.names) == {path.name for path in idx.iterdir()}

    def taken_and_gone(*arguments: Any, real: Callable[..., Any] = hold_out) -> Any:
        shutil.rmtree(idx, ignore_errors=True)
        return real(*arguments)

    monkeypatch.setattr("moe_train.data.images.idx.hold_out", taken_and_gone)
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte: it cannot be read \(No such file"):
        open_images(str(idx), ImageConfig())


def test_a_compressed_file_cut_short_is_named(tmp_path: Path) -> None:
    write_idx_folder(tmp_path, PIXELS, LABELS, PIXELS[:8], LABELS[:8], compressed=True)
    file = tmp_path / "train-labels-idx1-ubyte.gz"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(DataError, match="cut short") as raised:
        open_images(str(tmp_path), ImageConfig())
    assert raised.value.where == str(file)


def test_other_mistakes_in_idx_files(idx: Path) -> None:
    (idx / "t10k-labels-idx1-ubyte").write_bytes(write_idx(np.full(8, 9, np.uint8)))
    with pytest.raises(DataError, match="unknown label 9 of item 0: training has labels 0 to 3"):
        open_images(str(idx), ImageConfig())
    (idx / "train-labels-idx1-ubyte").write_bytes(write_idx(LABELS[:-1]))
    with pytest.raises(DataError, match="40 images and 39 labels"):
        open_images(str(idx), ImageConfig())
    (idx / "train-labels-idx1-ubyte").write_bytes(b"\0\0\x0d\1" + struct.pack(">i", 1) + b"\0" * 4)
    with pytest.raises(DataError, match="not an IDX file of unsigned bytes"):
        open_images(str(idx), ImageConfig())
    (idx / "train-labels-idx1-ubyte").unlink()
    with pytest.raises(DataError, match=r"train-labels-idx1-ubyte \(or .*gz\) is missing"):
        open_images(str(idx), ImageConfig())


def test_a_size_that_the_images_do_not_have_is_refused(idx: Path) -> None:
    with pytest.raises(DataError, match="images of 5 x 6 pixels, not 7 x 7"):
        open_images(str(idx), ImageConfig(image_size=7))


def test_class_folders(tmp_path: Path) -> None:
    written = write_class_folders(tmp_path / "train", {"cat": 5, "dog": 7}, size=(9, 8))
    write_class_folders(tmp_path / "val", {"dog": 2}, size=(9, 8))
    images = open_images(str(tmp_path), ImageConfig())
    assert images.classes == ("cat", "dog") and (images.height, images.width, images.channels) == (8, 9, 3)
    assert images.splits["train"].labels.tolist() == [0] * 5 + [1] * 7 and images.splits["valid"].labels.tolist() == [
        1,
        1,
    ]
    read = images.splits["train"].read(np.array([6, 0]))
    assert (read[0] == written["dog"][1]).all() and (read[1] == written["cat"][0]).all()
    grey = open_images(str(tmp_path), ImageConfig(channels=1))
    assert grey.splits["train"].read(np.array([0])).shape == (1, 8, 9, 1)


def test_class_folders_without_splits_hold_some_out(tmp_path: Path) -> None:
    write_class_folders(tmp_path, {"a": 10, "b": 10}, size=(4, 4))
    images = open_images(str(tmp_path), ImageConfig(valid_share=0.2))
    train, valid = (set(images.splits[n].rows.tolist()) for n in ("train", "valid"))
    assert len(valid) == 4 and train | valid == set(range(20)) and not train & valid


def test_an_image_of_another_size_is_named(tmp_path: Path) -> None:
    write_class_folders(tmp_path / "train", {"cat": 3}, size=(8, 8))
    write_class_folders(tmp_path / "train", {"dog": 2}, size=(8, 6))
    with pytest.raises(DataError, match="an image of 8 x 6 pixels among images of 8 x 8") as raised:
        open_images(str(tmp_path), ImageConfig())
    assert raised.value.where == str(tmp_path / "train" / "dog" / "0.png")
    resized = open_images(str(tmp_path), ImageConfig(resize=True, image_size=4))
    assert resized.splits["train"].read(np.arange(4)).shape == (4, 4, 4, 3)


def test_a_class_that_training_has_not_is_named(tmp_path: Path) -> None:
    write_class_folders(tmp_path / "train", {"cat": 3, "dog": 3}, size=(8, 8))
    write_class_folders(tmp_path / "valid", {"dgo": 1}, size=(8, 8))
    with pytest.raises(DataError, match="unknown label 'dgo'") as raised:
        open_images(str(tmp_path), ImageConfig())
    assert "Did you mean 'dog'?" in str(raised.value) and raised.value.where.endswith("valid/dgo")


def test_a_damaged_image_is_named(tmp_path: Path) -> None:
    write_class_folders(tmp_path, {"cat": 3}, size=(8, 8))
    (tmp_path / "cat" / "1.png").write_bytes(b"not a picture")
    with pytest.raises(DataError, match="cannot be read") as raised:
        open_images(str(tmp_path), ImageConfig())
    assert raised.value.where.endswith("1.png")


def test_an_image_deeper_than_its_class_is_named(tmp_path: Path) -> None:
    """Its class would vanish otherwise, or get another name."""
    write_class_folders(tmp_path / "train", {"cat": 3}, size=(8, 8))
    write_class_folders(tmp_path / "train" / "wild", {"fox": 3}, size=(8, 8))
    with pytest.raises(DataError, match="below a subfolder of a class folder") as raised:
        open_images(str(tmp_path), ImageConfig())
    assert raised.value.where.startswith(str(tmp_path / "train" / "wild" / "fox"))


def test_what_is_not_read_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_class_folders(tmp_path / "train", {"cat": 3, "dog": 3}, size=(8, 8))
    open_images(str(tmp_path), ImageConfig())
    assert not caplog.text
    for name in ("validation/cat/0.png", "train/emu/0.heic", "train/cat/3.heic", "train/alone.png", "train/.hidden"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert open_images(str(tmp_path), ImageConfig()).classes == ("cat", "dog")
    assert f"{tmp_path / 'validation'} and 3 more" in caplog.text


def test_one_split_under_two_names_is_refused(tmp_path: Path) -> None:
    for split in ("train", "val", "valid"):
        write_class_folders(tmp_path / split, {"cat": 3}, size=(8, 8))
    with pytest.raises(DataError, match="both 'val' and 'valid' are there"):
        open_images(str(tmp_path), ImageConfig())


def test_colours_among_grey_images_are_mentioned(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_class_folders(tmp_path, {"a": 1, "b": 9}, size=(4, 4))
    Image.new("L", (4, 4)).save(tmp_path / "a" / "0.png")
    assert open_images(str(tmp_path), ImageConfig()).channels == 1
    assert f"{tmp_path / 'b' / '0.png'} is read as grey" in caplog.text
    caplog.clear()
    assert open_images(str(tmp_path), ImageConfig(channels=1)).channels == 1 and not caplog.text


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    write_class_folders(tmp_path, {"a": 9}, size=(4, 4))
    (tmp_path / "a" / "0.png").rename(tmp_path / "a" / os.fsdecode(b"\xff.png"))
    assert len(open_images(str(tmp_path), ImageConfig()).fingerprint) == 64


def test_digits_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(MissingDependency, match=r"needs scikit-learn\. Install it: pip install scikit-learn\.$"):
        open_images("digits", ImageConfig())


def test_digits() -> None:
    pytest.importorskip("sklearn", reason="needs the extra 'images'")
    images = open_images("digits", ImageConfig())
    assert sum(len(split) for split in images.splits.values()) == 1797 and len(images.splits["test"]) == 359
    pixels = images.splits["train"].read(np.arange(100))
    assert pixels.shape == (100, 8, 8, 1) and pixels.max() == 255 and pixels.dtype == np.uint8


def test_fashion_mnist_where_debian_has_put_it() -> None:
    folder = Path("/usr/share/datasets/fashion-mnist")
    if not folder.is_dir():
        pytest.skip("needs apt-get install dataset-fashion-mnist")
    images = open_images(str(folder), ImageConfig(valid_share=0.1))
    assert {name: len(split) for name, split in images.splits.items()} == {"train": 54000, "valid": 6000, "test": 10000}
    assert (images.height, images.width, images.channels, len(images.classes)) == (28, 28, 1, 10)
    assert np.bincount(images.splits["test"].labels).tolist() == [1000] * 10
    with gzip.open(folder / "t10k-images-idx3-ubyte.gz") as stream:
        assert images.splits["test"].read(np.arange(1)).tobytes() == stream.read(16 + 784)[16:]


def test_nothing_there() -> None:
    with pytest.raises(DataError, match="folder of images does not exist"):
        open_images("/nowhere/at/all", ImageConfig())

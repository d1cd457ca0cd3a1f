"""fairseq's memory-mapped files: what they say is checked before it is believed."""

from __future__ import annotations

import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from moe_train.data.folder import DataFolder
from moe_train.errors import DataError
from moe_train.tasks.indexed_dataset import SentenceFile
from tests.tasks.helpers import make_task

HEADER = 26
NAME = "valid.en-de.de"


@pytest.fixture
def prefix(tiny_data: DataFolder, tmp_path: Path) -> Path:
    for suffix in (".idx", ".bin"):
        shutil.copyfile(tiny_data.path / f"{NAME}{suffix}", tmp_path / f"{NAME}{suffix}")
    return tmp_path / NAME


def index(prefix: Path) -> Path:
    return prefix.with_name(f"{NAME}.idx")


def patched(path: Path, at: int, content: bytes) -> None:
    whole = bytearray(path.read_bytes())
    whole[at : at + len(content)] = content
    path.write_bytes(bytes(whole))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.write_bytes(b""), "ends within its header of 26 bytes"),
        (lambda p: p.write_bytes(p.read_bytes()[:20]), "ends within its header of 26 bytes"),
        (lambda p: p.write_bytes(random.Random(1).randbytes(p.stat().st_size)), "no index of fairseq's mmap format"),
        (lambda p: patched(p, 0, b"TNTIDX\0\0"), "no index of fairseq's mmap format"),
        (lambda p: patched(p, 9, struct.pack("<Q", 2)), "no index of fairseq's mmap format"),
        (lambda p: patched(p, 17, b"\x07"), "with whole numbers"),
        (lambda p: p.write_bytes(p.read_bytes()[:-1]), "of 20 sentences has 266 bytes, this has 265"),
        (lambda p: patched(p, 18, struct.pack("<Q", 2**63)), "has 110,680,464,442,257,309,722 bytes, this has 266"),
        (lambda p: patched(p, HEADER + 8, struct.pack("<i", -5)), "the sentence 2 has a size of -5 tokens"),
        (lambda p: patched(p, HEADER + 8, struct.pack("<i", 0)), "the sentence 2 has a size of 0 tokens"),
        (lambda p: patched(p, HEADER + 8, struct.pack("<i", 9999)), "the offsets are not those of the sizes"),
        (lambda p: patched(p, HEADER + 80 + 16, struct.pack("<q", 2**40)), "the offsets are not those of the sizes"),
        (lambda p: patched(p, HEADER + 80, struct.pack("<q", -8)), "the offsets are not those of the sizes"),
        (lambda p: patched(p, 17, b"\x05"), "the offsets are not those of the sizes"),
        (lambda p: patched(p, HEADER + 76, struct.pack("<i", 9999)), f"{NAME}.bin has"),
    ],
)
def test_an_index_that_cannot_be_is_named(prefix: Path, change: Callable[[Path], object], message: str) -> None:
    change(index(prefix))
    with pytest.raises(DataError) as raised:
        SentenceFile(prefix, 488)
    assert message in raised.value.what and raised.value.where == str(index(prefix))


def test_tokens_that_do_not_fit_their_index_are_named(prefix: Path) -> None:
    data = prefix.with_name(f"{NAME}.bin")
    whole = data.read_bytes()
    for content in (whole[:-2], whole + b"\0\0", b""):
        data.write_bytes(content)
        with pytest.raises(DataError, match=rf"the index is of {len(whole):,} bytes, .*\.bin has {len(content):,}"):
            SentenceFile(prefix)
    data.unlink()
    with pytest.raises(DataError, match=r"\.bin: it cannot be read \(No such file"):
        SentenceFile(prefix)


def test_flipped_bytes_are_refused_or_harmless(prefix: Path, tiny_data: DataFolder) -> None:
    whole, refused = index(prefix).read_bytes(), 0
    want = [SentenceFile(prefix).sentence(n).tolist() for n in range(20)]
    for seed in range(200):
        draw = random.Random(seed)
        patched(index(prefix), draw.randrange(len(whole)), bytes([draw.randrange(256)]))
        try:
            file = SentenceFile(prefix, 488)
            assert [file.sentence(n).tolist() for n in range(len(file))] == want
        except DataError as error:
            refused += 1
            assert NAME in error.where
        index(prefix).write_bytes(whole)
    assert refused > 150


def test_a_token_beyond_the_dictionary_is_named(tiny_data: DataFolder, tmp_path: Path) -> None:
    """Where checksums are not asked for, and where the manifest was made of such files."""
    copy = Path(shutil.copytree(tiny_data.path, tmp_path / "data"))
    task = make_task(DataFolder.open(copy))
    file = SentenceFile(copy / "train.en-de.de")
    position = int(file.sizes[:7].sum()) * 2
    patched(copy / "train.en-de.de.bin", position, struct.pack("<H", 488))
    text = task.split("train")
    names = [direction.name for direction in text.directions]
    first = sum(text.sizes[: names.index("en-de")])
    task.train_sample(np.arange(first, first + 7))
    for rows in (np.array([first + 7]), np.arange(first, first + 20)):
        with pytest.raises(DataError, match="the token id 488 is none of the dictionary's 488 entries") as raised:
            task.train_sample(rows)
        assert raised.value.where == str(copy / "train.en-de.de.bin")
    with pytest.raises(DataError, match="token id 488"):
        SentenceFile(copy / "train.en-de.de", 488).sentence(7)


def test_a_folder_that_is_deleted_at_the_start(tiny_data: DataFolder, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_data.path, tmp_path / "data"))
    task = make_task(DataFolder.open(copy))
    assert len(task.dictionary) == 488
    shutil.rmtree(copy)
    with pytest.raises(DataError, match=r"\.idx: it cannot be read \(No such file"):
        task.split("train")


def test_files_of_another_number_of_sentences_than_the_manifest_s(tiny_data: DataFolder, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_data.path, tmp_path / "data"))
    task = make_task(DataFolder.open(copy))
    for suffix in ("de.idx", "de.bin", "en.idx", "en.bin"):
        shutil.copyfile(copy / f"valid.en-de.{suffix}", copy / f"train.en-de.{suffix}")
    with pytest.raises(DataError, match=r"20 source and 20 target sentences in train\.en-de, .* manifest has 200"):
        task.split("train")

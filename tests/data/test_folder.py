"""The data folder: what is written can be read, and what is damaged is noticed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from moe_train.data.folder import DataFolder
from moe_train.data.tokenizer import EOS
from moe_train.errors import DataError
from tests.data import tiny_corpus


@pytest.fixture
def copy(tiny_data: DataFolder, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_data.path, tmp_path / "data"))


def test_names_what_it_holds(tiny_data: DataFolder) -> None:
    assert tiny_data.languages == ("de", "en", "fr", "ja")
    assert tiny_data.directions == ("de-en", "en-de", "en-fr", "en-ja", "fr-en", "ja-en")
    assert tiny_data.manifest.counts["train"] == {"en-de": 200, "en-fr": 200, "en-ja": 200}
    assert all(tiny_data.directions_of(split) == tiny_data.directions for split in ("train", "valid", "test"))
    assert set(tiny_data.tiers.values()) == {"low"}


def test_dictionary_is_pieces_then_tags_then_mask(tiny_data: DataFolder) -> None:
    dictionary, tokenizer = tiny_data.dictionary(), tiny_data.tokenizer()
    assert len(dictionary) == tiny_data.manifest.vocabulary == 480 + 3 + 4 + 1
    assert dictionary.symbols[:4] == ["<s>", "<pad>", "</s>", "<unk>"]
    assert dictionary.symbols[4 : 480 + 3] == tokenizer.pieces
    assert dictionary.symbols[-5:] == ["__de__", "__en__", "__fr__", "__ja__", "<mask>"]
    for language in tiny_data.languages:
        assert (tiny_data.path / f"dict.{language}.txt").read_bytes() == (tiny_data.path / "dict.txt").read_bytes()


@pytest.mark.parametrize("direction", ["en-ja", "ja-en", "fr-en"])
def test_binarised_files_are_the_raw_lines(tiny_data: DataFolder, direction: str) -> None:
    from fairseq.data.indexed_dataset import MMapIndexedDataset

    dictionary, tokenizer = tiny_data.dictionary(), tiny_data.tokenizer()
    files = tiny_data.pair_files("test", direction)
    for prefix, lines in zip((files.source, files.target), tiny_data.raw("test", direction), strict=True):
        data = MMapIndexedDataset(str(prefix))
        assert len(data) == len(lines) == files.sentences == 20
        for ids, line in zip(data, lines, strict=True):
            assert ids[-1] == EOS
            assert tokenizer.decode(ids) == line
            assert [dictionary.index(piece) for piece in tokenizer.to_pieces(line)] == ids[:-1].tolist()
            assert tokenizer.encode(line) == ids[:-1].tolist()


def test_counts_of_the_dictionary_are_training_frequencies(tiny_data: DataFolder) -> None:
    from fairseq.data.indexed_dataset import MMapIndexedDataset

    dictionary = tiny_data.dictionary()
    counted = np.zeros(len(dictionary), dtype=np.int64)
    for pair in ("en-de", "en-fr", "en-ja"):
        for language in pair.split("-"):
            for ids in MMapIndexedDataset(str(tiny_data.path / f"train.{pair}.{language}")):
                counted += np.bincount(ids[:-1].numpy(), minlength=len(counted))
    assert counted[4:].tolist() == dictionary.count[4:]


def test_raw_is_what_the_user_gave(tiny_data: DataFolder) -> None:
    test = [tiny_corpus.sentence("fr", *parts) for parts in tiny_corpus.sentences(20)]
    assert tiny_data.raw("test", "fr-en")[0] == test
    assert tiny_data.raw("test", "en-fr")[1] == test


def test_unknown_direction_offers_near_spellings(tiny_data: DataFolder) -> None:
    with pytest.raises(DataError, match=r"no direction 'en-dee'.*'en-de'"):
        tiny_data.pair_files("test", "en-dee")
    with pytest.raises(DataError, match=r"no split 'tset'.*'test'"):
        tiny_data.pair_files("tset", "en-de")
    with pytest.raises(DataError, match="no raw training text"):
        tiny_data.raw("train", "en-de")


def test_missing_or_unfinished_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        DataFolder.open(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"manifest.json is missing"):
        DataFolder.open(tmp_path)


def test_truncated_and_missing_files_are_named(copy: Path) -> None:
    victim = copy / "train.en-fr.fr.bin"
    victim.write_bytes(victim.read_bytes()[:-4])
    with pytest.raises(DataError, match=r"train\.en-fr\.fr\.bin: the file has \d+ bytes instead of \d+"):
        DataFolder.open(copy)
    victim.unlink()
    with pytest.raises(DataError, match=r"train\.en-fr\.fr\.bin: the file is missing"):
        DataFolder.open(copy)


def test_altered_file_is_found_by_checksum(copy: Path) -> None:
    victim = copy / "spm.model"
    content = bytearray(victim.read_bytes())
    content[100] ^= 1
    victim.write_bytes(bytes(content))
    DataFolder.open(copy)
    with pytest.raises(DataError, match=r"spm\.model: the file's checksum"):
        DataFolder.open(copy, verify=True)


@pytest.mark.parametrize("content", ["{", '{"format": 1}', '{"format": 7}'])
def test_manifest_of_another_kind(copy: Path, content: str) -> None:
    (copy / "manifest.json").write_text(content)
    with pytest.raises(DataError, match="has format 7" if "7" in content else "cannot be read"):
        DataFolder.open(copy)


def test_manifest_describes_every_file(tiny_data: DataFolder) -> None:
    values = json.loads((tiny_data.path / "manifest.json").read_text())
    there = {p.relative_to(tiny_data.path).as_posix() for p in tiny_data.path.rglob("*") if p.is_file()}
    assert there == {"manifest.json", *values["files"]}
    DataFolder.open(tiny_data.path, verify=True)

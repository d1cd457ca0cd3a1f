"""The data folder: what is written can be read, and what is damaged is noticed."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_train.data.folder import DataFolder
from moe_train.data.text.tokenizer import EOS
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


def _zeroed(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def _swapped(path: Path) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], lines[3], lines[2], *lines[4:]]))


@pytest.mark.parametrize(
    ("name", "alter"),
    [
        ("train.en-de.de.bin", _zeroed),
        ("dict.txt", _swapped),
        ("spm.model", _zeroed),
        ("raw/test.en-fr.fr", _swapped),
        ("test.en-ja.en.idx", _zeroed),
    ],
)
def test_a_file_altered_at_its_size_is_named(
    copy: Path, name: str, alter: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = DataFolder.open(copy)
    folder.verify()
    alter(copy / name)
    folder = DataFolder.open(copy)
    folder.verify("never")
    for how in ("once", "always"):
        with pytest.raises(DataError, match="the file's checksum is not the manifest's") as raised:
            folder.verify(how)  # type: ignore[arg-type]
        assert raised.value.where == str(copy / name)
    if name.startswith("train"):
        folder.verify(training=False)  # sentences that only training reads


def test_processes_that_share_the_work_find_what_one_would(copy: Path) -> None:
    _zeroed(copy / "valid.en-de.de.bin")
    found = []
    for number in range(3):
        try:
            DataFolder.open(copy).verify("always", share=(number, 3))
        except DataError as error:
            found.append(Path(error.where).name)
    assert found == ["valid.en-de.de.bin"]


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


def _altered(values: dict[str, Any], draw: random.Random) -> None:
    """Gives one value, somewhere in the manifest, another type or sign, or takes it away."""
    place: Any = values
    while True:
        key = draw.choice(list(place) if isinstance(place, dict) else range(len(place)))
        if isinstance(place[key], dict | list) and place[key] and draw.random() < 0.8:
            place = place[key]
            continue
        if draw.random() < 0.2:
            del place[key]
        else:
            place[key] = draw.choice([None, -1, 10**30, 0.5, True, "", "../up", "en-de", [], {}, [[1]], {"en": 1}])
        return


def test_an_altered_manifest_is_refused_or_harmless(copy: Path, tiny_data: DataFolder) -> None:
    """Never a traceback, and whatever is still read is what was read before."""
    original, refused = (copy / "manifest.json").read_bytes(), 0
    for seed in range(150):
        draw, values = random.Random(seed), json.loads(original)
        _altered(values, draw)
        (copy / "manifest.json").write_text(json.dumps(values))
        try:
            folder = DataFolder.open(copy)
            assert len(folder.dictionary()) == len(tiny_data.dictionary())
            for direction in folder.directions_of("test"):
                assert folder.raw("test", direction) == tiny_data.raw("test", direction)
        except DataError as error:
            refused += 1
            assert error.where.startswith(str(copy)), error
    assert 80 < refused < 150


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["files"].pop("dict.txt"), "it has no checksum of 'dict.txt'"),
        (lambda m: m["files"].pop("raw/valid.en-ja.ja"), "it has no checksum of 'raw/valid.en-ja.ja'"),
        (lambda m: m.update(files={}), "it has no checksum of 'spm.model'"),
        (lambda m: m["files"].update({"../x": m["files"]["dict.txt"]}), "'../x' is not inside the folder"),
        (lambda m: m["files"]["dict.txt"].update(bytes="7"), "the size or checksum of 'dict.txt' is not valid"),
        (lambda m: m["counts"]["train"].update({"en-de": -1}), "there are -1 sentences of 'en-de' in 'train'"),
        (lambda m: m["counts"]["train"].update({"en-xx": 1}), "the text 'en-xx' has a language that is not listed"),
        (lambda m: m.update(languages=["fr", "de", "en", "ja"]), "'languages' are not sorted"),
        (lambda m: m.update(directions=["en-de-fr"]), "'en-de-fr' is not a pair of languages"),
        (lambda m: m.update(vocabulary="many"), "'vocabulary' is a str"),
        *((lambda m, v=v: m.update(vocabulary=v), f"'vocabulary' cannot be {v}") for v in (True, -5, 0, 10**30)),
        (lambda m: m.update(format=True), "'format' cannot be True"),
        (lambda m: m.update(tiers={"en": 5}), "'tiers' has values of another type"),
        (lambda m: m.update(cleaning={"train.en-de": 5}), "'cleaning' has values of another type"),
        (lambda m: m.update(overlap={"test": {"en-de": {"en": -1}}}), "'overlap' has values of another type"),
        (lambda m: m["files"]["dict.txt"].update(bytes=-1), "the size of 'dict.txt' cannot be -1"),
        (lambda m: m["files"]["dict.txt"].update(bytes=True), "the size or checksum of 'dict.txt' is not valid"),
        (lambda m: m["files"].update({"a\0b": m["files"]["dict.txt"]}), r"'a\x00b' is not inside the folder"),
        (lambda m: m["files"].update({"a\ud800": m["files"]["dict.txt"]}), r"'a\ud800' is not inside the folder"),
    ],
)
def test_what_is_wrong_with_a_manifest_is_said(copy: Path, change: Callable[[Any], object], message: str) -> None:
    values = json.loads((copy / "manifest.json").read_text())
    change(values)
    (copy / "manifest.json").write_text(json.dumps(values))
    with pytest.raises(DataError, match=re.escape(message)) as raised:
        DataFolder.open(copy)
    assert raised.value.where == str(copy / "manifest.json")


def test_a_deep_manifest_is_no_traceback(copy: Path) -> None:
    (copy / "manifest.json").write_text("[" * 200_000)
    with pytest.raises(DataError, match=r"manifest\.json: the manifest cannot be read"):
        DataFolder.open(copy)


def test_a_vocabulary_of_another_size_than_the_manifest_s(copy: Path) -> None:
    """Found without checksums, too: its ids would be others'."""
    folder = DataFolder.open(copy)
    entries = (copy / "dict.txt").read_bytes().splitlines(keepends=True)
    (copy / "dict.txt").write_bytes(b"".join(entries[:-6]))
    with pytest.raises(DataError, match=r"dict\.txt: .*the vocabulary has \d+ entries, but 488"):
        folder.dictionary()
    (copy / "dict.txt").write_bytes(b"".join(entries).replace(b"__fr__", b"__xx__"))
    with pytest.raises(DataError, match=r"dict\.txt: the dictionary has no '__fr__'"):
        folder.dictionary()
    for content in (b"\xff\xfe\n", b"one\n", b"a 1\na 1\n"):
        (copy / "dict.txt").write_bytes(content)
        with pytest.raises(DataError, match=r"dict\.txt: this is not a dictionary"):
            folder.dictionary()


def test_a_folder_that_is_deleted_after_it_was_opened(copy: Path) -> None:
    folder = DataFolder.open(copy)
    shutil.rmtree(copy)
    for read in (folder.dictionary, folder.tokenizer, folder.verify, lambda: folder.raw("test", "en-de")):
        with pytest.raises(DataError, match=r"No such file"):
            read()
    with pytest.raises(DataError, match=r"No such file"):
        _ = folder.fingerprint


def test_raw_text_has_as_many_lines_as_the_manifest_says(copy: Path) -> None:
    folder, victim = DataFolder.open(copy), copy / "raw" / "test.en-de.de"
    victim.write_bytes(victim.read_bytes().replace(b"\n", b" ", 1))
    with pytest.raises(DataError, match=r"test\.en-de\.de: the file has 19 lines instead of 20"):
        folder.raw("test", "en-de")

"""Labelled texts: what is read, and what is refused with its file and line."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_train.data.labelled import LabelledTexts
from moe_train.errors import DataError

TRAIN = "fruit\tan apple\nanimal\ta dog\tand a cat\nfruit\ta pear\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "train.en.tsv").write_text(TRAIN)
    (tmp_path / "valid.en.tsv").write_text("animal\ta cat\n")
    (tmp_path / "test.de.tsv").write_text("animal\tein Hund\nfruit\tein Apfel\n")
    (tmp_path / "test.de.in_en.tsv").write_text("animal\ta dog\nfruit\tan apple\n")
    return tmp_path


def test_what_is_read(folder: Path) -> None:
    texts = LabelledTexts.open(folder, ["en"])
    assert texts.classes == ("animal", "fruit")
    train = texts.splits["train"]["en"]
    assert train.labels == (1, 0, 1) and train.texts == ("an apple", "a dog\tand a cat", "a pear")
    assert set(texts.splits["test"]) == {"de", "de.in_en"}
    uids = [(f.first_uid, len(f.texts)) for split in texts.splits.values() for f in split.values()]
    assert sorted(uids) == [(0, 3), (3, 1), (4, 2), (6, 2)]
    before = texts.fingerprint
    (folder / "valid.en.tsv").write_text("animal\ta cot\n")
    assert LabelledTexts.open(folder, ["en"]).fingerprint != before


@pytest.mark.parametrize(
    "written",
    [
        b"\xef\xbb\xbf" + TRAIN.encode(),
        TRAIN.encode().replace(b"\n", b"\r\n"),
        TRAIN.encode().replace(b"animal", b"\xef\xbb\xbfanimal"),  # of a file that was joined to another
    ],
    ids=["mark", "carriage returns", "marks amid the file"],
)
def test_byte_order_marks_and_carriage_returns_make_no_classes(folder: Path, written: bytes) -> None:
    (folder / "train.en.tsv").write_bytes(written)
    (folder / "test.de.tsv").write_bytes(b"\xef\xbb\xbf" + (folder / "test.de.tsv").read_bytes())
    texts = LabelledTexts.open(folder, ["en"])
    assert texts.classes == ("animal", "fruit")
    assert texts.splits["train"]["en"].texts == ("an apple", "a dog\tand a cat", "a pear")
    assert texts.splits["test"]["de"].labels == (0, 1)


@pytest.mark.parametrize(("bad", "message"), [(b"\xf6", "line 2 is not UTF-8"), (b"\0", "line 2 contains a NUL")])
def test_what_is_no_text_is_named_with_file_and_line(folder: Path, bad: bytes, message: str) -> None:
    (folder / "test.de.tsv").write_bytes(b"animal\tein Hund\nfruit\tein " + bad + b"pfel\n")
    with pytest.raises(DataError, match=rf"test\.de\.tsv: {message}"):
        LabelledTexts.open(folder, ["en"])


def test_dev_and_val_are_valid_and_what_is_not_read_is_known(folder: Path) -> None:
    (folder / "valid.en.tsv").rename(folder / "dev.en.tsv")
    (folder / "val.de.tsv").write_text("animal\tein Hund\n")
    for name in ("tset.fr.tsv", "README", ".hidden"):
        (folder / name).write_text("animal\tun chien\n")
    texts = LabelledTexts.open(folder, ["en"])
    assert set(texts.splits["valid"]) == {"en", "de"} and texts.unread == ["README", "tset.fr.tsv"]
    (folder / "valid.de.tsv").write_text("animal\tein Hund\n")
    with pytest.raises(DataError, match=r"both 'val\.de' and 'valid\.de' would be validation text"):
        LabelledTexts.open(folder, ["en"])


def test_files_may_name_languages_by_other_codes_than_the_config(folder: Path) -> None:
    (folder / "train.en.tsv").rename(folder / "train.eng_Latn.tsv")
    (folder / "test.de.in_en.tsv").rename(folder / "test.deu.in_eng_Latn.tsv")
    texts = LabelledTexts.open(folder, ["en"])
    assert {split: set(named) for split, named in texts.splits.items()} == {
        "train": {"en"},
        "valid": {"en"},
        "test": {"de", "de.in_en"},
    }
    (folder / "test.deu_Latn.tsv").write_text("animal\tein Hund\n")
    with pytest.raises(DataError, match=r"'test\.de\.tsv' and 'test\.deu_Latn\.tsv' are of one language"):
        LabelledTexts.open(folder, ["en"])


@pytest.mark.parametrize(
    ("file", "content", "line", "message"),
    [
        ("train.en.tsv", TRAIN + "fruit a plum\n", 4, "a line without a tab"),
        ("test.de.tsv", "animal\tein Hund\nfriut\tein Apfel\n", 2, "unknown label 'friut'"),
        ("valid.en.tsv", "\tno label\n", 1, "unknown label ''"),
    ],
)
def test_mistakes_are_named_with_file_and_line(folder: Path, file: str, content: str, line: int, message: str) -> None:
    (folder / file).write_text(content)
    with pytest.raises(DataError) as raised:
        LabelledTexts.open(folder, ["en"])
    assert raised.value.what.startswith(message)
    assert raised.value.where == f"{folder / file}, line {line}"
    if "friut" in message:
        assert raised.value.remedy == "did you mean 'fruit'?"


def test_missing_files(folder: Path) -> None:
    with pytest.raises(DataError, match=r"train\.fr\.tsv is missing"):
        LabelledTexts.open(folder, ["fr"])
    (folder / "valid.en.tsv").write_text("")
    with pytest.raises(DataError, match="empty"):
        LabelledTexts.open(folder, ["en"])
    with pytest.raises(DataError, match="does not exist"):
        LabelledTexts.open(folder / "nowhere", ["en"])


def test_the_shared_corpus(shared: Path, tmp_path: Path) -> None:
    import tarfile

    archive = shared / "data" / "sections11.tar.xz"
    if not archive.is_file():
        pytest.skip(f"needs {archive}")
    with tarfile.open(archive) as content:
        content.extractall(tmp_path, filter="data")
    texts = LabelledTexts.open(tmp_path / "sections11", ["en"])
    assert len(texts.classes) == 11 and len(texts.splits["train"]["en"].texts) == 10006
    assert len(texts.splits["test"]) == 21 and len(texts.splits["test"]["zh"].texts) == 340

"""Lines end at line feeds and nowhere else; what is no text is named."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_train.data.text.lines import count_lines, read_lines, read_parallel, sha256, write_lines
from moe_train.errors import DataError

ODD = ["one\u2028still one", "form\x0cfeed", "next\x85line", "  ", "", "\u00a0", "a\rb", "tab\tbed", "last"]


def test_only_line_feeds_end_lines(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes("\n".join(ODD).encode())
    assert list(read_lines(path)) == ODD
    assert count_lines(path) == len(ODD)


def test_carriage_returns_and_byte_order_mark_go(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"\xef\xbb\xbfone\r\n\r\ntwo\n")
    assert list(read_lines(path)) == ["one", "", "two"]


def test_empty_file_has_no_lines(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"")
    assert list(read_lines(tmp_path / "a")) == []


def test_line_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    path = tmp_path / "train.en-de.de"
    path.write_bytes(b"gut\nsch\xf6n\n")
    with pytest.raises(DataError, match=r"train\.en-de\.de: line 2 is not UTF-8 \(byte 0xf6 at position 3\)"):
        list(read_lines(path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("gut\nschön\n".encode("utf-16"), r"line 1 is not UTF-8 .*iconv -f utf-16"),
        ("gut\nschön\n".encode("utf-16-le"), r"line 1 contains a NUL character.*iconv -f utf-16"),
        (b"gut\nsch\0n\n", r"line 2 contains a NUL character"),
        (gzip.compress(b"gut\n"), r"line 1 is not UTF-8 .*rename it to end in \.gz"),
        (b"gut\n\xed\xa0\x80\n", r"line 2 is not UTF-8 \(byte 0xed at position 0\)"),
    ],
    ids=["utf-16", "utf-16 without a mark", "nul", "gzip", "surrogate"],  # gzip's bytes hold the time
)
def test_what_is_no_text_is_named_with_its_line(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(DataError, match=rf"{tmp_path}/a: {message}"):
        list(read_lines(tmp_path / "a"))


def test_text_of_models_may_hold_nul(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"a\0b\n")
    assert list(read_lines(tmp_path / "a", nul=True)) == ["a\0b"]


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a: the file cannot be read \(Is a directory\)"):
        (tmp_path / "a").mkdir()
        list(read_lines(tmp_path / "a"))
    with pytest.raises(DataError, match=r"b\.gz: the file cannot be read \(No such file or directory\)"):
        list(read_lines(tmp_path / "b.gz"))


def test_a_pipe_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.gz")
    with pytest.raises(DataError, match=r"a\.gz: the file cannot be read \(not a regular file\)"):
        list(read_lines(tmp_path / "a.gz"))
    with pytest.raises(OSError, match="not a regular file"):
        sha256(tmp_path / "a.gz")


@pytest.mark.parametrize(("left", "right"), [(3, 2), (2, 3), (0, 1)])
def test_unequal_lengths_name_both_files_and_counts(tmp_path: Path, left: int, right: int) -> None:
    source, target = tmp_path / "train.en-de.en", tmp_path / "train.en-de.de"
    write_lines(source, ["x"] * left)
    write_lines(target, ["y"] * right)
    expected = rf"train\.en-de\.en has {left} lines, train\.en-de\.de has {right}"
    with pytest.raises(DataError, match=expected):
        list(read_parallel(source, target))


@given(st.lists(st.text(st.characters(exclude_characters="\n\0", exclude_categories=["Cs"]))))
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, lines: list[str]) -> None:
    lines = [line.rstrip("\r").lstrip("\ufeff") for line in lines]
    path = tmp_path_factory.mktemp("lines") / "a"
    write_lines(path, lines)
    assert list(read_lines(path)) == lines

"""Lines end at line feeds and nowhere else, in plain and compressed files."""

from __future__ import annotations

import bz2
import gzip
import lzma
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_train.data.lines import count_lines, read_lines, read_parallel, write_lines
from moe_train.errors import DataError, MissingDependency

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


@pytest.mark.parametrize(("suffix", "pack"), [(".gz", gzip.compress), (".xz", lzma.compress), (".bz2", bz2.compress)])
def test_compressed_files(tmp_path: Path, suffix: str, pack: Callable[[bytes], bytes]) -> None:
    path = tmp_path / f"a{suffix}"
    content = pack("\n".join(ODD).encode())
    path.write_bytes(content)
    assert list(read_lines(path)) == ODD
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=f"a{suffix}: the compressed file is damaged after line"):
        list(read_lines(path))


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".bz2"])
def test_a_file_that_only_claims_to_be_compressed(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_text("plain text\n")
    with pytest.raises(DataError, match="damaged"):
        list(read_lines(path))


def test_zstandard_reads_or_says_what_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "a.zst"
    try:
        import zstandard
    except ImportError:
        path.write_bytes(b"")
        with pytest.raises(MissingDependency, match="pip install zstandard"):
            list(read_lines(path))
    else:
        path.write_bytes(zstandard.ZstdCompressor().compress("\n".join(ODD).encode()))
        assert list(read_lines(path)) == ODD


def test_line_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    path = tmp_path / "train.en-de.de"
    path.write_bytes(b"gut\nsch\xf6n\n")
    with pytest.raises(DataError, match=r"train\.en-de\.de: line 2 is not UTF-8 \(byte 0xf6 at position 3\)"):
        list(read_lines(path))


@pytest.mark.parametrize(("left", "right"), [(3, 2), (2, 3), (0, 1)])
def test_unequal_lengths_name_both_files_and_counts(tmp_path: Path, left: int, right: int) -> None:
    source, target = tmp_path / "train.en-de.en", tmp_path / "train.en-de.de"
    write_lines(source, ["x"] * left)
    write_lines(target, ["y"] * right)
    expected = rf"train\.en-de\.en has {left} lines, train\.en-de\.de has {right}"
    with pytest.raises(DataError, match=expected):
        list(read_parallel(source, target))


@given(st.lists(st.text(st.characters(exclude_characters="\n", exclude_categories=["Cs"]))))
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, lines: list[str]) -> None:
    lines = [line.rstrip("\r").lstrip("\ufeff") for line in lines]
    path = tmp_path_factory.mktemp("lines") / "a"
    write_lines(path, lines)
    assert list(read_lines(path)) == lines

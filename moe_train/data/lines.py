"""Reading text files line by line, exactly: a line ends at a line feed and nowhere else.

Python's ``splitlines`` also breaks at U+2028, form feeds and more, which silently shifts parallel text.
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

from moe_train.errors import DataError, MissingDependency

SUFFIXES = ("", ".gz", ".xz", ".bz2", ".zst")
_BOM = b"\xef\xbb\xbf"


def open_bytes(path: Path) -> IO[bytes]:
    """Opens a file for reading, unpacking it by its suffix (.gz, .xz, .bz2, .zst).

    Raises:
        MissingDependency: a .zst file without the zstandard library.
    """
    if path.suffix == ".zst":
        return _open_zstandard(path)
    openers: dict[str, Any] = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}
    return cast("IO[bytes]", openers.get(path.suffix, open)(path, "rb"))


def _open_zstandard(path: Path) -> IO[bytes]:
    try:
        import zstandard
    except ImportError as error:
        raise MissingDependency(
            "reading .zst needs the zstandard library", str(path), "run `pip install zstandard`, or unpack the file"
        ) from error
    return cast("IO[bytes]", zstandard.open(path, "rb"))


def read_lines(path: Path) -> Iterator[str]:
    """Yields the lines of a UTF-8 file without their ends; a carriage return before the line feed goes too, and so does
    a byte order mark at the start.

    Raises:
        DataError: a line is not UTF-8 (file and line are named), or a compressed file is damaged.
    """
    number = 0
    try:
        with open_bytes(path) as stream:
            for number, line in enumerate(stream, 1):
                if number == 1 and line.startswith(_BOM):
                    line = line[len(_BOM) :]
                if line.endswith(b"\n"):
                    line = line[:-2] if line.endswith(b"\r\n") else line[:-1]
                yield line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"line {number} is not UTF-8 (byte 0x{error.object[error.start]:02x} at position {error.start})",
            str(path),
            "convert the file, e.g. `iconv -f latin1 -t utf-8`",
        ) from error
    except (EOFError, OSError, lzma.LZMAError, zlib.error) as error:
        if isinstance(error, OSError) and error.errno is not None:  # those of bz2 and gzip have no number
            raise
        raise DataError(
            f"the compressed file is damaged after line {number} ({error})", str(path), "fetch it again"
        ) from error


def count_lines(path: Path) -> int:
    """How many lines :func:`read_lines` yields; bytes need not be UTF-8 here."""
    with open_bytes(path) as stream:
        return sum(1 for _ in stream)


def read_parallel(source: Path, target: Path) -> Iterator[tuple[str, str]]:
    """Yields line-aligned pairs.

    Raises:
        DataError: the files have different numbers of lines (both are named with their counts), or as
            :func:`read_lines`.
    """
    left, right = read_lines(source), read_lines(target)
    for line in left:
        other = next(right, None)
        if other is None:
            raise _unequal(source, target)
        yield line, other
    if next(right, None) is not None:
        raise _unequal(source, target)


def _unequal(source: Path, target: Path) -> DataError:
    return DataError(
        f"parallel files differ in length: {source.name} has {count_lines(source)} lines, "
        f"{target.name} has {count_lines(target)}",
        str(source.parent),
        "line n of one must translate line n of the other: repair or fetch the files again",
    )


def read_single(path: Path) -> Iterator[tuple[str]]:
    """Yields the lines of a file as pairs are yielded, with one side each.

    Raises:
        DataError: as :func:`read_lines`.
    """
    return ((line,) for line in read_lines(path))


def write_lines(path: Path, lines: list[str]) -> None:
    """Writes lines, each ended by a line feed."""
    with path.open("w", encoding="utf-8", newline="\n") as stream:
        stream.writelines(f"{line}\n" for line in lines)


def sha256(path: Path) -> str:
    """Checksum of a file, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()

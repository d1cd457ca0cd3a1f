"""Reads text line by line. A line ends only at a line feed.

Python's ``splitlines`` also breaks at U+2028, form feeds and more, which would silently misalign parallel text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO

from moe_train.data.text.compressed import (
    EXPANSION,
    SUFFIXES,
    DamagedFile,
    content_of_misnamed,
    open_bytes,
    packed_suffix,
)
from moe_train.errors import DataError
from moe_train.utils.regular_files import require_regular

_BOM = b"\xef\xbb\xbf"
_LONGEST = 64 << 20  # bytes of a line
_UTF16 = (b"\xff\xfe", b"\xfe\xff")


def read_lines(path: Path, *, nul: bool = False, expansion: int = EXPANSION) -> Iterator[str]:
    """Yields the lines of a UTF-8 file without their ends; a carriage return before the line feed and a byte order mark
    at the start are removed, too.

    Args:
        nul: accept NUL characters. In text of users they are refused: such files are UTF-16 or binary.
        expansion: as in :func:`moe_train.data.text.compressed.open_bytes`.

    Raises:
        DataError: the file cannot be read; a line is not UTF-8, contains NUL or is too long (file and line are named);
            a compressed file is damaged, or its content is too large.
    """
    return (
        decode_line(line, number, str(path), nul=nul) for number, line in enumerate(_byte_lines(path, expansion), 1)
    )


def split_lines(stream: IO[bytes]) -> Iterator[bytes]:
    """The lines of a stream with their ends; a line that is too long in pieces, so that memory is bounded."""
    return iter(partial(stream.readline, _LONGEST), b"")


def decode_line(line: bytes, number: int, where: str, *, nul: bool = False) -> str:
    """Decodes a line of bytes with its end, as in :func:`read_lines`.

    Args:
        number: of the line, from 1.
        where: its file, for messages.

    Raises:
        DataError: it is not UTF-8, contains NUL, or is longer than a line may be.
    """
    if len(line) >= _LONGEST and not line.endswith(b"\n"):
        what = f"line {number} is longer than {_LONGEST >> 20} MiB"
        raise DataError(what, where, "use text whose lines end with line feeds")
    if number == 1:
        line = line.removeprefix(_BOM)
    if line.endswith(b"\n"):
        line = line[:-2] if line.endswith(b"\r\n") else line[:-1]
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        what = f"line {number} is not UTF-8 (byte 0x{line[error.start]:02x} at position {error.start})"
        raise DataError(what, where, _remedy(line if number == 1 else b"", where)) from error
    if not nul and "\0" in text:
        what = f"line {number} contains a NUL character, as UTF-16 and binary files do"
        raise DataError(what, where, "convert the file, e.g. `iconv -f utf-16 -t utf-8`, or remove the character")
    return text


def _remedy(start: bytes, where: str) -> str:
    """The remedy for a file whose text begins with these bytes and is not UTF-8."""
    suffix = packed_suffix(start)
    if suffix and where.endswith(SUFFIXES[1:]):
        return f"it was compressed twice: unpack it once, and let the name of the result end in {suffix}"
    if suffix:
        return f"it is a compressed file: rename it to end in {suffix}"
    encoding = "utf-16" if start.startswith(_UTF16) else "latin1"
    return f"convert the file, e.g. `iconv -f {encoding} -t utf-8`"


def _byte_lines(path: Path, expansion: int = EXPANSION) -> Iterator[bytes]:
    """The lines of a file with their ends, as bytes."""
    number = 0
    try:
        with open_bytes(path, expansion) as stream:
            for line in split_lines(stream):
                number += 1
                yield line
    except DamagedFile as error:
        if found := content_of_misnamed(path):
            what, remedy = f"it is not a {path.suffix} file, but {found}", "rename it to end as its content needs"
        else:
            what, remedy = f"the compressed file is damaged after line {number} ({error})", "download it again"
        raise DataError(what, str(path), remedy) from error
    except OSError as error:
        what = f"the file cannot be read ({error.strerror or error})"
        raise DataError(what, str(path), "check its permissions and its disk") from error


def count_lines(path: Path, expansion: int = EXPANSION) -> int:
    """Number of lines that :func:`read_lines` yields; their content is not checked.

    Raises:
        DataError: as :func:`read_lines`, except for the content of a line.
    """
    return sum(1 for _ in _byte_lines(path, expansion))


def read_parallel(source: Path, target: Path, expansion: int = EXPANSION) -> Iterator[tuple[str, str]]:
    """Yields line-aligned pairs.

    Raises:
        DataError: the files have different numbers of lines (both are named with their counts), or as
            :func:`read_lines`.
    """
    left, right = (read_lines(path, expansion=expansion) for path in (source, target))
    for line in left:
        other = next(right, None)
        if other is None:
            raise _unequal(source, target, expansion)
        yield line, other
    if next(right, None) is not None:
        raise _unequal(source, target, expansion)


def _unequal(source: Path, target: Path, expansion: int) -> DataError:
    return DataError(
        f"parallel files differ in length: {source.name} has {count_lines(source, expansion)} lines, "
        f"{target.name} has {count_lines(target, expansion)}",
        str(source.parent),
        "line n of one must translate line n of the other: repair the files or download them again",
    )


def read_single(path: Path, expansion: int = EXPANSION) -> Iterator[tuple[str]]:
    """Yields the lines of a file as tuples of one side.

    Raises:
        DataError: as :func:`read_lines`.
    """
    return ((line,) for line in read_lines(path, expansion=expansion))


def write_lines(path: Path, lines: list[str]) -> None:
    """Writes lines, each ended by a line feed."""
    with path.open("w", encoding="utf-8", newline="\n") as stream:
        stream.writelines(f"{line}\n" for line in lines)


def sha256(path: Path) -> str:
    """Checksum of a file, in hexadecimal.

    Raises:
        OSError: it cannot be read, or is not a regular file.
    """
    require_regular(path)
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns system errors raised inside into a DataError about the user's data.

    Raises:
        DataError: a file or folder does not exist, may not be read, or its disk fails.
    """
    try:
        yield
    except OSError as error:
        what = f"it cannot be read ({error.strerror or error})"
        raise DataError(what, str(error.filename or path), "restore the data, or set its place: data=…") from error

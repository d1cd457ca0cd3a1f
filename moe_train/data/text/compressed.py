"""Opens files by their suffix: plain, ``.gz``, ``.xz``, ``.bz2``, ``.zst``.

A compressed file may contain several consecutive streams. All are read; a truncated stream, or bytes that belong to no
stream, are errors. (``bz2.open`` and ``lzma.open`` ignore bytes that they cannot read after the first stream, with all
further streams; zstandard's reader ends without an error within a frame.)

Memory is bounded: files are unpacked in small pieces, and a file that unpacks to far more than text does is refused.
"""

from __future__ import annotations

import bz2
import codecs
import io
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Protocol, cast

from moe_train.errors import DataError, MissingDependency
from moe_train.utils.regular_files import require_regular

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

SUFFIXES = ("", ".gz", ".xz", ".bz2", ".zst")
EXPANSION = 200
"""Largest ratio of unpacked to packed size; text has 3 to 5, very repetitive text 50."""

_STARTS = {".gz": b"\x1f\x8b", ".xz": b"\xfd7zXZ", ".bz2": b"BZh", ".zst": b"\x28\xb5\x2f\xfd"}
_CONTROLS = re.compile(r"[\x00-\x08\x0e-\x1f\x7f]")
_FREE = 16 << 20  # bytes to which any file may unpack
_PIECE = 1 << 16  # bytes that are read, and about the number that are unpacked, at a time
# zstandard unpacks all of its input at once, and 4 bytes can expand to 128 KiB: at most 32 MiB.
_ZSTANDARD_PIECE = 1 << 10
_MAX_WINDOW = 1 << 31  # of `zstd --long=31`; the library's own limit is 2^27


class DamagedFile(Exception):
    """A compressed file is truncated or altered; raised while it is read."""


class _Decoder(Protocol):
    """Unpacks one stream, as ``bz2.BZ2Decompressor`` does."""

    @property
    def eof(self) -> bool: ...

    @property
    def needs_input(self) -> bool: ...

    @property
    def unused_data(self) -> bytes: ...

    def decompress(self, data: bytes, max_length: int) -> bytes: ...


class _Gzip:
    """A member of a gzip file. Its length and checksum are verified by zlib."""

    def __init__(self) -> None:
        self._stream = zlib.decompressobj(wbits=31)

    @property
    def eof(self) -> bool:
        return self._stream.eof

    @property
    def needs_input(self) -> bool:
        return not self._stream.unconsumed_tail

    @property
    def unused_data(self) -> bytes:
        return self._stream.unused_data

    def decompress(self, data: bytes, max_length: int) -> bytes:
        return self._stream.decompress(self._stream.unconsumed_tail + data, max_length)


class _Zstandard:
    """A frame of a Zstandard file; a skippable frame unpacks to nothing."""

    needs_input = True

    def __init__(self) -> None:
        import zstandard

        self._frame = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW).decompressobj()

    @property
    def eof(self) -> bool:
        return bool(self._frame.eof)

    @property
    def unused_data(self) -> bytes:
        return bytes(self._frame.unused_data)

    def decompress(self, data: bytes, max_length: int) -> bytes:
        return bytes(self._frame.decompress(data))


@dataclass(frozen=True)
class _Format:
    """Format of the files with a suffix.

    Attributes:
        decoder: makes a decoder for the next stream.
        errors: that it raises where the stream is damaged.
        piece: bytes to read at a time.
        padding: a multiple of this many zero bytes may follow a stream (0: none).
    """

    decoder: Callable[[], _Decoder]
    errors: tuple[type[Exception], ...]
    piece: int = _PIECE
    padding: int = 0


def _zstandard(path: Path) -> _Format:
    try:
        import zstandard
    except ImportError as error:
        raise MissingDependency(
            "reading .zst needs the zstandard library", str(path), "run `pip install zstandard`, or unpack the file"
        ) from error
    return _Format(_Zstandard, (zstandard.ZstdError,), piece=_ZSTANDARD_PIECE)


_FORMATS: dict[str, Callable[[Path], _Format]] = {
    ".gz": lambda path: _Format(_Gzip, (zlib.error,), padding=1),
    ".xz": lambda path: _Format(lzma.LZMADecompressor, (lzma.LZMAError,), padding=4),
    ".bz2": lambda path: _Format(bz2.BZ2Decompressor, (OSError, ValueError)),
    ".zst": _zstandard,
}


def open_bytes(path: Path, expansion: int = EXPANSION) -> IO[bytes]:
    """Opens a file for reading, unpacking it by its suffix.

    Reading it raises :class:`DamagedFile`, or DataError at the limit.

    Args:
        expansion: largest ratio of unpacked to packed size, for files that unpack to more than 16 MiB (0: no limit).

    Raises:
        MissingDependency: a .zst file without the zstandard library.
        OSError: it cannot be read, or is not a regular file.
    """
    require_regular(path)
    if path.suffix not in _FORMATS:
        return path.open("rb")
    unpacked = _Unpacked(path, _FORMATS[path.suffix](path), expansion)
    return cast("IO[bytes]", io.BufferedReader(unpacked, _PIECE))


def packed_suffix(start: bytes) -> str:
    """The suffix for a compressed file that begins with these bytes; "" where they are not of one."""
    return next((suffix for suffix, magic in _STARTS.items() if start.startswith(magic)), "")


def content_of_misnamed(path: Path) -> str:
    """What a file with a suffix of compression is instead: ``plain text``, ``a .xz file``; "" where it is neither."""
    with path.open("rb") as stream:
        start = stream.read(_PIECE)
    suffix = packed_suffix(start)
    if suffix or _STARTS[path.suffix].startswith(start):  # the latter: cut short
        return "" if suffix in ("", path.suffix) else f"a {suffix} file"
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(start)
    except UnicodeDecodeError:
        return ""
    return "" if _CONTROLS.search(text) else "plain text"


def limit_of(packed: int, expansion: int) -> int | None:
    """Largest unpacked size of a file of ``packed`` bytes; None: no limit."""
    return max(_FREE, expansion * packed) if expansion else None


def too_large(limit: int, expansion: int, where: str) -> DataError:
    """The error for a file that unpacks to more than ``limit`` bytes."""
    return DataError(
        f"the file unpacks to more than {limit >> 20:,} MiB, over {expansion} times its size",
        where,
        "if that is intended, unpack it by hand, or (corpora) raise the limit corpus.max_expansion (0: no limit)",
    )


class _Unpacked(io.RawIOBase):
    """The unpacked bytes of a file."""

    def __init__(self, path: Path, kind: _Format, expansion: int) -> None:
        super().__init__()
        self._path, self._expansion = path, expansion
        self._file = path.open("rb")
        self._limit = limit_of(path.stat().st_size, expansion)
        self._pieces, self._rest, self._count = _unpack(self._file, kind), memoryview(b""), 0

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._file.close()
        super().close()

    def readinto(self, buffer: WriteableBuffer) -> int:
        if not self._rest:
            self._rest = memoryview(next(self._pieces, b""))
            self._count += len(self._rest)
            if self._limit is not None and self._count > self._limit:
                raise too_large(self._limit, self._expansion, str(self._path))
        target = memoryview(buffer)
        size = min(len(target), len(self._rest))
        target[:size] = self._rest[:size]
        self._rest = self._rest[size:]
        return size


def _unpack(file: IO[bytes], kind: _Format) -> Iterator[bytes]:
    """Every stream of the file, in pieces.

    Raises:
        DamagedFile: the file is empty, ends within a stream, or contains bytes that belong to no stream.
    """
    rest = file.read(kind.piece)
    if not rest:
        raise DamagedFile("it is empty")
    while rest:
        decoder, data = kind.decoder(), rest
        while not decoder.eof:
            try:
                piece = decoder.decompress(data, _PIECE)
            except kind.errors as error:
                raise DamagedFile(str(error) or type(error).__name__) from error
            if piece:
                yield piece
            elif not data and decoder.needs_input and not decoder.eof:
                raise DamagedFile("it is cut short")
            data = file.read(kind.piece) if decoder.needs_input and not decoder.eof else b""
        rest = _after_padding(decoder.unused_data or file.read(kind.piece), file, kind)


def _after_padding(rest: bytes, file: IO[bytes], kind: _Format) -> bytes:
    """The bytes after a stream and its zero padding."""
    zeros = 0
    while kind.padding and rest:
        stripped = rest.lstrip(b"\0")
        zeros += len(rest) - len(stripped)
        rest = stripped or file.read(kind.piece)
        if stripped:
            break
    if kind.padding and zeros % kind.padding:
        raise DamagedFile(f"{zeros} zero bytes follow a stream: they must be a multiple of {kind.padding}")
    return rest

"""Compressed text: every stream is read, whatever is no stream is an error, and memory stays bounded."""

from __future__ import annotations

import bz2
import gzip
import lzma
import random
import struct
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from moe_train.data.text import lines as lines_module
from moe_train.data.text.compressed import EXPANSION, open_bytes
from moe_train.data.text.lines import read_lines, read_parallel
from moe_train.errors import DataError, MissingDependency

Pack = Callable[[bytes], bytes]


def zstd(content: bytes, window: int = 0) -> bytes:
    if not window:
        return zstandard.ZstdCompressor(write_checksum=True).compress(content)
    wide = zstandard.ZstdCompressionParameters.from_level(1, window_log=window, enable_ldm=True)
    stream = zstandard.ZstdCompressor(compression_params=wide).compressobj()
    return stream.compress(content) + stream.flush()


PACKS: dict[str, Pack] = {".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress, ".zst": zstd}
DRAW = random.Random(3)
LINES = [f"line {n} " + "".join(DRAW.choices("abcdefgh ", k=DRAW.randrange(60))) for n in range(400)]
TEXT = "".join(f"{line}\n" for line in LINES).encode()


def read(folder: Path, suffix: str, content: bytes) -> list[str]:
    path = folder / f"a{suffix}"
    path.write_bytes(content)
    return list(read_lines(path))


@pytest.mark.parametrize("suffix", PACKS)
def test_several_streams_are_one_text(tmp_path: Path, suffix: str) -> None:
    pack = PACKS[suffix]
    several = pack(TEXT[:-9]) + pack(b"") + pack(TEXT[-9:]) + pack(b"last")
    assert read(tmp_path, suffix, several) == [*LINES, "last"]
    noise = random.Random(2).randbytes(150_000).replace(b"\n", b"")  # several pieces of file in each stream
    (tmp_path / f"b{suffix}").write_bytes(pack(noise) + pack(noise))
    with open_bytes(tmp_path / f"b{suffix}") as stream:
        assert stream.read() == noise + noise


@pytest.mark.parametrize("suffix", PACKS)
def test_a_file_cut_short_anywhere_is_an_error(tmp_path: Path, suffix: str) -> None:
    first, second = PACKS[suffix](TEXT), PACKS[suffix](b"second\n")
    places = {*range(40), *range(len(first) - 20, len(first)), *DRAW.sample(range(len(first)), 20)}
    cuts = [first[:place] for place in places] + [first + second[:place] for place in range(1, len(second))]
    for cut in cuts:
        with pytest.raises(DataError, match=rf"a{suffix}: the compressed file is damaged after line \d+ \(it is"):
            read(tmp_path, suffix, cut)


@pytest.mark.parametrize("suffix", PACKS)
def test_bytes_that_are_no_stream_are_an_error(tmp_path: Path, suffix: str) -> None:
    packed = PACKS[suffix](TEXT)
    for garbage in (b"garbage", packed[5:], b"\0\0\0\1"):
        with pytest.raises(DataError, match="damaged after line 400"):
            read(tmp_path, suffix, packed + garbage)
    with pytest.raises(DataError, match="damaged after line 0"):
        read(tmp_path, suffix, b"\0\1\2\3\n")


@pytest.mark.parametrize("suffix", PACKS)
def test_a_suffix_that_is_not_that_of_the_content(tmp_path: Path, suffix: str) -> None:
    for content, found in (
        (TEXT, "plain text"),
        (b"B\xc3", "plain text"),
        *((PACKS[s](TEXT), f"a {s} file") for s in PACKS),
    ):
        if suffix not in found:
            with pytest.raises(DataError, match=rf"a{suffix}: it is not a {suffix} file, but {found}\. Rename it"):
                read(tmp_path, suffix, content)


@pytest.mark.parametrize("suffix", PACKS)
@pytest.mark.parametrize("inner", PACKS)
def test_text_that_was_compressed_twice(tmp_path: Path, suffix: str, inner: str) -> None:
    with pytest.raises(DataError, match=rf"compressed twice: unpack it once, .* end in {inner}"):
        read(tmp_path, suffix, PACKS[suffix](PACKS[inner](TEXT)))


@pytest.mark.parametrize("suffix", PACKS)
def test_an_altered_bit_never_alters_text_unsaid(tmp_path: Path, suffix: str) -> None:
    packed, refused = PACKS[suffix](TEXT), 0
    for _ in range(60):
        altered = bytearray(packed)
        altered[DRAW.randrange(len(packed))] ^= 1 << DRAW.randrange(8)
        try:
            assert read(tmp_path, suffix, bytes(altered)) == LINES
        except DataError as error:
            refused += "damaged" in str(error)
    assert refused > 40


@pytest.mark.parametrize(("suffix", "zeros"), [(".xz", 4), (".xz", 70_000), (".gz", 3)])
def test_padding_behind_a_stream_is_read_over(tmp_path: Path, suffix: str, zeros: int) -> None:
    pack = PACKS[suffix]
    assert read(tmp_path, suffix, pack(TEXT) + bytes(zeros)) == LINES
    assert read(tmp_path, suffix, pack(TEXT) + bytes(zeros) + pack(b"more\n") + bytes(zeros)) == [*LINES, "more"]


@pytest.mark.parametrize(("suffix", "zeros"), [(".xz", 3), (".bz2", 4), (".zst", 4)])
def test_padding_that_the_format_does_not_have(tmp_path: Path, suffix: str, zeros: int) -> None:
    with pytest.raises(DataError, match="damaged after line 400"):
        read(tmp_path, suffix, PACKS[suffix](TEXT) + bytes(zeros))


def test_zstandard_frames_that_are_skipped_and_wide_windows(tmp_path: Path) -> None:
    skipped = struct.pack("<II", 0x184D2A5F, 5) + b"notes"
    assert read(tmp_path, ".zst", skipped + zstd(TEXT, window=28) + skipped + zstd(b"more\n")) == [*LINES, "more"]
    with pytest.raises(DataError, match="damaged after line 400"):
        read(tmp_path, ".zst", zstd(TEXT) + skipped[:-1])


def test_zstandard_without_its_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(MissingDependency, match="pip install zstandard"):
        read(tmp_path, ".zst", b"")


@pytest.mark.parametrize("suffix", PACKS)
def test_a_file_that_unpacks_to_far_too_much_is_refused(tmp_path: Path, suffix: str) -> None:
    line = b"x" * (1 << 20) + b"\n"
    bomb = tmp_path / f"bomb{suffix}"
    bomb.write_bytes(PACKS[suffix](line * 20))
    found = []
    with pytest.raises(DataError, match=rf"bomb{suffix}: the file unpacks to more than 16 MiB.*corpus\.max_expansion"):
        found.extend(map(len, read_lines(bomb)))
    assert len(found) <= 15  # what was whole before the limit
    assert sum(1 for _ in read_lines(bomb, expansion=0)) == 20
    assert EXPANSION < bomb.stat().st_size * EXPANSION < 16 << 20


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_memory_stays_bounded(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(PACKS[suffix](b"\n" * (200 << 20)))
    tracemalloc.start()
    try:
        with pytest.raises(DataError), open_bytes(path) as stream:
            while stream.read(1 << 16):
                pass
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 80 << 20  # zstandard: what 1 KiB stands for, twice


def test_a_line_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines_module, "_LONGEST", 1 << 20)
    (tmp_path / "a").write_bytes(b"short\n" + b"x" * (1 << 20))
    with pytest.raises(DataError, match="a: line 2 is longer than 1 MiB"):
        list(read_lines(tmp_path / "a"))


def test_a_damaged_side_is_named_where_lines_are_counted(tmp_path: Path) -> None:
    (tmp_path / "a.en").write_text("one\n")
    (tmp_path / "a.de.gz").write_bytes(gzip.compress(b"eins\nzwei\n") + b"garbage")
    with pytest.raises(DataError, match=r"a\.de\.gz: the compressed file is damaged after line 2"):
        list(read_parallel(tmp_path / "a.en", tmp_path / "a.de.gz"))

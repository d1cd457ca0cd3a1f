"""Broken and hostile catalogues in wheels: one message that names wheel and member."""

from __future__ import annotations

import random
import struct
import zipfile
from pathlib import Path

import polib
import pytest

from moe_train.data.corpora.gettext_catalogues import catalogues, messages
from moe_train.data.text.compressed import EXPANSION
from moe_train.errors import DataError

MEMBER = "words/locale/de/LC_MESSAGES/django.mo"


def catalogue(count: int = 12) -> bytes:
    entries = polib.POFile()
    entries.metadata = {"Content-Type": "text/plain; charset=UTF-8"}
    for number in range(count):
        entries.append(polib.POEntry(msgid=f"message {number}", msgstr=f"Nachricht {number} für alle"))
    entries.append(polib.POEntry(msgid="a cup", msgid_plural="cups", msgstr_plural={0: "Tasse", 1: "Tassen"}))
    return bytes(entries.to_binary())


def wheel(folder: Path, content: bytes, method: int = zipfile.ZIP_STORED) -> Path:
    path = folder / "words-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr(MEMBER, content)
    return path


def read(path: Path) -> list[tuple[str, str]]:
    return list(messages(path, "de", EXPANSION))


def test_what_is_whole_is_read(tmp_path: Path) -> None:
    path = wheel(tmp_path, catalogue())
    assert catalogues(path) == [("de", MEMBER)]
    found = read(path)
    assert len(found) == 14 and ("message 3", "Nachricht 3 für alle") in found and ("cups", "Tassen") in found
    assert read(wheel(tmp_path, catalogue(0))) == [("a cup", "Tasse"), ("cups", "Tassen")]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no catalogue",
        catalogue()[:20],
        catalogue()[:-30],  # the last strings are cut, and polib would give what is left of them
        catalogue().replace(b"\x95\x04\x12\xde"[::-1], b"\x95\x04\x12\xdf"[::-1]),
        catalogue().replace("für".encode(), b"f\xfcr?"),
    ],
    ids=["empty", "text", "header cut", "strings cut", "magic", "not UTF-8"],
)
def test_a_broken_catalogue_is_named_with_its_wheel(tmp_path: Path, content: bytes) -> None:
    path = wheel(tmp_path, content)
    with pytest.raises(DataError) as raised:
        read(path)
    assert raised.value.where == str(path) and f"the catalogue {MEMBER} is damaged" in raised.value.what


def test_mutated_catalogues_give_messages_or_one_error(tmp_path: Path) -> None:
    draw, refused = random.Random(5), 0
    for _ in range(150):
        content = bytearray(catalogue(4))
        for _ in range(draw.randint(1, 6)):
            content[draw.randrange(len(content))] = draw.randrange(256)
        try:
            read(wheel(tmp_path, bytes(content[: draw.choice((None, draw.randrange(len(content))))])))
        except DataError as error:
            refused += MEMBER in error.what
    assert refused > 75


def test_a_damaged_archive(tmp_path: Path) -> None:
    path = wheel(tmp_path, catalogue(), zipfile.ZIP_DEFLATED)
    whole, draw, refused = path.read_bytes(), random.Random(6), 0
    for _ in range(100):
        content = bytearray(whole)
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(content[: draw.choice((None, draw.randrange(len(content))))])
        try:
            read(path)
        except DataError as error:
            refused += str(path) in str(error)
    assert refused > 50


def test_the_name_of_a_file_is_no_catalogue(tmp_path: Path) -> None:
    """polib opens the file that its content names."""
    (tmp_path / "other.mo").write_bytes(catalogue())
    with pytest.raises(DataError, match="does not begin like a catalogue"):
        read(wheel(tmp_path, str(tmp_path / "other.mo").encode()))


def test_catalogues_that_unpack_to_far_too_much(tmp_path: Path) -> None:
    path = wheel(tmp_path, catalogue() + bytes(20 << 20), zipfile.ZIP_DEFLATED)
    with pytest.raises(DataError, match=rf"words-1\.0.*{MEMBER}: the file unpacks to more than 16 MiB"):
        read(path)
    assert len(list(messages(path, "de", 0))) == 14
    # Every entry points to the same long string.
    count, text = 2000, b"x" * 100_000 + b"\0"
    table = struct.pack("<II", len(text) - 1, 28 + 16 * count) * count
    header = struct.pack("<7I", 0x950412DE, 0, count, 28, 28 + 8 * count, 0, 0)
    with pytest.raises(DataError, match="its strings are not where its table says"):
        read(wheel(tmp_path, header + table + table + text))

"""Reads gettext catalogues (``.mo``) in wheels. A wheel is untrusted: its content is checked, its size is limited."""

from __future__ import annotations

import re
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polib  # type: ignore[import-untyped]

from moe_train.data.text.compressed import limit_of, too_large
from moe_train.errors import DataError

_CATALOGUE = re.compile(r"/locale/(?P<locale>[\w@]+)/LC_MESSAGES/\w+\.mo")
_ORDERS = {b"\xde\x12\x04\x95": "<", b"\x95\x04\x12\xde": ">"}


def catalogues(wheel: Path) -> list[tuple[str, str]]:
    """(locale, member) of the catalogues of a wheel, sorted by member.

    Raises:
        DataError: the wheel is not a valid archive.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = sorted(archive.namelist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, struct.error) as error:
        raise DataError(f"the wheel is damaged ({error})", str(wheel), "delete it and run again") from error
    found = ((name, _CATALOGUE.search(name)) for name in names)
    return [(match["locale"], name) for name, match in found if match and name.endswith(match[0])]


def messages(wheel: Path, locale: str, expansion: int) -> Iterator[tuple[str, str]]:
    """Yields (message, translation) of each translated message in the catalogues' order, plurals as their last form.

    Args:
        expansion: largest ratio of unpacked to packed size, above 16 MiB (0: no limit).

    Raises:
        DataError: a catalogue cannot be read; the wheel and the member are named.
    """
    for found, member in catalogues(wheel):
        if found == locale:
            for entry in _entries(wheel, member, expansion):
                yield from _forms(entry)


def _entries(wheel: Path, member: str, expansion: int) -> Any:
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as stream:
            limit = limit_of(archive.getinfo(member).compress_size, expansion)
            content = stream.read(-1 if limit is None else limit + 1)
        if limit is not None and len(content) > limit:
            raise too_large(limit, expansion, f"{wheel}, {member}")
        _check(content)
        return polib.mofile(content)
    except DataError:
        raise
    except Exception as error:  # zipfile, its decompressors and polib raise many kinds of errors for unexpected bytes
        what = f"the catalogue {member} is damaged ({str(error) or type(error).__name__})"
        remedy = "use another version of the wheel, or remove it from corpus.wheels"
        raise DataError(what, str(wheel), remedy) from error


def _check(content: bytes) -> None:
    """Checks what polib does not: it would open a file if the content is a file name, and truncate strings at the end.

    Raises:
        ValueError: the content is not a catalogue, or a string is outside of it, not terminated, or listed twice.
    """
    order = _ORDERS.get(content[:4])
    if order is None:
        raise ValueError("it does not begin like a catalogue")
    count, *tables = struct.unpack_from(f"{order}3I", content, 8)
    for start in tables:
        table = np.frombuffer(content, f"{order}u4", 2 * count, start) if count else np.empty(0, np.uint32)
        lengths, starts = table.reshape(-1, 2).astype(np.int64).T
        ends = starts + lengths
        if (ends >= len(content)).any():
            raise ValueError("it is cut short")
        if np.frombuffer(content, np.uint8)[ends].any() or lengths.sum() > len(content):
            raise ValueError("its strings are not where its table says")


def _forms(entry: polib.MOEntry) -> Iterator[tuple[str, str]]:
    if not entry.msgid_plural:
        if entry.msgid and entry.msgstr:
            yield entry.msgid, entry.msgstr
        return
    forms = {int(number): text for number, text in entry.msgstr_plural.items() if text}
    if len(forms) > 1:
        yield entry.msgid, forms[min(forms)]
    if forms:
        yield entry.msgid_plural, forms[max(forms)]

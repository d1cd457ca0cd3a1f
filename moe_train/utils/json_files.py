"""JSON files of a run folder, read so that a damaged one is an error that names it."""

from __future__ import annotations

import json
import math
import stat
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from moe_train.errors import DataError

_LARGEST = 1 << 28  # bytes; a manifest of 100,000 files has 15 MB
_DEEPEST = 64


def read_object(path: Path, remedy: str = "") -> dict[str, Any] | None:
    """The JSON object that a file holds; None where there is no file.

    Raises:
        DataError: it cannot be read, is not JSON, or holds something else; or it is larger than anything of ours.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # reading a pipe would not end
            raise ValueError("no file")
        if path.stat().st_size > _LARGEST:
            raise ValueError(f"more than {_LARGEST:,} bytes")
        return parse_object(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise DataError(f"the file cannot be read ({error.strerror or error})", str(path), remedy) from error
    except ValueError as error:
        raise DataError(f"the file is damaged ({error})", str(path), remedy) from error


def parse_object(text: str | bytes) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ValueError: it is not JSON (or not UTF-8, or nested too deeply), or something else than an object.
    """
    try:
        content = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(content, dict):
        raise ValueError("not a JSON object")
    rest: list[tuple[Any, int]] = [(content, 1)]
    while rest:
        value, depth = rest.pop()
        if depth > _DEEPEST:
            raise ValueError("nested too deeply")
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        rest += [(part, depth + 1) for part in inner]
    return content


def entry(content: Mapping[str, Any], key: str, kind: type) -> Any:
    """A value of an object, checked for its type.

    Raises:
        ValueError: it is missing, or of another type.
    """
    if key not in content:
        raise ValueError(f"'{key[:60]}' is missing")
    value = content[key]
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"'{key[:60]}' cannot be {value!r:.40}")
    return value


def file_digests(files: Any) -> dict[str, dict[str, Any]]:
    """The ``files`` of a manifest: relative path → ``{"sha256": …, "bytes": …}``.

    Raises:
        ValueError: they are not of this form, or a path leads out of the folder.
    """
    if not isinstance(files, dict):
        raise ValueError("no list of files")
    for name, digest in files.items():
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or not path.parts or "\0" in name:
            raise ValueError(f"{name[:60]!r} is no file in its folder")
        if not isinstance(digest, dict):
            raise ValueError(f"no checksum of {name[:60]!r}")
        entry(digest, "sha256", str)
        entry(digest, "bytes", int)
    return files


def finite(value: Any) -> float | None:
    """A number as a float; None where it is none, or not finite."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None

"""Reads JSON files of a run folder; a damaged file is an error with its name."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from moe_train.errors import DataError
from moe_train.utils.regular_files import read_regular

_DEEPEST = 64
_NO_NAME = re.compile("[\0\ud800-\udfff]")  # NUL and surrogates


def read_object(path: Path, remedy: str = "") -> dict[str, Any] | None:
    """The JSON object in a file; None if there is no file.

    Raises:
        DataError: the file cannot be read, is not a JSON object, or is too large.
    """
    try:
        return parse_object(read_regular(path))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise DataError(f"the file cannot be read ({error.strerror or error})", str(path), remedy) from error
    except ValueError as error:
        raise DataError(f"the file is damaged ({error})", str(path), remedy) from error


def parse_object(text: str | bytes) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ValueError: not JSON (or not UTF-8, or nested too deeply), or not an object.
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
        ValueError: the value is missing or of another type.
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
        ValueError: the value has another form, or a path leads out of the folder.
    """
    if not isinstance(files, dict):
        raise ValueError("not a list of files")
    for name, digest in files.items():
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or not path.parts or _NO_NAME.search(name):
            raise ValueError(f"the file {name[:60]!r} is not inside the folder")
        if not isinstance(digest, dict):
            raise ValueError(f"there is no checksum of {name[:60]!r}")
        try:
            entry(digest, "sha256", str)
            size = entry(digest, "bytes", int)
        except ValueError as error:
            raise ValueError(f"the size or checksum of {name[:60]!r} is not valid: {error}") from error
        if size < 0:
            raise ValueError(f"the size of {name[:60]!r} cannot be {size}")
    return files


def finite(value: Any) -> float | None:
    """A finite number as a float; None for all other values."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None

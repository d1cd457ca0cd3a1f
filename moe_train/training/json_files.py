"""JSON files of a run folder, read so that a damaged one is an error that names it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from moe_train.errors import DataError


def read_object(path: Path, remedy: str = "") -> dict[str, Any] | None:
    """The JSON object that a file holds; None where there is no file.

    Raises:
        DataError: it cannot be read, is not JSON, or holds something else.
    """
    try:
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
    return content


def finite(value: Any) -> float | None:
    """A number as a float; None where it is none, or not finite."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None

"""Reads the small files of a run folder for a report: valid content, and a list of problems by file name.

A report covers many runs, of which one may be damaged or being written: problems are no errors here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe_train.errors import DataError
from moe_train.utils.json_files import finite, parse_object, read_object
from moe_train.utils.regular_files import LARGEST_LOG, read_regular

_MAPPINGS = ("parameters", "world")  # of run.json
_NUMBERS = ("update", "flops_per_token")
_LOGGED = ("update", "nll_loss", "words_per_second")  # of a line
_MAX_COUNT = 1e24  # above, a count is invalid


@dataclass
class Reader:
    """Reads the files of one run folder.

    Attributes:
        problems: what could not be read, each with its file name.
    """

    folder: Path
    problems: list[str] = field(default_factory=list)

    def mapping(self, name: str) -> dict[str, Any]:
        """A JSON object; empty where the file does not exist."""
        try:
            return read_object(self.folder / name) or {}
        except DataError as error:
            self.problems.append(f"{name}: {error.what}")
            return {}

    def inner(self, name: str, content: Mapping[str, Any], *keys: str) -> dict[str, Any]:
        """A mapping nested in a file's content at ``keys``; empty where there is none."""
        found: Any = content
        for key in keys:
            found = found.get(key, {})
            if not isinstance(found, dict):
                self.problems.append(f"{name}: '{'.'.join(keys)}' is damaged")
                return {}
        return dict(found)

    def info(self, name: str) -> dict[str, Any]:
        """``run.json``, without values of a wrong type."""
        info = self.mapping(name)
        for key in _MAPPINGS:
            if key in info:
                info[key] = self.inner(name, info, key)
        for holder, keys in ((info, _NUMBERS), (info.get("parameters", {}), ("total", "active"))):
            for key in keys:
                if holder.get(key) is not None and not _is_count(holder[key]):
                    self.problems.append(f"{name}: '{key}' cannot be {holder[key]!r:.40}")
                    del holder[key]
        return info

    def lines(self, name: str) -> list[dict[str, Any]]:
        """JSON lines: numbers, ``load`` and ``router_entropy`` by layer. An incomplete last line is left out."""
        try:
            text = read_regular(self.folder / name, LARGEST_LOG)
        except FileNotFoundError:
            return []
        except OSError as error:
            self.problems.append(f"{name}: the file cannot be read ({error.strerror or error})")
            return []
        found, bad = [], []
        *whole, last = text.split(b"\n")
        for number, line in enumerate([*whole, *filter(None, [last])], 1):
            try:
                content = parse_object(line)
            except ValueError:
                content = {}
            valid = _valid_numbers(content)
            found += [valid] if "update" in valid else []
            wrong_type = any(not isinstance(content.get(key), float | int | None) for key in _LOGGED)
            if ("update" not in valid and number <= len(whole)) or wrong_type:
                bad.append(number)
        if bad:
            more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
            self.problems.append(f"{name}: line {bad[0]}{more} cannot be read")
        return found


def _valid_numbers(line: Mapping[str, Any]) -> dict[str, Any]:
    """The finite numbers of a line; by layer the loads of experts and the router's entropy."""
    numbers: dict[str, Any] = {key: number for key, value in line.items() if (number := finite(value)) is not None}
    if not _is_count(numbers.get("update")):
        numbers.pop("update", None)
    load = line.get("load")
    if isinstance(load, dict):
        numbers["load"] = {layer: shares for layer, values in load.items() if (shares := _numbers(values))}
    entropy = line.get("router_entropy")
    if isinstance(entropy, dict):
        found = {layer: finite(value) for layer, value in entropy.items()}
        numbers["router_entropy"] = {layer: value for layer, value in found.items() if value is not None}
    return numbers


def _is_count(value: Any) -> bool:
    number = finite(value)
    return number is not None and 0 <= number < _MAX_COUNT


def _numbers(values: Any) -> Sequence[float]:
    """The numbers of a list; empty where an entry is not a finite number."""
    if not isinstance(values, list):
        return []
    numbers = [number for value in values if (number := finite(value)) is not None]
    return numbers if len(numbers) == len(values) else []

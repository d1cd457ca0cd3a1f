"""Seeded damage to the files of a folder: truncated, flipped, of another type, grown."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_OTHERS: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 1, 2.5, 10**9, 10**30, -(10**20), 1e308, float("nan"), float("inf")),
    *("", "x", "../x", "en-de", "\x1b[31m", "9" * 5000, [], [1], ["x"], {}, {"x": 1}, [[[[[[1]]]]]]),
)
_CONTENTS = (b"", b"null\n", b"[]", b'{"files": {}}', b"\x89PNG\r\n\x1a\n", b"\xff\xfe\x00", b"\x00" * 64, b"a\n" * 50)


@dataclass(frozen=True)
class Mutation:
    """What was done to which file of a folder."""

    file: str
    kind: str


def mutate(folder: Path, seed: int) -> Mutation:
    """Damages one file of a folder."""
    draw = random.Random(seed)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    path = (
        draw.choice([path for path in files if path.suffix in (".json", ".jsonl")] or files)
        if draw.random() < 0.3
        else draw.choice(files)
    )
    kind = draw.choice(list(_KINDS))
    path.write_bytes(_KINDS[kind](draw, path))
    return Mutation(path.relative_to(folder).as_posix(), kind)


def _truncate(draw: random.Random, path: Path) -> bytes:
    content = path.read_bytes()
    return content[: draw.randrange(max(1, len(content)))]


def _flip(draw: random.Random, path: Path) -> bytes:
    content = bytearray(path.read_bytes() or b"\0")
    for _ in range(draw.choice((1, 1, 2, 8))):
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    return bytes(content)


def _retype(draw: random.Random, path: Path) -> bytes:
    """Another value for a part of a JSON file; another file's content for others."""
    if path.suffix == ".json":
        return _written(_with_other(draw, json.loads(path.read_bytes()), draw.choice(_OTHERS)))
    if path.suffix == ".jsonl":
        lines = path.read_bytes().splitlines()
        chosen = draw.randrange(len(lines))
        lines[chosen] = _written(_with_other(draw, json.loads(lines[chosen]), draw.choice(_OTHERS)))
        return b"\n".join(lines) + b"\n"
    return draw.choice(_CONTENTS)


def _grow(draw: random.Random, path: Path) -> bytes:
    """More of everything: numbers of a JSON file, bytes of others."""
    content = path.read_bytes()
    if path.suffix == ".json" and draw.random() < 0.7:
        return _written(_with_other(draw, json.loads(content), lambda value: _grown(draw, value)))
    more = (content, b"\0" * 1000, draw.randbytes(100), b"\n" * 10, b"word " * 2000, b"9" * 5000, b"[" * 100_000)
    return content + draw.choice(more)


def _written(value: Any) -> bytes:
    return json.dumps(value, indent=1).encode()


def _with_other(draw: random.Random, value: Any, other: Any) -> Any:
    """``value`` with one part replaced: any part, near the root or far from it."""
    inner: Any = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else []
    if not inner or draw.random() < 0.15:
        return other(value) if callable(other) else other
    key = draw.choice(list(inner))
    value[key] = _with_other(draw, value[key], other)
    return value


def _grown(draw: random.Random, value: Any) -> Any:
    if isinstance(value, bool) or value is None:
        return [value] * 1000
    if isinstance(value, int | float):
        return value * 10 ** draw.choice((1, 3, 9, 40)) + 1
    if isinstance(value, str | list):
        return value * draw.choice((2, 1000))
    return {**value, **{f"more {n}": n for n in range(1000)}}


_KINDS: dict[str, Callable[[random.Random, Path], bytes]] = {
    "truncate": _truncate,
    "flip": _flip,
    "retype": _retype,
    "grow": _grow,
}

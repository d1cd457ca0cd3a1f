"""Checks the headers of safetensors files before memory is allocated for their tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_train.errors import CheckpointError
from moe_train.utils.json_files import entry, parse_object

_LONGEST = 1 << 48  # elements; what no dimension of a tensor reaches
_TYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL")
_PARTS = "DCP_SHARDING_INFO"  # where torch.distributed.checkpoint records which part of a tensor a file holds


def check_headers(folder: Path) -> None:
    """Checks that all headers of ``*.safetensors`` are valid and the parts of each tensor make a whole.

    Raises:
        CheckpointError: they are not; the file is named.
    """
    ends: dict[str, list[int]] = {}
    elements: dict[str, int] = {}
    for path in sorted(folder.glob("*.safetensors")):
        for name, (shape, begin) in _header(path).items():
            end = [length + start for length, start in zip(shape, begin, strict=True)]
            before = ends.get(name, end)
            if len(before) != len(end):
                raise CheckpointError(f"the parts of the tensor '{name[:60]}' differ in dimensions", str(path))
            ends[name] = list(map(max, before, end))
            elements[name] = elements.get(name, 0) + math.prod(shape)
    for name, size in ends.items():
        if elements[name] != math.prod(size):
            what = f"the parts of the tensor '{name[:60]}' hold {elements[name]:,} of {math.prod(size):,} elements"
            raise CheckpointError(what, str(folder), "it is damaged")


def _header(path: Path) -> dict[str, tuple[list[int], list[int]]]:
    """Tensor → shape, and where in the whole tensor it begins, of one file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            parts = (file.metadata() or {}).get(_PARTS)
            shapes: dict[str, list[int]] = {name: part.get_shape() for name, part in slices.items()}
            for name, part in slices.items():
                if part.get_dtype() not in _TYPES:
                    raise ValueError(f"'{name[:60]}' is of the type {part.get_dtype()}")
        places = parse_object(parts) if parts else None
        return {name: (shape, _begin(name, shape, places)) for name, shape in shapes.items()}
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"the file's header cannot be read ({str(error)[:200]})", str(path)) from error


def _begin(name: str, shape: list[int], places: Mapping[str, Any] | None) -> list[int]:
    begin: list[int] = [0] * len(shape)
    if places is not None:
        begin = entry(entry(places, name, dict), "saved_offsets", list)
    if len(begin) != len(shape) or not all(type(n) is int and 0 <= n < _LONGEST for n in (*begin, *shape)):
        raise ValueError(f"'{name[:60]}' cannot begin at {str(begin)[:60]} with the shape {str(shape)[:60]}")
    return begin

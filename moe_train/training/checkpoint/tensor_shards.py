"""Divides the tensors of a folder over files of limited size, and writes their index."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from moe_train.training.checkpoint import checksums

INDEX = "model.safetensors.index.json"


def plan_shards(sizes: Mapping[str, int], limit: int) -> dict[str, list[str]]:
    """File → its tensors, in order.

    Args:
        sizes: bytes of each tensor.
        limit: bytes of a file; a larger tensor has a file of its own.
    """
    shards: list[list[str]] = [[]]
    used = 0
    for name, size in sizes.items():
        if shards[-1] and used + size > limit:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{n:05}-of-{len(shards):05}.safetensors": shard for n, shard in enumerate(shards, 1)}


def write_index(folder: Path, shards: Mapping[str, Sequence[str]], total: int) -> None:
    """Writes the index of several files; nothing for one.

    Args:
        total: bytes of all tensors.
    """
    if len(shards) > 1:
        places = {tensor: file for file, tensors in shards.items() for tensor in tensors}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        checksums.write_synced(folder / INDEX, json.dumps(index, indent=1) + "\n")

"""Writes the README of an export: use, and names and shapes of the tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from moe_train.config import RunConfig
from moe_train.safe_text import for_markdown
from moe_train.training.checkpoint.state_dict import EXPERT, MODEL


def readme(exported: Mapping[str, Any], config: RunConfig, tensors: Mapping[str, Tensor], portable: bool) -> str:
    """Markdown text: origin, use, and a table of the tensors with one line for the experts of a layer."""
    total = sum(tensor.numel() for tensor in tensors.values())
    lines = [
        f"# {for_markdown(exported['run'])}, {exported['checkpoint']}",
        "",
        f"Exported by moe_train {exported['moe_train']}: task {config.task.name}, routing {config.routing['name']}, "
        f"{total:,} values.",
        "",
        *_use(portable),
        "",
        "## Tensors",
        "",
        f"`{MODEL}<parameter>`, as in PyTorch's state_dict; tied parameters are stored under their first name. Each",
        f"expert is a tensor of its own: `{MODEL}<parameter>{EXPERT}3` is expert 3 of its layer, applied as `x @ W`.",
        "",
        "| name | shape | type |",
        "|---|---|---|",
        *_table(tensors),
    ]
    return "\n".join(lines) + "\n"


def _use(portable: bool) -> list[str]:
    if not portable:
        return ["    moe-evaluate run=HERE data=DATA      moe-train … training.init_from=HERE"]
    return [
        "    moe-translate run=HERE source=en target=de < text",
        "    moe-evaluate run=HERE data=DATA      (a prepared data folder with held-out sentences)",
        "    moe-train … training.init_from=HERE",
        "",
        "`data/` contains the SentencePiece model and the dictionaries: line n of `dict.txt` is token n + 4, after",
        "`<s>`, `<pad>`, `</s>` and `<unk>`. A tag `__xx__` per language and `<mask>` are the last tokens.",
    ]


def _table(tensors: Mapping[str, Tensor]) -> list[str]:
    """One line per parameter; its experts share the line."""
    rows: dict[str, tuple[str, str]] = {}
    counts: dict[str, int] = {}
    for name, tensor in tensors.items():
        whole = name.split(EXPERT, 1)[0]
        rows.setdefault(whole, (str(list(tensor.shape)), str(tensor.dtype).removeprefix("torch.")))
        counts[whole] = counts.get(whole, 0) + (EXPERT in name)
    written = []
    for whole, (shape, kind) in rows.items():
        experts = f"{EXPERT}0 … {EXPERT}{counts[whole] - 1}" if counts[whole] else ""
        written.append(f"| `{whole}{experts}` | {shape} | {kind} |")
    return written

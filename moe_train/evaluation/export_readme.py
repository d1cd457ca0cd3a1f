"""The README of an export: what each name means, so that other programs can read the tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from moe_train.config import RunConfig
from moe_train.safe_text import for_markdown
from moe_train.training.checkpoint.state_dict import EXPERT, MODEL


def readme(exported: Mapping[str, Any], config: RunConfig, tensors: Mapping[str, Tensor], portable: bool) -> str:
    """Markdown: origin, use, and a table of the tensors, experts of a layer in one line."""
    total = sum(tensor.numel() for tensor in tensors.values())
    lines = [
        f"# {for_markdown(exported['run'])}, {exported['checkpoint']}",
        "",
        f"Exported by moe_train {exported['moe_train']}: task {config.task.name}, routing {config.routing['name']}, "
        f"{total:,} numbers.",
        "",
        *_use(portable),
        "",
        "## Tensors",
        "",
        f"`{MODEL}<parameter>`, as in PyTorch's state_dict; tied parameters stand under their first name. Experts are",
        f"stored one by one: `{MODEL}<parameter>{EXPERT}3` is expert 3 of its layer, and is used as `x @ W`.",
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
        "`data/` has the SentencePiece model and the dictionaries: line n of `dict.txt` is token n + 4, after `<s>`,",
        "`<pad>`, `</s>` and `<unk>`; a tag `__xx__` per language and `<mask>` come last.",
    ]


def _table(tensors: Mapping[str, Tensor]) -> list[str]:
    """One line per name; consecutive experts of one parameter share a line."""
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

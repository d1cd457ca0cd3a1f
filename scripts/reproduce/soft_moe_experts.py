"""Measures how Soft MoE's time grows with its experts at a fixed number of slots, relative to bare products.

    python scripts/reproduce/soft_moe_experts.py

From 4 to 64 experts the number of slots, and so FLOPs, stays the same; time grows since batched products of smaller
matrices are less efficient. Layers and products alternate within a round, so that other load of the machine affects
all; the result is the median over rounds of the ratio of their growths.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from study import machine, plain_word
from torch import Tensor

from moe_train import MoELayer
from moe_train.training.checkpoint.checksums import replace_text
from moe_train.training.run.run_info import commit

EXPERTS = (4, 16, 64)
BOUND = 1.1  # from 4 to 64 experts, the layer's growth over the products'


def contenders(
    images: int, tokens: int, dim: int, hidden: int, slots: int
) -> dict[tuple[str, int], Callable[[], Tensor]]:
    """``("layer", n)`` and ``("products", n)`` for each number of experts."""
    found: dict[tuple[str, int], Callable[[], Tensor]] = {}
    x = torch.randn(images, tokens, dim)
    for n in EXPERTS:
        layer = MoELayer(
            dim, hidden, {"name": "soft_moe", "num_experts": n, "num_slots": slots}, activation="gelu"
        ).eval()
        rows = torch.randn(n, images * slots // n, dim)
        first, second = torch.randn(n, dim, hidden) / dim**0.5, torch.randn(n, hidden, dim) / hidden**0.5
        found["layer", n] = lambda layer=layer: layer(x)[0]  # type: ignore[misc]
        found["products", n] = lambda rows=rows, a=first, b=second: torch.bmm(torch.bmm(rows, a), b)  # type: ignore[misc]
    return found


@torch.no_grad()
def timed(calls: dict[tuple[str, int], Callable[[], Tensor]], rounds: int) -> dict[tuple[str, int], list[float]]:
    """Seconds of each call in each round, after a warm-up."""
    seconds: dict[tuple[str, int], list[float]] = {key: [] for key in calls}
    for number in range(rounds + 1):
        for key, call in calls.items():
            start = time.perf_counter()
            call()
            if number:
                seconds[key].append(time.perf_counter() - start)
    return seconds


def growth(seconds: dict[tuple[str, int], list[float]]) -> float:
    """The layer's time at 64 experts over that at 4, divided by the same of the products; median over rounds."""
    few, many = EXPERTS[0], EXPERTS[-1]
    columns = (seconds[kind, n] for kind in ("layer", "products") for n in (many, few))
    return statistics.median(a / b / (c / d) for a, b, c, d in zip(*columns, strict=True))


def main() -> None:
    """Measures, prints and writes ``soft_moe_experts.json`` and ``soft_moe_experts.md``."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--results", default="results", help="where the JSON and Markdown files go")
    options.add_argument("--rounds", type=int, default=30, help="calls of each (default: 30)")
    options.add_argument("--threads", type=int, default=0, help="CPU threads (default: all cores)")
    options.add_argument("--shape", default="32,196,384,1536,192", help="images,tokens,dim,hidden,slots")
    given = options.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    torch.manual_seed(1)
    shape = [int(n) for n in given.shape.split(",")]
    seconds = timed(contenders(*shape), given.rounds)
    content = {
        "command": [Path(sys.argv[0]).name, *(plain_word(word) for word in sys.argv[1:])],
        "commit": commit(),
        "machine": machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "shape": dict(zip(("images", "tokens", "dim", "hidden", "slots"), shape, strict=True)),
        "rounds": given.rounds,
        "milliseconds": {
            kind: {str(n): 1e3 * statistics.median(seconds[kind, n]) for n in EXPERTS} for kind in ("layer", "products")
        },
        "growth": growth(seconds),
        "growth_of_layer": apart(seconds, "layer"),
        "growth_of_products": apart(seconds, "products"),
        "bound": BOUND,
        "holds": growth(seconds) <= BOUND,
    }
    folder = Path(given.results)
    folder.mkdir(parents=True, exist_ok=True)
    replace_text(folder / "soft_moe_experts.json", json.dumps(content, indent=1) + "\n")
    replace_text(folder / "soft_moe_experts.md", markdown(content))
    print(markdown(content))


def apart(seconds: dict[tuple[str, int], list[float]], kind: str) -> float:
    """Median time at 64 experts over that at 4."""
    return statistics.median(seconds[kind, EXPERTS[-1]]) / statistics.median(seconds[kind, EXPERTS[0]])


def markdown(content: Mapping[str, Any]) -> str:
    """The result as a page."""
    shape, times, on = content["shape"], content["milliseconds"], content["machine"]
    claim = "Soft MoE, figure 6: throughput stays almost flat as experts are added (379 to 365 images/s from 8 to 256)"
    measured = f"from 4 to 64 experts the layer's time grows {content['growth_of_layer']:.3f} times, "
    measured += f"that of the bare products {content['growth_of_products']:.3f} times"
    lines = [
        *("# Soft MoE's inference time at a fixed number of slots", ""),
        *("| claim | measured here |", "|---|---|", f"| {claim} | {measured} |", ""),
        *("| experts | layer, ms | bare batched products, ms |", "|---:|---:|---:|"),
        *(f"| {n} | {times['layer'][str(n)]:.1f} | {times['products'][str(n)]:.1f} |" for n in EXPERTS),
        "",
        f"- growth of the layer over growth of the products, median over {content['rounds']} rounds: "
        f"{content['growth']:.3f} (bound {content['bound']}: {'holds' if content['holds'] else '**does not hold**'})",
        f"- {', '.join(f'{value} {name}' for name, value in shape.items())}; forward passes, fp32",
        f"- made by `{' '.join(content['command'])}` at commit `{content['commit']}`",
        f"- {content['threads']} threads on {on['cores']} cores of {on['processor']}; torch {content['torch']}",
        *("", "Generated by scripts/reproduce/soft_moe_experts.py.", ""),
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()

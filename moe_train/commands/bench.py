"""``moe-bench layer``: how fast one sparse layer is on this machine, against the bare products and against peers."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from moe_train.analysis.bench_layer import DTYPES, SHAPES, BenchRow, LayerShape, bench_layer
from moe_train.analysis.bench_peers import PEERS


def main() -> None:
    """Entry point."""
    arguments = _parser().parse_args()
    torch.set_num_threads(arguments.threads)
    console = Console()
    plan = [(shape, dtype) for shape in arguments.shape or SHAPES for dtype in arguments.dtype]
    rows = [
        bench_layer(shape, dtype, arguments.rounds, arguments.peers)
        for shape, dtype in track(plan, "timing", console=Console(stderr=True), transient=True)
    ]
    console.print(table(rows))
    for name, reason in {k: v for row in rows for k, v in row.absent.items()}.items():
        console.print(f"{name} took no part: {reason}")
    if arguments.json:
        _write(arguments.json, rows, arguments.threads)


def table(rows: Sequence[BenchRow]) -> Table:
    """What is printed: a row per shape and type."""
    result = Table(
        title="One sparse layer, forward + backward",
        caption="median ms; skew: fullest expert / mean; ratio: ours / bmm; beside a peer's time: ours / peer",
    )
    peers = [name for name in PEERS if any(name in row.milliseconds for row in rows)]
    for name in ("tokens, d, hidden, experts, k", "type", "skew", "bmm", "ours", "ratio", *peers):
        result.add_column(name, justify="right", no_wrap=name == "ratio")
    for row in rows:
        sizes = ", ".join(str(n) for n in dataclasses.astuple(row.shape))
        times = [f"{row.milliseconds['bmm']:.1f}", f"{row.milliseconds['ours']:.1f}", f"{row.ratio:.2f}"]
        others = [
            f"{row.milliseconds[n]:.1f} ({row.over_peers[n]:.2f})" if n in row.milliseconds else "-" for n in peers
        ]
        result.add_row(sizes, row.dtype, f"{row.skew:.2f}", *times, *others)
    return result


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="moe-bench", description=__doc__)
    layer = parser.add_subparsers(dest="what", required=True).add_parser(
        "layer", help="a row per shape and type; ratio = time over the bare batched products of the same experts"
    )
    layer.add_argument(
        "--shape", type=LayerShape.parse, action="append", metavar="T,D,H,E,K", help="tokens,dim,hidden,experts,k"
    )
    layer.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    layer.add_argument("--rounds", type=int, default=9, help="how often each contender runs")
    layer.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    layer.add_argument("--peers", nargs="*", choices=list(PEERS), default=list(PEERS), help="none: --peers")
    layer.add_argument("--json", type=Path, metavar="FILE", help="write the figures here too")
    return parser


def _write(path: Path, rows: Sequence[BenchRow], threads: int) -> None:
    content: dict[str, Any] = {
        "command": " ".join(["moe-bench", *sys.argv[1:]]),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": threads,
        "rows": [dataclasses.asdict(row) for row in rows],
    }
    partial = path.with_name(path.name + ".tmp")
    partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)


if __name__ == "__main__":
    main()

#!/usr/bin/env python
"""Measures rows, bytes and memory on real ranks, and compares them with moe-plan.

    python scripts/measure_traffic.py --out results/traffic

Starts gloo ranks on this machine, two per "node" of the layout, and runs one training step of a sparse layer for each
strategy and k: Switch, flat top-k, SAM with groups = ranks and with groups = nodes. Rows and bytes are sums of our
counters over ranks. Then runs one step of small models, for the memory of a rank. Writes
traffic.json, traffic.md, traffic.svg, memory.json and memory.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from moe_train.analysis.planner.measured_traffic import (
    COUNTED,
    ModelCase,
    TrafficCase,
    measure_layer,
    measure_memory,
    predict_layer,
    predict_memory,
)
from moe_train.parallel.isolation import LOOPBACK
from moe_train.parallel.traffic import LINKS

WORLD, EXPERTS, MEGA = 4, 16, 1e6


def cases() -> Iterator[tuple[str, int, TrafficCase]]:
    """Name, k, and case of each row of the table; experts are narrower for larger k, so that FLOPs are equal."""
    for k in (1, 2, 4):
        flat = {"name": "top_k", "top_k": k, "normalise": "none" if k == 1 else "after_drop"}
        sam = {"name": "sam", "top_k": k}
        if k == 1:
            yield "switch", k, _case({"name": "switch"}, k)
        yield "top_k", k, _case(flat, k)
        yield "top_k, two-level", k, _case(flat, k, two_level=True)
        yield "sam, groups = ranks", k, _case({**sam, "num_groups": WORLD}, k)
        yield "sam, groups = nodes", k, _case({**sam, "num_groups": WORLD // 2}, k, two_level=True)


def _case(routing: Mapping[str, Any], k: int, **layout: Any) -> TrafficCase:
    sizes = {"dim": 512, "hidden": 256 // k, "sentences": 32, "length": 64}
    return TrafficCase({"num_experts": EXPERTS, **routing}, **sizes, **layout)


MODEL = {"embed_dim": 128, "ffn_dim": 512, "num_heads": 4, "encoder_layers": 3, "decoder_layers": 3}
MODELS = {
    "switch, 16 experts": ModelCase({"name": "switch", "num_experts": 16}, MODEL),
    "top-2, 16 experts": ModelCase({"name": "top_k", "num_experts": 16, "top_k": 2}, MODEL),
    "top-2, two replicas": ModelCase({"name": "top_k", "num_experts": 16, "top_k": 2}, MODEL, expert_parallel=2),
    "sam, k = 4": ModelCase({"name": "sam", "num_experts": 16, "top_k": 4, "num_groups": 4}, MODEL),
    "smoe, 8 + 8": ModelCase({"name": "smoe", "num_experts": 16}, MODEL),
    "top-2, recomputed": ModelCase({"name": "top_k", "num_experts": 16, "top_k": 2}, MODEL, recompute=True),
}


def work(rank: int, folder: str) -> None:
    """Runs on each rank; rank 0 writes the results."""
    torch.set_num_threads(1)
    os.environ.update(LOOPBACK)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD)
    found = {
        "traffic": [dataclasses.asdict(measure_layer(case)) for _, _, case in cases()],
        "memory": [measure_memory(case) for case in MODELS.values()],
    }
    if rank == 0:
        Path(folder, "measured.json").write_text(json.dumps(found), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


def traffic_rows(measured: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One per case: measured and planned, summed over ranks."""
    rows = []
    for (name, k, case), found in zip(cases(), measured, strict=True):
        row: dict[str, Any] = {"strategy": name, "k": k, "tokens": WORLD * case.tokens}
        for label, load in (("equal_loads", None), ("counted_loads", tuple(found["load"]))):
            planned = predict_layer(case, WORLD, load)
            row[label] = {link: {n: WORLD * getattr(planned[link], n) for n in COUNTED} for link in LINKS}
        rows.append({**row, "measured": found["by_link"]})
    return rows


def sent(links: Mapping[str, Mapping[str, float]]) -> float:
    """Bytes sent to other processes."""
    return sum(links[link][n] for link in ("node", "across") for n in ("payload_bytes", "metadata_bytes"))


def header(*names: str) -> tuple[str, str]:
    """The first two lines of a Markdown table."""
    return f"| {' | '.join(names)} |", "|---" * len(names) + "|"


def traffic_table(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The table in Markdown."""
    yield from header(
        *("strategy", "k", "rows in the process", "in the node", "across nodes", "payload MB", "metadata MB"),
        *("sent MB", "planned", "given the loads"),
    )
    for row in rows:
        found, total = row["measured"], sent(row["measured"])
        counts = " | ".join(f"{found[link]['dispatched_rows']:,}" for link in LINKS)
        parts = [sum(found[link][n] for link in ("node", "across")) / MEGA for n in ("payload_bytes", "metadata_bytes")]
        errors = [f"{sent(row[label]) / total - 1:+.1%}" for label in ("equal_loads", "counted_loads")]
        numbers = f"{parts[0]:.2f} | {parts[1]:.3f} | {total / MEGA:.2f} | {errors[0]} | {errors[1]}"
        yield f"| {row['strategy']} | {row['k']} | {counts} | {numbers} |"


def memory_table(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The table in Markdown."""
    states = ("parameters MB", "gradients", "Adam", "kept for backward")
    yield from header("model", *states, "sum", "planned sum", "error", "error of activations")
    for row in rows:
        found, planned = row["measured"], row["planned"]
        numbers = " | ".join(f"{found[n] / MEGA:.2f}" for n in ("parameters", "gradients", "optimizer", "activations"))
        total, plan = sum(found.values()), sum(planned.values())
        kept = planned["activations"] / found["activations"] - 1
        both = f"{total / MEGA:.2f} | {plan / MEGA:.2f} | {plan / total - 1:+.1%}"
        yield f"| {row['model']} | {numbers} | {both} | {kept:+.1%} |"


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Plots bytes over k: measured as points, planned with equal loads as lines."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "moe_train"
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(9.5, 3.6), sharex=True, layout="constrained")
    for axes, links, title in zip(
        panels, (("node", "across"), ("across",)), ("sent between ranks", "sent between nodes"), strict=True
    ):
        for index, name in enumerate(dict.fromkeys(row["strategy"] for row in rows)):
            own = [row for row in rows if row["strategy"] == name]
            values = {
                label: [sum(r[label][link][n] for link in links for n in COUNTED[2:]) / MEGA for r in own]
                for label in ("measured", "equal_loads")
            }
            ks = [r["k"] for r in own]
            axes.plot(ks, values["equal_loads"], color=f"C{index}", linewidth=1)
            axes.plot(ks, values["measured"], "o", color=f"C{index}", label=name, markersize=5)
        axes.set(title=title, xlabel="k, experts per token", ylabel="MB a step", xticks=[1, 2, 4], ylim=(0, None))
    panels[0].legend(fontsize=8)
    figure.savefig(path, metadata={"Date": None})


def write(path: Path, text: str) -> None:
    """Writes a file atomically."""
    partial = path.with_name(path.name + ".tmp")
    partial.write_text(text.rstrip() + "\n", encoding="utf-8")
    os.replace(partial, path)


def main() -> None:
    """Measures, and writes all results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/traffic"))
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(work, args=(folder,), nprocs=WORLD)
        found = json.loads(Path(folder, "measured.json").read_text(encoding="utf-8"))
    rows = traffic_rows(found["traffic"])
    memory = [
        {"model": name, "measured": measured, "planned": predict_memory(case, WORLD)}
        for (name, case), measured in zip(MODELS.items(), found["memory"], strict=True)
    ]
    about = {"command": " ".join(["python", *sys.argv]), "torch": torch.__version__, "ranks": WORLD, "experts": EXPERTS}
    write(out / "traffic.json", json.dumps({**about, "rows": rows}, indent=1))
    write(out / "memory.json", json.dumps({**about, "rows": memory}, indent=1))
    command = f"`{about['command']}`, torch {about['torch']}, {WORLD} gloo ranks, two to a node.\n"
    write(out / "traffic.md", "\n".join([command, *traffic_table(rows)]))
    write(out / "memory.md", "\n".join([command, *memory_table(memory)]))
    draw(rows, out / "traffic.svg")
    print((out / "traffic.md").read_text(), (out / "memory.md").read_text(), sep="\n")


if __name__ == "__main__":
    main()

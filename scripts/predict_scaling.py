#!/usr/bin/env python
"""Compares moe-plan with published scale-outs, and predicts the speed of strategies from 8 to 4,096 GPUs.

    python scripts/predict_scaling.py --out results/scaling --docs docs/scaling.md

Writes published.json, strategies.json and strategies.svg, and the tables of docs/scaling.md between their markers. The
published figures are those of README.moe.md in facebookresearch/fairseq, branch moe: words per second in its logs of
August 2021 (4.1 B parameters) and its table "Expected performance on IB interconnect" (142 B with 64 experts).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from moe_train.analysis.planner.choose_layout import Candidate, compare_layouts, describe_layout
from moe_train.analysis.planner.cost_memory import StateSharding
from moe_train.analysis.planner.cost_shape import ModelShape, decoder_only
from moe_train.analysis.planner.cost_time import TimePlan, time_plan
from moe_train.analysis.planner.cost_traffic import StepTraffic, Workload, block_flows, block_traffic, step_traffic
from moe_train.config import ModelConfig, build
from moe_train.config.planner import ClusterConfig, PlanConfig
from moe_train.parallel.layout_plan import LayoutPlan, plan_layout

ROOT = Path(__file__).resolve().parents[1]
VOCABULARY = 50000  # of fairseq's dummy_lm task
WORLDS = (8, 32, 64, 128, 512, 4096)
CLUSTERS = ("dgx_a100", "ethernet")
EXPERTS_PER_GPU = 4


@dataclass(frozen=True)
class Published:
    """A published speed: language model of fairseq's moe branch, one expert per GPU, top-2, recomputed activations."""

    gpus: int
    cluster: str
    model: Mapping[str, int]
    sentences: int
    length: int
    accumulation: int
    words_per_second: float

    @property
    def shape(self) -> ModelShape:
        """The model in closed form."""
        config = ModelConfig(**{"dropout": 0.1, **self.model})  # type: ignore[arg-type]
        return decoder_only(config, {"name": "top_k", "num_experts": self.gpus}, VOCABULARY)


SMALL = {"decoder_layers": 24, "embed_dim": 2048, "ffn_dim": 8192, "num_heads": 32}
LARGE = {"decoder_layers": 32, "embed_dim": 4096, "ffn_dim": 16384, "num_heads": 32}
PUBLISHED = (
    Published(8, "dgx_a100", SMALL, 4, 2048, 1, 35.0e3),
    Published(8, "dgx_v100", SMALL, 4, 2048, 1, 16.6e3),
    Published(32, "dgx_a100", LARGE, 6, 1024, 2, 33e3),
    Published(64, "dgx_a100", LARGE, 6, 1024, 2, 82e3),
    Published(128, "dgx_a100", LARGE, 6, 1024, 2, 191e3),
    Published(512, "dgx_a100", LARGE, 12, 1024, 1, 638e3),
)


def cluster(name: str) -> ClusterConfig:
    """A cluster of ``configs/cluster``."""
    text = (ROOT / "configs" / "cluster" / f"{name}.yaml").read_text(encoding="utf-8")
    return build(ClusterConfig, yaml.safe_load(text))


def predictions(case: Published, efficiency: float | None = None) -> dict[str, float]:
    """Predicted words per second with our exchange and dispatch, and with fairseq's, on the same machine.

    Args:
        efficiency: of the cluster; None: that of its config.
    """
    machine = cluster(case.cluster)
    machine = dataclasses.replace(machine, efficiency=efficiency or machine.efficiency)
    work = Workload(case.sentences * case.length, 1.0, case.length, case.accumulation, "fp16", recompute=True)
    plan = plan_layout(case.gpus, machine.ranks_per_node, case.gpus, case.gpus)
    sharding = StateSharding("deepspeed", zero_stage=3, optimizer_bytes=4)  # fully sharded, Adam's moments in 16 bits
    words = case.gpus * work.tokens * case.accumulation
    ours = time_plan(case.shape, plan, work, step_traffic(case.shape, plan, work), machine, sharding)
    theirs = time_plan(case.shape, plan, work, pair_traffic(case.shape, plan, work), machine, sharding)
    seconds = theirs.total + dispatch_flops(case) / (machine.tflops * 1e12 * machine.efficiency)
    return {"ours": words / ours.total, "fairseq": words / seconds}


def pair_traffic(shape: ModelShape, plan: LayoutPlan, work: Workload) -> StepTraffic:
    """Traffic with a row per pair instead of one per destination."""
    flows = tuple(dataclasses.replace(f, rows=f.pairs) for f in block_flows(shape.sparse[0], plan))
    return StepTraffic(tuple(block_traffic(block, flows, work.tokens, work) for block in shape.sparse))


def dispatch_flops(case: Published) -> float:
    """FLOPs of dispatch and combine as dense products with one-hot masks [T, E, C], E·C = 2 T, in a step of one GPU.

    Each is 2 · T · 2 T · d. Forward twice (recomputation) both; backward one of the dispatch (its mask has no
    gradient) and two of the combination.
    """
    tokens = case.sentences * case.length
    each = 4.0 * tokens**2 * case.model["embed_dim"]
    return (2 * 2 + 3) * each * len(case.shape.sparse) * case.accumulation


def calibrated() -> float:
    """The efficiency for which the prediction of the first case equals its published speed."""
    low, high = 0.05, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        too_fast = predictions(PUBLISHED[0], middle)["fairseq"] > PUBLISHED[0].words_per_second
        low, high = (low, middle) if too_fast else (middle, high)
    return low


def published_rows() -> list[dict[str, Any]]:
    """All published speeds with their predictions."""
    efficiency = calibrated()
    rows = []
    for case in PUBLISHED:
        guess, fitted = predictions(case), predictions(case, efficiency)
        total = case.shape.dense_parameters + case.shape.expert_parameters
        rows.append(
            {
                "gpus": case.gpus,
                "cluster": case.cluster,
                "parameters": total,
                "published": case.words_per_second,
                "as_fairseq": guess["fairseq"],
                "as_fairseq_calibrated": fitted["fairseq"],
                "ours_calibrated": fitted["ours"],
                "efficiency": efficiency,
            }
        )
    return rows


def published_table(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The table in Markdown."""
    fitted = f"{rows[0]['efficiency']:.2f}"
    planned = f"planned, efficiency 0.40 | error | planned, efficiency {fitted} | error"
    yield f"| GPUs | parameters | published | {planned} | our layers |"
    yield "|---|---|---|---|---|---|---|---|"
    for index, row in enumerate(rows):
        name = f"{row['gpus']} {row['cluster'].removeprefix('dgx_').upper()}"
        errors = [row[key] / row["published"] - 1 for key in ("as_fairseq", "as_fairseq_calibrated")]
        second = "(fitted)" if index == 0 else f"{errors[1]:+.0%}"
        yield (
            f"| {name} | {row['parameters'] / 1e9:.1f} B | {_k(row['published'])} | {_k(row['as_fairseq'])} |"
            f" {errors[0]:+.0%} | {_k(row['as_fairseq_calibrated'])} | {second} | {_k(row['ours_calibrated'])} |"
        )


def _k(number: float) -> str:
    return f"{number / 1e3:.1f} k" if number < 1e5 else f"{number / 1e3:.0f} k"


STRATEGIES: dict[str, dict[str, Any]] = {
    "THOR, a batch draws": {"name": "thor", "draw": "batch"},
    "THOR, tokens draw": {"name": "thor", "draw": "token"},
    "Switch": {"name": "switch"},
    "top-2": {"name": "top_k", "top_k": 2},
    "SMoE, two strata": {"name": "smoe"},
    "SAM, k = 2, groups = ranks": {"name": "sam", "top_k": 2, "num_groups": "rank"},
}


def scaled(name: str, machine: str, world: int) -> Candidate:
    """The layout that moe-plan chooses with experts divided over all GPUs, so that the model grows with them."""
    model = yaml.safe_load((ROOT / "configs" / "model" / "big.yaml").read_text(encoding="utf-8"))
    routing = {**STRATEGIES[name], "num_experts": EXPERTS_PER_GPU * world}
    layout = {"world": world, "expert_parallel": world}
    config = {"cluster": vars(cluster(machine)), "model": model, "routing": routing, "layout": layout}
    return compare_layouts(build(PlanConfig, config)).chosen


def strategy_rows() -> list[dict[str, Any]]:
    """Every strategy on every cluster and world."""
    rows = []
    for machine in CLUSTERS:
        for name in STRATEGIES:
            for world in WORLDS:
                found = scaled(name, machine, world)
                rows.append(
                    {
                        "cluster": machine,
                        "strategy": name,
                        "gpus": world,
                        "layout": describe_layout(found.layout),
                        "two_level": found.layout.dispatches_by_node,
                        "parameters": found.shape.dense_parameters + found.shape.expert_parameters,
                        "tokens_per_second_per_gpu": found.tokens_per_second / world,
                        "exchange_share": found.time.exchange / found.time.total,
                        "largest": largest(found.time),
                        "memory_gb": found.memory.total / 1e9,
                    }
                )
    return rows


def largest(time: TimePlan) -> str:
    """The part of the step that takes longest."""
    return max(vars(time), key=lambda part: getattr(time, part)).replace("_", " ")


def strategy_table(rows: Sequence[Mapping[str, Any]], machine: str) -> Iterator[str]:
    """Markdown: thousands of tokens per second and GPU, and the speed at 4,096 GPUs relative to 8."""
    yield f"| {machine} | {' | '.join(f'{world:,}' for world in WORLDS)} | left of 8's | exchange | largest part |"
    yield "|---" * (len(WORLDS) + 4) + "|"
    for name in STRATEGIES:
        own = [row for row in rows if row["strategy"] == name and row["cluster"] == machine]
        speed = [row["tokens_per_second_per_gpu"] for row in own]
        shown = " | ".join(f"{s / 1e3:.1f}{'²' if r['two_level'] else ''}" for s, r in zip(speed, own, strict=True))
        end = f"{speed[-1] / speed[0]:.0%} | {own[-1]['exchange_share']:.0%} | {own[-1]['largest']}"
        yield f"| {name} | {shown} | {end} |"


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Speed of a GPU over the number of GPUs, relative to 8."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "moe_train"
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(CLUSTERS), figsize=(9.5, 3.6), sharey=True, layout="constrained")
    for axes, machine in zip(panels, CLUSTERS, strict=True):
        for name in STRATEGIES:
            own = [row for row in rows if row["strategy"] == name and row["cluster"] == machine]
            first = own[0]["tokens_per_second_per_gpu"]
            axes.plot(WORLDS, [row["tokens_per_second_per_gpu"] / first for row in own], "o-", label=name, markersize=3)
        axes.set(title=machine, xscale="log", xlabel="GPUs", ylim=(0, 1.1))
        axes.set_xticks(WORLDS, [str(world) for world in WORLDS])
        axes.minorticks_off()
    panels[0].set_ylabel("speed of a GPU, 8 GPUs = 1")
    panels[0].legend(fontsize=7)
    figure.savefig(path, metadata={"Date": None})


def into(document: str, mark: str, lines: Iterator[str]) -> str:
    """The document with the text between two markers replaced.

    Raises:
        ValueError: the markers are missing.
    """
    start, end = f"<!-- {mark} -->", f"<!-- /{mark} -->"
    if document.count(start) != 1 or document.count(end) != 1:
        raise ValueError(f"the document needs {start} and {end}, once each")
    return re.sub(f"{start}.*{end}", "\n".join([start, *lines, end]), document, flags=re.DOTALL)


def write(path: Path, text: str) -> None:
    """Writes a file atomically."""
    partial = path.with_name(path.name + ".tmp")
    partial.write_text(text.rstrip() + "\n", encoding="utf-8")
    os.replace(partial, path)


def main() -> None:
    """Writes all predictions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "scaling")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs" / "scaling.md")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    published, strategies = published_rows(), strategy_rows()
    write(arguments.out / "published.json", json.dumps(published, indent=1))
    write(arguments.out / "strategies.json", json.dumps(strategies, indent=1))
    draw(strategies, arguments.out / "strategies.svg")
    text = into(arguments.docs.read_text(encoding="utf-8"), "published", published_table(published))
    for machine in CLUSTERS:
        text = into(text, machine, strategy_table(strategies, machine))
    write(arguments.docs, text)


if __name__ == "__main__":
    main()

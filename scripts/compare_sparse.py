#!/usr/bin/env python
"""Compares the training speed of sparse models with that of a dense one, at equal active FLOPs.

    python scripts/compare_sparse.py DATA_FOLDER --model tiny --precision bf16 --out compare.json

The dense model has the dimensions of ``configs/model/MODEL.yaml``; the sparse ones replace the feed-forwards of its
default ``sparse_layers`` by experts: as wide for switch, half as wide for two experts per token. All take the same
updates, forward and backward pass and optimizer as ``moe-train`` computes them, in one process, alternating, so that
other load of the machine affects all of them. A ratio is the median over updates, weighted by their words.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from compare_fairseq import CLOCKS
from rich.console import Console
from rich.table import Table

from moe_train.config import ModelConfig, RunConfig, TaskConfig, TrainingConfig, build
from moe_train.data.folder import DataFolder
from moe_train.tasks import build_task
from moe_train.training.engines import EngineInputs, build_engine
from moe_train.training.optim.lr_schedule import learning_rate
from moe_train.training.runtime.signals import StopSignals
from moe_train.training.runtime.world import World
from moe_train.training.step import TrainStep

MODELS = Path(__file__).resolve().parents[1] / "configs" / "model"


@dataclass
class Side:
    """One of the models, and its seconds per update."""

    step: TrainStep
    parameters: int
    seconds: list[float] = field(default_factory=list)


def main() -> None:
    """Trains all models, prints the table, writes the report."""
    options = parse()
    torch.set_num_threads(options.threads)
    config = run_config(options, {"name": "dense"})
    task: Any = build_task(config, DataFolder.open(options.data))
    sides = {name: build_side(options, routing) for name, routing in routings(options, config.model).items()}
    words = train(task, config, sides, options)
    report = {name: summary(side, sides["dense"], words) for name, side in sides.items()}
    show(report, options)
    if options.out:
        settings = {key: str(value) for key, value in vars(options).items()}
        options.out.write_text(json.dumps({"sides": report, "settings": settings}, indent=2) + "\n", encoding="utf-8")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="a folder made by moe-prepare")
    parser.add_argument("--directions", nargs="*", default=[], help="all of the folder unless given")
    parser.add_argument("--model", default="tiny", help="a file of configs/model")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--strategies", nargs="*", help="of switch, top_2 and sam; all unless given")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--tokens", type=int, default=8192, help="target tokens of an update")
    parser.add_argument("--updates", type=int, default=30, help="measured ones")
    parser.add_argument("--warm-up", type=int, default=4, help="updates before these")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: fair on a busy machine, with --threads 1")
    parser.add_argument("--out", type=Path, help="write the report as JSON")
    return parser.parse_args()


def routings(options: argparse.Namespace, model: ModelConfig) -> dict[str, Mapping[str, Any]]:
    """``routing`` of each side by its name in the table, at equal active FLOPs."""
    half: dict[str, Any] = {"num_experts": options.experts, "top_k": 2, "expert_ffn_dim": model.ffn_dim // 2}
    sparse: dict[str, Mapping[str, Any]] = {
        "switch": {"name": "switch", "num_experts": options.experts},
        "top_2": {"name": "top_k", **half},
        "sam": {"name": "sam", "num_groups": options.experts // 2, **half},
    }
    wanted = sparse if options.strategies is None else options.strategies
    return {"dense": {"name": "dense"}, **{name: sparse[name] for name in wanted}}


def run_config(options: argparse.Namespace, routing: Mapping[str, Any]) -> RunConfig:
    """The config of a side; only the routing differs."""
    model = yaml.safe_load((MODELS / f"{options.model}.yaml").read_text(encoding="utf-8"))
    if routing["name"] == "dense":
        model["sparse_layers"] = "none"
    return RunConfig(
        data=str(options.data),
        seed=options.seed,
        model=build(ModelConfig, model),
        routing=dict(routing),
        task=TaskConfig(directions=tuple(options.directions)),
        training=TrainingConfig(
            max_updates=options.warm_up + options.updates,
            tokens_per_update=options.tokens,
            precision=options.precision,
        ),
    )


def build_side(options: argparse.Namespace, routing: Mapping[str, Any]) -> Side:
    """Model, criterion and engine, as the training loop uses them."""
    config = run_config(options, routing)
    task: Any = build_task(config, DataFolder.open(options.data))
    torch.manual_seed(config.seed)
    model = task.build_model().train()
    engine = build_engine(EngineInputs(model, config.engine, config.training, World()))
    step = TrainStep(engine, task.build_criterion(), World(), config.seed)
    return Side(step, sum(p.numel() for p in model.parameters()))


def train(task: Any, config: RunConfig, sides: Mapping[str, Side], options: argparse.Namespace) -> list[int]:
    """The same updates on all sides, alternating; the target words of each that is measured."""
    training, batches, signals, words = config.training, task.train_batches(), StopSignals(), []
    clock: Callable[[], float] = CLOCKS[options.clock]
    for update in range(training.max_updates):
        rate = learning_rate(training.schedule, training.optimizer.lr, training.max_updates, update + 1)
        samples = [task.train_sample(indices, update) for indices in batches.update(update).micro_batches]
        order = list(sides.values())
        for side in order if update % 2 else reversed(order):
            start = clock()
            side.step.run(update, samples, rate, signals)
            side.seconds.append(clock() - start)
        words.append(sum(sample["ntokens"] for sample in samples))
    return words[options.warm_up :]


def summary(side: Side, dense: Side, words: list[int]) -> dict[str, float]:
    """Parameters, words per second, and these over the dense model's."""
    own, other = side.seconds[-len(words) :], dense.seconds[-len(words) :]
    return {
        "parameters": side.parameters,
        "words_per_second": sum(words) / sum(own),
        "over_dense": weighted_median((b / a for a, b in zip(own, other, strict=True)), words),
    }


def weighted_median(values: Iterable[float], weights: Iterable[float]) -> float:
    """The smallest value at which the weights of the values up to it reach half of all."""
    pairs = sorted(zip(values, weights, strict=True))
    half, reached = sum(weight for _, weight in pairs) / 2, 0.0
    for value, weight in pairs:
        reached += weight
        if reached >= half:
            return value
    raise ValueError("there are no values")


def show(report: Mapping[str, Mapping[str, float]], options: argparse.Namespace) -> None:
    """Prints the comparison as a table."""
    table = Table("", "parameters", "words/s", "over dense", title=f"{options.model}, {options.precision}")
    for name, row in report.items():
        table.add_row(name, f"{row['parameters']:,.0f}", f"{row['words_per_second']:,.0f}", f"{row['over_dense']:.3f}")
    Console().print(table)


if __name__ == "__main__":
    main()

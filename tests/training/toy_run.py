"""Runs the toy task as moe-train runs a real one; the target of launched processes in tests."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moe_train.config import RunConfig, build, to_mapping
from moe_train.data.batching import Indices
from moe_train.launch.local import launch
from moe_train.launch.process_group import joined_world
from moe_train.training import RunFolder, RunOutcome, train
from moe_train.training.checkpoint.dcp import load_tensors, shapes
from moe_train.training.checkpoint.store import CheckpointStore
from tests.training.toy import ToyTask

TIMES = ("words_per_second", "images_per_second")  # fields of a log line that depend on the clock
TARGET = "tests.training.toy_run:run"


class Trouble(ToyTask):
    """The toy task with one thing that goes wrong when a rank loads the samples of an update.

    ``plan``: {"rank", "update", "what"}: ``kill`` (SIGKILL to itself), ``term`` (SIGTERM to itself), ``raise``,
    ``hang``, ``memory``, ``infinite`` (from that update on its loss is infinite) or ``once`` (in that update only).
    Samples are loaded ahead of their update; ``term`` comes in the middle of it with "where": ``computing``, and when
    that many batches of a validation were done with "where": ``validation``.
    """

    def __init__(self, config: RunConfig, rank: int, plan: Mapping[str, Any], dropout: float) -> None:
        super().__init__(config, dropout)
        self.plan = plan if plan and plan["rank"] == rank else {}
        self.where = self.plan.get("where", "loading")
        self.loaded = self.computed = self.validated = 0

    def train_sample(self, indices: Indices, update: int = 0) -> dict[str, Any]:
        sample = super().train_sample(indices, update)
        self.loaded += 1
        if self.where == "loading" and self._past(self.loaded, self.config.training.accumulation):
            self._go_wrong(sample)
        return sample

    def build_criterion(self) -> nn.Module:
        criterion = super().build_criterion()
        criterion.register_forward_hook(self._computed)
        return criterion

    def validation_sample(self, name: str, indices: Indices) -> dict[str, Any]:
        sample = ToyTask.train_sample(self, indices)
        self.validated += 1
        if self.where == "validation" and self._past(self.validated, 1):
            self._go_wrong(sample)
        return sample

    def _computed(self, criterion: nn.Module, inputs: Any, output: Any) -> None:
        self.computed += criterion.training
        if self.where == "computing" and self._past(self.computed, self.config.training.accumulation):
            self._go_wrong({})

    def _past(self, count: int, each: int) -> bool:
        return bool(self.plan) and count > self.plan["update"] * each

    def _go_wrong(self, sample: dict[str, Any]) -> None:
        what = self.plan["what"]
        if what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "term":
            self.plan = {}
            os.kill(os.getpid(), signal.SIGTERM)
        if what == "raise":
            raise ZeroDivisionError("planted")
        if what == "hang":
            time.sleep(3600)
        if what == "memory":
            torch.empty(1 << 62, dtype=torch.uint8)
        if what == "once":
            self.plan = {}
        if what in ("infinite", "once"):
            sample["factor"] = float("inf")


def run(
    mapping: Mapping[str, Any], folder: str, trouble: Mapping[str, Any] | None = None, dropout: float = 0.1
) -> dict[str, Any]:
    """Trains in ``folder``, which is ready."""
    config = build(RunConfig, mapping)
    with joined_world(config.launch, config.training.threads) as world:
        task = Trouble(config, world.rank, trouble or {}, dropout)
        return dataclasses.asdict(train(config, task, RunFolder(Path(folder)), world=world))


def start(config: RunConfig, path: Path, processes: int = 1, minutes: float = 1.0, **switches: Any) -> RunOutcome:
    """Begins or resumes a toy run, with a time limit in minutes."""
    config = dataclasses.replace(config, launch=dataclasses.replace(config.launch, timeout_minutes=minutes))
    folder = RunFolder(path)
    folder.check(config)
    folder.begin(config)
    arguments = {"mapping": to_mapping(config), "folder": str(path), **switches}
    if processes == 1:
        return RunOutcome(**run(**arguments))
    launched = dataclasses.replace(config.launch, processes=processes)
    return RunOutcome(**launch(TARGET, arguments, launched, folder.logs)[0])


def final_tensors(path: Path, which: str = "last") -> dict[str, Tensor]:
    """Everything in a run's checkpoint."""
    step = CheckpointStore(path / "checkpoints").resolve(which)
    tensors = {name: torch.empty(shape) for name, shape in shapes(step).items()}
    load_tensors(step, tensors)
    return tensors


def lines(path: Path, name: str = "train.jsonl") -> list[dict[str, Any]]:
    """A log's lines without their times."""
    read = [json.loads(line) for line in (path / name).read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in read]


def assert_same_bits(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    """Same names, same bits."""
    assert one.keys() == other.keys() and one
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different


def weights(model: nn.Module) -> dict[str, Tensor]:
    """A copy of a model's state."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}

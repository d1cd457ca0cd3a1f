"""``training.compile``: compiled routers and row plans give the same losses, and are compiled once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch._dynamo as dynamo
from torch._dynamo.testing import CompileCounterWithBackend

from moe_train.config import RunConfig, build
from moe_train.data.folder import DataFolder
from moe_train.errors import ConfigError
from moe_train.experts import mlp
from moe_train.tasks import build_task
from moe_train.training import RunFolder, World
from moe_train.training.build import build_trainer
from moe_train.training.preflight import check_compiler
from tests.training.test_batch_path import CONFIG, DATA

UPDATES = 5


def train(folder: Path, routing: dict[str, Any], backend: Any = None) -> tuple[list[float], list[int]]:
    """The loss of each update, and the number of graphs compiled until its end."""
    config = build(RunConfig, {**CONFIG, "routing": routing, "training": {**CONFIG["training"], "max_updates": 9}})
    run = RunFolder(folder)
    run.begin(config)
    trainer = build_trainer(config, build_task(config, DataFolder.open(DATA)), run, World())
    try:
        if backend is not None:
            trainer.train_step.engine.module.compile_routing(backend)
        losses, graphs = [], []
        for _ in range(UPDATES):
            report = trainer.update()
            assert report is not None
            losses.append(report.sums.scalars()["loss"])
            graphs.append(0 if backend is None else backend.frame_count)
    finally:
        trainer.close()
    return losses, graphs


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize(
    "routing",
    [
        pytest.param({"name": "switch", "num_experts": 4, "jitter": 0.1}, id="switch"),
        pytest.param({"name": "top_k", "num_experts": 4, "capacity_factor": 0.5}, id="drops"),
    ],
)
def test_losses_are_equal_and_later_updates_compile_nothing(
    routing: dict[str, Any], backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every update has other shapes and its own number, which the jitter's draws depend on."""
    monkeypatch.setattr(mlp, "prefers_grouped", lambda _: True)
    wanted, _ = train(tmp_path / "plain", routing)
    dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    with dynamo.config.patch(capture_dynamic_output_shape_ops=False, capture_scalar_outputs=False):
        found, graphs = train(tmp_path / "compiled", routing, counter)
    assert found == pytest.approx(wanted, rel=1e-6)
    # Of the router and of the plan, for all layers; with drops a second plan where there are as many pairs as tokens.
    assert 2 <= graphs[1] == graphs[-1] <= 6, graphs
    dynamo.reset()


def test_what_a_compiler_needs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigError, match=r"training.compile needs a C\+\+ compiler \(no-such-compiler\)"):
        check_compiler(gpus=0)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"training\.compile needs Triton"):
        check_compiler(gpus=1)

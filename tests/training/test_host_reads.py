"""How often the host would wait for a GPU in an update: once, for all results of it together."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from torch import Tensor

from moe_train.config import RunConfig, build
from moe_train.data.folder import DataFolder
from moe_train.tasks import build_task
from moe_train.training import RunFolder, World
from moe_train.training.build import build_trainer
from tests.parallel.option_jobs import as_on_a_gpu
from tests.training.test_batch_path import CONFIG, DATA

MODEL = {**CONFIG["model"], "encoder_layers": 2, "decoder_layers": 2}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("fp32", {"name": "dense"}),
    ("fp16", {"name": "switch", "num_experts": 2, "z_weight": 0.1}),
    ("fp32", {"name": "top_k", "num_experts": 4, "scores": "sigmoid", "balancing_bias_rate": 0.001}),
    ("bf16", {"name": "sam", "num_experts": 4, "num_groups": 2}),
    ("bf16", {"name": "thor", "num_experts": 2}),
]


@contextmanager
def reads() -> Iterator[list[str]]:
    """Notes operators that wait, and transfers to the host: what is read from a tensor that ``cpu`` gave is free."""
    copied: set[int] = set()
    cpu, tolist = Tensor.cpu, Tensor.tolist

    def transfer(value: Tensor) -> Tensor:
        waits.seen.append(f"cpu in {sys._getframe(1).f_code.co_name}")
        copied.add(value.untyped_storage().data_ptr())
        return cpu(value)

    def to_list(value: Tensor) -> Any:
        caller = sys._getframe(1).f_code.co_name
        # "read": experts on a CPU ask for the sizes of their products, which grouped products on a GPU do not.
        if value.untyped_storage().data_ptr() not in copied and caller != "read":
            waits.seen.append(f"tolist in {caller}")
        return tolist(value)

    with (
        patch.object(Tensor, "cpu", transfer),
        patch.object(Tensor, "tolist", to_list),
        patch("moe_train.kernels.cpu.smoothed_loss.is_supported", lambda logits: False),
        as_on_a_gpu() as waits,
    ):
        yield waits.seen


@pytest.mark.parametrize(("precision", "routing"), CASES)
def test_the_host_waits_once_in_an_update(precision: str, routing: dict[str, Any], tmp_path: Path) -> None:
    training = {**CONFIG["training"], "tokens_per_update": 2048, "accumulation": 2, "precision": precision}
    config = build(RunConfig, {**CONFIG, "routing": routing, "model": MODEL, "training": training})
    folder = RunFolder(tmp_path)
    folder.begin(config)
    trainer = build_trainer(config, build_task(config, DataFolder.open(DATA)), folder, World())
    trainer.update()
    _, samples = trainer.data_loader.get(1)
    padded = [(sample["net_input"]["src_tokens"] == 1).any() for sample in samples]
    assert len(padded) == 2 and any(padded), "padding is found without waiting"
    with reads() as seen:
        report = trainer.train_step.run(1, samples, 1e-3, trainer.signals)
    assert report.outcome.applied or precision == "fp16"  # which begins with a loss scale that may be too large
    assert seen == ["cpu in to_host"], "one transfer, of all results of the update"
    gc.collect()
    gc.freeze()  # what other tests have left is not looked at
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        trainer.train_step.run(2, samples, 1e-3, trainer.signals)
        gc.collect()
        assert not gc.garbage, "an update leaves nothing to the garbage collector"
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.unfreeze()
        trainer.close()

"""Checks of config and data before any process is started."""

from __future__ import annotations

import importlib.util
import os
import shutil

import torch

from moe_train.config import LaunchConfig, RunConfig
from moe_train.config.placement import place
from moe_train.errors import ConfigError
from moe_train.kernels.device_kernels import KernelMode, unavailable
from moe_train.parallel.layout import ExpertLayout
from moe_train.parallel.layout_plan import LayoutPlan
from moe_train.routing import decoder_config, routing_config
from moe_train.tasks import TaskData, build_task
from moe_train.training.engines.deepspeed_library import check_deepspeed
from moe_train.training.metrics.logger_registry import find_loggers
from moe_train.training.packed_rows import check_packed


def check_run(config: RunConfig, data: TaskData, plan: LayoutPlan) -> None:
    """Refuses what cannot be trained.

    Args:
        config: resolved (:func:`moe_train.training.run.resolve_layout.resolve_config`).
        plan: its layout.

    Raises:
        ConfigError: routing, placement, engine or training keys that are impossible or contradict each other.
        DataError: data that the task cannot use, or that lacks what the config asks for.
    """
    check_routing(config)
    check_packed(config)
    find_loggers(config.training.loggers)
    check_kernels(config.kernels, _gpus(config.launch))
    if config.training.compile != "none":
        check_compiler(_gpus(config.launch))
    if config.engine.name == "deepspeed":
        check_deepspeed(config)
    build_task(config, data).check_data()
    # On the meta device the model takes no memory, and raises all its errors about the config.
    with torch.device("meta"):
        build_task(config, data).build_model(ExpertLayout(plan))


def check_kernels(mode: KernelMode, gpus: int) -> None:
    """Refuses ``kernels=triton`` where Triton's kernels cannot run.

    Args:
        gpus: number of GPUs that the run uses.

    Raises:
        ConfigError: says why.
    """
    if mode == "triton" and (reason := unavailable(gpus)):
        raise ConfigError(
            f"kernels=triton cannot run here: {reason}",
            remedy="set kernels=auto or kernels=torch",
        )


def check_compiler(gpus: int) -> None:
    """Refuses ``training.compile`` where ``torch.compile`` cannot generate code.

    Args:
        gpus: number of GPUs that the run uses.

    Raises:
        ConfigError: says what is missing.
    """
    names = (os.environ["CXX"],) if os.environ.get("CXX") else ("g++", "clang++")
    missing = None if any(map(shutil.which, names)) else f"a C++ compiler ({', '.join(names)})"
    if gpus and importlib.util.find_spec("triton") is None:
        missing = "Triton"
    if missing:
        raise ConfigError(
            f"training.compile needs {missing}, which is not here", remedy="install it, or set training.compile=none"
        )


def _gpus(launch: LaunchConfig) -> int:
    """GPUs that a run on this host uses; under torchrun or srun each rank checks its own device later."""
    count = 0 if launch.device == "cpu" else torch.cuda.device_count()
    return 0 if launch.device == "auto" and count < launch.processes else count


def check_routing(config: RunConfig) -> None:
    """Checks the strategy's keys, and whether the decoder can use it."""
    routing = routing_config(config.routing)
    where = place(config.model.for_decoder, config.model.decoder_layers, "model.decoder_sparse_layers")
    if where.replaced or where.inserted_after:
        decoder_config(routing)

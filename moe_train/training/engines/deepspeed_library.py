"""Checks whether a run can use DeepSpeed, imports it, and makes its configuration.

DeepSpeed is imported only when it is used: the import takes seconds, and the package may not be installed.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

from moe_train import fairseq_compat
from moe_train.config import EngineConfig, RunConfig, TrainingConfig
from moe_train.errors import ConfigError, MissingDependency

_STALE_SECONDS = 1800.0


def check_deepspeed(config: RunConfig) -> None:
    """Refuses, before any process is started, what ``engine=deepspeed`` cannot do here.

    Raises:
        MissingDependency: DeepSpeed is not installed.
        ConfigError: a precision or an optimizer that the engine does not take, or an offload whose CPU Adam cannot be
            built.
    """
    require_deepspeed()
    if config.training.precision == "fp16":
        raise ConfigError(
            "engine=deepspeed trains in fp32 or bf16, not in fp16: DeepSpeed would move the loss scale by itself",
            remedy="set training.precision=bf16, or engine=ddp",
        )
    if config.engine.offload_optimizer:
        _check_offload(config.training)


def require_deepspeed() -> None:
    """Checks that DeepSpeed is installed, without importing it.

    Raises:
        MissingDependency: it is not.
    """
    if importlib.util.find_spec("deepspeed") is None:
        raise MissingDependency(
            "DeepSpeed is not installed, and engine=deepspeed needs it",
            remedy="run scripts/setup.sh (or pip install deepspeed), or choose engine=ddp",
        )


def import_deepspeed(device: torch.device) -> Any:
    """Imports DeepSpeed for a device.

    DeepSpeed imports fairseq if that is installed, which needs the patches of fairseq_compat first; it takes any GPU
    that it finds, even for a run on the CPU; and on the CPU it compiles a shared-memory collective for a minute, which
    gloo does not need. Its messages go into the log file.
    """
    require_deepspeed()
    if importlib.util.find_spec("fairseq") is not None:
        fairseq_compat.apply()
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    library = importlib.import_module("deepspeed")
    importlib.import_module("deepspeed.ops").__compatible_ops__["deepspeed_shm_comm"] = False
    log = logging.getLogger("DeepSpeed")
    log.handlers.clear()
    log.propagate, log.parent = True, logging.getLogger("moe_train")
    return library


def deepspeed_config(engine: EngineConfig, training: TrainingConfig) -> dict[str, Any]:
    """The configuration for :func:`deepspeed.initialize`.

    The batch sizes are placeholders: the training loop decides which micro-batch ends an update. Stage 0 does
    not clip here, because DeepSpeed then takes the mean of the ranks' norms for the norm of divided experts.
    """
    elements = max(1, engine.bucket_mb * (1 << 20) // 4)
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": training.clip_norm if engine.zero_stage else 0.0,
        "steps_per_print": None,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": engine.zero_stage,
            "reduce_bucket_size": elements,
            "allgather_bucket_size": elements + elements % 2,
            "contiguous_gradients": True,
            "reduce_scatter": True,
        },
    }
    if training.precision == "bf16":
        # Parameters, gradients and their reduction stay fp32; the engine's autocast decides what is computed in bf16.
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    if engine.offload_optimizer:
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return config


def _check_offload(training: TrainingConfig) -> None:
    if training.optimizer.name not in ("adam", "adamw"):
        raise ConfigError(
            f"engine.offload_optimizer works with DeepSpeed's CPU Adam, not with '{training.optimizer.name}'",
            remedy="set training.optimizer.name=adam or adamw, or engine.offload_optimizer=false",
        )
    try:
        build_cpu_adam()
    except Exception as error:  # any error of a compiler
        raise ConfigError(
            f"engine.offload_optimizer needs DeepSpeed's CPU Adam, which cannot be built here ({_last_line(error)})",
            remedy="install a C++ compiler and ninja, or set engine.offload_optimizer=false",
        ) from error


def build_cpu_adam() -> None:
    """Compiles DeepSpeed's CPU Adam; half a minute the first time, then it is in torch's cache of extensions."""
    from torch.utils.cpp_extension import _get_build_directory

    folder = Path(_get_build_directory("cpu_adam", verbose=False))
    if shutil.which(os.environ.get("CXX", "c++")) is None and not (folder / "cpu_adam.so").exists():
        raise FileNotFoundError("there is no C++ compiler")
    lock = folder / "lock"
    if lock.exists() and time.time() - lock.stat().st_mtime > _STALE_SECONDS:  # torch would wait without end
        raise FileExistsError(f"a build that was interrupted has left {lock}: remove that")
    import_deepspeed(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    importlib.import_module("deepspeed.ops.op_builder").CPUAdamBuilder().load(verbose=False)


def _last_line(error: Exception) -> str:
    cause = error.__cause__ if isinstance(error.__cause__, subprocess.CalledProcessError) else error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__

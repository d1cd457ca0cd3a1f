"""Writes run.json, and the summary before the first update."""

from __future__ import annotations

import platform
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import nn

import moe_train
from moe_train.config import RunConfig
from moe_train.data.batching import Batches
from moe_train.parallel.layout_plan import LayoutPlan, in_words
from moe_train.training.checkpoint.run_state import RunState
from moe_train.training.run.run_folder import RunFolder
from moe_train.training.runtime.world import World

#: (model, pairs per token counted in its sparse blocks, if any) → size and cost in closed form.
Account = Callable[[nn.Module, Mapping[int, float]], Mapping[str, Any]]
_PACKAGES = ("torch", "fairseq", "deepspeed", "hydra-core", "sacrebleu", "sentencepiece", "safetensors", "numpy")


def describe_run(
    folder: RunFolder,
    config: RunConfig,
    module: nn.Module,
    world: World,
    update: int,
    account: Account | None = None,
    plan: LayoutPlan | None = None,
    data: Mapping[str, Any] | None = None,
) -> None:
    """Writes run.json; earlier sessions stay listed under ``sessions``.

    Args:
        update: where this session begins.
        account: size and cost of the model in closed form (:mod:`moe_train.models.accounting`).
        plan: which rank holds which experts; None: each holds all.
        data: description of the data (:class:`moe_train.training.run.run_data.RunData`).
    """
    plan = plan or LayoutPlan(world.size, 1, world.local_size)
    session = {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "from_update": update,
        "command": sys.argv,
        "host": socket.gethostname(),
        "world": {
            "processes": world.size,
            "expert_parallel": plan.expert_parallel,
            "ranks_per_node": plan.ranks_per_node,
            "two_level": plan.dispatches_by_node,
            "device": str(world.device),
        },
        "threads": torch.get_num_threads(),
        "commit": commit(),
        "versions": versions(),
    }
    sessions = [*folder.info.get("sessions", []), session]
    size = sizes(module, account)
    folder.describe(
        status="running", update=update, **session, sessions=sessions, **size, seed=config.seed, **(data or {})
    )


def sizes(module: nn.Module, account: Account | None) -> dict[str, Any]:
    """``parameters`` (total, and active per token if there is an account) and ``flops_per_token``."""
    if account is None:
        return {"parameters": {"total": sum(p.numel() for p in module.parameters())}}
    counted = account(module, {})
    names = {"total": "parameters_total", "active": "parameters_active", "experts": "parameters_experts"}
    return {
        "parameters": {short: counted[name] for short, name in names.items()},
        "flops_per_token": counted["flops_per_token"],
        "accounting": counted,
    }


def versions() -> dict[str, str]:
    """Versions of Python, moe_train and the packages that decide numbers; absent ones are left out."""
    found = {"python": platform.python_version(), "moe_train": moe_train.__version__}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """The checkout's commit, with ``-dirty`` if files were changed; None outside a checkout."""
    root = Path(moe_train.__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()


def summary(folder: RunFolder, config: RunConfig, state: RunState, batches: Batches) -> Table:
    """The run in a table: folder, data, model, layout, updates."""
    info = folder.info
    world, training = info["world"], config.training
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    parameters = info.get("parameters", {})
    rows = {
        "run folder": str(folder.path),
        "data": f"{config.data} ({config.task.subject})",
        "routing": str(config.routing.get("name")),
        "parameters": f"{parameters.get('total', 0):,}" + _active(parameters),
        "processes": f"{world['processes']} on {world['device']}, {info['threads']} threads each",
        "layout": _layout(world),
        "FLOPs per token": f"{info['flops_per_token']:.3g} forward" if "flops_per_token" in info else "",
        "updates": f"{training.max_updates:,} of {training.tokens_per_update:,} {config.task.unit}, "
        f"{training.precision}, {batches.updates_per_epoch:,} an epoch",
        "left out": _left_out(batches),
        "resumes from": f"update {state.update}" if state.update else "",
    }
    for name, value in rows.items():
        if value:
            table.add_row(name, value)
    return table


def _layout(world: dict[str, Any]) -> str:
    """Replicas and expert-parallel ranks, if experts are divided."""
    size = world["expert_parallel"]
    levels = ", node by node" if world["two_level"] else ""
    return f"{in_words(world['processes'] // size, size)}{levels}" if size > 1 else ""


def _left_out(batches: Batches) -> str:
    """Training sentences that are too long, if there are any."""
    counts = ", ".join(f"{count:,} of {name}" for name, count in batches.left_out.items() if count)
    return f"{counts} (longer than {batches.settings.longest} tokens)" if counts else ""


def _active(parameters: dict[str, int]) -> str:
    return f" ({parameters['active']:,} active per token)" if "active" in parameters else ""

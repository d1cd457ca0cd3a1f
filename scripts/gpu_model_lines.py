"""Lines of scripts/gpu_speed.py: layers and a dense feed-forward, whole trainings, and a profile."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from gpu_checks import STRATEGIES, Sizes, count_syncs, timed
from gpu_kernel_lines import Results, Setting, noise
from torch import Tensor, nn

from moe_train import MoELayer
from moe_train.kernels.device_kernels import NAMES, DeviceKernels, select_kernels
from moe_train.parallel.isolation import LOOPBACK
from moe_train.parallel.layout import ExpertLayout
from moe_train.parallel.layout_plan import LayoutPlan
from moe_train.parallel.reducers import DistReduction

ROOT = Path(__file__).resolve().parents[1]
PEAK = 989e12  # FLOP/s in bf16 of an H100 or H200 without sparsity (NVIDIA's data sheet)
SMALL_MODEL = {"encoder_layers": 2, "decoder_layers": 2, "embed_dim": 16, "ffn_dim": 32, "num_heads": 2}


def layer_line(k: int) -> Callable[[Setting], Results]:
    """Layers with k experts a token, and a dense feed-forward over k times the tokens: milliseconds and TFLOP/s."""

    def line(setting: Setting) -> Results:
        s, device, dtype = setting.sizes, setting.device, torch.float32 if setting.small else torch.bfloat16
        x, grad = noise(device, dtype, (s.sentences, s.length, s.dim), (s.sentences, s.length, s.dim))
        turns: dict[str, Callable[[], Any]] = {}
        with world_of_one(device):
            for mode in ("torch", "triton"):
                if mode == "triton" and not DeviceKernels(frozenset(NAMES)).uses("gather", x):
                    continue
                for exchange in (False, True):
                    layer = build_layer("switch" if k == 1 else "top_k", s, device, dtype, exchange)
                    layer.set_kernels(select_kernels(mode, torch.device(device)))  # type: ignore[arg-type]
                    turns[f"{mode}, {'exchange' if exchange else 'no exchange'}"] = step_of(layer, x, grad)
            turns["dense"] = dense(s, x, grad, k)
            seconds = timed(turns, s, device)
        flops = 12.0 * k * s.tokens * s.dim * s.hidden
        return {
            name: {"milliseconds": 1e3 * t, "tflops": flops / t / 1e12, "of dense": seconds["dense"] / t}
            for name, t in seconds.items()
        }

    return line


def build_layer(name: str, s: Sizes, device: str, dtype: torch.dtype, exchange: bool) -> MoELayer:
    """A layer in training with weights in ``dtype``; its router stays in fp32."""
    layout = ExpertLayout.build(LayoutPlan(1, 1, 1), device, force_dispatch=True) if exchange else None
    keys = {"num_experts": s.num_experts, **STRATEGIES[name]}
    layer = MoELayer(s.dim, s.hidden, keys, activation="gelu", layout=layout).to(device, dtype).train()
    layer.set_ranks(DistReduction())
    return layer


def step_of(layer: MoELayer, x: Tensor, grad: Tensor) -> Callable[[], None]:
    """Forward and backward, with the balance loss."""

    def run() -> None:
        layer.zero_grad(set_to_none=True)
        y, record = layer(x.detach().requires_grad_())
        assert record is not None
        torch.autograd.backward([y, record.total_loss], [grad, torch.ones((), device=x.device)])

    return run


def dense(s: Sizes, x: Tensor, grad: Tensor, k: int) -> Callable[[], None]:
    """W2 gelu(W1 x) over k times the tokens in x's type, forward and backward."""
    stack = nn.Sequential(nn.Linear(s.dim, s.hidden), nn.GELU(), nn.Linear(s.hidden, s.dim)).to(x.device, x.dtype)
    rows, back = (each.flatten(0, 1).repeat(k, 1) for each in (x, grad))

    def run() -> None:
        stack.zero_grad(set_to_none=True)
        stack(rows.detach().requires_grad_()).backward(back)

    return run


class world_of_one:
    """A process group of one rank."""

    def __init__(self, device: str) -> None:
        self.backend = "nccl" if device == "cuda" else "gloo"

    def __enter__(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        os.environ.update(LOOPBACK)
        init = f"file://{self.folder.name}/rendezvous"
        dist.init_process_group(self.backend, init_method=init, rank=0, world_size=1)

    def __exit__(self, *_: object) -> None:
        dist.destroy_process_group()
        self.folder.cleanup()


def train_line(
    model: str, routing: str, tokens: int, keys: Mapping[str, Any] | None = None, top: Mapping[str, Any] | None = None
) -> Callable[[Setting], Results]:
    """Words/s, host syncs of an update, and the share of the bf16 peak.

    Args:
        model, routing: names of configs.
        tokens: target tokens of an update.
        keys: of the routing.
        top: further keys of the run, at the top.
    """

    def line(setting: Setting) -> Results:
        with tempfile.TemporaryDirectory() as folder:
            trainer = build_run(setting, folder, model, routing, tokens, keys or {}, top or {})
            try:
                return measure(trainer, setting)
            finally:
                trainer.close()

    return line


def build_run(
    setting: Setting,
    folder: str,
    model: str,
    routing: str,
    tokens: int,
    keys: Mapping[str, Any],
    top: Mapping[str, Any],
) -> Any:
    """The trainer of ``moe-train model=… routing=… training.precision=bf16``."""
    from omegaconf import OmegaConf

    from moe_train.config import RunConfig, build
    from moe_train.data.folder import DataFolder
    from moe_train.tasks import build_task
    from moe_train.training import RunFolder, World
    from moe_train.training.build import build_trainer

    def group(name: str) -> dict[str, Any]:
        return dict(OmegaConf.to_container(OmegaConf.load(ROOT / "configs" / f"{name}.yaml")))  # type: ignore[arg-type]

    shape = group(f"model/{model}") | (SMALL_MODEL if setting.small else {})
    if setting.small:
        keys = {key: min(value, SMALL_MODEL["ffn_dim"]) for key, value in keys.items()}
    mapping = {
        "data": str(setting.data),
        "model": shape,
        "routing": group(f"routing/{routing}") | dict(keys),
        "training": {
            "precision": "fp32" if setting.small else "bf16",
            "tokens_per_update": 512 if setting.small else tokens,
            "max_updates": 1000,
            "log_every": 1000,
            "threads": 1 if setting.small else 4,
            "optimizer": {"lr": 0.0007},
            "schedule": {"warmup_updates": 30},
        },
        **top,
    }
    config = build(RunConfig, mapping)
    world = World(device=torch.device("cuda:0" if setting.device == "cuda" else "cpu"))
    task = build_task(config, DataFolder.open(setting.data))
    run = RunFolder(Path(folder))
    run.begin(config)
    return build_trainer(config, task, run, world)


def measure(trainer: Any, setting: Setting) -> Results:
    """Trains a few updates: the first do not count, the last ones are those whose host syncs are counted."""
    from moe_train.models.accounting import account

    warm_up, rounds, each = (1, 2, 1) if setting.small else (20, 5, 10)
    for _ in range(warm_up):
        trainer.update()
    speeds, losses = [], []
    for _ in range(rounds):
        words, start = 0.0, time.perf_counter()
        for _ in range(each):
            report = trainer.update()  # waits for the update before; on a CPU for this one
            sums = report.sums.scalars()
            words += sums["ntokens"]
            losses.append(sums["loss"] / sums["ntokens"])
        speeds.append(words / (time.perf_counter() - start))
    cuda = setting.device == "cuda"
    syncs = [count_syncs(trainer.update) for _ in range(3)] if cuda else []
    counted = account(trainer.train_step.engine.module)
    speed = statistics.median(speeds)
    return {
        "words_per_second": speed,
        "words_per_second_by_round": speeds,
        "flops_per_token": counted.flops_per_token,
        "of_bf16_peak": 3 * counted.flops_per_token * speed / PEAK,
        "host_syncs_of_an_update": syncs,
        "nats_per_word": [losses[0], losses[-1]],
        "gigabytes": torch.cuda.max_memory_allocated() / 1e9 if cuda else None,
    }


def profile_line(routing: str) -> Callable[[Setting], Results]:
    """The fifteen operators of ``model=base`` with most time of the device: milliseconds and calls of an update."""

    def line(setting: Setting) -> Results:
        from torch.profiler import ProfilerActivity, profile

        cuda, updates = setting.device == "cuda", 1 if setting.small else 3
        with tempfile.TemporaryDirectory() as folder:
            trainer = build_run(setting, folder, "base", routing, 65536, {}, {})
            try:
                for _ in range(1 if setting.small else 15):
                    trainer.update()
                kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
                with profile(activities=kinds) as profiled:
                    for _ in range(updates):
                        trainer.update()
            finally:
                trainer.close()
        name = "self_device_time_total" if cuda else "self_cpu_time_total"
        rows = sorted(profiled.key_averages(), key=lambda row: -getattr(row, name))
        total = sum(getattr(row, name) for row in rows)
        return {
            "milliseconds of an update": total / updates / 1e3,
            "operators": {r.key[:80]: [getattr(r, name) / updates / 1e3, r.count / updates] for r in rows[:15]},
        }

    return line

"""Decides whether a training computes on packed rows (``training.packed``)."""

from __future__ import annotations

import torch

from moe_train.config import RunConfig
from moe_train.errors import ConfigError
from moe_train.kernels.varlen import VarlenAttention, torch_varlen


def packed_attention(config: RunConfig, device: torch.device) -> VarlenAttention | None:
    """The attention over packed rows; None: batches stay padded.

    Raises:
        ConfigError: ``training.packed=true`` where it cannot be done.
    """
    check_packed(config)
    if config.training.packed is False or obstacle_in(config):
        return None
    head_dim = config.model.embed_dim // config.model.num_heads
    attention = torch_varlen(device, head_dim)
    if attention is None and config.training.packed is True:
        on = "CPUs" if device.type == "cpu" else f"this GPU with heads of {head_dim}, or in this torch"
        raise _impossible(f"there is no torch.nn.attention.varlen on {on}")
    return attention


def check_packed(config: RunConfig) -> None:
    """Refuses ``training.packed=true`` where other keys forbid it.

    Raises:
        ConfigError: they do.
    """
    obstacle = obstacle_in(config)
    if obstacle and config.training.packed is True:
        raise _impossible(obstacle)


def obstacle_in(config: RunConfig) -> str | None:
    """The key that forbids packed rows, with its value."""
    if config.model.attention_dropout:
        return f"model.attention_dropout={config.model.attention_dropout}, and there is no kernel with dropout"
    if config.training.precision == "fp32":
        return "training.precision=fp32, and there is a kernel for bf16 and fp16 only"
    if config.launch.device == "cpu":
        return "launch.device=cpu, and there is a kernel for GPUs only"
    return None


def _impossible(why: str) -> ConfigError:
    remedy = "change that, or set training.packed=auto, which packs rows where it can"
    return ConfigError(f"training.packed=true is impossible: {why}", remedy=remedy)

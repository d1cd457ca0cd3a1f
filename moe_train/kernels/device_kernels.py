"""Which Triton kernels a process uses, and the calls of them.

``kernels=triton`` uses all of them. ``kernels=auto`` uses those of which ``measured.json`` says, for this kind of GPU,
that they hold and are faster than torch's operators; ``scripts/gpu_speed.py`` measures that. All others are torch
operators.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from moe_train.kernels.triton.expert_order import ExpertOrder

KernelMode = Literal["auto", "torch", "triton"]
KernelName = Literal["top_k", "order", "gather", "combine", "activation"]
NAMES: tuple[KernelName, ...] = ("top_k", "order", "gather", "combine", "activation")

_MEASURED = Path(__file__).with_name("measured.json")
_TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int64)
_MOST_EXPERTS = 4096  # experts of a router whose rows fit in one program


@dataclass(frozen=True)
class DeviceKernels:
    """The Triton kernels in use. A caller asks :meth:`uses`, and then calls the kernel.

    Attributes:
        names: those that are used wherever they support the type.
    """

    names: frozenset[KernelName] = frozenset()

    def uses(self, name: KernelName, like: Tensor) -> bool:
        """Whether this kernel is used for tensors of this type and device. Compilers must see torch's operators."""
        if name not in self.names or like.dtype not in _TYPES or torch.compiler.is_compiling():
            return False
        if like.device.type == "cpu":
            return interpreted()
        return like.device.type == "cuda" and like.device.index == torch.cuda.current_device()

    def uses_top_k(self, logits: Tensor) -> bool:
        """Whether :meth:`softmax_top_k` is used for logits [T, E]."""
        return logits.dtype == torch.float32 and logits.shape[1] <= _MOST_EXPERTS and self.uses("top_k", logits)

    @staticmethod
    def softmax_top_k(logits: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """See :func:`moe_train.kernels.triton.router_top_k.softmax_top_k`."""
        from moe_train.kernels.triton.router_top_k import softmax_top_k

        return softmax_top_k(logits, k)

    @staticmethod
    def sort_by_expert(expert: Tensor, bins: int) -> ExpertOrder:
        """See :func:`moe_train.kernels.triton.expert_order.sort_by_expert`."""
        from moe_train.kernels.triton.expert_order import sort_by_expert

        return sort_by_expert(expert, bins)

    @staticmethod
    def gather(x: Tensor, index: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """See :func:`moe_train.kernels.triton.token_rows.gather`."""
        from moe_train.kernels.triton.token_rows import gather

        return gather(x, index, dtype)

    @staticmethod
    def weighted_sums(
        values: Tensor, ids: Tensor, starts: Tensor | None, weight: Tensor | None, dtype: torch.dtype, per_token: int
    ) -> Tensor:
        """See :func:`moe_train.kernels.triton.token_rows.weighted_sums`."""
        from moe_train.kernels.triton.token_rows import weighted_sums

        return weighted_sums(values, ids, starts, weight, dtype, per_token)

    @staticmethod
    def weighted_sums_grad(
        grad: Tensor, values: Tensor, weight: Tensor, token: Tensor, pair: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See :func:`moe_train.kernels.triton.token_rows.weighted_sums_grad`."""
        from moe_train.kernels.triton.token_rows import weighted_sums_grad

        return weighted_sums_grad(grad, values, weight, token, pair)

    @staticmethod
    def bias_activation(
        rows: Tensor,
        bias: Tensor | None,
        row_expert: Tensor,
        ends: Tensor,
        activation: Literal["none", "relu", "gelu"],
    ) -> Tensor:
        """See :func:`moe_train.kernels.triton.bias_activation.bias_activation`."""
        from moe_train.kernels.triton.bias_activation import bias_activation

        return bias_activation(rows, bias, row_expert, ends, activation)


TORCH = DeviceKernels()


def select_kernels(mode: KernelMode, device: torch.device, measured: Path = _MEASURED) -> DeviceKernels:
    """The kernels of a process that computes on ``device``."""
    if mode == "triton":
        return DeviceKernels(frozenset(NAMES))
    if mode == "auto" and device.type == "cuda" and importlib.util.find_spec("triton"):
        return DeviceKernels(frozenset(faster_on(torch.cuda.get_device_capability(device), measured)))
    return TORCH


def faster_on(capability: tuple[int, int], measured: Path = _MEASURED) -> Collection[KernelName]:
    """Kernels that hold and are faster than torch's operators, as measured on GPUs of this compute capability."""
    results = json.loads(measured.read_text(encoding="utf-8")).get(".".join(map(str, capability)), {})
    found = results.get("kernels", {})
    return [name for name in NAMES if found.get(name, {}).get("holds") and found[name]["speedup"] > 1]


def unavailable(gpus: int) -> str | None:
    """Why ``kernels=triton`` cannot run here; None if it can.

    Args:
        gpus: number of GPUs that the run uses.
    """
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if not gpus and not interpreted():
        return "there is no GPU, and Triton's interpreter (TRITON_INTERPRET=1, for tests) is off"
    return None


def interpreted() -> bool:
    """Whether Triton's interpreter runs kernels on the CPU, which is for tests: it is slow."""
    return os.environ.get("TRITON_INTERPRET") == "1"

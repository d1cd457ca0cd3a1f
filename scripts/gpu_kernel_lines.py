"""Lines of scripts/gpu_speed.py: each Triton kernel against torch's operators, results and time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gpu_checks import SMALL, Sizes, distance, timed
from torch import Tensor

from moe_train.experts.grouped import _activate
from moe_train.experts.row_plan import RowPlan, plan_rows
from moe_train.kernels.device_kernels import TORCH, DeviceKernels
from moe_train.parallel.permute import permute_rows, unpermute_rows
from moe_train.routing.base import RouterInputs
from moe_train.routing.strategies.switch import SwitchConfig, SwitchRouter
from moe_train.routing.types import count_choices

BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
Results = dict[str, Any]
Parts = dict[str, Tensor]


@dataclass(frozen=True)
class Setting:
    """Where and how large."""

    device: str
    small: bool
    data: Path

    @property
    def sizes(self) -> Sizes:
        """Of layers and batches."""
        return SMALL if self.small else Sizes()


@dataclass(frozen=True)
class Case:
    """Sizes of a comparison of kernels."""

    tokens: int
    dim: int
    hidden: int
    experts: int
    k: int
    dtype: torch.dtype


def run_top_k(case: Case, kernels: DeviceKernels, device: str) -> Callable[[], Parts]:
    """Softmax, choices and counts, with the gradient of the logits."""
    router = SwitchRouter(SwitchConfig(num_experts=case.experts), RouterInputs(case.dim))
    router.kernels = kernels
    logits, grad = noise(device, torch.float32, (case.tokens, case.experts), (case.tokens, case.experts))
    by = noise(device, torch.float32, (case.tokens, case.k))[0]
    logits.requires_grad_()

    def run() -> Parts:
        probabilities, weights, choices, counts = router.softmax_top_k(logits, case.k)
        counts = count_choices(choices, case.experts) if counts is None else counts
        (own,) = torch.autograd.grad([probabilities, weights], logits, [grad, by])
        return {"weights": weights, "choices": choices, "counts": counts, "logits": own}

    return run


def run_order(case: Case, kernels: DeviceKernels, device: str) -> Callable[[], Parts]:
    """The row plan of a grouped product."""
    token, expert, load = pairs(case, device)

    def run() -> Parts:
        plan = plan_rows(token, expert, case.tokens, case.experts, load=load, per_token=case.k, kernels=kernels)
        return {"rows": plan.index.row_pair, "pairs": plan.index.pair_row, "ends": plan.ends}

    return run


def run_gather(case: Case, kernels: DeviceKernels, device: str) -> Callable[[], Parts]:
    """Tokens into expert order."""
    plan, (x,) = planned(case, kernels, device), noise(device, case.dtype, (case.tokens, case.dim))
    return lambda: {"rows": permute_rows(x, plan.index)}


def run_combine(case: Case, kernels: DeviceKernels, device: str) -> Callable[[], Parts]:
    """Weighted sums over each token's rows, and their gradients."""
    count = case.tokens * case.k
    plan = planned(case, kernels, device)
    values, grad = noise(device, case.dtype, (count, case.dim), (case.tokens, case.dim))
    (weight,) = noise(device, torch.float32, (count,))
    leaves = values.requires_grad_(), weight.requires_grad_()

    def run() -> Parts:
        y = unpermute_rows(*leaves, plan.index, case.dtype)
        return dict(zip(("y", "values", "weight"), (y, *torch.autograd.grad(y, leaves, grad)), strict=True))

    return run


def run_activation(case: Case, kernels: DeviceKernels, device: str) -> Callable[[], Parts]:
    """Bias and GELU, and their gradients."""
    plan, rows = planned(case, kernels, device), (case.tokens * case.k, case.hidden)
    before, bias, grad = noise(device, case.dtype, rows, (case.experts, case.hidden), rows)
    leaves = before.requires_grad_(), bias.requires_grad_()

    def run() -> Parts:
        y = _activate(*leaves, plan, "gelu")
        return dict(zip(("y", "rows", "bias"), (y, *torch.autograd.grad(y, leaves, grad)), strict=True))

    return run


KERNELS = {
    "top_k": run_top_k,
    "order": run_order,
    "gather": run_gather,
    "combine": run_combine,
    "activation": run_activation,
}


def noise(device: str, dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[Tensor]:
    """Normal numbers, the same at every call."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]


def pairs(case: Case, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Token and expert of each pair, and the load; loads differ, and the last expert has no token."""
    generator = torch.Generator().manual_seed(2)
    drawn = torch.rand(case.tokens * case.k, generator=generator) ** 2 * max(case.experts - 1, 1)
    expert = drawn.long().to(device)
    token = torch.arange(case.tokens, device=device).repeat_interleave(case.k)
    return token, expert, torch.bincount(expert, minlength=case.experts)


def planned(case: Case, kernels: DeviceKernels, device: str) -> RowPlan:
    """A plan of torch's, whose rows use ``kernels``."""
    token, expert, load = pairs(case, device)
    plan = plan_rows(token, expert, case.tokens, case.experts, load=load, per_token=case.k)
    return dataclasses.replace(plan, index=dataclasses.replace(plan.index, kernels=kernels))


def kernel_line(name: str) -> Callable[[Setting], Results]:
    """One kernel: errors in several sizes and types, and the time of torch's operators over its own."""

    def line(setting: Setting) -> Results:
        s, build, own = setting.sizes, KERNELS[name], DeviceKernels(frozenset([name]))  # type: ignore[list-item]
        if not own.uses(name, torch.zeros(1, device=setting.device)):  # type: ignore[arg-type]
            raise RuntimeError("this kernel cannot be used here")
        big = Case(s.tokens, s.dim, s.hidden, s.num_experts, 1, torch.bfloat16)
        odd = [Case(t, 24, 40, 5, k, torch.float32) for t, k in ((1, 1), (37, 2), (37, 4))]
        wide = [] if setting.small else [dataclasses.replace(big, dtype=torch.float32, k=k) for k in (1, 2)]
        # Triton's interpreter computes wrong numbers in bf16.
        half = [] if setting.device == "cpu" else [dataclasses.replace(big, k=k) for k in (1, 2)]
        errors = {
            f"{case.tokens} tokens, k = {case.k}, {case.dtype}": (
                distance(build(case, own, setting.device)(), build(case, TORCH, setting.device)()),
                BOUNDS[case.dtype],
            )
            for case in (*odd, *wide, *half)
        }
        milliseconds = {}
        for k in (1, 2):
            case = dataclasses.replace(big, k=k)
            turns = {"torch": build(case, TORCH, setting.device), "triton": build(case, own, setting.device)}
            milliseconds[f"k = {k}"] = {n: 1e3 * t for n, t in timed(turns, s, setting.device).items()}
        return {
            "holds": all(error <= bound for error, bound in errors.values()),
            "speedup": min(each["torch"] / each["triton"] for each in milliseconds.values()),
            "milliseconds": milliseconds,
            "errors": {label: error for label, (error, _) in errors.items()},
        }

    return line

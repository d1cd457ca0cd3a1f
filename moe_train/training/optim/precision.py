"""Number formats: autocast, the loss scale of fp16, and 16-bit copies of the weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe_train.kernels.cpu.huge_pages import empty_like
from moe_train.routing.base import Router

_HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Precision:
    """``fp32``; ``bf16`` = autocast; ``fp16`` = autocast and dynamic loss scaling. Parameters stay fp32 in all of them.

    The loss scale and its counter are on the device. Only :meth:`after_step` changes them, by a result that all ranks
    share, so they are the same on every rank.

    Attributes:
        half: the 16-bit type of products; None: fp32.
        loss_scale: what the loss is multiplied by, 0-dim fp32; None: nothing.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        self.name, self.half = name, _HALF.get(name)
        self._device = device
        self.loss_scale = torch.full((), 2.0**16, device=device) if name == "fp16" else None
        self._growth_tracker = torch.zeros((), dtype=torch.int32, device=device)  # updates since the last change
        self._growth, self._backoff, self._growth_interval = 2.0, 0.5, 2000

    def autocast(self) -> AbstractContextManager[Any]:
        """The context of forward passes."""
        return nullcontext() if self.half is None else torch.autocast(self._device.type, dtype=self.half)

    def scale(self, loss: Tensor) -> Tensor:
        """The scaled loss, to call backward on."""
        return loss if self.loss_scale is None else loss * self.loss_scale

    def after_step(self, found_inf: Tensor) -> None:
        """Lowers the loss scale after an overflow on any rank, and raises it after many updates without one.

        Args:
            found_inf: 1.0 after an overflow, else 0.0; 0-dim fp32.
        """
        if self.loss_scale is not None:
            torch._amp_update_scale_(
                self.loss_scale, self._growth_tracker, found_inf, self._growth, self._backoff, self._growth_interval
            )

    def state(self) -> dict[str, Any]:
        """Plain numbers for ``state.json``; empty outside fp16. Waits for the device."""
        if self.loss_scale is None:
            return {}
        return {
            "scale": float(self.loss_scale),
            "growth_factor": self._growth,
            "backoff_factor": self._backoff,
            "growth_interval": self._growth_interval,
            "_growth_tracker": int(self._growth_tracker),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state`."""
        if self.loss_scale is not None and state:
            self.loss_scale.fill_(float(state["scale"]))
            self._growth_tracker.fill_(int(state["_growth_tracker"]))
            self._growth, self._backoff = float(state["growth_factor"]), float(state["backoff_factor"])
            self._growth_interval = int(state["growth_interval"])


class ComputeWeights:
    """16-bit copies of the fp32 parameters of all modules whose attribute ``computes_in_16_bits`` is true.

    The attribute holds for a module with its children, but never inside a router. Inside :meth:`in_use` the copies
    stand in the modules in place of the parameters: forward and backward use them, and their gradients have 16 bits.
    Outside it the modules have their fp32 parameters, which the optimizer, checkpoints and exports read and write. The
    copies are made again when the parameters have changed.

    Args:
        dtype: bf16 or fp16; None: no copies are made, and all methods do nothing.
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype | None) -> None:
        self._copies: dict[nn.Parameter, nn.Parameter] = {}  # by fp32 parameter
        self._places: list[tuple[nn.Module, str, nn.Parameter]] = []  # every module and name that has one
        for owner in _computing_modules(module):
            for name, parameter in owner.named_parameters(recurse=False):
                if dtype is not None and parameter.dtype == torch.float32:
                    self._copies.setdefault(parameter, _copy(parameter, dtype))
                    self._places.append((owner, name, parameter))
        self._parameters = {copy: parameter for parameter, copy in self._copies.items()}
        self._sums: dict[nn.Parameter, Tensor] = {}  # memory of the fp32 gradients, kept from update to update
        self._buckets: dict[int, tuple[list[int], Tensor]] = {}  # by index: ids of the parameters, their sums
        self._reduced: set[nn.Parameter] = set()  # copies whose gradients have been taken by :meth:`reduce`
        self._versions: list[int] = []
        self._active = False

    def leaf(self, parameter: nn.Parameter) -> nn.Parameter:
        """The tensor whose gradient backward computes for a parameter: its copy, or itself."""
        return self._copies.get(parameter, parameter)

    @property
    def has_bf16_copies(self) -> bool:
        """Whether there are copies, in bf16."""
        return any(copy.dtype == torch.bfloat16 for copy in self._parameters)

    def gradient(self, parameter: nn.Parameter) -> Tensor | None:
        """The gradient of a parameter: its own in fp32, or that of its copy if it was kept in 16 bits."""
        return self.leaf(parameter).grad if parameter.grad is None else parameter.grad

    def keep_sums_in(self, memory: Mapping[nn.Parameter, Tensor]) -> None:
        """Gives the memory of the fp32 gradients of some parameters."""
        self._sums.update({parameter: view for parameter, view in memory.items() if parameter in self._copies})

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """The modules compute with the copies."""
        if self._active:
            yield
            return
        self._refresh()
        self._active = True
        for owner, name, parameter in self._places:
            owner._parameters[name] = self._copies[parameter]
        try:
            yield
        finally:
            for owner, name, parameter in self._places:
                owner._parameters[name] = parameter
            self._active = False

    def expire(self) -> None:
        """Says that the parameters have changed. Fused optimizers do not count a tensor's version up."""
        self._versions = []

    @torch.no_grad()
    def _refresh(self) -> None:
        versions = [parameter._version for parameter in self._copies]
        if versions != self._versions:
            torch._foreach_copy_(list(self._copies.values()), list(self._copies))
            self._versions = versions

    @torch.no_grad()
    def collect_gradients(self, keep: bool = False) -> None:
        """Adds the copies' gradients of a micro-batch to the parameters' fp32 gradients, and clears them.

        Args:
            keep: leaves them where they are if there are no others to add them to (:meth:`gradient` has both).
        """
        if keep and all(parameter.grad is None for parameter in self._copies):
            return
        first: list[tuple[Tensor, Tensor]] = []  # fp32 gradient, and what it gets from this micro-batch
        later: list[tuple[Tensor, Tensor]] = []
        for parameter, copy in self._copies.items():
            if copy.grad is not None and copy not in self._reduced:
                if parameter.grad is not None:
                    later.append((parameter.grad, copy.grad))
                else:
                    if parameter not in self._sums:
                        self._sums[parameter] = empty_like(parameter.detach())
                    parameter.grad = self._sums[parameter]
                    first.append((parameter.grad, copy.grad))
            copy.grad = None
        self._reduced.clear()
        if first:
            torch._foreach_copy_([total for total, _ in first], [gradient for _, gradient in first])
        if later:
            torch._foreach_add_([total for total, _ in later], [gradient for _, gradient in later])

    def clear_gradients(self) -> None:
        """Clears the gradients of copies that were kept."""
        for copy in self._parameters:
            copy.grad = None

    def has(self, bucket: dist.GradBucket) -> bool:
        """Whether a bucket of DistributedDataParallel has gradients of copies; it has one type."""
        return bucket.parameters()[0] in self._parameters

    def fp32_sums(self, bucket: dist.GradBucket) -> Tensor:
        """The gradients of a bucket's parameters over all micro-batches of this rank, flat, in fp32.

        The parameters' gradients become views of it, so that it can be reduced over ranks in place.
        """
        copies: Sequence[nn.Parameter] = bucket.parameters()  # type: ignore[assignment]
        parameters = [self._parameters[copy] for copy in copies]
        before, flat = self._buckets.get(bucket.index(), ([], torch.empty(0)))
        if before != list(map(id, parameters)):  # DistributedDataParallel changes its buckets after the first backward
            flat = torch.empty_like(bucket.buffer(), dtype=torch.float32)
            self._buckets[bucket.index()] = (list(map(id, parameters)), flat)
        parts = flat.split([parameter.numel() for parameter in parameters])
        sums = [part.view_as(parameter) for part, parameter in zip(parts, parameters, strict=True)]
        if all(p.grad is None for p in parameters):
            flat.copy_(bucket.buffer())
        else:
            for parameter, total in zip(parameters, sums, strict=True):
                if parameter.grad is None:
                    total.zero_()
                elif parameter.grad.data_ptr() != total.data_ptr():
                    total.copy_(parameter.grad)
            flat.add_(bucket.buffer())
        for parameter, total in zip(parameters, sums, strict=True):
            parameter.grad = self._sums[parameter] = total
        self._reduced.update(copies)
        return flat


def scaled_step(optimizer: torch.optim.Optimizer, divisor: Tensor | None, found_inf: Tensor) -> None:
    """One step with the gradients divided by ``divisor``; none if ``found_inf`` is not 0.

    torch's fused Adam divides and skips inside its kernel, without a pass of its own and without a wait for the device.
    For other optimizers, and for fp64, gradients are divided before the step, and the host reads ``found_inf``.

    Args:
        divisor: 0-dim; None: 1.
        found_inf: 0-dim fp32.
    """
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    fused = getattr(optimizer, "_step_supports_amp_scaling", False)
    if fused and all(gradient.dtype == torch.float32 for gradient in gradients):
        optimizer.grad_scale = divisor  # type: ignore[attr-defined]
        optimizer.found_inf = found_inf  # type: ignore[attr-defined]
        optimizer.step()
    elif not found_inf.tolist():
        if divisor is not None and gradients:
            torch._foreach_div_(gradients, divisor)
        optimizer.step()


def _computing_modules(module: nn.Module) -> Iterator[nn.Module]:
    """The marked modules and their children, each once, without those of routers."""
    marked = [child for child in module.modules() if getattr(child, "computes_in_16_bits", False)]
    in_fp32 = {child for top in module.modules() if isinstance(top, Router) for child in top.modules()}
    yield from dict.fromkeys(child for top in marked for child in top.modules() if child not in in_fp32)


def _copy(parameter: nn.Parameter, dtype: torch.dtype) -> nn.Parameter:
    """A copy with the parameter's own attributes (``expert``, ``expert_ids`` …), without its values."""
    copy = nn.Parameter(torch.empty_like(parameter, dtype=dtype), requires_grad=parameter.requires_grad)
    copy.__dict__.update(parameter.__dict__)
    return copy

"""Number formats: autocast, and the loss scale of fp16."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

_HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Precision:
    """``fp32``; ``bf16`` = autocast; ``fp16`` = autocast and dynamic loss scaling. Parameters stay fp32 in all of them.

    Only :meth:`after_step` changes the loss scale, by a result that all ranks share, so it is the same on every rank.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        self.name = name
        self._device = device
        self._scaler = torch.amp.GradScaler(device.type, enabled=name == "fp16")

    def autocast(self) -> AbstractContextManager[Any]:
        """The context of forward passes."""
        if self.name not in _HALF:
            return nullcontext()
        return torch.autocast(self._device.type, dtype=_HALF[self.name])

    def scale(self, loss: Tensor) -> Tensor:
        """The scaled loss, to call backward on."""
        return self._scaler.scale(loss)

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        """Divides the gradients by the loss scale."""
        self._scaler.unscale_(optimizer)

    def after_step(self, finite: bool) -> None:
        """Lowers the loss scale after an overflow on any rank, and raises it after many updates without one."""
        if not self._scaler.is_enabled():
            return
        if finite:
            self._scaler.update()
            return
        state = self._scaler.state_dict()
        lowered = state["scale"] * state["backoff_factor"]
        # update() reads this rank's overflow only; the scale must not differ between ranks.
        self._scaler.update(lowered)
        self._scaler.load_state_dict({**state, "scale": lowered, "_growth_tracker": 0})

    def state(self) -> dict[str, Any]:
        """Plain numbers for ``state.json``; empty outside fp16."""
        return dict(self._scaler.state_dict())

    def load_state(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state`."""
        if self._scaler.is_enabled() and state:
            self._scaler.load_state_dict(dict(state))

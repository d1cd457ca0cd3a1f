"""Number formats: autocast, and the loss scale that fp16 needs."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

_HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Precision:
    """``fp32``; ``bf16`` = autocast; ``fp16`` = autocast and dynamic loss scaling. Parameters stay fp32 in all of them.

    The loss scale is moved by :meth:`after_step` alone, from what all ranks agreed on, so it is the same on every rank.
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

    @property
    def loss_scale(self) -> float:
        """What losses are multiplied by (1 outside fp16)."""
        return float(self._scaler.get_scale())

    def scale(self, loss: Tensor) -> Tensor:
        """The loss to call backward on."""
        return self._scaler.scale(loss)

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        """Divides the gradients by the loss scale."""
        self._scaler.unscale_(optimizer)

    def after_step(self, finite: bool) -> None:
        """Moves the loss scale: down after an overflow anywhere in the world, up after many updates without one."""
        if not self._scaler.is_enabled():
            return
        if finite:
            self._scaler.update()
            return
        state = self._scaler.state_dict()
        lowered = state["scale"] * state["backoff_factor"]
        # update() looks at this rank's own overflow only; the outcome must not differ between ranks.
        self._scaler.update(lowered)
        self._scaler.load_state_dict({**state, "scale": lowered, "_growth_tracker": 0})

    def state(self) -> dict[str, Any]:
        """Plain numbers for ``state.json``; empty outside fp16."""
        return dict(self._scaler.state_dict())

    def load_state(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state`."""
        if self._scaler.is_enabled() and state:
            self._scaler.load_state_dict(dict(state))

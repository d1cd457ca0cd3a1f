"""When checkpoints are written, which are kept, how a run goes on from one, and the mean of the last ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_train.config import CheckpointConfig
from moe_train.training.checkpoints import CheckpointStore, everywhere, load_model, read_state
from moe_train.training.engines import Engine
from moe_train.training.names import empty_optimizer_state, model_tensors, optimizer_tensors
from moe_train.training.state import RunState
from moe_train.training.tensor_files import load_tensors, shapes


@dataclass(frozen=True)
class Keeper:
    """Saves and restores a run.

    Attributes:
        about: what every checkpoint says of its origin (config digest, world).
    """

    store: CheckpointStore
    engine: Engine
    config: CheckpointConfig
    about: Mapping[str, Any]

    def due(self, update: int) -> bool:
        """Whether the schedule asks for a checkpoint after this update."""
        return update % self.config.every_updates == 0

    def save(self, state: RunState) -> Path:
        """Writes the checkpoint of ``state.update`` unless it is there, moves ``last`` and ``best``, drops old ones."""
        path = self.store.path(state.update)
        exists = self.store.world.broadcast(path.is_dir())
        if not exists:
            state.engine = self.engine.state()
            tensors = model_tensors(self.engine.module)
            tensors.update(optimizer_tensors(self.engine.module, self.engine.optimizer_tensors()))
            self.store.save(tensors, {**state.to_json(), **self.about}, path.name)
        everywhere(self.store.world, lambda: self._tidy(state))
        return path

    def _tidy(self, state: RunState) -> None:
        if not self.store.world.main:
            return
        self.store.point("last", state.update)
        if state.best_update and self.store.path(state.best_update).is_dir():
            self.store.point("best", state.best_update)
        self.store.prune(max(self.config.keep, self.config.average))

    def restore(self) -> RunState | None:
        """Loads the newest checkpoint into model and optimizer; None where there is none.

        Raises:
            CheckpointError: it is damaged, or of another model.
        """
        latest = self.store.world.broadcast(self.store.latest())
        if latest is None:
            return None
        self.store.verify(latest)
        load_model(latest, self.engine.module)
        optimizer = empty_optimizer_state(self.engine.module, shapes(latest))
        load_tensors(latest, optimizer_tensors(self.engine.module, optimizer))
        self.engine.load_optimizer_tensors(optimizer)
        state = RunState.from_json(read_state(latest))
        self.engine.load_state(state.engine)
        return state

    def average(self, update: int) -> Path | None:
        """Writes ``averaged``: the mean of the model over the last ``config.average`` checkpoints.

        Kept in fp64 while it is summed; integers are those of the newest checkpoint.
        """
        updates = self.store.world.broadcast(self.store.updates()[-self.config.average :])
        if not self.config.average or not updates:
            return None
        model = model_tensors(self.engine.module)
        mean = {name: torch.zeros_like(t, dtype=torch.float64) for name, t in model.items() if t.is_floating_point()}
        for number in updates:
            loaded = {name: torch.empty_like(tensor) for name, tensor in model.items()}
            load_tensors(self.store.path(number), loaded)
            for name, total in mean.items():
                total.add_(loaded[name], alpha=1.0 / len(updates))
        averaged: dict[str, Tensor] = {name: mean[name].to(t.dtype) if name in mean else t for name, t in model.items()}
        return self.store.save(averaged, {"update": update, "averaged": updates, **self.about}, "averaged")

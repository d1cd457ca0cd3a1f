"""Saves checkpoints when they are due, removes old ones, restores a run from one, and averages the last ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_train.config import CheckpointConfig
from moe_train.errors import CheckpointError
from moe_train.training.checkpoint.background_job import BackgroundJob, staged
from moe_train.training.checkpoint.dcp import load_tensors, shapes
from moe_train.training.checkpoint.run_state import RunState
from moe_train.training.checkpoint.state_dict import empty_optimizer_state, model_tensors, optimizer_tensors
from moe_train.training.checkpoint.store import CheckpointStore, load_model, read_state, reading_state, run_on_all_ranks
from moe_train.training.engines import Engine


@dataclass(frozen=True)
class CheckpointManager:
    """Saves and restores a run.

    With ``config.asynchronous`` tensors are copied to host memory and written by a thread. Nothing else changes: a
    checkpoint gets its name when all of it is on the disk, and an error is raised by the next save or at the end.

    Attributes:
        store: if writing is asynchronous, its world is not the loop's (:func:`world_for_checkpoints`).
        about: origin of the checkpoints (config digest, world), written into each.
        background: the thread.
        damaged: what was wrong with checkpoints that :meth:`restore` or :meth:`average` has left out.
    """

    store: CheckpointStore
    engine: Engine
    config: CheckpointConfig
    about: Mapping[str, Any]
    background: BackgroundJob = field(default_factory=BackgroundJob)
    damaged: list[str] = field(default_factory=list)

    def due(self, update: int) -> bool:
        """Whether the schedule asks for a checkpoint after this update."""
        return update % self.config.every_updates == 0

    def save(self, state: RunState) -> Path:
        """Writes the checkpoint of ``state.update`` unless it is there, moves ``last`` and ``best``, drops old ones.

        Raises:
            CheckpointError: on every rank, where it could not be written, or the one before it, in the background.
        """
        self.background.wait()
        path = self.store.path(state.update)
        if self.store.world.broadcast(path.is_dir()):
            self._tidy(state.update, state.best_update)
            return path
        state.engine = self.engine.state()
        tensors = model_tensors(self.engine.module)
        tensors.update(optimizer_tensors(self.engine.module, self.engine.optimizer_tensors()))
        content, best = {**state.to_json(), **self.about}, state.best_update
        if self.config.asynchronous:
            copies = staged(tensors)
            self.background.start(lambda: self._write(copies, content, best))
        else:
            self._write(tensors, content, best)
        return path

    def finish(self) -> None:
        """Waits until all that was saved is on the disk.

        Raises:
            CheckpointError: on every rank, where it could not be written.
        """
        self.background.wait()

    def close(self) -> None:
        """Waits and ends the thread, after another failure."""
        self.background.close()

    def _write(self, tensors: Mapping[str, Tensor], content: Mapping[str, Any], best: int) -> None:
        self.store.save(tensors, content, self.store.path(content["update"]).name)
        self._tidy(content["update"], best)

    def _tidy(self, last: int, best: int) -> None:
        def tidy() -> None:
            self.store.point("last", last)
            if best and self.store.path(best).is_dir():
                self.store.point("best", best)
            self.store.prune(max(self.config.keep, self.config.average))

        run_on_all_ranks(self.store.world, tidy if self.store.world.main else lambda: None)

    def restore(self) -> RunState | None:
        """Loads the newest checkpoint into model and optimizer; None where there is none.

        With ``config.damaged=skip`` the newest one that is whole; newer ones keep their files under another name.

        Raises:
            CheckpointError: it is damaged (all of them are), or of another model.
        """
        latest = self._whole()
        if latest is None:
            return None
        load_model(latest, self.engine.module)
        optimizer = empty_optimizer_state(self.engine.module, shapes(latest))
        load_tensors(latest, optimizer_tensors(self.engine.module, optimizer))
        self.engine.load_optimizer_tensors(optimizer)
        state = _state(latest)
        with reading_state(latest):
            self.engine.load_state(state.engine)
        return state

    def _whole(self) -> Path | None:
        updates = self.store.broadcast_from_rank0(self.store.updates)
        for number in reversed(updates):
            path = self.store.path(number)
            try:
                self.store.verify(path)
            except CheckpointError as error:
                if self.config.damaged == "refuse" or number == updates[0]:
                    raise CheckpointError(error.what, error.where, self.store.recovery_hint(path)) from None
                renamed = self.store.set_aside(path)
                self.damaged.append(f"{error.where}: {error.what}; {path.name} was set aside as {renamed.name}")
            else:
                return path
        return None

    def average(self, update: int) -> Path | None:
        """Writes ``averaged``: the mean of the model over the last ``config.average`` checkpoints.

        Kept in fp64 while it is summed; integers are those of the newest checkpoint. Damaged ones are left out, which
        :attr:`damaged` says.
        """
        self.background.wait()
        updates = self._worth_averaging() if self.config.average else []
        if not updates:
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

    def _worth_averaging(self) -> list[int]:
        whole = []
        for number in self.store.broadcast_from_rank0(self.store.updates)[-self.config.average :]:
            try:
                self.store.verify(self.store.path(number))
            except CheckpointError as error:
                self.damaged.append(f"{error.where}: {error.what}; the average is without it")
            else:
                whole.append(number)
        return whole

    def notes(self) -> list[str]:
        """What was wrong with checkpoints since the last call."""
        notes = list(self.damaged)
        self.damaged.clear()
        return notes


def _state(checkpoint: Path) -> RunState:
    with reading_state(checkpoint):
        return RunState.from_json(read_state(checkpoint))

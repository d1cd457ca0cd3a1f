"""Writes what happens: JSON lines and TensorBoard, on rank 0."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from moe_train.training.run_folder import RunFolder

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class Records:
    """The run's logs; other ranks than 0 write nothing.

    Args:
        update: where the run goes on: what the logs hold beyond it is removed.
        pending: whether that update's validation is yet to come (again, perhaps: the checkpoint is from before it).
    """

    def __init__(self, folder: RunFolder, main: bool, update: int, pending: bool = False) -> None:
        self._folder = folder if main else None
        self._board: SummaryWriter | None = None
        if main:
            from torch.utils.tensorboard import SummaryWriter

            folder.cut(update, pending)
            self._board = SummaryWriter(str(folder.path / "tensorboard"), purge_step=update + 1 if update else None)

    def trained(self, line: Mapping[str, Any]) -> None:
        """A line of train.jsonl."""
        if self._folder is not None:
            self._folder.append(self._folder.train_log, line)
            self._plot("train", line)

    def validated(self, line: Mapping[str, Any]) -> None:
        """A line of valid.jsonl."""
        if self._folder is not None:
            self._folder.append(self._folder.valid_log, line)
            self._plot("valid", line)

    def _plot(self, group: str, line: Mapping[str, Any]) -> None:
        if self._board is not None:
            for name, value in flat_numbers(line, group):
                self._board.add_scalar(name, value, int(line["update"]))
            self._board.flush()

    def close(self) -> None:
        """Ends TensorBoard's thread."""
        if self._board is not None:
            self._board.close()


def flat_numbers(content: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, float]]:
    """``prefix/name`` of every number, lists by their position."""
    for name, value in content.items():
        if isinstance(value, Mapping):
            yield from flat_numbers(value, f"{prefix}/{name}")
        elif isinstance(value, (list, tuple)):
            yield from flat_numbers({str(i): item for i, item in enumerate(value)}, f"{prefix}/{name}")
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and name != "update":
            yield f"{prefix}/{name}", float(value)

"""Writes and reads named tensors with torch.distributed.checkpoint and its safetensors storage.

No file is a pickle: DCP's own format keeps its index as one, its safetensors storage keeps JSON headers. The plans that
its ranks send one another are pickles, read as data only.
Every rank passes the tensors that it holds; one that several ranks hold is written once, by one of them.

torch.distributed.checkpoint takes a second to import, so it is imported where it is needed.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe_train.errors import CheckpointError
from moe_train.peer_pickles import read_data_only
from moe_train.training.checkpoint.tensor_headers import check_headers


def save_tensors(folder: Path, tensors: Mapping[str, Tensor], group: dist.ProcessGroup | None = None) -> None:
    """Writes the world's tensors into ``folder`` and waits until they are on the disk. Every rank calls it.

    Args:
        group: the processes that take part; None: the default group.

    Raises:
        OSError: on every rank, the first that a rank met (a full disk, say).
    """
    import torch.distributed.checkpoint as dcp

    writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True)
    read_data_only()
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    with _plain_errors(), _quiet():
        dcp.save(contiguous, storage_writer=writer, process_group=group)


def load_tensors(folder: Path, into: Mapping[str, Tensor]) -> None:
    """Reads tensors in place. Every rank calls it, each with the names that it wants.

    Raises:
        CheckpointError: a name is missing, or has another shape; or the files cannot be read.
    """
    import torch.distributed.checkpoint as dcp

    check_shapes(folder, into, shapes(folder))
    read_data_only()
    try:
        with _plain_errors(), _quiet():
            dcp.load(dict(into), storage_reader=dcp.HuggingFaceStorageReader(str(folder)))
    except RuntimeError as error:
        raise CheckpointError(f"its tensors cannot be read ({str(error)[:200]})", str(folder)) from error


def check_shapes(folder: Path, wanted: Mapping[str, Tensor], known: Mapping[str, torch.Size]) -> None:
    """Whether a checkpoint has all wanted tensors.

    Raises:
        CheckpointError: a name is missing, or has another shape.
    """
    for name, tensor in wanted.items():
        if name not in known:
            raise CheckpointError(f"the checkpoint has no tensor '{name}'", str(folder), "it is of another model")
        if known[name] != tensor.shape:
            what = f"the tensor '{name}' is {list(known[name])} in the checkpoint and {list(tensor.shape)} in the model"
            raise CheckpointError(what, str(folder), "it is of another model")


def read_tensors(folder: Path, prefix: str) -> dict[str, Tensor]:
    """All tensors whose names begin with ``prefix``, in the types that they were written in. Every rank calls it."""
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in _headers(folder).items()
        if name.startswith(prefix)
    }
    load_tensors(folder, tensors)
    return tensors


def shapes(folder: Path) -> dict[str, torch.Size]:
    """Names and shapes of all tensors of the folder, read from the files' headers.

    Raises:
        CheckpointError: a header cannot be (:func:`moe_train.training.checkpoint.tensor_headers.check_headers`).
    """
    return {name: entry.size for name, entry in _headers(folder).items()}


def _headers(folder: Path) -> dict[str, Any]:
    """DCP's description of each tensor of the folder, by name."""
    import torch.distributed.checkpoint as dcp

    check_headers(folder)
    metadata = dcp.HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    return {name: entry for name, entry in metadata.items() if hasattr(entry, "size")}


@contextmanager
def _plain_errors() -> Iterator[None]:
    """DCP wraps errors in a BaseException that lists ranks; callers want the error itself."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except CheckpointException as error:
        causes = [cause for cause, _ in error.failures.values()]
        disk = next((cause for cause in causes if isinstance(cause, OSError)), None)
        if disk is not None:
            raise OSError(disk.errno, disk.strerror) from error
        raise RuntimeError(f"the checkpoint failed on ranks {sorted(error.failures)}: {causes[0]}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppresses DCP's warning that one process saves without torch.distributed."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        warnings.filterwarnings("ignore", message="TypedStorage is deprecated")
        yield

"""Reads weights of a Hugging Face folder one tensor at a time: safetensors, or ``pytorch_model.bin`` as data only."""

from __future__ import annotations

import json
import pickle
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moe_train.errors import CheckpointError, DataError
from moe_train.training.checkpoint.tensor_headers import check_headers
from moe_train.utils.json_files import entry, read_object

_SAFETENSORS, _PICKLED = "model.safetensors", "pytorch_model.bin"
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


class TensorFiles:
    """The tensors of a folder by name. One file is open at a time.

    Attributes:
        files: tensor → its file.
        shapes: tensor → its shape.

    Raises:
        CheckpointError: there are no weights, or they cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open: tuple[str, Any] = ("", {})
        name = next((n for n in (_SAFETENSORS, _PICKLED) for f in (n, f"{n}.index.json") if (folder / f).is_file()), "")
        if not name:
            raise CheckpointError("the folder has no weights", str(folder), f"it needs {_SAFETENSORS} or {_PICKLED}")
        if name == _SAFETENSORS:
            check_headers(folder)
        index = folder / f"{name}.index.json"
        files = _read_index(index) if not (folder / name).is_file() else [name]
        self.files: dict[str, str] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for file in files:
            with self._reading(file):
                found = _shapes(self._opened(file))
            self.shapes |= found
            self.files |= dict.fromkeys(found, file)

    @property
    def largest(self) -> int:
        """Bytes of the largest file."""
        return max(((self.folder / file).stat().st_size for file in set(self.files.values())), default=1)

    def read(self, name: str) -> Tensor:
        """One tensor.

        Raises:
            CheckpointError: it is missing, not a floating-point tensor, or its file is damaged.
        """
        if name not in self.files:
            raise CheckpointError(f"the tensor '{name}' is missing", str(self.folder), "restore the folder")
        with self._reading(self.files[name]):
            opened = self._opened(self.files[name])
            tensor = opened[name] if isinstance(opened, Mapping) else opened.get_tensor(name)
        if not isinstance(tensor, Tensor) or tensor.dtype not in FLOATS:
            kind = str(getattr(tensor, "dtype", type(tensor).__name__)).removeprefix("torch.")
            what = f"the tensor '{name}' is of type {kind}, not float32, float16 or bfloat16"
            raise CheckpointError(what, str(self.folder / self.files[name]), "quantised models cannot be imported")
        return tensor

    def _opened(self, file: str) -> Any:
        if self._open[0] != file:
            self._open = ("", {})  # frees the one before
            path = self.folder / file
            if path.suffix == ".safetensors":
                opened: Any = safe_open(path, "pt")
            else:
                opened = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
                if not isinstance(opened, Mapping) or not all(isinstance(key, str) for key in opened):
                    raise ValueError("no table of tensors by name")
            self._open = (file, opened)
        return self._open[1]

    @contextmanager
    def _reading(self, file: str) -> Iterator[None]:
        try:
            yield
        except (
            OSError,
            ValueError,
            RuntimeError,
            EOFError,
            SafetensorError,
            struct.error,
            pickle.UnpicklingError,
        ) as error:
            reason = str(getattr(error, "strerror", None) or error).split("\n", 1)[0][:200]
            if isinstance(error, pickle.UnpicklingError):
                reason = "it holds more than tensors, which could be code"
            raise CheckpointError(f"the weights cannot be read ({reason})", str(self.folder / file)) from error


def _shapes(opened: Any) -> dict[str, tuple[int, ...]]:
    """The shapes of a file's tensors."""
    if isinstance(opened, Mapping):
        return {name: tuple(tensor.shape) for name, tensor in opened.items() if isinstance(tensor, Tensor)}
    return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118


def _is_zip(path: Path) -> bool:
    with path.open("rb") as stream:
        return stream.read(2) == b"PK"


def _read_index(path: Path) -> list[str]:
    """The files of an index, each once; the tensors' names are read from the files themselves."""
    try:
        table = entry(read_object(path) or {}, "weight_map", dict)
        files = sorted({str(file) for file in table.values()})
        if wrong := [
            file for file in files if Path(file).name != file or Path(file).suffix not in (".safetensors", ".bin")
        ]:
            raise ValueError(f"{json.dumps(wrong[0])[:80]} is not a file of the folder")
    except (ValueError, DataError) as error:
        reason = error.what if isinstance(error, DataError) else error
        raise CheckpointError(f"the index of the weights is damaged ({reason})", str(path)) from error
    if missing := next((file for file in files if not (path.parent / file).is_file()), None):
        raise CheckpointError(f"the file {missing} of the index is missing", str(path.parent), "restore the folder")
    return files

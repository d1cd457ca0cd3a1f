"""Pickles that libraries send between ranks, read as data: what they may name is listed here, and code is not.

torch.distributed.checkpoint agrees on its plan by pickles, and fairseq shares statistics and checkpoints so. Our own
ranks tell one another JSON (:class:`moe_train.training.runtime.world.World`).
"""

from __future__ import annotations

import builtins
import io
import pickle
import sys
from typing import Any

import torch

_PLANS = {  # torch.distributed.checkpoint's
    "api": {"CheckpointException"},
    "filesystem": {"_StorageInfo"},
    "metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "planner": {
        "BytesIOWriteData",
        "LoadItemType",
        "LoadPlan",
        "ReadItem",
        "SavePlan",
        "TensorWriteData",
        "WriteItem",
        "WriteItemType",
    },
    "storage": {"WriteResult"},
}
_VALUES = {  # plain values, and what fairseq's statistics and checkpoints are made of
    "argparse": {"Namespace"},
    "builtins": {"bool", "bytes", "complex", "dict", "float", "int", "list", "set", "str", "tuple"},
    "collections": {"OrderedDict", "defaultdict"},
    "fairseq.distributed.utils": {"_TensorPlaceholder"},
    "numpy": {"dtype", "ndarray"},
    "numpy._core.multiarray": {"_reconstruct", "scalar"},
    "omegaconf.base": {"ContainerMetadata", "Metadata"},
    "omegaconf.dictconfig": {"DictConfig"},
    "omegaconf.listconfig": {"ListConfig"},
    "omegaconf.nodes": {"AnyNode", "BooleanNode", "FloatNode", "IntegerNode", "StringNode"},
    "torch": {"Size", "device"},
    "torch._utils": {"_rebuild_parameter", "_rebuild_tensor_v2"},
    "torch.serialization": {"_get_layout"},
    "traceback": {"FrameSummary", "StackSummary"},
    "typing": {"Any"},
}
_NAMES = {
    *((f"torch.distributed.checkpoint.{module}", name) for module, names in _PLANS.items() for name in names),
    *((module, name) for module, names in _VALUES.items() for name in names),
}


class PeerError(Exception):
    """Stands for another rank's error of a kind that is not Python's own."""


class DataUnpickler(pickle.Unpickler):
    """Builds plain values, tensors, torch.distributed.checkpoint's plans and errors, and nothing else.

    Raises:
        pickle.UnpicklingError: from ``load``, where a pickle names anything else.
    """

    def find_class(self, module: str, name: str) -> Any:
        """What a pickle may name."""
        if (module, name) in _NAMES:
            return super().find_class(module, name)
        if (module, name) == ("torch.storage", "_load_from_bytes"):  # which unpickles whatever it is given
            return _load_storage
        found = getattr(sys.modules.get(module), name, None)
        if module == "torch" and isinstance(found, torch.dtype):
            return found
        if isinstance(found, type) and issubclass(found, BaseException):
            return found if module == builtins.__name__ else PeerError
        raise pickle.UnpicklingError(f"another rank sent {module}.{name}, which is no plain data: it was not built")


def _load_storage(content: bytes) -> Any:
    return torch.load(io.BytesIO(content), weights_only=True)


def loads(content: bytes) -> Any:
    """As ``pickle.loads``, by :class:`DataUnpickler`."""
    return DataUnpickler(io.BytesIO(content)).load()


def read_data_only() -> None:
    """From here on torch's collectives of objects read what other ranks send with :class:`DataUnpickler`."""
    from torch.distributed import distributed_c10d

    distributed_c10d._unpickler = DataUnpickler

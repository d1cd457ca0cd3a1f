"""Restricted unpickler for pickles that libraries send between ranks: only listed data types, no code.

torch.distributed.checkpoint exchanges its plans as pickles, and fairseq its statistics and checkpoints. moe_train sends
JSON (:class:`moe_train.training.runtime.world.World`).
"""

from __future__ import annotations

import builtins
import io
import pickle
import sys
from typing import Any

import torch

_PLANS = {  # of torch.distributed.checkpoint
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
_VALUES = {  # plain values, and types in fairseq's statistics and checkpoints
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
    """Replaces another rank's exception if its type is not a built-in one."""


class DataUnpickler(pickle.Unpickler):
    """Unpickles only plain values, tensors, plans of torch.distributed.checkpoint, and exceptions.

    Raises:
        pickle.UnpicklingError: by ``load``, if a pickle names anything else.
    """

    def find_class(self, module: str, name: str) -> Any:
        """The object of an allowed name."""
        if (module, name) in _NAMES:
            return super().find_class(module, name)
        if (module, name) == ("torch.storage", "_load_from_bytes"):  # the original unpickles anything
            return _load_storage
        found = getattr(sys.modules.get(module), name, None)
        if module == "torch" and isinstance(found, torch.dtype):
            return found
        if isinstance(found, type) and issubclass(found, BaseException):
            return found if module == builtins.__name__ else PeerError
        raise pickle.UnpicklingError(f"another rank sent {module}.{name}, which is not plain data: it was not loaded")


def _load_storage(content: bytes) -> Any:
    return torch.load(io.BytesIO(content), weights_only=True)


def loads(content: bytes) -> Any:
    """``pickle.loads`` with :class:`DataUnpickler`."""
    return DataUnpickler(io.BytesIO(content)).load()


def read_data_only() -> None:
    """Makes torch's object collectives use :class:`DataUnpickler`."""
    from torch.distributed import distributed_c10d

    distributed_c10d._unpickler = DataUnpickler

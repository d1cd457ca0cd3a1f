"""Patches that fairseq 0.12.2 needs on Python 3.11+, torch 2.6+ and Hydra 1.3, each with its reason.

Code that uses fairseq imports it from here, so that the patches are applied first::

    from moe_train.fairseq_compat import fairseq

or calls :func:`apply` before ``import fairseq`` (required in every process that uses DeepSpeed, which imports fairseq
itself). fairseq's files on disk are not changed. Importing this module imports neither fairseq nor torch.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import dataclasses
import functools
import importlib
import importlib.util
import os
import pickle
import shutil
import sys
import tempfile
import types
import warnings
from collections.abc import Callable, Collection, Iterator
from typing import Any

from moe_train.errors import MissingDependency
from moe_train.fairseq_checkpoints import guard_checkpoints
from moe_train.fairseq_values import guard_eval

FAIRSEQ_VERSION = "0.12.2"

_MARK = "__moe_train_patches__"


@dataclasses.dataclass(frozen=True)
class Patch:
    """One patch: ``during`` is a context around the import of fairseq, ``after`` runs after the import."""

    name: str
    reason: str
    during: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext
    after: Callable[[], None] = lambda: None


def require_fairseq() -> None:
    """Checks that fairseq is installed, without importing it.

    Raises:
        MissingDependency: fairseq is not installed.
    """
    if "fairseq" not in sys.modules and importlib.util.find_spec("fairseq") is None:
        raise MissingDependency(
            "fairseq is required and not installed",
            remedy=f"run scripts/setup.sh, or pip install --no-deps fairseq=={FAIRSEQ_VERSION}",
        )


def apply(skip: Collection[str] = ()) -> tuple[str, ...]:
    """Imports fairseq with all patches; does nothing the second time.

    Args:
        skip: names of patches to skip (used by tests to show what breaks).

    Returns:
        The names of the patches applied in this process.

    Raises:
        MissingDependency: fairseq is not installed.
        ValueError: ``skip`` names an unknown patch.
    """
    if unknown := set(skip) - {patch.name for patch in PATCHES}:
        raise ValueError(f"unknown patches: {', '.join(sorted(unknown))}")
    module = sys.modules.get("fairseq")
    if module is not None and hasattr(module, _MARK):
        return tuple(getattr(module, _MARK))
    require_fairseq()
    patches = [patch for patch in PATCHES if patch.name not in skip]
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch.during())
        module = importlib.import_module("fairseq")
    for patch in patches:
        patch.after()
    names = tuple(patch.name for patch in patches)
    setattr(module, _MARK, names)
    return names


def __getattr__(name: str) -> Any:
    if name == "fairseq":
        apply()
        return sys.modules["fairseq"]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# --- the patches -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _hashable_dataclasses() -> Iterator[None]:
    original = dataclasses.dataclass

    def dataclass(cls: type | None = None, /, **options: Any) -> Any:
        def decorate(cls: type) -> type:
            if cls.__module__.partition(".")[0] in {"fairseq", "fairseq_cli"}:
                options.setdefault("unsafe_hash", True)
            return original(cls, **options)

        return decorate if cls is None else decorate(cls)

    dataclasses.dataclass = dataclass  # type: ignore[assignment]
    try:
        yield
    finally:
        dataclasses.dataclass = original


@contextlib.contextmanager
def _without_deepspeed() -> Iterator[None]:
    if "deepspeed" in sys.modules:
        yield
        return
    sys.modules["deepspeed"] = None  # type: ignore[assignment]  # makes the import fail
    try:
        yield
    finally:
        del sys.modules["deepspeed"]


@contextlib.contextmanager
def _options_without_eval() -> Iterator[None]:
    guard_eval()
    yield


def _broadcasts_from_own_ranks() -> None:
    import torch.distributed as dist
    from fairseq.distributed import utils

    from moe_train.peer_pickles import loads, read_data_only

    read_data_only()

    def broadcast_object_slow(obj: Any, src_rank: int, group: Any, dist_device: Any) -> Any:
        box = [obj]
        dist.broadcast_object_list(box, src=src_rank, group=group, device=dist_device)
        return box[0]

    utils._broadcast_object_slow = broadcast_object_slow
    utils.pickle = types.SimpleNamespace(dumps=pickle.dumps, loads=loads, UnpicklingError=pickle.UnpicklingError)


def _rendezvous_in_a_folder() -> None:
    from fairseq.distributed import utils

    from moe_train.parallel.isolation import LOOPBACK

    original = utils._infer_single_node_init

    @functools.wraps(original)
    def infer(config: Any) -> None:
        original(config)
        folder = tempfile.mkdtemp(prefix="moe_fairseq-")  # of mode 0700
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        os.environ.update(LOOPBACK)
        config.distributed_init_method = f"file://{folder}/rendezvous"

    utils._infer_single_node_init = infer


def _encoder_layers_load_plainly() -> None:
    import torch.nn as nn
    from fairseq.modules.transformer_layer import TransformerEncoderLayerBase

    unused = [f"{name}_{kind}" for name in ("in_proj", "out_proj", "fc1", "fc2") for kind in ("weight", "bias")]

    def load(self: Any, state: Any, prefix: str, meta: Any, strict: bool, missing: list[str], *rest: Any) -> None:
        nn.Module._load_from_state_dict(self, state, prefix, meta, strict, missing, *rest)
        dead = {prefix + name for name in unused}
        missing[:] = [key for key in missing if key not in dead]

    TransformerEncoderLayerBase._load_from_state_dict = load


def _compose_with_hydra_1_3() -> None:
    import hydra
    from fairseq.dataclass import utils
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.singleton import Singleton
    from hydra.version import VersionBase
    from omegaconf import DictConfig, OmegaConf

    def compose(config_name: str, overrides: list[str], strict: bool = True) -> DictConfig:
        config = hydra.compose(config_name, overrides=overrides)
        OmegaConf.set_struct(config, strict)
        return config

    original = utils.convert_namespace_to_omegaconf

    @functools.wraps(original)
    def convert(args: argparse.Namespace) -> DictConfig:
        # fairseq clears Hydra's global state; it is restored for the Hydra application that calls this.
        states: tuple[type, ...] = (GlobalHydra, VersionBase)
        kept = {kind: Singleton._instances.pop(kind) for kind in states if kind in Singleton._instances}
        try:
            with warnings.catch_warnings(category=UserWarning, action="ignore"):  # long warnings about its old config
                return original(args)
        finally:
            for kind in states:
                Singleton._instances.pop(kind, None)
            Singleton._instances.update(kept)

    # fairseq's config.yaml is for Hydra 1.1: `# @package _group_` has another meaning since 1.2.
    utils.initialize = functools.partial(hydra.initialize, version_base="1.1")
    utils.compose = compose
    _rebind(original, convert)


def _rebind(old: Any, new: Any) -> None:
    """Replaces ``old`` by ``new`` in all modules of fairseq, many of which import functions by name."""
    for name, module in list(sys.modules.items()):
        if module is None or name.partition(".")[0] not in {"fairseq", "fairseq_cli"}:
            continue
        for key, value in list(vars(module).items()):
            if value is old:
                setattr(module, key, new)


def _ddp_on_cpu() -> None:
    from fairseq.models import distributed_fairseq_model
    from torch.nn.parallel import DistributedDataParallel

    def wrap(module: Any, device_ids: Any = None, output_device: Any = None, **options: Any) -> DistributedDataParallel:
        if all(parameter.device.type == "cpu" for parameter in module.parameters()):
            device_ids = output_device = None
        return DistributedDataParallel(module, device_ids=device_ids, output_device=output_device, **options)

    distributed_fairseq_model.DistributedDataParallel = wrap


class _NumpyWithOldNames(types.ModuleType):
    """numpy with its removed names, for fairseq's modules only."""

    int = int
    float = float

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module("numpy"), name)


def _old_numpy_names() -> None:
    for name in ("fairseq.data.data_utils", "fairseq.modules.dynamic_crf_layer"):
        importlib.import_module(name).np = _NumpyWithOldNames("numpy")  # type: ignore[attr-defined]


PATCHES: tuple[Patch, ...] = (
    Patch(
        "dataclass_defaults",
        "Python 3.11 rejects defaults that cannot be hashed; fairseq's configs have dataclass instances as defaults, "
        "so that `import fairseq` fails. They get a hash.",
        during=_hashable_dataclasses,
    ),
    Patch(
        "deepspeed_probe",
        "`import fairseq` imports DeepSpeed, if installed, for one optimizer: slow, with much output, and circular, "
        "since DeepSpeed imports fairseq.",
        during=_without_deepspeed,
    ),
    Patch(
        "checkpoint_loading",
        "torch.load accepts plain data only since 2.6, and fairseq's checkpoints contain argparse.Namespace and numpy "
        "scalars. These are allowed; code in a checkpoint is still rejected.",
        after=guard_checkpoints,
    ),
    Patch(
        "plain_values",
        "fairseq passes options to Python's eval, also those of checkpoints. They are parsed as plain values, also in "
        "modules that are imported later.",
        during=_options_without_eval,
    ),
    Patch(
        "object_broadcast",
        "fairseq broadcasts objects through torch.load, which rejects fairseq's placeholders since torch 2.6: torch's "
        "object broadcast is used instead. Pickles of other ranks are loaded as data and cannot run code.",
        after=_broadcasts_from_own_ranks,
    ),
    Patch(
        "single_node_store",
        "The ranks that fairseq starts on one host rendezvous at a TCP port, which listens on all interfaces without "
        "authentication. They use a file in a folder that only their user can enter.",
        after=_rendezvous_in_a_folder,
    ),
    Patch(
        "encoder_layer_loading",
        "Loading weights enables BetterTransformer, which computes wrong outputs with current torch and requires the "
        "weights of a dense feed-forward. Encoder layers load like any module, with or without its unused parameters.",
        after=_encoder_layers_load_plainly,
    ),
    Patch(
        "hydra_compose",
        "fairseq composes its config by hydra.experimental, which raises with version_base >= 1.2, and clears Hydra's "
        "global state.",
        after=_compose_with_hydra_1_3,
    ),
    Patch(
        "ddp_on_cpu",
        "--ddp-backend pytorch_ddp passes a GPU even if the model is on the CPU, which DDP rejects.",
        after=_ddp_on_cpu,
    ),
    Patch(
        "numpy_names",
        "np.int and np.float were removed in NumPy 1.24; fairseq's span masking and CRF use them.",
        after=_old_numpy_names,
    ),
)

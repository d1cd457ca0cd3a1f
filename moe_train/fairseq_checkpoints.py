"""Checks fairseq's checkpoints as untrusted files: values of their config, and the size of the model that they request.

A checkpoint contains the options of the command that wrote it, and fairseq's generate, interactive and validate build
model, task and criterion from these. Rejected are values that are not plain, interpolations (which could read
environment variables), code to import, and options that make fairseq open further files.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import logging
import math
import os
import pickle
import re
import sys
import types
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, NoReturn

from moe_train.errors import CheckpointError, UserError

LOG = logging.getLogger("fairseq.moe_train")

_DEEPEST = 32
_MOST = 200_000  # values in a config
_LONGEST_TEXT = 1 << 20
_CHOICES = ("task", "arch", "criterion", "optimizer", "lr_scheduler", "bpe", "tokenizer", "scoring", "_name")
_NAMES_A_FILE = re.compile(r"(^|_)(path|paths|file|dir|checkpoint|ckpt|json|yaml|manifest|lexicon|from)$")
_KEYWORDS = ("True", "False", "None", "never", "none")  # values of an option that may name a file
# Groups of fairseq's config that are not read from a checkpoint, but from the command line.
_UNREAD = (
    *("common", "common_eval", "distributed_training", "dataset", "optimization", "checkpoint", "bmuf"),
    *("generation", "eval_lm", "interactive", "ema"),
)
_FREE_ELEMENTS = 1 << 28  # allowed for any file size: 1 GiB in fp32
_FREE_PARAMETERS = 10_000


def guard_checkpoints() -> None:
    """Makes fairseq load checkpoints as data, check their configs, and limit the size of models by their files."""
    from fairseq import checkpoint_utils

    checkpoint_utils.torch = _TorchThatReadsData("torch")
    load, build = checkpoint_utils.load_checkpoint_to_cpu, checkpoint_utils.load_model_ensemble_and_task

    @functools.wraps(load)
    def load_checked(path: Any, arg_overrides: Any = None, load_on_all_ranks: bool = False) -> Any:
        with checkpoint_errors([path]):
            state = load(path, arg_overrides, load_on_all_ranks)
        _check_files(state, str(path))
        return state

    @functools.wraps(build)
    def build_bounded(filenames: Sequence[str], *args: Any, **kwargs: Any) -> Any:
        with checkpoint_errors(filenames), _bounded_model(sum(map(_bytes, filenames))):
            return build(filenames, *args, **kwargs)

    checkpoint_utils.load_checkpoint_to_cpu = load_checked
    checkpoint_utils.load_model_ensemble_and_task = build_bounded
    checkpoint_utils.load_checkpoint = _resumes_or_names_the_file(checkpoint_utils.load_checkpoint)


class _TorchThatReadsData(types.ModuleType):
    """torch for fairseq's ``checkpoint_utils``; its ``load`` returns plain data or raises CheckpointError."""

    def __getattr__(self, name: str) -> Any:
        import torch

        return getattr(torch, name)

    def load(self, file: Any, **options: Any) -> Any:
        import torch

        path = str(getattr(file, "name", file))
        try:
            with torch.serialization.safe_globals(harmless_types()):
                state = torch.load(file, **options)
        except pickle.UnpicklingError as error:
            raise CheckpointError(
                f"this fairseq checkpoint contains more than plain data, so it was not loaded ({_first_line(error)})",
                path,
                "if you trust its author, save it again with plain Python values",
            ) from error
        if not isinstance(state, dict):
            raise CheckpointError(f"this is not a fairseq checkpoint: it contains a {type(state).__name__}", path)
        for part in ("args", "cfg"):
            _check_values(state.get(part), path, part)
        return state


def harmless_types() -> list[Any]:
    """Types in fairseq's checkpoints besides tensors and built-in types; constructing them runs no code."""
    import numpy as np

    scalars = [type(np.dtype(kind)) for kind in ("float32", "float64", "int32", "int64", "bool")]
    return [argparse.Namespace, np._core.multiarray.scalar, np.dtype, *scalars]  # type: ignore[attr-defined]


def _first_line(error: BaseException) -> str:
    text = str(error)
    found = [line.strip() for line in text.splitlines() if "GLOBAL" in line or "Unsupported" in line]
    return (found or text.splitlines() or [""])[0]


@contextmanager
def checkpoint_errors(paths: Sequence[Any]) -> Iterator[None]:
    """Context that turns exceptions into a CheckpointError with the file's name.

    The traceback is logged if fairseq's ``LOGLEVEL`` is DEBUG.
    """
    where = ", ".join(map(str, paths))
    try:
        yield
    except UserError as error:
        if error.where:
            raise
        raise CheckpointError(error.what, where, error.remedy) from error
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
            raise CheckpointError(f"it cannot be read ({error.strerror})", str(error.filename)) from error
        LOG.debug("loading %s failed", where, exc_info=True)
        raise CheckpointError(f"fairseq cannot load this checkpoint ({describe_exception(error)})", where) from error


def describe_exception(error: BaseException) -> str:
    """An exception in one line of at most 200 characters."""
    line = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {line[:200]}" if line else type(error).__name__


# --- values -----------------------------------------------------------------------------------------------------------


def _check_values(config: Any, path: str, part: str) -> None:
    """Rejects values that no option of fairseq has: other types, interpolations, deep nesting, huge numbers, texts."""
    rest, seen = [(config, part, 0)], 0
    while rest:
        value, name, depth = rest.pop()
        seen += 1
        if depth > _DEEPEST or seen > _MOST:  # in a pickle a list can contain itself, or one list many times
            _refuse(path, name, f"is nested more than {_DEEPEST} deep, or has more than {_MOST:,} parts")
        if isinstance(value, argparse.Namespace):
            value = vars(value)
        if isinstance(value, Mapping):
            for key, inner in value.items():
                if not isinstance(key, str | int) or "${" in str(key):
                    _refuse(path, name, f"has a key that is not a name: {str(key)[:60]!r}")
                _check_choice(str(key), inner, path, f"{name}.{key}")
                rest.append((inner, f"{name}.{key}", depth + 1))
        elif isinstance(value, list | tuple):
            rest += [(inner, name, depth + 1) for inner in value]
        else:
            _check_leaf(value, path, name)


def _check_leaf(value: Any, path: str, name: str) -> None:
    if isinstance(value, str):
        if "${" in value:
            _refuse(path, name, f"contains an interpolation: {value[:60]!r}")
        if len(value) > _LONGEST_TEXT:
            _refuse(path, name, f"has {len(value):,} characters")
    elif isinstance(value, int) and not -(1 << 63) <= value < 1 << 63:
        _refuse(path, name, "is an integer of more than 64 bits")
    elif not isinstance(value, int | float | None):
        _refuse(path, name, f"contains a {type(value).__name__}, a type that no option of fairseq has")


def _check_choice(key: str, value: Any, path: str, name: str) -> None:
    """Rejects a path as the name of a task, a bpe and the like, from which Hydra would read a config."""
    if key in _CHOICES and isinstance(value, str) and not re.fullmatch(r"[\w.@+-]*", value):
        _refuse(path, name, f"is not a registered name of fairseq: {value[:60]!r}")


def _refuse(path: str, name: str, reason: str, remedy: str = "") -> NoReturn:
    raise CheckpointError(f"this checkpoint's option '{name[:80]}' {reason}", path, remedy)


# --- further files ----------------------------------------------------------------------------------------------------


def _check_files(state: Mapping[str, Any], path: str) -> None:
    """Rejects ``user_dir`` and options that name further files, unless the current command line names them too."""
    typed = {part for word in sys.argv[1:] for part in (word, word.partition("=")[2])}
    unread = _unread_options()
    for name, value in (*_options(state.get("args"), "args"), *_options(state.get("cfg"), "cfg")):
        key = name.rpartition(".")[2]
        if not isinstance(value, str) or not value or value in typed:
            continue
        if key == "user_dir":
            remedy = "if you trust that code, give the same --user-dir on the command line"
            _refuse(path, name, f"names code to import: {value[:60]!r}", remedy)
        looks_like_one = _NAMES_A_FILE.search(key) or any(mark in value for mark in ("/", "\\", "~"))
        if looks_like_one and key not in unread and value not in _KEYWORDS:
            remedy = (
                f"give the option itself on the command line if you trust that file, or generate, interactive and "
                f"validate --model-overrides \"{{'{key}': None}}\""
            )
            _refuse(path, name, f"names a further file: {value[:60]!r}", remedy)


def _options(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Every option below ``value``, with its dotted name."""
    from omegaconf import DictConfig, ListConfig, OmegaConf

    if isinstance(value, DictConfig | ListConfig):
        value = OmegaConf.to_container(value, resolve=False)
    if isinstance(value, argparse.Namespace):
        value = vars(value)
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _options(inner, f"{name}.{key}")
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _options(inner, name)
    else:
        yield name, value


def _unread_options() -> Collection[str]:
    """Options that are not read from a checkpoint, and ``data``, which is always on the command line."""
    from fairseq.dataclass.configs import FairseqConfig
    from fairseq.registry import REGISTRIES

    groups = {field.name: field.type for field in dataclasses.fields(FairseqConfig)}
    kinds: list[Any] = [groups[name] for name in _UNREAD]
    kinds += [kind for name in ("bpe", "tokenizer") for kind in REGISTRIES[name]["dataclass_registry"].values()]
    found = {field.name for kind in kinds for field in dataclasses.fields(kind)}
    return (found | {"data"}) - {"user_dir"}


# --- sizes ------------------------------------------------------------------------------------------------------------


def _bytes(filename: str) -> int:
    return os.path.getsize(filename) if os.path.isfile(filename) else 0


@contextmanager
def _bounded_model(size: int) -> Iterator[None]:
    """Context in which no model much larger than a checkpoint of ``size`` bytes can be built.

    ``encoder_layers=10**9`` would allocate until memory is exhausted. A checkpoint has at least one byte per element of
    its model; building allocates a few times the final elements.
    """
    from torch import nn

    elements, parameters = 4 * size + _FREE_ELEMENTS, size // 100 + _FREE_PARAMETERS
    count = 0

    def registered(module: nn.Module, name: str, parameter: Any) -> None:
        nonlocal count
        count += 1
        if count > parameters:
            _too_large(f"more than {parameters:,} parameters")

    with ExitStack() as stack:
        handle = nn.modules.module.register_module_parameter_registration_hook(registered)
        stack.callback(handle.remove)
        stack.enter_context(_bounded_elements(elements))
        yield


def _bounded_elements(limit: int) -> AbstractContextManager[Any]:
    """A dispatch mode in which new tensors have at most ``limit`` elements in total, checked before allocation."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Bounded(TorchDispatchMode):
        used = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            given = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)}
            if "self" not in given or func._schema.name.startswith("aten::new_"):  # others only read tensors
                self.used += math.prod(map(int, given.get("size", [])))
                self.used += int(abs(given["end"])) if func._schema.name == "aten::arange" else 0
            if self.used > limit:
                _too_large(f"more than {limit:,} elements")
            return func(*args, **(kwargs or {}))

    return Bounded()


def _too_large(what: str) -> NoReturn:
    raise CheckpointError(f"this checkpoint's config requests a model of {what}, far more than its file contains")


# --- training ---------------------------------------------------------------------------------------------------------


def _resumes_or_names_the_file(load: Callable[..., Any]) -> Callable[..., Any]:
    """fairseq's ``load_checkpoint``, whose errors name the checkpoint from which training was to resume."""

    @functools.wraps(load)
    def load_checkpoint(cfg: Any, trainer: Any, **passed: Any) -> Any:
        own = cfg.restore_file
        if own == "checkpoint_last.pt":
            own = os.path.join(cfg.save_dir, f"checkpoint_last{trainer.checkpoint_suffix}.pt")
        present = next((path for path in (own, cfg.finetune_from_model) if path and os.path.exists(path)), None)
        if present is None:
            return load(cfg, trainer, **passed)
        with checkpoint_errors([present]):
            return load(cfg, trainer, **passed)

    return load_checkpoint

"""Compiles and loads the C kernels on first use, if the processor has the instructions that they need.

They are for bf16 on CPUs with matrix units (AMX), where torch's operators lose time to memory traffic and calls
(docs/decisions/0010). They are optional: without a compiler, or on other processors, torch's operators are used.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import shlex
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from moe_train.kernels.cpu.cpu_info import processor_flags

SWITCH = "MOE_TRAIN_KERNELS"  # "off" (or 0, no, false) disables the kernels

_REQUIRED_FLAGS = ("avx512f", "avx512bw", "avx512vl", "avx512_bf16", "amx_tile", "amx_bf16", "amx_int8")
_FLAGS = ("-std=gnu11", "-O3", "-fPIC", "-shared", "-pthread", "-mprefer-vector-width=512")
_FLAG_OPTIONS = tuple("-m" + unit.replace("_", "-").replace("avx512-", "avx512") for unit in _REQUIRED_FLAGS)
_HEADERS = Path(__file__).parent
_COMPILERS = ("gcc", "cc", "clang")
_TIMEOUT = 120

_log = logging.getLogger(__name__)


def library_for(like: Tensor, source: Path, *further_types: torch.dtype) -> ctypes.CDLL | None:
    """The library of a C file if it can be used for ``like``: bf16, on the CPU, and torch's operators are not traced.

    ``further_types``: types that it takes besides bf16. FLOP counters and compilers that trace torch's operators must
    see them.
    """
    if like.dtype not in (torch.bfloat16, *further_types) or like.device.type != "cpu":
        return None
    if torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None:
        return None
    return library(source)


@functools.cache
def library(source: Path) -> ctypes.CDLL | None:
    """The library of a C file; None if the processor lacks the instructions, or if the build fails (logged)."""
    off = os.environ.get(SWITCH, "").lower() in ("off", "0", "no", "false")
    if off or not processor_flags().issuperset(_REQUIRED_FLAGS):
        return None
    compiler = _compiler()
    if compiler is None:
        return None
    try:
        return _load_or_build(source, compiler)
    except (OSError, subprocess.SubprocessError) as error:
        message = error.stderr if isinstance(error, subprocess.CalledProcessError) else str(error)
        _warn(f"{source.name} could not be built by {shlex.join(compiler)}: {message.strip()[-500:]}")
        return None


@functools.cache
def _compiler() -> tuple[str, ...] | None:
    """The command of a C compiler; None if there is none."""
    if asked := shlex.split(os.environ.get("CC", "")):
        return tuple(asked)
    found = next((name for name in _COMPILERS if shutil.which(name)), None)
    if found is None:
        _warn(f"there is no C compiler ({', '.join(_COMPILERS)}, or CC)")
    return (found,) if found else None


def _warn(why: str) -> None:
    _log.warning(
        "bf16 and beam search on this CPU use torch's operators instead of the faster C kernels: %s. "
        "Install gcc 11 or newer; %s=off silences this.",
        why,
        SWITCH,
    )


def _load_or_build(source: Path, compiler: tuple[str, ...]) -> ctypes.CDLL:
    """Loads a library built earlier from the same sources by the same command, or builds it.

    Raises:
        OSError: the library cannot be written or loaded.
        subprocess.SubprocessError: the compiler failed.
    """
    command = (*compiler, *_FLAGS, *_FLAG_OPTIONS)
    texts = [source, *sorted({*source.parent.glob("*.h"), *_HEADERS.glob("*.h")})]
    words = [*command, _compiler_stamp(compiler[0])]
    digest = hashlib.sha256(b"\0".join([*(path.read_bytes() for path in texts), *map(os.fsencode, words)]))
    with contextlib.ExitStack() as stack:
        folder = _cache_folder() or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="moe_train-")))
        built = folder / f"{source.stem}-{digest.hexdigest()[:24]}.so"
        if built.exists():
            with contextlib.suppress(OSError):  # damaged: built again
                return ctypes.CDLL(str(built))
        _build(source, built, (*command, f"-I{_HEADERS}"))
        return ctypes.CDLL(str(built))


def _compiler_stamp(compiler: str) -> str:
    """Size and modification time of the compiler, which change with its version."""
    path = shutil.which(compiler)
    status = Path(path).stat() if path else None
    return f"{status.st_size}:{status.st_mtime_ns}" if status else ""


def _cache_folder() -> Path | None:
    """The folder of built libraries; None if it cannot be made, or if other users can write to it or its parents."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moe_train" / "kernels"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder = folder.resolve()
        safe = _only_we_can_write(folder) and all(_only_we_can_write(parent, sticky=True) for parent in folder.parents)
    except (OSError, RuntimeError):  # RuntimeError: the home folder is unknown
        return None
    return folder if safe and os.access(folder, os.W_OK) else None


def _only_we_can_write(folder: Path, sticky: bool = False) -> bool:
    """Whether only this user and root can write to a folder. ``sticky``: a folder with the sticky bit is accepted."""
    found = folder.stat()
    open_to_others = found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    if sticky and found.st_mode & stat.S_ISVTX:
        open_to_others = 0
    return found.st_uid in (0, os.getuid()) and not open_to_others


def _build(source: Path, to: Path, command: tuple[str, ...]) -> None:
    """Compiles to a temporary folder and then renames, since other ranks may build at the same time."""
    with tempfile.TemporaryDirectory(dir=to.parent, prefix=".building-") as folder:
        made = Path(folder) / to.name
        subprocess.run(
            [*command, str(source), "-o", str(made)], check=True, capture_output=True, text=True, timeout=_TIMEOUT
        )
        made.replace(to)

"""Our kernels in C: compiled when they are first needed, where the processor has the units that they are written for.

They are for bf16 on CPUs with matrix units (AMX), whose speed is lost to memory and calls between torch's operators
(docs/decisions/0010). Nothing needs them: without a compiler, or on other processors, torch's own products serve.
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

SWITCH = "MOE_TRAIN_KERNELS"  # set it to "off" (or 0, no, false) to do without

_UNITS = ("avx512f", "avx512bw", "avx512vl", "avx512_bf16", "amx_tile", "amx_bf16")
_FLAGS = ("-std=gnu11", "-O3", "-fPIC", "-shared", "-pthread", "-mprefer-vector-width=512")
_FOR_UNITS = tuple("-m" + unit.replace("_", "-").replace("avx512-", "avx512") for unit in _UNITS)
_HEADERS = Path(__file__).parent
_COMPILERS = ("gcc", "cc", "clang")
_SECONDS = 120

_log = logging.getLogger(__name__)


def library_for(like: Tensor, source: Path) -> ctypes.CDLL | None:
    """The library of a C file, where it serves tensors like this one: bf16, on this CPU, not watched by anybody.

    Who counts or traces torch's operators (a FLOP counter, a compiler) must see them.
    """
    if like.dtype != torch.bfloat16 or like.device.type != "cpu":
        return None
    if torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None:
        return None
    return library(source)


@functools.cache
def library(source: Path) -> ctypes.CDLL | None:
    """The library of a C file; None where the processor lacks the units or it cannot be built, which is logged."""
    off = os.environ.get(SWITCH, "").lower() in ("off", "0", "no", "false")
    if off or not processor_flags().issuperset(_UNITS):
        return None
    compiler = _compiler()
    if compiler is None:
        return None
    try:
        return _from_cache(source, compiler)
    except (OSError, subprocess.SubprocessError) as error:
        said = error.stderr if isinstance(error, subprocess.CalledProcessError) else str(error)
        _warn(f"{source.name} could not be built by {shlex.join(compiler)}: {said.strip()[-500:]}")
        return None


@functools.cache
def _compiler() -> tuple[str, ...] | None:
    """The command of a C compiler."""
    if asked := shlex.split(os.environ.get("CC", "")):
        return tuple(asked)
    found = next((name for name in _COMPILERS if shutil.which(name)), None)
    if found is None:
        _warn(f"there is no C compiler ({', '.join(_COMPILERS)}, or CC)")
    return (found,) if found else None


def _warn(why: str) -> None:
    _log.warning(
        "bf16 experts on this CPU take torch's products instead of our kernels, which are faster: %s. "
        "Install gcc 11 or newer; %s=off silences this.",
        why,
        SWITCH,
    )


def _from_cache(source: Path, compiler: tuple[str, ...]) -> ctypes.CDLL:
    """Loads what was built before from the same text by the same command, or builds it.

    Raises:
        OSError: what was built cannot be loaded, or there is no place for it.
        subprocess.SubprocessError: the compiler failed.
    """
    command = (*compiler, *_FLAGS, *_FOR_UNITS)
    texts = [source, *sorted({*source.parent.glob("*.h"), *_HEADERS.glob("*.h")})]
    words = [*command, _age_of(compiler[0])]
    digest = hashlib.sha256(b"\0".join([*(path.read_bytes() for path in texts), *map(os.fsencode, words)]))
    with contextlib.ExitStack() as stack:
        folder = _own_folder() or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="moe_train-")))
        built = folder / f"{source.stem}-{digest.hexdigest()[:24]}.so"
        if built.exists():
            with contextlib.suppress(OSError):  # damaged: built again
                return ctypes.CDLL(str(built))
        _build(source, built, (*command, f"-I{_HEADERS}"))
        return ctypes.CDLL(str(built))


def _age_of(compiler: str) -> str:
    """What changes where another version of it is installed."""
    found = shutil.which(compiler)
    about = Path(found).stat() if found else None
    return f"{about.st_size}:{about.st_mtime_ns}" if about else ""


def _own_folder() -> Path | None:
    """Where libraries are kept; None where that cannot be, or others may write there or above."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moe_train" / "kernels"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder = folder.resolve()
        safe = _only_ours(folder) and all(_only_ours(parent, sticky=True) for parent in folder.parents)
    except (OSError, RuntimeError):  # the second: nobody knows where home is
        return None
    return folder if safe and os.access(folder, os.W_OK) else None


def _only_ours(folder: Path, sticky: bool = False) -> bool:
    """Whether nobody but us and root may change what stands in a folder; ``sticky``: or what others own there."""
    found = folder.stat()
    open_to_others = found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    if sticky and found.st_mode & stat.S_ISVTX:
        open_to_others = 0
    return found.st_uid in (0, os.getuid()) and not open_to_others


def _build(source: Path, to: Path, command: tuple[str, ...]) -> None:
    """Compiles beside the place and then moves there, since other ranks may be at it too."""
    with tempfile.TemporaryDirectory(dir=to.parent, prefix=".building-") as folder:
        made = Path(folder) / to.name
        subprocess.run(
            [*command, str(source), "-o", str(made)], check=True, capture_output=True, text=True, timeout=_SECONDS
        )
        made.replace(to)

"""Plug-ins: entry points of installed distributions, and the modules of ``user_dir``.

An entry point ``NAME = module`` or ``NAME = module:object`` in the group ``moe_train.KIND`` is imported when NAME is
looked up and not registered; importing it must register NAME. Nothing else of a distribution is imported.

``user_dir`` is read only from the command line or the environment of the current command, and passed by environment to
the processes that the command starts. No file (of a run, an export or a config) can name code to import.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Literal, get_args

from moe_train.errors import ConfigError, did_you_mean

Kind = Literal["strategies", "tasks", "corpora", "metrics", "loggers"]
KINDS: tuple[Kind, ...] = get_args(Kind)
USER_DIR = "MOE_TRAIN_USER_DIR"
_WORD = ("user_dir=", "+user_dir=", "++user_dir=")
_REMEDY = "repair or uninstall that distribution"
_SKIPPED = ("_", ".", "test_", "conftest", "setup")  # prefixes of files that other code imports


def load_plugin(kind: Kind, name: str, registered: Collection[str]) -> None:
    """Imports the entry point of that name, if there is one and ``registered`` does not contain the name.

    Args:
        registered: names of the registry that the entry point must add to.

    Raises:
        ConfigError: as in :func:`import_plugin`, or the plug-in does not register the name.
    """
    if name not in registered and (where := import_plugin(kind, name)) and name not in registered:
        raise ConfigError(f"a plug-in was imported but does not register '{name}' in {kind}", where, _REMEDY)


def import_plugin(kind: Kind, name: str) -> str:
    """Imports the entry point of that name and returns a description of its origin; "" if there is none.

    Raises:
        ConfigError: it cannot be imported, or several distributions have an entry point of that name.
    """
    found = [point for point in _points(kind) if point.name == name]
    if not found:
        return ""
    if len({point.value for point in found}) > 1:
        owners = " and ".join(sorted(_distribution(point) for point in found))
        raise ConfigError(f"{owners} both offer '{name}' in the group {found[0].group}", remedy="uninstall one of them")
    point = found[0]
    where = f"{_distribution(point)}, entry point {point.name} = {point.value}"
    try:
        point.load()
    except (Exception, SystemExit) as error:
        raise ConfigError(f"a plug-in cannot be imported ({_said(error)})", where, _REMEDY) from error
    return where


def offer_names(kind: Kind, word: str, registered: Collection[str]) -> str:
    """As :func:`moe_train.errors.did_you_mean`, including the names of installed entry points."""
    names = {*registered, *(point.name for point in _points(kind))}
    return did_you_mean(word, names) if names else "name one that user_dir=… or an installed distribution registers"


def _points(kind: Kind) -> list[EntryPoint]:
    return list(entry_points(group=f"moe_train.{kind}"))


def _distribution(point: EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist else "a distribution without a name"


# --- user_dir --------------------------------------------------------------------------------------------------------


def user_dir() -> str | None:
    """The ``user_dir`` of this command as an absolute path; None if there is none."""
    given = os.environ.get(USER_DIR)
    return os.path.abspath(Path(given).expanduser()) if given else None


def set_user_dir(folder: str | None) -> None:
    """Sets (None: clears) the ``user_dir`` of this command and of the processes that it starts."""
    if folder is None:
        os.environ.pop(USER_DIR, None)
    else:
        os.environ[USER_DIR] = folder
        os.environ[USER_DIR] = user_dir() or ""


def take_user_dir(words: Sequence[str]) -> list[str]:
    """Sets ``user_dir`` from the last ``user_dir=DIR`` of a command line, and returns the other words."""
    named = [word.partition("=")[2].strip("'\"") for word in words if word.startswith(_WORD)]
    if named or user_dir():
        given = named[-1] if named else user_dir()
        set_user_dir(None if given in ("", "null") else given)
    return [word for word in words if not word.startswith(_WORD)]


def import_user_dir() -> None:
    """Imports the modules and packages in ``user_dir``, once; does nothing without ``user_dir``.

    Modules whose names start with ``_`` or ``test_``, ``conftest`` and ``setup`` are skipped. The folder is appended to
    ``sys.path``, so that its modules can import one another but not shadow installed ones.

    Raises:
        ConfigError: the folder does not exist or contains no module, or a module cannot be imported or has the name of
            an installed one.
    """
    if not (given := user_dir()):
        return
    folder = Path(given)
    if not folder.is_dir():
        raise ConfigError("user_dir is not a folder", given, f"correct user_dir=… or the variable {USER_DIR}")
    names = sorted(_modules(folder))
    if not names and not (folder / "configs").is_dir():
        raise ConfigError("user_dir contains no Python module", given, "put files such as my_strategy.py there")
    if given not in sys.path:
        sys.path.append(given)
        importlib.invalidate_caches()
    for name in names:
        _import(folder, name)


def _modules(folder: Path) -> Iterator[str]:
    for path in folder.iterdir():
        is_package = (path / "__init__.py").is_file()
        if (path.suffix == ".py" or is_package) and not path.name.startswith(_SKIPPED):
            yield path.name if is_package else path.stem


def _import(folder: Path, name: str) -> None:
    file = folder / f"{name}.py" if not (folder / name / "__init__.py").is_file() else folder / name / "__init__.py"
    loaded = sys.modules.get(name)
    spec = loaded.__spec__ if loaded else importlib.util.find_spec(name) if name.isidentifier() else None
    origin = spec.origin if spec else None
    if not origin or not Path(origin).exists() or not Path(origin).samefile(file):
        taken = f"the name is taken by {origin or 'a module of Python'}" if spec else "the name is not a module name"
        raise ConfigError(f"a module of user_dir cannot be imported: {taken}", str(file), "give the file another name")
    try:
        importlib.import_module(name)
    except (Exception, SystemExit) as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
        place = f"{file}:{lines[-1]}" if lines else str(file)
        what = f"a module of user_dir cannot be imported ({_said(error)})"
        raise ConfigError(what, place, "correct it, or leave out user_dir=…") from error


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


# --- configs ---------------------------------------------------------------------------------------------------------


def config_folders() -> list[str]:
    """Folders with Hydra configs of plug-ins: ``configs`` in ``user_dir`` and in the packages of entry points."""
    parents = [given] if (given := user_dir()) else []
    values = {point.value.partition(":")[0].partition(".")[0].strip() for kind in KINDS for point in _points(kind)}
    for package in sorted(filter(str.isidentifier, values)):
        with suppress(ValueError):  # a module in sys.modules without a spec
            spec = importlib.util.find_spec(package)  # imports nothing: a name without dots
            parents += (spec.submodule_search_locations or []) if spec else []
    return [folder for parent in parents if os.path.isdir(folder := os.path.join(parent, "configs"))]

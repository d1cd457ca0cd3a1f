"""The checkpoints of a run: written as a whole, verified when read, independent of the layout that wrote them.

    checkpoints/
      step_40/          *.safetensors, state.json, manifest.json (sha256 of the others)
      step_60/
      averaged/         the mean of the last checkpoints' weights, model only
      last -> step_60   best -> step_40

A checkpoint is written as ``step_N.partial`` and renamed when all its files are on the disk.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn

from moe_train.errors import CheckpointError, DataError, UserError, error_from_json, error_to_json
from moe_train.training.checkpoint import checksums
from moe_train.training.checkpoint.dcp import check_shapes, load_tensors, save_tensors, shapes
from moe_train.training.checkpoint.state_dict import MODEL, count_tensors, model_tensors, whole_names
from moe_train.training.runtime.world import World
from moe_train.utils.json_files import read_object

STATE = "state.json"
_UNFINISHED = re.compile(r"(step_\d+|averaged)(\.removed\d*)?\.partial")  # what is being written or removed
LOG = logging.getLogger("moe_train")
T = TypeVar("T")


class CheckpointStore:
    """The folder ``checkpoints`` of a run.

    In a world every rank calls :meth:`save`, :meth:`verify`, :meth:`resolve`, :meth:`recovery_hint`,
    :meth:`broadcast_from_rank0` and :meth:`set_aside`. :meth:`point` and :meth:`prune` act on rank 0 only.
    """

    def __init__(self, folder: Path | str, world: World | None = None) -> None:
        self.folder = Path(folder)
        self.world = world or World()

    # -- finding ---------------------------------------------------------------------------------------------------

    def updates(self) -> list[int]:
        """Updates of which a finished checkpoint exists, increasing."""
        folders = (path for path in self.folder.glob("step_*") if path.is_dir() and not path.is_symlink())
        return sorted(update for path in folders if (update := _update_of(path)) is not None)

    def path(self, update: int) -> Path:
        """Where the checkpoint of an update is or would be."""
        return self.folder / f"step_{update}"

    def latest(self) -> Path | None:
        """The newest finished checkpoint, verified or not."""
        updates = self.updates()
        return self.path(updates[-1]) if updates else None

    def best(self) -> Path | None:
        """What ``best`` points to.

        A copy of a run may have no links. ``cp -rL`` replaces a link by a folder: then it is the checkpoint that the
        folder is a copy of. Other programs leave links out: then the newest checkpoint's state names it.
        """
        link = self.folder / "best"
        if link.is_symlink():
            return link.resolve() if link.exists() else None
        if link.is_dir():
            return next((path for path in map(self.path, self.updates()) if _same_checkpoint(path, link)), link)
        return self._noted_best()

    def _noted_best(self) -> Path | None:
        latest = self.latest()
        try:
            update = read_state(latest).get("best_update") if latest else None
        except CheckpointError:
            return None
        return self.path(update) if isinstance(update, int) and self.path(update).is_dir() else None

    def resolve(self, which: str | int) -> Path:
        """The verified folder of ``best``, ``last``, ``averaged``, ``step_40`` or ``40``.

        Raises:
            CheckpointError: there is none, or it is damaged (the remedy names a whole one, if any).
        """
        found = self.broadcast_from_rank0(lambda: self._find(str(which)))
        if found is None:
            known = [p.name for p in (*map(self.path, self.updates()), self.folder / "averaged") if p.is_dir()]
            remedy = f"there are: {', '.join(known)}" if known else "the run has written none yet"
            raise CheckpointError(f"there is no checkpoint '{which}'", str(self.folder), remedy)
        path = Path(found)
        try:
            self.verify(path)
        except CheckpointError as error:
            raise CheckpointError(error.what, error.where, self.recovery_hint(path)) from None
        return path

    def _find(self, which: str) -> str | None:
        if which == "last":
            path = self.latest()
        elif which == "best":
            link = self.folder / "best"
            if link.is_symlink() and not link.exists():  # the run has a best one: do not replace it by the newest
                what = f"the best checkpoint is {os.readlink(link)}, and that is not there"
                raise CheckpointError(what, str(link), "name another one: last, or an update's number")
            path = self.best() or self.latest()  # the newest if the run has no best one yet
        else:
            path = self.folder / (f"step_{which}" if which.isdecimal() else which)
        return str(path) if path is not None and path.is_dir() else None

    # -- reading ---------------------------------------------------------------------------------------------------

    def verify(self, path: Path) -> None:
        """Compares every file with its checksum; each rank checks a part of the files. Rank 0 reads the manifest.

        Raises:
            CheckpointError: on every rank, if any rank found a damaged file; names the file.
        """
        files = self.broadcast_from_rank0(lambda: checksums.read_manifest(path))
        mine = dict(sorted(files.items())[self.world.rank :: self.world.size])
        run_on_all_ranks(self.world, lambda: checksums.check_files(path, mine))

    def recovery_hint(self, damaged: Path) -> str:
        """Remedy for a damaged checkpoint: the newest whole one (for ``step_N``: before N). Every rank calls it."""
        damaged_update = _update_of(damaged)
        for update in reversed(self.broadcast_from_rank0(self.updates)):
            if damaged_update is not None and update >= damaged_update:
                continue
            other = self.path(update)
            try:
                self.verify(other)
            except CheckpointError:
                continue
            return (
                f"another checkpoint, {other.name}, is whole: remove {damaged}, or set "
                "training.checkpoint.damaged=skip, to resume from it"
            )
        return "no other checkpoint of this run is whole: train again in another run folder"

    def broadcast_from_rank0(self, read: Callable[[], T]) -> T:
        """Rank 0's result of ``read``, on every rank: hosts may see different states of a shared folder for a while.

        Args:
            read: called on rank 0; returns a value that JSON can hold.
        """
        value = run_on_all_ranks(self.world, read if self.world.main else lambda: None)
        return self.world.broadcast(value)  # type: ignore[return-value]

    # -- writing ---------------------------------------------------------------------------------------------------

    def save(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any], name: str) -> Path:
        """Writes a checkpoint and returns its folder. Every rank calls it with the tensors that it holds.

        Args:
            tensors: by checkpoint name (:mod:`moe_train.training.checkpoint.state_dict`).
            state: plain values for ``state.json``.
            name: ``step_N`` or ``averaged``.

        Raises:
            CheckpointError: on every rank, if writing failed on any; an earlier checkpoint of this name is unchanged.
        """
        final, partial = self.folder / name, self.folder / f"{name}.partial"
        try:
            self._on_rank0(lambda: _empty_folder(partial))
            run_on_all_ranks(self.world, lambda: save_tensors(partial, tensors, self.world.group), collective=True)
            self._on_rank0(lambda: checksums.write_synced(partial / STATE, json.dumps(dict(state), indent=1) + "\n"))
            self._write_checksums(partial)
            self._on_rank0(lambda: _rename(partial, final))
        except OSError as error:
            self._on_rank0(lambda: shutil.rmtree(partial, ignore_errors=True))
            raise self._failed(final, error) from error
        return final

    def _write_checksums(self, partial: Path) -> None:
        names = self.world.broadcast(sorted(p.name for p in partial.iterdir()) if self.world.main else [])
        mine = names[self.world.rank :: self.world.size]
        digests = run_on_all_ranks(self.world, lambda: {name: checksums.digest(partial / name) for name in mine})
        merged = {name: entry for part in self.world.gather(digests) for name, entry in part.items()}
        self._on_rank0(lambda: checksums.write_manifest(partial, merged))

    def _on_rank0(self, action: Callable[[], None]) -> None:
        run_on_all_ranks(self.world, action if self.world.main else lambda: None)

    def _failed(self, final: Path, error: OSError) -> CheckpointError:
        latest = self.latest()
        rest = f"{latest.name} is whole: the run resumes from it" if latest else "no earlier checkpoint exists"
        return CheckpointError(
            f"the checkpoint could not be written ({error.strerror or error})",
            str(final),
            f"make room on the disk and start the same command again; {rest}",
        )

    def point(self, name: str, update: int) -> None:
        """Makes ``best`` or ``last`` point to an update's checkpoint, in one step. Rank 0 does it."""
        if self.world.main:
            _move_folder_aside(self.folder / name)
            partial = self.folder / f".{name}.partial"
            partial.unlink(missing_ok=True)
            partial.symlink_to(self.path(update).name)
            os.replace(partial, self.folder / name)

    def set_aside(self, path: Path) -> Path:
        """Renames a damaged checkpoint, so that the run no longer finds it, and returns its new path.

        The name is ``step_N.damaged``, or the first unused one of ``step_N.damaged1``, … Every rank calls it.
        """

        def rename() -> str:
            aside = _first_unused(path.with_name(f"{path.name}.damaged{suffix}") for suffix in _suffixes())
            os.rename(path, aside)
            return aside.name

        return path.with_name(self.broadcast_from_rank0(rename))

    def prune(self, keep: int) -> None:
        """Removes all but the ``keep`` newest checkpoints and the best one. Rank 0 does it.

        If one cannot be removed (a file on NFS that is being read), this logs a warning; the next call tries again.
        """
        if not self.world.main:
            return
        best = self.best()
        for update in self.updates()[:-keep]:
            if best is None or self.path(update).name != best.name:
                with _warn_on_error(self.path(update)):
                    _rename_for_removal(self.path(update))
        for rest in self.folder.glob("*.partial"):
            if _UNFINISHED.fullmatch(rest.name):  # other .partial folders are the user's
                with _warn_on_error(rest):
                    shutil.rmtree(rest)


def read_state(path: Path) -> dict[str, Any]:
    """``state.json`` of a checkpoint.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    try:
        state = read_object(path / STATE)
    except DataError as error:
        raise CheckpointError(f"the checkpoint's state cannot be read: {error.what}", str(path / STATE)) from error
    if state is None:
        raise CheckpointError("the checkpoint's state is missing", str(path / STATE))
    return state


@contextmanager
def reading_state(path: Path) -> Iterator[None]:
    """Turns errors about values of a checkpoint's ``state.json`` into a CheckpointError that names the file."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        what = f"the checkpoint's state is damaged ({type(error).__name__}: {str(error)[:200]})"
        raise CheckpointError(what, str(path / STATE)) from error


def load_model(path: Path, model: nn.Module) -> None:
    """Loads the weights of a checkpoint (verified by its finder) into a model on any number of ranks, in place.

    Raises:
        CheckpointError: the model has other parameters.
    """
    tensors = model_tensors(model)
    _check_surplus(path, tensors, shapes(path))
    load_tensors(path, tensors)


def check_model(path: Path, model: nn.Module) -> None:
    """Compares a whole model, which may be on the meta device, with the tensors of a checkpoint.

    Raises:
        CheckpointError: the model has other parameters, or parameters of another shape.
    """
    known = shapes(path)
    if count_tensors(model) > len(known):  # before the names are made, since a config may ask for any number of experts
        what = f"the model has {count_tensors(model):,} tensors, and the checkpoint {len(known):,}"
        raise CheckpointError(what, str(path), "it is of another model")
    tensors = model_tensors(model)
    _check_surplus(path, tensors, known)
    check_shapes(path, tensors, known)


def _check_surplus(path: Path, tensors: Mapping[str, Tensor], known: Iterable[str]) -> None:
    surplus = {n for n in whole_names(known) if n.startswith(MODEL)} - whole_names(tensors)
    if surplus:
        names = ", ".join(sorted(n.removeprefix(MODEL) for n in surplus)[:3])
        what = f"the checkpoint has {len(surplus)} parameters that the model has not ({names} …)"
        raise CheckpointError(what, str(path), "it is of another model")


def run_on_all_ranks(world: World, action: Callable[[], T], collective: bool = False) -> T:
    """Runs ``action`` on every rank; if it fails on one, all raise that error, so that no rank waits for another.

    Args:
        collective: the action itself raises its error on every rank.
    """
    if collective or world.size == 1:
        return action()
    result, failure = None, None
    try:
        result = action()
    except (OSError, UserError) as error:
        failure = error
    failures = world.gather(error_to_json(failure) if failure is not None else None)
    first = next((rank for rank, content in enumerate(failures) if content is not None), None)
    if first is not None:
        if failure is not None and first == world.rank:
            raise failure
        raise error_from_json(failures[first] or {})
    return result  # type: ignore[return-value]


def _empty_folder(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _rename(partial: Path, final: Path) -> None:
    checksums.sync_folder(partial)
    # ``averaged`` exists if max_updates was raised: the run writes it again.
    former = _rename_for_removal(final) if final.exists() else None
    try:
        os.rename(partial, final)
    except OSError:
        if former is not None:
            os.rename(former, final)
        raise
    checksums.sync_folder(final.parent)
    if former is not None:
        shutil.rmtree(former, ignore_errors=True)


def _rename_for_removal(folder: Path) -> Path:
    """Renames a folder before it is removed: a half-removed folder must not look like a checkpoint."""
    # A folder of an earlier removal that failed may have the first name.
    doomed = _first_unused(folder.with_name(f"{folder.name}.removed{suffix}.partial") for suffix in _suffixes())
    os.rename(folder, doomed)
    return doomed


def _update_of(path: Path) -> int | None:
    """N if the folder's name is ``step_N``."""
    number = path.name.removeprefix("step_")
    return int(number) if number != path.name and number.isdecimal() else None


def _suffixes() -> Iterator[str]:
    """``""``, ``"1"``, ``"2"``, …"""
    return (str(number or "") for number in count())


def _first_unused(names: Iterator[Path]) -> Path:
    return next(name for name in names if not os.path.lexists(name))


def _same_checkpoint(one: Path, other: Path) -> bool:
    """Whether two folders are the same checkpoint, by their manifests."""
    try:
        return checksums.read_manifest(one) == checksums.read_manifest(other)
    except CheckpointError:
        return False


def _move_folder_aside(link: Path) -> None:
    """If a folder is where the link must be, as in a copy made by ``cp -rL``, renames the folder."""
    if link.is_dir() and not link.is_symlink():
        aside = _first_unused(link.with_name(f"{link.name}.copied{number}") for number in _suffixes())
        os.replace(link, aside)
        LOG.warning("%s was a folder and not a link: it is now %s, and can be removed", link, aside.name)


@contextmanager
def _warn_on_error(folder: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:  # removed by another process
        pass
    except OSError as error:
        LOG.warning("%s cannot be removed yet: %s", folder, error.strerror or error)

"""Puts a folder into its place as a whole: it is made beside it, renamed when complete, and recovered after a kill.

While ``OUT`` is made, these stand beside it:

    .OUT.lock       locked by the process that makes OUT; removed at the end
    OUT.partial/    the work folder, or OUT.partial-2 … where that name is taken
        .moe_train.json     marker: whose work folder this is; locked as long as its process lives
        new/                what is to become OUT
        old/ or kept/       what stood at OUT, from the first rename on; old/ is removed, kept/ becomes OUT.replaced

Only a work folder with a marker of its own and without a living lock is ever removed. Whatever else stands beside OUT,
whoever put it there and whatever its name, is left alone.

A process may be killed at any point. Before OUT has been moved into the work folder, OUT is untouched and the next
start removes the work folder. From then on ``new/`` is complete: the next start moves it to OUT.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any

from moe_train.errors import ConfigError
from moe_train.utils.atomic_io import sync_folder

MARKER = ".moe_train.json"
_NEW, _OLD, _KEPT = "new", "old", "kept"
_LOCK_TEXT = b"moe_train lock: "
LOG = logging.getLogger("moe_train")


class FolderReplacement:
    """A folder that is being made for a place; make one with :func:`replacing_folder`."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self._open = ExitStack()
        self._work: Path | None = None
        self._before: int | None = None

    def begin(self) -> Path:
        """Makes an empty folder in which the new content is to be written.

        Raises:
            ConfigError: the place is a mount point, which cannot be renamed.
            OSError: it cannot be written to.
        """
        if os.path.ismount(self.place):
            raise ConfigError("a mount point cannot be replaced", str(self.place), "choose a folder inside it: out=…")
        self._before = _content(self.place)
        if self._before is not None and not os.access(self.place, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self.place))
        self._work = _make_work_folder(self.place, self._open)
        (self._work / _NEW).mkdir()
        return self._work / _NEW

    def finish(self, keep: bool = False) -> Path | None:
        """Moves the new folder to its place.

        Args:
            keep: what stood there is not removed but renamed, to ``OUT.replaced`` or the next such name that is free.

        Returns:
            Where the former folder is kept, if it is.

        Raises:
            ConfigError: since :meth:`begin` something else has come to the place.
            OSError: renaming failed; what stood there still does.
        """
        assert self._work is not None
        if _content(self.place) != self._before:
            what = "something else has been put here while the folder was being made"
            raise ConfigError(what, str(self.place), "move it away, or choose another out=…, and start again")
        if self._before is None:
            os.rename(self._work / _NEW, self.place)  # fails where something has come there by now
        else:
            os.rename(self.place, self._work / (_KEPT if keep else _OLD))
        kept = _complete(self.place, self._work)
        self._work = None
        return kept

    def close(self) -> None:
        """Completes a replacement that was interrupted between its renames, and removes the work folder."""
        if self._work is not None:
            _complete(self.place, self._work)
        self._open.close()


@contextmanager
def replacing_folder(out: Path) -> Iterator[FolderReplacement]:
    """While entered, no other process makes this folder. What killed processes have left is recovered or removed.

    Symbolic links are followed: what they point to is replaced.

    Raises:
        ConfigError: another process makes it.
        OSError: there is no place for it.
    """
    place = Path(os.path.realpath(out))
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(place.parent)) from None
    with _locked(place):
        for work in _work_folders(place):
            with ExitStack() as stack:
                if _is_left_over(work, place, stack):
                    _recover(place, work)
        replacement = FolderReplacement(place)
        try:
            yield replacement
        finally:
            replacement.close()


def recover_folder(out: Path) -> None:
    """Completes a replacement that was cut off between its renames, where the folder is missing for it.

    Raises:
        ConfigError: another process makes the folder.
    """
    place = Path(os.path.realpath(out))
    if not os.path.lexists(place) and any((work / MARKER).exists() for work in _work_folders(place)):
        with replacing_folder(out):
            pass


def _content(place: Path) -> int | None:
    """Tells one folder from another; None where there is nothing, or an empty folder."""
    try:
        return place.stat().st_ino if any(place.iterdir()) else None
    except FileNotFoundError:
        return None


def _complete(place: Path, work: Path) -> Path | None:
    """Ends a replacement of which the first rename was done, then removes the work folder.

    Returns:
        Where the former folder is kept, if it is.

    Raises:
        OSError: the new folder cannot come to its place, nor the former one back to it: the work folder stays.
    """
    new = work / _NEW
    moved = next((folder for folder in (work / _OLD, work / _KEPT) if os.path.lexists(folder)), None)
    if moved is not None and new.exists():
        try:
            os.rename(new, place)
        except OSError:
            os.rename(moved, place)
            raise
    elif moved is not None and not os.path.lexists(place):  # somebody has taken the new one away
        os.rename(moved, place)
    kept = None
    if os.path.lexists(work / _KEPT):
        kept = next(name for name in _names(place, "replaced") if not os.path.lexists(name))
        os.rename(work / _KEPT, kept)
    with suppress(OSError):  # the names are on the disk before the former folder goes
        sync_folder(place.parent)
    try:
        for folder in (new, work / _OLD):
            if os.path.lexists(folder):
                shutil.rmtree(folder)
        (work / MARKER).unlink(missing_ok=True)
        with suppress(FileNotFoundError):
            work.rmdir()
    except OSError as error:
        LOG.warning("%s cannot be removed: %s", work, error.strerror or error)
    return kept


def _recover(place: Path, work: Path) -> None:
    try:
        _complete(place, work)
    except OSError as error:
        LOG.warning("%s is left alone, since %s: %s", work, place, error.strerror or error)


def _work_folders(place: Path) -> list[Path]:
    """Neighbours that may be work folders, by their names."""
    return sorted(place.parent.glob(f"{glob.escape(place.name)}.partial*"))


def _names(place: Path, what: str) -> Iterator[Path]:
    """``OUT.what``, ``OUT.what-2``, and so on."""
    return (place.with_name(f"{place.name}.{what}{f'-{n}' if n > 1 else ''}") for n in count(1))


# -- markers and locks -------------------------------------------------------------------------------------------------


def _make_work_folder(place: Path, stack: ExitStack) -> Path:
    for work in _names(place, "partial"):
        with suppress(FileExistsError):
            work.mkdir()
            break
    text = json.dumps(_mark(work, place) | _machine()).encode() + b"\n"
    descriptor = os.open(work / MARKER, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    stack.callback(os.close, descriptor)
    os.write(descriptor, text)
    with suppress(OSError):  # a file system without locks
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return work


def _mark(work: Path, place: Path) -> dict[str, Any]:
    """Holds for this very folder alone, neither for a copy of it nor under another name."""
    return {"moe_train": "work folder", "place": place.name, "name": work.name, "inode": work.stat().st_ino}


def _machine() -> dict[str, Any]:
    """Two processes with the same host name or the same boot see each other's locks."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return {"host": os.uname().nodename, "boot": boot.read_text().strip() if boot.is_file() else ""}


def _is_left_over(work: Path, place: Path, stack: ExitStack) -> bool:
    """Whether this is a work folder for the place whose process has ended; its marker stays locked by ``stack``."""
    if not (work / MARKER).is_file():
        return False
    try:
        stream = stack.enter_context((work / MARKER).open("r+b"))
        mark = json.loads(stream.read(10_000))
        if {key: mark[key] for key in _mark(work, place)} != _mark(work, place):
            return False
        if all(mark[key] != value for key, value in _machine().items()):
            LOG.warning("%s is left alone: it was made on %s; remove it if nothing runs there", work, mark["host"])
            return False
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):  # not ours, in use, or nobody can tell
        return False
    return True


@contextmanager
def _locked(place: Path) -> Iterator[None]:
    path = place.with_name(f".{place.name}.lock")
    with ExitStack() as stack:
        while True:
            descriptor, made = _open_lock(path)
            stack.callback(os.close, descriptor)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                who = os.pread(descriptor, 100, 0).removeprefix(_LOCK_TEXT).decode(errors="replace").strip()
                raise ConfigError(
                    f"another process is making this folder ({who or 'it has just begun'})",
                    str(place),
                    "wait until it has ended, or choose another out=…",
                ) from None
            except OSError as error:
                LOG.warning("%s cannot be locked (%s): see to it that one process alone makes it", place, error)
            if _is_at(descriptor, path):
                break
        # Only a lock file of ours is written to and removed: one by that name may be the user's.
        ours = made or os.pread(descriptor, len(_LOCK_TEXT), 0) == _LOCK_TEXT
        if ours:
            os.ftruncate(descriptor, os.pwrite(descriptor, _lock_text(), 0))
        try:
            yield
        finally:
            if ours and _is_at(descriptor, path):
                path.unlink()


def _lock_text() -> bytes:
    return _LOCK_TEXT + f"process {os.getpid()} on {os.uname().nodename}\n".encode()


def _open_lock(path: Path) -> tuple[int, bool]:
    """A descriptor, and whether the file was made just now."""
    while True:
        with suppress(FileExistsError):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
            os.write(descriptor, _lock_text())
            return descriptor, True
        with suppress(FileNotFoundError):  # removed since
            return os.open(path, os.O_RDWR | os.O_NOFOLLOW), False


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether the open file still has this name."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False

"""Replaces a folder as a whole: the new content is written next to it, renamed when complete, recovered after a kill.

While ``OUT`` is written, these are next to it:

    .OUT.lock       locked by the process that writes OUT; removed at the end
    OUT.partial/    the work folder, or OUT.partial-2 … if that name is taken
        .moe_train.json     marker of the work folder; locked while its process lives
        new/                the future OUT
        old/ or kept/       the former OUT, after the first rename; old/ is removed, kept/ becomes OUT.replaced

Only a work folder with a valid marker and without a live lock is ever removed. All other files next to OUT are left
alone.

A process may be killed at any point. Until OUT has been moved into the work folder, OUT is unchanged and the next start
removes the work folder. After that ``new/`` is complete, and the next start moves it to OUT.
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
    """A replacement in progress; created by :func:`replacing_folder`."""

    def __init__(self, target: Path) -> None:
        self.target = target
        self._open = ExitStack()
        self._work: Path | None = None
        self._before: int | None = None

    def begin(self) -> Path:
        """Creates an empty folder for the new content.

        Raises:
            ConfigError: the target is a mount point, which cannot be renamed.
            OSError: the folder cannot be written.
        """
        if os.path.ismount(self.target):
            raise ConfigError("a mount point cannot be replaced", str(self.target), "choose a folder inside it: out=…")
        self._before = _content(self.target)
        if self._before is not None and not os.access(self.target, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self.target))
        self._work = _make_work_folder(self.target, self._open)
        (self._work / _NEW).mkdir()
        return self._work / _NEW

    def finish(self, keep: bool = False) -> Path | None:
        """Moves the new folder to the target.

        Args:
            keep: rename the former folder to ``OUT.replaced`` (or the next free such name) instead of removing it.

        Returns:
            The path of the kept former folder, if any.

        Raises:
            ConfigError: the target has changed since :meth:`begin`.
            OSError: renaming failed; the former folder is unchanged.
        """
        assert self._work is not None
        if _content(self.target) != self._before:
            what = "something else has been put here while the folder was being written"
            raise ConfigError(what, str(self.target), "move it away, or choose another out=…, and start again")
        if self._before is None:
            os.rename(self._work / _NEW, self.target)  # fails if the target exists by now
        else:
            os.rename(self.target, self._work / (_KEPT if keep else _OLD))
        kept = _complete(self.target, self._work)
        self._work = None
        return kept

    def close(self) -> None:
        """Completes a replacement that was interrupted between its renames, and removes the work folder."""
        if self._work is not None:
            _complete(self.target, self._work)
        self._open.close()


@contextmanager
def replacing_folder(out: Path) -> Iterator[FolderReplacement]:
    """Context in which no other process can replace this folder; recovers or removes leftovers of killed processes.

    Symbolic links are followed: their target is replaced.

    Raises:
        ConfigError: another process writes the folder.
        OSError: the parent folder cannot be created.
    """
    target = Path(os.path.realpath(out))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(target.parent)) from None
    with _locked(target):
        for work in _work_folders(target):
            with ExitStack() as stack:
                if _is_left_over(work, target, stack):
                    _recover(target, work)
        replacement = FolderReplacement(target)
        try:
            yield replacement
        finally:
            replacement.close()


def recover_folder(out: Path) -> None:
    """Completes a replacement that was interrupted between its renames, so that the folder is missing.

    Raises:
        ConfigError: another process writes the folder.
    """
    target = Path(os.path.realpath(out))
    if not os.path.lexists(target) and any((work / MARKER).exists() for work in _work_folders(target)):
        with replacing_folder(out):
            pass


def _content(target: Path) -> int | None:
    """The folder's inode number; None if there is no folder or an empty one."""
    try:
        return target.stat().st_ino if any(target.iterdir()) else None
    except FileNotFoundError:
        return None


def _complete(target: Path, work: Path) -> Path | None:
    """Completes a replacement if its first rename was done, then removes the work folder.

    Returns:
        The path of the kept former folder, if any.

    Raises:
        OSError: neither the new nor the former folder can be moved to the target: the work folder is kept.
    """
    new = work / _NEW
    moved = next((folder for folder in (work / _OLD, work / _KEPT) if os.path.lexists(folder)), None)
    if moved is not None and new.exists():
        try:
            os.rename(new, target)
        except OSError:
            os.rename(moved, target)
            raise
    elif moved is not None and not os.path.lexists(target):  # the new folder was removed by someone
        os.rename(moved, target)
    kept = None
    if os.path.lexists(work / _KEPT):
        kept = next(name for name in _names(target, "replaced") if not os.path.lexists(name))
        os.rename(work / _KEPT, kept)
    with suppress(OSError):  # the renames must be on disk before the former folder is removed
        sync_folder(target.parent)
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


def _recover(target: Path, work: Path) -> None:
    try:
        _complete(target, work)
    except OSError as error:
        LOG.warning("%s is left alone, since %s: %s", work, target, error.strerror or error)


def _work_folders(target: Path) -> list[Path]:
    """Folders next to the target whose names are those of work folders."""
    return sorted(target.parent.glob(f"{glob.escape(target.name)}.partial*"))


def _names(target: Path, what: str) -> Iterator[Path]:
    """``OUT.what``, ``OUT.what-2``, and so on."""
    return (target.with_name(f"{target.name}.{what}{f'-{n}' if n > 1 else ''}") for n in count(1))


# -- markers and locks -------------------------------------------------------------------------------------------------


def _make_work_folder(target: Path, stack: ExitStack) -> Path:
    for work in _names(target, "partial"):
        with suppress(FileExistsError):
            work.mkdir()
            break
    text = json.dumps(_mark(work, target) | _machine()).encode() + b"\n"
    descriptor = os.open(work / MARKER, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    stack.callback(os.close, descriptor)
    os.write(descriptor, text)
    with suppress(OSError):  # a file system without locks
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return work


def _mark(work: Path, target: Path) -> dict[str, Any]:
    """Content of the marker, valid for this folder only, not for a copy or under another name."""
    return {"moe_train": "work folder", "place": target.name, "name": work.name, "inode": work.stat().st_ino}


def _machine() -> dict[str, Any]:
    """Host and boot id; processes with the same host name or boot id see each other's locks."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return {"host": os.uname().nodename, "boot": boot.read_text().strip() if boot.is_file() else ""}


def _is_left_over(work: Path, target: Path, stack: ExitStack) -> bool:
    """Whether this is a work folder for the target whose process has ended; ``stack`` keeps its marker locked."""
    if not (work / MARKER).is_file():
        return False
    try:
        stream = stack.enter_context((work / MARKER).open("r+b"))
        mark = json.loads(stream.read(10_000))
        if {key: mark[key] for key in _mark(work, target)} != _mark(work, target):
            return False
        if all(mark[key] != value for key, value in _machine().items()):
            LOG.warning("%s is left alone: it was made on %s; remove it if nothing runs there", work, mark["host"])
            return False
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):  # not a work folder, in use, or unknown
        return False
    return True


@contextmanager
def _locked(target: Path) -> Iterator[None]:
    path = target.with_name(f".{target.name}.lock")
    with ExitStack() as stack:
        while True:
            descriptor, made = _open_lock(path)
            stack.callback(os.close, descriptor)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                who = os.pread(descriptor, 100, 0).removeprefix(_LOCK_TEXT).decode(errors="replace").strip()
                raise ConfigError(
                    f"another process is writing this folder ({who or 'it has just started'})",
                    str(target),
                    "wait until it has ended, or choose another out=…",
                ) from None
            except OSError as error:
                LOG.warning("%s cannot be locked (%s): make sure that only one process writes it", target, error)
            if _is_at(descriptor, path):
                break
        # Only our lock file is written and removed: a file of that name may be the user's.
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
    """A descriptor, and whether the file was created by this call."""
    while True:
        with suppress(FileExistsError):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
            os.write(descriptor, _lock_text())
            return descriptor, True
        with suppress(FileNotFoundError):  # removed since
            return os.open(path, os.O_RDWR | os.O_NOFOLLOW), False


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether the open file still has this path."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False

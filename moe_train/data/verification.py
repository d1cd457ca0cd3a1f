"""SHA-256 of data files, and records by which a file that has not changed is not read for it again.

A record lies in the user's cache folder, ``$XDG_CACHE_HOME/moe_train/verified``, one per host and data folder, and
never in the data folder. It holds, of each file whose checksum was taken, device, inode, size, and the times at which
its content (mtime) and its inode (ctime) were last changed. A file of which any of them differs is read again.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_train.config.run import DataVerify
from moe_train.data.text.lines import reading, sha256
from moe_train.errors import DataError, note
from moe_train.utils.atomic_io import replace_text
from moe_train.utils.process_map import available_cores

_log = logging.getLogger(__name__)

# A file that was written within this many nanoseconds before it was read may be written again without its times
# changing, as far as they are kept (2 s on FAT and some network file systems): it is not recorded.
_SETTLED = 2_000_000_000
_THREADS = 4
_WORTH_SAYING = 2 << 30  # bytes that take some seconds to read

Stamp = tuple[int, int, int, int, int]


@dataclass(frozen=True)
class InputFiles:
    """Files of which no manifest has the checksums, so that a run keeps them.

    Attributes:
        root: their folder.
        names: paths below it.
    """

    root: Path
    names: tuple[str, ...] = ()


def file_digests(root: Path, names: Sequence[str], how: DataVerify = "once") -> dict[str, str]:
    """Checksums of files.

    Args:
        root: their folder.
        names: paths below it.
        how: ``once`` takes the checksum of a file that has not changed since it was taken from the record; ``always``
            reads every file; ``never`` reads none and returns nothing.

    Raises:
        DataError: a file cannot be read, or changes while it is read (it is named).
    """
    if how == "never":
        return {}
    record = _Record(root)
    stamps = {name: _stamp(root / name) for name in names}
    known = record.digests(stamps) if how == "once" else {}
    missing = sorted(stamps.keys() - known.keys(), key=lambda name: -stamps[name][2])
    size = sum(stamps[name][2] for name in missing)
    if size >= _WORTH_SAYING:
        note(f"taking the checksums of {size / 1e9:,.1f} GB of data in {root} (data_verify={how})")
    start = time.time_ns()
    with ThreadPoolExecutor(min(_THREADS, available_cores())) as threads:
        taken = dict(zip(missing, threads.map(lambda name: _digest(root / name, stamps[name]), missing), strict=True))
    record.add({name: (stamps[name], digest) for name, digest in taken.items() if _is_settled(stamps[name], start)})
    return {**known, **taken}


def _stamp(path: Path) -> Stamp:
    """Device, inode, size, mtime and ctime: what changes with the content."""
    with reading(path):
        found = path.stat()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _digest(path: Path, stamp: Stamp) -> str:
    with reading(path):
        digest = sha256(path)
    if _stamp(path) != stamp:
        raise DataError("the file changes while it is read", str(path), "wait until it is written, and start again")
    return digest


def _is_settled(stamp: Stamp, read: int) -> bool:
    return max(stamp[3:]) < read - _SETTLED


class _Record:
    """The record of one folder on this host. Where it cannot be read or kept, files are read each time."""

    def __init__(self, root: Path) -> None:
        # One data folder may be seen by hosts that share a home and number its devices each in their own way.
        self.about = {"format": 1, "host": socket.gethostname(), "folder": str(root.resolve())}
        name = hashlib.sha256(f"{self.about['host']}\n{self.about['folder']}".encode("utf-8", "surrogateescape"))
        folder = _cache_folder()
        self.path = folder / f"{name.hexdigest()[:32]}.json" if folder else None

    def digests(self, stamps: Mapping[str, Stamp]) -> dict[str, str]:
        """Checksums of the files that have these stamps still."""
        found = self._files()
        return {name: str(found[name][-1]) for name, stamp in stamps.items() if found.get(name, [])[:-1] == [*stamp]}

    def add(self, taken: Mapping[str, tuple[Stamp, str]]) -> None:
        """Adds checksums that were taken from files with these stamps."""
        if self.path is None or not taken:
            return
        entries = {name: [*stamp, digest] for name, (stamp, digest) in taken.items()}
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with _locked(self.path.with_suffix(".lock")):  # ranks of one host add to one record
                content = {**self.about, "files": {**self._files(), **entries}}
                replace_text(self.path, json.dumps(content) + "\n")
        except OSError as error:
            _log.debug("checksums cannot be kept in %s (%s)", self.path, error)

    def _files(self) -> dict[str, list[Any]]:
        """Name → device, inode, size, mtime, ctime, checksum."""
        if self.path is None:
            return {}
        try:
            if self.path.stat().st_uid != os.getuid():  # somebody else says what we have read
                return {}
            content = json.loads(self.path.read_text(encoding="utf-8"))
            files = content["files"]
            return {name: entry for name, entry in files.items() if isinstance(entry, list) and len(entry) == 6}
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
            return {}


def _cache_folder() -> Path | None:
    """The user's own folder for records; None where no home is known."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moe_train" / "verified"
    except RuntimeError:
        return None


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("a") as stream:
        with suppress(OSError):  # file systems without locks: of two that write at once, one is forgotten
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield

"""SHA-256 of data files, with a cache, so that unchanged files are not read again.

The cache is a file per host and data folder in ``$XDG_CACHE_HOME/moe_train/verified``, never in the data folder. It
contains, for each file, its checksum, device, inode, size, and the times of the last change of its content (mtime) and
its inode (ctime). A file of which any of these differs is read again.
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

# A file that was written within this many nanoseconds before it was read could be written again without a change of its
# times (their resolution is 2 s on FAT and some network file systems): its checksum is not cached.
_MIN_AGE = 2_000_000_000
_THREADS = 4
_NOTE_BYTES = 2 << 30  # from this size on reading takes some seconds, and a note is printed

Stamp = tuple[int, int, int, int, int]


@dataclass(frozen=True)
class InputFiles:
    """Files that have no manifest, so that a run records their checksums.

    Attributes:
        root: their folder.
        names: paths below it.
    """

    root: Path
    names: tuple[str, ...] = ()


def sha256_of_files(root: Path, names: Sequence[str], how: DataVerify = "once") -> dict[str, str]:
    """Checksums of files.

    Args:
        root: their folder.
        names: paths below it.
        how: ``once`` uses the cached checksum of an unchanged file; ``always`` reads every file; ``never`` reads none,
            and the result is empty.

    Raises:
        DataError: a file cannot be read, or changes while it is read.
    """
    if how == "never":
        return {}
    cache = _Cache(root)
    stamps = {name: _stamp(root / name) for name in names}
    known = cache.digests(stamps) if how == "once" else {}
    missing = sorted(stamps.keys() - known.keys(), key=lambda name: -stamps[name][2])
    size = sum(stamps[name][2] for name in missing)
    if size >= _NOTE_BYTES:
        note(f"computing checksums of {size / 1e9:,.1f} GB of data in {root} (data_verify={how})")
    start = time.time_ns()
    with ThreadPoolExecutor(min(_THREADS, available_cores())) as threads:
        taken = dict(zip(missing, threads.map(lambda name: _digest(root / name, stamps[name]), missing), strict=True))
    cache.add(
        {name: (stamps[name], digest) for name, digest in taken.items() if max(stamps[name][3:]) < start - _MIN_AGE}
    )
    return {**known, **taken}


def _stamp(path: Path) -> Stamp:
    """Device, inode, size, mtime and ctime, which change with the content."""
    with reading(path):
        found = path.stat()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _digest(path: Path, stamp: Stamp) -> str:
    with reading(path):
        digest = sha256(path)
    if _stamp(path) != stamp:
        raise DataError("the file changes while it is read", str(path), "wait until it is complete, and start again")
    return digest


class _Cache:
    """Cached checksums of one folder on this host. Without a cache that can be read, all files are read."""

    def __init__(self, root: Path) -> None:
        # Hosts that share a home folder may have different device numbers for one data folder.
        self.about = {"format": 1, "host": socket.gethostname(), "folder": str(root.resolve())}
        name = hashlib.sha256(f"{self.about['host']}\n{self.about['folder']}".encode("utf-8", "surrogateescape"))
        folder = _cache_folder()
        self.path = folder / f"{name.hexdigest()[:32]}.json" if folder else None

    def digests(self, stamps: Mapping[str, Stamp]) -> dict[str, str]:
        """Checksums of the files that still have these stamps."""
        found = self._files()
        return {name: str(found[name][-1]) for name, stamp in stamps.items() if found.get(name, [])[:-1] == [*stamp]}

    def add(self, taken: Mapping[str, tuple[Stamp, str]]) -> None:
        """Adds checksums of files with these stamps."""
        if self.path is None or not taken:
            return
        entries = {name: [*stamp, digest] for name, (stamp, digest) in taken.items()}
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with _locked(self.path.with_suffix(".lock")):  # ranks of one host write the same file
                content = {**self.about, "files": {**self._files(), **entries}}
                replace_text(self.path, json.dumps(content) + "\n")
        except OSError as error:
            _log.debug("checksums cannot be cached in %s (%s)", self.path, error)

    def _files(self) -> dict[str, list[Any]]:
        """Name → device, inode, size, mtime, ctime, checksum."""
        if self.path is None:
            return {}
        try:
            if self.path.stat().st_uid != os.getuid():  # written by another user
                return {}
            content = json.loads(self.path.read_text(encoding="utf-8"))
            files = content["files"]
            return {name: entry for name, entry in files.items() if isinstance(entry, list) and len(entry) == 6}
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
            return {}


def _cache_folder() -> Path | None:
    """The user's cache folder; None without a home folder."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moe_train" / "verified"
    except RuntimeError:
        return None


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("a") as stream:
        with suppress(OSError):  # file systems without locks: of two concurrent writes one is lost
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield

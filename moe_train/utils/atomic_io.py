"""Atomic file writes: after a crash a file has its old or its new content."""

from __future__ import annotations

import os
import stat
import uuid
from pathlib import Path


def write_synced(path: Path, text: str) -> None:
    """Writes a text file and syncs it to disk. Undecodable bytes of file names are written as escapes."""
    with path.open("w", encoding="utf-8", errors="backslashreplace") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def replace_text(path: Path, text: str) -> None:
    """Replaces a text file atomically: readers see the old or the new content. Its permissions stay.

    Several processes may write at the same time: the last one wins. The target of a link is replaced, not the link.
    Devices and pipes are written to.
    """
    path = path.resolve() if path.is_symlink() else path
    former = path.stat() if path.exists() else None
    if former is not None and not stat.S_ISREG(former.st_mode):
        path.write_text(text, encoding="utf-8", errors="backslashreplace")
        return
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.partial")
    try:
        write_synced(partial, text)
        if former is not None:
            partial.chmod(stat.S_IMODE(former.st_mode))
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def sync_folder(folder: Path) -> None:
    """Syncs a folder's entries (created or renamed files) to disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

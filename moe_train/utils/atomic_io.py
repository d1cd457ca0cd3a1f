"""Atomic file writes: after a crash a file has its old or its new content."""

from __future__ import annotations

import os
import uuid
from pathlib import Path


def write_synced(path: Path, text: str) -> None:
    """Writes a text file and syncs it to disk. Undecodable bytes of file names are written as escapes."""
    with path.open("w", encoding="utf-8", errors="backslashreplace") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def replace_text(path: Path, text: str) -> None:
    """Replaces a text file atomically: readers see the old or the new content.

    Several processes may write at the same time: the last one wins.
    """
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.partial")
    try:
        write_synced(partial, text)
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

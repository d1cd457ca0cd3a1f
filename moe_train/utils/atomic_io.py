"""Writing files so that a crash leaves the old content or the new one, and so that a rename follows what it names."""

from __future__ import annotations

import os
import uuid
from pathlib import Path


def write_synced(path: Path, text: str) -> None:
    """Writes a text file and waits until it is on the disk. Bytes of file names that are no text become escapes."""
    with path.open("w", encoding="utf-8", errors="backslashreplace") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def replace_text(path: Path, text: str) -> None:
    """Writes a text file so that readers see the old one or the new one, never a part.

    Several processes may write it at once: the last one's text stays.
    """
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.partial")
    try:
        write_synced(partial, text)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def sync_folder(folder: Path) -> None:
    """Waits until a folder's entries (created or renamed files) are on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

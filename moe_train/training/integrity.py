"""A folder of files with a manifest of their checksums: how a checkpoint proves that it is whole."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_train.errors import CheckpointError

MANIFEST = "manifest.json"


def digest(path: Path) -> dict[str, Any]:
    """``{"sha256": …, "bytes": …}`` of a file."""
    with path.open("rb") as stream:
        return {"sha256": hashlib.file_digest(stream, "sha256").hexdigest(), "bytes": path.stat().st_size}


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


def why_not_writable(folder: Path) -> str:
    """Why nothing can be written into a folder, which is made where it is missing; "" where it can."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return ""
    except OSError as error:
        return error.strerror or str(error)


def sync_folder(folder: Path) -> None:
    """Waits until a folder's entries (created or renamed files) are on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_manifest(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    """Writes the manifest; ``files``: relative path → :func:`digest`."""
    content = {"format": 1, "files": dict(sorted(files.items()))}
    write_synced(folder / MANIFEST, json.dumps(content, indent=1) + "\n")


def read_manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """Relative path → expected digest.

    Raises:
        CheckpointError: there is no manifest, or it cannot be read.
    """
    path = folder / MANIFEST
    try:
        files = json.loads(path.read_text(encoding="utf-8"))["files"]
        if not isinstance(files, dict) or any(Path(name).is_absolute() or ".." in Path(name).parts for name in files):
            raise ValueError("no list of files")
        return files
    except FileNotFoundError:
        raise CheckpointError("the checkpoint's manifest is missing", str(path)) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"the checkpoint's manifest cannot be read ({error})", str(path)) from error


def check_files(folder: Path, files: Mapping[str, Mapping[str, Any]] | None = None) -> None:
    """Compares files with the manifest.

    Args:
        files: this part of the manifest only (ranks share the work); None: all of it.

    Raises:
        CheckpointError: names the first file that is missing, truncated, altered, or cannot be read.
    """
    for name, expected in (read_manifest(folder) if files is None else files).items():
        try:
            _check_file(folder / name, expected)
        except OSError as error:
            what = f"a file of the checkpoint cannot be read ({error.strerror or error})"
            raise CheckpointError(what, str(folder / name)) from error


def _check_file(path: Path, expected: Mapping[str, Any]) -> None:
    if not path.is_file():
        raise CheckpointError("a file of the checkpoint is missing", str(path))
    size = path.stat().st_size
    if size != expected["bytes"]:
        raise CheckpointError(
            f"a file of the checkpoint is truncated or altered: {size} bytes instead of {expected['bytes']}",
            str(path),
        )
    if digest(path)["sha256"] != expected["sha256"]:
        raise CheckpointError("a file of the checkpoint is altered: its checksum is not the manifest's", str(path))

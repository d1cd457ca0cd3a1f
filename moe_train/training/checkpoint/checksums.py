"""A folder's manifest of checksums, by which a checkpoint is verified."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_train.errors import CheckpointError, DataError
from moe_train.utils.atomic_io import replace_text, sync_folder, write_synced
from moe_train.utils.json_files import file_digests, read_object

__all__ = [
    "MANIFEST",
    "check_files",
    "digest",
    "read_manifest",
    "replace_text",
    "sync_folder",
    "write_manifest",
    "write_synced",
]

MANIFEST = "manifest.json"
_DESCRIPTIONS = ("config.json", "state.json", "data/manifest.json")  # read together with the weights if they exist


def digest(path: Path) -> dict[str, Any]:
    """``{"sha256": …, "bytes": …}`` of a file."""
    with path.open("rb") as stream:
        return {"sha256": hashlib.file_digest(stream, "sha256").hexdigest(), "bytes": path.stat().st_size}


def why_not_writable(folder: Path) -> str:
    """Why nothing can be written into a folder (made if it is missing); "" if it can."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return ""
    except OSError as error:
        return error.strerror or str(error)


def write_manifest(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    """Writes the manifest; ``files``: relative path → :func:`digest`."""
    content = {"format": 1, "files": dict(sorted(files.items()))}
    write_synced(folder / MANIFEST, json.dumps(content, indent=1) + "\n")


def read_manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """Relative path → expected digest.

    Raises:
        CheckpointError: there is no manifest, it cannot be read, or it does not list all that is read of a checkpoint.
    """
    path = folder / MANIFEST
    try:
        content = read_object(path)
        if content is None:
            raise CheckpointError("the checkpoint's manifest is missing", str(path))
        files = file_digests(content.get("files"))
    except (DataError, ValueError) as error:
        reason = error.what if isinstance(error, DataError) else error
        raise CheckpointError(f"the checkpoint's manifest cannot be read ({reason})", str(path)) from error
    if not any(name.endswith(".safetensors") for name in files):
        raise CheckpointError("the checkpoint's manifest lists no weights", str(path))
    for name in (*sorted(file.name for file in folder.glob("*.safetensors")), *_DESCRIPTIONS):
        if name not in files and os.path.lexists(folder / name):
            raise CheckpointError(f"the checkpoint's manifest has no checksum of {name}", str(path))
    return files


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

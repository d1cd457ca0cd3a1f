"""Keeps one run folder over all restarts of a job under torchrun.

The default folder has the time in its name, so each restart would begin a new run. Rank 0 therefore writes its folder
to a note named after the rendezvous id, which rank 0 of the next restart reads, on any host of a shared file system.
Does not import torch: commands call it before they read anything.
"""

from __future__ import annotations

import json
import os
import re
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moe_train.launch.job.env import under_agent

NOTES = Path("outputs", ".torchrun")
_KEY = "hydra.run.dir"


def restarted() -> bool:
    """Whether torchrun has started this job's processes before."""
    return under_agent() and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def folder_overrides(overrides: Sequence[str]) -> list[str]:
    """Overrides to add to the command line so that this restart of the job resumes in the folder of the one before.

    Args:
        overrides: those that the user typed. Where they set the folder, none is added.
    """
    note = _read(overrides)
    if note is None:
        return []
    quoted = note["folder"].replace("\\", "\\\\").replace("'", "\\'")
    return [f"{_KEY}='{quoted}'"]


def note_folder(overrides: Sequence[str], folder: Path) -> None:
    """Writes the note for the next restart, if torchrun allows restarts. Rank 0 calls it."""
    if not _is_needed(overrides):
        return
    path = _note_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps({"words": list(overrides), "folder": str(folder.resolve())}), encoding="utf-8")
    os.replace(partial, path)


def _is_needed(overrides: Sequence[str]) -> bool:
    fixed = any(word.startswith(f"{_KEY}=") and "${" not in word for word in overrides)
    return under_agent() and os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0" and not fixed


def _read(overrides: Sequence[str]) -> dict[str, Any] | None:
    """The note, if it is of this job: an earlier job may have had the same id."""
    if not _is_needed(overrides):
        return None
    try:
        note = json.loads(_note_path().read_text(encoding="utf-8"))
        if note["words"] == list(overrides) and (restarted() or not _finished(Path(note["folder"]))):
            return dict(note)
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None


def _note_path() -> Path:
    """The file of this job's note. A job without an id is identified by its agent: host, pid and start time."""
    name = os.environ["TORCHELASTIC_RUN_ID"]
    if name == "none":
        agent = os.getppid()
        started_at = Path(f"/proc/{agent}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19]
        name = f"{socket.gethostname()}-{agent}-{started_at}"
    return NOTES / f"{re.sub(r'[^A-Za-z0-9._-]', '_', name)}.json"


def _finished(folder: Path) -> bool:
    try:
        status = json.loads((folder / "run.json").read_text(encoding="utf-8"))["status"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False
    return status in ("finished", "stopped_early")

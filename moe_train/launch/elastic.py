"""One run folder for all lives of a job under torchrun, which starts its processes again when some are lost.

The default folder has the time in its name, so rank 0 would begin anew after each restart. Rank 0 therefore notes its
folder under the rendezvous id, where the next rank 0 finds it, on whichever host of a shared file system it stands.
Needs no torch: commands ask before they read anything.
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


def folder_words(words: Sequence[str]) -> list[str]:
    """What to add to the command line so that this life of the job goes on in the folder of the one before.

    Args:
        words: the overrides that the user typed. Where they fix the folder nothing is to be added.
    """
    note = _read(words)
    if note is None:
        return []
    quoted = note["folder"].replace("\\", "\\\\").replace("'", "\\'")
    return [f"{_KEY}='{quoted}'"]


def note_folder(words: Sequence[str], folder: Path) -> None:
    """Notes the folder for the next life, if there may be one. Rank 0 calls it."""
    if not _wanted(words):
        return
    path = _note()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps({"words": list(words), "folder": str(folder.resolve())}), encoding="utf-8")
    os.replace(partial, path)


def _wanted(words: Sequence[str]) -> bool:
    fixed = any(word.startswith(f"{_KEY}=") and "${" not in word for word in words)
    return under_agent() and os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0" and not fixed


def _read(words: Sequence[str]) -> dict[str, Any] | None:
    """The note, if it is of this job: an id may have been given to another one before."""
    if not _wanted(words):
        return None
    try:
        note = json.loads(_note().read_text(encoding="utf-8"))
        if note["words"] == list(words) and (restarted() or not _finished(Path(note["folder"]))):
            return dict(note)
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None


def _note() -> Path:
    """Where the note of this job lies. Without an id of its own the agent is what tells a job from others."""
    name = os.environ["TORCHELASTIC_RUN_ID"]
    if name == "none":
        agent = os.getppid()
        born = Path(f"/proc/{agent}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19]
        name = f"{socket.gethostname()}-{agent}-{born}"
    return NOTES / f"{re.sub(r'[^A-Za-z0-9._-]', '_', name)}.json"


def _finished(folder: Path) -> bool:
    try:
        status = json.loads((folder / "run.json").read_text(encoding="utf-8"))["status"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False
    return status in ("finished", "stopped_early")

"""Probes a run for the report, once: the atlas stays in the run folder, under a key of what it was made from."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from moe_train.analysis.report.load_runs import RunReport
from moe_train.errors import DataError, UserError
from moe_train.training.checkpoint.checksums import MANIFEST, replace_text
from moe_train.utils.json_files import read_object

ATLAS = "atlas.json"
_FORMAT = 1
_CHECKPOINTS = 4  # at most, evenly spaced
_LARGEST = 300_000_000  # parameters of a model that a report loads
_LOG = logging.getLogger("moe_train")


def cached_atlas(run: RunReport, max_sentences: int) -> tuple[dict[str, Any], str]:
    """The atlas (:func:`moe_train.analysis.probe.atlas.routing_atlas`), or the reason why there is none.

    It is read from ``atlas.json`` in the run folder where that was made from the same checkpoints, data and number of
    sentences. Otherwise the run is probed, and the file is written if the folder can be.
    """
    if not max_sentences:
        return {}, "sentences=0: the run was not probed"
    if run.strategy == "dense":
        return {}, "a dense model has no experts"
    updates = _checkpoints(run.path)
    if not updates:
        return {}, "the run folder has no checkpoints"
    key = _key(run, updates, max_sentences)
    with suppress(DataError):
        kept = read_object(run.path / ATLAS) or {}
        if kept.get("key") == key and isinstance(kept.get("atlas"), dict):
            return kept["atlas"], ""
    if (run.parameters or 0) > _LARGEST:
        return {}, f"the model has {run.parameters:,} parameters; a report loads models of at most {_LARGEST:,}"
    from moe_train.analysis.probe.atlas import routing_atlas  # torch and fairseq take seconds

    try:
        atlas = routing_atlas(run.path, updates, max_sentences)
    except UserError as error:
        return {}, f"{error.what}{f': {error.where}' if error.where else ''}"
    except (OSError, RuntimeError, ValueError, KeyError) as error:  # such as a plugin that is not loaded
        _LOG.debug("the run %s could not be probed", run.path, exc_info=True)
        return {}, f"the run could not be probed ({error})"
    with suppress(OSError):
        replace_text(run.path / ATLAS, json.dumps({"key": key, "atlas": atlas}, ensure_ascii=False) + "\n")
    return atlas, ""


def _checkpoints(run: Path) -> list[int]:
    """Updates of the last checkpoint and of up to three earlier ones, evenly spaced."""
    names = [path.name.removeprefix("step_") for path in run.glob("checkpoints/step_*") if (path / MANIFEST).is_file()]
    updates = sorted(int(name) for name in names if name.isdecimal())
    steps = min(_CHECKPOINTS, len(updates))
    return [updates[(index + 1) * len(updates) // steps - 1] for index in range(steps)]


def _key(run: RunReport, updates: Sequence[int], max_sentences: int) -> str:
    manifests = [(run.path / "checkpoints" / f"step_{update}" / MANIFEST).read_bytes() for update in updates]
    digests = [hashlib.sha256(content).hexdigest() for content in manifests]
    parts = [_FORMAT, list(updates), digests, run.validated_on.get("data folder"), max_sentences]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

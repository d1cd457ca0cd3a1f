"""Reads run folders for a report: config, progress, scores, and the cause of a failure."""

from __future__ import annotations

import fcntl
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe_train.analysis.report.run_records import Reader
from moe_train.config.placement import Placement, place
from moe_train.errors import ConfigError, DataError, UserError
from moe_train.evaluation.result_files import ResultFiles
from moe_train.evaluation.scoring.results import Results, read_results
from moe_train.routing import routing_config
from moe_train.training.run.heartbeat import alive
from moe_train.training.run.run_folder import ALIVE, CONFIG, FAILURE, FINISHED, INFO, TRAIN, VALID, recorded_overrides
from moe_train.utils.regular_files import LARGEST_LOG, read_regular

_MOST_LAYERS = 1000
_DEPTH = 3  # multirun/date/time/job


@dataclass(frozen=True)
class RunReport:
    """One run.

    Attributes:
        name: short and unique among the runs of a report.
        status: ``finished``, ``stopped_early``, ``interrupted``, ``running``, ``failed``, or ``unknown`` where the file
            that says it is damaged.
        cause: why it failed; "" otherwise.
        passes: over each batch in training (THOR: 2); None where the strategy is not known.
        overrides: of its command line, such as ``routing=switch``.
        train, valid: numbers in the lines of ``train.jsonl`` and ``valid.jsonl``.
        files: of the reported scores and outputs.
        results: the scores, None where it was not evaluated.
        layers: number of a sparse block -> its place, such as ``encoder layer 1``; empty where the config is damaged.
        validated_on: what decides the set that the validation losses are of, as far as it is known.
        problems: damaged files of the folder, with the reason.
    """

    name: str
    path: Path
    status: str
    files: ResultFiles
    cause: str = ""
    strategy: str = ""
    passes: int | None = None
    overrides: tuple[str, ...] = ()
    info: Mapping[str, Any] = field(default_factory=dict)
    train: Sequence[Mapping[str, Any]] = ()
    valid: Sequence[Mapping[str, Any]] = ()
    results: Results | None = None
    layers: Mapping[int, str] = field(default_factory=dict)
    validated_on: Mapping[str, Any] = field(default_factory=dict)
    problems: Sequence[str] = ()

    @property
    def failed(self) -> bool:
        """Whether the run failed."""
        return self.status == "failed"

    @property
    def update(self) -> int:
        """Updates done."""
        logged = max((int(line["update"]) for line in self.train), default=0)
        return max(int(self.info.get("update") or 0), logged)

    @property
    def parameters(self) -> int | None:
        """All parameters."""
        return self.info.get("parameters", {}).get("total")

    @property
    def active_parameters(self) -> int | None:
        """Parameters that a token uses."""
        return self.info.get("parameters", {}).get("active")

    @property
    def flops_per_token(self) -> float | None:
        """Forward FLOPs of a token."""
        return self.info.get("flops_per_token")

    @property
    def training_flops_per_token(self) -> float | None:
        """Forward and backward (twice the forward pass) FLOPs of a token, times the passes over a batch."""
        forward = self.flops_per_token
        return None if forward is None or self.passes is None else 3 * forward * self.passes

    @property
    def words_per_second(self) -> float | None:
        """The median over log lines, since the first ones include warm-up. None for a run on images."""
        return None if self.images_per_second is not None else self._median("words_per_second")

    @property
    def images_per_second(self) -> float | None:
        """As :attr:`words_per_second`, for a run on images; None for others."""
        return self._median("images_per_second")

    def _median(self, name: str) -> float | None:
        speeds = [line[name] for line in self.train if name in line]
        return statistics.median(speeds) if speeds else None

    @property
    def loss(self) -> float | None:
        """The lowest validation loss, nats per token, whichever metric selected ``best``."""
        return min((line["nll_loss"] for line in self.valid if "nll_loss" in line), default=None)


def read_runs(paths: Sequence[Path | str], split: str = "test", part: str = "") -> list[RunReport]:
    """Reads run folders, and all run folders below a folder such as a multirun's.

    Args:
        split, part: of the scores to read (:class:`~moe_train.evaluation.result_files.ResultFiles`).

    Raises:
        ConfigError: a path without a run, or no paths.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        below = find_runs(path)
        if not below:
            raise ConfigError("there is no run here", str(path), "give run folders, or a folder of runs (a multirun)")
        found += [run for run in below if run not in found]
    if not found:
        raise ConfigError("no runs were given", "runs", "set 'runs=[FOLDER,FOLDER]' or 'runs=[MULTIRUN_FOLDER]'")
    return [read_run(path, name, split, part) for path, name in zip(found, _names(found), strict=True)]


def find_runs(path: Path, depth: int = _DEPTH) -> list[Path]:
    """The run folders at or below ``path``, including those of jobs of a sweep that failed before they began.

    The latter have a ``failure.json``; a folder that Hydra made for a refused command has not, and is not a run.
    """
    if (path / CONFIG).is_file() or (path / FAILURE).is_file():
        return [path.resolve()]
    if depth == 0 or not path.is_dir():
        return []
    try:
        children = sorted(
            (p for p in path.iterdir() if p.is_dir() and not p.name.startswith(".")),
            key=lambda p: (0, int(p.name), "") if p.name.isdecimal() else (1, 0, p.name),
        )
    except OSError:  # a folder of another user
        return []
    return [run for child in children for run in find_runs(child, depth - 1)]


def _names(paths: Sequence[Path]) -> list[str]:
    """The shortest last parts of the paths that are unique."""
    for parts in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-parts:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def read_run(path: Path, name: str, split: str = "test", part: str = "") -> RunReport:
    """Reads one run folder; missing and damaged files are left out, the latter are listed in ``problems``."""
    reader = Reader(path)
    info = reader.info(INFO)
    unreadable = bool(reader.problems)
    config = reader.inner(CONFIG, content := reader.mapping(CONFIG), "config")
    routing = reader.inner(CONFIG, config, "routing")
    files = ResultFiles(path, split, part)
    validation = reader.inner(CONFIG, config, "training", "validation")
    status, cause = ("unknown", "") if unreadable and not info else _status(reader, info)
    overrides = recorded_overrides(path)
    # Of a job that ended before it wrote its config.
    overridden = next((word.partition("=")[2] for word in overrides if word.startswith("routing=")), "")
    return RunReport(
        name=name,
        path=path,
        status=status,
        files=files,
        cause=cause,
        strategy=str(routing.get("name", "")) or overridden,
        passes=_passes(routing),
        overrides=overrides,
        info=info,
        train=reader.lines(TRAIN),
        valid=reader.lines(VALID),
        results=_results(files, reader),
        layers=_layers(reader.inner(CONFIG, config, "model")),
        validated_on={
            "data folder": content.get("data_fingerprint") or None,
            "vocabulary": info.get("vocabulary"),
            "task": reader.inner(CONFIG, config, "task").get("name"),
            "task.directions": reader.inner(CONFIG, config, "task").get("directions"),
            "model.max_positions": reader.inner(CONFIG, config, "model").get("max_positions"),
            "training.validation.max_sentences": validation.get("max_sentences"),
        },
        problems=list(dict.fromkeys(reader.problems)),
    )


def _passes(routing: Mapping[str, Any]) -> int | None:
    try:
        return routing_config(routing).passes
    except (ConfigError, OverflowError):
        return None


def _layers(model: Mapping[str, Any]) -> dict[int, str]:
    """As :func:`moe_train.models.routed.block_names`, from the config alone."""
    names: list[str] = []
    encoder, decoder = model.get("sparse_layers"), model.get("decoder_sparse_layers")
    for side, spec in (("encoder", encoder), ("decoder", encoder if decoder is None else decoder)):
        try:
            count = int(model[f"{side}_layers"])
            placed = place(spec, count) if spec is not None and 0 <= count <= _MOST_LAYERS else Placement()
        except (UserError, KeyError, TypeError, ValueError):
            return {}
        places = [(index, "") for index in placed.replaced] + [(index, "after ") for index in placed.inserted_after]
        names += [f"{word}{side} layer {index}" for index, word in sorted(places, key=lambda found: found[0])]
    return dict(enumerate(names))


def _results(files: ResultFiles, reader: Reader) -> Results | None:
    try:
        results = read_results(files.scores)
    except DataError as error:
        reader.problems.append(f"{files.scores.name}: {error.what}")
        return None
    if results is not None and results.settings.get("split", files.split) != files.split:
        reader.problems.append(f"{files.scores.name}: the scores are of split={results.settings['split']}")
        return None
    return results


# --- how it ended -----------------------------------------------------------------------------------------------------


def _status(reader: Reader, info: Mapping[str, Any]) -> tuple[str, str]:
    """Status and cause. A failure that is older than ``run.json`` belongs to an earlier session."""
    path, status = reader.folder, str(info.get("status", ""))
    if status in FINISHED:
        return status, ""
    if _is_locked(path):
        return "running", ""
    failure = reader.mapping(FAILURE)
    if failure and _changed(path / FAILURE) >= _changed(path / INFO):
        return "failed", _cause(failure)
    if status == "interrupted":
        return status, ""
    if alive(path / ALIVE):  # on another host, whose lock may not be visible here
        return "running", ""
    return "failed", _last_error(path) or "it ended without an error message: it was killed, or its host went down"


def _changed(path: Path) -> float:
    """Time of the last change of a file; 0 where it does not exist."""
    return path.stat().st_mtime if path.is_file() else 0.0


def _cause(failure: Mapping[str, Any]) -> str:
    where = f"{failure['where']}: " if failure.get("where") else ""
    remedy = f" ({failure['remedy']})" if failure.get("remedy") else ""
    return f"{where}{failure.get('what', 'unknown')}{remedy}"


def _is_locked(path: Path) -> bool:
    """Whether a process of this host has locked the folder, since it trains in it."""
    lock = path / ".lock"
    if not lock.is_file():
        return False
    try:
        with lock.open() as stream:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _last_error(path: Path) -> str:
    """The last line with an error in the ranks' logs, or in those of a submitit job."""
    logs = [*sorted(path.glob("logs/*.log")), *sorted(path.parent.glob(f".submitit/*_{path.name}/*.err"))]
    for log in logs:
        try:
            lines = read_regular(log, LARGEST_LOG).decode("utf-8", "replace").splitlines()
        except OSError:
            continue
        for line in reversed(lines):
            if "Error" in line and not line.startswith(" "):
                return line.strip()
    return ""

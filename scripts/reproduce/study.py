"""Common part of the comparisons: trains and evaluates runs once, and tabulates them with the claims of papers.

A run is written to the results as soon as it is measured, under a key of its settings, its data, the hash of the code
and whether the processor has matrix units. A run that the results hold with the same key is not trained again, on any
machine; an interrupted one resumes where its folder is. So a comparison can be stopped at any moment and continued with
the same command, and several of the same command may run side by side: each takes runs that no other one holds.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from locks import held, locked
from measures import Mean, Verdict, rounded, spread
from page import markdown

import moe_train
from moe_train.analysis.probe.probing import probe_run
from moe_train.config import build
from moe_train.config.evaluation import EvaluateConfig
from moe_train.data.text.lines import sha256
from moe_train.evaluation.evaluate_split import evaluate
from moe_train.evaluation.measure_task import evaluate_task
from moe_train.evaluation.result_files import ResultFiles, part_name
from moe_train.kernels.cpu.cpu_info import processor_flags
from moe_train.training.checkpoint.checksums import replace_text
from moe_train.training.run.run_folder import INFO, RunFolder
from moe_train.training.run.run_info import commit, versions

Measures = Mapping[str, float | None]
Measure = Callable[[Path], tuple[Measures, Any]]


@dataclass(frozen=True)
class Variant:
    """One side of a comparison: its name and its overrides in addition to the common ones."""

    name: str
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class Budget:
    """Size of a comparison.

    Attributes:
        updates: of each run.
        words: overrides of all runs: batch size, learning rate, widths.
        items: of each evaluation set or direction (0: all).
        takes: expected time, for the help.
    """

    updates: int
    words: tuple[str, ...]
    items: int
    takes: str

    @property
    def tokens_per_update(self) -> int:
        """As the overrides set it."""
        found = [word.partition("=")[2] for word in self.words if word.startswith("training.tokens_per_update=")]
        return int(found[-1])


@dataclass(frozen=True)
class Claim:
    """A claim of a paper, and how it is tested with the means of the variants.

    Attributes:
        measured: returns a text and whether the claim holds (None: undecided); called once all variants in ``needs``
            have results.
    """

    paper: str
    says: str
    needs: tuple[str, ...]
    measured: Callable[[Mapping[str, Mapping[str, Mean]]], tuple[str, Verdict]]


def code_hash() -> str:
    """Hash of the package and its configs, which decide a run's numbers; scripts, documents and results do not."""
    root = Path(moe_train.__file__).resolve().parents[1]
    found = hashlib.sha256()
    for pattern in ("moe_train/**/*.py", "moe_train/**/*.[ch]", "configs/**/*.yaml"):
        for path in sorted(root.glob(pattern)):
            found.update(f"{path.relative_to(root)} {sha256(path)}\n".encode())
    return found.hexdigest()[:12]


def has_matrix_units() -> bool:
    """Whether kernels for AMX are used, which round differently from torch's products."""
    return "amx_bf16" in processor_flags()


def run_module(module: str, words: Sequence[str]) -> tuple[int, float]:
    """Runs a command of the package; its exit code, and the CPU seconds of its process and all that it started."""
    process = subprocess.Popen([sys.executable, "-m", module, *words])
    _, status, used = os.wait4(process.pid, 0)
    return os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime


@dataclass
class Study:
    """A comparison: its runs by name, with their measures.

    Attributes:
        data: what identifies the data in the key of a run, such as a folder's fingerprint.
        runs: all runs that the results hold; other processes may add to them.
        more: further lines of the page, from the runs.
    """

    name: str
    title: str
    columns: tuple[tuple[str, str], ...]  # measure -> heading
    claims: tuple[Claim, ...]
    options: argparse.Namespace
    data: str = ""
    runs: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    commit: str | None = field(default_factory=commit)  # before the first file of results changes the tree
    code: str = field(default_factory=code_hash)
    more: Callable[[Mapping[str, Mapping[str, Any]]], list[str]] = lambda _: []

    @property
    def path(self) -> Path:
        """The JSON file of the results."""
        return Path(self.options.results) / f"{self.name}.json"

    def folder(self, run: str) -> Path:
        """The folder of a run."""
        return Path(self.options.runs) / self.name / run

    def cell(self, variant: str, seed: int, words: Sequence[str], measure: Measure) -> None:
        """Trains and measures the run of a variant and a seed, unless the results have it or another process holds it.

        Args:
            words: all overrides of the run.
            measure: run folder → measures and details.
        """
        run = f"{variant}-s{seed}"
        key = self.key(words)
        if self.found(run, key):
            return
        with held(self.folder(run).with_name(f"{run}.lock")) as free:
            if free and not self.found(run, key):
                folder = self.train(run, words)
                self.note(variant, seed, folder, *measure(folder), key=key)

    def key(self, words: Sequence[str]) -> dict[str, Any]:
        """What a run's numbers depend on: settings, data, code, and the kind of processor."""
        settings = sorted(word for word in words if not word.startswith(("data=", "training.threads=")))
        return {
            "settings": [*settings, *self.options.more],
            "data": self.data,
            "code": self.code,
            "matrix_units": has_matrix_units(),
        }

    def found(self, run: str, key: Mapping[str, Any]) -> bool:
        """Whether the results hold a run with a key; reads the results."""
        self.runs = stored_runs(self.path)
        return self.runs.get(run, {}).get("key") == key

    def train(self, run: str, overrides: Sequence[str]) -> Path:
        """Trains a run unless it is finished; returns its folder."""
        folder = self.folder(run)
        opened = RunFolder(folder)
        if opened.exists and opened.finished and not opened.info["update"] < _updates(overrides):
            return folder
        words = [*overrides, f"hydra.run.dir={folder}", *self.options.more]
        print(f"== {self.name}: {run}", flush=True)
        code, seconds = run_module("moe_train.commands.train", words)
        _add_seconds(folder, seconds)
        if code:
            raise SystemExit(f"{run} ended with code {code}; the same command resumes")
        return folder

    def evaluate(self, folder: Path, split: str = "test", max_sentences: int = 0, **keys: Any) -> dict[str, Any]:
        """Scores of a run; evaluates it where they are missing or older than its last session."""
        path = ResultFiles(folder, split, part_name(max_sentences=max_sentences)).scores
        if _outdated(path, folder):
            where = {"run": str(folder), "split": split, "max_sentences": max_sentences}
            config = build(EvaluateConfig, {**where, **keys})
            (evaluate if RunFolder.open(folder).config.task.translates else evaluate_task)(config)
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return content

    def probe(self, folder: Path, max_sentences: int) -> dict[str, Any]:
        """Result of :func:`probe_run`, cached in the run folder."""
        path = folder / "probe.json"
        if _outdated(path, folder):
            replace_text(path, json.dumps(probe_run(folder, max_sentences)) + "\n")
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return content

    def note(
        self, variant: str, seed: int, folder: Path, measures: Measures, details: Any = None, key: Any = None
    ) -> None:
        """Adds the measures of a run, and writes the results so far."""
        info = RunFolder(folder).info
        entry = {
            "variant": variant,
            "seed": seed,
            "key": key,
            "measures": {name: value for name, value in measures.items() if value is not None},
            "updates": info.get("update"),
            "parameters": info.get("parameters"),
            "flops_per_token": info.get("flops_per_token"),
            "commit": info.get("commit"),
            "threads": info.get("threads"),
            "seconds": _seconds(folder),
            "details": details,
        }
        with locked(self.path):
            self.runs = {**stored_runs(self.path), folder.name: entry}
            self.write()

    def add(self, run: str, measures: Measures, details: Mapping[str, Any] | None = None) -> None:
        """Adds further measures to a run that was noted before."""
        with locked(self.path):
            self.runs = stored_runs(self.path)
            entry = self.runs[run]
            entry["measures"] |= {name: value for name, value in measures.items() if value is not None}
            if details:
                entry["details"] = {**(entry["details"] or {}), **details}
            self.write()

    def means(self) -> dict[str, dict[str, Mean]]:
        """Variant -> measure -> mean over seeds."""
        return {v: {m: Mean(s["mean"], s["deviation"]) for m, s in f.items()} for v, f in self.summary().items()}

    def summary(self) -> dict[str, dict[str, dict[str, Any]]]:
        """Variant -> measure -> mean, standard deviation (of the sample), and the values by seed."""
        by_variant: dict[str, dict[str, list[float]]] = {}
        for run in self.runs.values():
            for name, value in run["measures"].items():
                by_variant.setdefault(run["variant"], {}).setdefault(name, []).append(value)
        return {v: {m: spread(values) for m, values in found.items()} for v, found in by_variant.items()}

    def outcomes(self) -> list[dict[str, Any]]:
        """Each claim with its measured values; ``open`` where runs are missing."""
        means = self.means()
        return [{"paper": claim.paper, "says": claim.says, **_outcome(claim, means)} for claim in self.claims]

    def write(self) -> None:
        """Writes ``NAME.json`` and ``NAME.md`` to the results folder."""
        content = {
            "comparison": self.name,
            "title": self.title,
            "command": [Path(sys.argv[0]).name, *(plain_word(word) for word in sys.argv[1:])],
            "commit": self.commit,
            "machine": machine(),
            "versions": versions(),
            "claims": self.outcomes(),
            "summary": self.summary(),
            "notes": self.notes,
            "runs": {name: {**run, "details": rounded(run["details"])} for name, run in self.runs.items()},
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(self.path, json.dumps(content, indent=1, sort_keys=True) + "\n")
        replace_text(self.path.with_suffix(".md"), markdown(content, self.columns, self.more(self.runs)))


def stored_runs(path: Path) -> dict[str, dict[str, Any]]:
    """The runs of a results file that have a key; none without the file."""
    content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"runs": {}}
    return {name: run for name, run in content["runs"].items() if run.get("key")}


def _outdated(path: Path, folder: Path) -> bool:
    """Whether a file made from a run does not exist, or is older than its last session."""
    return not path.is_file() or path.stat().st_mtime_ns < (folder / INFO).stat().st_mtime_ns


def _outcome(claim: Claim, means: Mapping[str, Mapping[str, Mean]]) -> dict[str, Any]:
    if any(name not in means for name in claim.needs):
        return {"measured": "not all runs are there yet", "agrees": "open"}
    try:
        measured, agrees = claim.measured(means)
    except KeyError as missing:
        return {"measured": f"{missing} was not measured", "agrees": "open"}
    return {"measured": measured, "agrees": {None: "undecided", True: "yes", False: "no"}[agrees]}


def plain_word(word: str) -> str:
    """A word of the command line without folders of this machine."""
    key, mark, value = word.rpartition("=")
    return f"{key}{mark}{Path(value).name}" if os.path.isabs(value) or value.startswith("..") else word


def machine() -> dict[str, Any]:
    """Processor, cores, memory and device; no names."""
    processor = platform.machine()
    cpu = Path("/proc/cpuinfo")
    if cpu.is_file():
        models = [
            line.split(":", 1)[1].strip() for line in cpu.read_text().splitlines() if line.startswith("model name")
        ]
        processor = models[0] if models else processor
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return {"processor": processor, "cores": os.cpu_count(), "device": device, "system": platform.system()}


def parser(description: str, data: str, seeds: int, budgets: Mapping[str, Budget]) -> argparse.ArgumentParser:
    """The options of every comparison; words after ``--`` are passed to every moe-train."""
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = "; ".join(f"{name}: {budget.updates} updates a run, {budget.takes}" for name, budget in budgets.items())
    options.add_argument("--budget", choices=list(budgets), default="full", help=f"{sizes} (default: full)")
    options.add_argument("--data", default=data, help=f"the data (default: {data})")
    options.add_argument("--runs", default="outputs/reproduce", help="where run folders go")
    options.add_argument("--results", default="results", help="where the JSON and Markdown files go")
    options.add_argument(
        "--seeds", type=int, default=seeds, help=f"seeds 1 to N (default: {seeds or 'those of the stage'})"
    )
    options.add_argument("--updates", type=int, help="updates of a run (default: the budget's)")
    options.add_argument("--threads", type=int, default=0, help="CPU threads (default: all cores)")
    options.add_argument("--only", default="", help="these variants only, by name, separated by commas")
    options.add_argument("more", nargs="*", help="further overrides for every moe-train, after --")
    return options


def parsed(options: argparse.ArgumentParser, budgets: Mapping[str, Budget]) -> argparse.Namespace:
    """The parsed command line, with the budget as ``size``; also sets the threads of this process."""
    given = options.parse_args()
    given.size = budgets[given.budget]
    given.updates = given.size.updates if given.updates is None else given.updates
    if given.threads:
        torch.set_num_threads(given.threads)
    return given


def wanted(variants: Sequence[Variant], only: str) -> list[Variant]:
    """The variants in ``--only``; all without it."""
    names = [name for name in only.split(",") if name]
    known = {variant.name for variant in variants}
    if unknown := [name for name in names if name not in known]:
        raise SystemExit(f"unknown variants: {', '.join(unknown)}; known: {', '.join(sorted(known))}")
    return [variant for variant in variants if not names or variant.name in names]


def _updates(overrides: Sequence[str]) -> int:
    """``training.max_updates`` of a command line, 0 without it."""
    found = [word.partition("=")[2] for word in overrides if word.startswith("training.max_updates=")]
    return int(found[-1]) if found else 0


def read_lines(path: Path) -> list[dict[str, Any]]:
    """JSON lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _add_seconds(folder: Path, seconds: float) -> None:
    if folder.is_dir():
        replace_text(folder / "reproduce.json", json.dumps({"seconds": _seconds(folder) + seconds}) + "\n")


def _seconds(folder: Path) -> float:
    path = folder / "reproduce.json"
    return float(json.loads(path.read_text(encoding="utf-8"))["seconds"]) if path.is_file() else 0.0

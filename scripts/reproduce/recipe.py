"""Searches the recipe of the translation study: the dense model that learns most in a number of core-minutes.

    python scripts/reproduce/recipe.py --text parallel15 --minutes 10          # every candidate of this round

A candidate differs from ``BASE`` in a few settings. It first trains 10 and 60 updates, whose difference in CPU time
gives the updates that fit into the budget; then it trains once, so that the learning rate decays to 0 within it. CPU
time is that of the training process and of all it starts, so that other load of the machine counts little. Vocabularies
differ between candidates, so the measure is bits per character of the held-out target text, the mean of the directions.

Every finished candidate is written to ``results/recipe.json`` at once and is not trained again with the same settings,
data and minutes. Several of these commands may run side by side: each takes candidates that no other one holds.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from locks import held, locked
from study import has_matrix_units, machine, plain_word, read_lines, run_module
from translation import LANGUAGES

from moe_train.data.folder import DataFolder
from moe_train.tasks.indexed_dataset import SentenceFile
from moe_train.training.checkpoint.checksums import replace_text
from moe_train.training.run.run_folder import RunFolder
from moe_train.training.run.run_info import commit

BASE = {
    "model": "tiny",
    "model.embed_dim": "192",
    "model.ffn_dim": "768",
    "model.dropout": "0.05",
    "model.attention_dropout": "0",  # on CPUs attention without it is a C kernel
    "training.precision": "bf16",
    "training.tokens_per_update": "2048",
    "training.schedule.name": "linear",
    "training.schedule.warmup_updates": "200",
    "training.optimizer.lr": "0.003",
    "training.temperature": "2",
    "vocabulary": "8000",
}
SHORT, LONG = 10, 60  # updates of the two runs that measure the CPU time of an update

_NARROW = {"model.embed_dim": "128", "model.ffn_dim": "512"}
_NARROW_16000 = {**_NARROW, "vocabulary": "16000"}
_LARGE = {"vocabulary": "16000", "model.dropout": "0"}  # the two changes that were best alone
_WIDE = {"model.embed_dim": "256", "model.ffn_dim": "1024"}
ROUNDS: dict[int, dict[str, dict[str, str]]] = {
    10: {
        "base": {},
        "vocabulary 4,000": {"vocabulary": "4000"},
        "vocabulary 16,000": {"vocabulary": "16000"},
        "1,024 tokens an update": {"training.tokens_per_update": "1024"},
        "4,096 tokens an update, lr 0.004": {
            "training.tokens_per_update": "4096",
            "training.optimizer.lr": "0.004",
            "training.schedule.warmup_updates": "100",
        },
        "lr 0.0015": {"training.optimizer.lr": "0.0015"},
        "lr 0.005": {"training.optimizer.lr": "0.005"},
        "dropout 0": {"model.dropout": "0"},
        "no label smoothing": {"training.label_smoothing": "0"},
        "width 128": _NARROW,
        "width 128, vocabulary 16,000": _NARROW_16000,
        "vocabulary 16,000, dropout 0": _LARGE,
        "vocabulary 16,000, dropout 0, lr 0.002": {**_LARGE, "training.optimizer.lr": "0.002"},
        "vocabulary 16,000, dropout 0, no label smoothing": {**_LARGE, "training.label_smoothing": "0"},
        "vocabulary 16,000, dropout 0, 3 + 2 layers": {**_LARGE, "model.encoder_layers": "3"},
        "width 256": _WIDE,
        "width 256, lr 0.002": {**_WIDE, "training.optimizer.lr": "0.002"},
        "4 + 1 layers": {"model.encoder_layers": "4", "model.decoder_layers": "1"},
        "3 + 3 layers": {"model.encoder_layers": "3", "model.decoder_layers": "3"},
        "temperature 1": {"training.temperature": "1"},
        "fp32": {"training.precision": "fp32"},
        "Adam beta2 0.99": {"training.optimizer.betas": "[0.9,0.99]"},
        "cosine": {"training.schedule.name": "cosine"},
    },
}


def main() -> None:
    """Trains the candidates that are missing."""
    given = parse()
    given.runs.mkdir(parents=True, exist_ok=True)
    for name, changes in ROUNDS[given.minutes].items():
        if given.only and name not in given.only:
            continue
        with held(given.runs / f"{slug(name)}-{given.minutes}.lock") as free:
            if free:
                candidate(given, name, {**BASE, **changes}, changes)


def parse() -> argparse.Namespace:
    """The command line."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--text", type=Path, required=True, help="folder of parallel text, as for corpus=text")
    options.add_argument("--minutes", type=int, choices=list(ROUNDS), default=10, help="core-minutes of a candidate")
    options.add_argument("--only", nargs="*", default=[], help="these candidates only, by name")
    options.add_argument("--runs", type=Path, default=Path("outputs/recipe"), help="where data and run folders go")
    options.add_argument("--results", type=Path, default=Path("results/recipe.json"))
    return options.parse_args()


def candidate(given: argparse.Namespace, name: str, settings: dict[str, str], changes: dict[str, str]) -> None:
    """Prepares, measures, trains and notes one candidate unless its result is there."""
    data = prepared(given, settings["vocabulary"])
    folder = DataFolder.open(data)
    identity = {
        "settings": settings,
        "minutes": given.minutes,
        "data": folder.fingerprint,
        "matrix_units": has_matrix_units(),
    }
    if any(all(entry[key] == value for key, value in identity.items()) for entry in results(given.results)):
        return
    words = overrides(data, settings)
    seconds = update_seconds(given.runs / "calibration" / slug(name), words)
    updates = max(50, round(60 * given.minutes / seconds / 50) * 50)
    run = given.runs / f"{slug(name)}-{given.minutes}"
    print(f"== {name}: {seconds:.3f} s of CPU time an update, {updates} updates", flush=True)
    used = trained(run, [*words, *schedule(updates)])
    lines = read_lines(run / "valid.jsonl")
    info = RunFolder(run).info
    entry = {
        **identity,
        "name": name,
        "changes": changes,
        "updates": updates,
        "core_minutes": round(used / 60, 2),
        "bits_per_character": bits_per_character(folder, lines[-1]["directions"]),
        "nll": lines[-1]["nll_loss"],
        "curve": [
            {"update": line["update"], "bits_per_character": bits_per_character(folder, line["directions"])}
            for line in lines
        ],
        "parameters": info.get("parameters"),
        "flops_per_token": info.get("flops_per_token"),
        "commit": commit(),
        "machine": machine(),
        "command": [Path(sys.argv[0]).name, *(plain_word(word) for word in sys.argv[1:])],
    }
    with locked(given.results):
        ranked = sorted([*results(given.results), entry], key=lambda e: (e["minutes"], e["bits_per_character"]))
        replace_text(given.results, json.dumps(ranked, indent=1, sort_keys=True) + "\n")
    print(f"== {name}: {entry['bits_per_character']:.4f} bits per character", flush=True)


def prepared(given: argparse.Namespace, size: str) -> Path:
    """The data folder with a vocabulary of a size: six languages into English, no held-out text in training."""
    out = Path(given.runs) / f"data-{size}"
    with locked(out.with_name(f"{out.name}.lock")):
        directions = ",".join(f"{code}-en" for code in LANGUAGES)
        words = ["corpus=text", f"corpus.path={given.text}", f"corpus.languages=[{','.join(LANGUAGES)},en]"]
        words += ["corpus.decontaminate=true", f"directions=[{directions}]", f"vocabulary.size={size}", f"out={out}"]
        command_seconds("moe_train.commands.prepare", words)
    return out


def overrides(data: Path, settings: dict[str, str]) -> list[str]:
    """The settings as words of moe-train."""
    words = [f"{key}={value}" for key, value in settings.items() if key != "vocabulary"]
    return [f"data={data}", "routing=dense", "seed=1", "training.threads=1", *words]


def schedule(updates: int) -> list[str]:
    """Length, validations and checkpoints of a run."""
    return [
        f"training.max_updates={updates}",
        f"training.validation.every_updates={math.ceil(updates / 4)}",
        f"training.checkpoint.every_updates={updates}",
        "training.checkpoint.keep=1",
    ]


def update_seconds(folder: Path, words: Sequence[str]) -> float:
    """CPU seconds of an update, from two short runs."""
    used = {}
    for updates in (SHORT, LONG):
        shutil.rmtree(folder, ignore_errors=True)
        few = "training.validation.max_sentences=1"
        used[updates] = trained(folder, [*words, few, *schedule(updates)])
    shutil.rmtree(folder, ignore_errors=True)
    return (used[LONG] - used[SHORT]) / (LONG - SHORT)


def trained(folder: Path, words: Sequence[str]) -> float:
    """Trains a run from nothing; CPU seconds of the process and its children."""
    shutil.rmtree(folder, ignore_errors=True)
    return command_seconds("moe_train.commands.train", [*words, f"hydra.run.dir={folder}"])


def command_seconds(module: str, words: Sequence[str]) -> float:
    """Runs a command of the package; its CPU seconds.

    Raises:
        SystemExit: it failed.
    """
    code, seconds = run_module(module, words)
    if code:
        raise SystemExit(f"{module} ended with code {code}")
    return seconds


def bits_per_character(folder: DataFolder, measured: dict[str, Any]) -> float:
    """Mean over directions of the loss of all target text, in bits, over its characters (one more for the end)."""
    found = []
    for direction, values in measured.items():
        files = folder.pair_files("valid", direction)
        tokens = int(SentenceFile(files.target).sizes.sum())
        characters = sum(len(line) + 1 for line in folder.raw("valid", direction)[1])
        found.append(values["nll_loss"] * tokens / characters / math.log(2))
    return math.fsum(found) / len(found)


def results(path: Path) -> list[dict[str, Any]]:
    """All entries, best first within a number of minutes."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []


def slug(name: str) -> str:
    """A name as part of a path."""
    return "-".join("".join(c if c.isalnum() or c == "." else " " for c in name).split())


if __name__ == "__main__":
    main()

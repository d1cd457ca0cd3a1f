#!/usr/bin/env python
"""Speed on one GPU: Triton kernels, layers and whole trainings; one result a line, kept between calls.

    python scripts/gpu_speed.py --out results/gpu [--data DATA_FOLDER] [--minutes 8.5]

A call runs the lines that neither ``speed.json`` in --out nor the one given by --known has, the most telling first,
each in a process of its own with a time limit; after --minutes no line is begun. A line that fails is recorded with
its error, and tried again by a call that has no other line left. Lines:

- kernels: each Triton kernel against torch's operators, results and time. They are in ``kernels.json`` too, which
  ``kernels=auto`` reads once it is copied to ``moe_train/kernels/measured.json``;
- layer: TFLOP/s of sparse layers with 16-bit weights, with torch's operators and with Triton's kernels, with and
  without the exchange in a world of one, and of a dense feed-forward over as many rows;
- train: words/s, host syncs of an update and share of the bf16 peak of ``model=base`` and ``model=big``: dense, and
  top-1 and top-2 with equal FLOPs of active parameters; then all strategies at fewer tokens an update;
- profile: the operators that take most of the device's time in an update.

Kernels and layers need torch and this package; train and profile need the whole installation, and a folder made by
``moe-prepare`` (default: the tests' small one). ``--device cpu --small`` runs every line in this process, for tests.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from gpu_kernel_lines import KERNELS, Results, Setting, kernel_line
from gpu_model_lines import ROOT, layer_line, profile_line, train_line

LIMIT = 240.0  # seconds of one line
REST = 20.0  # seconds that a line needs at least
STRATEGIES = (
    *("dense", "switch", "top_k", "sam", "smoe", "thor", "xmoe"),
    *("expert_choice", "soft_moe", "hash", "random"),
)
TWO_HALVES = {"top_k": 2, "expert_ffn_dim": 1024}  # as many FLOPs as one expert of model=base

# The most telling first.
LINES: dict[str, Callable[[Setting], Results]] = {
    **{f"kernel {name}": kernel_line(name) for name in KERNELS},
    **{f"layer k={k}": layer_line(k) for k in (1, 2)},
    "train base dense": train_line("base", "dense", 65536),
    "train base switch": train_line("base", "switch", 65536),
    "train base top_2": train_line("base", "top_k", 65536, TWO_HALVES),
    "train big dense": train_line("big", "dense", 65536),
    "train base switch triton": train_line("base", "switch", 65536, top={"kernels": "triton"}),
    "train base top_2 triton": train_line("base", "top_k", 65536, TWO_HALVES, {"kernels": "triton"}),
    "profile dense": profile_line("dense"),
    "profile switch": profile_line("switch"),
    **{f"strategy {name}": train_line("base", name, 16384) for name in STRATEGIES},
}


def main() -> None:
    """Runs what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "gpu", help="folder of the three files written")
    parser.add_argument("--known", type=Path, default=ROOT / "results" / "gpu" / "speed.json", help="earlier results")
    parser.add_argument("--data", type=Path, default=ROOT / "tests" / "old_runs" / "data")
    parser.add_argument("--minutes", type=float, default=8.5)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="small sizes, in this process")
    parser.add_argument("--line", choices=LINES, help="only this line, printed and not written")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no GPU here; run it on a machine with one, or use --device cpu --small")
    if options.device == "cpu":
        os.environ.setdefault("TRITON_INTERPRET", "1")
    else:
        torch.cuda.set_device(0)
    setting = Setting(options.device, options.small, options.data)
    if options.line:
        print(json.dumps(LINES[options.line](setting)))
        return
    known = read(options.known) | read(options.out / "speed.json")
    run_lines(known, options, setting)


def read(path: Path) -> dict[str, Results]:
    """The lines of an earlier call; none where there is no file."""
    return dict(json.loads(path.read_text(encoding="utf-8"))["lines"]) if path.exists() else {}


def run_lines(known: dict[str, Results], options: argparse.Namespace, setting: Setting) -> None:
    """Runs the lines that are missing while there is time, and writes after each."""
    end = time.monotonic() + 60 * options.minutes
    write(options.out, known)
    for name in to_run(known):
        left = end - time.monotonic()
        if left < REST:
            print(f"no time left for {name}", file=sys.stderr)
            break
        start = time.monotonic()
        result = guarded(LINES[name], setting) if options.small else in_process(name, options, min(left, LIMIT))
        known[name] = {**result, "seconds": round(time.monotonic() - start, 1)}
        print(f"{name}: {json.dumps(known[name])[:300]}", file=sys.stderr, flush=True)
        write(options.out, known)


def to_run(known: Mapping[str, Results]) -> list[str]:
    """Lines without a result; if there are none, those that failed."""
    return [name for name in LINES if name not in known] or [name for name in LINES if "error" in known[name]]


def guarded(line: Callable[[Setting], Results], setting: Setting) -> Results:
    """The line's result, or its error."""
    try:
        return line(setting)
    except Exception:  # any failure of a line is its result
        return {"error": traceback.format_exc()[-2000:]}


def in_process(name: str, options: argparse.Namespace, limit: float) -> Results:
    """The same in a process of its own, which is killed at the limit."""
    command = [sys.executable, __file__, "--line", name, "--device", options.device, "--data", str(options.data)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        return {"error": f"took longer than {limit:.0f} s"}
    if done.returncode:
        return {"error": done.stderr[-2000:]}
    return dict(json.loads(done.stdout.splitlines()[-1]))


def write(folder: Path, lines: Mapping[str, Results]) -> None:
    """Writes speed.json, speed.md, and kernels.json where all kernels have been measured on a GPU."""
    folder.mkdir(parents=True, exist_ok=True)
    cuda = torch.cuda.is_available()
    about = {"torch": torch.__version__, "device": torch.cuda.get_device_name() if cuda else "cpu"}
    files = {
        "speed.json": json.dumps({**about, "lines": lines}, indent=1) + "\n",
        "speed.md": "\n".join(table(about, lines)) + "\n",
    }
    kernels = {name: lines.get(f"kernel {name}", {}) for name in KERNELS}
    if cuda and all("speedup" in found for found in kernels.values()):
        capability = ".".join(map(str, torch.cuda.get_device_capability()))
        rows = {name: {key: found[key] for key in ("holds", "speedup")} for name, found in kernels.items()}
        files["kernels.json"] = json.dumps({capability: {**about, "kernels": rows}}, indent=1) + "\n"
    for name, text in files.items():
        partial = folder / f"{name}.tmp"
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, folder / name)


def table(about: Mapping[str, str], lines: Mapping[str, Results]) -> Iterator[str]:
    """Markdown: one row a number."""
    where = f"{about['device']}, torch {about['torch']}"
    yield from ("# Speed on one GPU", "", f"{where}; `python scripts/gpu_speed.py`.", "")
    yield from ("| line | what | value |", "|---|---|---:|")
    for name in (name for name in LINES if name in lines):
        for what, value in numbers(lines[name]):
            yield f"| {name} | {what} | {value:.4g} |" if isinstance(value, (int, float)) else f"| {name} | {what} | |"


def numbers(result: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Names and numbers of a result; of an error that there is one."""
    for key, value in result.items():
        label = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from numbers(value, f"{label}: ")
        elif key == "error":
            yield "**failed**", None
        elif isinstance(value, (int, float)):
            yield label, value
        elif isinstance(value, list) and value:
            yield label, max(value)


if __name__ == "__main__":
    main()

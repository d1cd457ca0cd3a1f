"""``moe-bench``: measures the speed of layers on this machine.

``moe-bench layer`` times one sparse layer, its bare matrix products and peers.
``moe-bench inference`` times THOR and a dense model of equal size.
Options: ``moe-bench layer --help``.

Examples:
  moe-bench layer --dtype fp32 --rounds 5
  moe-bench layer --shape 4096,512,2048,8,2 --peers
  moe-bench inference --model tiny --experts 8 --out results
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from rich.progress import track
from rich.table import Table

from moe_train import __version__
from moe_train.analysis.bench.bench_layer import DTYPES, BenchRow, bench_layer
from moe_train.analysis.bench.bench_peers import PEERS
from moe_train.analysis.bench.bench_shape import SHAPES, BenchShape
from moe_train.commands.cli.messages import INTERRUPTED, print_error, print_interrupted
from moe_train.config import ModelConfig, build
from moe_train.config.paths import configs_directory
from moe_train.console import lossy_streams, require_output
from moe_train.errors import ConfigError, UserError
from moe_train.kernels.cpu.amx_mlp import is_supported
from moe_train.kernels.cpu.cpu_info import processor_vendor
from moe_train.launch.job.env import requested_threads
from moe_train.screen import Screen
from moe_train.training.checkpoint.checksums import replace_text
from moe_train.training.run.run_info import commit

Lines = list[list[str]]


def main() -> None:
    """Entry point."""
    with lossy_streams():
        try:
            given = _parser().parse_args()
            torch.set_num_threads(given.threads)
            given.run(given)
            require_output()
        except UserError as error:
            print_error(error)
            sys.exit(2)
        except KeyboardInterrupt:
            print_interrupted()
            sys.exit(INTERRUPTED)


def run_layer(given: argparse.Namespace) -> None:
    """``moe-bench layer``."""
    plan = [(shape, dtype) for shape in given.shape or SHAPES for dtype in given.dtype]
    rows = [bench_layer(shape, dtype, given.rounds, given.peers) for shape, dtype in _tracked(plan)]
    title = "One sparse layer, forward + backward"
    notes = [
        "median ms; skew: load of the most loaded expert / mean; ratio: ours / bmm; in parentheses: ours / peer; "
        "ratios are medians over rounds of the ratio within a round, not ratios of the medians shown"
    ]
    absent = {name: reason for row in rows for name, reason in row.absent.items()}
    notes += [f"{name} was not run: {reason}" for name, reason in absent.items()]
    _report(given, title, layer_lines(rows), notes, rows)


def run_inference(given: argparse.Namespace) -> None:
    """``moe-bench inference``."""
    from moe_train.analysis.bench.bench_inference import DecodingWorkload, bench_inference

    keys = OmegaConf.to_container(OmegaConf.load(configs_directory() / "model" / f"{given.model}.yaml"))
    assert isinstance(keys, dict)
    sizes = {str(key): value for key, value in keys.items()}
    model = build(ModelConfig, {**sizes, "sparse_layers": given.sparse_layers}, "model")
    work = DecodingWorkload(length=given.length, beam=given.beam, steps=given.steps, vocabulary=given.vocabulary)
    rows = []
    for sentences in _tracked(given.sentences):
        batch = dataclasses.replace(work, sentences=sentences)
        rows += bench_inference(model, given.experts, batch, given.rounds)
    lines = [["task", "sentences", "THOR draws by", "dense", "THOR", "ratio"]]
    for row in rows:
        times = [f"{row.milliseconds[name]:.1f}" for name in ("dense", "thor")]
        lines.append([row.task, str(row.sentences), row.inference, *times, f"{row.ratio:.3f}"])
    title = f"THOR with {given.experts} experts at inference, model={given.model}"
    notes = [
        f"median ms; search: beam {work.beam}, {work.steps} tokens; forward: {work.length} tokens on either side; "
        f"{work.vocabulary} words; ratio: THOR / dense, the median over rounds of the ratio within a round, "
        "not the ratio of the medians shown"
    ]
    _report(given, title, lines, notes, rows)


def layer_lines(rows: Sequence[BenchRow]) -> Lines:
    """A header, and a line per shape and data type."""
    peers = [name for name in PEERS if any(name in row.milliseconds for row in rows)]
    lines = [["tokens, d, hidden, experts, k", "type", "skew", "bmm", "ours", "ratio", *peers]]
    for row in rows:
        sizes = ", ".join(str(n) for n in dataclasses.astuple(row.shape))
        times = [f"{row.milliseconds['bmm']:.1f}", f"{row.milliseconds['ours']:.1f}", f"{row.ratio:.2f}"]
        others = [
            f"{row.milliseconds[n]:.1f} ({row.over_peers[n]:.2f})" if n in row.milliseconds else "-" for n in peers
        ]
        lines.append([sizes, row.dtype, f"{row.skew:.2f}", *times, *others])
    return lines


def table(title: str, lines: Lines, notes: Sequence[str]) -> Table:
    """The table that is printed."""
    result = Table(title=title, caption="\n".join(notes))
    for name in lines[0]:
        result.add_column(name, justify="right", no_wrap=name == "ratio")
    for line in lines[1:]:
        result.add_row(*line)
    return result


def markdown(title: str, lines: Lines, notes: Sequence[str], about: dict[str, Any]) -> str:
    """The table as a Markdown page."""
    head, *body = (f"| {' | '.join(line)} |" for line in lines)
    rule = "|" + "---:|" * len(lines[0])
    made = f"`{about['command']}`, {about['threads']} threads, {about['processor']}, torch {about['torch']}"
    kernels = f"experts in bf16 by {about['bf16_experts']}"
    return "\n".join(
        [f"# {title}", "", f"{made}, {kernels}, commit {about['commit']}.", "", head, rule, *body, "", *notes, ""]
    )


def _report(given: argparse.Namespace, title: str, lines: Lines, notes: Sequence[str], rows: Sequence[Any]) -> None:
    Screen().print(table(title, lines, notes))
    about = {
        "command": " ".join(["moe-bench", *sys.argv[1:]]),
        "commit": commit(),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "processor": f"{processor_vendor() or platform.processor() or platform.machine()} with {os.cpu_count()} cores",
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "bf16_experts": "our kernel" if is_supported(torch.empty(0, dtype=torch.bfloat16)) else "torch's products",
        "threads": given.threads,
    }
    content = json.dumps({**about, "rows": [dataclasses.asdict(row) for row in rows]}, indent=2) + "\n"
    try:
        if given.json:
            replace_text(given.json, content)
        if given.out:
            given.out.mkdir(parents=True, exist_ok=True)
            replace_text(given.out / f"{given.what}.json", content)
            replace_text(given.out / f"{given.what}.md", markdown(title, lines, notes, about))
    except OSError as error:
        where = str(error.filename or given.json or given.out)
        raise ConfigError(f"the results cannot be written ({error.strerror})", where) from error


def _tracked(plan: Sequence[Any]) -> Iterable[Any]:
    return track(plan, "timing", console=Screen(stderr=True), transient=True)


def _parser() -> argparse.ArgumentParser:
    about = (__doc__ or "").replace("``", "")
    parser = argparse.ArgumentParser(prog="moe-bench", description=about, formatter_class=_Raw)
    parser.add_argument("--version", action="version", version=f"moe_train {__version__}", help="print the version")
    what = parser.add_subparsers(dest="what", required=True)
    text = "a row per shape and data type; ratio = time over that of the bare batched products of the same experts"
    layer = what.add_parser("layer", help=text, description=text, formatter_class=_Help)
    shapes = (
        "tokens, width, hidden width, experts, experts per token; may be given several times; default: a list of shapes"
    )
    layer.add_argument("--shape", type=BenchShape.parse, action="append", metavar="T,D,H,E,K", help=shapes)
    types = list(DTYPES)
    layer.add_argument(
        "--dtype", nargs="+", choices=types, default=types, metavar="TYPE", help=f"of {', '.join(types)}"
    )
    peers, none = list(PEERS), "without a name: none"
    layer.add_argument(
        "--peers", nargs="*", choices=peers, default=peers, metavar="PEER", help=f"of {', '.join(peers)}; {none}"
    )
    layer.set_defaults(run=run_layer)
    text = "a row per task, batch and inference mode; ratio = THOR's time over the dense model's"
    inference = what.add_parser("inference", help=text, description=text, formatter_class=_Help)
    models = sorted(path.stem for path in (configs_directory() / "model").glob("*.yaml"))
    named = f"sizes: {', '.join(models)}"
    inference.add_argument("--model", choices=models, default="iwslt", metavar="NAME", help=named)
    inference.add_argument("--sparse-layers", default="even", metavar="LAYERS", help="as model.sparse_layers")
    inference.add_argument("--experts", type=int, default=4, metavar="N", help="experts of a sparse layer")
    sizes = "sentences of a batch; 170 is moe-evaluate's"
    inference.add_argument("--sentences", type=int, nargs="+", default=[1, 8, 32, 170], metavar="N", help=sizes)
    inference.add_argument("--length", type=int, default=24, metavar="N", help="tokens of a sentence")
    inference.add_argument("--beam", type=int, default=4, metavar="N", help="hypotheses of a search")
    inference.add_argument("--steps", type=int, default=16, metavar="N", help="tokens that a search generates")
    inference.add_argument("--vocabulary", type=int, default=8000, metavar="N", help="words of the dictionary")
    inference.set_defaults(run=run_inference)
    threads = requested_threads() or min(2, os.cpu_count() or 1)
    for each in (layer, inference):
        each.add_argument("--rounds", type=int, default=15, metavar="N", help="number of timed runs of each")
        each.add_argument(
            "--threads", type=int, default=threads, metavar="N", help="CPU threads: OMP_NUM_THREADS, else at most 2"
        )
        each.add_argument("--json", type=Path, metavar="FILE", help="also write the results to this file")
        each.add_argument("--out", type=Path, metavar="FOLDER", help=f"write {'{layer,inference}.{json,md}'} there")
    return parser


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, in 80 columns."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, width=80)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


class _Raw(_Help, argparse.RawDescriptionHelpFormatter):
    """Also keeps the line breaks of the description."""


if __name__ == "__main__":
    main()

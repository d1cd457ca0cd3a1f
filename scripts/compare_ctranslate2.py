#!/usr/bin/env python
"""Compares our beam search with that of CTranslate2 on the CPU: hypotheses, tokens per second, and chrF++.

    python scripts/compare_ctranslate2.py DATA_FOLDER --model tiny --batches 8 32 128 --threads 2
    python scripts/compare_ctranslate2.py DATA_FOLDER --run outputs/dense          # the weights of a trained dense run

Both have the same weights. Hypotheses of the two in fp32 are checked equal first: those that differ must have equal
scores. Then all sides translate the same batches of sentences, alternating batch by batch in one process, so that other
load of the machine affects all of them. Without --run the weights are random, and the end symbol never comes in the
measurement, so that every hypothesis has the longest length.
CTranslate2 is needed only here: pip install --no-deps ctranslate2 pyyaml.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from compare_fairseq import CLOCKS
from rich.console import Console
from rich.table import Table

from moe_train.config import RunConfig, SearchConfig, TaskConfig
from moe_train.data.folder import DataFolder
from moe_train.errors import ConfigError
from moe_train.evaluation.loading import load_run
from moe_train.evaluation.scoring.bleu_chrf import Scorer
from moe_train.evaluation.search.beam_search import BeamSearch
from moe_train.models.to_ctranslate2 import write_ctranslate2
from moe_train.tasks import build_task

SIZES = {"tiny": (2, 224, 896, 4), "base": (6, 512, 2048, 8)}  # layers, width, hidden width, heads: configs/model
OURS, THEIRS = ("fp32", "bf16", "int8"), ("float32", "int8")
CLOSE = 1e-3  # scores of different hypotheses that count as equal, in nats per token
SHARPNESS, END_LOGIT = (
    3.0,
    2.5,
)  # random models: spread of the logits, and the end symbol's over the others' in the check

Found = list[tuple[list[int], float]]  # for each sentence the best hypothesis and its score
Sides = dict[str, Callable[[dict[str, Any]], Found]]


@dataclass(frozen=True)
class Subject:
    """What is compared: a task with its model, and the direction to translate."""

    task: Any
    model: Any
    direction: str

    def symbols(self) -> list[str]:
        """The target dictionary's."""
        return list(self.task.target_dictionary.symbols)

    def sample(self, lines: Sequence[str]) -> dict[str, Any]:
        """Input of the model for source sentences."""
        source, target = self.direction.split("-")
        tokenizer = self.task.folder.tokenizer()
        ids = [tuple(tokenizer.encode(line))[: self.task.source_room(self.direction)] for line in lines]
        net_input: dict[str, Any] = self.task.inference_sample(ids, source, target, list(range(len(ids))))["net_input"]
        return net_input


def main() -> None:
    """Checks, measures, prints the tables."""
    options = parse()
    torch.set_num_threads(options.threads)
    console = Console()
    subject = open_subject(options)
    with tempfile.TemporaryDirectory() as folder:
        report: dict[str, Any] = {
            "hypotheses": check_equal(subject, make_sides(subject, Path(folder), options), options)
        }
        if not options.run:  # all hypotheses are now as long as they may be
            with torch.no_grad():
                subject.model.output_weight[subject.task.target_dictionary.eos()] = 0.0
        sides = make_sides(subject, Path(folder), options)
        report["speed"] = measure(subject, sides, options, console)
        if options.run:
            report["chrf"] = quality(subject, sides, options)
    report["settings"] = {key: str(value) for key, value in vars(options).items()}
    show(report, console)
    if options.out:
        options.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="a folder made by moe-prepare")
    parser.add_argument("--run", type=Path, help="a trained dense run; random weights of --model unless given")
    parser.add_argument("--model", choices=SIZES, default="tiny")
    parser.add_argument("--direction", default="", help="the first of the folder, or of the run, unless given")
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 32, 128], help="sentences per batch")
    parser.add_argument("--rounds", type=int, default=3, help="timed batches of each size")
    parser.add_argument("--beam", type=int, default=4)
    parser.add_argument("--longest", type=int, default=40, help="longest hypothesis in tokens")
    parser.add_argument("--ours", nargs="+", choices=OURS, default=OURS, help="weights of our search")
    parser.add_argument("--check", type=int, default=64, help="sentences whose hypotheses are compared")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: fair on a busy machine, with --threads 1")
    parser.add_argument("--out", type=Path, help="write the report as JSON")
    return parser.parse_args()


def open_subject(options: argparse.Namespace) -> Subject:
    """The trained run, or a random model."""
    if options.run:
        run = load_run(options.run, data=options.data)
        return Subject(run.translating_task, run.model, options.direction or run.trained[0])
    layers, dim, hidden, heads = SIZES[options.model]
    config = RunConfig(data=str(options.data), task=TaskConfig(target_tag="target"))
    sizes = replace(config.model, embed_dim=dim, ffn_dim=hidden, num_heads=heads, share_embeddings=False)
    sizes = replace(sizes, encoder_layers=layers, decoder_layers=layers)
    task: Any = build_task(replace(config, model=sizes), DataFolder.open(options.data))
    model = task.build_model().eval()
    with torch.no_grad():
        model.output_weight.mul_(SHARPNESS)
        model.output_weight[task.target_dictionary.eos()] *= END_LOGIT
    return Subject(task, model, options.direction or task.directions[0])


def first_token(subject: Subject) -> str:
    """The decoder's first token: a language tag that stands in place of the end symbol, or the end symbol."""
    return str(subject.symbols()[subject.task.decoder_prefix(subject.direction)])


def make_sides(subject: Subject, folder: Path, options: argparse.Namespace) -> Sides:
    """All searches over the model's present weights; CTranslate2's are written to ``folder``."""
    limits = SearchConfig(beam=options.beam, max_length_ratio=0.0, max_length_offset=options.longest)
    write_ctranslate2(subject.model, *[subject.symbols()] * 2, folder, first_token(subject))
    return our_sides(subject, limits, options.ours) | their_sides(subject, limits, folder, options)


def our_sides(subject: Subject, limits: SearchConfig, weights: Sequence[str]) -> Sides:
    """Our search with each type of weights."""
    words = subject.task.target_dictionary

    def side(search: BeamSearch) -> Callable[[dict[str, Any]], Found]:
        def translate(net_input: dict[str, Any]) -> Found:
            found = search(net_input)
            return list(zip(found.best(), found.best_scores(), strict=True))

        return translate

    return {f"ours {one}": side(BeamSearch(subject.model, words, replace(limits, weights=one))) for one in weights}


def their_sides(subject: Subject, limits: SearchConfig, folder: Path, options: argparse.Namespace) -> Sides:
    """CTranslate2 with each type of weights."""
    import ctranslate2

    words, symbols = subject.task.target_dictionary, subject.symbols()

    def side(kind: str) -> Callable[[dict[str, Any]], Found]:
        threads = {"inter_threads": 1, "intra_threads": options.threads}
        translator = ctranslate2.Translator(str(folder), device="cpu", compute_type=kind, **threads)

        def translate(net_input: dict[str, Any]) -> Found:
            rows = [[symbols[i] for i in row if i != words.pad()] for row in net_input["src_tokens"].tolist()]
            results = translator.translate_batch(
                rows,
                beam_size=limits.beam,
                length_penalty=limits.length_penalty,
                max_decoding_length=limits.max_length_offset + 1,  # the end symbol counts
                return_scores=True,
            )
            return [([words.index(t) for t in found.hypotheses[0]], found.scores[0]) for found in results]

        return translate

    return {f"CTranslate2 {kind}": side(kind) for kind in THEIRS}


def batches(subject: Subject, size: int, count: int) -> list[dict[str, Any]]:
    """``count`` batches of ``size`` test sentences each, the same ones again if there are too few."""
    lines = subject.task.folder.raw("test", subject.direction)[0]
    return [subject.sample([lines[(n * size + i) % len(lines)] for i in range(size)]) for n in range(count)]


def check_equal(subject: Subject, sides: Sides, options: argparse.Namespace) -> dict[str, int]:
    """Number of sentences with the same hypothesis in fp32, and of others.

    At the longest length CTranslate2 cuts hypotheses where ours and fairseq's force the end symbol: these are counted
    as cut and not compared.

    Raises:
        ConfigError: a hypothesis differs although its score is not close.
    """
    counts = {"same": 0, "close": 0, "cut": 0}
    (sample,) = batches(subject, options.check, 1)
    ours, theirs = sides["ours fp32"](sample), sides["CTranslate2 float32"](sample)
    for row, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        if one[0] == other[0]:
            counts["same"] += 1
        elif max(len(one[0]), len(other[0])) >= options.longest:
            counts["cut"] += 1
        elif math.isclose(one[1], other[1], abs_tol=CLOSE):
            counts["close"] += 1
        else:
            raise ConfigError(f"sentence {row}: ours is {one}, CTranslate2's {other}", remedy="report this as a fault")
    return counts


def measure(
    subject: Subject, sides: Sides, options: argparse.Namespace, console: Console
) -> dict[str, dict[str, float]]:
    """Tokens per second of each side by batch size; the end symbol counts."""
    clock, speeds = CLOCKS[options.clock], {}
    for size in options.batches:
        given = batches(subject, size, options.rounds + 1)
        seconds, tokens = dict.fromkeys(sides, 0.0), dict.fromkeys(sides, 0)
        for number, net_input in enumerate(given):
            for name in list(sides)[:: 1 if number % 2 else -1]:
                begin = clock()
                found = sides[name](dict(net_input))
                if number:  # the first one warms up
                    seconds[name] += clock() - begin
                    tokens[name] += sum(len(ids) + 1 for ids, _ in found)
        speeds[str(size)] = {name: tokens[name] / seconds[name] for name in sides}
        console.print(f"{size} sentences: {speeds[str(size)]}", highlight=False)
    return speeds


def quality(subject: Subject, sides: Sides, options: argparse.Namespace) -> dict[str, float]:
    """chrF++ of each side over the test split."""
    lines, references = subject.task.folder.raw("test", subject.direction)
    tokenizer, size = subject.task.folder.tokenizer(), max(options.batches)
    scorer = Scorer(subject.direction.split("-")[1])
    hypotheses: dict[str, list[str]] = {name: [] for name in sides}
    for begin in range(0, len(lines), size):
        sample = subject.sample(lines[begin : begin + size])
        for name, translate in sides.items():
            hypotheses[name] += [tokenizer.decode(ids) for ids, _ in translate(dict(sample))]
    return {name: scorer.score(texts, references).chrf for name, texts in hypotheses.items()}


def show(report: Mapping[str, Any], console: Console) -> None:
    """Prints the tables."""
    console.print(f"hypotheses of both in fp32: {report['hypotheses']}", highlight=False)
    table = Table("sentences", "weights", "tokens/s", "over float32", "over int8")
    for size, speeds in report["speed"].items():
        bases = [speeds[f"CTranslate2 {kind}"] for kind in THEIRS]
        for name, speed in speeds.items():
            table.add_row(size, name, f"{speed:,.0f}", *[f"{speed / base:.2f}" for base in bases])
        best = max(speed for name, speed in speeds.items() if name.startswith("ours"))
        table.add_row(size, "ours, the best", f"{best:,.0f}", *[f"{best / base:.2f}" for base in bases])
    console.print(table)
    for name, score in report.get("chrf", {}).items():
        console.print(f"chrF++ {name}: {score:.2f}", highlight=False)


if __name__ == "__main__":
    main()

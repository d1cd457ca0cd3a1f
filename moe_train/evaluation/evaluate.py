"""Translating a held-out split in every direction, scoring it, and keeping everything in the run folder."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from moe_train.config.evaluation import EvaluateConfig
from moe_train.data.languages import offer_direction
from moe_train.data.lines import sha256
from moe_train.errors import DataError
from moe_train.evaluation.decoding import Encoded, Outcome, Translation, encode
from moe_train.evaluation.loading import OpenedRun, open_run
from moe_train.evaluation.outputs import OutputFiles, set_aside
from moe_train.evaluation.results import DirectionResult, Results, read_results
from moe_train.evaluation.routed_tokens import describe_all
from moe_train.evaluation.scoring import AUTO, Scorer, require_tokenizer
from moe_train.evaluation.sharding import decode
from moe_train.screen import Screen
from moe_train.training.about import versions
from moe_train.training.checkpoints import everywhere
from moe_train.training.integrity import MANIFEST, replace_text
from moe_train.training.world import World


@dataclass(frozen=True)
class Held:
    """One direction of a split: untouched text, and the sources made ready for decoding."""

    direction: str
    sources: list[str]
    references: list[str]
    encoded: Encoded


def evaluate(config: EvaluateConfig, console: Console | None = None) -> Results:
    """Translates and scores; writes ``hypotheses/`` and ``<split>.json`` into :attr:`OpenedRun.results`.

    Directions that an earlier evaluation of the same checkpoint and settings has scored stay in the file.

    Args:
        console: where progress is shown; None: nowhere.

    Returns:
        The file's content.

    Raises:
        ConfigError, DataError, CheckpointError, LaunchError: as :func:`open_run` and :func:`decode`; also an unknown
            direction, or a split without any.
    """
    require_tokenizer(config.tokenizer)
    run = open_run(config.run, config.checkpoint, config.data, config.inference, World.current())
    held = [_hold(run, config, name) for name in choose_directions(run, config.split, config.directions)]
    jobs = [job for entry in held for job in entry.encoded.jobs]
    start = time.perf_counter()
    with _progress(console, sum(len(job.sentences) for job in jobs)) as advance:
        outcomes = decode(run, jobs, config.search, config.launch, advance, config.expert_parallel)
    seconds = time.perf_counter() - start
    world = World.current()

    def finish() -> Results | None:
        return _scored(run, config, held, outcomes, seconds) if world.main else None

    results = everywhere(world, finish)
    return Results.from_json(world.broadcast(results.to_json() if results is not None else {}))


def _scored(
    run: OpenedRun, config: EvaluateConfig, held: Sequence[Held], outcomes: Sequence[Outcome], seconds: float
) -> Results:
    """Writes outputs and scores; under a launcher one rank does it."""
    translations = _assemble(held, outcomes)
    results = _results(run, config, held, translations, _speed(translations, outcomes, seconds, config))
    path = run.results / f"{config.split}.json"
    earlier = _earlier(path)
    if earlier is not None and not results.extends(earlier):
        results = replace(results, notes=[*results.notes, set_aside(run.results, config.split)])
    for entry, lines in zip(held, translations, strict=True):
        OutputFiles(run.results, config.split, entry.direction).write(entry.sources, entry.references, lines)
    merged = results.merged_into(earlier)
    replace_text(path, merged.to_text())
    return merged


def choose_directions(run: OpenedRun, split: str, wanted: Sequence[str]) -> list[str]:
    """The directions to evaluate: those wanted, else all that were trained and have sentences in the split.

    Raises:
        DataError: a direction that the split does not have, or a split that has none.
    """
    known = run.data.directions_of(split)
    for name in wanted:
        if name not in known:
            where = str(run.data.path)
            raise DataError(f"the split '{split}' has no direction '{name}'", where, offer_direction(name, known))
    chosen = list(dict.fromkeys(wanted)) or [name for name in run.task.directions if name in known]
    if not chosen:
        remedy = (
            f"it has: {', '.join(known)}; name them with 'directions=[…]'" if known else "prepare data with that split"
        )
        raise DataError(f"the split '{split}' has none of the trained directions", str(run.data.path), remedy)
    return sorted(chosen)


def _hold(run: OpenedRun, config: EvaluateConfig, direction: str) -> Held:
    source, target = direction.split("-")
    sources, references = run.data.raw(config.split, direction)
    if config.max_sentences:
        sources, references = sources[: config.max_sentences], references[: config.max_sentences]
    encoded = encode(run.task, sources, source, target, config.search.batch_tokens)
    return Held(direction, sources, references, encoded)


def _assemble(held: Sequence[Held], outcomes: Sequence[Outcome]) -> list[list[Translation]]:
    """Outcomes in the order of all jobs → a list per direction."""
    rest = iter(outcomes)
    return [entry.encoded.assemble([next(rest) for _ in entry.encoded.jobs]) for entry in held]


def _earlier(path: Path) -> Results | None:
    try:
        return read_results(path)
    except DataError:  # a damaged file is replaced
        return None


# --- scoring ---------------------------------------------------------------------------------------------------------


def _results(
    run: OpenedRun,
    config: EvaluateConfig,
    held: Sequence[Held],
    translations: Sequence[Sequence[Translation]],
    speed: dict[str, Any],
) -> Results:
    directions: dict[str, DirectionResult] = {}
    signatures: dict[str, Any] = {"bleu": {}, "chrf": ""}
    notes: list[str] = []
    for entry, lines in zip(held, translations, strict=True):
        scorer = Scorer(entry.direction.split("-")[1], config.tokenizer)
        directions[entry.direction] = _score(scorer, entry, [t.text for t in lines], config.seed)
        signatures["bleu"][scorer.tokenization.name] = scorer.bleu_signature
        signatures["chrf"] = scorer.chrf_signature
        notes += _notes(run, scorer, entry)
    return Results(
        settings=_settings(run, config),
        directions=directions,
        tiers=run.data.tiers,
        signatures=signatures,
        decoding=speed,
        notes=list(dict.fromkeys(notes)),
        command=sys.argv,
        versions=versions(),
    )


def _score(scorer: Scorer, entry: Held, hypotheses: list[str], seed: int) -> DirectionResult:
    shuffled = displaced(hypotheses, f"{seed}/{entry.direction}")
    return DirectionResult(
        scores=scorer.score(hypotheses, entry.references),
        baselines={
            "copy": scorer.score(entry.sources, entry.references),
            "shuffled": scorer.score(shuffled, entry.references),
        },
        sentences=len(hypotheses),
        words=_words(hypotheses),
        reference_words=_words(entry.references),
        tokenizer=scorer.tokenization.name,
    )


def displaced(lines: Sequence[str], seed: str) -> list[str]:
    """The lines in a seeded random order in which none stays in its place (Sattolo's algorithm); one line stays."""
    order, draw = list(lines), random.Random(seed)
    for last in range(len(order) - 1, 0, -1):
        other = draw.randrange(last)
        order[last], order[other] = order[other], order[last]
    return order


def _words(lines: Sequence[str]) -> int:
    return sum(len(line.split()) for line in lines)


def _notes(run: OpenedRun, scorer: Scorer, entry: Held) -> list[str]:
    notes = [scorer.tokenization.note] if scorer.tokenization.note else []
    if entry.encoded.truncated:
        longest = run.task.max_positions()[0]
        notes.append(f"{entry.direction}: {entry.encoded.truncated} sources were cut to the model's {longest} tokens")
    blank = len(entry.sources) - sum(len(lines) for lines in entry.encoded.lines)
    if blank:
        notes.append(f"{entry.direction}: {blank} blank sources were left blank")
    if entry.direction not in run.task.directions:
        notes.append(f"{entry.direction}: not trained in this run (zero-shot)")
    return notes


def _settings(run: OpenedRun, config: EvaluateConfig) -> dict[str, Any]:
    """What decides the outputs and scores; compute layout does not."""
    return {
        "split": config.split,
        "checkpoint": run.checkpoint.name,
        "checkpoint_digest": sha256(run.checkpoint / MANIFEST),
        "data": run.data.fingerprint,
        "max_sentences": config.max_sentences,
        "seed": config.seed,
        "search": asdict(config.search),
        # A key that scores of earlier versions do not have: absent where it is the default.
        **({} if config.tokenizer == AUTO else {"tokenizer": config.tokenizer}),
        **asdict(run.inference),
    }


def _speed(
    translations: Sequence[Sequence[Translation]], outcomes: Sequence[Outcome], seconds: float, config: EvaluateConfig
) -> dict[str, Any]:
    """Words and tokens per second of decoding: over the summed time of all processes, divided by their number.

    And how tokens were routed.
    """
    tokens = sum(t.tokens for lines in translations for t in lines)
    words = _words([t.text for lines in translations for t in lines])
    processes = World.current().size if dist.is_initialized() else config.launch.processes
    busy = sum(outcome.seconds for outcome in outcomes) / processes
    return {
        "sentences": sum(len(lines) for lines in translations),
        "words": words,
        "tokens": tokens,
        "seconds": round(seconds, 3),
        "words_per_second": round(words / busy, 2) if busy else 0.0,
        "tokens_per_second": round(tokens / busy, 2) if busy else 0.0,
        "processes": processes,
        "routing": describe_all([outcome.routing for outcome in outcomes]),
    }


@contextmanager
def _progress(console: Console | None, total: int) -> Iterator[Callable[[int], None]]:
    columns = (TextColumn("translating"), BarColumn(), MofNCompleteColumn(), TextColumn("sentences"))
    with Progress(
        *columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console or Screen(quiet=True)
    ) as progress:
        task = progress.add_task("", total=total)
        yield lambda count: progress.advance(task, count)

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
from moe_train.data.text.languages import offer_direction
from moe_train.data.text.lines import sha256
from moe_train.errors import DataError
from moe_train.evaluation.decode_workers import decode
from moe_train.evaluation.loading import OpenedRun, open_run
from moe_train.evaluation.long_lines import cut_note
from moe_train.evaluation.result_files import ResultFiles, part_name, writable_folder, writing
from moe_train.evaluation.routed_tokens import describe_all
from moe_train.evaluation.scoring.bleu_chrf import AUTO, Scorer, require_tokenizer
from moe_train.evaluation.scoring.further_metrics import find_metrics, measure_with
from moe_train.evaluation.scoring.results import DirectionResult, Results, read_results
from moe_train.evaluation.translator import Encoded, JobResult, Translation, encode
from moe_train.screen import Screen
from moe_train.training.checkpoint.checksums import MANIFEST, replace_text
from moe_train.training.checkpoint.store import run_on_all_ranks
from moe_train.training.run.run_info import versions
from moe_train.training.runtime.world import World


@dataclass(frozen=True)
class HeldOutSet:
    """One direction of a split: untouched text, and the sources made ready for decoding."""

    direction: str
    sources: list[str]
    references: list[str]
    encoded: Encoded


def evaluate(config: EvaluateConfig, console: Console | None = None) -> Results:
    """Translates and scores; writes the :class:`~moe_train.evaluation.result_files.ResultFiles` of what is evaluated.

    Only all sentences of all trained directions go into ``<split>.json``. Results of another checkpoint or of other
    settings that stand in the same files are set aside.

    Args:
        console: where progress is shown, and where the results are; None: nowhere.

    Returns:
        The file's content.

    Raises:
        ConfigError, DataError, CheckpointError, LaunchError: as :func:`open_run` and :func:`decode`; also an unknown
            direction, a split without any, or a folder for results that cannot be written.
    """
    require_tokenizer(config.tokenizer)
    find_metrics(config.metrics)
    world = World.current()
    run = open_run(config.run, config.checkpoint, config.data, config.inference, world, config.data_verify)
    chosen = choose_directions(run, config.split, config.directions)
    everything = chosen == default_directions(run, config.split)
    part = part_name([] if everything else chosen, config.max_sentences)
    place = run_on_all_ranks(world, lambda: _place(run, config, part, console) if world.main else None)
    held = [_hold(run, config, name) for name in chosen]
    jobs = [job for entry in held for job in entry.encoded.jobs]
    start = time.perf_counter()
    with _progress(console, sum(len(job.sentences) for job in jobs)) as advance:
        outcomes = decode(run, jobs, config.search, config.launch, advance, config.expert_parallel)
    seconds = time.perf_counter() - start

    def finish() -> Results | None:
        return None if place is None else _scored(run, config, place, held, outcomes, seconds)

    found = run_on_all_ranks(world, finish)
    results = Results.from_json(world.broadcast(found.to_json() if found is not None else {}))
    if place is not None and console is not None:
        console.print(f"written: {place.files.scores}", highlight=False, markup=False, soft_wrap=True)
    return results


@dataclass(frozen=True)
class _Place:
    """Where results go, and what is to be said of it."""

    files: ResultFiles
    note: str


def _place(run: OpenedRun, config: EvaluateConfig, part: str, console: Console | None) -> _Place:
    """Found before hours of decoding, so that what cannot be written is said at once."""
    folder, note = writable_folder(run.folder.path, run.variant, config.out)
    if note and console is not None:
        console.print(f"note: {note}", highlight=False, markup=False, soft_wrap=True)
    return _Place(ResultFiles(folder, config.split, part), note)


def _scored(
    run: OpenedRun,
    config: EvaluateConfig,
    place: _Place,
    held: Sequence[HeldOutSet],
    outcomes: Sequence[JobResult],
    seconds: float,
) -> Results:
    """Writes outputs and scores; under a launcher one rank does it."""
    translations = _assemble(held, outcomes)
    results = _results(run, config, held, translations, _speed(translations, outcomes, seconds, config))
    results = replace(results, notes=[*results.notes, *filter(None, [place.note])])
    files = place.files
    with writing(files.folder):
        if files.scores.exists() and not _replaces(results, files.scores):
            results = replace(results, notes=[*results.notes, files.set_aside()])
        for entry, lines in zip(held, translations, strict=True):
            files.outputs(entry.direction).write(entry.sources, entry.references, lines)
        replace_text(files.scores, results.to_text())
    return results


def _replaces(results: Results, path: Path) -> bool:
    """Whether nothing is lost with the file that is there; one that cannot be read might hold anything."""
    try:
        earlier = read_results(path)
    except DataError:
        return False
    return earlier is not None and results.replaces(earlier)


def choose_directions(run: OpenedRun, split: str, wanted: Sequence[str]) -> list[str]:
    """The directions to evaluate, sorted: those wanted, else :func:`default_directions`.

    A direction for which there was no training text is no trained one, whatever held-out text there is for it.

    Raises:
        DataError: a direction that the split does not have, or a split that has none.
    """
    known = run.data.directions_of(split)
    for name in wanted:
        if name not in known:
            where = str(run.data.path)
            raise DataError(f"the split '{split}' has no direction '{name}'", where, offer_direction(name, known))
    chosen = sorted(set(wanted)) or default_directions(run, split)
    if not chosen:
        remedy = (
            f"it has: {', '.join(known)}; name them with 'directions=[…]'" if known else "prepare data with that split"
        )
        raise DataError(f"the split '{split}' has none of the trained directions", str(run.data.path), remedy)
    return chosen


def default_directions(run: OpenedRun, split: str) -> list[str]:
    """All directions that were trained and have sentences in the split, sorted."""
    known = run.data.directions_of(split)
    return sorted({name for name in run.trained if name in known})


def _hold(run: OpenedRun, config: EvaluateConfig, direction: str) -> HeldOutSet:
    source, target = direction.split("-")
    sources, references = run.data.raw(config.split, direction)
    if config.max_sentences:
        sources, references = sources[: config.max_sentences], references[: config.max_sentences]
    encoded = encode(run.task, sources, source, target, config.search.batch_tokens)
    return HeldOutSet(direction, sources, references, encoded)


def _assemble(held: Sequence[HeldOutSet], outcomes: Sequence[JobResult]) -> list[list[Translation]]:
    """Outcomes in the order of all jobs → a list per direction."""
    rest = iter(outcomes)
    return [entry.encoded.assemble([next(rest) for _ in entry.encoded.jobs]) for entry in held]


# --- scoring ---------------------------------------------------------------------------------------------------------


def _results(
    run: OpenedRun,
    config: EvaluateConfig,
    held: Sequence[HeldOutSet],
    translations: Sequence[Sequence[Translation]],
    speed: dict[str, Any],
) -> Results:
    directions: dict[str, DirectionResult] = {}
    signatures: dict[str, Any] = {"bleu": {}, "chrf": ""}
    notes: list[str] = []
    for entry, lines in zip(held, translations, strict=True):
        scorer = Scorer(entry.direction.split("-")[1], config.tokenizer)
        texts = [t.text for t in lines]
        measured, failed = _measured(config, entry, texts)
        scored = _score(scorer, entry, texts, config.seed, entry.direction not in run.trained)
        directions[entry.direction] = replace(scored, metrics=measured)
        notes += failed
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


def _score(scorer: Scorer, entry: HeldOutSet, hypotheses: list[str], seed: int, zero_shot: bool) -> DirectionResult:
    shuffled = move_earlier_results(hypotheses, f"{seed}/{entry.direction}")
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
        zero_shot=zero_shot,
    )


def _measured(config: EvaluateConfig, entry: HeldOutSet, hypotheses: list[str]) -> tuple[dict[str, float], list[str]]:
    """Scores of further metrics by name, and notes on those that failed."""
    scores: dict[str, float] = {}
    failed = []
    for name, metric in find_metrics(config.metrics).items():
        try:
            scores[name] = measure_with(metric, hypotheses, entry.references, entry.direction.split("-")[1])
        except ValueError as error:
            failed.append(f"{entry.direction}: the metric '{name}' has failed ({error})")
    return scores, failed


def move_earlier_results(lines: Sequence[str], seed: str) -> list[str]:
    """The lines in a seeded random order in which none stays in its place (Sattolo's algorithm); one line stays."""
    order, draw = list(lines), random.Random(seed)
    for last in range(len(order) - 1, 0, -1):
        other = draw.randrange(last)
        order[last], order[other] = order[other], order[last]
    return order


def _words(lines: Sequence[str]) -> int:
    return sum(len(line.split()) for line in lines)


def _notes(run: OpenedRun, scorer: Scorer, entry: HeldOutSet) -> list[str]:
    notes = [scorer.tokenization.note] if scorer.tokenization.note else []
    if entry.encoded.truncated:
        lines = [line + 1 for line in entry.encoded.truncated]
        notes.append(f"{entry.direction}, sources, {cut_note(lines, run.task.max_positions()[0])}")
    blank = len(entry.sources) - sum(len(lines) for lines in entry.encoded.lines)
    if blank:
        notes.append(f"{entry.direction}: {blank} blank sources were left blank")
    if entry.direction not in run.trained:
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
    translations: Sequence[Sequence[Translation]], outcomes: Sequence[JobResult], seconds: float, config: EvaluateConfig
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

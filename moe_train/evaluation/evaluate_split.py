"""Translates a held-out split in every direction, scores it and writes outputs and scores to the run folder."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from moe_train.evaluation.decode_workers import decode_batches
from moe_train.evaluation.loading import OpenedRun, open_run
from moe_train.evaluation.long_lines import cut_note
from moe_train.evaluation.result_files import ResultFiles, part_name, writable_folder, writing
from moe_train.evaluation.routed_tokens import describe_sum
from moe_train.evaluation.scoring.bleu_chrf import AUTO, Scorer, require_tokenizer
from moe_train.evaluation.scoring.examples import Lines, draw_examples
from moe_train.evaluation.scoring.further_metrics import Corpus, CorpusMetric, find_metrics, measure
from moe_train.evaluation.scoring.results import DirectionResult, Results, read_results
from moe_train.evaluation.translations import BatchResult, Translation
from moe_train.evaluation.translator import EncodedLines, encode
from moe_train.screen import Screen
from moe_train.training.checkpoint.checksums import MANIFEST, replace_text
from moe_train.training.checkpoint.store import run_on_all_ranks
from moe_train.training.run.run_info import versions
from moe_train.training.runtime.world import World


@dataclass(frozen=True)
class HeldOutSet:
    """One direction of a split: raw text, and the encoded sources."""

    direction: str
    sources: list[str]
    references: list[str]
    encoded: EncodedLines


def evaluate(config: EvaluateConfig, console: Console | None = None) -> Results:
    """Translates and scores; writes :class:`~moe_train.evaluation.result_files.ResultFiles`.

    ``<split>.json`` is written only for all sentences of all trained directions. Existing files of another checkpoint
    or of other settings are renamed and kept.

    Args:
        console: for progress and the place of the results; None: nothing is shown.

    Returns:
        The content of the scores file.

    Raises:
        ConfigError, DataError, CheckpointError, LaunchError: as :func:`open_run` and :func:`decode`; also an unknown
            direction, a split without directions, or a results folder that cannot be written.
    """
    require_tokenizer(config.tokenizer)
    metrics = find_metrics(config.metrics, config.metric)
    world = World.current()
    run = open_run(config.run, config.checkpoint, config.data, config.inference, world, config.data_verify)
    chosen = choose_directions(run, config.split, config.directions)
    everything = chosen == default_directions(run, config.split)
    part = part_name([] if everything else chosen, config.max_sentences)
    destination = run_on_all_ranks(world, lambda: find_destination(run, config, part, console) if world.main else None)
    held = [_encode_direction(run, config, name) for name in chosen]
    outcomes, seconds = decode_timed(run, config, [entry.encoded for entry in held], console, "translating")

    def finish() -> Results | None:
        if destination is None:
            return None
        return _score_and_write(run, config, metrics, destination, held, outcomes, seconds)

    found = run_on_all_ranks(world, finish)
    results = Results.from_json(world.broadcast(found.to_json() if found is not None else {}))
    if destination is not None and console is not None:
        console.print(f"written: {destination.files.scores}", highlight=False, markup=False, soft_wrap=True)
    return results


def decode_timed(
    run: OpenedRun, config: EvaluateConfig, encoded: Sequence[EncodedLines], console: Console | None, doing: str
) -> tuple[list[BatchResult], float]:
    """The results of all batches in order, and the seconds that they took.

    Args:
        doing: a word in front of the progress.
    """
    batches = [batch for lines in encoded for batch in lines.batches]
    start = time.perf_counter()
    with show_progress(console, sum(len(batch.sentences) for batch in batches), doing) as advance:
        outcomes = decode_batches(run, batches, config.search, config.launch, advance, config.expert_parallel)
    return outcomes, time.perf_counter() - start


@dataclass(frozen=True)
class Destination:
    """Files of the results, and a note where they are not in the run folder."""

    files: ResultFiles
    note: str


def find_destination(run: OpenedRun, config: EvaluateConfig, part: str, console: Console | None) -> Destination:
    """Checked before hours of decoding, so that an unwritable folder is reported at once."""
    folder, note = writable_folder(run.folder.path, run.variant, config.out)
    if note and console is not None:
        console.print(f"note: {note}", highlight=False, markup=False, soft_wrap=True)
    return Destination(ResultFiles(folder, config.split, part), note)


def _score_and_write(
    run: OpenedRun,
    config: EvaluateConfig,
    metrics: Mapping[str, CorpusMetric],
    destination: Destination,
    held: Sequence[HeldOutSet],
    outcomes: Sequence[BatchResult],
    seconds: float,
) -> Results:
    """Writes outputs and scores. Rank 0 calls it."""
    rest = iter(outcomes)
    translations = [entry.encoded.to_lines([next(rest) for _ in entry.encoded.batches]) for entry in held]
    results = _results(run, config, metrics, held, translations, _speed(translations, outcomes, seconds, config))
    results = replace(results, notes=[*results.notes, *filter(None, [destination.note])])
    files = destination.files
    with writing(files.folder):
        if files.scores.exists() and not _replaces(results, files.scores):
            results = replace(results, notes=[*results.notes, files.keep_earlier()])
        for entry, lines in zip(held, translations, strict=True):
            files.outputs(entry.direction).write(entry.sources, entry.references, lines)
        replace_text(files.scores, results.to_text())
    return results


def _replaces(results: Results, path: Path) -> bool:
    """Whether the existing file can be replaced without loss; False where it cannot be read."""
    try:
        earlier = read_results(path)
    except DataError:
        return False
    return earlier is not None and results.replaces(earlier)


def choose_directions(run: OpenedRun, split: str, wanted: Sequence[str]) -> list[str]:
    """The directions to evaluate, sorted: those wanted, else :func:`default_directions`.

    A direction without training text does not count as trained, even if it has held-out text.

    Raises:
        DataError: the split does not have a direction, or has none of the trained ones.
    """
    known = run.data.directions_of(split)
    for name in wanted:
        if name not in known:
            where = str(run.data.path)
            raise DataError(f"the split '{split}' has no direction '{name}'", where, offer_direction(name, known))
    chosen = sorted(set(wanted)) or default_directions(run, split)
    if not chosen:
        if known:
            remedy = f"it has: {', '.join(known)}; name them with 'directions=[…]'"
        elif run.folder.checkpoints.is_dir():
            remedy = "prepare data with that split"
        else:
            remedy = "an export has no held-out text: give a prepared data folder, data=FOLDER"
        raise DataError(f"the split '{split}' has none of the trained directions", str(run.data.path), remedy)
    return chosen


def default_directions(run: OpenedRun, split: str) -> list[str]:
    """All directions that were trained and have sentences in the split, sorted."""
    known = run.data.directions_of(split)
    return sorted({name for name in run.trained if name in known})


def _encode_direction(run: OpenedRun, config: EvaluateConfig, direction: str) -> HeldOutSet:
    source, target = direction.split("-")
    sources, references = run.data.raw(config.split, direction)
    if config.max_sentences:
        sources, references = sources[: config.max_sentences], references[: config.max_sentences]
    encoded = encode(run.translating_task, sources, source, target, config.search.batch_tokens)
    return HeldOutSet(direction, sources, references, encoded)


# --- scoring ---------------------------------------------------------------------------------------------------------


def _results(
    run: OpenedRun,
    config: EvaluateConfig,
    metrics: Mapping[str, CorpusMetric],
    held: Sequence[HeldOutSet],
    translations: Sequence[Sequence[Translation]],
    speed: dict[str, Any],
) -> Results:
    directions: dict[str, DirectionResult] = {}
    outputs: dict[str, Lines] = {}
    signatures: dict[str, Any] = {"bleu": {}, "chrf": ""}
    notes: list[str] = []
    for entry, lines in zip(held, translations, strict=True):
        scorer = Scorer(entry.direction.split("-")[1], config.tokenizer)
        texts = [t.text for t in lines]
        outputs[entry.direction] = (entry.sources, entry.references, texts)
        zero_shot = entry.direction not in run.trained
        directions[entry.direction] = _score(scorer, entry, texts, config.seed, zero_shot)
        signatures["bleu"][scorer.tokenization.name] = scorer.bleu_signature
        signatures["chrf"] = scorer.chrf_signature
        notes += _notes(run, scorer, entry)
    corpora = [
        Corpus(direction, sources, texts, references) for direction, (sources, references, texts) in outputs.items()
    ]
    for name, metric in metrics.items():
        scores, failed = measure(name, metric, corpora)
        notes += failed
        for direction, found in scores.items():
            former = directions[direction]
            directions[direction] = replace(former, metrics={**former.metrics, name: found.score})
        if known := sorted({found.signature for found in scores.values()} - {""}):
            signatures[name] = known
    return Results(
        settings=settings_of(run, config),
        directions=directions,
        tiers=run.data.tiers,
        signatures=signatures,
        decoding=speed,
        notes=list(dict.fromkeys(notes)),
        command=sys.argv,
        versions=versions(),
        examples=draw_examples(outputs, config.examples, config.seed),
    )


def _score(scorer: Scorer, entry: HeldOutSet, hypotheses: list[str], seed: int, zero_shot: bool) -> DirectionResult:
    shuffled = derange(hypotheses, f"{seed}/{entry.direction}")
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


def derange(lines: Sequence[str], seed: str) -> list[str]:
    """The lines in a seeded random order in which none keeps its position (Sattolo's algorithm)."""
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
        notes.append(f"{entry.direction}, sources, {cut_note(lines, run.translating_task.max_positions()[0])}")
    blank = len(entry.sources) - sum(len(lines) for lines in entry.encoded.lines)
    if blank:
        notes.append(f"{entry.direction}: {blank} blank sources have blank outputs")
    blank = sum(not line.strip() for line in entry.references)
    if blank:
        notes.append(f"{entry.direction}: {blank} references are blank, which no translation matches")
    if entry.direction not in run.trained:
        notes.append(f"{entry.direction}: not trained in this run (zero-shot)")
    return notes


def settings_of(run: OpenedRun, config: EvaluateConfig) -> dict[str, Any]:
    """The settings that determine outputs and scores; the compute layout does not."""
    return {
        "split": config.split,
        "checkpoint": run.checkpoint.name,
        "checkpoint_digest": sha256(run.checkpoint / MANIFEST),
        "data": run.data.fingerprint,
        "max_sentences": config.max_sentences,
        "seed": config.seed,
        "search": asdict(config.search),
        # Absent where it is the default: results of earlier versions do not have this key.
        **({} if config.tokenizer == AUTO else {"tokenizer": config.tokenizer}),
        **({"data_verify": "never"} if config.data_verify == "never" else {}),
        **asdict(run.inference),
    }


def _speed(
    translations: Sequence[Sequence[Translation]],
    outcomes: Sequence[BatchResult],
    seconds: float,
    config: EvaluateConfig,
) -> dict[str, Any]:
    """Words and tokens per second of decoding (over the mean time of a process), and how tokens were routed."""
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
        "routing": describe_sum([outcome.routing for outcome in outcomes]),
    }


@contextmanager
def show_progress(console: Console | None, total: int, what: str) -> Iterator[Callable[[int], None]]:
    """Yields a function that is called with a number of finished sentences."""
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TextColumn("sentences"))
    with Progress(
        *columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console or Screen(quiet=True)
    ) as progress:
        task = progress.add_task("", total=total)
        yield lambda count: progress.advance(task, count)

"""BLEU on the validation split while training: every rank translates its share, all get the same scores."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from torch import nn

from moe_train.config import SearchConfig
from moe_train.data.folder import DataFolder
from moe_train.evaluation.long_lines import cut_note
from moe_train.evaluation.scoring.bleu_chrf import Scorer
from moe_train.evaluation.translator import Encoded, Job, JobResult, Translator, encode
from moe_train.routing.context import LocalReduction
from moe_train.tasks.base import TranslatingTask
from moe_train.training.runtime.world import World

_log = logging.getLogger(__name__)


def make_bleu_validator(
    task: TranslatingTask,
    data: DataFolder,
    search: SearchConfig,
    *,
    max_sentences: int = 0,
    split: str = "valid",
    expert_parallel: int | None = None,
) -> Callable[..., dict[str, float]]:
    """Prepares validation by BLEU. Call it on every rank, and the result on every rank at the same update.

    Args:
        task: its ``directions`` that the split has are scored.
        max_sentences: the first so many of each direction (0: all).
        expert_parallel: above 1 the ranks hold each other's experts and search in step (None: as the config says).

    Returns:
        ``model → {direction: BLEU}``, the same for any number of ranks; the model is left as it was. A second argument
        is called before each round of batches, on every rank, and may break off by an error.
    """
    if expert_parallel is None:
        expert_parallel = task.config.layout.expert_parallel
    together = expert_parallel > 1
    directions = [name for name in task.directions if name in data.directions_of(split)]
    held = {name: _hold(task, data, split, name, search, max_sentences) for name in directions}
    jobs = [job for encoded, _ in held.values() for job in encoded.jobs]

    def validate(model: nn.Module, between: Callable[[], None] = lambda: None) -> dict[str, float]:
        device = next(model.parameters()).device
        world = World.current(device)
        group = world if together and world.size > 1 else None
        with _evaluating(model):
            translator = Translator(task, model, search, device, group)  # type: ignore[arg-type]
            outcomes = _share(translator, jobs, world, group is not None, between)
        return world.broadcast(_scores(held, outcomes) if world.main else {})

    return validate


def _hold(
    task: TranslatingTask, data: DataFolder, split: str, direction: str, search: SearchConfig, limit: int
) -> tuple[Encoded, list[str]]:
    source, target = direction.split("-")
    sources, references = data.raw(split, direction)
    if limit:
        sources, references = sources[:limit], references[:limit]
    encoded = encode(task, sources, source, target, search.batch_tokens)
    if encoded.truncated:
        note = cut_note([line + 1 for line in encoded.truncated], task.max_positions()[0])
        _log.warning("%s %s, sources of BLEU, %s", split, direction, note)
    return encoded, references


def _share(
    translator: Translator, jobs: list[Job], world: World, together: bool, between: Callable[[], None]
) -> list[JobResult]:
    """Every n-th job is this rank's; all outcomes on every rank, in the order of the jobs."""
    outcomes = []
    for first in range(0, len(jobs), world.size):
        between()
        number = first + world.rank
        if number < len(jobs):
            outcomes.append(translator.run(jobs[number]))
        elif together:
            translator.run(Job(jobs[0].source, jobs[0].target, (), ()))
    shares = world.gather([asdict(outcome) for outcome in outcomes])
    return [JobResult.from_json(shares[i % world.size][i // world.size]) for i in range(len(jobs))]


def _scores(held: dict[str, tuple[Encoded, list[str]]], outcomes: list[JobResult]) -> dict[str, float]:
    rest = iter(outcomes)
    scores = {}
    for direction, (encoded, references) in held.items():
        lines = encoded.assemble([next(rest) for _ in encoded.jobs])
        scores[direction] = Scorer(direction.split("-")[1]).score([t.text for t in lines], references).bleu
    return scores


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Routers see one rank's tokens only meanwhile, as in an evaluation by one process."""
    settings = getattr(model, "settings", None)
    if settings is None:
        yield
        return
    ranks, settings.ranks = settings.ranks, LocalReduction()
    try:
        yield
    finally:
        settings.ranks = ranks

"""BLEU on the validation split during training: every rank translates a part, all get the same scores."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict

from moe_train.config import SearchConfig
from moe_train.data.folder import DataFolder
from moe_train.evaluation.long_lines import cut_note
from moe_train.evaluation.scoring.bleu_chrf import Scorer
from moe_train.evaluation.translations import Batch, BatchResult
from moe_train.evaluation.translator import EncodedLines, Translator, encode
from moe_train.models.trainable import TrainableModel
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
    """Prepares validation by BLEU. Every rank calls it, and calls the result at the same update.

    Args:
        task: those of its ``directions`` that the split has are scored.
        max_sentences: number of sentences of each direction, from its beginning (0: all).
        expert_parallel: above 1 the ranks share experts and search at the same time (None: as in the config).

    Returns:
        ``model → {direction: BLEU}``, the same for any number of ranks; the model is not changed. A second argument is
        called before each round of batches, on every rank, and may raise an error to end the validation.
    """
    if expert_parallel is None:
        expert_parallel = task.config.layout.expert_parallel
    together = expert_parallel > 1
    directions = [name for name in task.directions if name in data.directions_of(split)]
    held = {name: _encode_direction(task, data, split, name, search, max_sentences) for name in directions}
    batches = [batch for encoded, _ in held.values() for batch in encoded.batches]

    def validate(model: TrainableModel, before_round: Callable[[], None] = lambda: None) -> dict[str, float]:
        device = next(model.parameters()).device
        world = World.current(device)
        group = world if together and world.size > 1 else None
        # Routers use the tokens of their rank only, as in an evaluation by one process.
        former = model.set_ranks(LocalReduction())
        try:
            translator = Translator(task, model, search, device, group)  # type: ignore[arg-type]
            outcomes = _translate_share(translator, batches, world, group is not None, before_round)
        finally:
            model.set_ranks(former)
        return world.broadcast(_scores(held, outcomes) if world.main else {})

    return validate


def _encode_direction(
    task: TranslatingTask, data: DataFolder, split: str, direction: str, search: SearchConfig, limit: int
) -> tuple[EncodedLines, list[str]]:
    source, target = direction.split("-")
    sources, references = data.raw(split, direction)
    if limit:
        sources, references = sources[:limit], references[:limit]
    encoded = encode(task, sources, source, target, search.batch_tokens)
    if encoded.truncated:
        note = cut_note([line + 1 for line in encoded.truncated], task.max_positions()[0])
        _log.warning("%s %s, sources of BLEU, %s", split, direction, note)
    return encoded, references


def _translate_share(
    translator: Translator, batches: list[Batch], world: World, together: bool, before_round: Callable[[], None]
) -> list[BatchResult]:
    """Translates every n-th batch of n ranks; returns the results of all batches, in their order, on every rank."""
    outcomes = []
    for first in range(0, len(batches), world.size):
        before_round()
        number = first + world.rank
        if number < len(batches):
            outcomes.append(translator.run(batches[number]))
        elif together:
            translator.run(Batch(batches[0].source, batches[0].target, (), ()))
    shares = world.gather([asdict(outcome) for outcome in outcomes])
    return [BatchResult.from_json(shares[i % world.size][i // world.size]) for i in range(len(batches))]


def _scores(held: dict[str, tuple[EncodedLines, list[str]]], outcomes: list[BatchResult]) -> dict[str, float]:
    rest = iter(outcomes)
    scores = {}
    for direction, (encoded, references) in held.items():
        lines = encoded.to_lines([next(rest) for _ in encoded.batches])
        scores[direction] = Scorer(direction.split("-")[1]).score([t.text for t in lines], references).bleu
    return scores

"""What launched processes do in tests of validation BLEU."""

from __future__ import annotations

from typing import Any

import torch

from moe_train.config import LaunchConfig, RunConfig, SearchConfig
from moe_train.config.evaluation import EvaluateConfig
from moe_train.data.folder import DataFolder
from moe_train.evaluation.bleu_validation import make_bleu_validator
from moe_train.evaluation.evaluate_split import evaluate
from moe_train.launch.process_group import joined_world
from moe_train.routing.context import LocalReduction
from moe_train.tasks import build_task
from tests.evaluation.runs import MODEL

SEARCH = SearchConfig(beam=2, max_length_ratio=0.5, max_length_offset=5, batch_tokens=100)


class _Watched(LocalReduction):
    """Ranks that must be given back."""


def bleu(data: str, strategy: str, expert_parallel: int) -> dict[str, Any]:
    """Validation BLEU twice, on a model in training mode; the experts spread over ``expert_parallel`` ranks."""
    with joined_world(LaunchConfig(timeout_minutes=2.0), threads=1):
        folder = DataFolder.open(data)
        task = build_task(RunConfig(data, routing={"name": strategy, "num_experts": 4}, model=MODEL), folder)
        model = task.build_model(_layout(expert_parallel))
        with torch.no_grad():
            model.decoder.output.weight.mul_(6.0)
        model.train()
        ranks = _Watched()
        model.set_ranks(ranks)
        validate = make_bleu_validator(task, folder, SEARCH, max_sentences=9, expert_parallel=expert_parallel)
        first, second = validate(model), validate(model)
        assert first == second and model.training and model.settings.ranks is ranks
        held = next(p.shape[0] for p in model.parameters() if getattr(p, "expert", False))
        return {"bleu": first, "experts": held}


def scores(run: str, expert_parallel: int) -> dict[str, float]:
    """BLEU of two directions, evaluated by the ranks of the default group; the file that was written says the same."""
    directions = ("de-en", "en-fr")
    config = EvaluateConfig(
        run, search=SEARCH, directions=directions, max_sentences=7, launch=LaunchConfig(device="cpu"),
        expert_parallel=expert_parallel,
    )  # fmt: skip
    results = evaluate(config)
    assert results.decoding["processes"] == torch.distributed.get_world_size()
    return {name: results.directions[name].scores.bleu for name in directions}


def _layout(expert_parallel: int) -> Any:
    if expert_parallel == 1:
        return None
    from moe_train.parallel.layout import ExpertLayout
    from moe_train.parallel.layout_plan import LayoutPlan

    return ExpertLayout.build(LayoutPlan(2, expert_parallel, 4))

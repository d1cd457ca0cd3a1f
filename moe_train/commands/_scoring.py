"""Scoring a run: what ``moe-evaluate`` does, and ``moe-train evaluate=test`` when training is finished."""

from __future__ import annotations

from moe_train.config import RunConfig
from moe_train.config.evaluation import EvaluateConfig
from moe_train.errors import ConfigError
from moe_train.evaluation.evaluate_split import evaluate
from moe_train.evaluation.measure_task import measure, show_measures
from moe_train.evaluation.scoring.score_table import show
from moe_train.launch.job.env import under_launcher
from moe_train.screen import Screen
from moe_train.training.run.run_folder import RunFolder
from moe_train.training.runtime.world import World


def score(config: EvaluateConfig, world: World) -> float:
    """Evaluates and prints the table; every rank calls it.

    Returns:
        The average chrF++, or the first of the task's own measures.
    """
    if not RunFolder.open(config.run).config.task.translates:
        if config.metrics:
            raise ConfigError(
                "metrics are of translations, and the run's task makes none", "metrics", "leave out metrics=…"
            )
        measured = measure(config)
        show_measures(measured, Screen())
        return next(iter(measured["average"].values()))
    results = evaluate(config, Screen(stderr=True) if world.main else None)
    if world.main:
        show(results, Screen())
    return results.average().chrf


def score_when_finished(config: RunConfig, folder: RunFolder, world: World) -> None:
    """As ``evaluate`` wants it, unless it has been done. The experts stay divided as they were in training."""
    if config.evaluate is None or not folder.finished or not folder.unscored(config):
        return
    score(
        EvaluateConfig(
            run=str(folder.path),
            split=config.evaluate,
            search=config.search,
            launch=config.launch,
            expert_parallel=max(1, config.layout.expert_parallel),
            data_verify=config.data_verify,
        ),
        world,
    )


def check_scoring(config: RunConfig) -> None:
    """Refuses what could not be scored at the end.

    Raises:
        ConfigError: a launcher's ranks and a task that only one process measures.
    """
    if config.evaluate is not None and under_launcher() and not config.task.translates:
        raise ConfigError(
            f"task={config.task.name} is measured by one process",
            f"evaluate={config.evaluate}",
            "leave it out here and run moe-evaluate when training is finished",
        )

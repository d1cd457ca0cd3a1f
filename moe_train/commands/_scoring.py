"""Scores a run: for ``moe-evaluate``, and for ``moe-train evaluate=test`` when training is finished."""

from __future__ import annotations

from moe_train.config import RunConfig
from moe_train.config.evaluation import EvaluateConfig
from moe_train.errors import ConfigError
from moe_train.evaluation.evaluate_split import evaluate
from moe_train.evaluation.inference.score_split import print_sums, score_split
from moe_train.evaluation.measure_task import evaluate_task, show_measures
from moe_train.evaluation.scoring.score_table import print_scores
from moe_train.launch.job.env import under_launcher
from moe_train.screen import Screen
from moe_train.training.run.run_folder import RunFolder
from moe_train.training.runtime.world import World


def score(config: EvaluateConfig, world: World) -> float:
    """Evaluates and prints the table; every rank calls it.

    Returns:
        The average chrF++, the log-probability per token with ``mode=score``, or the first of the task's own measures.
    """
    if not RunFolder.open(config.run).config.task.translates:
        if config.metrics:
            raise ConfigError(
                "metrics need translations, which the run's task does not produce", "metrics", "omit metrics=…"
            )
        if config.mode == "score":
            raise ConfigError("the run's task does not translate", "mode=score", "omit mode=score")
        measured = evaluate_task(config)
        show_measures(measured, Screen())
        return next(iter(measured["average"].values()))
    progress = Screen(stderr=True) if world.main else None
    if config.mode == "score":
        scored = score_split(config, progress)
        if world.main:
            print_sums(scored, Screen())
        return float(scored["average"]["score_per_token"])
    results = evaluate(config, progress)
    if world.main:
        print_scores(results, Screen())
    return results.average().chrf


def score_when_finished(config: RunConfig, folder: RunFolder, world: World) -> None:
    """Scores the split ``evaluate``, unless it is scored already, with the expert layout of the training."""
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
    """Checks that the run can be scored at its end.

    Raises:
        ConfigError: several ranks of a launcher, and a task that only one process can evaluate.
    """
    if config.evaluate is not None and under_launcher() and not config.task.translates:
        raise ConfigError(
            f"task={config.task.name} is evaluated by one process only",
            f"evaluate={config.evaluate}",
            "omit it here and run moe-evaluate when training is finished",
        )

"""Makes the ``moe-train`` command that trains the planned model with the chosen layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from moe_train.analysis.planner.choose_layout import LayoutComparison

_GROUPS = ("model", "routing", "engine")
_TASKS = {"vision_transformer": "image_classification", "encoder": "cross_lingual_lm"}


def train_words(plan: LayoutComparison, choices: Mapping[str, str], typed: Sequence[str]) -> list[str]:
    """Overrides for ``moe-train``.

    Args:
        choices: the chosen option of each Hydra group, such as ``{"model": "base"}``.
        typed: overrides of ``moe-plan``; keys of model, routing and engine are kept.
    """
    config, chosen = plan.config, plan.chosen
    words = [f"{group}={choices[group]}" for group in _GROUPS]
    words += [word for word in typed if word.lstrip("+").split(".")[0] in _GROUPS and "." in word.partition("=")[0]]
    if task := _TASKS.get(config.model.name):
        words.append(f"task={task}")
    training, layout = config.training, chosen.layout
    tokens = chosen.work.tokens * chosen.work.micro_batches * layout.world
    words += [
        f"training.tokens_per_update={training.tokens_per_update or round(tokens)}",
        f"training.precision={training.precision}",
    ]
    if training.accumulation != 1:
        words.append(f"training.accumulation={training.accumulation}")
    if training.recompute:
        words.append("training.recompute=true")
    if training.optimizer != "adam":
        words.append(f"training.optimizer.name={training.optimizer}")
    if layout.expert_parallel > 1:
        words.append(f"layout.expert_parallel={layout.expert_parallel}")
    if layout.two_level:
        words.append("layout.two_level=true")
    return words


def train_command(plan: LayoutComparison, words: Sequence[str]) -> str:
    """The command line: one process per rank on one host, a Slurm job for several hosts.

    Args:
        words: of :func:`train_words`.
    """
    layout = plan.chosen.layout
    nodes, ranks = layout.world // layout.ranks_per_node, layout.ranks_per_node
    last = " ".join(["data=DIR", *words])
    if nodes == 1:
        return f"moe-train {last}" + (f" launch.processes={ranks}" if ranks > 1 else "")
    gpus = f" --gpus-per-node={ranks}" if plan.config.cluster.device == "cuda" else ""
    return f"sbatch --nodes={nodes} --ntasks-per-node={ranks}{gpus} scripts/slurm/train.sbatch {last}"

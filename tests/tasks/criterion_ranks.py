"""What each process of test_criterion_distributed does; in a module that a spawned process can import by name."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from moe_train.data.batching import split_micro_batch
from moe_train.data.folder import DataFolder
from moe_train.parallel.reducers import DistReduction
from moe_train.tasks.translation.task import TranslationTask
from tests.tasks.helpers import make_task

WORLD = 2
CASES: list[tuple[dict[str, Any], bool]] = [
    ({"name": "switch", "num_experts": 4, "balance_weight": 0.3, "z_weight": 0.2}, True),
    ({"name": "switch", "num_experts": 4}, False),  # an output matrix of its own, used outside DDP's forward
    ({"name": "thor", "num_experts": 3, "consistency_weight": 2.0}, True),
]
LOSSES: dict[str, dict[str, Any]] = {
    "switch": {"name": "switch", "num_experts": 4, "z_weight": 0.1, "capacity_factor": 1.0},
    "top_k": {"name": "top_k", "score_noise": 1.0, "importance_weight": 0.1, "load_weight": 0.1},
    "sam": {"name": "sam", "num_experts": 4, "num_groups": 2, "z_weight": 0.1},
    "smoe": {"name": "smoe", "num_experts": 4, "balance_over": "executed", "decoder": "switch"},
    "xmoe": {"name": "xmoe", "num_experts": 4, "passes": 2, "consistency_weight": 1.0},
    "thor": {"name": "thor", "num_experts": 4},
    "expert_choice": {"name": "expert_choice", "num_experts": 4, "decoder": "hash"},
}
BATCHES = (np.arange(0, 1200, 90), np.array([5]))  # the second leaves a rank without a sentence


def task_of(folder: DataFolder, routing: dict[str, Any], tied: bool) -> TranslationTask:
    task = make_task(folder, routing=routing)
    task.with_config(model=dataclasses.replace(task.config.model, share_embeddings=tied))
    return task


def gradients(model: nn.Module) -> list[torch.Tensor]:
    return [p.grad.clone() for p in model.parameters()]  # type: ignore[union-attr]


def alone(task: TranslationTask, batch: np.ndarray) -> list[torch.Tensor]:
    model, sample = task.build_model().double().train(), task.train_sample(batch)
    (task.build_criterion()(model, sample)[0] / sample["ntokens"]).backward()
    return gradients(model)


def together(task: TranslationTask, batch: np.ndarray, rank: int) -> list[torch.Tensor]:
    inner = task.build_model().double().train()
    inner.set_ranks(DistReduction(dist.group.WORLD))  # type: ignore[operator]
    model = DistributedDataParallel(inner)
    sample = task.train_sample(split_micro_batch(batch, rank, WORLD))
    tokens = torch.tensor(sample["ntokens"])
    dist.all_reduce(tokens)
    loss, _, _ = task.build_criterion()(model, {**sample, "world_ntokens": tokens})
    (loss / tokens * WORLD).backward()
    return gradients(inner)


def loss_collectives(path: str) -> dict[tuple[str, bool, int], tuple[int, int, int]]:
    """Reductions that the routers' group enters in forward, backward and evaluation.

    By routing, whether activations are recomputed, and batch. With recomputation the gradients must be the same.
    """
    folder, group = DataFolder.open(path), dist.new_group()
    found = {}
    for name, routing in LOSSES.items():
        task = task_of(folder, routing, tied=True)
        task.with_config(model=dataclasses.replace(task.config.model, sparse_layers="all"))
        criterion, kept = task.build_criterion(), {}
        for recompute, number in itertools.product((False, True), range(len(BATCHES))):
            model = task.build_model().train()
            model.set_ranks(DistReduction(group))
            model.set_recompute(recompute)
            sample = task.train_sample(split_micro_batch(BATCHES[number], dist.get_rank(), WORLD))
            entered = [group._get_sequence_number_for_group()]
            loss = criterion(model, {**sample, "world_ntokens": torch.tensor(100)})[0]
            entered.append(group._get_sequence_number_for_group())
            loss.backward()
            entered.append(group._get_sequence_number_for_group())
            criterion(model.eval(), sample)
            entered.append(group._get_sequence_number_for_group())
            found[name, recompute, number] = tuple(after - before for before, after in itertools.pairwise(entered))
            gradient = [p.grad for p in model.parameters()]
            for one, other in zip(kept.setdefault(number, gradient), gradient, strict=True):
                assert one is other is None or torch.equal(one, other)
    dist.destroy_process_group(group)
    return found


def work(rank: int, path: str, rendezvous: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=WORLD)
    folder = DataFolder.open(path)
    for routing, tied in CASES:
        task = task_of(folder, routing, tied)
        for batch in BATCHES:
            expected, found = alone(task, batch), together(task, batch, rank)
            norm = torch.stack([g.norm() for g in expected]).norm()
            worst = max((one - other).norm() for one, other in zip(expected, found, strict=True))
            assert worst < 1e-6 * norm, (routing, len(batch), float(worst / norm))
    dist.destroy_process_group()

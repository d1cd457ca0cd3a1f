"""A real, small task for the loop: predict the next symbol of arithmetic sequences, with experts chosen by symbol."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moe_train.config import RunConfig, build
from moe_train.data.batching import BatchSettings, Indices, WorldBatches
from moe_train.models.trainable import TrainableModel
from moe_train.routing.types import RoutingStatistics, count_statistics
from moe_train.tasks.base import TrainingTask

SYMBOLS, EXPERTS, WIDTH, SENTENCES = 12, 4, 16, 120


class ToyModel(TrainableModel):
    """Embedding, experts (stacked and tagged as the pool's are), norm, output. Remembers what routers would be told."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.embed = nn.Embedding(SYMBOLS, WIDTH)
        self.experts = nn.Parameter(torch.randn(EXPERTS, WIDTH, WIDTH) / WIDTH**0.5)
        self.experts.expert = True  # type: ignore[attr-defined]
        self.norm = nn.LayerNorm(WIDTH)
        self.output = nn.Linear(WIDTH, SYMBOLS)
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("seen", torch.zeros(EXPERTS))

    def forward(self, symbols: Tensor) -> tuple[Tensor, RoutingStatistics]:
        """symbols [N] → logits [N, SYMBOLS]."""
        x = self.embed(symbols)
        choice = symbols % EXPERTS
        y = torch.bmm(x.unsqueeze(1), self.experts.index_select(0, choice)).squeeze(1)
        x = self.norm(x + self.dropout(torch.relu(y)))
        return self.output(x), count_statistics(choice.unsqueeze(1), None, EXPERTS)

    def after_update(self, statistics: Mapping[int, RoutingStatistics]) -> None:
        """Learns from loads, as balancing routers do."""
        self.seen += statistics[0].load.to(self.seen.dtype)


class ToyCriterion(nn.Module):
    """Cross-entropy as a sum, times ``factor`` of the sample where a test puts one."""

    def forward(self, model: nn.Module, sample: dict[str, Any]) -> tuple[Tensor, int, dict[str, Any]]:
        """The contract of criterions."""
        logits, statistics = model(sample["net_input"]["symbols"])
        loss = nn.functional.cross_entropy(logits, sample["target"], reduction="sum")
        logging = {
            "loss": loss.detach(),
            "nll_loss": loss.detach(),
            "ntokens": sample["ntokens"],
            "nsentences": sample["nsentences"],
        }
        if "world_ntokens" in sample:
            logging["routing"] = {0: statistics}
        return loss * sample.get("factor", 1.0), sample["ntokens"], logging


class ToyTask(TrainingTask):
    """Sequences, in two held-out sets."""

    def __init__(self, config: RunConfig, dropout: float = 0.1) -> None:
        self.config, self.dropout = config, dropout
        draws = np.random.default_rng(7)
        self.starts = draws.integers(0, SYMBOLS, SENTENCES)
        self.steps = draws.integers(1, 4, SENTENCES)
        self.lengths = draws.integers(3, 9, SENTENCES)

    def build_model(self, layout: Any = None) -> TrainableModel:
        """Always the same weights for a seed."""
        torch.manual_seed(self.config.seed)
        return ToyModel(self.dropout)

    def build_criterion(self) -> nn.Module:
        """Cross-entropy."""
        return ToyCriterion()

    def train_batches(self) -> WorldBatches:
        """The project's own batches of the world."""
        training = self.config.training
        settings = BatchSettings(training.tokens_per_update, training.accumulation, seed=self.config.seed)
        return WorldBatches(self.lengths, self.lengths, [SENTENCES], settings)

    def train_sample(self, indices: Indices, update: int = 0) -> dict[str, Any]:
        """Flat symbols of these sentences."""
        rows = [(self.starts[i] + self.steps[i] * np.arange(self.lengths[i] + 1)) % SYMBOLS for i in indices]
        sources = np.concatenate([r[:-1] for r in rows]) if rows else np.empty(0, np.int64)
        targets = np.concatenate([r[1:] for r in rows]) if rows else np.empty(0, np.int64)
        return {
            "nsentences": len(indices),
            "ntokens": len(targets),
            "target": torch.from_numpy(targets),
            "net_input": {"symbols": torch.from_numpy(sources)},
        }

    def evaluation_sets(self, split: str, max_items: int = 0) -> Mapping[str, Sequence[Indices]]:
        """Two sets of uneven size."""
        return {"a-b": [np.arange(0, 7), np.arange(7, 20)], "b-a": [np.arange(20, 31)]}

    def evaluation_sample(self, split: str, name: str, indices: Indices) -> dict[str, Any]:
        """As in training."""
        return self.train_sample(indices)


def toy_config(**training: Any) -> RunConfig:
    """A config for the toy; nested groups as mappings."""
    defaults: dict[str, Any] = {
        "max_updates": 12,
        "tokens_per_update": 120,
        "accumulation": 2,
        "log_every": 4,
        "threads": 1,
        "optimizer": {"lr": 0.01},
        "schedule": {"warmup_updates": 3},
        "checkpoint": {"every_updates": 5},
        "validation": {"every_updates": 6},
    }
    return build(RunConfig, {"data": "toy", "training": {**defaults, **training}})

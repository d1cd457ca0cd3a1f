"""Measures traffic and memory of a sparse layer or a model on real ranks, for comparison with the cost model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe_train.analysis.planner.cost_memory import StateSharding, kept_bytes, memory_plan
from moe_train.analysis.planner.cost_shape import SizedVocabulary, SparseShape, model_shape
from moe_train.analysis.planner.cost_traffic import LinkTraffic, Workload, block_flows, block_traffic, step_traffic
from moe_train.config import ModelConfig
from moe_train.layers import MoELayer
from moe_train.parallel.gradients import reduce_dense_gradients, reduce_expert_gradients
from moe_train.parallel.layout import ExpertLayout
from moe_train.parallel.layout_plan import LayoutPlan, plan_layout
from moe_train.parallel.reducers import DistReduction
from moe_train.parallel.traffic import LinkType
from moe_train.routing import routing_config

COUNTED = ("dispatched_rows", "returned_rows", "payload_bytes", "metadata_bytes")


@dataclass(frozen=True)
class TrafficCase:
    """One layer with one layout; tokens are noise, so that loads of an untrained gate are nearly equal.

    Attributes:
        routing: the ``routing`` group.
        sentences, length: of each rank's batch.
    """

    routing: Mapping[str, Any]
    expert_parallel: int = 4
    ranks_per_node: int = 2
    two_level: bool = False
    dim: int = 256
    hidden: int = 64
    sentences: int = 32
    length: int = 64
    seed: int = 1

    @property
    def tokens(self) -> int:
        """Tokens of one rank."""
        return self.sentences * self.length

    def layout(self, world: int) -> LayoutPlan:
        """The layout for ``world`` ranks."""
        experts = int(self.routing["num_experts"])
        return plan_layout(world, self.ranks_per_node, self.expert_parallel, experts, self.two_level)


@dataclass(frozen=True)
class Measured:
    """Sums over all ranks of one step (forward and backward).

    Attributes:
        by_link: counters by link and name.
        load: [E] pairs of each expert.
    """

    by_link: Mapping[LinkType, Mapping[str, int]]
    load: tuple[int, ...]


def measure_layer(case: TrafficCase) -> Measured:
    """Runs one step; every rank calls it. The result is the same on all ranks."""
    layout = ExpertLayout.build(case.layout(dist.get_world_size()))
    layer = MoELayer(case.dim, case.hidden, case.routing, seed=case.seed, layout=layout).train()
    layer.set_ranks(DistReduction())
    generator = torch.Generator().manual_seed(1000 * case.seed + layout.rank)
    x = torch.randn(case.sentences, case.length, case.dim, generator=generator, requires_grad=True)
    layout.counters.clear()
    y, record = layer(x)
    assert record is not None
    (y.square().mean() + record.total_loss).backward()
    return Measured(world_traffic(layout), tuple(int(n) for n in _sum(record.statistics.load)))


def world_traffic(layout: ExpertLayout) -> dict[LinkType, dict[str, int]]:
    """Sum of the counters of all ranks."""
    return {
        link: dict(zip(COUNTED, (int(n) for n in _sum(torch.tensor([getattr(t, n) for n in COUNTED]))), strict=True))
        for link, t in layout.counters.by_link.items()
    }


def predict_layer(case: TrafficCase, world: int, load: tuple[int, ...] | None = None) -> Mapping[LinkType, LinkTraffic]:
    """The prediction of the cost model, for one rank.

    Args:
        load: measured loads; None: equal loads.
    """
    config = routing_config(case.routing)
    block = SparseShape(config, _spec(case), 0)
    flows = block_flows(block, case.layout(world), load)
    return block_traffic(block, flows, case.tokens, Workload(case.tokens, precision="fp32")).by_link


def _spec(case: TrafficCase) -> Any:
    from moe_train.experts import ExpertSpec

    return ExpertSpec(case.dim, case.hidden)


def _sum(value: Tensor) -> Tensor:
    total = value.detach().clone()
    dist.all_reduce(total)
    return total


@dataclass(frozen=True)
class ModelCase:
    """A translation model in fp32 on CPUs with a batch without padding.

    Attributes:
        model: keys of the ``model`` group.
    """

    routing: Mapping[str, Any]
    model: Mapping[str, Any] = field(default_factory=dict)
    expert_parallel: int = 4
    ranks_per_node: int = 2
    vocabulary: int = 500
    sentences: int = 16
    source: int = 24
    target: int = 32
    recompute: bool = False

    @property
    def config(self) -> ModelConfig:
        """The typed config of the model."""
        return ModelConfig(**self.model)


def measure_memory(case: ModelCase) -> dict[str, float]:
    """Bytes of tensors on this rank, averaged over ranks: parameters, gradients, optimizer states, and activations.

    Activations are the tensors that autograd keeps for backward in a forward pass up to the output layer, each storage
    once, without parameters, from ``saved_tensors_hooks``.
    """
    from moe_train.models import build_model

    experts = int(case.routing["num_experts"])
    layout = ExpertLayout.build(plan_layout(dist.get_world_size(), case.ranks_per_node, case.expert_parallel, experts))
    words = SizedVocabulary(case.vocabulary)
    model: Any = build_model(case.config, routing_config(case.routing), words, words, seed=1, layout=layout)
    model.set_ranks(DistReduction())
    model.set_recompute(case.recompute)
    model.train()
    generator = torch.Generator().manual_seed(layout.rank)
    source = torch.randint(4, case.vocabulary, (case.sentences, case.source), generator=generator)
    target = torch.randint(4, case.vocabulary, (case.sentences, case.target), generator=generator)
    optimizer = torch.optim.Adam(model.parameters())
    with kept_for_backward(model) as kept:
        features, _ = model(source, None, target, features_only=True)
    activations = sum(kept.values())
    features.square().mean().backward()
    reduce_dense_gradients(model.parameters())
    reduce_expert_gradients(model.parameters(), layout)
    optimizer.step()
    found = {
        "parameters": sum(p.nbytes for p in model.parameters()),
        "gradients": sum(p.grad.nbytes for p in model.parameters()),
        "optimizer": sum(v.nbytes for s in optimizer.state.values() for name, v in s.items() if name != "step"),
        "activations": activations,
    }
    mean = _sum(torch.tensor(list(found.values()), dtype=torch.float64)) / dist.get_world_size()
    return dict(zip(found, mean.tolist(), strict=True))


def predict_memory(case: ModelCase, world: int) -> dict[str, float]:
    """The prediction of the cost model."""
    shape = model_shape(case.config, case.routing, case.vocabulary)
    plan = plan_layout(world, case.ranks_per_node, case.expert_parallel, int(case.routing["num_experts"]))
    work = Workload(
        tokens=case.sentences * case.target,
        source_ratio=case.source / case.target,
        sentence_tokens=(case.source + case.target) / 2,
        precision="fp32",
        recompute=case.recompute,
        device="cpu",
    )
    planned = memory_plan(shape, plan, work, step_traffic(shape, plan, work), StateSharding())
    states = {name: getattr(planned, name) for name in ("parameters", "gradients", "optimizer")}
    return {**states, "activations": kept_bytes(shape, work)}


@contextmanager
def kept_for_backward(model: nn.Module) -> Iterator[dict[int, int]]:
    """While entered, adds all storages that autograd keeps, except parameters, to the yielded dict: address → bytes."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, int] = {}
    alive: list[Tensor] = []  # a freed storage could be reused at the same address

    def pack(tensor: Tensor) -> Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in parameters and address not in found:
            found[address] = tensor.untyped_storage().nbytes()
            alive.append(tensor.detach())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield found
    alive.clear()

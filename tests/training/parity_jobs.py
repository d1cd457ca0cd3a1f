"""Training steps by the real task, criterion, engine and loop step, for tests of parity between layouts.

The same functions run on a rank of a world and on one process. fp64, no dropout; batches are given as indices of the
world's micro-batches, which ranks share as in training.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe_train.config import EngineConfig, ModelConfig, OptimizerConfig, RunConfig, TrainingConfig
from moe_train.data.batching import Indices, split_micro_batch
from moe_train.data.folder import DataFolder
from moe_train.parallel.dispatch_options import DispatchOptions
from moe_train.parallel.gradients import is_expert
from moe_train.parallel.layout import ExpertLayout
from moe_train.parallel.layout_plan import plan_layout
from moe_train.parallel.reducers import DistReduction
from moe_train.routing.context import LocalReduction
from moe_train.tasks.translation.task import TranslationTask
from moe_train.training.engines import EngineInputs, build_engine
from moe_train.training.runtime.signals import StopSignals
from moe_train.training.runtime.world import World
from moe_train.training.step import TrainStep
from tests.parallel.training import same_on_replicas

SMALL = ModelConfig(
    encoder_layers=1,
    decoder_layers=1,
    embed_dim=8,
    ffn_dim=12,
    num_heads=2,
    dropout=0.0,
    attention_dropout=0.0,
    max_positions=128,
    sparse_layers="all",
)
Named = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """One training.

    Attributes:
        routing: the group's keys.
        updates: for each update its micro-batches, each the indices of the world's sentences.
        expert_parallel, ranks_per_node, two_level: the layout; ranks_per_node 0: one node.
        options: how its exchanges are carried out.
        skewed: all tokens go to one expert (switch) or group (SAM).
        shares: one process takes the shares that so many ranks would have one after the other, as micro-batches of
            their own: what is counted within a rank is then counted within a share. 0: micro-batches stay whole.
        engine: keys of the engine; DeepSpeed runs in fp32.
        dtype: of parameters and products.
    """

    routing: dict[str, Any]
    updates: tuple[tuple[tuple[int, ...], ...], ...]
    expert_parallel: int = 1
    ranks_per_node: int = 0
    two_level: bool = False
    options: DispatchOptions = field(default_factory=DispatchOptions)
    skewed: bool = False
    clip_norm: float = 0.5
    lr: float = 0.2
    optimizer: str = "sgd"
    model: dict[str, Any] = field(default_factory=dict)
    shares: int = 0
    engine: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float64


@dataclass(frozen=True)
class Result:
    """What a training came to; the same on every rank, apart from experts, which stand where they are held.

    Attributes:
        outputs: sentence number → features [T, d] of its real target tokens, before training; of this rank's sentences.
        step: what the first update added to the parameters, which is the clipped gradient times the rate; experts as
            ``name/expert``.
        first, last: parameters after one update and after all.
        norms: of the gradient, update by update.
        sums: the criterion's sums of every update.
        load: pairs of the busiest expert over all pairs of the first sparse layer, first update.
        traffic: rows that left a process, in all.
    """

    outputs: dict[int, Tensor]
    step: Named
    first: Named
    last: Named
    norms: list[float]
    sums: list[dict[str, float]]
    load: float
    traffic: int


@cache
def opened(path: str) -> DataFolder:
    return DataFolder.open(path)


@cache
def layout_of(expert_parallel: int, ranks_per_node: int, two_level: bool, options: DispatchOptions) -> ExpertLayout:
    """Process groups are made once in a call; the world closes them after it."""
    world = dist.get_world_size()
    plan = plan_layout(world, ranks_per_node or world, expert_parallel, [], two_level)
    return ExpertLayout.build(plan, options=options)


@cache
def shared_ranks() -> DistReduction:
    return DistReduction(dist.new_group())


def train(path: str, case: Case) -> Result:
    """Trains on every rank of the default group, or alone where there is none."""
    return train_all(path, [case])[0]


def train_all(path: str, cases: Sequence[Case]) -> list[Result]:
    """Several trainings, one after the other."""
    layout_of.cache_clear()
    shared_ranks.cache_clear()
    return [_train(path, case) for case in cases]


def _train(path: str, case: Case) -> Result:
    together = dist.is_initialized()
    world = World.current()
    layout = ExpertLayout.local()
    if together:
        layout = layout_of(case.expert_parallel, case.ranks_per_node, case.two_level, case.options)
    task = _task(path, case)
    module: Any = task.build_model(layout).to(case.dtype).train()
    module.set_ranks(shared_ranks() if together else LocalReduction())
    if case.skewed:
        _skew(module)
    engine = build_engine(EngineInputs(module, EngineConfig(**case.engine), task.config.training, world, layout))
    layout.counters.clear()
    stepper = TrainStep(engine, task.build_criterion(), world, task.config.seed, layout.counters)
    updates = [[part for batch in batches for part in _shares(batch, case)] for batches in case.updates]
    outputs: dict[int, Tensor] = {}
    for batch in _shares(case.updates[0][0], case):
        outputs |= _outputs(task, module, batch, world)
    layout.counters.clear()
    reports, states = [], [_state(module)]
    for number, micro_batches in enumerate(updates):
        samples = [task.train_sample(_share(batch, world)) for batch in micro_batches]
        reports.append(stepper.run(number, samples, case.lr, StopSignals()))
        if number in (0, len(case.updates) - 1):
            states.append(_state(module))
    assert same_on_replicas(dict(module.named_parameters()), layout) == []
    load = next((s.load for s in reports[0].sums.routing().values()), torch.zeros(1))
    return Result(
        outputs,
        {name: value - states[0][name] for name, value in states[1].items()},
        states[1],
        states[-1],
        [r.outcome.grad_norm for r in reports],
        [r.sums.scalars() for r in reports],
        float(load.max() / load.sum().clamp(min=1)),
        sum(r.traffic.sent.dispatched_rows for r in reports),
    )


def _task(path: str, case: Case) -> TranslationTask:
    optimizer = OptimizerConfig(name=case.optimizer, lr=case.lr)  # type: ignore[arg-type]
    training = TrainingConfig(clip_norm=case.clip_norm, optimizer=optimizer)
    model = dataclasses.replace(SMALL, **case.model)
    return TranslationTask(RunConfig(data=path, routing=case.routing, model=model, training=training), opened(path))


@torch.no_grad()
def _skew(module: nn.Module) -> None:
    """Constant inputs to the gates: what stands before them is a norm, whose output becomes its bias."""
    for layer in module.modules():
        norm = getattr(getattr(layer, "residual", None), "norm", None)
        if hasattr(getattr(layer, "block", None), "router") and norm is not None:
            norm.weight.mul_(1e-3)
            norm.bias.add_(torch.linspace(-1, 1, norm.bias.shape[0]))


def _shares(batch: tuple[int, ...], case: Case) -> list[tuple[int, ...]]:
    return [batch[rank :: case.shares] for rank in range(case.shares)] if case.shares else [batch]


def _share(batch: tuple[int, ...], world: World) -> Indices:
    return split_micro_batch(np.array(batch, np.int64), world.rank, world.size)


@torch.no_grad()
def _outputs(task: TranslationTask, module: Any, batch: tuple[int, ...], world: World) -> dict[int, Tensor]:
    """A forward pass in evaluation, of this rank's sentences of a micro-batch; all ranks join."""
    sample = task.train_sample(_share(batch, world))
    ranks = module.settings.ranks
    module.eval()
    module.set_ranks(LocalReduction())
    features, _ = module(**sample["net_input"], features_only=True)
    module.train()
    module.set_ranks(ranks)
    real = sample["target"].ne(task.target_dictionary.pad())
    return {int(sentence): row[keep] for sentence, row, keep in zip(sample["id"], features, real, strict=True)}


def _state(module: nn.Module) -> Named:
    state: Named = {}
    for name, parameter in module.named_parameters():
        value = parameter.detach().clone()
        if is_expert(parameter):
            state |= {f"{name}/{e}": row for e, row in zip(parameter.expert_ids, value, strict=True)}  # type: ignore[attr-defined]
        else:
            state[name] = value
    return state


# A step is read off the parameters, which are a thousand times as large and rounded as such.
_STEP = 20


def compare(found: Sequence[Result], want: Result, bound: float) -> None:
    """Asserts that what all ranks found together is what one process found."""
    outputs = {sentence: rows for result in found for sentence, rows in result.outputs.items()}
    assert outputs.keys() == want.outputs.keys()
    _near(outputs, want.outputs, bound, "outputs")
    for result in found:
        assert result.norms[0] == pytest.approx(want.norms[0], rel=bound), "the gradient's norm"
        assert result.norms == pytest.approx(want.norms, rel=1e3 * bound)  # later ones are of parameters that differ
        assert len(result.sums) == len(want.sums)
        for ours, theirs in zip(result.sums, want.sums, strict=True):
            assert ours == pytest.approx(theirs, rel=1e3 * bound, abs=1e3 * bound)
        assert result.load == want.load
    for kind, most in (("step", _STEP * bound), ("first", bound), ("last", bound)):
        states = [getattr(result, kind) for result in found]
        merged = {name: value for state in states for name, value in state.items()}
        theirs = getattr(want, kind)
        assert merged.keys() == theirs.keys()
        for state in states:
            _near(state, {name: theirs[name] for name in state}, most, kind, scale=_norm(theirs))


def _near(ours: dict[Any, Tensor], theirs: dict[Any, Tensor], bound: float, what: str, scale: float = 0.0) -> None:
    scale = scale or _norm(theirs)
    worst = max(theirs, key=lambda name: float((ours[name] - theirs[name]).norm()), default=None)
    if worst is not None:
        distance = float((ours[worst] - theirs[worst]).norm())
        assert distance <= bound * scale, f"{what} {worst}: {distance / scale:.2e} of the global norm"


def _norm(tensors: dict[Any, Tensor]) -> float:
    return float(torch.cat([t.flatten() for t in tensors.values()]).norm())

"""Steps through an engine, on the ranks of the tests of engines: a small model with experts, near or far."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from moe_train.config import CheckpointConfig, EngineConfig, TrainingConfig, build
from moe_train.experts import ExpertPool, ExpertSpec
from moe_train.layers import FeedForward
from moe_train.parallel.layout import ExpertLayout
from moe_train.parallel.layout_plan import plan_layout
from moe_train.routing import Assignment
from moe_train.training.checkpoint.manager import CheckpointManager
from moe_train.training.checkpoint.run_state import RunState
from moe_train.training.checkpoint.state_dict import model_tensors, optimizer_tensors
from moe_train.training.checkpoint.store import CheckpointStore
from moe_train.training.engines import EngineInputs, build_engine
from moe_train.training.runtime.world import World

TOKENS, EXPERTS, MICRO_BATCHES = 24, 8, 2


@dataclass(frozen=True)
class Case:
    """What to run.

    Attributes:
        engine: keys of EngineConfig.
        training: keys of TrainingConfig.
        expert_parallel: of the layout.
        first, last: the updates, ``last`` excluded.
        folder: of checkpoints; "" for none. A run that begins after update 0 goes on from it; each saves at its end.
        poison: rank 0's loss is infinite in this update.
    """

    engine: Mapping[str, Any]
    training: Mapping[str, Any] = field(default_factory=lambda: {"optimizer": {"name": "sgd", "momentum": 0.9}})
    expert_parallel: int = 1
    first: int = 0
    last: int = 10
    folder: str = ""
    poison: int = -1


@dataclass(frozen=True)
class Result:
    """What became of it: tensors by checkpoint name (those of this rank), and each update's outcome."""

    tensors: dict[str, Tensor]
    moments: dict[str, Tensor]
    norms: list[float]
    applied: list[bool]
    clean: list[bool]
    losses: list[float]
    dtypes: dict[str, str]


class Net(nn.Module):
    """A dense layer, a gate in fp32 as routers are, experts, a norm; and a dense layer that is used outside forward."""

    def __init__(self, layout: ExpertLayout | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.gate = nn.Linear(6, 6), nn.Linear(6, EXPERTS, bias=False)
        self.pool = ExpertPool(ExpertSpec(dim=6, hidden=10), EXPERTS, layout)
        self.norm, self.outer = nn.LayerNorm(6), nn.Linear(6, 3)
        self.seen: dict[str, str] = {}

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        with torch.autocast(x.device.type, enabled=False):
            logits = self.gate(x.float())
        weight, chosen = logits.softmax(-1).topk(2)
        self.seen = {"inner": str(x.dtype), "gate": str(logits.dtype), "weight": str(self.gate.weight.dtype)}
        token = torch.arange(x.shape[0]).repeat_interleave(2)
        pairs = Assignment(token, chosen.reshape(-1), weight.reshape(-1))
        return self.norm(x + self.pool(x, pairs))


def data(update: int) -> tuple[Tensor, Tensor]:
    """The world's batch of an update."""
    generator = torch.Generator().manual_seed(100 + update)
    return torch.randn(TOKENS, 6, generator=generator), torch.randn(TOKENS, 3, generator=generator)


def rows(micro_batch: int, rank: int, world: int) -> Tensor:
    """This rank's rows of a micro-batch: unequal shares, and nothing for the last rank in the second one."""
    half = torch.arange(TOKENS).chunk(MICRO_BATCHES)[micro_batch]
    sharing = max(1, world - micro_batch)
    return half[rank::sharing] if rank < sharing else half[:0]


def run(case: Case) -> Result:
    """Trains; every rank calls it, or a process alone."""
    world = World.current()
    layout = ExpertLayout.local()
    if world.size > 1:
        layout = ExpertLayout.build(plan_layout(world.size, world.size, case.expert_parallel, EXPERTS))
    net = Net(layout)
    training = build(TrainingConfig, {"clip_norm": 0.5, **case.training})
    engine = build_engine(EngineInputs(net, EngineConfig(**case.engine), training, world, layout))
    checkpoints = (
        CheckpointManager(CheckpointStore(case.folder, world), engine, CheckpointConfig(), {}) if case.folder else None
    )
    if case.first:
        assert checkpoints is not None
        state = checkpoints.restore()
        assert state is not None and state.update == case.first
    norms, applied, clean, losses = [], [], [], []
    for update in range(case.first, case.last):
        x, wanted = data(update)
        total = torch.zeros(())
        for number in range(MICRO_BATCHES):
            mine = rows(number, world.rank, world.size)
            with engine.accumulate(last=number == MICRO_BATCHES - 1):
                with engine.autocast():
                    loss = (net.outer(engine.model(x[mine])) - wanted[mine]).float().square().sum() / TOKENS
                bad = update == case.poison and world.rank == 0 and number == 0
                engine.backward(loss * float("inf") if bad else loss)
                total += loss.detach()
        outcome = engine.step(lr=0.05).read()
        losses.append(float(world.sum(total)))
        norms.append(outcome.grad_norm)
        applied.append(outcome.applied)
        clean.append(outcome.clean)
    if checkpoints is not None:
        checkpoints.save(RunState(update=case.last))
    tensors = {name: tensor.clone() for name, tensor in model_tensors(net).items()}
    moments = optimizer_tensors(net, engine.optimizer_tensors())
    moments = {name: tensor.clone() for name, tensor in moments.items()}
    return Result(tensors, moments, norms, applied, clean, losses, net.seen)


def step_of_feed_forward() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """One SGD step of a dense feed-forward in bf16, at rate 1: what its parameters have lost, by name; and the bf16
    gradients of this rank's micro-batches, added up in fp32.
    """
    world = World.current()
    torch.manual_seed(0)
    block = FeedForward(6, 10)
    before, half = copy.deepcopy(block), copy.deepcopy(block).bfloat16()
    training = build(TrainingConfig, {"precision": "bf16", "clip_norm": 0.0, "optimizer": {"name": "sgd"}})
    engine = build_engine(EngineInputs(block, EngineConfig(), training, world))  # type: ignore[arg-type]
    own = {name: torch.zeros_like(p) for name, p in before.named_parameters()}
    x, wanted = data(0)
    for number in range(MICRO_BATCHES):
        mine = rows(number, world.rank, world.size)
        with engine.accumulate(last=number == MICRO_BATCHES - 1):
            with engine.autocast():
                y, _ = engine.model(x[mine].bfloat16())
            engine.backward((y.float() - wanted.repeat(1, 2)[mine]).square().sum())
        half.zero_grad()
        (half(x[mine].bfloat16())[0].float() - wanted.repeat(1, 2)[mine]).square().sum().backward()
        for name, p in half.named_parameters():
            assert p.grad is not None
            own[name] += p.grad
    engine.step(lr=1.0)
    parameters = dict(before.named_parameters())
    return {name: (parameters[name] - p).detach() for name, p in block.named_parameters()}, own


def joined(results: list[Result]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The world's tensors and moments; what several ranks hold must be the same bits."""
    whole: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
    for result in results:
        for into, own in zip(whole, (result.tensors, result.moments), strict=True):
            for name, tensor in own.items():
                assert torch.equal(into.setdefault(name, tensor), tensor), name
    return whole

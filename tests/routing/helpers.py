"""What routing tests share: ranks played by threads, experts in three lines, batches split as a launcher does."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor, nn

from moe_train.routing import (
    Assignment,
    AuxiliaryLoss,
    LocalReduction,
    RankReduction,
    Router,
    RouterInputs,
    Routing,
    RoutingContext,
    build_router,
    routing_config,
)
from moe_train.routing.balance_losses import WorldSums

DIM = 12
R = TypeVar("R")


class ThreadRanks:
    """One of n ranks that are threads of this process; reductions meet at a barrier, in rank order."""

    def __init__(self, rank: int, size: int, table: list[Tensor | None], barrier: threading.Barrier) -> None:
        self.rank, self.size = rank, size
        self._table, self._barrier = table, barrier

    def _everyone(self, value: Tensor) -> list[Tensor]:
        assert not value.requires_grad, "reductions are never differentiated"
        self._table[self.rank] = value.clone()
        self._barrier.wait(timeout=20)
        values = [v.clone() for v in self._table if v is not None]
        self._barrier.wait(timeout=20)
        return values

    def sum(self, value: Tensor) -> Tensor:
        total = self._everyone(value)
        return torch.stack(total).sum(0)

    def start_sum(self, value: Tensor) -> Callable[[], Tensor]:
        total = self.sum(value)
        return lambda: total

    def max(self, value: Tensor) -> Tensor:
        return torch.stack(self._everyone(value)).amax(0)


def on_ranks(size: int, function: Callable[[ThreadRanks], R]) -> list[R]:
    """Runs ``function`` on ``size`` ranks at once; the results in rank order. A failure of any rank is raised."""
    table: list[Tensor | None] = [None] * size
    barrier = threading.Barrier(size)
    results: dict[int, R] = {}
    errors: list[BaseException] = []

    def work(rank: int) -> None:
        try:
            results[rank] = function(ThreadRanks(rank, size, table, barrier))
        except BaseException as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    real = [e for e in errors if not isinstance(e, threading.BrokenBarrierError)]
    if errors:
        raise (real or errors)[0]
    return [results[rank] for rank in range(size)]


def make_router(name: str, dim: int = DIM, seed: int = 0, inputs: dict[str, Any] | None = None, **keys: Any) -> Any:
    """A router of fixed initial parameters, in fp64."""
    torch.manual_seed(seed)
    router = build_router(routing_config({"name": name, **keys}), RouterInputs(dim, **(inputs or {})))
    return router.double()


def make_experts(num_experts: int, dim: int = DIM, seed: int = 1) -> nn.ParameterList:
    """One matrix per expert: f_e(x) = tanh(x W_e)."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(num_experts, dim, dim, generator=generator, dtype=torch.float64) / dim**0.5
    return nn.ParameterList([nn.Parameter(w) for w in weight])


def mix(x: Tensor, assignment: Assignment, experts: nn.ParameterList) -> Tensor:
    """y_t = Σ w · f_e(x_t), the definition, pair by pair in bulk."""
    outputs = torch.stack([torch.tanh(x @ w) for w in experts], dim=1)
    rows = outputs[assignment.token, assignment.expert] * assignment.weight.to(x.dtype).unsqueeze(1)
    return torch.zeros_like(x).index_add(0, assignment.token, rows)


def tokens(count: int, dim: int = DIM, seed: int = 2) -> Tensor:
    """[count, dim] fp64 hidden states."""
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def batch_context(lengths: list[int], *, passes: int = 1, vocabulary: int = 50, **changes: Any) -> RoutingContext:
    """Sentences of these lengths, uids 100, 101 …, token ids that depend on uid and position only."""
    rows = [
        (p * len(lengths) + s, 100 + s, i, p) for p in range(passes) for s, n in enumerate(lengths) for i in range(n)
    ]
    table = torch.tensor(rows, dtype=torch.int64).reshape(-1, 4)
    sentence, uid, position, pass_index = table.unbind(1)
    context = RoutingContext(
        sentence=sentence,
        position=position,
        sentence_uid=uid,
        token_id=(uid * 31 + position * 7) % vocabulary,
        language=uid % 3,
        pass_index=pass_index,
        num_sentences=passes * len(lengths),
    )
    return dataclasses.replace(context, **changes)


def rank_rows(context: RoutingContext, rank: int, size: int) -> Tensor:
    """Rows of the world's batch that rank ``rank`` of ``size`` holds: its sentences are rank, rank + size …"""
    passes = int(context.pass_index.max()) + 1 if context.pass_index.numel() else 1
    within = context.sentence % (context.num_sentences // passes)
    return (within % size == rank).nonzero().squeeze(1)


def rank_context(context: RoutingContext, rank: int, size: int, ranks: ThreadRanks) -> RoutingContext:
    """The context of :func:`rank_rows`, its sentences renumbered from 0 without gaps."""
    own = context.select(rank_rows(context, rank, size))
    passes = int(context.pass_index.max()) + 1 if context.pass_index.numel() else 1
    batch = context.num_sentences // passes
    mine = len(range(rank, batch, size))
    sentence = (own.sentence % batch) // size + own.pass_index * mine
    return dataclasses.replace(own, sentence=sentence, num_sentences=mine * passes, ranks=ranks)


def shares(routing: Routing, ranks: RankReduction | None = None) -> dict[str, AuxiliaryLoss]:
    """The losses of a router's output, with one reduction over the ranks."""
    world = WorldSums(routing.losses.values(), ranks or LocalReduction())
    return {name: AuxiliaryLoss(loss.share(world), loss.weight) for name, loss in routing.losses.items()}


def objective(router: Router, experts: nn.ParameterList, x: Tensor, context: RoutingContext) -> tuple[Tensor, Routing]:
    """A scalar that depends on outputs and on every auxiliary loss; sums over ranks."""
    routing = router(x, context)
    y = mix(x, routing.assignment, experts)
    loss = (y * torch.linspace(-1, 1, y.shape[1], dtype=y.dtype)).sum() + y.square().sum()
    for auxiliary in shares(routing, context.ranks).values():
        loss = loss + 3.0 * auxiliary.value
    return loss, routing


def assert_same_pairs(found: Routing, expected: Routing, count: int) -> None:
    """The same experts for each token, with the same weights to rounding."""
    for one, other in zip(pairs_by_token(found, count), pairs_by_token(expected, count), strict=True):
        assert one == pytest.approx(other, rel=1e-12)


def pairs_by_token(routing: Routing, count: int) -> list[dict[int, float]]:
    """For each token, its experts and weights."""
    found: list[dict[int, float]] = [{} for _ in range(count)]
    a = routing.assignment
    for token, expert, weight in zip(a.token.tolist(), a.expert.tolist(), a.weight.tolist(), strict=True):
        assert expert not in found[token], "a token stands with an expert once"
        found[token][expert] = weight
    return found

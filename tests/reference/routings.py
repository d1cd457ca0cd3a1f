"""What the comparisons share: routers, layers and inputs in fp64, and matrices of combine weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_train import MoELayer
from moe_train.routing import Routing
from tests.routing.helpers import batch_context, make_router, shares

DIM, EXPERTS, TOKENS = 12, 6, 40


def difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest absolute difference over the largest absolute value of the reference."""
    scale = theirs.detach().abs().max().item() or 1.0
    return (ours.detach() - theirs.detach()).abs().max().item() / scale


def draws(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers in fp64."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gate(experts: int = EXPERTS, seed: int = 1) -> Tensor:
    """The weight [E, d] of a router, as spread as trained ones."""
    return draws(experts, DIM, seed=seed)


def routed(name: str, x: Tensor, weight: Tensor, *, training: bool = True, **keys: Any) -> Routing:
    """What our router of this weight says of x [T, d], one sentence."""
    router = make_router(name, num_experts=weight.shape[0], **keys)
    with torch.no_grad():
        router.gate.weight.copy_(weight)
    return router(x, batch_context([x.shape[0]], training=training))


def combine_matrix(routing: Routing, tokens: int, experts: int) -> Tensor:
    """[T, E]: the weight of each pair, 0 where a token has no place at the expert."""
    pairs = routing.assignment
    matrix = torch.zeros(tokens, experts, dtype=pairs.weight.dtype)
    return matrix.index_put((pairs.token, pairs.expert), pairs.weight)


def loss(routing: Routing, name: str) -> Tensor:
    """An auxiliary loss of one rank, without its weight."""
    return shares(routing)[name].value


def layer(name: str, hidden: int, activation: str = "gelu", **keys: Any) -> MoELayer:
    """A layer in fp64 with random weights and biases."""
    made = MoELayer(DIM, hidden, {"name": name, **keys}, activation=activation).double()
    with torch.no_grad():
        for number, parameter in enumerate(made.parameters()):
            parameter.copy_(draws(*parameter.shape, seed=100 + number) / 3)
    return made


def gradients(output: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
    """Gradients of a fixed weighted sum of the output."""
    direction = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    return torch.autograd.grad((output * direction).sum(), leaves, retain_graph=True)

"""Contenders in the benchmark of the layer: bare products, our layer, and other implementations of it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_train.analysis.bench.bench_shape import BenchShape
from moe_train.layers.moe_layer import MoELayer
from moe_train.parallel.isolation import LOOPBACK


class Contender(Protocol):
    """Interface of what is timed."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """y [T, d] for x [T, d], and the auxiliary loss."""

    def step(self, x: Tensor, grad: Tensor) -> None:
        """Forward and backward."""

    def clear(self) -> None:
        """Forgets gradients."""


class Layer(nn.Module):
    """A contender that is a layer."""

    def step(self, x: Tensor, grad: Tensor) -> None:
        """Forward and backward."""
        y, loss = self(x)
        torch.autograd.backward([y, loss], [grad, torch.ones_like(loss)])

    def clear(self) -> None:
        """Forgets gradients."""
        self.zero_grad(set_to_none=True)


class BareProducts(Layer):
    """``torch.bmm`` of all experts at equal loads: X W1 W2, no activation, no bias, no routing."""

    def __init__(self, shape: BenchShape, dtype: torch.dtype) -> None:
        super().__init__()
        rows = shape.tokens * shape.top_k // shape.num_experts
        experts, dim, hidden = shape.num_experts, shape.dim, shape.hidden
        self.x = nn.Parameter(torch.randn(experts, rows, dim, dtype=dtype))
        self.w1 = nn.Parameter(torch.randn(experts, dim, hidden, dtype=dtype) / dim**0.5)
        self.w2 = nn.Parameter(torch.randn(experts, hidden, dim, dtype=dtype) / hidden**0.5)
        self.grad = torch.randn(experts, rows, dim, dtype=dtype)

    def step(self, x: Tensor, grad: Tensor) -> None:
        """Forward and backward with its own rows."""
        torch.bmm(torch.bmm(self.x, self.w1), self.w2).backward(self.grad)


class Ours(Layer):
    """``MoELayer`` with ``routing=top_k``, biases at zero so that peers without them compute the same."""

    def __init__(self, shape: BenchShape, dtype: torch.dtype) -> None:
        super().__init__()
        routing = {"name": "top_k", "num_experts": shape.num_experts, "top_k": shape.top_k}
        self.layer = MoELayer(shape.dim, shape.hidden, routing).to(dtype)
        with torch.no_grad():
            self.experts.fc1_bias.zero_()
            self.experts.fc2_bias.zero_()

    @property
    def gate(self) -> Tensor:
        """[E, d]."""
        block: Any = self.layer.block
        weight: Tensor = block.router.gate.weight
        return weight.detach()

    @property
    def experts(self) -> Any:
        """The stacked weights."""
        block: Any = self.layer.block
        return block.pool.sublayers[0]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """y and the balance loss."""
        y, record = self.layer(x.unsqueeze(0))
        return y.squeeze(0), record.total_loss


class RoutedPeer(Layer):
    """A gate of the same weights, top k renormalised, and GShard's balance loss."""

    def __init__(self, shape: BenchShape, ours: Ours) -> None:
        super().__init__()
        self.shape = shape
        self.gate = nn.Parameter(ours.gate.clone())

    def route(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Token and weight of pairs in expert order, indices of the choices, rows per expert, and the loss."""
        probabilities = F.linear(x.float(), self.gate).softmax(-1)
        weight, expert = probabilities.topk(self.shape.top_k)
        weight = weight / weight.sum(-1, keepdim=True)
        order = torch.argsort(expert.reshape(-1), stable=True)
        counts = torch.bincount(expert.reshape(-1), minlength=self.shape.num_experts)
        first = torch.bincount(expert[:, 0], minlength=self.shape.num_experts) / x.shape[0]
        loss = self.shape.num_experts * (probabilities.mean(0) * first).sum()
        return order // self.shape.top_k, weight.reshape(-1)[order], order, counts, 0.01 * loss

    def combine(self, x: Tensor, rows: Tensor, token: Tensor, weight: Tensor) -> Tensor:
        """Sums the weighted rows of each token."""
        y = torch.zeros(x.shape, dtype=torch.float32)
        return y.index_add(0, token, rows * weight.unsqueeze(1)).to(x.dtype)


class SortAndLoop(RoutedPeer):
    """Rows sorted by expert, a loop over modules."""

    def __init__(self, shape: BenchShape, ours: Ours) -> None:
        super().__init__(shape, ours)
        weights = zip(ours.experts.fc1_weight, ours.experts.fc2_weight, strict=True)  # type: ignore[arg-type]
        self.experts = nn.ModuleList(_mlp(shape, w1, w2) for w1, w2 in weights)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """y and the loss."""
        token, weight, _, counts, loss = self.route(x)
        parts = torch.split(x[token], counts.tolist())
        rows = torch.cat([expert(part) for expert, part in zip(self.experts, parts, strict=True)])
        return self.combine(x, rows, token, weight), loss


class SortAndGroupedMm(RoutedPeer):
    """Rows sorted by expert, ``torch.nn.functional.grouped_mm``; no biases."""

    def __init__(self, shape: BenchShape, ours: Ours) -> None:
        super().__init__(shape, ours)
        if not hasattr(F, "grouped_mm"):
            raise ImportError("this torch has no grouped_mm")
        self.w1 = nn.Parameter(ours.experts.fc1_weight.detach().clone())  # type: ignore[union-attr, operator]
        self.w2 = nn.Parameter(ours.experts.fc2_weight.detach().clone())  # type: ignore[union-attr, operator]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """y and the loss."""
        token, weight, _, counts, loss = self.route(x)
        ends = counts.cumsum(0).to(torch.int32)
        rows = F.grouped_mm(F.relu(F.grouped_mm(x[token], self.w1, offs=ends)), self.w2, offs=ends)
        return self.combine(x, rows, token, weight), loss


class DeepSpeedMoE(Layer):
    """DeepSpeed's MoE layer, ``drop_tokens=False``, second expert by score as ours."""

    def __init__(self, shape: BenchShape, ours: Ours) -> None:
        super().__init__()
        moe = _import_deepspeed_moe()
        w1, w2 = ours.experts.fc1_weight, ours.experts.fc2_weight
        self.moe = moe(
            shape.dim,
            _mlp(shape, w1[0], w2[0]),  # type: ignore[index]
            shape.num_experts,
            k=shape.top_k,
            drop_tokens=False,
            min_capacity=0,
            top2_2nd_expert_sampling=False,
        )
        with torch.no_grad():
            inner: Any = self.moe.deepspeed_moe
            inner.gate.wg.weight.copy_(ours.gate)
            for e, expert in enumerate(inner.experts.deepspeed_experts):
                expert.load_state_dict(_mlp(shape, w1[e], w2[e]).state_dict())  # type: ignore[index]
        inner.experts.to(w1.dtype)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """y and the loss."""
        y, loss, _ = self.moe(x.unsqueeze(0))
        return y.squeeze(0), 0.01 * loss


PEERS: Mapping[str, Callable[[BenchShape, Ours], Contender]] = {
    "sort_loop": SortAndLoop,
    "sort_grouped_mm": SortAndGroupedMm,
    "deepspeed": DeepSpeedMoE,
}


def _mlp(shape: BenchShape, w1: Tensor, w2: Tensor) -> nn.Sequential:
    mlp = nn.Sequential(nn.Linear(shape.dim, shape.hidden), nn.ReLU(), nn.Linear(shape.hidden, shape.dim)).to(w1.dtype)
    with torch.no_grad():
        for linear, weight in ((mlp[0], w1), (mlp[2], w2)):
            linear.weight.copy_(weight.t())  # type: ignore[operator, union-attr]
            linear.bias.zero_()  # type: ignore[operator, union-attr]
    return mlp


def _import_deepspeed_moe() -> Callable[..., nn.Module]:
    """DeepSpeed's layer, with a process group of one rank.

    Raises:
        ImportError: DeepSpeed is not installed.
    """
    import logging

    import torch.distributed as dist

    from moe_train import fairseq_compat

    fairseq_compat.apply()  # DeepSpeed imports fairseq where that is installed
    try:
        import deepspeed
        from deepspeed.moe.layer import MoE
    except ImportError as error:
        raise ImportError("DeepSpeed is not installed: run scripts/setup.sh, or pip install deepspeed") from error
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # not needed here, and takes a minute to compile
    os.environ.update(LOOPBACK)
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
    return _with_groups(MoE)


def _with_groups(moe: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    def build(*arguments: object, **options: object) -> nn.Module:
        layer = moe(*arguments, **options)
        layer.set_deepspeed_parallelism()  # type: ignore[operator]
        return layer

    return build

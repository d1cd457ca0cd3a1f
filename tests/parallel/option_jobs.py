"""What runs on the ranks in the tests of how exchanges are carried out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moe_train.layers import MoELayer
from moe_train.parallel.dispatch_options import DispatchOptions
from moe_train.parallel.layout import ExpertLayout
from moe_train.parallel.layout_plan import plan_layout
from moe_train.parallel.reducers import DistReduction
from tests.parallel.pools import Case, Outcome, on_rank

WAITING = {
    "_local_scalar_dense", "nonzero", "bincount", "unique_consecutive", "_unique2", "unique_dim", "masked_select",
    "repeat_interleave", "is_nonzero", "equal", "argwhere",
    "lift_fresh",  # torch.tensor(numbers, device=…): a copy that waits
}  # fmt: skip


class Waits(TorchDispatchMode):
    """Notes operators whose result a host has to wait for, were the tensors on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        told = name == "repeat_interleave" and (kwargs or {}).get("output_size") is not None
        masked = name in ("index", "index_put_", "_index_put_impl_") and any(
            i is not None and i.dtype == torch.bool for i in args[1]
        )
        if (name in WAITING and not told) or masked:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@contextmanager
def as_on_a_gpu() -> Iterator[Waits]:
    """What the exchange does only on a CPU, because it costs no wait there, is left out."""
    with patch("moe_train.parallel.permute._readable_without_sync", lambda numbers: False), Waits() as waits:
        yield waits


def outcomes(cases: Sequence[tuple[Case, int, int, bool]]) -> list[Outcome]:
    """Several cases, one after the other."""
    return [on_rank(*case) for case in cases]


@dataclass(frozen=True)
class LayerResult:
    """One step of a whole layer: y, gradients of x and of the router and experts, and what the host waited for."""

    y: Tensor
    grad_x: Tensor
    grads: dict[str, Tensor]
    reads: int
    waits: list[str]
    dropped: int
    routing_dropped: int


def layer(routing: dict[str, Any], options: DispatchOptions, tokens: int, dtype: torch.dtype) -> LayerResult:
    """A layer on this rank's noise, all ranks one expert group."""
    world = dist.get_world_size()
    plan = plan_layout(world, world, world, int(routing["num_experts"]))
    layout = ExpertLayout.build(plan, options=options)
    block = MoELayer(12, 16, routing, layout=layout).to(dtype).train()
    block.set_ranks(DistReduction())
    generator = torch.Generator().manual_seed(layout.rank)
    x = torch.randn(1, tokens, 12, generator=generator).to(dtype).requires_grad_()
    with as_on_a_gpu() as waits:
        y, record = block(x)
        assert record is not None
        (y.float().square().sum() + record.total_loss).backward()
    assert x.grad is not None
    grads = {name: p.grad for name, p in block.named_parameters() if p.grad is not None}
    counters = layout.counters
    missing = int(record.statistics.dropped)
    return LayerResult(y.detach(), x.grad, grads, counters.host_reads, waits.seen, counters.dropped, missing)


def layers(jobs: Sequence[tuple[Any, ...]]) -> list[LayerResult]:
    """Several of them."""
    return [layer(*job) for job in jobs]

"""Measures the speed of one sparse layer, forward and backward, against bare products and other implementations.

The reference is ``torch.bmm`` of the same experts at equal loads: two products forward, four backward. The layer is
timed with all its parts (router, balance loss, sort, gather, products, activation, combine) at loads of a real router,
whose most loaded expert has at least 1.2 times the mean. Contenders alternate within a round, so that other load of the
machine affects all of them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_train.analysis.bench.bench_peers import PEERS, BareProducts, Contender, Ours
from moe_train.analysis.bench.bench_shape import BenchShape

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LEAST_SKEW = 1.2
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}


@dataclass(frozen=True)
class BenchRow:
    """Times of one shape in one data type.

    Attributes:
        skew: rows of the most loaded expert over the mean, averaged over the batches used.
        milliseconds: median time of each contender, ``bmm`` and ``ours`` among them.
        ratio: our time over ``bmm``'s: the median over rounds of the ratio within a round.
        best_ratio: ratio of the fastest rounds.
        over_peers: our time over each peer's, as ``ratio``.
        absent: peers that are not available, with the reason.
    """

    shape: BenchShape
    dtype: str
    skew: float
    milliseconds: Mapping[str, float]
    ratio: float
    best_ratio: float
    over_peers: Mapping[str, float]
    absent: Mapping[str, str]


def bench_layer(
    shape: BenchShape, dtype: str, rounds: int = 9, peers: Sequence[str] = tuple(PEERS), batches: int = 3
) -> BenchRow:
    """Times one shape.

    Args:
        shape: the sizes.
        dtype: ``fp32`` or ``bf16``.
        rounds: number of timed runs of each contender.
        peers: names of :data:`moe_train.analysis.bench.bench_peers.PEERS`.
        batches: number of different batches, since loads differ between batches.

    Raises:
        AssertionError: a peer's output differs from ours.
    """
    torch.manual_seed(0)
    ours = Ours(shape, DTYPES[dtype])
    tokens, skew = draw_tokens(shape, ours.gate, batches)
    inputs = [x.to(DTYPES[dtype]) for x in tokens]
    contenders: dict[str, Contender] = {"bmm": BareProducts(shape, DTYPES[dtype]), "ours": ours}
    absent = {}
    for name in peers:
        try:
            contenders[name] = PEERS[name](shape, ours)
        except ImportError as error:
            absent[name] = str(error)
    _check_equal(contenders, ours, inputs[0])
    times = _time(contenders, inputs, rounds)
    return _row(shape, dtype, skew, times, absent)


def draw_tokens(shape: BenchShape, gate: Tensor, batches: int) -> tuple[list[Tensor], float]:
    """Batches of x [T, d] with loads like those of a real router, and their mean skew.

    Tokens are noise around centres with Zipf frequencies, like those of words; the distance of the centres is increased
    until the loads of the gate [E, d] are skewed enough.
    """
    generator = torch.Generator().manual_seed(1)
    centres = torch.randn(4 * shape.num_experts, shape.dim, generator=generator)
    frequency = 1.0 / torch.arange(1, centres.shape[0] + 1)
    noise = torch.randn(batches, shape.tokens, shape.dim, generator=generator)
    words = torch.multinomial(frequency.expand(batches, -1), shape.tokens, True, generator=generator)
    for distance in range(1, 40):
        x = noise + 0.05 * distance * centres[words]
        skews = [load_skew(batch @ gate.float().t(), shape) for batch in x]
        if min(skews) >= LEAST_SKEW:
            return list(x), statistics.mean(skews)
    raise AssertionError("no tokens with sufficiently skewed loads were found")


def load_skew(logits: Tensor, shape: BenchShape) -> float:
    """Rows of the most loaded expert over the mean, of logits [T, E]."""
    load = torch.bincount(logits.topk(shape.top_k).indices.reshape(-1), minlength=shape.num_experts)
    return float(load.max() / load.float().mean())


def _check_equal(contenders: Mapping[str, Contender], ours: Contender, x: Tensor) -> None:
    """Checks that peers compute the same output."""
    with torch.no_grad():
        want = ours.forward(x)[0].float()
        for name, contender in contenders.items():
            if name != "bmm":
                error = (contender.forward(x)[0].float() - want).norm() / want.norm()
                assert error < _TOLERANCE[x.dtype], f"the output of {name} differs: relative error {error:.1e}"


def _time(contenders: Mapping[str, Contender], inputs: Sequence[Tensor], rounds: int) -> dict[str, list[float]]:
    """Seconds per round, by contender. The first pass over the batches is not counted."""
    grad = torch.randn_like(inputs[0])
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(len(inputs) + rounds):
        x = inputs[number % len(inputs)]
        for name, contender in contenders.items():
            seconds = _step(contender, x, grad)
            if number >= len(inputs):
                times[name].append(seconds)
    return times


def _step(contender: Contender, x: Tensor, grad: Tensor) -> float:
    contender.clear()
    x = x.detach().requires_grad_()
    start = time.perf_counter()
    contender.step(x, grad)
    return time.perf_counter() - start


def _row(
    shape: BenchShape, dtype: str, skew: float, times: Mapping[str, Sequence[float]], absent: Mapping[str, str]
) -> BenchRow:
    def over(name: str, summary: Callable[[Sequence[float]], float] = statistics.median) -> float:
        return summary([a / b for a, b in zip(times["ours"], times[name], strict=True)])

    return BenchRow(
        shape,
        dtype,
        skew,
        {name: statistics.median(seconds) * 1e3 for name, seconds in times.items()},
        over("bmm"),
        min(times["ours"]) / min(times["bmm"]),
        {name: over(name) for name in times if name not in ("ours", "bmm")},
        absent,
    )

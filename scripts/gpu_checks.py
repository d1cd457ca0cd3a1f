#!/usr/bin/env python
"""Checks that need a GPU: the exchange over NCCL, grouped products in bf16, host syncs, FLOP/s.

    python scripts/gpu_checks.py --out results/gpu

Needs only torch and this package. With one process and a forced exchange (tokens pass through NCCL's all-to-all to the
process itself), it

- compares layers that exchange, overlap or have fixed sizes with the layer without an exchange;
- compares outputs and gradients of grouped products in bf16 with a loop in fp32, with experts without tokens, and with
  a width that a GPU's grouped product refuses;
- counts the host syncs of a layer's step with ``torch.cuda.set_sync_debug_mode``;
- compares the time of attention over new lengths and over the same lengths again (kernels that plan each shape on the
  host would keep the GPU waiting);
- times layers and a dense feed-forward over the same number of rows, in FLOP/s.

Writes checks.json and checks.md, and ends with exit code 1 where a check fails. ``--rehearse`` runs all checks except
syncs and attention on a CPU, with gloo and small sizes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe_train import MoELayer
from moe_train.experts import ExpertPool, ExpertSpec
from moe_train.layers.attention import SelfAttention
from moe_train.parallel.dispatch_options import DispatchOptions
from moe_train.parallel.isolation import LOOPBACK
from moe_train.parallel.layout import ExpertLayout
from moe_train.parallel.layout_plan import LayoutPlan
from moe_train.parallel.reducers import DistReduction
from moe_train.routing.types import Assignment

SYNC = "called a synchronizing CUDA operation"
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 3e-2}
STRATEGIES: dict[str, dict[str, Any]] = {
    "switch": {"name": "switch"},
    "top_k": {"name": "top_k", "top_k": 2},
    "top_k, shared expert": {"name": "top_k", "top_k": 2, "shared_expert": True},
    "sam": {"name": "sam", "top_k": 2, "num_groups": 4},
    "hash": {"name": "hash"},
    "thor": {"name": "thor", "draw": "token"},
}


@dataclass(frozen=True)
class Sizes:
    """Sizes of all layers and batches; ``in_a_row`` steps per round run without synchronisation."""

    dim: int = 1024
    hidden: int = 4096
    num_experts: int = 16
    sentences: int = 32
    length: int = 512
    rounds: int = 20
    in_a_row: int = 4

    @property
    def tokens(self) -> int:
        """Tokens of a batch."""
        return self.sentences * self.length


SMALL = Sizes(16, 32, 8, 2, 16, 2, 1)


@dataclass(frozen=True)
class Check:
    """One line of the result. ``bound``: the largest permitted ``value``; None: it is only reported."""

    subject: str
    what: str
    value: float
    bound: float | None = None

    @property
    def holds(self) -> bool:
        """Whether the value is within its bound."""
        return self.bound is None or self.value <= self.bound


def dispatch_variants(sizes: Sizes) -> dict[str, DispatchOptions]:
    """Variants of the exchange."""
    return {
        "exchange": DispatchOptions(),
        "overlap": DispatchOptions(overlap=True),
        "fixed size": DispatchOptions(fixed_rows=sizes.tokens),
    }


def make(routing: Mapping[str, Any], sizes: Sizes, device: str, options: DispatchOptions | None) -> MoELayer:
    """A layer in training, with the exchange forced where there are options; the same weights for all of them."""
    layout = None
    if options is not None:
        layout = ExpertLayout.build(LayoutPlan(1, 1, 1), device, force_dispatch=True, options=options)
    keys = {"num_experts": sizes.num_experts, **routing}
    layer = MoELayer(sizes.dim, sizes.hidden, keys, activation="gelu", layout=layout).to(device).train()
    layer.set_ranks(DistReduction())
    return layer


def batch(sizes: Sizes, device: str) -> Tensor:
    """[sentences, length, dim] of noise."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(sizes.sentences, sizes.length, sizes.dim, generator=generator).to(device)


def step(layer: MoELayer, x: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """y, and the gradients of x and of all parameters, under autocast where ``dtype`` has 16 bits."""
    layer.zero_grad(set_to_none=True)
    x = x.detach().requires_grad_()
    tokens = torch.arange(x.shape[0] * x.shape[1], device=x.device).view(x.shape[:2])
    with torch.autocast(x.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
        y, record = layer(x, token_ids=tokens)
    loss = y.float().square().mean()
    (loss if record is None else loss + record.total_loss).backward()
    return {"y": y.detach(), "x": x.grad} | {n: p.grad for n, p in layer.named_parameters() if p.grad is not None}  # type: ignore[dict-item]


def distance(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    """The largest error of any tensor, over that tensor's norm or a thousandth of the largest one's."""
    assert ours.keys() == theirs.keys()
    norms = {name: float(value.detach().float().norm()) for name, value in theirs.items()}
    floor = 1e-3 * max(norms.values())
    return max(
        float((ours[n].detach().float() - theirs[n].detach().float()).norm()) / max(norms[n], floor) for n in theirs
    )


def exchange_checks(sizes: Sizes, device: str) -> Iterator[Check]:
    """Layers through the exchange against the layer without; the gate sees the same tokens in either type."""
    x = batch(sizes, device)
    for name, routing in STRATEGIES.items():
        for dtype in (torch.float32, torch.bfloat16):
            want = step(make(routing, sizes, device, None), x, dtype)
            for way, options in dispatch_variants(sizes).items():
                layer = make(routing, sizes, device, options)
                found = distance(step(layer, x, dtype), want)
                yield Check("exchange", f"{name}, {way}, {_name(dtype)}: error", found, BOUNDS[dtype])


def grouped_checks(sizes: Sizes, device: str) -> Iterator[Check]:
    """bf16 against fp32 with the same weights: y, gradients of x, of weights and of experts; the last has no token."""
    generator = torch.Generator().manual_seed(2)
    expert = torch.randint(sizes.num_experts - 1, (2 * sizes.tokens,), generator=generator).to(device)
    token = torch.arange(sizes.tokens, device=device).repeat_interleave(2)
    drawn = torch.rand(2 * sizes.tokens, generator=generator).to(device)
    x = batch(sizes, device).flatten(0, 1)
    for kind in ({}, {"bias": False}, {"sublayers": 2}, {"hidden": sizes.hidden // 3}):
        torch.manual_seed(0)
        spec = ExpertSpec(**{"dim": sizes.dim, "hidden": sizes.hidden, "activation": "gelu", **kind})
        pool = ExpertPool(spec, sizes.num_experts).to(device)
        found = []
        for enabled in (False, True):
            pool.zero_grad(set_to_none=True)
            own, weight = x.clone().requires_grad_(), drawn.clone().requires_grad_()
            with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=enabled):
                y = pool(own, Assignment(token, expert, weight))
            y.float().square().mean().backward()
            grads = {name: p.grad for name, p in pool.named_parameters()}
            found.append({"y": y.detach(), "x": own.grad, "weight": weight.grad, **grads})
        error = distance(found[1], found[0])  # type: ignore[arg-type]
        yield Check(
            "grouped products", f"bf16 against fp32, {kind or 'feed-forward'}: error", error, BOUNDS[torch.bfloat16]
        )


def sync_checks(sizes: Sizes, device: str) -> Iterator[Check]:
    """Host syncs of a step in bf16: at most one per layer without limits, none with fixed sizes, also with drops."""
    x = batch(sizes, device)
    capped = {**STRATEGIES["top_k"], "capacity_factor": 1.0}
    cases = [(name, routing, None, 1) for name, routing in STRATEGIES.items()]
    cases += [(name, routing, "exchange", 1) for name, routing in STRATEGIES.items()]
    cases += [(name, routing, "overlap", 1) for name, routing in STRATEGIES.items()]
    cases += [(name, routing, "fixed size", 0) for name, routing in STRATEGIES.items()]
    cases += [("top_k with capacity", capped, "fixed size", 0)]
    for name, routing, way, most in cases:
        layer = make(routing, sizes, device, None if way is None else dispatch_variants(sizes)[way])
        step(layer, x, torch.bfloat16)
        syncs = count_syncs(lambda layer=layer: step(layer, x, torch.bfloat16))
        yield Check("host syncs", f"{name}, {way or 'no exchange'}: syncs of a step", syncs, most)


def count_syncs(run: Callable[[], Any]) -> int:
    """How often the host waited for the device in ``run``, backward included."""
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum(SYNC in str(warning.message) for warning in caught)


def attention_checks(sizes: Sizes, device: str) -> Iterator[Check]:
    """Host and device seconds of masked attention, over new lengths, and over the same ones again."""
    attention = SelfAttention(sizes.dim, 8, dropout=0.1).to(device)
    longest = torch.randn(sizes.sentences, 2 * sizes.length, sizes.dim, device=device)

    def seconds(lengths: Sequence[int]) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        for length in lengths:
            visible = torch.arange(length, device=device) < torch.full((sizes.sentences, 1), length - 3, device=device)
            with torch.autocast(device, torch.bfloat16):
                attention(longest[:, :length], visible[:, None, None, :]).sum().backward()
        torch.cuda.synchronize()
        return time.perf_counter() - start

    lengths = range(64, 64 + 40 * 5, 5)
    seconds([2 * sizes.length, *(length + 2 for length in lengths)])  # libraries load kernels at the first call of each
    first, again = seconds(lengths), seconds(lengths)
    yield Check(
        "attention", f"{len(lengths)} lengths never seen before, over the same again: seconds", first / again, 3
    )


def speed_checks(sizes: Sizes, device: str) -> Iterator[Check]:
    """Layers and a dense feed-forward over as many rows, in turns: TFLOP/s of each, and the layer's over the dense."""
    x = batch(sizes, device)
    turns: dict[str, tuple[Callable[[], Any], float]] = {}
    for k in (1, 2):
        routing = STRATEGIES["switch"] if k == 1 else STRATEGIES["top_k"]
        flops = 3 * 4.0 * k * sizes.tokens * sizes.dim * sizes.hidden
        for way in (None, *dispatch_variants(sizes)):
            layer = make(routing, sizes, device, None if way is None else dispatch_variants(sizes)[way])
            label = f"k = {k}, {way or 'no exchange'}"
            turns[label] = (lambda layer=layer: step(layer, x, torch.bfloat16)), flops
        turns[f"k = {k}, dense"] = _dense(sizes, x, k), flops
    seconds = timed({name: run for name, (run, _) in turns.items()}, sizes, device)
    for name, (_, flops) in turns.items():
        yield Check("speed", f"{name}: TFLOP/s", flops / seconds[name] / 1e12)
        dense = f"{name.split(',')[0]}, dense"
        if name != dense:
            yield Check("speed", f"{name}: FLOP/s over the dense feed-forward's", seconds[dense] / seconds[name])


def _dense(sizes: Sizes, x: Tensor, k: int) -> Callable[[], None]:
    """W2 gelu(W1 x) over k times the tokens, forward and backward, by ``nn.Linear``."""
    stack = nn.Sequential(nn.Linear(sizes.dim, sizes.hidden), nn.GELU(), nn.Linear(sizes.hidden, sizes.dim))
    stack = stack.to(x.device)
    rows = x.flatten(0, 1).repeat(k, 1)

    def run() -> None:
        stack.zero_grad(set_to_none=True)
        own = rows.detach().requires_grad_()
        with torch.autocast(x.device.type, torch.bfloat16):
            y = stack(own)
        y.float().square().mean().backward()

    return run


def timed(turns: Mapping[str, Callable[[], Any]], sizes: Sizes, device: str) -> dict[str, float]:
    """Median seconds of one step of each, several in a row as layers of a model follow each other, taken in turns.

    The first two rounds do not count.
    """

    def wait() -> None:
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize()

    seconds: dict[str, list[float]] = {name: [] for name in turns}
    for number in range(sizes.rounds + 2):
        for name, run in turns.items():
            wait()
            start = time.perf_counter()
            for _ in range(sizes.in_a_row):
                run()
            wait()
            if number >= 2:
                seconds[name].append((time.perf_counter() - start) / sizes.in_a_row)
    return {name: statistics.median(values) for name, values in seconds.items()}


def _name(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]


def table(checks: Sequence[Check]) -> Iterator[str]:
    """Markdown, subject by subject."""
    for subject in dict.fromkeys(check.subject for check in checks):
        yield from ("", f"## {subject}", "", "| what | value | at most | holds |", "|---|---|---|---|")
        for check in checks:
            if check.subject == subject:
                bound = "" if check.bound is None else f"{check.bound:g}"
                holds = "" if check.bound is None else "yes" if check.holds else "**no**"
                yield f"| {check.what} | {check.value:.3g} | {bound} | {holds} |"


def run_checks(sizes: Sizes, device: str) -> list[Check]:
    """Runs all checks in a process group of one rank; on a CPU without syncs and attention."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ.update(LOOPBACK)
        backend = "nccl" if device == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=f"file://{folder}/rendezvous", rank=0, world_size=1)
        try:
            gpu_only = [sync_checks, attention_checks] if device == "cuda" else []
            kinds = [exchange_checks, grouped_checks, *gpu_only, speed_checks]
            return [check for kind in kinds for check in printed(kind(sizes, device))]
        finally:
            dist.destroy_process_group()


def printed(checks: Iterator[Check]) -> Iterator[Check]:
    """Prints each check when it is done: all of them take one to two minutes."""
    for check in checks:
        print(f"{check.subject}: {check.what}: {check.value:.3g}", file=sys.stderr, flush=True)
        yield check


def main() -> None:
    """Runs the checks and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/gpu"))
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, small, without counting syncs")
    arguments = parser.parse_args()
    if not arguments.rehearse and not torch.cuda.is_available():
        parser.error("torch finds no GPU here; run it on a machine with one, or use --rehearse on this CPU")
    device, sizes = ("cpu", SMALL) if arguments.rehearse else ("cuda", Sizes())
    if device == "cuda":
        torch.cuda.set_device(0)
    checks = run_checks(sizes, device)
    about = {
        "command": " ".join(["python", *sys.argv]),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "sizes": dataclasses.asdict(sizes),
    }
    content = {**about, "checks": [{**dataclasses.asdict(check), "holds": check.holds} for check in checks]}
    head = f"`{about['command']}`, torch {about['torch']}, {about['device']}, {about['sizes']}."
    text = "\n".join([head, *table(checks)]) + "\n"
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, written in (("checks.json", json.dumps(content, indent=1) + "\n"), ("checks.md", text)):
        partial = arguments.out / f"{name}.tmp"
        partial.write_text(written, encoding="utf-8")
        os.replace(partial, arguments.out / name)
    print(text)
    sys.exit(not all(check.holds for check in checks))


if __name__ == "__main__":
    main()

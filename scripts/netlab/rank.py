"""One rank of two_hosts.py: runs the job in the job file; rank 0 writes the result.

RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT are in the environment; interfaces are those of its network namespace.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe_train.analysis.planner.measured_traffic import world_traffic
from moe_train.layers import MoELayer
from moe_train.parallel.gradients import reduce_dense_gradients, reduce_expert_gradients
from moe_train.parallel.layout import ExpertLayout
from moe_train.parallel.layout_plan import plan_layout
from moe_train.parallel.reducers import DistReduction

INTERFACES = {"across": "eth0", "node": "lo"}


class Layers(nn.Module):
    """A model of sparse layers with norms and residuals only."""

    def __init__(self, job: Mapping[str, Any], variant: Mapping[str, Any]) -> None:
        super().__init__()
        world, experts = dist.get_world_size(), int(variant["routing"]["num_experts"])
        plan = plan_layout(world, job["ranks_per_node"], world, experts, variant["two_level"])
        self.layout = ExpertLayout.build(plan)
        self.norms = nn.ModuleList(nn.LayerNorm(job["dim"]) for _ in range(job["layers"]))
        self.blocks = nn.ModuleList(
            MoELayer(job["dim"], job["hidden"], variant["routing"], layer=i, layout=self.layout)
            for i in range(job["layers"])
        )
        for block in self.blocks:
            block.set_ranks(DistReduction())  # type: ignore[operator]
        self.optimizer = torch.optim.Adam(self.parameters())

    def step(self, x: Tensor) -> None:
        """Forward, backward, reductions, optimizer."""
        total = torch.zeros(())
        for norm, block in zip(self.norms, self.blocks, strict=True):
            y, record = block(norm(x))
            x, total = x + y, total + record.total_loss
        self.optimizer.zero_grad(set_to_none=True)
        (x.square().mean() / dist.get_world_size() + total).backward()
        reduce_dense_gradients(self.parameters())
        reduce_expert_gradients(self.parameters(), self.layout)
        self.optimizer.step()


def interface_bytes() -> dict[str, int]:
    """Bytes sent so far, by name of the link in our counters."""
    lines = Path("/proc/self/net/dev").read_text(encoding="utf-8").splitlines()
    sent = {line.split(":")[0].strip(): int(line.split(":")[1].split()[8]) for line in lines if ":" in line}
    return {link: sent[name] for link, name in INTERFACES.items()}


def of_hosts(value: Mapping[str, int], per_node: int) -> dict[str, int]:
    """Summed over hosts; every rank of a host sees the same interfaces."""
    total = torch.tensor(list(value.values()))
    dist.all_reduce(total)
    return dict(zip(value, (total // per_node).tolist(), strict=True))


def count_bytes(job: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Bytes by the kernel's counters and by ours over some steps, for each variant."""
    answers = []
    for variant in job["variants"]:
        model, x = Layers(job, variant), batch(job)
        model.step(x)
        dist.barrier()
        model.layout.counters.clear()
        before = interface_bytes()
        for _ in range(job["steps"]):
            model.step(x)
        dist.barrier()
        after = interface_bytes()
        kernel = of_hosts({link: after[link] - before[link] for link in after}, job["ranks_per_node"])
        answers.append({"name": variant["name"], "kernel": kernel, "ours": world_traffic(model.layout)})
    return answers


def batch(job: Mapping[str, Any]) -> Tensor:
    """This rank's batch of noise."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    return torch.randn(job["sentences"], job["length"], job["dim"], generator=generator)


def time_steps(job: Mapping[str, Any]) -> dict[str, Any]:
    """Seconds of steps, of bare exchanges and of products, alternating, so that other load affects all."""
    models = {variant["name"]: Layers(job, variant) for variant in job["variants"]}
    x = batch(job)
    turns: dict[str, Callable[[], Any]] = {name: lambda model=model: model.step(x) for name, model in models.items()}
    turns |= {"products": products(job, x), **bare_exchanges(job)}
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    for turn in range(job["rounds"] + 1):
        for name, run in turns.items():
            dist.barrier()
            start = time.perf_counter()
            run()
            dist.barrier()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    traffic = {name: world_traffic(model.layout) for name, model in models.items()}
    return {"seconds": seconds, "median": medians, "traffic_of_all_turns": traffic}


def products(job: Mapping[str, Any], x: Tensor) -> Callable[[], None]:
    """The layers with the experts of one rank and without an exchange: the same rows and products."""
    routing = job["variants"][0]["routing"]
    held = int(routing["num_experts"]) // dist.get_world_size()
    alone = {"name": "top_k", "num_experts": held, "top_k": min(held, routing["top_k"])}
    layers = [MoELayer(job["dim"], job["hidden"], alone, layer=i) for i in range(job["layers"])]

    def run() -> None:
        y, total = x, torch.zeros(())
        for layer in layers:
            added, record = layer(y)
            assert record is not None
            y, total = y + added, total + record.total_loss
        (y.square().mean() + total).backward()

    return run


def bare_exchanges(job: Mapping[str, Any]) -> dict[str, Callable[[], None]]:
    """All-to-alls of bytes: only between hosts, only within hosts, and nearly empty ones."""
    world, rank, per_node = dist.get_world_size(), dist.get_rank(), job["ranks_per_node"]

    def exchange(size: Callable[[int], int]) -> Callable[[], None]:
        sizes = [size(other) for other in range(world)]
        value = torch.zeros(sum(sizes), dtype=torch.uint8)
        return lambda: dist.all_to_all_single(torch.empty_like(value), value, sizes, sizes)

    away = exchange(lambda other: job["bare_bytes"] if other // per_node != rank // per_node else 0)
    inside = exchange(lambda other: job["bare_bytes"] if other // per_node == rank // per_node and other != rank else 0)
    return {"bare_across": away, "bare_node": inside, "bare_empty": exchange(lambda other: 8)}


TASKS: dict[str, Callable[[Mapping[str, Any]], Any]] = {"bytes": count_bytes, "step": time_steps}


def main() -> None:
    """Reads the job, joins the process group, writes the result."""
    path = Path(sys.argv[1])
    job = json.loads(path.read_text(encoding="utf-8"))
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    answer = TASKS[job["task"]](job)
    if dist.get_rank() == 0:
        path.with_name("answer.json").write_text(json.dumps(answer), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

#!/usr/bin/env python
"""Two network hosts with two ranks each: compares our byte counters with the kernel's, and times SAM on a slow link.

    sudo python scripts/netlab/two_hosts.py bytes --out results/network
    sudo python scripts/netlab/two_hosts.py step --rate 200mbit --out results/network

The hosts are network namespaces of this machine (hosts.py). ``bytes`` runs training steps of sparse layers and compares
our counters with those of the interfaces. ``step`` limits the sending rate of each host, times a step of four sparse
layers with SAM (k = 4, groups = nodes) and with flat top-4, and compares the ratio with moe-plan's, which gets the
speeds of this machine: those of bare exchanges and of products alone, measured alternately with the steps.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
from hosts import Hosts  # noqa: E402

HOSTS, RANKS, EXPERTS, DIM, LAYERS = 2, 2, 16, 512, 4
FLAT = {"name": "top_k", "num_experts": EXPERTS, "top_k": 4}
SAM = {"name": "sam", "num_experts": EXPERTS, "top_k": 4, "num_groups": HOSTS}
VARIANTS = [
    {"name": "sam, groups = nodes, two-level", "routing": SAM, "two_level": True},
    {"name": "top-4, two-level", "routing": FLAT, "two_level": True},
    {"name": "top-4", "routing": FLAT, "two_level": False},
]
MEGA = 1e6


def job(task: str, tokens: int, hidden: int, **more: Any) -> dict[str, Any]:
    """The content of the job file."""
    sizes = {"dim": DIM, "hidden": hidden, "layers": LAYERS, "sentences": tokens // 32, "length": 32}
    return {"task": task, "ranks_per_node": RANKS, "variants": VARIANTS, **sizes, **more}


def run(content: Mapping[str, Any], rate: str | None = None, timeout: float = 1800) -> Any:
    """Runs a job on the hosts and returns its result.

    Raises:
        RuntimeError: a rank failed, or the time is over.
    """
    with tempfile.TemporaryDirectory() as folder, Hosts(HOSTS) as hosts:
        path = Path(folder, "job.json")
        path.write_text(json.dumps(content), encoding="utf-8")
        meeting = {"MASTER_ADDR": hosts.addresses[0], "MASTER_PORT": "29555"}
        world = {"WORLD_SIZE": str(HOSTS * RANKS), **meeting, "PYTHONPATH": str(HERE.parents[1])}
        hosts.cap(rate)
        command = [sys.executable, str(HERE / "rank.py"), str(path)]
        ranks = [hosts.start(r // RANKS, command, {"RANK": str(r), **world}) for r in range(HOSTS * RANKS)]
        try:
            wait(ranks, time.monotonic() + timeout)
        finally:
            for rank in ranks:
                rank.kill()  # ranks that still wait for one that has failed
                rank.wait()
        return json.loads(path.with_name("answer.json").read_text(encoding="utf-8"))


def wait(ranks: Sequence[subprocess.Popen[str]], deadline: float) -> None:
    """Waits until all have ended.

    Raises:
        RuntimeError: a rank failed, or the time is over.
    """
    while any(rank.poll() is None for rank in ranks):
        if any(rank.poll() for rank in ranks):
            raise RuntimeError(f"ranks ended with {[rank.poll() for rank in ranks]}")
        if time.monotonic() > deadline:
            raise RuntimeError("no answer in time")
        time.sleep(0.2)
    if any(rank.returncode for rank in ranks):
        raise RuntimeError(f"ranks ended with {[rank.returncode for rank in ranks]}")


def bytes_report(tokens: int, hidden: int, steps: int) -> dict[str, Any]:
    """Our counters and the kernel's for each variant and link; reductions of gradients by the cost model."""
    from moe_train.analysis.planner.cost_traffic import gradient_bytes

    content = job("bytes", tokens, hidden, steps=steps)
    reduced = gradient_bytes(layers_shape(VARIANTS[0], content), layout(VARIANTS[0]))
    rows = []
    for found in run(content):
        for link, kernel in found["kernel"].items():
            ours = found["ours"][link]["payload_bytes"] + found["ours"][link]["metadata_bytes"]
            gradients = round(steps * HOSTS * RANKS * reduced[link])
            rows.append(
                {"variant": found["name"], "link": link, "kernel": kernel, "ours": ours, "gradients": gradients}
            )
    return {"tokens_per_rank": tokens, "steps": steps, "layers": LAYERS, "rows": rows}


def bytes_table(report: Mapping[str, Any]) -> Iterator[str]:
    """Markdown."""
    yield "| exchange | link | our counters MB | gradients MB | the kernel's MB | kernel / both | kernel / counters |"
    yield "|---|---|---|---|---|---|---|"
    for row in report["rows"]:
        counted, kernel = row["ours"], row["kernel"]
        both = counted + row["gradients"]
        numbers = f"{counted / MEGA:.3f} | {row['gradients'] / MEGA:.3f} | {kernel / MEGA:.3f}"
        yield f"| {row['variant']} | {row['link']} | {numbers} | {kernel / both:.4f} | {kernel / counted:.4f} |"


def step_report(tokens: int, hidden: int, rounds: int, rate: str) -> dict[str, Any]:
    """Measured and predicted times of a step."""
    content = job("step", tokens, hidden, rounds=rounds, bare_bytes=2 << 20)
    found = run(content, rate)
    measured = {variant["name"]: found["median"][variant["name"]] for variant in VARIANTS}
    speeds = machine(found["median"], content)
    predicted = {v["name"]: predict(v, content, speeds) for v in VARIANTS}
    sam = VARIANTS[0]["name"]
    return {
        "rate": rate,
        "tokens_per_rank": tokens,
        "hidden": hidden,
        "rounds": rounds,
        "machine": vars(speeds),
        "median_seconds": found["median"],
        "seconds": found["seconds"],
        "bytes_across": {
            name: sum(links["across"][n] for n in ("payload_bytes", "metadata_bytes")) / (rounds + 1)
            for name, links in found["traffic_of_all_turns"].items()
        },
        "predicted_seconds": predicted,
        "ratio": {
            n: {"measured": measured[n] / measured[sam], "predicted": predicted[n] / predicted[sam]} for n in measured
        },
    }


def machine(median: Mapping[str, float], content: Mapping[str, Any]) -> Any:
    """This machine as moe-plan's cluster: rates from the bare exchanges, FLOP/s from the products alone."""
    from moe_train.config.planner import ClusterConfig

    routing, tokens = content["variants"][0]["routing"], content["sentences"] * content["length"]
    flops = 3 * content["layers"] * tokens * routing["top_k"] * 4.0 * content["dim"] * content["hidden"]
    empty, sent = median["bare_empty"], content["bare_bytes"]
    return ClusterConfig(
        name="this machine",
        ranks_per_node=RANKS,
        tflops=flops / median["products"] / 1e12,
        efficiency=1.0,
        memory_gb=1.0,
        memory_bandwidth=5.0,
        bandwidth_node=sent * (RANKS - 1) / max(median["bare_node"] - empty, 1e-6) / 1e9,
        bandwidth_across=sent * RANKS * RANKS / max(median["bare_across"] - empty, 1e-6) / 1e9,
        latency_node=empty * 1e6,
        latency_across=empty * 1e6,
        message=0.0,
        layer_overhead=0.0,
        device="cpu",
    )


def layers_shape(variant: Mapping[str, Any], content: Mapping[str, Any]) -> Any:
    """The sparse layers as the cost model's shape: no attention, no embedding."""
    from moe_train.analysis.planner.cost_shape import ModelShape, SparseShape, StackShape
    from moe_train.config import ModelConfig
    from moe_train.experts import ExpertSpec
    from moe_train.routing import routing_config

    d, count = content["dim"], content["layers"]
    config = routing_config(variant["routing"])
    router = d * EXPERTS + (EXPERTS if variant["routing"]["name"] == "sam" else 0)
    block = SparseShape(config, ExpertSpec(d, content["hidden"]), router)
    stack = StackShape("layers", 0, 0, False, False, count * (router + 2 * d), 0.0, (block,) * count)
    return ModelShape(ModelConfig(embed_dim=d), 0, (stack,), 0, 0.0)


def layout(variant: Mapping[str, Any]) -> Any:
    """A layout with all ranks in one expert-parallel group."""
    from moe_train.parallel.layout_plan import plan_layout

    return plan_layout(HOSTS * RANKS, RANKS, HOSTS * RANKS, EXPERTS, variant["two_level"])


def predict(variant: Mapping[str, Any], content: Mapping[str, Any], cluster: Any) -> float:
    """Seconds of a step by the cost model."""
    from moe_train.analysis.planner.cost_memory import StateSharding
    from moe_train.analysis.planner.cost_time import time_plan
    from moe_train.analysis.planner.cost_traffic import Workload, step_traffic

    shape, plan = layers_shape(variant, content), layout(variant)
    work = Workload(content["sentences"] * content["length"], precision="fp32", device="cpu")
    traffic = step_traffic(shape, plan, work)
    return time_plan(shape, plan, work, traffic, cluster, StateSharding(), overlap=False).total


def step_table(report: Mapping[str, Any]) -> Iterator[str]:
    """Markdown."""
    yield "| exchange | MB between hosts | step, s | over SAM's | planned s | planned ratio | error of the ratio |"
    yield "|---|---|---|---|---|---|---|"
    for name, ratio in report["ratio"].items():
        seconds, plan = report["median_seconds"][name], report["predicted_seconds"][name]
        error = ratio["predicted"] / ratio["measured"] - 1
        across = report["bytes_across"][name] / MEGA
        yield (
            f"| {name} | {across:.2f} | {seconds:.3f} | {ratio['measured']:.2f} | {plan:.3f} | {ratio['predicted']:.2f}"
            f" | {error:+.0%} |"
        )


def main() -> None:
    """Runs one of the two tasks and writes JSON and a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("bytes", "step"))
    parser.add_argument("--tokens", type=int, default=512, help="of each rank")
    parser.add_argument("--hidden", type=int, default=128, help="width of an expert")
    parser.add_argument("--steps", type=int, default=3, help="of bytes")
    parser.add_argument("--rounds", type=int, default=7, help="of step")
    parser.add_argument("--rate", default="200mbit", help="of step: rate at which each host may send")
    parser.add_argument("--out", type=Path, help="write WHAT.json and WHAT.md here; else print the JSON")
    arguments = parser.parse_args()
    if reason := Hosts.why_not():
        parser.error(reason)
    if arguments.what == "bytes":
        report, table = bytes_report(arguments.tokens, arguments.hidden, arguments.steps), bytes_table
    else:
        report = step_report(arguments.tokens, arguments.hidden, arguments.rounds, arguments.rate)
        table = step_table
    command = " ".join(["python", *sys.argv])
    content = json.dumps({"command": command, "cores": os.cpu_count(), **report}, indent=1)
    if arguments.out is None:
        print(content)
        return
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / f"{arguments.what}.json").write_text(content + "\n", encoding="utf-8")
    text = "\n".join([f"`{command}`, {os.cpu_count()} cores.\n", *table(report)]) + "\n"
    (arguments.out / f"{arguments.what}.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()

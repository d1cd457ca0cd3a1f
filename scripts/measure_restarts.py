"""Measures the cost of a lost process or host under torchrun: seconds until updates resume, and repeated updates.

    python scripts/measure_restarts.py worker --data data-bin/l10n --out results/faults
    python scripts/measure_restarts.py host --data data-bin/l10n --out results/faults

``worker`` kills (SIGKILL) a random one of two workers at three random updates; ``host`` kills one of two agents with
its worker. Each run has the default run folder, and is compared with an undisturbed run: the final parameters must be
equal, bit by bit where the number of processes stays the same.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from moe_train.training.checkpoint.dcp import load_tensors, shapes
from moe_train.training.checkpoint.store import CheckpointStore

MODEL = ["model=tiny", "model.embed_dim=32", "model.ffn_dim=64", "model.num_heads=2", "routing.num_experts=4"]
TRAINING = ["training.tokens_per_update=600", "training.log_every=1", "training.threads=1"]
# SGD without dropout (whose draws depend on the ranks): runs of different world sizes then differ only by rounding.
PLAIN = [
    *("model.dropout=0", "model.attention_dropout=0", "training.optimizer.name=sgd", "training.optimizer.lr=0.1"),
    *("training.schedule.name=constant", "training.schedule.warmup_updates=0"),
]
SCRIPTS = Path(__file__).resolve().parent / "torchrun"
TIMEOUT = 240.0  # seconds


class Job:
    """A training job of one or more torchrun agents in its own folder.

    Args:
        script: of ``scripts/torchrun``.
        settings: environment variables of the script.
    """

    def __init__(self, folder: Path, words: Sequence[str], script: str, agents: int = 1, **settings: object) -> None:
        self.folder = folder
        folder.mkdir(parents=True)
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # of torchrun
        environment = {**os.environ, "PATH": path, **{name: str(value) for name, value in settings.items()}}
        command = [str(SCRIPTS / script), *words]
        self.agents = []
        for number in range(agents):
            with folder.joinpath(f"agent_{number}.log").open("wb") as log:
                agent = subprocess.Popen(
                    command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True
                )
            self.agents.append(agent)
            if number == 0 and "HEAD" in settings:  # on one host, the first agent to start would host the rendezvous
                self._wait_for_rendezvous(str(settings["HEAD"]))

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *error: object) -> None:
        for agent in self.agents:
            self.kill(agent)

    def _wait_for_rendezvous(self, head: str) -> None:
        """Waits until the first agent accepts connections at its address."""
        host, _, port = head.rpartition(":")
        deadline = time.monotonic() + TIMEOUT
        while time.monotonic() < deadline and self.agents[0].poll() is None:
            with suppress(OSError), socket.create_connection((host, int(port)), timeout=1):
                return
            time.sleep(0.05)
        self.kill(self.agents[0])  # __exit__ is not called, since the context was not entered
        raise RuntimeError(f"the first agent accepts no connections:\n{self.output()}")

    def kill(self, agent: subprocess.Popen[bytes]) -> None:
        """Kills an agent and its workers, as when a host fails."""
        for pid in [agent.pid, *children(agent.pid)] if agent.poll() is None else []:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        agent.wait()

    @property
    def run(self) -> Path:
        """The run folder.

        Raises:
            RuntimeError: there is not exactly one.
        """
        found = sorted(self.folder.glob("outputs/[0-9]*/*"))
        if len(found) != 1:
            raise RuntimeError(f"one run folder expected, not {[str(path) for path in found]}")
        return found[0]

    @property
    def done(self) -> int:
        """The last update in the log."""
        logs = list(self.folder.glob("outputs/[0-9]*/*/train.jsonl"))
        lines = logs[0].read_text(encoding="utf-8").splitlines() if logs else []
        return int(json.loads(lines[-1])["update"]) if lines and lines[-1].endswith("}") else 0

    def sessions(self) -> list[dict[str, Any]]:
        """The sessions of the run so far."""
        try:
            return list(json.loads((self.run / "run.json").read_text(encoding="utf-8"))["sessions"])
        except (OSError, ValueError, KeyError, RuntimeError):
            return []

    def wait_for(self, update: int, session: int = 1) -> None:
        """Waits until a session (counted from 1) has done an update.

        Raises:
            RuntimeError: an agent ended before, or the time limit was reached.
        """
        deadline = time.monotonic() + TIMEOUT
        while len(self.sessions()) < session or self.done < update:
            if time.monotonic() > deadline or all(agent.poll() is not None for agent in self.agents):
                raise RuntimeError(f"update {update} was not reached:\n{self.output()}")
            time.sleep(0.02)

    def finish(self) -> None:
        """Waits until the agents have ended.

        Raises:
            RuntimeError: one ended with an error.
        """
        codes = [agent.wait(timeout=TIMEOUT) for agent in self.agents if agent.returncode is None]
        if any(codes):
            raise RuntimeError(f"agents ended with {codes}:\n{self.output()}")

    def output(self) -> str:
        """The end of the output of the agents and their workers."""
        return "\n".join(path.read_text(encoding="utf-8")[-3000:] for path in sorted(self.folder.glob("agent_*.log")))


def children(parent: int) -> Iterator[int]:
    """The processes that a process has started."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(path.read_text(encoding="utf-8").rpartition(")")[2].split()[1]) == parent:
                yield int(path.parent.name)
        except (OSError, IndexError):
            continue


def lose_workers(words: Sequence[str], folder: Path, updates: int, seed: int) -> dict[str, Any]:
    """Kills three workers, one after the other."""
    draw = random.Random(seed)
    losses = sorted(draw.sample(range(2, updates - 1), 3))
    figures = []
    with Job(folder / "broken", words, "single_node.sh", NPROC=2, MAX_RESTARTS=3) as job:
        for number, update in enumerate(losses, 1):
            job.wait_for(update, number)
            victim = draw.choice(sorted(children(job.agents[0].pid)))
            os.kill(victim, signal.SIGKILL)
            figures.append(resumed(job, number))
        job.finish()
        return {"losses": figures, **compared(job, words, folder)}


def resumed(job: Job, session: int) -> dict[str, Any]:
    """The cost of a loss at this moment; waits until the next session has done an update."""
    at, update = time.monotonic(), job.done
    job.wait_for(0, session + 1)
    begun = time.monotonic() - at
    start = int(job.sessions()[session]["from_update"])
    job.wait_for(start + 1, session + 1)
    return {
        "at_update": update,
        "went_on_from": start,
        "updates_done_twice": update - start,
        "seconds_to_begin": round(begun, 1),
        "seconds_to_update": round(time.monotonic() - at, 1),
    }


def lose_host(words: Sequence[str], folder: Path, updates: int, seed: int) -> dict[str, Any]:
    """Kills the second of two agents with its worker. The first one hosts the rendezvous, so its loss ends the job."""
    update = random.Random(seed).randrange(updates // 4, updates // 2)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    rendezvous = {"HEAD": f"127.0.0.1:{port}", "JOB": "hosts", "LOCAL": "127.0.0.1", "LOST_AFTER": 3}
    with Job(folder / "broken", words, "elastic.sh", 2, NNODES="1:2", NPROC=1, **rendezvous) as job:
        job.wait_for(update)
        job.kill(job.agents[1])
        figures = resumed(job, 1)
        job.finish()
        worlds = [session["world"]["processes"] for session in job.sessions()]
        return {"losses": [figures], "worlds": worlds, **compared(job, words, folder)}


def compared(job: Job, words: Sequence[str], folder: Path) -> dict[str, Any]:
    """Compares final parameters with those of an undisturbed run of two processes."""
    with Job(folder / "whole", words, "single_node.sh", NPROC=2) as whole:
        whole.finish()
        one, other = parameters(job.run), parameters(whole.run)
        bits = one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
        apart = sum(float((one[name] - other[name]).double().square().sum()) for name in other) ** 0.5
        norm = sum(float(tensor.double().square().sum()) for tensor in other.values()) ** 0.5
        return {"same_bits": bits, "relative_difference": apart / norm, "sessions": len(job.sessions())}


def parameters(run: Path) -> dict[str, torch.Tensor]:
    """Parameters of a run's last checkpoint."""
    path = CheckpointStore(run / "checkpoints").resolve("last")
    tensors = {name: torch.empty(shape) for name, shape in shapes(path).items() if name.startswith("model.")}
    load_tensors(path, tensors)
    return tensors


CASES = {"worker": (lose_workers, []), "host": (lose_host, PLAIN)}


def main() -> None:
    """Runs a case and writes its results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=sorted(CASES))
    parser.add_argument("--data", required=True, type=Path, help="a prepared data folder")
    parser.add_argument("--updates", type=int, default=40)
    parser.add_argument("--every", type=int, default=5, help="updates between checkpoints")
    parser.add_argument("--seed", type=int, default=1, help="of the random updates and processes")
    parser.add_argument("--out", type=Path, help="write WHAT.json here; else print it")
    arguments = parser.parse_args()
    lose, more = CASES[arguments.what]
    words = [f"data={arguments.data.resolve()}", *MODEL, *TRAINING, *more, f"training.max_updates={arguments.updates}"]
    words += [f"training.checkpoint.every_updates={arguments.every}", "training.validation.every_updates=1000"]
    words += ["training.validation.max_sentences=10", "launch.device=cpu"]
    with tempfile.TemporaryDirectory() as folder:
        report = lose(words, Path(folder), arguments.updates, arguments.seed)
    about = {"command": " ".join(["python", *sys.argv]), "cores": os.cpu_count(), "checkpoints_every": arguments.every}
    text = json.dumps({**about, **report}, indent=1)
    if arguments.out is None:
        print(text)
        return
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / f"{arguments.what}.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""What a lost process or a lost host costs under torchrun: seconds until updates go on, and updates done twice.

    python scripts/measure_restarts.py worker --data data-bin/l10n --out results/faults
    python scripts/measure_restarts.py host --data data-bin/l10n --out results/faults

``worker`` kills (SIGKILL) a random one of two workers at three updates, drawn by seed; ``host`` kills one of two agents
with its worker. Each run has the default run folder, and is set beside one that nothing happened to: the parameters at
the end must be the same, to the bit where the number of processes stays the same.
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
# Plain steps without dropout, whose draws differ with the ranks: rounding is what remains between worlds of two sizes.
PLAIN = [
    *("model.dropout=0", "model.attention_dropout=0", "training.optimizer.name=sgd", "training.optimizer.lr=0.1"),
    *("training.schedule.name=constant", "training.schedule.warmup_updates=0"),
]
SCRIPTS = Path(__file__).resolve().parent / "torchrun"
PATIENCE = 240.0


class Job:
    """A training job of one or more agents in a folder of its own.

    Args:
        script: of ``scripts/torchrun``.
        settings: what the script reads from the environment.
    """

    def __init__(self, folder: Path, words: Sequence[str], script: str, agents: int = 1, **settings: object) -> None:
        self.folder = folder
        folder.mkdir(parents=True)
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # where torchrun is
        environment = {**os.environ, "PATH": path, **{name: str(value) for name, value in settings.items()}}
        command = [str(SCRIPTS / script), *words]
        self.agents = []
        for number in range(agents):
            with folder.joinpath(f"agent_{number}.log").open("wb") as log:
                agent = subprocess.Popen(
                    command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True
                )
            self.agents.append(agent)
            if number == 0 and "HEAD" in settings:  # on one host, whoever comes first would be where all meet
                self._wait_for_meeting(str(settings["HEAD"]))

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *error: object) -> None:
        for agent in self.agents:
            self.kill(agent)

    def _wait_for_meeting(self, head: str) -> None:
        """Until the first agent takes calls at its address."""
        host, _, port = head.rpartition(":")
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline and self.agents[0].poll() is None:
            with suppress(OSError), socket.create_connection((host, int(port)), timeout=1):
                return
            time.sleep(0.05)
        self.kill(self.agents[0])  # nobody has entered the job yet, and so nobody would leave it
        raise RuntimeError(f"the first agent does not take calls:\n{self.screens()}")

    def kill(self, agent: subprocess.Popen[bytes]) -> None:
        """An agent and its workers at once, as when a host goes down."""
        for pid in [agent.pid, *children(agent.pid)] if agent.poll() is None else []:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        agent.wait()

    @property
    def run(self) -> Path:
        """The one run folder.

        Raises:
            RuntimeError: there are several.
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
        """The lives of the job so far."""
        try:
            return list(json.loads((self.run / "run.json").read_text(encoding="utf-8"))["sessions"])
        except (OSError, ValueError, KeyError, RuntimeError):
            return []

    def wait_for(self, update: int, session: int = 1) -> None:
        """Until a session (counted from 1) has done an update.

        Raises:
            RuntimeError: an agent ended before, or it takes too long.
        """
        deadline = time.monotonic() + PATIENCE
        while len(self.sessions()) < session or self.done < update:
            if time.monotonic() > deadline or all(agent.poll() is not None for agent in self.agents):
                raise RuntimeError(f"update {update} was not reached:\n{self.screens()}")
            time.sleep(0.02)

    def finish(self) -> None:
        """Until an agent has ended well.

        Raises:
            RuntimeError: none did.
        """
        codes = [agent.wait(timeout=PATIENCE) for agent in self.agents if agent.returncode is None]
        if any(codes):
            raise RuntimeError(f"agents ended with {codes}:\n{self.screens()}")

    def screens(self) -> str:
        """What the agents and their workers have printed, the last of it."""
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
    """Three workers, one after the other."""
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
    """What the loss of this moment costs, once the next session has begun and done an update."""
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
    """The second of two agents, with its worker. The first, where they meet, is not survivable."""
    update = random.Random(seed).randrange(updates // 4, updates // 2)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    meeting = {"HEAD": f"127.0.0.1:{port}", "JOB": "hosts", "LOCAL": "127.0.0.1", "LOST_AFTER": 3}
    with Job(folder / "broken", words, "elastic.sh", 2, NNODES="1:2", NPROC=1, **meeting) as job:
        job.wait_for(update)
        job.kill(job.agents[1])
        figures = resumed(job, 1)
        job.finish()
        worlds = [session["world"]["processes"] for session in job.sessions()]
        return {"losses": [figures], "worlds": worlds, **compared(job, words, folder)}


def compared(job: Job, words: Sequence[str], folder: Path) -> dict[str, Any]:
    """The parameters at the end, and the log, beside those of two processes that nothing happened to."""
    with Job(folder / "whole", words, "single_node.sh", NPROC=2) as whole:
        whole.finish()
        one, other = parameters(job.run), parameters(whole.run)
        bits = one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
        apart = sum(float((one[name] - other[name]).double().square().sum()) for name in other) ** 0.5
        norm = sum(float(tensor.double().square().sum()) for tensor in other.values()) ** 0.5
        return {"same_bits": bits, "relative_difference": apart / norm, "sessions": len(job.sessions())}


def parameters(run: Path) -> dict[str, torch.Tensor]:
    """The model of a run's last checkpoint."""
    path = CheckpointStore(run / "checkpoints").resolve("last")
    tensors = {name: torch.empty(shape) for name, shape in shapes(path).items() if name.startswith("model.")}
    load_tensors(path, tensors)
    return tensors


CASES = {"worker": (lose_workers, []), "host": (lose_host, PLAIN)}


def main() -> None:
    """Runs a case and writes its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=sorted(CASES))
    parser.add_argument("--data", required=True, type=Path, help="a prepared data folder")
    parser.add_argument("--updates", type=int, default=40)
    parser.add_argument("--every", type=int, default=5, help="updates between checkpoints")
    parser.add_argument("--seed", type=int, default=1, help="draws the updates and the victims")
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

"""A Slurm cluster that lives as long as a test session: two nodes on this machine, each a network host of its own.

    with Cluster(folder) as cluster:
        job = cluster.submit("script.sbatch", "argument")
        cluster.wait_for(job, "COMPLETED")

munged, slurmctld and a slurmd per node run for real, with all their state in one folder. The nodes ``n1`` and ``n2``
are network namespaces on a bridge (:mod:`scripts.netlab.hosts`), and their names do not resolve, as on many clusters.
Two partitions: ``main``, whose jobs are requeued when ``urgent`` needs their nodes. Needs root, slurm-wlm, munge and
iproute2.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from scripts.netlab.hosts import Hosts
from tests.slurm.settings import COMMANDS, CONTROLLER, write_settings

CPUS = 2  # of each node
_UP = 60.0  # seconds

# Ends the daemons where this process dies before it can: it waits for the end of a pipe that only we hold.
_WATCHER = """
import os, signal, subprocess, sys, time
sys.stdin.read()
folder, names = sys.argv[1], sys.argv[2:]
def ours(pid):
    try:
        return folder.encode() in open(f"/proc/{pid}/cmdline", "rb").read()
    except OSError:
        return False
for number in (signal.SIGTERM, signal.SIGKILL):
    for pid in reversed(open(f"{folder}/pids").read().split()):
        if ours(pid):
            os.kill(int(pid), number)
    time.sleep(1)
for name in names:
    subprocess.run(["ip", "netns", "del", name], stderr=subprocess.DEVNULL)
"""


class Cluster:
    """Started on entering, ended on leaving. ``environment`` makes Slurm's commands, and submitit, talk to it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.nodes = ("n1", "n2")
        self.hosts = Hosts(len(self.nodes))
        launched = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "GLOO_SOCKET_IFNAME")
        around = {k: v for k, v in os.environ.items() if k not in launched and not k.startswith("SLURM")}
        self.environment = {
            **around,
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PATH": f"{folder}/bin:{Path(sys.executable).parent}:{os.environ['PATH']}",
        }
        self._daemons: list[subprocess.Popen[bytes]] = []
        self._watcher: subprocess.Popen[bytes] | None = None

    @staticmethod
    def why_not() -> str | None:
        """Why this machine cannot; None where it can."""
        if reason := Hosts.why_not():
            return reason
        missing = [name for name in ("munged", "slurmctld", "slurmd", *COMMANDS) if not shutil.which(name)]
        return f"needs {missing[0]} (apt-get install slurm-wlm munge)" if missing else None

    # -- up and down -----------------------------------------------------------------------------------------------

    def __enter__(self) -> Cluster:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o755)  # munged wants a folder that nobody else may write to
        write_settings(self.folder, self.nodes, self.hosts.addresses, CPUS, self.hosts.hub)
        self.hosts.__enter__()
        try:
            self._start()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel_all()
        self._stop()

    def _start(self) -> None:
        hub, folder = self.hosts.hub, self.folder
        subprocess.run(["ip", "-n", hub, "link", "set", "lo", "up"], check=True)
        subprocess.run(["ip", "-n", hub, "addr", "add", f"{CONTROLLER}/24", "dev", "bridge0"], check=True)
        watcher = [sys.executable, "-c", _WATCHER, str(folder), hub, *self.hosts.names]
        self._watcher = subprocess.Popen(watcher, stdin=subprocess.PIPE, start_new_session=True)
        files = {"socket": "sock", "key-file": "key", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        self._daemon("munged", "--foreground", *(f"--{name}={folder}/munge.{end}" for name, end in files.items()))
        self._until_up("munged", (folder / "munge.sock").exists)
        self._daemon("nsenter", f"--net=/run/netns/{hub}", "slurmctld", "-D", "-i", "-f", f"{folder}/slurm.conf")
        for node, host in zip(self.nodes, self.hosts.names, strict=True):
            named = ["unshare", "--uts", "sh", "-c", f'hostname {node}; exec "$@"', "sh"]
            self._daemon("nsenter", f"--net=/run/netns/{host}", *named, "slurmd", "-D", "-f", f"{folder}/slurm.conf")
        self._until_up("slurm", lambda: self._idle() == len(self.nodes))

    def _daemon(self, *command: str) -> None:
        with self.folder.joinpath(f"{len(self._daemons)}.out").open("ab") as out:
            daemon = subprocess.Popen(
                command, env=self.environment, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
            )
        self._daemons.append(daemon)
        with self.folder.joinpath("pids").open("a") as pids:
            pids.write(f"{daemon.pid}\n")

    def _until_up(self, what: str, is_up: Callable[[], bool]) -> None:
        deadline = time.monotonic() + _UP
        while not is_up():
            ended = [daemon.args for daemon in self._daemons if daemon.poll() is not None]
            if ended or time.monotonic() > deadline:
                said = "".join(path.read_text() for path in sorted(self.folder.glob("*.out")))
                raise RuntimeError(f"{what} did not come up; ended: {ended}\n{said}")
            time.sleep(0.05)

    def _idle(self) -> int:
        return self.run("sinfo", "-hN", "-p", "main", "-o", "%t", check=False).stdout.split().count("idle")

    def _stop(self) -> None:
        for daemon in reversed(self._daemons):
            daemon.terminate()
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        if self._watcher is not None and self._watcher.stdin is not None:
            self._watcher.kill()
            self._watcher.wait()
            self._watcher.stdin.close()
        self.hosts.__exit__(None, None, None)

    # -- jobs ------------------------------------------------------------------------------------------------------

    def run(self, *command: str, check: bool = True, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        """A command of Slurm's. Raises RuntimeError, with what it said, where it fails."""
        program = shutil.which(command[0], path=self.environment["PATH"]) or command[0]
        done = subprocess.run(
            [program, *command[1:]],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            cwd=cwd or self.folder,
        )
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.returncode}\n{done.stdout}{done.stderr}")
        return done

    def submit(self, *words: str, cwd: Path | None = None) -> str:
        """``sbatch WORDS``; the job's number."""
        return self.run("sbatch", "--parsable", *words, cwd=cwd).stdout.strip()

    def show(self, job: str) -> dict[str, str]:
        """What ``scontrol show job`` says; of an array the first element's."""
        shown = self.run("scontrol", "--oneliner", "show", "job", job).stdout.splitlines()[0]
        return dict(re.findall(r"(\S+?)=(\S*)", shown))

    def wait_for(self, job: str, *states: str, timeout: float = 600) -> dict[str, str]:
        """Until the job is in one of the states; what ``show`` says then. A requeued job need not wait its 120 s.

        A job on its way back into the queue looks ended for a moment: only what is seen several times in a row counts.
        """
        deadline, seen = time.monotonic() + timeout, 0
        while seen < 4:
            shown = self.show(job)
            seen = seen + 1 if shown["JobState"] in states else 0
            if shown["Reason"] == "BeginTime":
                time.sleep(1.5)  # a node refuses a job that starts again in the second in which it was killed there
                self.run("scontrol", "update", f"JobId={job}", "StartTime=now", check=False)
            assert time.monotonic() < deadline, f"{job} is {shown['JobState']} ({shown['Reason']}), not {states}"
            time.sleep(0.25)
        return shown

    def cancel_all(self) -> None:
        """Ends every job, and waits until they have left their nodes."""
        self.run("scancel", "--signal=KILL", "--full", "--user=root", check=False)
        self.run("scancel", "--user=root", check=False)
        deadline = time.monotonic() + 60
        while self.run("squeue", "--noheader", check=False).stdout.strip() and time.monotonic() < deadline:
            time.sleep(0.2)

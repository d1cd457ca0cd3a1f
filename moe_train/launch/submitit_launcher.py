"""Sweeps as jobs of submitit: on Slurm as an array, or as processes of this host.

hydra-submitit-launcher runs a job; here is what a sweep of fifty needs besides: a job that dies takes no other with it
and is noted in its run folder, so that the leaderboard names it; ``resume=missing`` submits only what is not finished;
on one host only so many run at a time.
"""

from __future__ import annotations

import dataclasses
import os
import secrets
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus, filter_overrides
from hydra_plugins.hydra_submitit_launcher.config import BaseQueueConf
from hydra_plugins.hydra_submitit_launcher.submitit_launcher import BaseSubmititLauncher
from omegaconf import DictConfig, OmegaConf, open_dict

from moe_train.errors import LaunchError
from moe_train.launch.hydra_store import forget_foreign_schemas
from moe_train.launch.job.failures import write_failure
from moe_train.launch.slurm import check_slurm
from moe_train.parallel.isolation import SECRET
from moe_train.screen import Screen

_COMMON = frozenset(field.name for field in dataclasses.fields(BaseQueueConf))  # the rest is of one executor alone
_POLL = 0.2  # seconds


@dataclass(frozen=True)
class SweepJob:
    """One job of a sweep, before it is submitted.

    Attributes:
        number: its place in the sweep.
        overrides: its words, ``hydra.…`` ones included.
        config: what they compose to.
        folder: its run folder.
    """

    number: int
    overrides: tuple[str, ...]
    config: DictConfig
    folder: Path

    def title(self, common: Collection[str] = ()) -> str:
        """Its number and what tells it from others: its words without the ``common`` ones."""
        words = [word for word in filter_overrides(self.overrides) if word not in common]
        return f"job {self.number}" + (f" ({' '.join(words)})" if words else "")

    def result(self, status: JobStatus, value: Any) -> JobReturn:
        """What a sweeper gets of it."""
        given = JobReturn(overrides=list(self.overrides), task_name=str(self.config.hydra.job.name))
        given.status, given.return_value = status, value
        return given


class SubmittedJobs(BaseSubmititLauncher):
    """A Hydra launcher. Its parameters are the keys of ``configs/hydra/launcher/submitit_*.yaml``.

    Attributes:
        _OURS: those that submitit does not know.
    """

    _OURS: tuple[str, ...] = ()

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Submits, waits for all, and gives what each returned or why it failed, in order."""
        jobs = [self._plan(initial_job_idx + place, overrides) for place, overrides in enumerate(job_overrides)]
        results = {job.number: done for job in jobs if (done := _left_alone(job)) is not None}
        wanted = [job for job in jobs if job.number not in results]
        os.environ.setdefault(SECRET, secrets.token_hex(32))  # which submitted jobs inherit
        self._say(f"sweep: {len(wanted)} of {len(jobs)} jobs to {self._EXECUTOR}, in {self._folder}")
        if wanted:
            results |= self._run(wanted)
        failed = [number for number, result in sorted(results.items()) if result.status == JobStatus.FAILED]
        if failed:
            self._say(
                f"{len(failed)} of {len(jobs)} jobs failed ({', '.join(map(str, failed))}): moe-report "
                f"'runs=[{self._folder}]' says why. The same command with resume=missing "
                f"hydra.sweep.dir={self._folder} runs only these again."
            )
        return [results[job.number] for job in jobs]

    def checkpoint(self, *arguments: Any, **keywords: Any) -> Any:
        """What submitit pickles when a job goes back into the queue: Hydra's state, without fairseq's share in it."""
        forget_foreign_schemas()
        return super().checkpoint(*arguments, **keywords)

    @property
    def _folder(self) -> str:
        return str(self.config.hydra.sweep.dir)

    def _say(self, text: str) -> None:
        Screen().print(text, highlight=False, markup=False, soft_wrap=True)

    def _plan(self, number: int, overrides: Sequence[str]) -> SweepJob:
        config = self.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))
        with open_dict(config):
            config.hydra.job.num = number
        folder = Path(self._folder) / str(OmegaConf.select(config, "hydra.sweep.subdir"))
        return SweepJob(number, tuple(overrides), config, folder.absolute())

    def _run(self, jobs: Sequence[SweepJob]) -> dict[int, JobReturn]:
        raise NotImplementedError

    def _executor(self) -> Any:
        from submitit import AutoExecutor

        given = {name: value for name, value in self.params.items() if name not in self._OURS}
        folder, timeouts = given.pop("submitit_folder"), given.pop("max_num_timeout")
        executor = AutoExecutor(folder, cluster=self._EXECUTOR, **{f"{self._EXECUTOR}_max_num_timeout": timeouts})
        executor.update_parameters(
            **{name if name in _COMMON else f"{self._EXECUTOR}_{name}": value for name, value in given.items()}
        )
        return executor

    def _arguments(self, job: SweepJob) -> tuple[Any, ...]:
        """Of the call that the job makes: our parent's ``__call__``."""
        return (list(job.overrides), "hydra.sweep.dir", job.number, str(job.number), Singleton.get_state())

    def _collect(self, job: SweepJob, submitted: Any, since: float) -> JobReturn:
        """What a job returned; one that died is noted in its run folder, unless it has done so itself."""
        from submitit.core.utils import UncompletedJobError

        try:
            result: JobReturn = submitted.results()[0]
        except UncompletedJobError as error:
            result = job.result(JobStatus.FAILED, error)
            _note(job, submitted, since)
        self._say(f"{job.title(_common(self.config))}: {_outcome(result)}")
        return result


class SlurmJobs(SubmittedJobs):
    """An array, or a job of its own where there is only one."""

    _EXECUTOR = "slurm"

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """As every launcher of ours; a config file may have chosen this one, which nobody has checked yet."""
        check_slurm()
        return super().launch(job_overrides, initial_job_idx)

    def _run(self, jobs: Sequence[SweepJob]) -> dict[int, JobReturn]:
        from submitit.core.utils import FailedJobError

        since = time.time()
        try:
            submitted = self._executor().map_array(self, *zip(*map(self._arguments, jobs), strict=True))
        except FailedJobError as error:
            said = [line for line in str(error).splitlines() if line.strip()] or ["it does not say why"]
            raise LaunchError(
                f"Slurm has not taken the jobs ({said[-1].strip()})",
                "hydra/launcher=submitit_slurm",
                "correct hydra.launcher.partition=…, account=…, timeout_min=… and so on, and start again",
            ) from error
        number = submitted[0].job_id.partition("_")[0]
        self._say(f"Slurm job {number}: squeue --job {number}, scancel {number}; it goes on if this command is ended")
        return {job.number: self._collect(job, one, since) for job, one in zip(jobs, submitted, strict=True)}


class LocalJobs(SubmittedJobs):
    """Processes of this host, ``array_parallelism`` jobs at a time."""

    _EXECUTOR = "local"
    _OURS = ("array_parallelism",)

    def _run(self, jobs: Sequence[SweepJob]) -> dict[int, JobReturn]:
        executor, most, since = self._executor(), self.params["array_parallelism"], time.time()
        waiting, running, results = list(jobs), dict[int, tuple[SweepJob, Any]](), dict[int, JobReturn]()
        while waiting or running:
            while waiting and len(running) < most:
                job = waiting.pop(0)
                running[job.number] = job, executor.submit(self, *self._arguments(job))
            time.sleep(_POLL)
            for number, (job, submitted) in list(running.items()):
                if submitted.done():
                    results[number] = self._collect(job, submitted, since)
                    del running[number]
        return results


def _left_alone(job: SweepJob) -> JobReturn | None:
    """With ``resume=missing``, the result of a job that is finished, as the same words made it; None: it is to run."""
    if job.config.get("resume") != "missing":
        return None
    from moe_train.training.run.run_folder import RunFolder, recorded_overrides  # needs torch

    folder, split = RunFolder(job.folder), job.config.get("evaluate")
    done = folder.exists and folder.finished and (split is None or (job.folder / f"{split}.json").is_file())
    if not done or _telling(recorded_overrides(job.folder)) != _telling(job.overrides):
        return None
    return job.result(JobStatus.COMPLETED, folder.info.get("best"))


def _common(config: DictConfig) -> list[str]:
    """The words of the command line that every job has: those that sweep nothing."""
    words = OmegaConf.to_container(config.hydra.overrides.task)
    assert isinstance(words, list)
    return [str(word) for word in words]


def _telling(words: Sequence[str]) -> list[str]:
    """The overrides that make the run what it is."""
    return sorted(word for word in words if not word.startswith(("hydra.", "hydra/", "resume=", "launch")))


def _note(job: SweepJob, submitted: Any, since: float) -> None:
    from moe_train.training.run.run_folder import FAILURE

    path = job.folder / FAILURE
    if path.is_file() and path.stat().st_mtime >= since:
        return
    job.folder.mkdir(parents=True, exist_ok=True)
    complaints = [line.strip() for line in (submitted.stderr() or "").splitlines() if "error" in line.lower()]
    how = f"its job {submitted.job_id} ended without a result" + (f": {complaints[-1]}" if complaints else "")
    remedy = "Perhaps it was killed: its memory, its time and its host decide" if not complaints else ""
    error = LaunchError(f"{how} ({submitted.state})", remedy=remedy)
    write_failure(path, 0, error, filter_overrides(job.overrides))


def _outcome(result: JobReturn) -> str:
    if result.status == JobStatus.COMPLETED:
        return f"done, {result.return_value}"
    return f"failed: {str(result._return_value).splitlines()[0]}"  # the property of that name raises it

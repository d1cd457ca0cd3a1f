"""Hydra launchers that run the jobs of a sweep with submitit: as a Slurm array, or as processes of this host.

They extend hydra-submitit-launcher: a job that fails does not end the others, and its failure is written to its run
folder, so that the leaderboard shows it; ``resume=missing`` submits only jobs that are not finished; on one host the
number of jobs that run at a time is limited.
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

from moe_train.errors import LaunchError, first_line
from moe_train.launch.hydra_store import forget_foreign_schemas
from moe_train.launch.job.failures import write_failure
from moe_train.launch.slurm import check_slurm
from moe_train.parallel.isolation import SECRET
from moe_train.screen import Screen

_COMMON = frozenset(field.name for field in dataclasses.fields(BaseQueueConf))  # the others belong to one executor
_POLL = 0.2  # seconds


@dataclass(frozen=True)
class SweepJob:
    """One job of a sweep, before it is submitted.

    Attributes:
        number: its index in the sweep.
        overrides: of its command line, ``hydra.…`` ones included.
        config: the config composed from them.
        folder: its run folder.
    """

    number: int
    overrides: tuple[str, ...]
    config: DictConfig
    folder: Path

    def title(self, common: Collection[str] = ()) -> str:
        """Its number and its overrides without the ``common`` ones."""
        words = [word for word in filter_overrides(self.overrides) if word not in common]
        return f"job {self.number}" + (f" ({' '.join(words)})" if words else "")

    def result(self, status: JobStatus, value: Any) -> JobReturn:
        """The result of the job for the sweeper."""
        result = JobReturn(overrides=list(self.overrides), task_name=str(self.config.hydra.job.name))
        result.status, result.return_value = status, value
        return result


class SubmittedJobs(BaseSubmititLauncher):
    """A Hydra launcher. Its parameters are the keys of ``configs/hydra/launcher/submitit_*.yaml``."""

    _OWN_PARAMETERS: tuple[str, ...] = ()  # those that submitit does not have

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Submits the jobs, waits for all, and returns the result or the error of each, in order."""
        jobs = [self._plan(initial_job_idx + place, overrides) for place, overrides in enumerate(job_overrides)]
        results = {job.number: done for job in jobs if (done := _finished_result(job)) is not None}
        wanted = [job for job in jobs if job.number not in results]
        os.environ.setdefault(SECRET, secrets.token_hex(32))  # submitted jobs inherit it
        self._print(f"sweep: {len(wanted)} of {len(jobs)} jobs to {self._EXECUTOR}, in {self._folder}")
        if wanted:
            results |= self._run(wanted)
        failed = [number for number, result in sorted(results.items()) if result.status == JobStatus.FAILED]
        if failed:
            self._print(
                f"{len(failed)} of {len(jobs)} jobs failed ({', '.join(map(str, failed))}): moe-report "
                f"'runs=[{self._folder}]' shows why. The same command with resume=missing "
                f"hydra.sweep.dir={self._folder} runs only these again."
            )
        return [results[job.number] for job in jobs]

    def checkpoint(self, *arguments: Any, **keywords: Any) -> Any:
        """What submitit pickles when a job is requeued: Hydra's state, without fairseq's entries in it."""
        forget_foreign_schemas()
        return super().checkpoint(*arguments, **keywords)

    @property
    def _folder(self) -> str:
        return str(self.config.hydra.sweep.dir)

    def _print(self, text: str) -> None:
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

        given = {name: value for name, value in self.params.items() if name not in self._OWN_PARAMETERS}
        folder, timeouts = given.pop("submitit_folder"), given.pop("max_num_timeout")
        executor = AutoExecutor(folder, cluster=self._EXECUTOR, **{f"{self._EXECUTOR}_max_num_timeout": timeouts})
        executor.update_parameters(
            **{name if name in _COMMON else f"{self._EXECUTOR}_{name}": value for name, value in given.items()}
        )
        return executor

    def _arguments(self, job: SweepJob) -> tuple[Any, ...]:
        """Arguments of the call that the job makes: ``__call__`` of the parent class."""
        return (list(job.overrides), "hydra.sweep.dir", job.number, str(job.number), Singleton.get_state())

    def _collect(self, job: SweepJob, submitted: Any, since: float) -> JobReturn:
        """The result of a job. The failure of one that ended without a result is written to its run folder."""
        from submitit.core.utils import UncompletedJobError

        try:
            result: JobReturn = submitted.results()[0]
        except UncompletedJobError as error:
            result = job.result(JobStatus.FAILED, error)
            _write_failure(job, submitted, since)
        self._print(f"{job.title(_common(self.config))}: {_outcome(result)}")
        return result


class SlurmJobs(SubmittedJobs):
    """Jobs of a Slurm array; a single job where the sweep has one."""

    _EXECUTOR = "slurm"

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """See :class:`SubmittedJobs`. Checks for Slurm first, since a config file may have chosen this launcher."""
        check_slurm()
        return super().launch(job_overrides, initial_job_idx)

    def _run(self, jobs: Sequence[SweepJob]) -> dict[int, JobReturn]:
        from submitit.core.utils import FailedJobError

        since = time.time()
        try:
            submitted = self._executor().map_array(self, *zip(*map(self._arguments, jobs), strict=True))
        except FailedJobError as error:
            lines = [line for line in str(error).splitlines() if line.strip()] or ["no reason given"]
            raise LaunchError(
                f"Slurm did not accept the jobs ({lines[-1].strip()})",
                "hydra/launcher=submitit_slurm",
                "correct hydra.launcher.partition=…, account=…, timeout_min=… and so on, and start again",
            ) from error
        number = submitted[0].job_id.partition("_")[0]
        self._print(f"Slurm job {number}: squeue --job {number}, scancel {number}; ending this command does not end it")
        return {job.number: self._collect(job, one, since) for job, one in zip(jobs, submitted, strict=True)}


class LocalJobs(SubmittedJobs):
    """Processes of this host, ``array_parallelism`` jobs at a time."""

    _EXECUTOR = "local"
    _OWN_PARAMETERS = ("array_parallelism",)

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


def _finished_result(job: SweepJob) -> JobReturn | None:
    """With ``resume=missing``, the result of a job that has finished with the same overrides; None: it is to run."""
    if job.config.get("resume") != "missing":
        return None
    from moe_train.training.run.run_folder import RunFolder, recorded_overrides  # needs torch

    folder, split = RunFolder(job.folder), job.config.get("evaluate")
    done = folder.exists and folder.finished and (split is None or (job.folder / f"{split}.json").is_file())
    if not done or _defining(recorded_overrides(job.folder)) != _defining(job.overrides):
        return None
    return job.result(JobStatus.COMPLETED, folder.info.get("best"))


def _common(config: DictConfig) -> list[str]:
    """The overrides that all jobs of the sweep have."""
    overrides = OmegaConf.to_container(config.hydra.overrides.task)
    assert isinstance(overrides, list)
    return [str(override) for override in overrides]


def _defining(overrides: Sequence[str]) -> list[str]:
    """The overrides that change the trained model, not where and how it is trained."""
    return sorted(word for word in overrides if not word.startswith(("hydra.", "hydra/", "resume=", "launch")))


def _write_failure(job: SweepJob, submitted: Any, since: float) -> None:
    """Writes failure.json, unless the job has written it since ``since``."""
    from moe_train.training.run.run_folder import FAILURE

    path = job.folder / FAILURE
    if path.is_file() and path.stat().st_mtime >= since:
        return
    job.folder.mkdir(parents=True, exist_ok=True)
    errors = [line.strip() for line in (submitted.stderr() or "").splitlines() if "error" in line.lower()]
    what = f"its job {submitted.job_id} ended without a result" + (f": {errors[-1]}" if errors else "")
    remedy = "it may have been killed: check its memory, its time limit and its host" if not errors else ""
    error = LaunchError(f"{what} ({submitted.state})", remedy=remedy)
    write_failure(path, 0, error, filter_overrides(job.overrides))


def _outcome(result: JobReturn) -> str:
    if result.status == JobStatus.COMPLETED:
        return f"done, {result.return_value}"
    return f"failed: {first_line(result._return_value)}"  # the property of that name raises it

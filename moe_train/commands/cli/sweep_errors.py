"""A sweep whose jobs were refused: a message for each mistake, where Hydra has a traceback of the first one."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

from hydra._internal.utils import run_and_report

from moe_train.commands.cli.messages import say_error
from moe_train.errors import UserError
from moe_train.launch.job.failures import WorkerError

KNOWN = (UserError, WorkerError)  # they say all there is to know
_FULL = "HYDRA_FULL_ERROR"


@dataclass(frozen=True)
class SweepErrors:
    """What the jobs that failed in this process failed of; submitit's are told as they end."""

    found: list[tuple[int, Exception]] = field(default_factory=list)

    def note(self, job: int, error: Exception) -> None:
        """Called as a job fails; the sweep goes on."""
        self.found.append((job, error))

    def say(self) -> None:
        """Each different message of the known kinds once, with the jobs that it is about."""
        jobs: dict[str, list[int]] = {}
        for job, error in self.found:
            jobs.setdefault(str(error), []).append(job)
        first = {str(error): error for _, error in self.found if isinstance(error, KNOWN)}
        for text, error in first.items():
            say_error(error, _jobs(jobs[text]))


def run_sweep(sweep: Callable[[], None], errors: SweepErrors) -> None:
    """Runs a Hydra app that sweeps. Where HYDRA_FULL_ERROR is set, Hydra reports everything in its own way.

    Args:
        errors: notes what jobs fail of meanwhile.

    Raises:
        SystemExit: 2 where all that failed is the user's to mend, else 1.
    """
    if os.environ.get(_FULL) == "1":
        sweep()
        return
    try:
        with _raised():
            sweep()
    except Exception as error:
        errors.say()
        if not isinstance(error, KNOWN):
            run_and_report(partial(_raise, error))
        if not errors.found:  # of a job in another process
            say_error(error)
        failed = [error, *(one for _, one in errors.found)]
        raise SystemExit(2 if all(isinstance(one, UserError) for one in failed) else 1) from None


@contextmanager
def _raised() -> Iterator[None]:
    """Hydra raises errors instead of reporting them."""
    before = os.environ.get(_FULL)
    os.environ[_FULL] = "1"
    try:
        yield
    finally:
        os.environ.pop(_FULL)
        if before is not None:
            os.environ[_FULL] = before


def _raise(error: Exception) -> None:
    """With the frames from Hydra's ``run_job`` on, for which its report looks among the first ones."""
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_name != "run_job":
        trace = trace.tb_next
    raise error.with_traceback(trace or error.__traceback__)


def _jobs(numbers: Sequence[int]) -> str:
    return f"job {numbers[0]}" if len(numbers) == 1 else f"jobs {', '.join(map(str, numbers))}"

"""Reports each different error of the jobs of a sweep, where Hydra would show a traceback of the first one."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

from hydra._internal.utils import run_and_report

from moe_train.commands.cli.messages import print_error
from moe_train.errors import UserError
from moe_train.launch.job.failures import WorkerError

KNOWN = (UserError, WorkerError)  # their messages need no traceback
_FULL = "HYDRA_FULL_ERROR"


@dataclass(frozen=True)
class SweepErrors:
    """Errors of jobs that failed in this process; the submitit launchers print theirs when a job ends."""

    found: list[tuple[int, Exception]] = field(default_factory=list)

    def note(self, job: int, error: Exception) -> None:
        """Called when a job fails; the sweep continues."""
        self.found.append((job, error))

    def print(self) -> None:
        """Prints each different message of the known kinds once, with the jobs that it is about."""
        jobs: dict[str, list[int]] = {}
        for job, error in self.found:
            jobs.setdefault(str(error), []).append(job)
        first = {str(error): error for _, error in self.found if isinstance(error, KNOWN)}
        for text, error in first.items():
            numbers = jobs[text]
            print_error(error, f"job{'s' if numbers[1:] else ''} {', '.join(map(str, numbers))}")


def run_sweep(sweep: Callable[[], None], errors: SweepErrors) -> None:
    """Runs a Hydra app that sweeps. Where HYDRA_FULL_ERROR is set, Hydra reports everything in its own way.

    Args:
        errors: collects the errors of its jobs.

    Raises:
        SystemExit: 2 where all errors are user errors, else 1.
    """
    if os.environ.get(_FULL) == "1":
        sweep()
        return
    try:
        with _hydra_raises():
            sweep()
    except Exception as error:
        errors.print()
        if not isinstance(error, KNOWN):
            run_and_report(partial(_raise, error))
        if not errors.found:  # of a job in another process
            print_error(error)
        failed = [error, *(one for _, one in errors.found)]
        raise SystemExit(2 if all(isinstance(one, UserError) for one in failed) else 1) from None


@contextmanager
def _hydra_raises() -> Iterator[None]:
    """While entered, Hydra raises errors instead of reporting them."""
    before = os.environ.get(_FULL)
    os.environ[_FULL] = "1"
    try:
        yield
    finally:
        os.environ.pop(_FULL)
        if before is not None:
            os.environ[_FULL] = before


def _raise(error: Exception) -> None:
    """Raises the error with the frames from Hydra's ``run_job`` on, which its report expects among the first ones."""
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_name != "run_job":
        trace = trace.tb_next
    raise error.with_traceback(trace or error.__traceback__)

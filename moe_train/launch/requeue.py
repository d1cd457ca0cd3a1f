"""Ends a run that was interrupted and has saved: with exit code 75, or by requeueing its submitit job."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

from moe_train.errors import LaunchError
from moe_train.launch.job.env import launched_rank
from moe_train.launch.slurm import job_state, own_job
from moe_train.safe_text import for_terminal

INTERRUPTED = 75  # sysexits.h: EX_TEMPFAIL
_TRIES, _PAUSE = 3, 2.0  # seconds between them


def exit_saved(code: int = INTERRUPTED) -> None:
    """Ends the process, or requeues its submitit job.

    submitit's protocol: rank 0 pickles the call and requeues the job (Slurm or submitit's local controller starts it
    again), which then resumes in the same run folder. submitit's handler of ``SIGUSR2`` does all of that. During
    updates our own handler was installed, so that the update could end and be saved: here the signal is raised again
    for submitit's. The other ranks only return, since rank 0 must end first. A job that Slurm has already ended
    (cancelled, or preempted without a grace time, when Slurm itself requeues) is not requeued.

    Raises:
        SystemExit: always, except on ranks other than 0 of a submitit job.
        UncompletedJobError: (submitit's) the job has reached its time limit more often than ``max_num_timeout``.
    """
    executor = os.environ.get("SUBMITIT_EXECUTOR")
    if executor is None:
        sys.exit(code)
    if launched_rank():
        return
    for left in reversed(range(_TRIES)):
        if executor == "slurm" and not _is_running():
            break
        try:
            signal.raise_signal(signal.Signals[f"SIG{os.environ.get('SUBMITIT_PREEMPT_SIGNAL', 'USR2')}"])
            break
        except (OSError, subprocess.SubprocessError) as error:  # submitit asks scontrol once
            _print(f"Slurm did not requeue the job ({error}), {left} tries left")
            time.sleep(_PAUSE if left else 0)
    sys.exit(code)


def _is_running() -> bool:
    """Whether Slurm lets the job run. Assumed where Slurm does not answer: this process still runs."""
    try:
        return job_state(own_job()) == "RUNNING"
    except LaunchError as error:
        _print(f"{error.what}: the job is assumed to be running")
        return True


def _print(text: str) -> None:
    print(for_terminal(text), file=sys.stderr, flush=True)

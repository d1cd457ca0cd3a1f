"""A run was asked to stop and has saved: it leaves with a code that says so, or goes back into the queue."""

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


def leave_saved(code: int = INTERRUPTED) -> None:
    """Ends the process, or asks submitit to have its job started again.

    submitit's protocol: rank 0 pickles the call anew and requeues the job (Slurm starts it again, or submitit's local
    controller does), which then goes on in the same run folder. Its own handler of ``SIGUSR2`` does all that; during
    updates the signal was ours, so that the update could end and be saved: here it is handed on. The other ranks only
    return, for rank 0 must be the first to go. A job that Slurm has already ended (cancelled, or preempted without time
    to spare, when Slurm requeues by itself) is left alone.

    Raises:
        SystemExit: always, but for ranks other than 0 of a job of submitit's.
        UncompletedJobError: (submitit's) the job has reached its limit more often than ``max_num_timeout``.
    """
    executor = os.environ.get("SUBMITIT_EXECUTOR")
    if executor is None:
        sys.exit(code)
    if launched_rank():
        return
    for left in reversed(range(_TRIES)):
        if executor == "slurm" and not _still_runs():
            break
        try:
            signal.raise_signal(signal.Signals[f"SIG{os.environ.get('SUBMITIT_PREEMPT_SIGNAL', 'USR2')}"])
            break
        except (OSError, subprocess.SubprocessError) as error:  # submitit asks scontrol once
            _say(f"Slurm has not taken the job back ({error}), {left} tries left")
            time.sleep(_PAUSE if left else 0)
    sys.exit(code)


def _still_runs() -> bool:
    """Whether Slurm lets the job run. Where it does not say, being busy, the job does: or this process would not."""
    try:
        return job_state(own_job()) == "RUNNING"
    except LaunchError as error:
        _say(f"{error.what}: the job is taken for running")
        return True


def _say(text: str) -> None:
    print(for_terminal(text), file=sys.stderr, flush=True)

"""What a command says when it ends badly."""

from __future__ import annotations

import sys

from moe_train.errors import UserError
from moe_train.launch.job.env import launched_rank
from moe_train.screen import Screen

INTERRUPTED = 130  # the exit code after a Ctrl-C, as shells say it: 128 + SIGINT


def say_error(error: Exception, about: str = "") -> None:
    """One message on stderr, without a traceback; ``Error`` is the user's to mend.

    Args:
        about: what it concerns, such as a sweep's job.
    """
    rank = launched_rank()
    prefix = f"[rank {rank}] " if rank else ""
    console = Screen(stderr=True, soft_wrap=True)
    label = "Error:" if isinstance(error, UserError) else "Failed:"
    console.print(f"{prefix}[bold red]{label}[/]", end=" ", highlight=False, markup=True)
    console.print(f"{about}: {error}" if about else str(error), highlight=False, markup=False)


def say_interrupted() -> None:
    """After a Ctrl-C, which a terminal shows as ``^C`` at the end of the line."""
    print("\nInterrupted." if sys.stderr.isatty() else "Interrupted.", file=sys.stderr)

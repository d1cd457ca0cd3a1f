"""Prints the error of a command that fails."""

from __future__ import annotations

import sys

from moe_train.errors import UserError
from moe_train.launch.job.env import launched_rank
from moe_train.screen import Screen

INTERRUPTED = 130  # exit code after Ctrl-C, as in shells: 128 + SIGINT


def print_error(error: Exception, about: str = "") -> None:
    """Prints one message to stderr, without a traceback: ``Error:`` for user errors, else ``Failed:``.

    Args:
        about: what it concerns, such as a job of a sweep.
    """
    rank = launched_rank()
    prefix = f"[rank {rank}] " if rank else ""
    console = Screen(stderr=True, soft_wrap=True)
    label = "Error:" if isinstance(error, UserError) else "Failed:"
    console.print(f"{prefix}[bold red]{label}[/]", end=" ", highlight=False, markup=True)
    console.print(f"{about}: {error}" if about else str(error), highlight=False, markup=False)


def print_interrupted() -> None:
    """Prints a message after Ctrl-C, which a terminal shows as ``^C`` at the end of the line."""
    print("\nInterrupted." if sys.stderr.isatty() else "Interrupted.", file=sys.stderr)

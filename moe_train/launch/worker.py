"""One process of :func:`moe_train.launch.local.launch`: ``python -m moe_train.launch.worker JOB PARENT``.

Reads what to call from ``JOB/job.json``, writes ``JOB/result_N.json`` or ``JOB/failure_N.json``.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from moe_train.console import lossy_streams
from moe_train.errors import UserError
from moe_train.launch.job.failures import failure_file, write_failure
from moe_train.launch.job.hard_exit import exit_now
from moe_train.plugins import import_user_dir
from moe_train.safe_text import current_traceback
from moe_train.utils.process import die_with_parent


def main() -> None:
    """Exit code 0, 2 for a UserError, 1 for anything else."""
    job, parent, rank = Path(sys.argv[1]), int(sys.argv[2]), int(os.environ["RANK"])
    die_with_parent(parent)
    try:
        content = json.loads(job.joinpath("job.json").read_text(encoding="utf-8"))
        sys.argv = content["command"]  # what the user typed, for run.json
        with lossy_streams():
            import_user_dir()
            result = resolve(content["target"])(**content["arguments"])
        job.joinpath(f"result_{rank}.json").write_text(json.dumps(result), encoding="utf-8")
    except BaseException as error:
        _fail(failure_file(job, rank), rank, error)
    exit_now(0)


def _fail(path: Path, rank: int, error: BaseException) -> NoReturn:
    written = False
    try:
        with suppress(OSError):  # such as a full disk
            write_failure(path, rank, error)
            written = True
        if not written or (rank and not isinstance(error, UserError)):
            # Into this rank's log. The parent shows that of rank 0 if it failed first.
            print(current_traceback(), file=sys.stderr, end="")
    finally:
        exit_now(2 if isinstance(error, UserError) else 1)


def resolve(target: str) -> Callable[..., Any]:
    """The function of ``package.module:function``."""
    module, function = target.split(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module), function)
    return found


if __name__ == "__main__":
    main()

"""Functions that are really killed, at each of their changes to the file system in turn."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable

CHANGES = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree", "fcntl.flock")


def killed_before(step: int, action: Callable[[], object], events: tuple[str, ...] = CHANGES) -> bool:
    """Runs ``action`` in a child that kills itself before its change number ``step`` (from 0).

    Args:
        events: Python's audit events that count as changes.

    Returns:
        Whether it was killed; False: it has come to its end with fewer changes.
    """
    child = os.fork()
    if child == 0:
        seen = 0

        def count(event: str, arguments: object) -> None:
            nonlocal seen
            if event in events:
                if seen == step:
                    os.kill(os.getpid(), signal.SIGKILL)
                seen += 1

        try:
            sys.addaudithook(count)
            action()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    _, status = os.waitpid(child, 0)
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    assert killed or status == 0, "the action failed in its child"
    return killed

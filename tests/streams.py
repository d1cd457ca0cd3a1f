"""Standard streams and terminals for tests: the descriptors themselves, as a shell would set them."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import select
import signal
import struct
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_PATIENCE = 120.0  # seconds for a process on a terminal to say the next word


@contextmanager
def standard_streams(stdout: int, stderr: int, encoding: str = "utf-8") -> Iterator[None]:
    """While entered, descriptors 1 and 2, and Python's streams on them, lead where ``stdout`` and ``stderr`` do."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    before, kept = (sys.stdout, sys.stderr), (os.dup(1), os.dup(2))
    for place, given in ((1, stdout), (2, stderr)):
        os.dup2(given, place)
    sys.stdout, sys.stderr = _text(1, encoding, "strict"), _text(2, encoding, "backslashreplace")
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        for place, saved in zip((1, 2), kept, strict=True):
            os.dup2(saved, place)
            os.close(saved)


def _text(descriptor: int, encoding: str, errors: str) -> io.TextIOWrapper:
    return io.TextIOWrapper(io.FileIO(descriptor, "wb", closefd=False), encoding, errors, write_through=True)


@contextmanager
def opened(path: str = "/dev/full") -> Iterator[int]:
    """A descriptor for writing."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def pipe_without_reader() -> Iterator[int]:
    """A descriptor for writing into a pipe that nobody will read."""
    reading, writing = os.pipe()
    os.close(reading)
    try:
        yield writing
    finally:
        os.close(writing)


class Terminal:
    """A process on a terminal of its own.

    Args:
        start: called in the process, whose standard streams are the terminal. Never comes back from ``exec``, or ends
            the process with exit code 0 by returning.
        columns: of the terminal.
    """

    def __init__(self, start: Callable[[], object], columns: int = 80) -> None:
        self.seen = b""
        self._process, self._descriptor = pty.fork()
        if self._process == 0:
            os._exit(_run(start, columns))

    def read_until(self, end: bytes) -> bytes:
        """What is shown next, up to and with ``end``."""
        start, deadline = len(self.seen), time.monotonic() + _PATIENCE
        while end not in self.seen[start:]:
            assert time.monotonic() < deadline, self.seen
            assert self._read(), self.seen
        return self.seen[start:]

    def type(self, keys: bytes) -> None:
        """As at a keyboard; b"\\x03" is Ctrl-C, b"\\x04" Ctrl-D."""
        os.write(self._descriptor, keys)

    def interrupt(self) -> int:
        """Presses Ctrl-C until the process has ended; returns its exit code.

        Python's readline misses a signal that comes between showing a prompt and waiting for a key.
        """
        deadline = time.monotonic() + _PATIENCE
        self.type(b"\x03")
        while time.monotonic() < deadline:
            if not self._readable(10.0):
                self.type(b"\x03")
            elif not self._read():
                break
        return self.wait()

    def wait(self) -> int:
        """The exit code, when all that is shown was read.

        The terminal stays open until the process has ended: a process that has closed its streams but still runs would
        be ended by the hang-up otherwise.
        """
        while self._read():
            pass
        deadline = time.monotonic() + _PATIENCE
        while (ended := os.waitpid(self._process, os.WNOHANG))[0] == 0:
            if time.monotonic() > deadline:
                os.kill(self._process, signal.SIGKILL)
            time.sleep(0.01)
        os.close(self._descriptor)
        return os.waitstatus_to_exitcode(ended[1])

    def _readable(self, patience: float) -> bool:
        return bool(select.select([self._descriptor], [], [], patience)[0])

    def _read(self) -> bool:
        try:
            more = os.read(self._descriptor, 65536) if self._readable(_PATIENCE) else b""
        except OSError:  # so Linux says that the process has closed its side
            more = b""
        self.seen += more
        return bool(more)


def _run(start: Callable[[], object], columns: int) -> int:
    code = 1
    try:
        fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        for name in ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR"):
            os.environ.pop(name, None)
        os.environ["TERM"] = "xterm"
        sys.stdin, sys.stdout, sys.stderr = (open(n, "w" if n else "r") for n in range(3))  # noqa: SIM115
        start()
        sys.stdout.flush()
        code = 0
    finally:
        os._exit(code)

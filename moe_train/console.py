"""The standard streams of a command: a reader that has gone, or a full disk, must not end the work.

Python raises ``OSError`` where text cannot be written, and ``UnicodeEncodeError`` where the stream's encoding lacks a
character. Commands print while and after they work for hours, so both are caught at the stream and not at each print.
So are escape sequences in text from elsewhere, such as in the message of an error that a library raises.
"""

from __future__ import annotations

import errno
import io
import logging
import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn, TextIO

from moe_train.errors import UserError
from moe_train.safe_text import for_terminal

_LOG = logging.getLogger("moe_train")
_NAMES = {1: "standard output", 2: "standard error"}


class ConsoleStream(io.TextIOWrapper):
    """Standard output or standard error that does not raise.

    Text that cannot be written is dropped, and so is all that follows; the first such error is logged. Characters that
    the encoding lacks are written as escapes such as ``\\u2026``, control characters as :func:`for_terminal` has them;
    :class:`moe_train.screen.Screen` writes its colours past that.

    Args:
        descriptor: 1 or 2.
        before: the stream to stand for; None: it was closed when the process started.
        vital: the stream is what the command is run for: where it cannot be written, the command ends
            (:func:`end_without_output`).
        literal: control characters are written as they are.

    Attributes:
        error: why the stream is lost; None while it is not.
    """

    def __init__(self, descriptor: int, before: TextIO | None, vital: bool = False, literal: bool = False) -> None:
        lenient = before is not None and before.errors not in (None, "strict", "surrogateescape")
        super().__init__(
            io.BufferedWriter(io.FileIO(descriptor, "wb", closefd=False)),
            encoding=before.encoding if before is not None else "utf-8",
            errors=before.errors if before is not None and lenient else "backslashreplace",
            line_buffering=getattr(before, "line_buffering", True),
            write_through=getattr(before, "write_through", False),
        )
        self.vital, self.literal = vital, literal
        self.error = None if before is not None else OSError(errno.EBADF, os.strerror(errno.EBADF))

    def write(self, text: str) -> int:
        """Writes, or drops, all of it."""
        return self.write_styled(text if self.literal else for_terminal(text))

    def write_styled(self, text: str) -> int:
        """Writes, or drops, text whose control characters are meant."""
        with self._not_raising():
            super().write(text)
        return len(text)

    def flush(self) -> None:
        """Writes, or drops, what is buffered."""
        with self._not_raising():
            super().flush()

    def check(self) -> None:
        """Logs that the stream is lost, if it is. Whether it can be written is tried without writing."""
        if self.error is not None:
            self._log(self.error)
            return
        with self._not_raising():
            os.write(self.fileno(), b"")  # fails on /dev/full
            poll = select.poll()
            poll.register(self.fileno(), 0)
            if any(event & select.POLLERR for _, event in poll.poll(0)):  # a pipe without a reader
                raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))

    @contextmanager
    def _not_raising(self) -> Iterator[None]:
        try:
            yield
        except BlockingIOError:  # another process has made the terminal or pipe non-blocking, and it is full just now
            os.set_blocking(self.fileno(), True)
        except OSError as error:
            self.error = error
            _discard(self.fileno())
            # Here, when the stream's own lock is free again: a handler of the log may write to this very stream.
            self._log(error)
            if self.vital:
                end_without_output(error)

    def _log(self, error: OSError) -> None:
        if _LOG.handlers:  # a log file of ours; others, such as Hydra's, would print it for whoever has seen enough
            _LOG.info("%s: this process goes on without it", _loss(self.fileno(), error))


class StyledStream:
    """A :class:`ConsoleStream` for whoever styles text by control characters."""

    def __init__(self, stream: ConsoleStream) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Writes, or drops, all of it."""
        return self._stream.write_styled(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def make_streams_lossy(vital: bool = False, literal: bool = False) -> None:
    """From now on ``sys.stdout`` and ``sys.stderr`` do not raise; streams of tests, without a descriptor, stay.

    Args:
        vital: of standard output, as in :class:`ConsoleStream`.
        literal: for libraries that draw bars on standard error and write data to standard output: control characters
            are shown where standard output is a terminal, and nowhere else.
    """
    _occupy_closed_descriptors()
    sys.stdout, sys.stderr = _lossy(1, sys.stdout, vital, literal), _lossy(2, sys.stderr, False, literal)


@contextmanager
def lossy_streams(vital: bool = False, literal: bool = False) -> Iterator[None]:
    """While entered, :func:`make_streams_lossy`."""
    before = sys.stdout, sys.stderr
    make_streams_lossy(vital, literal)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        sys.stdout, sys.stderr = before


def check_streams() -> None:
    """Logs which standard streams are lost. Who has opened a log calls it; what is lost later is logged then."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, ConsoleStream):
            stream.check()


def write_output(content: bytes) -> None:
    """Writes what a command is run for to standard output, whatever the stream's encoding.

    Raises:
        SystemExit: it cannot be written (:func:`end_without_output`).
    """
    lost = sys.stdout.error if isinstance(sys.stdout, ConsoleStream) else None
    try:
        if lost is not None:
            raise lost
        sys.stdout.buffer.write(content)
        sys.stdout.buffer.flush()
    except OSError as error:
        end_without_output(error)


def require_output() -> None:
    """Called when the work is done, by commands whose users want to see the text.

    Raises:
        UserError: standard output could not be written. Not where its reader closed it: ``head`` has seen enough.
    """
    sys.stdout.flush()
    error = sys.stdout.error if isinstance(sys.stdout, ConsoleStream) else None
    if error is not None and error.errno != errno.EPIPE:
        raise _unwritable(error)


def end_without_output(error: OSError) -> NoReturn:
    """Ends a command whose product cannot be written: quietly where the reader has closed the pipe.

    Raises:
        SystemExit: 0 for a pipe that its reader has closed, else 2, with a message on standard error. (No
            :class:`UserError`: Python's logging, which may be the one that writes, would catch and print it.)
    """
    _discard(1)
    if error.errno == errno.EPIPE:
        raise SystemExit(0)
    print(f"Error: {_unwritable(error)}", file=sys.stderr)
    raise SystemExit(2)


def _unwritable(error: OSError) -> UserError:
    return UserError(_loss(1, error), remedy="make room, or send it to another place, and run the command again")


def _loss(descriptor: int, error: OSError) -> str:
    how = "is closed" if error.errno == errno.EBADF else f"cannot be written ({error.strerror})"
    return f"{_NAMES[descriptor]} {how}"


def _lossy(descriptor: int, stream: TextIO | None, vital: bool, literal: bool) -> TextIO:
    if isinstance(stream, ConsoleStream):
        return stream
    if stream is not None:
        try:
            if stream.fileno() != descriptor:
                return stream
        except (OSError, ValueError):  # in memory, or closed
            return stream
        with suppress(OSError):
            stream.flush()
    return ConsoleStream(descriptor, stream, vital, literal and not (descriptor == 1 and os.isatty(1)))


def _discard(descriptor: int) -> None:
    """What this process, and those that it starts from now on, write there is dropped by the system."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, descriptor)
    os.close(null)


def _occupy_closed_descriptors() -> None:
    """A file that is opened later must not get the number of a standard stream: prints would go into it."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)

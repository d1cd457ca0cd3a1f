"""Standard streams that do not raise: a closed pipe or a full disk must not end a command's work.

Python raises ``OSError`` if text cannot be written, and ``UnicodeEncodeError`` if the stream's encoding lacks a
character. Commands work for hours and print meanwhile, so both are handled in the stream and not at each print. The
stream also escapes control characters, for example in the messages of libraries' exceptions.
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

    After the first write error, which is logged, all text is dropped. Characters that the encoding lacks are written as
    escapes such as ``\\u2026``, and control characters as by :func:`for_terminal`; :class:`moe_train.screen.Screen`
    bypasses this for its colours.

    Args:
        descriptor: 1 or 2.
        before: the stream to replace; None: it was closed when the process started.
        vital: the command's result goes to this stream: a write error ends the command (:func:`end_without_output`).
        literal: control characters are not escaped.

    Attributes:
        error: the error after which text is dropped; None if there was none.
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
        """Writes or drops the text."""
        return self.write_styled(text if self.literal else for_terminal(text))

    def write_styled(self, text: str) -> int:
        """Writes or drops the text without escaping control characters."""
        with self._not_raising():
            super().write(text)
        return len(text)

    def flush(self) -> None:
        """Writes or drops buffered text."""
        with self._not_raising():
            super().flush()

    def check(self) -> None:
        """Logs an error if the stream cannot be written; this is tested without writing."""
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
        except BlockingIOError:  # another process has made the terminal or pipe non-blocking, and it is full
            os.set_blocking(self.fileno(), True)
        except OSError as error:
            self.error = error
            _discard(self.fileno())
            # After the stream's lock was released, since a log handler may write to this stream.
            self._log(error)
            if self.vital:
                end_without_output(error)

    def _log(self, error: OSError) -> None:
        if _LOG.handlers:  # only our log file; root handlers, such as Hydra's, would print to a closed stream
            _LOG.info("%s: this process continues without it", _loss(self.fileno(), error))


class StyledStream:
    """A :class:`ConsoleStream` whose ``write`` does not escape control characters, for styled text."""

    def __init__(self, stream: ConsoleStream) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Writes or drops the text."""
        return self._stream.write_styled(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def make_streams_lossy(vital: bool = False, literal: bool = False) -> None:
    """Replaces ``sys.stdout`` and ``sys.stderr`` by streams that do not raise, unless they have no descriptor (tests).

    Args:
        vital: for standard output, as in :class:`ConsoleStream`.
        literal: for libraries that draw bars on standard error and write data to standard output: control characters
            are escaped only if standard output is a terminal.
    """
    _occupy_closed_descriptors()
    sys.stdout, sys.stderr = _lossy(1, sys.stdout, vital, literal), _lossy(2, sys.stderr, False, literal)


@contextmanager
def lossy_streams(vital: bool = False, literal: bool = False) -> Iterator[None]:
    """Context with :func:`make_streams_lossy`."""
    before = sys.stdout, sys.stderr
    make_streams_lossy(vital, literal)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        sys.stdout, sys.stderr = before


def check_streams() -> None:
    """Logs which standard streams cannot be written. Call it after opening a log; later errors are logged at once."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, ConsoleStream):
            stream.check()


def write_output(content: bytes) -> None:
    """Writes a command's result to standard output as bytes.

    Raises:
        SystemExit: it cannot be written (:func:`end_without_output`).
    """
    earlier = sys.stdout.error if isinstance(sys.stdout, ConsoleStream) else None
    try:
        if earlier is not None:
            raise earlier
        sys.stdout.buffer.write(content)
        sys.stdout.buffer.flush()
    except OSError as error:
        end_without_output(error)


def require_output() -> None:
    """Checks standard output at the end of a command whose result is printed text.

    Raises:
        UserError: standard output could not be written. A pipe closed by its reader (``head``) is no error.
    """
    sys.stdout.flush()
    error = sys.stdout.error if isinstance(sys.stdout, ConsoleStream) else None
    if error is not None and error.errno != errno.EPIPE:
        raise _unwritable(error)


def end_without_output(error: OSError) -> NoReturn:
    """Ends a command whose result cannot be written.

    Raises:
        SystemExit: 0 if the reader has closed the pipe, else 2, with a message on standard error. (Not a
            :class:`UserError`, which Python's logging would catch and print if it is the writer.)
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
    """Redirects a descriptor to the null device, for this process and processes started later."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, descriptor)
    os.close(null)


def _occupy_closed_descriptors() -> None:
    """Opens the null device for closed standard streams, so that no file opened later gets their descriptor."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)

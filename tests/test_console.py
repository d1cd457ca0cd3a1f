"""Standard streams that cannot be written, or that lack characters."""

from __future__ import annotations

import errno
import io
import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
from rich.progress import Progress

from moe_train.console import ConsoleStream, check_streams, lossy_streams, require_output, write_output
from moe_train.errors import UserError
from moe_train.screen import Screen
from tests.streams import opened, pipe_without_reader, standard_streams

LOST = {opened: "No space left on device", pipe_without_reader: "Broken pipe"}
each_way = pytest.mark.parametrize("lost", list(LOST), ids=["full", "closed"])
Lost = Callable[[], AbstractContextManager[int]]


@contextmanager
def open_log(path: Path) -> Iterator[Path]:
    """As of a rank."""
    handler, logger = logging.FileHandler(path), logging.getLogger("moe_train")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield path
    finally:
        logger.propagate = True
        logger.setLevel(logging.NOTSET)
        logger.removeHandler(handler)
        handler.close()


@each_way
def test_what_cannot_be_written_is_dropped_and_logged_once(lost: Lost, tmp_path: Path) -> None:
    err = tmp_path / "err"
    with (
        open_log(tmp_path / "log") as log,
        lost() as out,
        opened(str(err)) as told,
        standard_streams(out, told),
        lossy_streams(),
    ):
        for _ in range(3):
            print("x" * 100_000, flush=True)
        print("said", file=sys.stderr)
        os.write(1, b"nor does it end a library that writes by itself")
    assert log.read_text() == f"standard output cannot be written ({LOST[lost]}): this process continues without it\n"
    assert err.read_text() == "said\n"


@each_way
def test_a_log_that_is_opened_later_has_it_too(lost: Lost, tmp_path: Path) -> None:
    """Of both streams, though nothing was written to one of them."""
    with lost() as out, standard_streams(out, out), lossy_streams():
        print("before there is a log", flush=True)
        with open_log(tmp_path / "log") as log:
            check_streams()
    assert [line.split(" cannot")[0] for line in log.read_text().splitlines()] == ["standard output", "standard error"]


def test_streams_in_order_are_not_complained_of(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with (
        open_log(tmp_path / "log") as log,
        opened(str(out)) as descriptor,
        standard_streams(descriptor, descriptor),
        lossy_streams(),
    ):
        check_streams()
        require_output()
        print("said", flush=True)
    assert log.read_text() == "" and out.read_text() == "said\n"


def test_the_log_may_lie_on_the_same_full_disk() -> None:
    """Python's logging tells of its own failure on standard error, while standard error is failing."""
    handler = logging.FileHandler("/dev/full")
    logger = logging.getLogger("moe_train")
    logger.addHandler(handler)
    try:
        with opened() as full, standard_streams(full, full), lossy_streams():
            logger.error("cannot be written")
            print("nor can this", file=sys.stderr, flush=True)
    finally:
        logger.removeHandler(handler)
        handler.stream = None  # type: ignore[assignment]  # closing would flush


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [("ascii", r"\u2026 sch\xf6n \udcff"), ("latin-1", r"\u2026 schön \udcff"), ("utf-8", r"… schön \udcff")],
)
def test_characters_that_the_encoding_lacks_are_escaped(encoding: str, shown: str, tmp_path: Path) -> None:
    """The last one is a byte of a file name that is no UTF-8."""
    with opened(str(tmp_path / "out")) as out, standard_streams(out, out, encoding), lossy_streams():
        print("… schön \udcff")
    assert (tmp_path / "out").read_text(encoding) == f"{shown}\n"


def test_a_terminal_that_is_slow_is_not_lost() -> None:
    """Another process may have made it non-blocking: then a write can fail that would succeed a moment later."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    try:
        while True:
            os.write(writing, bytes(65536))
    except BlockingIOError:
        pass
    with standard_streams(writing, 2), lossy_streams():
        print("too early", flush=True)
        assert isinstance(sys.stdout, ConsoleStream) and sys.stdout.error is None
        os.read(reading, 65536)
        print("in time", flush=True)
    assert os.read(reading, 65536).endswith(b"in time\n")
    os.close(reading)
    os.close(writing)


def test_work_that_is_done_says_that_nobody_could_read_of_it(tmp_path: Path) -> None:
    with opened() as full, standard_streams(full, 2), lossy_streams():
        print("the table")
        with pytest.raises(UserError, match=r"standard output cannot be written \(No space left on device\)"):
            require_output()
    with pipe_without_reader() as closed, standard_streams(closed, 2), lossy_streams():
        print("the table")
        require_output()  # `head` has seen enough


def test_what_a_command_is_run_for_ends_it(tmp_path: Path) -> None:
    err = tmp_path / "err"
    for lost, code, said in ((pipe_without_reader, 0, ""), (opened, 2, "Error: standard output cannot be written")):
        for vital in (False, True):
            with lost() as out, opened(str(err)) as told, standard_streams(out, told):
                with pytest.raises(SystemExit) as left, lossy_streams(vital):
                    print("a translation", flush=True) if vital else write_output(b"a translation")
                assert left.value.code == code
            assert err.read_text().startswith(said) and bool(err.read_text()) == bool(said)
            err.unlink()


@pytest.mark.processes
def test_closed_streams_are_not_given_to_files_that_are_opened_next(tmp_path: Path) -> None:
    """As after ``>&-``: descriptor 1 is free, and prints would go into the next file."""
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\n"
        "from moe_train.console import lossy_streams, write_output\n"
        "with lossy_streams():\n"
        f"    stream = open({str(tmp_path / 'file')!r}, 'w')\n"
        "    print('said')\n"
        "    assert stream.fileno() > 2 and sys.stdin is None\n"
        "    write_output(b'x')\n"
    )
    command = f"{sys.executable} {script} <&- >&-"
    code = os.waitstatus_to_exitcode(os.system(command))  # a shell is what closes descriptors
    assert code == 2 and (tmp_path / "file").read_text() == ""


def test_streams_of_tests_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.StringIO()
    monkeypatch.setattr(sys, "stdout", written)
    with lossy_streams():
        assert sys.stdout is written
    assert sys.stdout is written


def test_a_closed_stream_is_named_as_such(tmp_path: Path) -> None:
    stream = ConsoleStream(1, None)
    assert stream.error is not None and stream.error.errno == errno.EBADF


def test_text_from_elsewhere_is_shown_and_colours_are_meant(tmp_path: Path) -> None:
    with opened(str(tmp_path / "out")) as out, standard_streams(out, out), lossy_streams():
        print("a\x1b[2Jb", flush=True)
        try:
            raise ValueError("\x1b]0;owned\x07")
        except ValueError:
            traceback.print_exc()
        Screen(force_terminal=True).print("[bold]strong[/] \x1b[2J", markup=True, highlight=False)
        with Progress(console=Screen(stderr=True, force_terminal=True, width=60)) as bars:
            bars.add_task("working", total=1)
            print("c\x1b[2Jd")
    text = (tmp_path / "out").read_text()
    assert text.startswith("a␛[2Jb\n") and "ValueError: ␛]0;owned␇\n" in text
    assert "\x1b[1mstrong\x1b[0m ␛[2J\n" in text and "working" in text
    assert "\x1b[2J" not in text and "\x1b]0" not in text


def test_data_of_libraries_is_left_alone_but_on_a_terminal(tmp_path: Path) -> None:
    with opened(str(tmp_path / "out")) as out, standard_streams(out, out), lossy_streams(literal=True):
        print("H-0\t\x1b[2J", flush=True)
    assert (tmp_path / "out").read_text() == "H-0\t\x1b[2J\n"
    leader, follower = os.openpty()
    with standard_streams(follower, follower), lossy_streams(literal=True):
        print("H-0 \x1b[2J", flush=True)
        print("\r10%", file=sys.stderr, flush=True)
    assert os.read(leader, 100).decode() == "H-0 ␛[2J\r\n\r10%\r\n"
    os.close(leader)
    os.close(follower)

"""Reads lines in buffers (fewer lines where input is slow), and translates lines at a prompt."""

from __future__ import annotations

import contextlib
import io
import queue
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import IO

from moe_train.data.text.languages import offer_language
from moe_train.data.text.lines import decode_line, split_lines
from moe_train.errors import DataError
from moe_train.safe_text import for_terminal

_PAUSE = 0.05  # seconds without a new line after which an incomplete buffer is translated


def check_languages(source: str, target: str, known: Sequence[str]) -> None:
    """Checks that the model has both languages.

    Raises:
        DataError: names the known languages.
    """
    for key, code in (("source", source), ("target", target)):
        if code not in known:
            near = offer_language(code, known)
            remedy = near if near.startswith("known") else f"{near} Known: {', '.join(known)}"
            raise DataError(f"the model has no language '{code}'", key, remedy)
    if source == target:
        raise DataError(f"source and target are both '{source}'", remedy="choose two languages")


def buffers(stream: IO[bytes], size: int) -> Iterator[list[str]]:
    """Yields lists of 1 to ``size`` lines, fewer than ``size`` where no further line came within 50 ms.

    Lines end only at a line feed, so that the output has as many lines as the input.

    Raises:
        DataError: a line is not UTF-8, or the stream cannot be read.
    """
    lines: queue.Queue[bytes | OSError | None] = queue.Queue(maxsize=2 * size)
    threading.Thread(target=_read, args=(stream, lines), daemon=True).start()
    number, ended = 0, False
    while not ended:
        buffer: list[str] = []
        while len(buffer) < size:
            try:
                line = lines.get(timeout=_PAUSE if buffer else None)
            except queue.Empty:
                break
            if line is None:
                ended = True
                break
            if isinstance(line, OSError):
                what = f"the input cannot be read after line {number} ({line.strerror or line})"
                raise DataError(what, remedy="redirect text to it: moe-translate … < FILE") from line
            number += 1
            buffer.append(decode_line(line, number, "standard input"))
        if buffer:
            yield buffer


def _read(stream: IO[bytes], lines: queue.Queue[bytes | OSError | None]) -> None:
    try:
        for line in split_lines(stream):
            lines.put(line)
        lines.put(None)
    except OSError as error:  # such as for a folder, or a descriptor that is open only for writing
        lines.put(error)


def prompt(translate: Callable[[str], Sequence[str]], source: str, target: str) -> int:
    """Reads lines at a terminal and prints their translations until the end of input. Returns the number of lines.

    ``translate`` returns the lines to print.

    Editing and history use readline where Python has it. A line that cannot be decoded is refused.
    """
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (importing it enables line editing in `input`)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")
    count = 0
    while True:
        try:
            line = _decode_typed(input(f"{source}> "))
        except EOFError:
            print()
            return count
        except UnicodeError:
            print(f"this line is not {sys.stdin.encoding.upper()}: check the terminal's encoding", file=sys.stderr)
            continue
        count += 1
        found = [f"{target}> {for_terminal(own)}" for own in translate(line)] if line.strip() else [""]
        print("\n".join(found), flush=True)


def _decode_typed(line: str) -> str:
    """Decodes a line with bytes that are invalid in standard input's encoding as UTF-8, whatever the locale is.

    Raises:
        UnicodeError: it is not UTF-8.
    """
    if any("\udc80" <= character <= "\udcff" for character in line):
        return line.encode(sys.stdin.encoding, "surrogateescape").decode("utf-8")
    return line

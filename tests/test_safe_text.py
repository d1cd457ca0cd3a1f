"""Text from elsewhere in each place where it is shown."""

from __future__ import annotations

import csv
import io
import logging
import re
from html.parser import HTMLParser

import pytest
from rich.progress import Progress
from rich.table import Table

from moe_train.safe_text import (
    LogFormatter,
    current_traceback,
    for_csv,
    for_html,
    for_markdown,
    for_terminal,
    show_warnings_as_text,
)
from moe_train.screen import Screen

# A title that is set, a screen that is cleared, a line that is overwritten, colours, a bell, C1, turned text.
HOSTILE = "\x1b]0;owned\x07\x1b[2J\r\x1b[1A\x1b[31mred\x9b2K\x7f\x08\x00 \u202egnp.exe\u2066"
CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def test_control_characters_are_shown() -> None:
    assert for_terminal("\x1b[2J") == "␛[2J"
    assert not CONTROLS.search(for_terminal(HOSTILE))
    assert len(for_terminal(HOSTILE)) == len(HOSTILE)
    for harmless in ("two\nlines\tand a tab", "Grüße, 你好, مرحبا, עברית, 🙂", "e\u0301 \u200d \u200f \xa0"):
        assert for_terminal(harmless) == harmless


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("[click](javascript:alert(1))", r"\[click\](javascript:alert(1))"),
        ("<img src=x onerror=alert(1)>", r"\<img src=x onerror=alert(1)\>"),
        ("a|b\nc", r"a\|b c"),
        ("a\\|b", r"a\\\|b"),
        ("`code` *bold* _bold_ snake_case", r"\`code\` \*bold\* \_bold\_ snake_case"),
        ("# heading", r"\# heading"),
        ("- list", r"\- list"),
        ("-", "-"),
        ("+3 -1 /8", "+3 -1 /8"),
        ("&lt;script&gt;", "&amp;lt;script&amp;gt;"),
        ("\x1b[31mred", r"␛\[31mred"),
    ],
)
def test_markdown(text: str, shown: str) -> None:
    assert for_markdown(text) == shown


@pytest.mark.parametrize(
    ("value", "cell"),
    [
        ('=HYPERLINK("http://x","y")', '\'=HYPERLINK("http://x","y")'),
        ("+1+1", "'+1+1"),
        ("-2+3", "'-2+3"),
        ("@SUM(A1)", "'@SUM(A1)"),
        ("\t=1", "'\t=1"),
        ("\r=1", "␍=1"),
        *((f"{sign}1", f"'{sign}1") for sign in "＝＋－＠﹢﹣﹦﹫"),
        *((f"{blank}=1", f"'{blank}=1") for blank in (" ", "\n", "\u00a0", "\u3000 ", "\u200b", "\ufeff")),
        (" a=1", " a=1"),
        ("a=b\x1b[2J", "a=b␛[2J"),
        (-1.5, "-1.5"),
        ("", ""),
    ],
)
def test_csv(value: object, cell: str) -> None:
    stream = io.StringIO()
    csv.writer(stream).writerow([for_csv(value), "next"])
    assert next(csv.reader(io.StringIO(stream.getvalue()))) == [cell, "next"]


def test_html() -> None:
    tags, texts = list[str](), list[str]()
    page = HTMLParser()
    page.handle_starttag = lambda tag, attributes: tags.append(tag)
    page.handle_data = texts.append
    page.feed(f'<p title="{for_html(chr(34) + " onload=x")}">{for_html("</p><script>x</script>" + HOSTILE)}</p>')
    shown = "".join(texts)
    assert tags == ["p"] and shown.startswith("</p><script>") and not CONTROLS.search(shown)


def test_what_a_screen_prints_is_text() -> None:
    """Strings, tables, bars; only what says that it is markup has style."""
    stream = io.StringIO()
    screen = Screen(file=stream, force_terminal=True, width=200)
    table = Table(title=HOSTILE, caption=HOSTILE)
    table.add_column(HOSTILE)
    table.add_row(f"[red]{HOSTILE}[/nonsense] :bug:")
    screen.print(table)
    screen.print(HOSTILE, "[/closed]", soft_wrap=True)
    screen.print("[bold]styled[/]", markup=True, highlight=False)
    with Progress(console=screen) as bars:
        bars.add_task("working", total=1)
        bars.console.print(HOSTILE)
    written = stream.getvalue()
    plain = re.sub(r"\x1b\[[\d;]*m", "", written)
    assert "[/nonsense] :bug:" in plain and "[/closed]" in plain and "\x1b[1mstyled\x1b[0m" in written
    assert "\x1b]0;" not in written and "\x1b[2J" not in written and "\x1b[31mred" not in written
    assert not CONTROLS.search(re.sub(r"\x1b\[(\d+(;\d+)*m|\?25[lh]|2K|1A)|\r", "", written))  # rich's own


def test_log_files() -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(LogFormatter("%(levelname)s %(message)s"))
    logger = logging.Logger("of this test")
    logger.addHandler(handler)
    try:
        raise ValueError(HOSTILE)
    except ValueError:
        logger.exception("a run named %s", HOSTILE)
        assert not CONTROLS.search(current_traceback())
    show_warnings_as_text()
    assert logging.lastResort is not None
    assert logging.lastResort.format(logger.makeRecord("x", 30, "", 1, HOSTILE, (), None)) == for_terminal(HOSTILE)
    assert stream.getvalue().startswith("ERROR a run named ␛]0;owned") and not CONTROLS.search(stream.getvalue())

"""Buffers of lines from fast and slow streams, and language checks."""

from __future__ import annotations

import io
import os
import threading
from pathlib import Path

import pytest

from moe_train.errors import DataError
from moe_train.evaluation.inference.stream import buffers, check_languages, prompt
from moe_train.evaluation.inference.translate_stream import _pipe
from moe_train.screen import Screen


def test_lines_end_at_line_feeds_only() -> None:
    text = "one\ntwo\u2028still two\n\n  \r\nfive\x0cstill five\nlast without end"
    found = [line for buffer in buffers(io.BytesIO(text.encode()), 3) for line in buffer]
    assert found == ["one", "two\u2028still two", "", "  ", "five\x0cstill five", "last without end"]


def test_a_fast_stream_fills_its_buffers() -> None:
    lines = b"".join(b"%d\n" % i for i in range(1000))
    found = list(buffers(io.BytesIO(lines), 128))
    assert [len(b) for b in found] == [128] * 7 + [104]
    assert [line for b in found for line in b] == [str(i) for i in range(1000)]


def test_a_slow_stream_is_answered_before_it_ends() -> None:
    read, write = os.pipe()
    answered = threading.Event()

    def speak() -> None:
        with os.fdopen(write, "wb", buffering=0) as stream:
            stream.write(b"first\n")
            answered.wait(20)
            stream.write(b"second\n")

    threading.Thread(target=speak, daemon=True).start()
    with os.fdopen(read, "rb") as stream:
        found = buffers(stream, 100)
        assert next(found) == ["first"]
        answered.set()
        assert list(found) == [["second"]]


def test_empty_input() -> None:
    assert list(buffers(io.BytesIO(b""), 4)) == []


def test_bytes_that_are_not_utf8_are_named_by_line() -> None:
    with pytest.raises(DataError, match=r"standard input: line 2 is not UTF-8.*iconv"):
        list(buffers(io.BytesIO("gut\nschön\n".encode("latin1")), 4))


def test_input_is_opened_as_every_text_is() -> None:
    assert list(buffers(io.BytesIO(b"\xef\xbb\xbfone\r\ntwo"), 4)) == [["one", "two"]]
    with pytest.raises(DataError, match="standard input: line 2 contains a NUL character"):
        list(buffers(io.BytesIO(b"one\nt\0wo\n"), 4))


def test_a_line_without_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_train.data.text.lines._LONGEST", 1 << 20)
    with pytest.raises(DataError, match="standard input: line 2 is longer than 1 MiB"):
        list(buffers(io.BytesIO(b"one\n" + bytes(3 << 20)), 4))


def test_translations_are_shown_on_terminals_and_left_alone_elsewhere(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def translate(lines: list[str], done: object) -> list[str]:
        return ["\x1b[2J" + line for line in lines]

    leader, follower = os.openpty()
    for shown in (os.fdopen(follower, "w"), (tmp_path / "out").open("w")):
        with shown, monkeypatch.context() as streams:
            streams.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a\n")))
            streams.setattr("sys.stdout", shown)
            _pipe(translate, 10, Screen(quiet=True))
            if shown.isatty():
                assert os.read(leader, 100).decode() == "␛[2Ja\r\n"
    assert (tmp_path / "out").read_bytes() == b"\x1b[2Ja\n"
    os.close(leader)


def test_the_prompt_shows_text(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
    assert prompt(lambda line: ["\x1b]0;owned\x07"], "en", "de") == 1
    assert "de> ␛]0;owned␇\n" in capsys.readouterr().out


def test_a_stream_that_cannot_be_read_is_not_an_empty_one() -> None:
    """Such as a descriptor that is open for writing alone."""
    writing = os.open("/dev/null", os.O_WRONLY)
    with (
        open(writing, "rb") as stream,
        pytest.raises(DataError, match=r"cannot be read after line 0 \(Bad file descriptor\)"),
    ):
        list(buffers(stream, 4))


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_a_prompt_refuses_bytes_that_are_no_text_and_goes_on(
    encoding: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """UTF-8 is read where the locale has only ASCII, too."""
    typed = io.TextIOWrapper(io.BytesIO(b"gut\n" + b"sch\xf6n\n" + "schön\n\n".encode()), encoding)
    monkeypatch.setattr("sys.stdin", typed)
    assert prompt(lambda line: [line.upper()], "de", "en") == 3
    written = capsys.readouterr()
    assert [line for line in written.out.replace("de> ", "").splitlines() if line] == ["en> GUT", "en> SCHÖN"]
    assert written.err == f"this line is not {encoding.upper()}: check the terminal's encoding\n"


def test_languages() -> None:
    check_languages("en", "de", ["de", "en"])
    with pytest.raises(DataError, match=r"target: the model has no language 'xx'. Known: de, en"):
        check_languages("en", "xx", ["de", "en"])
    with pytest.raises(DataError, match=r"source: .*'pt_PT'.*'pt_BR'.*Known: de, en, pt_BR"):
        check_languages("pt_PT", "en", ["de", "en", "pt_BR"])
    with pytest.raises(DataError, match=r"source: the model has no language 'eng_Latn'. Did you mean 'en'\?"):
        check_languages("eng_Latn", "de", ["de", "en"])
    with pytest.raises(DataError, match="both 'de'"):
        check_languages("de", "de", ["de", "en"])

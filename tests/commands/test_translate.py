"""``moe-translate`` as its users meet it: in a pipe, at a terminal, with mistakes."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe_train.commands.translate import main
from moe_train.data.folder import DataFolder
from tests.evaluation.runs import make_run
from tests.streams import Terminal

pytestmark = pytest.mark.warm_start

COMMAND = [sys.executable, "-m", "moe_train.commands.translate"]
SEARCH = ["search.beam=2", "search.max_length_ratio=0.5"]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory, tiny_data: DataFolder) -> Path:
    return make_run(tmp_path_factory.mktemp("run"), tiny_data, directions=("de-en", "en-de"))


def translate(*words: str, typed: bytes = b"", folder: Path | None = None) -> subprocess.CompletedProcess[bytes]:
    command = [*COMMAND, *SEARCH, *words]
    return subprocess.run(command, input=typed, capture_output=True, timeout=280, cwd=folder, check=False)


@pytest.mark.processes
def test_a_pipe_gives_a_line_for_a_line(run_folder: Path, tmp_path: Path) -> None:
    typed = b"Der Arzt mag frisches Brot heute.\n\nDas Kind kauft das neue Buch am Abend.\n \nDer Arzt"
    typed += b" mag frisches Brot heute." * 20
    done = translate(f"run={run_folder}", "source=de", "target=en", typed=typed, folder=tmp_path)
    assert done.returncode == 0, done.stderr.decode()
    lines = done.stdout.decode().split("\n")
    assert len(lines) == 6 and lines[-1] == ""
    assert [bool(line) for line in lines[:5]] == [True, False, True, False, True]
    assert b"translated 3 sentences" in done.stderr
    said = b"note: line 5: cut to the model's 40 tokens, tag and end included; long_lines=split"
    assert said in done.stderr
    assert list(tmp_path.iterdir()) == [], "Hydra's folders do not belong into the user's"


def test_lengths_can_be_fixed_and_need_no_ratio(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """fairseq-generate's own default is a ratio of 0."""
    said = []
    for pieces in (1, 12):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Das Kind mag frisches Brot heute.\n")))
        lengths = [f"search.max_length_offset={pieces}", f"search.min_length={pieces}", "search.max_length_ratio=0"]
        words = [f"run={run_folder}", "source=de", "target=en", "search.unk_penalty=100", "search.beam=2", *lengths]
        monkeypatch.setattr(sys, "argv", ["moe-translate", *words])
        main()
        said.append(capsys.readouterr().out.strip())
    assert len(said[0].split()) <= 1 < len(said[1])
    monkeypatch.setattr(sys, "argv", ["moe-translate", *words, "search.min_length=13"])
    with pytest.raises(SystemExit):
        main()
    assert "search.max_length_offset=12 leave less than 13 tokens" in capsys.readouterr().err


@pytest.fixture
def piped(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., list[str]]:
    """Translates in this process, and returns the lines of standard output."""

    def run(typed: str, *words: str) -> list[str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(typed.encode())))
        monkeypatch.setattr(sys, "argv", ["moe-translate", f"run={run_folder}", "source=de", "target=en", *words])
        main()
        return capsys.readouterr().out.split("\n")[:-1]

    return run


def test_hypotheses_scores_and_tokens_can_be_written(piped: Callable[..., list[str]]) -> None:
    typed = "Der Arzt mag frisches Brot heute.\n\nDas Kind kauft das neue Buch am Abend.\n"
    keys = ["search.beam=3", "search.max_length_ratio=0.5", "buffer=2"]
    best, three = piped(typed, *keys), piped(typed, *keys, "search.n_best=3")
    assert three[::3] == best and three[3:6] == ["", "", ""] and len(three) == 9 and three[1] != three[0] != ""
    rows = [line.split("\t") for line in piped(typed, *keys, "search.n_best=3", "output=tsv")]
    assert [line + rank for line, rank, _, _ in rows] == ["11", "12", "13", "21", "31", "32", "33"]
    assert [text for *_, text in rows] == [*three[:3], "", *three[6:]]
    objects = [json.loads(line) for line in piped(typed, *keys, "search.n_best=3", "output=json", "token_scores=true")]
    assert [(found["line"], found["cut"], len(found["translations"])) for found in objects] == [
        (1, False, 3),
        (2, False, 0),
        (3, False, 3),
    ]
    for found, score in zip(objects[0]["translations"], [row[2] for row in rows], strict=False):
        assert found["score"] == pytest.approx(float(score), abs=1e-5)
        assert found["score"] == pytest.approx(sum(found["token_scores"]) / found["tokens"], abs=1e-5)
        assert len(found["pieces"]) == found["tokens"] and found["pieces"][-1] == "</s>"
    plain = json.loads(piped(typed, *keys, "output=json")[0])
    assert plain == {"line": 1, "cut": False, "translations": [{"text": best[0], **_numbers(objects[0])}]}


def _numbers(found: dict[str, Any]) -> dict[str, Any]:
    first = found["translations"][0]
    return {"score": pytest.approx(first["score"], abs=1e-5), "tokens": first["tokens"]}


def test_target_prefixes_stand_behind_a_tab(
    piped: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    typed = "Das Kind mag Brot.\tThe doctor\nDas Kind mag Brot.\n" + "Das Kind mag Brot. " * 8 + "\tA bird\n"
    lines = piped(typed, "prefixes=true", "long_lines=split", "search.beam=2", "search.max_length_ratio=0.5")
    assert lines[0].startswith("The doctor") and lines[2].startswith("A bird")
    assert lines[1] == piped("Das Kind mag Brot.\n", "search.beam=2", "search.max_length_ratio=0.5")[0]
    with pytest.raises(SystemExit):
        piped(typed, "token_scores=true")
    assert "token_scores=true needs output=json" in capsys.readouterr().err


def test_samples_do_not_depend_on_buffers(piped: Callable[..., list[str]]) -> None:
    typed = "".join(f"Der Arzt mag {noun}.\n" for noun in ("Brot", "das Buch", "den Apfel"))
    keys = ["search.sampling=true", "search.top_k=20", "search.beam=2", "search.n_best=2"]
    found = piped(typed, *keys)
    assert piped(typed, *keys, "buffer=1", "search.batch_tokens=1") == found != piped(typed, *keys, "search.seed=2")


def test_mistakes_are_one_message(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["moe-translate", f"run={run_folder}", "source=de", "target=ru"])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 2
    written = capsys.readouterr()
    assert "no language 'ru'. Known: de, en, fr, ja" in written.err and not written.out


@pytest.mark.processes
def test_a_prompt_at_a_terminal(run_folder: Path) -> None:
    """A direction that was not trained, too: said, and translated all the same. Bytes that are no text are refused."""
    words = [f"run={run_folder}", "source=de", "target=fr"]
    terminal = Terminal(lambda: os.execv(COMMAND[0], [*COMMAND, *SEARCH, *words]))
    seen = terminal.read_until(b"de> ")
    assert b"zero-shot" in seen and b"Ctrl-D" in seen
    terminal.type(b"Das \xff Kind.\n")
    assert b"this line is not UTF-8" in terminal.read_until(b"de> ").split(b"\r\n")[1]
    terminal.type(b"Das Kind mag frisches Brot heute.\n")
    assert b"fr> " in terminal.read_until(b"de> ")
    assert terminal.interrupt() == 130 and b"Interrupted." in terminal.seen and b"Traceback" not in terminal.seen

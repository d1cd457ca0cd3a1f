"""What scores are of stands beside them, and sets that are unlike are said not to compare."""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from moe_train.analysis.report.build_report import make_report
from moe_train.analysis.report.load_runs import read_runs
from moe_train.analysis.report.sentence_sets import differing_sets
from moe_train.config.evaluation import ReportConfig
from moe_train.errors import ConfigError
from tests.analysis.report_folders import scored, trained
from tests.read_only import read_only, snapshot

TWO = ("en-de", "de-en")


def report(folder: Path, out: Path, part: str = "") -> str:
    screen = io.StringIO()
    config = ReportConfig((str(folder),), out=str(out), samples=50, html=False, part=part)
    make_report(config, Console(file=screen, width=80))
    return screen.getvalue()


def test_scores_of_few_lines_stand_out(tmp_path: Path) -> None:
    """As earlier versions left them: 5 lines of each direction in test.json, beside another run's whole split."""
    scored(trained(tmp_path / "runs" / "few"), 0.9, 1, TWO, count=5, max_sentences=5)
    scored(trained(tmp_path / "runs" / "whole", "dense"), 0.6, 2, TWO, count=20, max_sentences=0)
    text = report(tmp_path / "runs", tmp_path)
    flat = " ".join(text.split())
    assert "few test, first 5 step_3 2 10 13a" in flat and "whole test step_3 2 40 13a" in flat
    assert max(map(len, text.partition("against baseline (")[0].splitlines())) <= 80
    assert "few: scored on the first 5 lines of each direction, not on the whole split" in flat
    assert "different numbers of lines: in de-en 5 (few), 20 (whole) (and in 1 more directions)" in flat
    assert "other texts in de-en and 1 more" in flat and not re.search(r"\+\d", flat), "and nothing was tested"
    markdown = (tmp_path / "leaderboard.md").read_text()
    assert "| few | test, first 5 | step_3 | 2 | 10 | 13a |" in markdown and "different numbers of lines" in markdown
    rows = {row["run"]: row for row in csv.DictReader(io.StringIO((tmp_path / "leaderboard.csv").read_text()))}
    assert (rows["few"]["scored_on"], rows["few"]["lines"]) == ("test, first 5", "10")
    assert rows["whole"]["scored_on"] == "test" and rows["few"]["all_better"] == ""


def test_a_part_of_the_split_can_be_reported(tmp_path: Path) -> None:
    for name, quality in (("a", 0.2), ("b", 0.9)):
        run = trained(tmp_path / "runs" / name)
        scored(run, quality, len(name), TWO, count=30, part="first-30", max_sentences=30)
    scored(tmp_path / "runs" / "a", 0.2, 1, TWO, count=60)
    flat = " ".join(report(tmp_path / "runs", tmp_path, "first-30").split())
    assert "a test, first 30 step_3 2 60 13a" in flat and "+2 -0 /2" in flat and "not compare" not in flat
    flat = " ".join(report(tmp_path / "runs", tmp_path).split())
    assert "a test step_3 2 120 13a" in flat
    assert "b: no scores in test.json; there are test.first-30.json (part=…)" in flat


def test_outputs_that_are_not_those_that_were_scored_are_not_compared(tmp_path: Path) -> None:
    for name in "ab":
        scored(trained(tmp_path / "runs" / name), 0.6, ord(name), ("en-de",), count=20)
    for end in ("de", "de.reference"):
        file = tmp_path / "runs" / "b" / "hypotheses" / f"test.en-de.{end}"
        file.write_text("".join(f"{line}\n" for line in file.read_text().splitlines()[:5]))
    assert "b: " in (text := report(tmp_path / "runs", tmp_path)) and "it has 5 lines, and 20 were scored" in text


def test_what_else_is_unlike_is_said(tmp_path: Path) -> None:
    known = {"fingerprint": "f1", "vocabulary": {"spm.model": "1", "dict.txt": "2"}}
    for name, more in {
        "a": known,
        "b": known,
        "data": {**known, "fingerprint": "f2"},
        "few": {**known, "validated": 20},
        "pieces": {**known, "vocabulary": {"spm.model": "3", "dict.txt": "2"}},
        "old": {"fingerprint": "f1"},  # of a version that noted no vocabulary
    }.items():
        scored(trained(tmp_path / name, **more), 0.6, 1, ("en-de",), count=5)  # type: ignore[arg-type]
    other = tmp_path / "few" / "test.json"
    other.write_text(other.read_text().replace('"tokenizer": "13a"', '"tokenizer": "char"'))
    notes = differing_sets(read_runs([tmp_path]))
    assert notes == [
        "runs were scored with different BLEU tokenizers: in en-de 13a (a and 4 more), char (few). "
        "Their scores cannot be compared",
        *(note for note in notes if "signatures of sacrebleu: in en-de" in note),
        "valid nll is of sets with different data folder, (a and 4 more), (data): it cannot be compared",
        "valid nll is of sets with different vocabulary, (a and 3 more), (pieces): it cannot be compared",
        "valid nll is of sets with different training.validation.max_sentences, 0 (a and 4 more), 20 (few): "
        "it cannot be compared",
    ]
    assert differing_sets(read_runs([tmp_path / "a", tmp_path / "b", tmp_path / "old"])) == []


def test_runs_that_cannot_be_written_are_reported_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = scored(trained(tmp_path / "runs" / "a"), 0.6, 1, ("en-de",), count=5)
    scored(trained(tmp_path / "runs" / "b"), 0.6, 2, ("en-de",), count=5)
    monkeypatch.chdir(tmp_path)
    before = snapshot(run)

    def said(**keys: object) -> str:
        screen = io.StringIO()
        make_report(ReportConfig(samples=0, **keys), Console(file=screen, width=80))  # type: ignore[arg-type]
        return " ".join(screen.getvalue().split())

    with read_only(run):
        text = said(runs=(str(tmp_path / "runs"),), out=str(tmp_path / "out"))
        assert f"written: {tmp_path / 'out' / 'report.html'}" in text and (tmp_path / "out" / "report.html").is_file()
        text = said(runs=(str(run),))
        assert f"{run} cannot be written (Read-only file system): the leaderboard is in {tmp_path / 'report'}" in text
        assert (tmp_path / "report" / "leaderboard.csv").is_file() and (tmp_path / "report" / "report.html").is_file()
        with pytest.raises(
            ConfigError, match=r"cannot be written \(Read-only file system\)\. Set another folder: out="
        ):
            said(runs=(str(run),), out=str(run / "out"))
    assert snapshot(run) == before

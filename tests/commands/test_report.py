"""``moe-report`` as a command."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from moe_train.commands.report import main
from moe_train.commands.train import main as train
from moe_train.data.folder import DataFolder
from tests.analysis.report_folders import scored, trained


def test_a_folder_of_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name, quality in (("a", 0.6), ("b", 0.8)):
        scored(trained(tmp_path / "runs" / name), quality, seed=len(name), directions=("en-de", "de-en"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["moe-report", "runs=[runs]", "baseline=a", "samples=50"])
    main()
    written = capsys.readouterr().out
    assert "against baseline (a)" in written and "+2 -0 /2" in written
    assert (tmp_path / "runs" / "leaderboard.md").is_file() and (tmp_path / "runs" / "report.html").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


def test_a_training_that_failed_says_why_and_a_start_that_failed_is_no_run(
    tiny_data: DataFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a sweep, whose jobs are awaited, both are listed."""
    words = [f"data={tiny_data.path}", "task.directions=[en-xx]"]
    monkeypatch.setattr("hydra._internal.utils.is_under_debugger", lambda: False)
    for more in (["-m", f"hydra.sweep.dir={tmp_path / 'runs'}"], [f"hydra.run.dir={tmp_path / 'runs' / 'run'}"]):
        monkeypatch.setattr(sys, "argv", ["moe-train", *more, *words])
        with pytest.raises(SystemExit):
            train()
    monkeypatch.setattr(sys, "argv", ["moe-report", f"runs=[{tmp_path / 'runs'}]"])
    main()
    written = capsys.readouterr().out
    assert written.count(" failed at update 0: ") == 1 and "no direction 'en-xx'" in written
    assert "0 failed at update 0: " in written  # job 0 of the sweep


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["runs=outputs/quickstart"], "write 'runs=[outputs/quickstart]'"),
        (["runs=[nowhere]"], "there is no run here"),
        (["runs=[.]", "sampels=3"], "did you mean 'samples'"),
        ([], "the key 'runs' has no value"),
    ],
)
def test_mistakes_are_one_message(
    words: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["moe-report", *words])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 2
    assert message.lower() in capsys.readouterr().err.lower()

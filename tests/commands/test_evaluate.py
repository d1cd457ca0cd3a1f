"""``moe-evaluate`` as a command: table on the screen, files in the run folder, mistakes as one message."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from moe_train.commands.evaluate import main
from moe_train.data.folder import DataFolder
from tests.evaluation.runs import make_run

COMMAND = [sys.executable, "-m", "moe_train.commands.evaluate", "search.max_length_ratio=0.5", "search.beam=2"]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory, tiny_data: DataFolder) -> Path:
    return make_run(tmp_path_factory.mktemp("run"), tiny_data)


def evaluate(*words: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *words], capture_output=True, text=True, timeout=280, check=False, cwd=folder)


@pytest.mark.processes
def test_the_table_and_the_files(run_folder: Path, tmp_path: Path) -> None:
    done = evaluate(f"run={run_folder}", "directions=[en-de,ja-en]", "max_sentences=10", "examples=3", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n  reference    ") == done.stdout.count("\n  translation  ") == 3
    for word in ("en-de", "ja-en", "average (2)", "chrF++", "shuffled", "copy", "tok:13a"):
        assert word in done.stdout
    assert "20/20 sentences" in done.stderr
    scores = run_folder / "test.only-en-de,ja-en.first-10.json"
    assert f"written: {scores}" in done.stderr
    content = json.loads(scores.read_text())
    assert set(content["directions"]) == {"en-de", "ja-en"}
    assert content["settings"]["search"]["beam"] == 2
    assert (run_folder / "hypotheses" / "only-en-de,ja-en.first-10" / "test.en-de.de").read_text().count("\n") == 10
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow  # half a minute: two ranks under torchrun
def test_a_layout_that_cannot_be_is_said_once_under_torchrun(run_folder: Path, tmp_path: Path) -> None:
    """By one rank, before they meet: the others may not end it before it has come to a word."""
    ranks = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *COMMAND[1:]]
    words = [*ranks, f"run={run_folder}", "expert_parallel=3"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=280, check=False, cwd=tmp_path)
    assert done.returncode == 1 and done.stderr.count("Error: expert_parallel=3 is above the 2 ranks") == 1, done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("run={run}", "directions=[en-xx]"), "has no direction 'en-xx'"),
        (("run={run}", "checkpoint=77"), "there is no checkpoint '77'"),
        (("run={run}/checkpoints",), "this is no run folder"),
        (("run={run}", "sprit=valid"), "unknown key 'sprit'"),
        (
            ("run={run}", "routing.num_experts=8"),
            "'routing.num_experts' cannot change after training with routing=switch. "
            "These can: routing.evaluation_capacity_factor.",
        ),
        (("run={run}", "routing.evaluation_capacity_factor=-1"), "'routing.evaluation_capacity_factor' must be above"),
        (("run={run}", "draw_seed=2"), "'draw_seed=2' would change nothing: with routing=switch no expert is drawn"),
        (("run={run}", "launch.processes=3", "expert_parallel=3"), "4 experts cannot be divided over expert_parallel"),
        (("run={run}", "expert_parallel=2"), "above the 1 rank. Set expert_parallel to 1, or start 2 processes"),
        (("run={run}", "draw_seed=-1"), "'draw_seed' must not be negative"),
        (("run={run}", "max_sentences=-1"), "'max_sentences' must not be negative"),
        (("run={run}", "search.length_penalty=nan"), "'search.length_penalty' must be a finite number, not nan"),
        ((), "the key 'run' has no value"),
    ],
)
def test_mistakes_are_one_message(
    run_folder: Path,
    words: tuple[str, ...],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["moe-evaluate", *(word.format(run=run_folder) for word in words)])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 2
    assert message in capsys.readouterr().err

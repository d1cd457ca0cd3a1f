"""Runs, exports and data folders that commit 1d87158 wrote still resume, evaluate, translate, export and report.

``old_runs`` holds, all from that commit: ``data``, a folder of moe-prepare; ``finished``, a run of 160 updates that was
scored on test; ``unfinished``, the same run killed after update 120, with a checkpoint of update 80; ``export`` of the
finished one.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from moe_train.commands import evaluate, export, report, train, translate
from moe_train.config import SearchConfig
from moe_train.evaluation.scoring.results import read_results
from moe_train.kernels.cpu import compile

OLD = Path(__file__).parent / "old_runs"
WORDS = [
    *("routing=switch", "routing.num_experts=4", "model.embed_dim=16", "model.ffn_dim=32", "model.num_heads=2"),
    *("model.max_positions=40", "training.max_updates=160", "training.tokens_per_update=1024", "training.threads=1"),
    *("training.schedule.warmup_updates=20", "training.optimizer.lr=0.02", "training.checkpoint.every_updates=80"),
    *("training.checkpoint.keep=1", "training.validation.every_updates=80", "training.log_every=40"),
]
SHARD = "checkpoints/step_160/shard-00001-model-00001-of-00001.safetensors"
PROCESSOR = {"vendor_id": "GenuineIntel", "cpu family": "6", "model": "167"}  # that the runs were made on


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A copy that may be written to."""
    shutil.copytree(OLD, tmp_path / "old", symlinks=True)
    return tmp_path / "old"


def call(monkeypatch: pytest.MonkeyPatch, command: SimpleNamespace, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", [command.__name__.rpartition(".")[2], *words])
    command.main()


def same_processor() -> bool:
    """Whether sums are made in the same order as where the runs were made: kernels are chosen by processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return False
    pairs = [line.partition(":")[::2] for line in lines]
    found = {key.strip(): value.strip() for key, value in pairs}
    return PROCESSOR.items() <= found.items()


@pytest.fixture
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch's operators, as at that commit: the C kernels of today round differently."""
    monkeypatch.setenv(compile.SWITCH, "off")
    compile.library.cache_clear()
    yield
    compile.library.cache_clear()


@pytest.mark.usefixtures("without_kernels")
def test_an_unfinished_run_resumes_to_the_same_bits(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = torch.get_num_threads()
    try:
        call(monkeypatch, train, f"data={old / 'data'}", *WORDS, f"hydra.run.dir={old / 'unfinished'}")
    finally:
        torch.set_num_threads(threads)
    resumed, unbroken = load_file(old / "unfinished" / SHARD), load_file(OLD / "finished" / SHARD)
    assert resumed.keys() == unbroken.keys()
    for name, tensor in unbroken.items():
        if same_processor():
            assert torch.equal(resumed[name], tensor), name
        else:
            torch.testing.assert_close(resumed[name], tensor, rtol=1e-2, atol=1e-3)
    info = json.loads((old / "unfinished" / "run.json").read_text())
    assert info["status"] == "finished" and [session["from_update"] for session in info["sessions"]] == [0, 80]
    logs = [(run / "train.jsonl").read_text().splitlines() for run in (old / "unfinished", OLD / "finished")]
    updates = [[json.loads(line)["update"] for line in log] for log in logs]
    assert updates[0] == updates[1] == [40, 80, 120, 160]


def test_a_finished_run_evaluates_to_the_same_scores(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = old / "finished"
    (run / "test.json").unlink()
    call(monkeypatch, evaluate, f"run={run}", f"data={old / 'data'}", "split=test")
    before, after = (json.loads((folder / "finished" / "test.json").read_text()) for folder in (OLD, old))
    assert after["directions"] == before["directions"] and after["average"] == before["average"]
    assert after["baselines"] == before["baselines"] and after["signatures"] == before["signatures"]


def test_a_finished_run_has_nothing_to_do_and_can_be_extended(
    old: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"data={old / 'data'}", *WORDS, f"hydra.run.dir={old / 'finished'}"]
    call(monkeypatch, train, *words, "resume=missing")
    assert "nothing to do, the run is finished" in capsys.readouterr().out
    call(monkeypatch, train, *words, "training.max_updates=162")
    assert json.loads((old / "finished" / "run.json").read_text())["update"] == 162


@pytest.mark.parametrize("run", ["export", "finished"])
def test_translations_are_the_same(
    run: str, old: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sources = (OLD / "finished" / "hypotheses" / "test.en-de.en").read_bytes()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(sources), encoding="utf-8"))
    data = [] if run == "export" else [f"data={old / 'data'}"]
    call(monkeypatch, translate, f"run={old / run}", *data, "source=en", "target=de")
    expected = (OLD / "finished" / "hypotheses" / "test.en-de.de").read_text(encoding="utf-8")
    assert capsys.readouterr().out == expected


def test_scores_of_earlier_versions_are_known_again() -> None:
    """Their settings name fewer keys of the search."""
    earlier = read_results(OLD / "finished" / "test.json")
    assert earlier is not None and "min_length" not in earlier.settings["search"]
    now = dataclasses.replace(earlier, settings={**earlier.settings, "search": dataclasses.asdict(SearchConfig())})
    other = {**now.settings, "search": dataclasses.asdict(SearchConfig(min_length=2))}
    assert now.replaces(earlier) and not dataclasses.replace(now, settings=other).replaces(earlier)


def test_a_finished_run_exports_to_the_same_tensors(old: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    call(monkeypatch, export, f"run={old / 'finished'}", f"data={old / 'data'}", f"out={tmp_path / 'export'}")
    before, after = (load_file(folder / "model.safetensors") for folder in (OLD / "export", tmp_path / "export"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_old_runs_stand_in_a_report(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(old)
    call(monkeypatch, report, "runs=[finished,unfinished]", "html=false", "samples=20")
    with (old / "leaderboard.csv").open(encoding="utf-8", newline="") as stream:
        rows = {row["run"]: row for row in csv.DictReader(stream)}
    scores = json.loads((OLD / "finished" / "test.json").read_text())["average"]
    assert float(rows["finished"]["all_bleu"]) == pytest.approx(scores["bleu"], abs=1e-3)
    assert float(rows["finished"]["all_chrf"]) == pytest.approx(scores["chrf"], abs=1e-3)
    assert "unfinished" in rows and not rows["unfinished"]["all_bleu"]

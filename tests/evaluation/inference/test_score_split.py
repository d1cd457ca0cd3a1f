"""``moe-evaluate mode=score``: log-probabilities of references and hypotheses, by sentence and token."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import moe_train
from moe_train.commands.evaluate import main
from moe_train.config import LaunchConfig
from moe_train.config.evaluation import EvaluateConfig
from moe_train.data.folder import DataFolder
from moe_train.errors import ConfigError, DataError
from moe_train.evaluation.inference.score_split import score_split
from moe_train.evaluation.loading import load_run
from tests.evaluation.jobs import SEARCH
from tests.evaluation.runs import make_run

pytestmark = pytest.mark.warm_start

DIRECTIONS = ("de-en", "en-fr")
ONE = LaunchConfig(device="cpu")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_data: DataFolder) -> Path:
    return make_run(tmp_path_factory.mktemp("run"), tiny_data, directions=(*DIRECTIONS, "en-de"))


def config(run: Path, **changes: Any) -> EvaluateConfig:
    base = EvaluateConfig(str(run), mode="score", search=SEARCH, directions=DIRECTIONS, max_sentences=7, launch=ONE)
    return dataclasses.replace(base, **changes)


def rows(folder: Path, part: str = "only-de-en,en-fr.first-7") -> dict[str, list[dict[str, Any]]]:
    paths = {name: folder / "scored" / "hypotheses" / part / f"test.{name}.{name[-2:]}.jsonl" for name in DIRECTIONS}
    return {name: [json.loads(line) for line in path.read_text().splitlines()] for name, path in paths.items()}


def test_references_have_the_scores_of_the_python_interface_and_of_validation(run: Path, tmp_path: Path) -> None:
    content = score_split(config(run, out=str(tmp_path)))
    assert json.loads((tmp_path / "scored" / "test.only-de-en,en-fr.first-7.json").read_text()) == content
    model = moe_train.load(run, device="cpu")
    for name, found in rows(tmp_path).items():
        sources, references = (lines[:7] for lines in model.run.data.raw("test", name))
        wanted = model.score(list(zip(sources, references, strict=True)), *name.split("-"))
        assert [row["line"] for row in found] == list(range(1, 8)) and [row["text"] for row in found] == references
        assert [tuple(row["pieces"]) for row in found] == [one.pieces for one in wanted]
        for row, one in zip(found, wanted, strict=True):
            assert row["token_scores"] == pytest.approx(one.token_scores, abs=2e-5)
            assert row["score"] == pytest.approx(sum(row["token_scores"]), abs=1e-4)
        sums = content["directions"][name]
        assert sums["sentences"] == 7 and sums["tokens"] == sum(row["tokens"] for row in found)
        assert sums["score"] == pytest.approx(sum(row["score"] for row in found), abs=1e-3)
        assert sums["perplexity"] == pytest.approx(math.exp(-sums["score"] / sums["tokens"]), rel=1e-3)
        assert sums["score_per_token"] == pytest.approx(-validation_loss(run, name), abs=1e-4)


def validation_loss(run: Path, direction: str) -> float:
    """nll per token of the criterion, on the same sentences from the binarised files."""
    loaded = load_run(run)
    criterion, nll, tokens = loaded.task.build_criterion().eval(), 0.0, 0
    for indices in loaded.task.evaluation_sets("test", 7)[direction]:
        with torch.no_grad():
            _, _, logged = criterion(loaded.model, loaded.task.evaluation_sample("test", direction, indices))
        nll, tokens = nll + float(logged["nll_loss"]), tokens + int(logged["ntokens"])
    return nll / tokens


@pytest.mark.processes
@pytest.mark.parametrize("expert_parallel", [1, 2])
def test_any_number_of_processes_gives_the_same(run: Path, expert_parallel: int, tmp_path: Path) -> None:
    one = score_split(config(run, out=str(tmp_path / "one")))
    launch = LaunchConfig(processes=2, device="cpu")
    two = score_split(config(run, out=str(tmp_path / "two"), launch=launch, expert_parallel=expert_parallel))
    assert two["average"] == pytest.approx(one["average"], rel=1e-4)
    for name, found in rows(tmp_path / "two").items():
        for row, wanted in zip(found, rows(tmp_path / "one")[name], strict=True):
            assert row["pieces"] == wanted["pieces"] and row["score"] == pytest.approx(wanted["score"], abs=1e-4)


def test_hypotheses_of_a_folder_and_what_was_there_before(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = tmp_path / "given"
    given.mkdir()
    for name in DIRECTIONS:
        lines = [f"{name} line {number}" if number else "" for number in range(20)]
        (given / f"test.{name}.{name[-2:]}").write_text("".join(f"{line}\n" for line in lines))
    out = tmp_path / "out"
    first = score_split(config(run, out=str(out)))
    assert score_split(config(run, out=str(out)))["notes"] == first["notes"] == []
    words = [
        f"run={run}",
        "mode=score",
        f"hypotheses={given}",
        "max_sentences=7",
        f"out={out}",
        "search.batch_tokens=50",
    ]
    monkeypatch.setattr(sys, "argv", ["moe-evaluate", *words, "directions=[de-en,en-fr]", "launch.device=cpu"])
    main()
    printed = capsys.readouterr().out
    assert "hypotheses of test" in printed and "kept in test.only-de-en,en-fr.first-7.replaced-1.json" in printed
    assert [row["text"] for row in rows(out)["de-en"]] == ["", *(f"de-en line {number}" for number in range(1, 7))]
    assert rows(out)["de-en"][0]["pieces"] == ["</s>"]
    assert rows(out, "only-de-en,en-fr.first-7.replaced-1")["de-en"][0]["text"] != ""
    assert sorted(path.name for path in out.iterdir()) == [".evaluate.lock", "scored"]
    (given / "test.en-fr.fr").write_text("one\n")
    with pytest.raises(DataError, match="1 hypotheses for 7 sentences"):
        score_split(config(run, hypotheses=str(given), out=str(out)))
    with pytest.raises(DataError, match="no hypotheses of that direction"):
        score_split(config(run, hypotheses=str(tmp_path), out=str(out)))


def test_keys_that_do_not_fit(run: Path) -> None:
    with pytest.raises(ConfigError, match="mode=score only"):
        EvaluateConfig(str(run), hypotheses="there")
    with pytest.raises(ConfigError, match="metrics need translations"):
        config(run, metrics=("x",))

"""The study's rule of decisions, and its runs: found again by their key, measured once."""

from __future__ import annotations

import argparse
import importlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_train.data.folder import DataFolder


@pytest.fixture
def load(root: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(root / "scripts" / "reproduce"))
    return importlib.import_module


def test_decisions_follow_the_rule(load: Any) -> None:
    decide = load("decision_rule").decide
    assert decide([1.0, 1.2, 0.9], 0.2, claims=8).outcome == "above"
    assert decide([-1.0, -1.2, -0.9], 0.2, claims=8).outcome == "below"
    assert decide([0.1, 0.0, -0.05], 0.1, claims=8).outcome == "equal within ±0.5"
    assert decide([0.2, 0.21, 0.19], 0.02, claims=8).outcome == "equal within ±0.5"  # above 0, but by less than matters
    unsure = decide([0.9, 1.4, 0.1], 0.2, claims=1)
    assert unsure.outcome == "undecided" and unsure.remedy == "6 seeds would decide"
    assert unsure.text() == "+0.80 BLEU [-0.50, +2.10], 3 seeds"
    assert "more test sentences" in decide([0.5, 0.4, 0.6], 5.0, claims=8).remedy
    assert decide([3.0], 0.2, claims=8).outcome == "one seed"


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    effects=st.lists(st.floats(-3, 3), min_size=2, max_size=6),
    error=st.floats(0.001, 2),
    claims=st.integers(1, 20),
)
def test_more_claims_widen_the_interval_and_swapping_the_models_mirrors_it(
    load: Any, effects: list[float], error: float, claims: int
) -> None:
    decision = load("decision_rule")
    one, more = (decision.decide(effects, error, number) for number in (claims, claims + 1))
    assert more.high - more.low >= one.high - one.low > 0
    mirrored = decision.decide([-effect for effect in effects], error, claims)
    assert (mirrored.low, mirrored.high) == pytest.approx((-one.high, -one.low))
    swapped = {"above": "below", "below": "above"}
    assert mirrored.outcome == swapped.get(one.outcome, one.outcome)


def test_the_sentences_error_is_that_of_a_paired_bootstrap(load: Any) -> None:
    """Equal models have none; the counts give sacrebleu's own score."""
    decision = load("decision_rule")
    references = [f"the {n} cats sat on the mat near door {n % 7} today" for n in range(60)]
    good = [line.replace("near", "by") if n % 3 else line for n, line in enumerate(references)]
    bad = [line.replace("sat on", "lay in") for line in references]
    one, other = (decision.line_counts(lines, references, "13a") for lines in (good, bad))
    expected = decision.BLEU(tokenize="13a").corpus_score(good, [references]).score
    assert decision.mean_bleu([one]) == pytest.approx(expected)
    assert decision.sentence_error([[one]], [[one]], samples=20) == 0
    error = decision.sentence_error([[one, one]], [[other, other]], samples=50)
    assert 0 < error < 5
    found = load("translation").compared([[one]] * 3, [[other]] * 3, claims=8)
    assert found.outcome == "above" and found.effect == pytest.approx(expected - decision.mean_bleu([other]))


def test_the_balance_weight_is_that_of_the_lowest_held_out_loss(load: Any, tmp_path: Path) -> None:
    translation, path = load("translation"), tmp_path / "balance.json"
    weights = translation.BALANCE_WEIGHTS
    runs = {
        f"{name}_{weight}-s1": {"variant": f"{name}_{weight}", "key": {}, "measures": {"loss": loss}}
        for name in ("switch", "top_2", "smoe", "sam_2", "xmoe")
        for weight, loss in zip(weights, (3.0, 2.9 + (name == "smoe"), 3.1), strict=True)
    }
    for run in runs.values():
        run["key"] = {"code": "x"}
    path.write_text(json.dumps({"runs": runs}))
    chosen = translation.chosen_weights(path)
    assert chosen["switch"] == (f"routing.balance_weight={weights[1]}",)
    assert chosen["smoe"] == (f"routing.balance_weight={weights[0]}",)
    del runs["xmoe_0.1-s1"]
    path.write_text(json.dumps({"runs": runs}))
    with pytest.raises(SystemExit, match="run --stage a first"):
        translation.chosen_weights(path)


@pytest.mark.processes
def test_a_run_that_the_results_hold_is_not_trained_again(
    load: Any, tiny_data: DataFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a fresh clone there are results and no run folders; another data folder or setting is another run."""
    translation = load("translation")
    words = [
        *("translation.py", "--data", str(tiny_data.path), "--budget", "small", "--languages", "de,fr", "--seeds", "1"),
        *("--updates", "4", "--threads", "1", "--only", "dense,switch", "--max-sentences", "6"),
        *("--runs", str(tmp_path / "runs"), "--results", str(tmp_path / "results"), "--"),
        *("model.embed_dim=16", "model.ffn_dim=32", "model.num_heads=2", "training.log_every=2", "search.beam=1"),
    ]
    monkeypatch.setattr(sys, "argv", words)
    translation.main()
    path = tmp_path / "results" / "translation.json"
    content = json.loads(path.read_text())
    assert set(content["runs"]) == {"dense-s1", "switch-s1"}
    first = next(claim for claim in content["claims"] if claim["says"].startswith("Switch above dense"))
    assert first["agrees"] == "one seed" and first["decision"]["by_sentences"] >= 0
    run = content["runs"]["switch-s1"]
    curve = run["details"]["curve"]
    assert [point["tokens"] for point in curve] == sorted({point["tokens"] for point in curve})
    assert curve[-1]["flops"] == pytest.approx(3 * run["flops_per_token"] * curve[-1]["tokens"], rel=1e-4)
    with np.load(tmp_path / "results" / "translation" / "switch-s1.npz") as counts:
        assert set(counts) == {"de-en", "fr-en"} and counts["de-en"].shape == (6, 10)

    shutil.rmtree(tmp_path / "runs")
    translation.main()
    assert not list((tmp_path / "runs").rglob("run.json"))
    assert json.loads(path.read_text())["runs"] == content["runs"]

    study = load("study").Study("translation", "", (), (), argparse.Namespace(results=str(path.parent), more=[]), "x")
    key = study.key(["seed=1", "data=/here", "training.threads=2"])
    assert key == study.key(["data=/there", "seed=1"]) and key != study.key(["seed=2"])
    assert not study.found("switch-s1", key) and study.found("switch-s1", content["runs"]["switch-s1"]["key"])


@pytest.mark.processes
def test_a_call_on_a_gpu_ends_in_time_and_the_next_one_goes_on(
    load: Any, tiny_data: DataFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    on_gpu = load("on_gpu")

    def called(minutes: str) -> str:
        words = [
            *("on_gpu.py", "--data", str(tiny_data.path), "--budget", "small", "--updates", "2", "--threads", "1"),
            *("--only", "dense", "--max-sentences", "2", "--minutes", minutes, "--rounds", "1"),
            *("--runs", str(tmp_path / "runs"), "--results", str(tmp_path / "results")),
        ]
        monkeypatch.setattr(sys, "argv", words)
        on_gpu.main()
        return capfd.readouterr().out

    assert "stopped before dense of 2 updates: the same command continues" in called("0.5")
    assert not (tmp_path / "results").exists()
    assert "finished at update 2" in called("5")
    (path,) = (tmp_path / "results").glob("*.json")
    assert json.loads(path.read_text())["runs"]["dense-s1"]["measures"]["bleu"] >= 0
    shutil.rmtree(tmp_path / "runs")
    assert called("0.5") == ""

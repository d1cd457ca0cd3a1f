"""The comparisons: claims, spreads and pages from given numbers; and one of them, tiny, run and run again."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPTS = ("images", "masked_lm", "translation")


@pytest.fixture
def load(root: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(root / "scripts" / "reproduce"))

    def loaded(name: str) -> ModuleType:
        return importlib.import_module(name)

    return loaded


def options(folder: Path) -> argparse.Namespace:
    return argparse.Namespace(runs=str(folder / "runs"), results=str(folder / "results"), more=[])


def run_of(variant: str, seed: int, **measures: float) -> dict[str, Any]:
    return {"variant": variant, "seed": seed, "measures": measures, "seconds": 60.0, "details": {"share": [1 / 3]}}


def collapse(last: float) -> dict[str, float]:
    return {"collapse_first": 4.0, "collapse_last": last}


def test_spread(load: Any) -> None:
    found = load("measures").spread([1.0, 2.0, 3.0])
    assert found == {"mean": 2.0, "deviation": 1.0, "values": [1.0, 2.0, 3.0]}
    assert load("measures").spread([4.0])["deviation"] == 0.0


def test_words_of_the_command_line_lose_this_machine_s_folders(load: Any) -> None:
    plain = load("study").plain_word
    assert plain("data=/home/me/secret/bin") == "data=bin" and plain("/a/b/c") == "c"
    assert (
        plain("--data=../shared/x") == "--data=x"
        and plain("seed=3") == "seed=3"
        and plain("data-bin/a") == "data-bin/a"
    )


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_comparison_has_claims_about_variants_that_it_trains(name: str, load: Any) -> None:
    module = load(name)
    names = [variant.name for variant in module.VARIANTS]
    assert len(set(names)) == len(names) and module.CLAIMS
    for claim in module.CLAIMS:
        assert set(claim.needs) <= set(names), claim.says


def test_claims_are_read_off_the_means(load: Any, tmp_path: Path) -> None:
    study, module = load("study"), load("masked_lm")
    made = study.Study("masked_lm", "Title", module.COLUMNS, module.CLAIMS, options(tmp_path))
    made.runs = {
        "dense-s1": run_of("dense", 1, perplexity=30.0, zero_shot_f1=0.2),
        "switch-s1": run_of("switch", 1, perplexity=20.0, zero_shot_f1=0.3, fluctuation=0.2, **collapse(2.0)),
        "xmoe-s1": run_of("xmoe", 1, perplexity=18.0, zero_shot_f1=0.1, fluctuation=0.3, **collapse(5.0)),
        "xmoe-s2": run_of("xmoe", 2, perplexity=20.0, zero_shot_f1=0.1, fluctuation=0.3, **collapse(5.0)),
    }
    agrees = {outcome["says"]: outcome["agrees"] for outcome in made.outcomes()}
    assert agrees == {
        "perplexity: sparse below dense (19.02 against 23.51)": "yes",
        "perplexity: X-MoE below Switch (18.72 against 19.02)": "undecided",
        "Switch's states collapse, X-MoE's do not": "yes",
        "X-MoE's routing fluctuates less": "no",
        "zero-shot transfer: X-MoE above Switch": "no",
        "zero-shot transfer: Switch above dense": "yes",
        "runs of X-MoE agree more with each other": "open",
        "frozen routing transfers better": "open",
    }
    made.write()
    page = (tmp_path / "results" / "masked_lm.md").read_text()
    content = json.loads((tmp_path / "results" / "masked_lm.json").read_text())
    assert "| xmoe | 2 | 19 ± 1.414 |" in page and "| **no** |" in page and "| open |" in page and "| yes |" in page
    assert content["summary"]["xmoe"]["perplexity"]["values"] == [18.0, 20.0]
    assert content["runs"]["dense-s1"]["details"] == {"share": [0.33333]}
    assert content["machine"]["cores"] and content["commit"] and str(tmp_path) not in json.dumps(content["command"])


def test_measures_along_training_are_means_of_seeds_and_layers(load: Any) -> None:
    def run(variant: str, first: float, last: float) -> dict[str, Any]:
        layers = {"0": {"collapse_by_expert": first - 1}, "1": {"collapse_by_expert": first + 1}}
        checkpoints = {"10": {"0": {"collapse_by_expert": last}, "1": {}}, "9": layers}
        probe = {"checkpoints": checkpoints, "fluctuation": {"0": [0.1], "1": [0.3]}}
        return {"variant": variant, "details": {"probe": probe}}

    dense = {"variant": "dense", "details": {"probe": {"checkpoints": {"9": {}, "10": {}}, "fluctuation": {}}}}
    runs = {"a": run("switch", 4.0, 3.0), "b": run("switch", 6.0, 5.0), "c": run("xmoe", 4.0, 8.0), "d": dense}
    lines = load("masked_lm").along_training(runs)
    assert lines.count("| update | 9 | 10 |") == 1 and lines.count("| update | 10 |") == 1
    assert "| switch | 5 | 4 |" in lines and "| xmoe | 4 | 8 |" in lines and "| switch | 0.2 |" in lines


def test_a_difference_within_its_spread_is_called_so(load: Any) -> None:
    measures = load("measures")
    above, mean = measures.above, measures.Mean
    assert above("a", mean(2.0, 0.3), "b", mean(1.0, 0.4), ".1f") == ("a 2.0 ± 0.3, b 1.0 ± 0.4", True)
    said, agrees = above("a", mean(1.0, 0.8), "b", mean(2.0, 0.6), ".1f")
    assert said.endswith("within the spread") and agrees is None


@pytest.mark.slow  # two processes
def test_a_comparison_runs_and_does_not_repeat_itself(
    load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("sklearn", reason="needs the extra 'images'")
    images = load("images")
    words = [
        *("images.py", "--data", "digits", "--seeds", "1", "--updates", "4", "--threads", "1"),
        *("--only", "token_choice", "--runs", str(tmp_path / "runs"), "--results", str(tmp_path / "results"), "--"),
        *("model.embed_dim=16", "model.ffn_dim=32", "model.num_heads=2", "model.encoder_layers=2"),
        *("training.log_every=2", "model.patch_size=4"),  # these images have 8 pixels a side
    ]
    monkeypatch.setattr(sys, "argv", words)
    images.main()
    content = json.loads((tmp_path / "results" / "images.json").read_text())
    (run,) = content["runs"].values()
    assert run["updates"] == 4 and run["seconds"] > 0 and 0 <= run["measures"]["accuracy"] <= 1
    assert run["measures"]["dropped_fraction"] > 0 and run["measures"]["milliseconds_per_image"] > 0
    assert {claim["agrees"] for claim in content["claims"]} == {"open"}
    before = (tmp_path / "runs" / "images" / "token_choice-s1" / "run.json").stat().st_mtime_ns
    images.main()
    assert (tmp_path / "runs" / "images" / "token_choice-s1" / "run.json").stat().st_mtime_ns == before
    again = json.loads((tmp_path / "results" / "images.json").read_text())
    assert again["runs"] == content["runs"]


def test_growth_is_the_layer_s_over_the_products(load: Any) -> None:
    module = load("soft_moe_experts")
    seconds = {
        ("layer", 4): [1.0, 2.0],
        ("layer", 64): [3.0, 6.0],
        ("products", 4): [1.0, 1.0],
        ("products", 64): [2.0, 2.0],
    }
    assert module.growth(seconds) == 1.5
    measured = module.timed(module.contenders(2, 16, 8, 16, 64), rounds=2)
    assert set(measured) == {(kind, n) for kind in ("layer", "products") for n in module.EXPERTS}
    assert all(len(values) == 2 for values in measured.values())

"""``moe-bench`` on sizes that take moments: the rows, what peers compute, and the files. Never how long it took."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from moe_train.analysis.bench.bench_layer import LEAST_SKEW
from moe_train.commands.bench import main


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> object:
    """Runs the command; its JSON and its page."""

    def call(what: str, *words: str) -> tuple[dict, str]:
        common = ["--rounds", "2", "--threads", "1", "--out", str(tmp_path / "bench")]
        monkeypatch.setattr(sys, "argv", ["moe-bench", what, *words, *common])
        main()
        folder = tmp_path / "bench"
        return json.loads((folder / f"{what}.json").read_text()), (folder / f"{what}.md").read_text()

    return call


def test_a_row_per_shape_and_type_with_the_ratio_over_bare_products(bench: object, capsys: object) -> None:
    shapes = ["--shape", "64,16,32,4,2", "--shape", "48,8,16,8,3"]
    figures, page = bench("layer", *shapes, "--peers", "sort_loop")  # type: ignore[operator]
    assert [(row["shape"]["num_experts"], row["dtype"]) for row in figures["rows"]] == [
        (4, "fp32"), (4, "bf16"), (8, "fp32"), (8, "bf16"),
    ]  # fmt: skip
    for row in figures["rows"]:
        assert row["skew"] >= LEAST_SKEW and row["ratio"] > 0
        assert set(row["milliseconds"]) == {"bmm", "ours", "sort_loop"} and set(row["over_peers"]) == {"sort_loop"}
    assert figures["command"].startswith("moe-bench layer --shape 64,16,32,4,2") and figures["threads"] == 1
    assert "ratio" in capsys.readouterr().out  # type: ignore[attr-defined]
    assert page.count("\n| ") == 5 and "| 64, 16, 32, 4, 2 | bf16 |" in page and figures["command"] in page


def test_thor_beside_the_dense_model_in_both_tasks_and_ways(bench: object) -> None:
    words = ["--model", "tiny", "--sentences", "1", "3", "--length", "5", "--steps", "3", "--vocabulary", "60"]
    figures, page = bench("inference", *words)  # type: ignore[operator]
    found = [(row["sentences"], row["task"], row["inference"]) for row in figures["rows"]]
    ways = [(task, mode) for task in ("forward", "search") for mode in ("fixed", "sentence", "token")]
    assert found == [(n, *mode) for n in (1, 3) for mode in ways]
    assert all(row["ratio"] > 0 and set(row["milliseconds"]) == {"dense", "thor"} for row in figures["rows"])
    assert page.count("\n| ") == 13


def test_all_searches_of_a_comparison_are_equally_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else one that happened to end early would look fast."""
    from moe_train.analysis.bench import bench_inference as module
    from moe_train.config import ModelConfig

    sizes = ModelConfig(encoder_layers=2, decoder_layers=2, embed_dim=16, ffn_dim=32, num_heads=2, sparse_layers="all")
    work = module.DecodingWorkload(sentences=3, length=5, beam=2, steps=4, vocabulary=30)
    for routing in ({"name": "dense"}, {"name": "thor", "num_experts": 3}):
        model = module._build(sizes, routing, work)
        found = module._search(model, work)()
        assert [len(words) for words in found.best()] == [4, 4, 4]  # type: ignore[attr-defined]

"""The page over studies: the committed results, learning curves and decisions, and text that is not trusted."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

from moe_train.analysis.report.study_page import study_page
from moe_train.errors import ConfigError
from tests.analysis.report_folders import page_content, without_plotly


def test_the_committed_results(root: Path, tmp_path: Path) -> None:
    main = runpy.run_path(str(root / "scripts" / "results_page.py"))["main"]
    main([str(root / "results"), "--out", str(tmp_path / "index.html")])
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    content = page_content(page)
    studies = {study["name"]: study for study in content["studies"]}
    assert {"images", "masked_lm", "translation"} <= set(studies)
    for name, study in studies.items():
        committed = json.loads((root / "results" / f"{name}.json").read_text())
        assert [claim["agrees"] for claim in study["claims"]] == [claim["agrees"] for claim in committed["claims"]]
        assert {variant["name"] for variant in study["variants"]} == set(committed["summary"])
    (recipe,) = content["searches"]
    assert recipe["name"] == "recipe" and recipe["candidates"][0]["tokens"][0] > 100_000
    bits = [candidate["bits"] for candidate in recipe["candidates"]]
    assert bits == sorted(bits) and len(page.encode()) < 15_000_000
    assert "http" not in without_plotly(page).replace("http-equiv", "")


def test_curves_and_decisions_of_a_study(tmp_path: Path) -> None:
    curve = [{"tokens": 10, "flops": 30.0, "nll": 5.0}, {"tokens": 20, "flops": 60.0, "nll": 4.0}]
    runs = {f"dense-s{seed}": {"variant": "dense", "seconds": 60, "details": {"curve": curve}} for seed in (1, 2)}
    claim = {"paper": "<b>P</b>", "says": "</script>", "measured": "1", "agrees": "above", "decision": {"effect": 1.0}}
    summary = {"dense": {"bleu": {"mean": 3.0, "deviation": 0.5, "values": [2.5, 3.5]}, "damaged": 3}}
    content = {"title": "A <i>title", "runs": runs, "summary": summary, "claims": [claim], "notes": ["a note"]}
    (tmp_path / "one.json").write_text(json.dumps(content))
    (tmp_path / "other.json").write_text("[1, 2]")
    (tmp_path / "damaged.json").write_text("{")
    page = study_page(tmp_path)
    (study,) = page_content(page)["studies"]
    (variant,) = study["variants"]
    assert variant["curves"] == [{"tokens": [10, 20], "flops": [30.0, 60.0], "nll": [5.0, 4.0]}] * 2
    assert list(variant["measures"]) == ["bleu"] and study["claims"] == [claim] and study["minutes"] == 2.0
    assert study["title"] == "A <i>title" and page.count("</script>") == 3 and "1 above" in page


def test_a_folder_without_studies(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no results of studies"):
        study_page(tmp_path)

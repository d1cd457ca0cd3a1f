"""Run folders as training and evaluation leave them, with outputs of a known quality: references partly exchanged."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moe_train.config import RunConfig, TrainingConfig, ValidationConfig
from moe_train.evaluation.result_files import ResultFiles
from moe_train.evaluation.scoring.bleu_chrf import Scorer
from moe_train.evaluation.scoring.results import DirectionResult, Results
from moe_train.evaluation.translations import Translation
from moe_train.training.run.run_folder import RunFolder

WORDS = [f"word{i}" for i in range(80)]
TIERS = {"de": "high", "sw": "low", "en": "high"}
DIRECTIONS = ("en-de", "de-en", "en-sw", "sw-en")


def references(direction: str, lines: int = 150) -> list[str]:
    """The same text for every run."""
    draw = random.Random(direction)
    return [" ".join(draw.choices(WORDS, k=12)) for _ in range(lines)]


def trained(
    folder: Path,
    strategy: str = "switch",
    updates: int = 300,
    loss: float = 2.0,
    fingerprint: str = "",
    validated: int = 0,
    **info: object,
) -> Path:
    """A finished run with logs of three intervals and two sparse layers of four experts.

    Args:
        fingerprint: of its data folder.
        validated: ``training.validation.max_sentences``.
        info: more of what ``run.json`` says.
    """
    run = RunFolder(folder)
    training = TrainingConfig(validation=ValidationConfig(max_sentences=validated))
    run.begin(RunConfig("data", routing={"name": strategy, "num_experts": 4}, training=training), fingerprint)
    for step in (1, 2, 3):
        update = step * updates // 3
        load = {"0": [0.4, 0.3, 0.2, 0.1], "1": [0.25, 0.25, 0.5, 0.0]}
        line = {"nll_loss": loss + 3 / step, "balance_loss": 1.0 + 1 / step, "words_per_second": 1000.0 * step}
        with run.train_log.open("a") as stream:
            stream.write(json.dumps({"update": update, **line, "load": load}) + "\n")
        with run.valid_log.open("a") as stream:
            line = {"loss": loss + 1 / step, "nll_loss": loss + 3 - step}
            stream.write(json.dumps({"update": update, **line}) + "\n")
    run.describe(
        status="finished",
        update=updates,
        parameters={"total": 2_500_000, "active": 1_000_000},
        flops_per_token=3.1e6,
        world={"processes": 2, "expert_parallel": 1, "device": "cpu"},
        commit="0123abcd",
        **info,
    )
    return folder


def scored(
    folder: Path,
    quality: float,
    seed: int,
    directions: Sequence[str] = DIRECTIONS,
    count: int = 150,
    part: str = "",
    **settings: object,
) -> Path:
    """Adds outputs and scores to a run: a word of the reference stays with probability ``quality``.

    Args:
        count: lines of each direction.
        part: of the split.
        settings: more of what ``test.json`` says under that name.
    """
    files = ResultFiles(folder, "test", part)
    draw = random.Random(seed)
    results = {}
    signatures: dict[str, object] = {}
    for direction in directions:
        target = references(direction, count)
        lines = [" ".join(w if draw.random() < quality else draw.choice(WORDS) for w in r.split()) for r in target]
        scorer = Scorer(direction.split("-")[1])
        scores = scorer.score(lines, target)
        low = scorer.score(lines[::-1], target)
        results[direction] = DirectionResult(scores, {"copy": low, "shuffled": low}, len(lines), 1, 1, "13a")
        files.outputs(direction).write(target, target, [Translation(t, -1.0, 5) for t in lines])
        signatures = {"bleu": {"13a": scorer.bleu_signature}, "chrf": scorer.chrf_signature}
    found = Results({"split": "test", "checkpoint": "step_3", **settings}, results, TIERS, signatures, {}, ["a note"])
    files.scores.write_text(found.to_text(), encoding="utf-8")
    return folder


def page_content(page: str) -> dict[str, Any]:
    """The data of a report page."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    content: dict[str, Any] = json.loads(found[1])
    return content


def without_plotly(page: str) -> str:
    """A report page without the library that it contains."""
    before, _, rest = page.partition("<script>/**\n* plotly.js")
    return before + rest.partition("</script>")[2]


def overridden(folder: Path, *words: str) -> Path:
    """Adds the words of a sweep's job; where nothing was trained, as Hydra did for earlier versions."""
    config = folder / "config.json"
    if config.is_file():
        config.write_text(json.dumps(json.loads(config.read_text()) | {"overrides": words}), encoding="utf-8")
        return folder
    (folder / ".hydra").mkdir(parents=True, exist_ok=True)
    (folder / ".hydra" / "overrides.yaml").write_text("".join(f"- {word}\n" for word in words), encoding="utf-8")
    return folder


def failure(folder: Path, what: str, **more: str) -> Path:
    """Adds what a failing run leaves."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {"rank": 0, "time": 0.0, "what": what, "where": "", "remedy": "", "trace": "", **more}
    (folder / "failure.json").write_text(json.dumps(content), encoding="utf-8")
    return folder

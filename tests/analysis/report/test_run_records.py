"""Damaged files of a run folder: what is sound is used, what is not is named, and no other run suffers from it."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from moe_train.analysis.report.build_report import make_report
from moe_train.analysis.report.compare import Comparisons
from moe_train.analysis.report.load_runs import RunReport, read_run
from moe_train.analysis.report.page_data import page_data
from moe_train.config.evaluation import ReportConfig
from tests.analysis.report_folders import failure, scored, trained

DEEP = b"[" * 100_000


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scored(trained(tmp_path_factory.mktemp("whole") / "run"), 0.6, 1, directions=("en-de",), count=8)


@pytest.fixture
def run(tmp_path: Path, whole: Path) -> Path:
    """One of two alike."""
    shutil.copytree(whole, tmp_path / "runs" / "a")
    return Path(shutil.copytree(whole, tmp_path / "runs" / "b"))


def reported(runs: Path) -> tuple[str, list[RunReport]]:
    """What a report over the folder shows and writes."""
    screen = io.StringIO()
    found = make_report(ReportConfig((str(runs),), samples=2, html=False), Console(file=screen, width=80))
    return screen.getvalue() + (runs / "leaderboard.md").read_text(), found


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("run.json", b'{"status": "fin', "run.json: the file is damaged"),
        ("run.json", b"\xff\xfe{}", "run.json: the file is damaged"),
        ("run.json", b"[1, 2]", "run.json: the file is damaged (not a JSON object)"),
        ("run.json", DEEP, "run.json: the file is damaged (nested too deeply)"),
        ("run.json", b'{"status": "finished", "update": "300"}', "run.json: 'update' cannot be '300'"),
        ("run.json", b'{"parameters": [3]}', "run.json: 'parameters' is damaged"),
        ("run.json", b'{"parameters": {"total": 1e999, "active": true}}', "run.json: 'active' cannot be True"),
        ("run.json", b'{"world": 7, "flops_per_token": {}}', "run.json: 'flops_per_token' cannot be {}"),
        ("config.json", b'{"config": 3}', "config.json: 'config' is damaged"),
        ("config.json", b'{"config": {"routing": "switch"}}', "config.json: 'routing' is damaged"),
        ("config.json", DEEP, "config.json: the file is damaged"),
        ("test.json", b"{", "test.json: the file is damaged"),
        ("test.json", b'{"directions": []}', "test.json: the scores cannot be read"),
        ("train.jsonl", b"\xff\xfe\n", "train.jsonl: line 1 cannot be read"),
        ("train.jsonl", b'{"update": 1, "nll_loss": "low"}\n{"update": []}\n', "train.jsonl: line 1 and 1 more"),
        ("valid.jsonl", DEEP + b"\n", "valid.jsonl: line 1 cannot be read"),
    ],
)
def test_one_damaged_file_is_named_and_the_report_goes_on(run: Path, name: str, content: bytes, said: str) -> None:
    (run / name).write_bytes(content)
    text, found = reported(run.parent)
    assert f"b: {said}" in text and "a: " not in text.replace("runs/a", "")
    other = next(report for report in found if report.name == "a")
    assert other.status == "finished" and other.results is not None and not other.problems


def test_a_direction_that_is_none_is_damage(run: Path) -> None:
    """Names become parts of paths, and are shown."""
    names = ["a/b-/c", "../../x-y", "<b>x</b>-de", "[red]x[/red]-de", f"en_{'x' * 300}-de", "en-en", "e\0n-de"]
    content = json.loads((run / "test.json").read_text())
    for number, name in enumerate(names):
        bad = Path(shutil.copytree(run, run.parent / str(number)))
        directions = content["directions"] | {name: content["directions"]["en-de"]}
        (bad / "test.json").write_text(json.dumps({**content, "directions": directions}))
    _, found = reported(run.parent)
    assert [report.name for report in found if report.results is not None] == ["a", "b"]
    problems = [problem for report in found for problem in report.problems]
    assert len(problems) == len(names)
    assert all(p.startswith("test.json: the scores cannot be read") and "is not a direction" in p for p in problems)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("pipe", "not a regular file"),
        ("device", "not a regular file"),
        ("folder", "Is a directory"),
        ("huge", "more than"),
    ],
)
def test_what_is_no_regular_file_is_damage(run: Path, kind: str, reason: str) -> None:
    """Reading would not end."""
    records = ["run.json", "test.json", "train.jsonl", "valid.jsonl"]
    dead = Path(shutil.copytree(run, run.parent / "c"))
    (dead / "run.json").write_text('{"status": "running"}')
    (dead / "config.json").unlink()
    failure(dead, "killed")
    (dead / "failure.json").write_text("{}")
    texts = ["logs/rank_0.log", ".hydra/overrides.yaml", "hypotheses/test.en-de.en", "hypotheses/test.en-de.de"]
    for path in (*(run / name for name in records), *(dead / name for name in texts)):
        irregular(path, kind)
    text, found = reported(run.parent)
    assert all(f"b: {name}: the file cannot be read ({reason}" in text for name in records)
    assert [report.name for report in found] == ["a", "b", "c"]


def irregular(path: Path, kind: str) -> None:
    """Replaces a file."""
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    else:
        with path.open("wb") as stream:
            stream.truncate(1 << 40)


def test_what_is_damaged_is_not_taken_for_anything_else(run: Path) -> None:
    (run / "run.json").write_text("{")
    assert (read_run(run, "b").status, read_run(run, "b").failed) == ("unknown", False)
    (run / "run.json").write_text('{"status": "running"}')
    failure(run, "killed")
    (run / "failure.json").write_text("[]")
    assert read_run(run, "b").problems == ["failure.json: the file is damaged (not a JSON object)"]
    lines = [
        *({"update": 1, "nll_loss": 3.0, "load": {"0": [0.5, "x"], "1": [0.5, 0.5]}}, {"update": 2, "nll_loss": 2.0}),
        *({"update": 3, "nll_loss": float("nan")}, {"update": -4, "nll_loss": 0.0}, {"update": 1e30}),
    ]  # fmt: skip
    (run / "valid.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    found = read_run(run, "b")
    assert found.loss == 2.0 and [line["update"] for line in found.valid] == [1, 2, 3]
    assert (
        found.valid[0]["load"] == {"1": [0.5, 0.5]}
        and "valid.jsonl: line 4 and 1 more cannot be read" in found.problems
    )
    (run / "test.json").write_text((run / "test.json").read_text().replace('"split": "test"', '"split": "valid"'))
    assert read_run(run, "b").results is None
    assert "test.json: the scores are of split=valid" in read_run(run, "b").problems


def test_a_line_that_is_being_written_is_no_damage(run: Path) -> None:
    with (run / "train.jsonl").open("a") as log:
        log.write('{"update": 400, "nll_lo')
    found = read_run(run, "b")
    assert len(found.train) == 3 and not found.problems


def test_measures_of_other_tasks_are_no_damage(run: Path) -> None:
    (run / "test.json").write_text(json.dumps({"task": "image_classification", "sets": {}, "average": {}}))
    found = read_run(run, "b")
    assert found.results is None and not found.problems


def places(content: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        yield from places(value, (*path, key))


VALUES: list[Any] = [None, True, -1, 1e308, float("nan"), 10**400, "x", "", [], {}, [1], {"a": 1}, "\x1b[31m", 1.5]


def retyped(text: str, draw: random.Random) -> bytes:
    """JSON with one value of another type, or without it."""
    content = json.loads(text)
    *path, last = draw.choice([place for place in places(content) if place])
    for holder in (inner := [content]):
        for key in path:
            inner[0] = inner[0][key]
        assert holder is not None
    if draw.random() < 0.3:
        del inner[0][last]
    else:
        inner[0][last] = draw.choice(VALUES)
    return json.dumps(content).encode()


def mutated(path: Path, draw: random.Random) -> bytes:
    """Cut, flipped, grown, or with a value of another type."""
    data = path.read_bytes()
    how = draw.choice(["cut", "flip", "grow", "retype", "retype", "retype"])
    if how == "cut":
        return data[: draw.randrange(len(data))]
    if how == "flip":
        flipped = bytearray(data)
        for _ in range(draw.choice([1, 30])):
            flipped[draw.randrange(len(data))] = draw.randrange(256)
        return bytes(flipped)
    if how == "grow" or path.suffix not in (".json", ".jsonl"):
        return data + draw.randbytes(50)
    if path.suffix == ".json":
        return retyped(data.decode(), draw)
    first, *rest = data.decode().splitlines()
    return retyped(first, draw) + "".join(f"\n{line}" for line in [*rest, ""]).encode()


def test_no_mutated_file_stops_a_report(tmp_path: Path, whole: Path) -> None:
    """Thirty runs in one report, one file of each mutated by a seed; pages, tables and comparisons are all made."""
    draw = random.Random(5)
    names = ["run.json", "config.json", "train.jsonl", "valid.jsonl", "test.json", "hypotheses/test.en-de.de"]
    for number in range(30):
        run = Path(shutil.copytree(whole, tmp_path / "runs" / str(number)))
        file = run / names[number % len(names)]
        file.write_bytes(mutated(file, draw))
    _, found = reported(tmp_path / "runs")
    assert len(found) == 30
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        content = page_data(found[::5], Comparisons(), 0)
    assert json.loads(json.dumps(content, allow_nan=False)) == content and len(content["runs"]) == 6

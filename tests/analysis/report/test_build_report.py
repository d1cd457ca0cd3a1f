"""The report: which runs there are and how they ended, significance against a baseline, tables, files, pages."""

from __future__ import annotations

import csv
import fcntl
import io
import json
import os
import re
import time
from pathlib import Path

import pytest
import sacrebleu
from rich.console import Console

from moe_train.analysis.report.build_report import make_report
from moe_train.analysis.report.compare import choose_baseline, compare
from moe_train.analysis.report.leaderboard import ranked
from moe_train.analysis.report.load_runs import find_runs, read_run, read_runs
from moe_train.config.evaluation import ReportConfig
from moe_train.errors import ConfigError
from moe_train.evaluation.hypothesis_files import OutputFiles
from moe_train.screen import Screen
from moe_train.training.run.heartbeat import heartbeat
from moe_train.training.run.run_folder import ALIVE
from tests.analysis.report_folders import (
    DIRECTIONS,
    failure,
    overridden,
    page_content,
    references,
    scored,
    trained,
    without_plotly,
)


def aged(folder: Path) -> Path:
    """As if its last log line were old."""
    long_ago = time.time() - 3600
    os.utime(folder / "train.jsonl", (long_ago, long_ago))
    return folder


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A multirun of five jobs: a baseline, a better one, an equal one, one that failed in training, one before it."""
    root = tmp_path_factory.mktemp("multirun") / "2026-01-31" / "12-00-00"
    for number, (strategy, quality) in enumerate([("dense", 0.6), ("switch", 0.75), ("top_k", 0.6)]):
        run = overridden(trained(root / str(number), strategy, loss=2.0 - quality), f"routing={strategy}", "seed=3")
        scored(run, quality, seed=number)
    failed = aged(overridden(trained(root / "10", "thor"), "routing=thor"))
    (failed / "run.json").write_text('{"status": "running", "update": 150}')
    failure(failed, "it was killed by SIGKILL", remedy="perhaps out of memory")
    failure(overridden(root / "9", "routing=sam"), "unknown key 'routing.grups'", where="command line")
    return root


def test_runs_are_found_in_the_order_of_their_jobs(sweep: Path) -> None:
    names = ["0", "1", "2", "9", "10"]
    assert [path.name for path in find_runs(sweep)] == names
    assert [path.name for path in find_runs(sweep.parents[1])] == names
    assert [run.name for run in read_runs([sweep / "1", sweep])] == ["1", "0", "2", "9", "10"]
    assert find_runs(sweep / "0") == [(sweep / "0").resolve()]


def test_names_are_as_long_as_they_must_be(tmp_path: Path) -> None:
    for name in ("a/run", "b/run"):
        trained(tmp_path / name)
    assert [run.name for run in read_runs([tmp_path / "a", tmp_path / "b"])] == ["a/run", "b/run"]


def test_no_runs(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no run here"):
        read_runs([tmp_path])
    with pytest.raises(ConfigError, match="no runs were given"):
        read_runs([])


def test_what_a_run_was(sweep: Path) -> None:
    run = read_run(sweep / "1", "1")
    assert (run.status, run.strategy, run.update) == ("finished", "switch", 300)
    assert (run.parameters, run.active_parameters, run.flops_per_token) == (2_500_000, 1_000_000, 3.1e6)
    assert run.training_flops_per_token == pytest.approx(9.3e6), "backward is twice forward"
    assert run.words_per_second == 2000.0
    assert run.loss == pytest.approx(1.25)
    assert run.overrides == ("routing=switch", "seed=3")


def test_training_costs_a_backward_pass_and_every_pass_over_the_batch(sweep: Path, tmp_path: Path) -> None:
    costs = {s: read_run(trained(tmp_path / s, s), s).training_flops_per_token for s in ("dense", "top_k", "thor")}
    assert costs == pytest.approx({"dense": 9.3e6, "top_k": 9.3e6, "thor": 18.6e6})
    assert read_run(trained(tmp_path / "mine", "of_another_package"), "").training_flops_per_token is None
    assert read_run(sweep / "9", "9").training_flops_per_token is None


def test_failures_and_their_causes(sweep: Path, tmp_path: Path) -> None:
    killed, never_begun = read_run(sweep / "10", "10"), read_run(sweep / "9", "9")
    assert killed.failed and killed.cause == "it was killed by SIGKILL (perhaps out of memory)" and killed.update == 300
    assert never_begun.failed and never_begun.cause == "command line: unknown key 'routing.grups'"
    assert never_begun.strategy == "sam"
    silent = aged(trained(tmp_path / "silent"))
    (silent / "run.json").write_text('{"status": "running"}')
    assert "without an error message" in read_run(silent, "silent").cause
    (silent / "logs").mkdir(exist_ok=True)
    (silent / "logs" / "rank_1.log").write_text("fine\nTraceback\n  File …\nValueError: bad shape\nmore\n")
    assert read_run(silent, "silent").cause == "ValueError: bad shape"


def test_a_run_that_is_alive_has_not_failed(tmp_path: Path) -> None:
    """However old its last log line is: it may be validating, or take long over its updates."""
    run = aged(trained(tmp_path / "run"))
    (run / "run.json").write_text('{"status": "running"}')
    assert read_run(run, "run").status == "failed"
    with heartbeat(run / ALIVE, every=0.05):
        _wait_for(run / ALIVE)
        assert read_run(run, "run").status == "running"
    (run / ALIVE).write_text("elsewhere 1\n")
    assert read_run(run, "run").status == "running", "on another host, whose lock does not show"
    os.utime(run / ALIVE, (time.time() - 3600,) * 2)
    assert read_run(run, "run").status == "failed"
    with (run / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert read_run(run, "run").status == "running"
    assert read_run(run, "run").status == "failed"


def _wait_for(path: Path) -> None:
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_damaged_files_are_left_out(tmp_path: Path) -> None:
    run = scored(trained(tmp_path / "run"), 0.5, 1)
    with (run / "train.jsonl").open("a") as log:
        log.write('{"update": 400, "nll_lo')
    (run / "test.json").write_text("{")
    found = read_run(run, "run")
    assert len(found.train) == 3 and found.results is None


def test_the_baseline_is_chosen_by_name_folder_or_strategy(sweep: Path) -> None:
    runs = read_runs([sweep])
    for wanted in (None, "0", str(sweep / "0"), "12-00-00/0", "dense"):
        chosen = choose_baseline(runs, wanted)
        assert chosen is not None and chosen.name == "0"
    with pytest.raises(ConfigError, match="has no scores"):
        choose_baseline(runs, "thor")
    with pytest.raises(ConfigError, match="no single run is named 'densee'"):
        choose_baseline(runs, "densee")


def test_significance_against_the_baseline(sweep: Path) -> None:
    runs = read_runs([sweep])
    found = compare(runs, choose_baseline(runs, "dense"), samples=200, significance=0.01)
    better, equal = found.count("1", DIRECTIONS), found.count("2", DIRECTIONS)
    assert better is not None and (better.better, better.worse, better.directions) == (4, 0, 4)
    assert equal is not None and equal.better + equal.worse <= 1
    assert found.count("0", DIRECTIONS) is None and found.count("10", DIRECTIONS) is None
    low = found.count("1", ["en-sw"])
    assert low is not None and low.directions == 1
    assert compare(runs, choose_baseline(runs, "dense"), 0, 0.01).by_run == {}


def test_significance_is_of_the_tokenizer_that_gave_the_scores(tmp_path: Path) -> None:
    """By the code of the target it would be 13a."""
    for name, quality in (("one", 0.5), ("two", 0.6)):
        scored(trained(tmp_path / name), quality=quality, seed=3, directions=["en-de"])
        content = json.loads((tmp_path / name / "test.json").read_text())
        content["directions"]["en-de"]["tokenizer"] = "char"
        (tmp_path / name / "test.json").write_text(json.dumps(content))
    runs = read_runs([tmp_path])
    found = compare(runs, choose_baseline(runs, "one"), samples=20, significance=0.05).by_run["two"]["en-de"]
    hypotheses, references = OutputFiles(tmp_path / "two", "test", "en-de").read()
    assert found.scores.bleu == pytest.approx(
        sacrebleu.corpus_bleu(hypotheses, [references], tokenize="char").score, abs=1e-3
    )
    content["directions"]["en-de"]["tokenizer"] = "../../bleu"
    for name in ("one", "two"):
        (tmp_path / name / "test.json").write_text(json.dumps(content))
    runs = read_runs([tmp_path])
    notes = compare(runs, choose_baseline(runs, "one"), samples=20, significance=0.05).notes
    assert any("en-de: not compared: sacrebleu has no tokenizer" in note for note in notes)


def test_other_references_are_not_compared(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 2)):
        scored(trained(tmp_path / name), 0.6, seed)
    changed = tmp_path / "b" / "hypotheses" / "test.en-de.de.reference"
    changed.write_text("other\n" * len(references("en-de")))
    (tmp_path / "b" / "hypotheses" / "test.de-en.en").unlink()
    runs = read_runs([tmp_path])
    found = compare(runs, runs[0], 50, 0.05)
    assert sorted(found.by_run["b"]) == ["en-sw", "sw-en"]
    assert any("another text" in note for note in found.notes) and any("missing" in note for note in found.notes)


def test_averages_over_different_directions_are_flagged(tmp_path: Path) -> None:
    scored(trained(tmp_path / "a"), 0.6, 1)
    scored(trained(tmp_path / "b"), 0.6, 2, directions=DIRECTIONS[:2])
    runs = read_runs([tmp_path])
    assert any("cannot be compared" in note for note in compare(runs, runs[0], 0, 0.05).notes)


def test_the_leaderboard(sweep: Path, tmp_path: Path) -> None:
    screen = io.StringIO()
    runs = make_report(
        ReportConfig((str(sweep),), baseline="dense", out=str(tmp_path), samples=100), Console(file=screen, width=100)
    )
    text = screen.getvalue()
    assert ranked(runs)[0].name == "1" and {run.name for run in ranked(runs)[-2:]} == {"9", "10"}
    for word in (
        "switch",
        "2.50M",
        "3.10M",
        "9.30M",
        "average",
        "low resource",
        "+4 -0 /4",
        "baseline",
        "SIGKILL",
        "grups",
    ):
        assert word in text, word
    rows = list(csv.DictReader(io.StringIO((tmp_path / "leaderboard.csv").read_text())))
    assert [row["run"] for row in rows] == [run.name for run in ranked(runs)]
    best = rows[0]
    assert best["all_better"] == "4" and best["status"] == "finished" and float(best["low_resource_chrf"]) > 50
    assert float(best["training_flops_per_token"]) == pytest.approx(9.3e6) and float(best["valid_nll_loss"]) == 1.25
    assert float(best["words_per_second"]) == 2000 and best["active_parameters"] == "1000000"
    assert next(row for row in rows if row["run"] == "10")["cause"].startswith("it was killed")
    details = list(csv.DictReader(io.StringIO((tmp_path / "directions.csv").read_text())))
    assert len(details) == 12
    switch = [row for row in details if row["run"] == "1"]
    assert all(float(row["bleu_difference"]) > 0 and float(row["bleu_p"]) < 0.05 for row in switch)
    markdown = (tmp_path / "leaderboard.md").read_text()
    table_rows = [line for line in markdown.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in table_rows[:7]}) == 1 and "10 failed at update 300" in markdown
    assert (tmp_path / "report.html").is_file() and not (sweep / "9" / "report.html").exists()


def test_the_leaderboard_fits_a_terminal(tmp_path: Path) -> None:
    """80 columns, no word broken, none that every run has, and none that changes neither results nor speed."""
    name = "a_name_longer_than_its_column-of-the-screen"
    for number, (strategy, experts) in enumerate([("dense", 8), ("expert_choice", 16)]):
        words = (f"routing={strategy}", f"routing.num_experts={experts}", "training.optimizer.lr=0.0012", "model=iwslt")
        silent = ("resume=missing", "evaluate=test", "launch.port=29500", "hydra.job.name=x", "training.log_every=7")
        words = (*words, f"launch.processes={number + 1}", *(silent if number else ("task.directions=[en-de]",)))
        scored(overridden(trained(tmp_path / f"{name}{number}", strategy, 1_200_000), *words), 0.6, seed=number)
    screen = io.StringIO()
    make_report(ReportConfig((str(tmp_path),), html=False, samples=50), Console(file=screen, width=80))
    tables, _, rest = screen.getvalue().partition("against baseline (")
    assert max(map(len, tables.splitlines())) <= 80 and "written" in rest
    shown = tables.split()
    for word in ("expert_choice", "finished", "1,200,000", "2.50M", "words/s", "valid", "nll", "FLOPs/tok", "training"):
        assert word in shown, word
    assert {"a_name_longer_than_", "its_column-of-the-", "routing.num_experts=16", "launch.processes=2"} <= set(shown)
    assert "task.directions=[en-de]" in shown
    for absent in ("iwslt", "lr=", "resume", "evaluate", "port", "hydra", "log_every", "loss", "…"):
        assert absent not in tables, absent
    written = (tmp_path / "leaderboard.csv").read_text()
    assert "routing.num_experts=16" in written and "resume=missing" in written, "of all words there is a record"
    assert "| routing.num_experts=16 launch.processes=2 |" in (tmp_path / "leaderboard.md").read_text()


def test_what_a_run_folder_holds_is_shown_as_text(tmp_path: Path) -> None:
    """Names, words, causes and notes with escape sequences, formulas, HTML and Markdown, in each place."""
    escape = "\x1b]0;owned\x07\x1b[2J\u202e"
    names = [f"=1+1 {escape}<b>x", "+[a](b)|c"]
    for name, strategy in zip(names, ("@dense", "=switch"), strict=True):
        run = overridden(trained(tmp_path / "runs" / name, strategy), f"++routing.note={escape}<script>")
        scored(run, 0.6, seed=1, directions=("en-de",))
        content = json.loads((run / "test.json").read_text())
        (run / "test.json").write_text(json.dumps(content | {"notes": [f"<i>{escape}"]}))
        log = run / "train.jsonl"
        log.write_text(log.read_text().replace("balance_loss", "$\\\\frac{$_loss"))
    spoilt = aged(tmp_path / "runs" / names[0])
    (spoilt / "run.json").write_text('{"status": "running", "update": 150}')
    failure(spoilt, f"-{escape}<b>[click](x)")
    screen = io.StringIO()
    out = tmp_path / "out"
    console = Screen(file=screen, force_terminal=True, width=100)
    make_report(ReportConfig((str(tmp_path / "runs"),), out=str(out), samples=20), console)
    texts = {"screen": re.sub(r"\x1b\[[\d;]*m", "", screen.getvalue())}
    texts |= {path.name: path.read_text() for path in out.iterdir()}
    texts["report.html"] = without_plotly(texts["report.html"])
    assert len(texts) == 5
    for place, text in texts.items():
        assert "owned" in text, place
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", text), place
    cells = [
        cell for name in texts if name.endswith(".csv") for row in csv.reader(io.StringIO(texts[name])) for cell in row
    ]
    assert not [cell for cell in cells if cell[:1] in "=+-@" and not re.fullmatch(r"|[+-]?[\d.e+-]+", cell)]
    assert "'=1+1 ␛]0;owned␇␛[2J�<b>x" in cells and "'@dense" in cells
    assert "\\<b\\>" in texts["leaderboard.md"] and not re.search(r"(?<!\\)[<\[]", texts["leaderboard.md"])
    assert not re.search(r"<(b>x|i>|script>(?!\n\"use strict))", texts["report.html"])


def test_pages_can_be_left_out(tmp_path: Path) -> None:
    run = trained(tmp_path / "run")
    make_report(ReportConfig((str(run),), html=False), Console(quiet=True))
    assert (run / "leaderboard.csv").is_file() and not (run / "report.html").exists()


def test_images_and_words_have_columns_of_their_own(tmp_path: Path) -> None:
    trained(tmp_path / "words")
    images = trained(tmp_path / "images", "soft_moe")
    log = images / "train.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    log.write_text(
        "".join(json.dumps({**line, "images_per_second": line["words_per_second"]}) + "\n" for line in lines)
    )
    screen = io.StringIO()
    make_report(ReportConfig((str(tmp_path),), samples=50), Console(file=screen, width=80))
    rows = {row["run"]: row for row in csv.DictReader(io.StringIO((tmp_path / "leaderboard.csv").read_text()))}
    speeds = {name: (row["words_per_second"], row["images_per_second"]) for name, row in rows.items()}
    assert speeds == {"words": ("2000.0", ""), "images": ("", "2000.0")}
    table = screen.getvalue().splitlines()[:8]
    assert {"words/s", "images/s"} <= set(" ".join(table).split()) and max(map(len, table)) <= 80
    (head,) = [line for line in (tmp_path / "leaderboard.md").read_text().splitlines() if "words/s" in line]
    assert "| words/s | images/s |" in head
    units = {run["name"]: run["unit"] for run in page_content((tmp_path / "report.html").read_text())["runs"]}
    assert units == {"words": "words/s", "images": "images/s"}
    alone = io.StringIO()
    make_report(ReportConfig((str(images),), html=False, out=str(tmp_path / "out")), Console(file=alone, width=80))
    assert "images/s" in alone.getvalue() and "words/s" not in alone.getvalue()

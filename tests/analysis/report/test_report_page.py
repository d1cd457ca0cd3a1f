"""The report page: one well-formed file that loads nothing and shows what the run folders hold."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path

import pytest

from moe_train.analysis.report.compare import choose_baseline, compare
from moe_train.analysis.report.load_runs import read_runs
from moe_train.analysis.report.page_data import page_data, printable
from moe_train.analysis.report.report_page import fill_page, report_page
from tests.analysis.report_folders import DIRECTIONS, failure, overridden, page_content, scored, trained, without_plotly

HOSTILE = "</script><img src=x onerror=alert(1)>\x1b]0;owned\u202e & {{DATA}} <!--"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome") or ""
_VOID = ("meta", "img", "br", "input")


class Checked(HTMLParser):
    """Raises where elements are not nested; collects what would be loaded."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.elements: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        self.loads += [f"{tag} {name}={value}" for name, value in attrs if name in ("src", "href", "srcset", "action")]
        self.loads += [f"{tag} {name}" for name, _ in attrs if name.startswith("on")]
        if tag not in _VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, tag


def checked(page: str) -> Checked:
    parser = Checked()
    parser.feed(page)
    parser.close()
    assert not parser.open
    return parser


def page_of(paths: Sequence[Path], samples: int = 20, sentences: int = 0) -> str:
    runs = read_runs(paths)
    comparisons = compare(runs, choose_baseline(runs, None), samples, 0.05)
    return report_page(runs, comparisons, page_data(runs, comparisons, sentences))


@pytest.fixture(scope="module")
def eleven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("eleven")
    for number in range(11):
        run = overridden(trained(root / f"run{number}", "switch" if number else "dense"), f"seed={number}")
        scored(run, 0.4 + number / 20, seed=number, count=40)
    return root


def test_eleven_runs_are_one_small_file_that_loads_nothing(eleven: Path) -> None:
    page = page_of([eleven])
    found = checked(page)
    assert len(page.encode()) < 15_000_000 and len(without_plotly(page).encode()) < 500_000
    assert not found.loads and "link" not in found.elements and "iframe" not in found.elements
    assert "default-src &#x27;none&#x27;" in page
    assert page == page_of([eleven]), "the same runs give the same page"
    assert "http" not in without_plotly(page).replace("http-equiv", "")


def test_the_page_has_what_the_run_folders_say(eleven: Path) -> None:
    content = page_content(page_of([eleven]))
    assert content["baseline"] == "run0" and len(content["runs"]) == 11
    best = content["runs"][0]
    assert (best["name"], best["strategy"], best["status"]) == ("run10", "switch", "finished")
    assert best["settings"] == ["seed=10"] and ["FLOPs per token, training", "9.30M"] in best["facts"]
    assert best["valid"] == {"update": [100, 200, 300], "tokens": [None] * 3, "nll_loss": [4.0, 3.0, 2.0]}
    assert best["train"]["balance_loss"] == [2.0, 1.5, 1.3333] and best["auxiliary"] == ["balance_loss"]
    assert best["layers"]["1"] == "encoder layer 3", "every second of six"
    assert best["load"]["0"] == {"update": [100, 200, 300], "load": [[1.6] * 3, [1.2] * 3, [0.8] * 3, [0.4] * 3]}
    directions = {entry["name"]: entry for entry in best["scores"]["directions"]}
    assert set(directions) == set(DIRECTIONS) and directions["en-sw"]["tier"] == "low"
    results = json.loads((eleven / "run10" / "test.json").read_text())["directions"]["en-sw"]
    assert directions["en-sw"]["bleu"] == pytest.approx(results["bleu"], rel=1e-4)
    kinds = [sample["kind"] for sample in best["samples"]["en-de"]]
    assert kinds == ["best", "best", "median", "median", "worst", "worst"]
    scores = [sample["chrf"] for sample in best["samples"]["en-de"]]
    assert scores == sorted(scores, reverse=True) and best["samples"]["en-de"][0]["reference"].startswith("word")


def test_tokens_are_counted_up_to_each_validation(tmp_path: Path) -> None:
    run = trained(tmp_path / "run")
    log = run / "train.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    log.write_text("".join(json.dumps({**line, "tokens": 1000 * line["update"] // 100}) + "\n" for line in lines))
    (run / "valid.jsonl").write_text('{"update": 150, "nll_loss": 3.0}\n{"update": 300, "nll_loss": 2.0}\n')
    (content,) = page_content(page_of([run]))["runs"]
    assert content["train"]["tokens"] == [1000, 3000, 6000] and content["valid"]["tokens"] == [2000, 6000]


def test_intervals_are_of_all_directions_with_outputs(eleven: Path, tmp_path: Path) -> None:
    """Of the baseline and of a run on other texts too, which is not compared."""
    for name in ("run0", "run1"):
        shutil.copytree(eleven / name, tmp_path / name)
    changed = tmp_path / "run1" / "hypotheses" / "test.en-de.de.reference"
    changed.write_text(changed.read_text().replace("word1", "another1"))
    (tmp_path / "run1" / "hypotheses" / "test.de-en.en").unlink()
    runs = page_content(page_of([tmp_path]))["runs"]
    widths = {run["name"]: {e["name"]: e["interval"] for e in run["scores"]["directions"]} for run in runs}
    assert widths["run1"].pop("de-en") is None
    found = [width[metric] for by_name in widths.values() for width in by_name.values() for metric in ("bleu", "chrf")]
    assert len(found) == 14 and all(0 < width < 20 for width in found)


def test_what_a_run_folder_holds_stays_text(tmp_path: Path) -> None:
    run = scored(trained(tmp_path / "a<b>&", "<i>"), 0.5, 1, directions=("en-de",), count=8)
    (run / "hypotheses" / "test.en-de.de").write_text(f"{HOSTILE}\n" * 8)
    failure(overridden(tmp_path / "b", f"++note={HOSTILE}", "routing=thor"), HOSTILE)
    page = page_of([tmp_path])
    found = checked(page)
    assert not found.loads and "img" not in found.elements and found.elements.count("script") == 3
    assert "\x1b" not in page and "\u202e" not in without_plotly(page)
    runs = {entry["name"]: entry for entry in page_content(page)["runs"]}
    text = HOSTILE.replace("\x1b", "␛").replace("\u202e", "�")
    assert runs["b"]["cause"] == text, "it is shown as it is, but for control characters"
    assert runs["a<b>&"]["samples"]["en-de"][0]["translation"] == text
    assert runs["b"]["status"] == "failed" and "Failed" not in page.partition("<script>")[0]


@pytest.mark.processes
@pytest.mark.skipif(not CHROMIUM, reason="no Chromium is installed: the page's script was not run")
def test_a_browser_draws_the_page(eleven: Path, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    page.write_text(page_of([eleven]), encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    flags += ["--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}"]
    flags += ["--window-size=1280,6000", "--virtual-time-budget=8000", "--enable-logging=stderr", "--dump-dom"]
    done = subprocess.run([CHROMIUM, *flags, page.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in done.stderr, "no error in its script, and nothing that the policy refused"
    drawn = done.stdout.count('data-drawn="yes"')
    assert drawn == done.stdout.count('role="img"') > 10
    assert done.stdout.count('class="sample"') == 6


def test_text_in_place_of_a_template_is_not_filled_in() -> None:
    page = fill_page("a {{DATA}} title", "report", "<p>{{SCRIPT}}</p>", {"runs": []})
    assert "a {{DATA}} title" in page and "<p>{{SCRIPT}}</p>" in page


def test_numbers_are_short_and_finite() -> None:
    assert printable({"a": [1.23456789, float("nan"), 7, True, None], "b\x07": "\x1b"}) == {
        "a": [1.2346, None, 7, True, None],
        "b␇": "␛",
    }

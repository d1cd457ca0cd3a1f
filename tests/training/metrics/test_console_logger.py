"""What the screen says of an update."""

from __future__ import annotations

import re

import pytest
from rich.console import Console

from moe_train.data.stage_progress import Progress
from moe_train.training.metrics.console_logger import ConsoleLogger, training_text
from tests.streams import Terminal


def test_what_found_no_expert_is_said() -> None:
    line = {"loss": 2.5, "lr": 1e-3, "words_per_second": 1234.0}
    assert training_text(line) == "loss 2.500, lr 1.00e-03, 1,234 words/s"
    assert training_text({**line, "exchange_dropped": 4224}).endswith("4,224 pairs beyond layout.fixed_rows")
    loads = {"load_max_over_mean": {"0": 1.5}, "dead_experts": 0, "dropped": 3, "dropped_fraction": 0.11}
    assert "load max/mean 1.50, dropped 11.0%" in training_text({**line, **loads})


def shown_lines(terminal: Terminal) -> list[str]:
    """Everything that stood on a line at some time, without colours and moves of the cursor."""
    return re.split(r"\s*[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.seen.decode()))


def train() -> None:
    """Two updates of a run of many, with all that a log line can have."""
    line = {"loss": 6.725, "ppl": 820.8, "lr": 3.5e-7, "words_per_second": 19486.0, "skipped": 3}
    loads = {"load_max_over_mean": {"0": 1.5}, "dead_experts": 18, "dropped": 3, "dropped_fraction": 0.11}
    loads |= {"load": {"0": [1 / 46] * 46 + [0.0] * 18}}
    with ConsoleLogger(100_000, 12_345, Console()) as display:
        for update in (12_346, 12_347):
            display.trained({"update": update, **line, **loads})
            display.advance(update)
            display.say(f"validation at update {update}")


@pytest.mark.processes
def test_a_terminal_of_80_columns_keeps_the_lines_and_shows_update_bar_and_time_left() -> None:
    terminal = Terminal(train)
    assert terminal.wait() == 0
    shown = shown_lines(terminal)
    for update in (12_346, 12_347):
        assert any(
            line.startswith(f"update {update}/100000: loss 6.725, ppl 820.80, lr 3.50e-07, 19,486 words/s")
            and line.endswith("skipped")
            for line in shown
        )
    bars = [line for line in shown if "━━━" in line]
    assert re.fullmatch(r"update +12347/100000 [━╸╺]{20,} \d:\d\d:\d\d left \d+:\d\d:\d\d", bars[-1])
    assert all(len(line) <= 80 and "…" not in line for line in bars)


def prepare() -> None:
    """A stage of a preparation with large numbers."""
    with Progress(Console()).stage("cleaning and de-duplicating", 10_000_000) as advance:
        for _ in range(2):
            advance(4_999_999)


@pytest.mark.processes
def test_a_preparation_fits_a_terminal_of_80_columns() -> None:
    terminal = Terminal(prepare)
    assert terminal.wait() == 0
    bars = [line for line in shown_lines(terminal) if "━━━" in line]
    assert re.fullmatch(r"cleaning and de-duplicating +━+ 9999998/9999998 \d:\d\d:\d\d \d:\d\d:\d\d", bars[-1])
    assert all(len(line) <= 80 and "…" not in line for line in bars)


def test_experts_without_tokens_are_counted_where_they_are() -> None:
    line = {"loss": 2.5, "lr": 1e-3, "words_per_second": 1234.0, "load_max_over_mean": {"0": 1.5}, "dropped": 0}
    loads = {
        "0": [0.5, 0.5, 0.0, 0.0],
        "1": [1.0, 0.0, 0.0, 0.0],
        "2": [0.3, 0.7, 0.0, 0.0],
        "10": [0.5, 0.5, 0.0, 0.0],
    }
    names = {0: "encoder layer 1", 1: "decoder layer 1", 2: "decoder layer 3"}
    said = training_text({**line, "load": loads, "dead_experts": 9}, names)
    assert said.endswith(
        "9 of 16 experts without tokens: decoder layer 1 (3), encoder layer 1 (2), decoder layer 3 (2), 1 more"
    )
    few = {"0": [0.5, 0.5], "7": [1.0, 0.0]}
    said = training_text({**line, "load": few, "dead_experts": 1}, names)
    assert said.endswith("1 of 4 experts without tokens: sparse block 7 (1)")


def test_images_are_counted_as_images() -> None:
    line = {"loss": 2.5, "lr": 1e-3, "words_per_second": 1234.0, "images_per_second": 1234.0}
    assert training_text(line) == "loss 2.500, lr 1.00e-03, 1,234 images/s"

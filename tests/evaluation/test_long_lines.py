"""Lines beyond the model's longest source: named by number, and cut into parts at sentence ends."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_train.config import SearchConfig
from moe_train.data.folder import DataFolder
from moe_train.evaluation.bleu_validation import make_bleu_validator
from moe_train.evaluation.inference.translate_stream import LineTranslator
from moe_train.evaluation.loading import LoadedRun, load_run
from moe_train.evaluation.long_lines import cut_note, join_parts, name_lines, sentence_parts
from moe_train.evaluation.translator import Translator
from tests.evaluation.runs import make_run

SEARCH = SearchConfig(beam=2, max_length_ratio=0.5, max_length_offset=5)


def test_lines_are_named() -> None:
    assert name_lines([7]) == "line 7" and name_lines([1, 2, 1234]) == "lines 1, 2 and 1,234"
    assert name_lines(range(1, 121)) == "lines 1, 2, 3, 4, 5, 6, 7, 8, 9, 10 … (120 in all)"
    assert cut_note([3], 40) == "line 3: cut to the model's 40 tokens, tag and end included"


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("One two. Three four! Five? Six", ["One two.", "Three four!", "Five? Six"]),
        ('He said: "No." She left… (Really.) Yes', ['He said: "No."', "She left…", "(Really.) Yes"]),
        ("今日は雨です。明日は晴れます！「はい。」そう", ["今日は雨です。明日は晴れます！", "「はい。」そう"]),
        ("एक दो। तीन चार। पाँच", ["एक दो।", "तीन चार। पाँच"]),
        ("v1.2.3 is at example.com now", ["v1.2.3 is at example.com now"]),
        ("no end to split at, however long it is", ["no end to split at, however long it is"]),
        ("   Short.   ", ["Short."]),
    ],
)
def test_parts_end_where_sentences_do(line: str, parts: list[str]) -> None:
    assert sentence_parts(line, lambda text: len(text) < 16) == parts


@given(st.text(alphabet="ab .!?。」…\"'\u00a0", max_size=60), st.integers(1, 20))
def test_parts_hold_the_line_and_are_no_longer_than_they_may_be(line: str, room: int) -> None:
    parts = sentence_parts(line, lambda text: len(text) <= room)
    assert "".join("".join(parts).split()) == "".join(line.split())
    assert all(part == part.strip() and part for part in parts)
    assert all(len(part) <= room or len(sentence_parts(part, lambda text: False)) == 1 for part in parts)


def test_parts_are_joined_as_their_script_does() -> None:
    assert (
        join_parts(["One.", "", "Two."]) == "One. Two."
        and join_parts(["今日。", "「明日。」", "はい"]) == "今日。「明日。」はい"
    )
    assert join_parts([]) == "" and join_parts(["alone"]) == "alone"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_data: DataFolder) -> LoadedRun:
    return load_run(make_run(tmp_path_factory.mktemp("run"), tiny_data))


SENTENCE = "Das Kind kauft das neue Buch am Abend."


def translated(run: LoadedRun, buffers: list[list[str]], split: bool) -> tuple[list[str], list[str]]:
    notes: list[str] = []
    translate = LineTranslator(Translator(run.task, run.model, SEARCH), "de", "en", notes.append, split)
    return [line for buffer in buffers for line in translate(buffer)], notes


def test_lines_that_are_cut_are_told_by_their_numbers_in_the_whole_input(run: LoadedRun) -> None:
    long = " ".join([SENTENCE] * 8)
    lines, notes = translated(run, [[SENTENCE, long, ""], [long, SENTENCE, long]], split=False)
    assert [bool(line) for line in lines] == [True, True, False, True, True, True]
    assert notes == [
        "line 2: cut to the model's 40 tokens, tag and end included; "
        "long_lines=split translates such lines in parts, at sentence ends",
        "lines 4 and 6: cut to the model's 40 tokens, tag and end included",
    ]
    assert translated(run, [[SENTENCE, ""]], split=False)[1] == []


def test_long_lines_are_translated_in_parts(run: LoadedRun) -> None:
    long = " ".join([SENTENCE] * 8)
    room = run.task.source_room("de-en")
    parts = sentence_parts(long, lambda text: len(run.task.folder.tokenizer().encode(text)) <= room)
    assert len(parts) > 2 and " ".join(parts) == long
    endless = " ".join(["Kind"] * 60)
    lines, notes = translated(run, [[SENTENCE, long, " ", endless]], split=True)
    whole = [t.text for t in Translator(run.task, run.model, SEARCH).translate([SENTENCE, *parts, endless], "de", "en")]
    assert lines == [whole[0], join_parts(whole[1:-1]), "", whole[-1]]
    assert notes == [
        "line 2: longer than the model's 40 tokens, translated in parts",
        "line 4: cut to the model's 40 tokens, tag and end included (no sentence end found)",
    ]


def test_bleu_of_validation_says_what_was_cut(
    run: LoadedRun, tiny_data: DataFolder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    raw = DataFolder(tiny_data.path, tiny_data.manifest)
    raw.raw = lambda split, direction: ([SENTENCE, " ".join([SENTENCE] * 8)], ["x", "y"])  # type: ignore[method-assign]
    make_bleu_validator(run.task, raw, SEARCH)
    assert "valid de-en, sources of BLEU, line 2: cut to the model's 40 tokens" in caplog.text

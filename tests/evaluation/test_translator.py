"""Batches by tokens, blank lines, uids, and loading of runs."""

from __future__ import annotations

import dataclasses
import itertools
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_train.config import SearchConfig
from moe_train.data.folder import DataFolder
from moe_train.errors import CheckpointError, ConfigError, DataError
from moe_train.evaluation.loading import LoadedRun, load_run, open_run
from moe_train.evaluation.translator import Translator, encode, length_batches, sentence_uid
from tests.evaluation.runs import make_run

SEARCH = SearchConfig(beam=2, max_length_ratio=0.5, max_length_offset=5)


@pytest.fixture(scope="module")
def run_path(tmp_path_factory: pytest.TempPathFactory, tiny_data: DataFolder) -> Path:
    return make_run(tmp_path_factory.mktemp("run"), tiny_data)


@pytest.fixture(scope="module")
def run(run_path: Path) -> LoadedRun:
    return load_run(run_path)


@given(st.lists(st.integers(1, 60), max_size=80), st.integers(1, 200))
def test_batches_hold_every_sentence_once_within_the_budget(lengths: list[int], budget: int) -> None:
    batches = length_batches(lengths, budget)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        padded = len(batch) * max(lengths[i] for i in batch)
        assert padded <= budget or len(batch) == 1
    flat = [lengths[i] for batch in batches for i in batch]
    assert flat == sorted(flat, reverse=True)
    for before, after in itertools.pairwise(batches):
        assert (len(before) + 1) * lengths[before[0]] > budget, f"{after} could begin earlier"


def test_uids_follow_from_the_text_and_fit_int64() -> None:
    uids = [sentence_uid(text) for text in ("a", "b", "a", "今日")]
    assert uids[0] == uids[2] and len(set(uids)) == 3
    assert all(0 <= uid < 2**63 for uid in uids)


def test_blank_lines_stay_blank_and_lines_stay_aligned(run: LoadedRun) -> None:
    translator = Translator(run.task, run.model, SEARCH)
    lines = ["Der Arzt mag frisches Brot heute.", "", "Das Kind kauft das neue Buch am Abend.", "   ", "ja"]
    done: list[int] = []
    found = translator.translate(lines, "de", "en", done.append)
    assert [bool(t.tokens) for t in found] == [True, False, True, False, True]
    assert found[1].text == found[3].text == ""
    assert sum(done) == 3
    alone = [translator.translate([line], "de", "en")[0] for line in lines]
    assert [t.text for t in alone] == [t.text for t in found]
    reverse = translator.translate(lines[::-1], "de", "en")[::-1]
    assert [t.text for t in reverse] == [t.text for t in found]


def test_no_lines_give_no_lines(run: LoadedRun) -> None:
    assert Translator(run.task, run.model, SEARCH).translate([], "de", "en") == []


def test_the_target_language_reaches_the_model(run: LoadedRun) -> None:
    translator = Translator(run.task, run.model, SEARCH)
    line = ["The doctor likes fresh bread today."]
    assert translator.translate(line, "en", "de") != translator.translate(line, "en", "ja")


def test_an_overlong_source_is_cut_and_named(run: LoadedRun) -> None:
    lines = ["", "Das Kind. " * 100, "Das Kind.", "Das Buch. " * 100]
    assert encode(run.task, lines, "de", "en", 4096).truncated == (1, 3)
    found = Translator(run.task, run.model, SEARCH).translate(lines, "de", "en")
    assert [translation.cut for translation in found] == [False, True, False, True] and found[1].tokens > 0


@pytest.mark.parametrize(("tag", "room"), [("target", 38), ("none", 39)])
def test_a_source_of_just_the_longest_is_not_cut(run: LoadedRun, tag: str, room: int) -> None:
    """Without a tag there is room for one more."""
    keys = {"source_tag": tag, "target_tag": "target"}
    run.task.with_config(task=dataclasses.replace(config := run.task.config.task, **keys))
    try:
        assert run.task.source_room("de-en") == room
        tries = ("Kind " * words + "a" * letters for words in range(40) for letters in range(1, 9))
        line = next(line for line in tries if _tokens(run, line) == room)
        sample = run.task.inference_sample([run.task.folder.tokenizer().encode(line)], "de", "en", [1])
        assert int(sample["net_input"]["src_lengths"][0]) == 40
        assert encode(run.task, [line, f"{line} Kind"], "de", "en", 4096).truncated == (1,)
    finally:
        run.task.with_config(task=config)


def _tokens(run: LoadedRun, line: str) -> int:
    return len(run.task.folder.tokenizer().encode(line))


def test_a_piece_that_ends_a_line_does_not_break_alignment(run: LoadedRun) -> None:
    translator = Translator(run.task, run.model, SEARCH)
    line_feed = run.task.dictionary.index("<0x0A>")
    assert line_feed != run.task.dictionary.unk()
    with torch.no_grad():
        weight = run.model.decoder.output.weight
        kept = weight.clone()
        weight[:] = 0.0
        weight[line_feed] = run.model.decoder.output.weight.new_ones(weight.shape[1])
        try:
            found = translator.translate(["Das Kind kauft das neue Buch."], "de", "en")
        finally:
            weight.copy_(kept)
    assert "\n" not in found[0].text


@pytest.mark.parametrize(
    ("which", "name"), [("best", "step_5"), ("last", "step_9"), (5, "step_5"), ("step_9", "step_9")]
)
def test_checkpoints_by_name(run_path: Path, which: str | int, name: str) -> None:
    assert open_run(run_path, which).checkpoint.name == name


def test_weights_are_those_of_the_checkpoint(run_path: Path) -> None:
    best, last = load_run(run_path, "best"), load_run(run_path, "last")
    ratio = last.model.decoder.output.weight[2] / best.model.decoder.output.weight[2]
    torch.testing.assert_close(ratio, torch.full_like(ratio, 0.5))
    assert not best.model.training


def test_a_run_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no run folder"):
        load_run(tmp_path)


def test_a_missing_checkpoint_names_those_there_are(run_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"step_5, step_9"):
        load_run(run_path, "averaged")


def test_an_altered_checkpoint_is_refused(run_path: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run_path, tmp_path / "copy", symlinks=True)
    weights = next((copy / "checkpoints" / "step_5").glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(CheckpointError, match=weights.name):
        load_run(copy, "best")


def test_data_that_has_moved(run_path: Path, tmp_path: Path, tiny_data: DataFolder) -> None:
    copy = shutil.copytree(run_path, tmp_path / "copy", symlinks=True)
    config = (copy / "config.json").read_text()
    (copy / "config.json").write_text(config.replace(str(tiny_data.path), "/nowhere/data"))
    with pytest.raises(DataError, match="data=FOLDER"):
        load_run(copy)
    assert load_run(copy, data=tiny_data.path).data.path == tiny_data.path

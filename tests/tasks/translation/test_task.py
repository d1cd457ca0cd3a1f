"""Samples, tags, numbers of sentences, validation sets: against a sentence-by-sentence reading of the files."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import numpy as np
import pytest
import torch

from moe_train.config import TaskConfig
from moe_train.data.batching import split_micro_batch
from moe_train.data.folder import DataFolder
from moe_train.errors import DataError
from moe_train.tasks import build_task
from moe_train.tasks.indexed_dataset import SentenceFile
from moe_train.tasks.translation.parallel_text import shifted
from moe_train.tasks.translation.task import TranslationTask
from moe_train.training.checkpoint.run_state import RunState
from tests.tasks.helpers import make_task


def stored(folder: DataFolder, split: str, direction: str) -> list[tuple[list[int], list[int]]]:
    """Every pair of a direction, read with fairseq's own dataset."""
    from fairseq.data.indexed_dataset import MMapIndexedDataset

    files = folder.pair_files(split, direction)
    source, target = MMapIndexedDataset(str(files.source)), MMapIndexedDataset(str(files.target))
    return [(source[i].tolist(), target[i].tolist()) for i in range(len(source))]


def unpadded(row: torch.Tensor) -> list[int]:
    return [int(i) for i in row if i != 1]


@pytest.mark.parametrize(
    ("source_tag", "target_tag"),
    [("source", "target"), ("target", "target"), ("none", "target"), ("target", "none"), ("target", "source")],
)
def test_a_sample_holds_the_stored_sentences_with_their_tags(
    tiny_data: DataFolder, source_tag: str, target_tag: str
) -> None:
    task = make_task(tiny_data, TaskConfig(source_tag=source_tag, target_tag=target_tag))  # type: ignore[arg-type]
    text, dictionary = task.split("train"), task.dictionary
    indices = np.random.default_rng(0).permutation(len(text))[:50]
    sample = text.sample(indices)
    bounds = np.cumsum([0, *text.sizes])
    tokens = 0
    for row, index in enumerate(indices):
        number = int(np.searchsorted(bounds, index, side="right")) - 1
        name = text.directions[number].name
        source, target = stored(tiny_data, "train", name)[index - bounds[number]]
        languages = dict(zip(("source", "target"), name.split("-"), strict=True))
        tag = {side: dictionary.index(f"__{language}__") for side, language in languages.items()}
        front = [] if source_tag == "none" else [tag[source_tag]]
        first = dictionary.eos() if target_tag == "none" else tag[target_tag]
        net_input = sample["net_input"]
        assert unpadded(net_input["src_tokens"][row]) == front + source
        assert net_input["src_lengths"][row] == len(front) + len(source) == text.source_lengths[index]
        assert unpadded(sample["target"][row]) == target
        assert unpadded(net_input["prev_output_tokens"][row]) == [first, *target[:-1]]
        assert task.decoder_prefix(name) == first
        assert tiny_data.languages[net_input["src_lang"][row]] == languages["source"]
        assert tiny_data.languages[net_input["tgt_lang"][row]] == languages["target"]
        tokens += len(target)
    assert sample["ntokens"] == sample["real_targets"] == tokens and sample["nsentences"] == 50
    inputs = (sample["net_input"][name] for name in ("src_tokens", "prev_output_tokens"))
    assert sample["real_tokens"] == [int(ids.ne(dictionary.pad()).sum()) for ids in inputs]
    assert sample["id"].tolist() == indices.tolist()


@pytest.mark.parametrize("source_place", ["start", "end"])
def test_tags_behind_the_source_and_after_the_end_symbol(tiny_data: DataFolder, source_place: Any) -> None:
    keys = TaskConfig(
        source_tag="source", target_tag="target", source_tag_place=source_place, target_tag_place="after_end"
    )
    task, plain = make_task(tiny_data, keys), make_task(tiny_data, TaskConfig(source_tag="none", target_tag="target"))
    text, end = task.split("train"), task.dictionary.eos()
    indices = np.random.default_rng(0).permutation(len(text))[:40]
    sample, bare = text.sample(indices), plain.split("train").sample(indices)
    for row, index in enumerate(indices):
        name = text.directions[int(np.searchsorted(np.cumsum(text.sizes), index, side="right"))].name
        source, target = (task.dictionary.index(f"__{language}__") for language in name.split("-"))
        expected = unpadded(bare["net_input"]["src_tokens"][row])
        expected = [*expected, source] if source_place == "end" else [source, *expected]
        assert unpadded(sample["net_input"]["src_tokens"][row]) == expected
        sentence = unpadded(bare["target"][row])
        assert unpadded(sample["target"][row]) == [target, *sentence]
        assert unpadded(sample["net_input"]["prev_output_tokens"][row]) == [end, target, *sentence[:-1]]
        request = task.inference_sample([sentence[:3]], *name.split("-"), [0])["net_input"]
        assert request["prev_output_tokens"].tolist() == [[end, target]]
        assert request["src_tokens"][0].tolist().index(source) == (4 if source_place == "end" else 0)
    assert task.inference_sample([], "en", "de", [])["net_input"]["prev_output_tokens"].shape == (0, 2)
    assert sample["ntokens"] == bare["ntokens"] + 40 == int(sample["target"].ne(1).sum())


def test_padding_is_right_and_the_sample_is_no_wider_than_its_longest(tiny_data: DataFolder) -> None:
    sample = make_task(tiny_data).train_sample(np.arange(0, 1000, 7))
    for tokens in (sample["target"], sample["net_input"]["src_tokens"], sample["net_input"]["prev_output_tokens"]):
        real = tokens.ne(1)
        assert (real.long().diff(dim=1) <= 0).all() and real[:, 0].all()
        assert real.any(0).all()


def test_the_parts_of_a_micro_batch_hold_the_rows_of_the_whole(tiny_data: DataFolder) -> None:
    task = make_task(tiny_data)
    batch = task.train_batches().update(3).micro_batches[0]
    whole = task.train_sample(batch)
    for rank in range(3):
        part = task.train_sample(split_micro_batch(batch, rank, 3))
        assert part["net_input"]["sentence_uid"].tolist() == whole["net_input"]["sentence_uid"][rank::3].tolist()
        width = part["target"].shape[1]
        assert torch.equal(part["target"], whole["target"][rank::3, :width])


def test_no_rows_give_empty_tensors_of_one_column(tiny_data: DataFolder) -> None:
    sample = make_task(tiny_data).train_sample(np.empty(0, np.int64))
    assert sample["ntokens"] == sample["nsentences"] == 0
    shapes = {name: tuple(value.shape) for name, value in sample["net_input"].items()}
    assert shapes["src_tokens"] == shapes["prev_output_tokens"] == tuple(sample["target"].shape) == (0, 1)
    assert all(value.dtype == torch.int64 for value in sample["net_input"].values())


def test_a_sentence_keeps_its_number_whichever_directions_are_trained(tiny_data: DataFolder) -> None:
    everything = make_task(tiny_data).split("train")
    names = [d.name for d in everything.directions]
    alone = make_task(tiny_data, TaskConfig(directions=("fr-en",))).train_sample(np.arange(5))
    start = sum(everything.sizes[: names.index("fr-en")])
    same = everything.sample(np.arange(start, start + 5))
    assert torch.equal(alone["net_input"]["sentence_uid"], same["net_input"]["sentence_uid"])
    assert torch.equal(alone["net_input"]["src_tokens"], same["net_input"]["src_tokens"])
    uids = everything.sample(np.arange(len(everything)))["net_input"]["sentence_uid"]
    assert len(set(uids.tolist())) == len(everything)


def test_a_pair_stored_once_serves_both_directions(tiny_data: DataFolder) -> None:
    text = make_task(tiny_data, TaskConfig(directions=("en-de", "de-en"))).split("train")
    one, other = text.directions
    assert one.source is other.target and one.target is other.source
    assert len(text) == 2 * len(one)


def test_typed_text_becomes_what_training_saw(tiny_data: DataFolder) -> None:
    task = make_task(tiny_data, TaskConfig(source_tag="source", target_tag="target"))
    source, _ = tiny_data.raw("valid", "en-de")
    [files] = [d for d in task.split("valid").directions if d.name == "en-de"]
    encoded = task.encode_source(source, "en", "de")
    tag = task.dictionary.index("__en__")
    assert [e.tolist() for e in encoded] == [[tag, *files.source.sentence(i)] for i in range(len(source))]
    tokenizer = tiny_data.tokenizer()
    sample = task.inference_sample([tokenizer.encode(line) for line in source], "en", "de", range(len(source)))
    trained = task.validation_sample("en-de", np.arange(len(source)))
    for name in ("src_tokens", "src_lengths", "src_lang", "tgt_lang"):
        assert torch.equal(sample["net_input"][name], trained["net_input"][name]), name
    assert torch.equal(sample["net_input"]["prev_output_tokens"], trained["net_input"]["prev_output_tokens"][:, :1])


def test_text_longer_than_the_model_loses_its_tail_but_not_its_end(tiny_data: DataFolder) -> None:
    task = make_task(tiny_data)
    [long] = task.encode_source(["the teacher sees a red apple " * 100], "en", "de")
    assert len(long) == task.config.model.max_positions
    assert long[0] == task.dictionary.index("__de__") and long[-1] == task.dictionary.eos()


def test_validation_sets_hold_each_sentence_once_and_obey_the_limit(tiny_data: DataFolder) -> None:
    task = make_task(tiny_data)
    sets = task.validation_sets()
    assert set(sets) == set(tiny_data.directions)
    for name, batches in sets.items():
        assert sorted(np.concatenate(batches).tolist()) == list(range(20)), name
        for batch in batches:
            target = task.validation_sample(name, batch)["target"]
            assert target.numel() <= task.config.training.tokens_per_update
    few = make_task(tiny_data, validation=type(task.config.training.validation)(max_sentences=7)).validation_sets()
    assert all(sorted(np.concatenate(batches).tolist()) == list(range(7)) for batches in few.values())


def test_validation_sentences_that_the_model_cannot_hold_are_counted(
    tiny_data: DataFolder, caplog: pytest.LogCaptureFixture
) -> None:
    task = make_task(tiny_data)
    text = task.split("valid")
    longest = int(np.maximum(text.source_lengths, text.target_lengths).max())
    task.with_config(model=dataclasses.replace(task.config.model, max_positions=longest - 1))
    held = sum(len(batch) for batches in task.validation_sets().values() for batch in batches)
    assert held < len(text) and "left out" in caplog.text


def test_token_frequencies_count_text_tags_and_ends(tiny_data: DataFolder) -> None:
    task = make_task(tiny_data, TaskConfig(source_tag="target", target_tag="target"))
    frequency = task.token_frequency()
    counts = torch.zeros(len(task.dictionary), dtype=torch.float64)
    for name in task.directions:
        for pair in stored(tiny_data, "train", name):
            for ids in pair:
                counts += torch.bincount(torch.tensor(ids), minlength=len(counts))
        counts[task.tags(name).source] += 200  # type: ignore[index]
        counts[task.tags(name).first] += 200
    # both directions of every pair are trained, so each piece is used twice as often as it is stored
    pieces = slice(task.dictionary.nspecial, len(counts) - len(tiny_data.languages) - 1)
    assert torch.equal(2 * frequency[pieces], counts[pieces])
    tags = [task.dictionary.index(f"__{language}__") for language in tiny_data.languages]
    assert torch.equal(2 * frequency[tags], counts[tags])
    # English serves three pairs; the stored end of the decoder's input is replaced by the tag
    assert frequency[task.dictionary.eos()] == 600 and frequency[task.dictionary.pad()] == 0


def test_a_corpus_beyond_a_window_is_planned_in_windows_unless_its_run_began_before(tiny_data: DataFolder) -> None:
    task = make_task(tiny_data, max_sentence_tokens=24, shuffle_window=100)
    windows, text = task.train_batches(), task.split("train")
    items = np.concatenate([b for u in range(windows.updates_per_epoch) for b in windows.update(u).micro_batches])
    kept = np.maximum(text.source_lengths, text.target_lengths) <= 24
    assert sorted(items.tolist()) == np.flatnonzero(kept).tolist()
    assert sum(windows.left_out.values()) == (~kept).sum()
    task.plan_version = RunState.from_json({"update": 3}).plan_version  # a run that does not record it
    whole = make_task(tiny_data, max_sentence_tokens=24, shuffle_window=len(text)).train_batches()
    for u in (0, 5):
        planned = zip(task.train_batches().update(u).micro_batches, whole.update(u).micro_batches, strict=True)
        assert all(old.tolist() == new.tolist() for old, new in planned)


def test_training_sentences_beyond_the_limit_are_counted(tiny_data: DataFolder) -> None:
    batches = make_task(tiny_data, max_sentence_tokens=24).train_batches()
    text = make_task(tiny_data).split("train")
    longer = np.maximum(text.source_lengths, text.target_lengths) > 24
    assert 0 < sum(batches.left_out.values()) == longer.sum()
    assert list(batches.left_out) == [d.name for d in text.directions]


def test_an_unknown_direction_or_language_is_named(tiny_data: DataFolder) -> None:
    with pytest.raises(DataError, match=r"no direction 'en-dee'.*'en-de'"):
        make_task(tiny_data, TaskConfig(directions=("en-dee",)))
    with pytest.raises(DataError, match=r"no language 'pt'.*de, en, fr, ja"):
        make_task(tiny_data).decoder_prefix("en-pt")


def test_zero_shot_directions_have_tags(tiny_data: DataFolder) -> None:
    task = make_task(tiny_data, TaskConfig(target_tag="target"))
    assert task.decoder_prefix("de-fr") == task.dictionary.index("__fr__")


def test_the_registry_builds_the_task(tiny_data: DataFolder) -> None:
    task = build_task(make_task(tiny_data).config, tiny_data)
    assert isinstance(task, TranslationTask)


def test_shifted_keeps_the_longest_row_whole() -> None:
    target = np.array([[5, 6, 2], [7, 2, 1], [2, 1, 1]])
    previous = shifted(target, np.array([3, 2, 1]), np.array([9, 2, 9]), pad=1)
    assert previous.tolist() == [[9, 5, 6], [2, 7, 1], [9, 1, 1]]


def test_a_file_read_by_gathers_equals_fairseqs_own_reading(tiny_data: DataFolder) -> None:
    from fairseq.data.indexed_dataset import MMapIndexedDataset

    prefix = tiny_data.pair_files("train", "en-ja").target
    file, theirs = SentenceFile(prefix), MMapIndexedDataset(str(prefix))
    assert len(file) == len(theirs) == 200
    assert all(file.sentence(i).tolist() == theirs[i].tolist() for i in range(len(file)))


def test_collating_costs_far_less_than_training(tiny_data: DataFolder) -> None:
    """The ratio on this machine, not seconds: one update's batch against one forward and backward of a tiny model."""
    task = make_task(tiny_data, tokens_per_update=4096)
    batches = task.train_batches()
    model, criterion = task.build_model().train(), task.build_criterion()
    sample = task.train_sample(batches.update(0).micro_batches[0])

    def train() -> None:
        criterion(model, sample)[0].backward()

    def collate() -> None:
        task.train_sample(batches.update(0).micro_batches[0])

    def fastest(function: object) -> float:
        times = []
        for _ in range(5):
            start = time.perf_counter()
            function()  # type: ignore[operator]
            times.append(time.perf_counter() - start)
        return min(times)

    assert fastest(collate) < 0.1 * fastest(train)

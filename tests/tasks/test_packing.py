"""Sentences packed into blocks: which tokens, in which order, and what that leaves of the language model's promises."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_train.config import TrainingConfig
from moe_train.data.folder import DataFolder
from moe_train.tasks.lm import LanguageModelTask
from moe_train.tasks.packing import pack
from tests.commands.test_train import here
from tests.data.test_mono import mono
from tests.tasks.test_lm import LM, make_task
from tests.training.toy_run import assert_same_bits, final_tensors

__all__ = ["mono"]  # the fixture


@given(sizes=st.lists(st.integers(1, 60), max_size=80), room=st.integers(1, 25))
def test_blocks_are_the_file_in_order_and_cut_only_what_is_longer(sizes: list[int], room: int) -> None:
    lengths = np.array(sizes, np.int64)
    starts, blocks, numbers = pack(lengths, room)
    ends = starts + blocks
    assert starts.tolist() == [0, *ends[:-1].tolist()][: len(starts)] and blocks.sum() == lengths.sum()
    assert (blocks >= 1).all() and (blocks <= room).all() and len(set(numbers.tolist())) == len(numbers)
    sentence_starts = np.cumsum(lengths) - lengths
    holder = np.searchsorted(sentence_starts, starts, side="right") - 1  # the sentence in which each block begins
    inside = starts > sentence_starts[holder]
    assert (lengths[holder[inside]] > room).all()
    assert np.array_equal(numbers[~inside], holder[~inside]) and (numbers[inside] >= len(sizes)).all()
    for end, block, following in zip(ends[:-1], blocks[:-1], holder[1:], strict=True):
        size = lengths[following]
        assert block + (size if size <= room else min(max(1, room // 8), sum(sizes) - end)) > room


def packed(folder: DataFolder, tokens: int, **task: object) -> LanguageModelTask:
    whole = make_task(folder, pack=True, **task)
    training = TrainingConfig(tokens_per_update=512, max_sentence_tokens=tokens)
    return LanguageModelTask(dataclasses.replace(whole.config, training=training), folder)


@pytest.mark.parametrize("tokens", [64, 12])
def test_a_language_s_blocks_are_its_sentences_one_behind_the_other(mono: DataFolder, tokens: int) -> None:
    task, single = packed(mono, tokens), make_task(mono)
    for split in ("train", "valid"):
        blocks, sentences = task.split(split), single.split(split)
        assert blocks.names == sentences.names and blocks.lengths.max() <= tokens
        for name in blocks.names:
            table, uids, languages = blocks.tokens(blocks.items(name))
            assert (table[:, 0] == task.dictionary.bos()).all() and len(set(uids.tolist())) == len(uids)
            assert (languages == mono.languages.index(name)).all()
            alone = sentences.tokens(sentences.items(name))[0]
            joined, apart = (rows[:, 1:][rows[:, 1:] != blocks.pad] for rows in (table, alone))
            assert joined.tolist() == apart.tolist()
    if tokens == 64:
        filled = task.split("train").lengths
        assert filled.mean() > 0.8 * tokens and len(filled) < 0.5 * len(single.split("train"))
    assert not any(task.train_batches().left_out.values())


def test_a_sentence_alone_in_its_block_is_masked_as_it_is_unpacked(mono: DataFolder) -> None:
    longest = int(make_task(mono).split("train").lengths.max())
    task, single = packed(mono, longest), make_task(mono)
    blocks, sentences = task.split("train"), single.split("train")
    everything = np.arange(len(blocks))
    table, uids, _ = blocks.tokens(everything)
    ends = (table == task.dictionary.eos()).sum(axis=1)
    alone = everything[ends == 1]
    assert len(alone) >= 5
    number = {int(uid): item for item, uid in enumerate(sentences.tokens(np.arange(len(sentences)))[1])}
    same = np.array([number[int(uids[block])] for block in alone])
    ours, theirs = task.train_sample(alone, 3), single.train_sample(same, 3)
    for one, other in (
        (ours["target"], theirs["target"]),
        (ours["net_input"]["src_tokens"], theirs["net_input"]["src_tokens"]),
    ):
        assert torch.equal(one, other)


def test_losses_and_perplexities_are_of_masked_tokens(mono: DataFolder) -> None:
    task = packed(mono, 64, mask_probability=0.15)
    text = task.split("train")
    sample = task.train_sample(np.arange(len(text)), 2)
    target = sample["target"]
    asked = target != text.pad
    pieces = (text.lengths - 1).sum() - len(make_task(mono).split("train"))  # neither beginnings nor ends
    assert sample["ntokens"] == asked.sum() and float(asked.sum()) / pieces == pytest.approx(0.15, abs=0.02)
    assert sample["real_targets"] == asked.sum()
    assert sample["real_tokens"] == [int((sample["net_input"]["src_tokens"] != text.pad).sum())]
    assert not np.isin(target[asked], [task.dictionary.eos(), task.dictionary.bos()]).any()
    model, criterion = task.build_model().eval(), task.build_criterion()
    criterion.eps = 0.0
    with torch.no_grad():
        _, size, logging = criterion(model, sample)
        logits = model(**sample["net_input"])[0]
    expected = torch.nn.functional.cross_entropy(logits[asked], target[asked], reduction="sum")
    assert size == sample["ntokens"] and float(logging["nll_loss"]) == pytest.approx(float(expected), rel=1e-4)


def test_pairs_of_the_translation_lm_are_not_packed(tiny_data: DataFolder) -> None:
    task, single = packed(tiny_data, 64, translation_lm=True), make_task(tiny_data, translation_lm=True)
    assert task.split("train").names == single.split("train").names
    for name, blocks, sentences in zip(
        single.split("train").names, task.split("train").sizes, single.split("train").sizes, strict=True
    ):
        assert blocks == sentences if "-" in name else blocks < sentences


@pytest.mark.processes
def test_moe_train_on_blocks_of_single_languages_resumes_bit_for_bit(mono: DataFolder, tmp_path: Path) -> None:
    words = [*LM, f"data={mono.path}", "task.pack=true", "training.max_sentence_tokens=64"]
    for run, counts in (("whole", (20,)), ("halves", (10, 20))):
        for updates in counts:
            more = [f"hydra.run.dir={tmp_path / run}", f"training.max_updates={updates}"]
            assert here([*words, *more], tmp_path) == (0, "")
    assert_same_bits(final_tensors(tmp_path / "whole"), final_tensors(tmp_path / "halves"))
    last = json.loads((tmp_path / "whole" / "valid.jsonl").read_text().splitlines()[-1])
    assert set(last["directions"]) == {"de", "en", "ja"} and last["ppl"] > 1
    code, said = here([*words, f"hydra.run.dir={tmp_path / 'whole'}", "task.pack=false"], tmp_path)
    assert code == 2 and "task.pack=true then, false now" in said.replace("\n", " ")

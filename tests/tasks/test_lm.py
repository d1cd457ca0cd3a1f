"""Cross-lingual language modelling: which text, which masks, and moe-train from scratch to zero-shot scores."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from moe_train.commands.evaluate import main as evaluate_main
from moe_train.config import LanguageModelConfig, RunConfig, TrainingConfig, build
from moe_train.config.evaluation import EvaluateConfig, ExportConfig
from moe_train.data.batching import split_micro_batch
from moe_train.data.folder import DataFolder
from moe_train.data.labelled import LabelledTexts
from moe_train.data.text.pairs import tag
from moe_train.errors import ConfigError, DataError
from moe_train.evaluation.export_model import export_run
from moe_train.evaluation.measure_task import evaluate_task, show_measures
from moe_train.tasks.classification import ClassificationTask
from moe_train.tasks.lm import LanguageModelTask
from tests.commands.test_train import here
from tests.models.test_encoder import SMALL
from tests.training.toy_run import assert_same_bits, final_tensors

MODEL = {**SMALL, "max_positions": 128}


def make_task(
    folder: DataFolder, routing: dict[str, Any] | None = None, seed: int = 1, **task: Any
) -> LanguageModelTask:
    mapping = {
        "data": str(folder.path), "model": MODEL, "seed": seed, "task": {"name": "cross_lingual_lm", **task},
        "routing": routing or {"name": "switch", "num_experts": 4},
    }  # fmt: skip
    config = build(RunConfig, mapping)
    return LanguageModelTask(dataclasses.replace(config, training=TrainingConfig(tokens_per_update=512)), folder)


def test_a_language_s_text_is_its_sides_of_all_pairs_once(tiny_data: DataFolder) -> None:
    text = make_task(tiny_data).split("train")
    counts = tiny_data.manifest.counts["train"]
    assert text.names == ["de", "en", "fr", "ja"]
    assert dict(zip(text.names, text.sizes, strict=True))["en"] == sum(counts.values())
    de = text.items("de")
    tokens, uids, languages = text.tokens(de[:3])
    stored = next(pair for pair in counts if "de" in pair)
    direction = tiny_data.pair_files("train", "en-de")
    from moe_train.tasks.indexed_dataset import SentenceFile

    file = SentenceFile(direction.target)
    for row in range(3):
        sentence = file.sentence(row)
        assert tokens[row, : len(sentence) + 1].tolist() == [0, *sentence.tolist()]
    assert stored and (languages == tiny_data.languages.index("de")).all() and len(set(uids.tolist())) == 3
    everyone = text.tokens(np.arange(len(text)))[1]
    assert len(set(everyone.tolist())) == len(text)


def test_languages_and_sides_can_be_chosen(tiny_data: DataFolder) -> None:
    assert make_task(tiny_data, languages=["de", "ja"]).split("train").names == ["de", "ja"]
    assert make_task(tiny_data, languages=["deu_Latn", "jpn"]).split("train").names == ["de", "ja"]
    with pytest.raises(DataError, match="no language 'dee'"):
        make_task(tiny_data, languages=["dee"]).check_data()
    one_way = DataFolder(
        tiny_data.path, dataclasses.replace(tiny_data.manifest, directions=("en-de", "en-fr", "en-ja"))
    )
    assert make_task(one_way, sides="target").split("train").names == ["de", "fr", "ja"]
    assert make_task(one_way, sides="source").split("train").names == ["en"]


def test_pairs_of_the_translation_lm(tiny_data: DataFolder) -> None:
    task = make_task(tiny_data, translation_lm=True)
    text = task.split("train")
    (pair,) = [name for name in text.names if "-" in name and "de" in name]
    items = text.items(pair)[:20]
    tokens, _, languages = text.tokens(items)
    first, second = pair.split("-")
    assert (languages == [tiny_data.languages.index(first), tiny_data.languages.index(second)]).all()
    sides = [text.tokens(text.items(name))[0] for name in (first, second)]
    rows = {tuple(row[row != text.pad][1:]) for row in sides[0]}
    others = {tuple(row[row != text.pad][1:]) for row in sides[1]}
    for row in tokens:
        real = row[row != text.pad]
        ends = np.flatnonzero(real == task.dictionary.eos())
        assert len(ends) == 2 and ends[1] == len(real) - 1
        assert tuple(real[1 : ends[0] + 1]) in rows and tuple(real[ends[0] + 1 :]) in others
    assert not [name for name in task.split("valid").names if "-" in name]


def test_masks_follow_seed_update_and_sentence(tiny_data: DataFolder) -> None:
    task = make_task(tiny_data)
    whole = np.arange(0, 700, 3)
    sample = task.train_sample(whole, 5)
    for rank in range(3):
        part = task.train_sample(split_micro_batch(whole, rank, 3), 5)
        width = part["target"].shape[1]
        assert torch.equal(part["target"], sample["target"][rank::3, :width])
        assert torch.equal(part["net_input"]["src_tokens"], sample["net_input"]["src_tokens"][rank::3, :width])
    assert not torch.equal(task.train_sample(whole, 6)["target"], sample["target"])
    assert not torch.equal(make_task(tiny_data, seed=2).train_sample(whole, 5)["target"], sample["target"])
    held = [make_task(tiny_data, seed=seed).validation_sample("de", np.arange(10)) for seed in (1, 2)]
    assert torch.equal(held[0]["target"], held[1]["target"])
    empty = task.train_sample(whole[:0], 5)
    assert empty["ntokens"] == 0 and empty["target"].shape == (0, 1)


def test_what_is_masked_and_by_what(tiny_data: DataFolder) -> None:
    task = make_task(tiny_data, mask_probability=0.3)
    text, entries = task.split("train"), task.dictionary
    items = np.arange(len(text))
    plain, uids, _ = text.tokens(items)
    seen, target = task.masking.apply(plain, uids, seed=1, update=4)
    asked = target != text.pad
    assert (target[asked] == plain[asked]).all() and (seen[~asked] == plain[~asked]).all()
    special = np.isin(plain, [entries.bos(), entries.eos(), entries.pad()])
    assert not (asked & special).any() and asked.any(axis=1).all()
    pieces = (~special).sum()
    assert asked.sum() / pieces == pytest.approx(0.3, abs=0.02)
    masked = seen[asked] == entries.index("<mask>")
    kept = seen[asked] == plain[asked]
    assert masked.mean() == pytest.approx(0.8, abs=0.02) and kept.mean() == pytest.approx(0.1, abs=0.02)
    random = seen[asked][~masked & ~kept]
    tags = {entries.index(tag(language)) for language in tiny_data.languages}
    assert random.min() >= entries.nspecial and not tags & set(random.tolist()) and len(set(random.tolist())) > 50


def test_languages_are_balanced_by_the_exponent(tiny_data: DataFolder) -> None:
    shares = {}
    for exponent in (1.0, 0.5):
        task = make_task(tiny_data, exponent=exponent)
        batches, text = task.train_batches(), task.split("train")
        items = np.concatenate([b for u in range(batches.updates_per_epoch) for b in batches.update(u).micro_batches])
        first = np.cumsum([0, *text.sizes])
        counts = np.bincount(np.searchsorted(first, items, side="right") - 1, minlength=len(text.names))
        shares[exponent] = counts / counts.sum()
    sizes = np.array(text.sizes, float)
    for exponent, found in shares.items():
        assert found == pytest.approx(sizes**exponent / (sizes**exponent).sum(), abs=0.02)
    with pytest.raises(ConfigError, match=r"task\.exponent"):
        config = dataclasses.replace(task.config, training=TrainingConfig(temperature=2.0))
        LanguageModelTask(config, tiny_data)


def test_the_config_s_own_checks() -> None:
    with pytest.raises(ConfigError, match="more than 1"):
        LanguageModelConfig(mask_share=0.9, random_share=0.2)


SHAPE = ["model.embed_dim=32", "model.ffn_dim=64", "model.num_heads=2", "model.encoder_layers=2", "training.threads=1"]
XMOE = ["routing=xmoe", "routing.num_experts=4", "routing.expert_sublayers=2", "model.sparse_layers=insert_after:1"]
LM = [
    *("task=cross_lingual_lm", "model=encoder_tiny", *SHAPE, *XMOE, "training.tokens_per_update=600"),
    *("training.accumulation=2", "training.optimizer.lr=0.01", "training.schedule.name=constant"),
    *("training.schedule.warmup_updates=5", "training.log_every=10", "training.checkpoint.every_updates=10"),
    *("training.validation.every_updates=20", "training.validation.max_sentences=20"),
]


@pytest.fixture(scope="module")
def pretrained(tiny_data: DataFolder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained masked language model with X-MoE's placement."""
    folder = tmp_path_factory.mktemp("lm")
    words = [f"data={tiny_data.path}", f"hydra.run.dir={folder / 'whole'}", "training.max_updates=40"]
    assert here([*LM, *words], folder)[0] == 0
    return folder / "whole"


def evaluated(run: Path, split: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr("sys.argv", ["moe-evaluate", f"run={run}", f"split={split}", f"hydra.run.dir={run / 'e'}"])
    evaluate_main()
    content: dict[str, Any] = json.loads((run / f"{split}.json").read_text())
    return content


@pytest.mark.processes
def test_moe_train_learns_to_fill_masks_and_resumes_bit_for_bit(
    pretrained: Path, tiny_data: DataFolder, tmp_path: Path
) -> None:
    lines = [json.loads(line) for line in (pretrained / "valid.jsonl").read_text().splitlines()]
    assert set(lines[-1]["directions"]) == {"de", "en", "fr", "ja"}
    assert lines[0]["ppl"] < 300 and lines[-1]["ppl"] < 0.85 * lines[0]["ppl"]
    assert all(entry["ppl"] > 1 for entry in lines[-1]["directions"].values())
    for updates in (20, 40):
        words = [f"data={tiny_data.path}", f"hydra.run.dir={tmp_path}", f"training.max_updates={updates}"]
        assert here([*LM, *words], tmp_path)[0] == 0
    assert_same_bits(final_tensors(pretrained), final_tensors(tmp_path))


@pytest.mark.processes
def test_perplexity_by_language_and_load_by_language(pretrained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = evaluated(pretrained, "valid", monkeypatch)
    assert set(content["sets"]) == {"de", "en", "fr", "ja"} and content["task"] == "cross_lingual_lm"
    for name in content["sets"]:
        (load,) = content["routing"][name]["load"].values()
        assert len(load) == 4 and sum(load) == pytest.approx(1.0)
    last = json.loads((pretrained / "valid.jsonl").read_text().splitlines()[-1])
    assert content["average"]["ppl"] > 1 and content["items"] >= last["sentences"]


@pytest.mark.processes
def test_a_quick_look_at_measures_leaves_the_whole_ones_alone(pretrained: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(pretrained, tmp_path / "run", symlinks=True))
    whole = evaluate_task(EvaluateConfig(str(run), "valid"))
    before = (run / "valid.json").read_bytes()
    few = [evaluate_task(EvaluateConfig(str(run), "valid", max_sentences=limit)) for limit in (3, 2)]
    assert (run / "valid.json").read_bytes() == before
    assert [entry["items"] for entry in few] == [12, 8] and whole["items"] > 12
    for limit, entry in zip((3, 2), few, strict=True):
        assert json.loads((run / f"valid.first-{limit}.json").read_text())["sets"] == entry["sets"]
    again = evaluate_task(EvaluateConfig(str(run), "valid"))
    assert again["sets"] == whole["sets"] and not again["notes"], "the same settings write the same file"
    other = evaluate_task(EvaluateConfig(str(run), "valid", checkpoint=20))
    assert "valid.replaced-1.json" in other["notes"][0]
    assert json.loads((run / "valid.replaced-1.json").read_text())["sets"] == again["sets"]
    elsewhere = evaluate_task(EvaluateConfig(str(run), "valid", max_sentences=2, out=str(tmp_path / "out")))
    assert json.loads((tmp_path / "out" / "valid.first-2.json").read_text())["sets"] == elsewhere["sets"]
    show_measures(elsewhere, console := Console(width=100, record=True, file=io.StringIO()))
    assert "the first 2 items of each set" in " ".join(console.export_text().split())


def write_texts(folder: Path) -> None:
    """Two classes that a word of the tiny corpus tells apart, in three languages."""
    words = {
        "en": ("a red apple", "the green door"),
        "de": ("einen roten Apfel", "die grüne Tür"),
        "fr": ("une pomme rouge", "la porte verte"),
    }
    folder.mkdir()
    rest = ["today", "every morning", "in the evening", "on Sunday", "buys", "sees", "sells", "wants"]
    for split, language, count in (("train", "en", 64), ("valid", "en", 16), ("test", "de", 16), ("test", "fr", 16)):
        lines = [f"{('fruit', 'door')[n % 2]}\t{words[language][n % 2]} {rest[n // 2 % 8]}" for n in range(count)]
        (folder / f"{split}.{language}.tsv").write_text("\n".join(lines) + "\n")
    english = [f"{('fruit', 'door')[n % 2]}\t{words['en'][n % 2]} {rest[n // 2 % 8]}" for n in range(16)]
    (folder / "test.de.in_en.tsv").write_text("\n".join(english) + "\n")


def test_texts_of_other_codes_have_the_vocabulary_s_languages(
    tiny_data: DataFolder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_texts(tmp_path / "texts")
    (tmp_path / "texts" / "test.fr.tsv").rename(tmp_path / "texts" / "test.fra_Latn.tsv")
    (tmp_path / "texts" / "notes.txt").write_text("These are not read.\n")
    task = {"name": "cross_lingual_classification", "vocabulary": str(tiny_data.path), "languages": ["eng_Latn"]}
    config = build(RunConfig, {"data": str(tmp_path / "texts"), "model": MODEL, "task": task})
    data = LabelledTexts.open(config.data, ["eng_Latn"])
    texts = ClassificationTask(config, data)
    texts.check_data()
    assert f"{tmp_path / 'texts'}: not read: notes.txt" in caplog.text
    for split, name, code in (("train", "eng_Latn", "en"), ("test", "fra_Latn", "fr"), ("test", "de.in_en", "en")):
        assert set(texts.encoded(split, [name]).languages) == {tiny_data.languages.index(code)}
    scores = {"accuracy": 0.5, "macro_f1": 0.25}
    found = texts.summary(dict.fromkeys(("eng_Latn", "de", "de.in_en", "fra_Latn"), scores))
    assert found["zero_shot"] == scores and set(found["gap"]) == {"de"}


def fine_tune(data: Path, start: Path, run: Path, *more: str) -> tuple[int, str]:
    words = [
        *("task=cross_lingual_classification", "model=encoder_tiny", *SHAPE, *XMOE, f"data={data}"),
        *(f"training.init_from={start}", f"hydra.run.dir={run}", "training.max_updates=30"),
        *("training.tokens_per_update=300", "training.optimizer.lr=0.01", "training.schedule.warmup_updates=5"),
        *("training.validation.every_updates=10", "training.log_every=10", *more),
    ]
    return here(words, run.parent)


@pytest.mark.processes
def test_fine_tuning_with_frozen_routing_and_zero_shot_scores(
    pretrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_texts(tmp_path / "texts")
    assert fine_tune(tmp_path / "texts", pretrained, tmp_path / "frozen", "task.freeze_routing=true") == (0, "")
    assert fine_tune(tmp_path / "texts", pretrained, tmp_path / "free") == (0, "")
    before, frozen, free = (final_tensors(p) for p in (pretrained, tmp_path / "frozen", tmp_path / "free"))
    best = final_tensors(pretrained, "best")
    sparse = [n for n in best if n.startswith("model.") and ".inserted." in n]
    assert sparse and before
    assert all(torch.equal(frozen[n], best[n]) for n in sparse)
    assert not all(torch.equal(free[n], best[n]) for n in sparse)
    log = [json.loads(line) for line in (tmp_path / "frozen" / "train.jsonl").read_text().splitlines()]
    assert log[-1]["balance_loss"] > 0.5 and log[-1]["accuracy"] > 0.9
    content = evaluated(tmp_path / "frozen", "test", monkeypatch)
    assert set(content["sets"]) == {"de", "de.in_en", "fr"}
    sets, summary = content["sets"], content["summary"]
    assert sets["de.in_en"]["accuracy"] == 1.0 and sets["de.in_en"]["macro_f1"] == 1.0
    gap = sets["de"]["macro_f1"] - sets["de.in_en"]["macro_f1"]
    assert summary["gap"] == {"de": {"accuracy": sets["de"]["accuracy"] - 1.0, "macro_f1": gap}}
    mean = (sets["de"]["accuracy"] + sets["fr"]["accuracy"]) / 2
    assert summary["zero_shot"]["accuracy"] == pytest.approx(mean)


@pytest.mark.processes
def test_fine_tuning_starts_from_an_export_and_its_vocabulary(pretrained: Path, tmp_path: Path) -> None:
    """Which lies in the export; no data folder has to be there any more."""
    exported = export_run(ExportConfig(str(pretrained), str(tmp_path / "exported")))
    write_texts(tmp_path / "texts")
    assert fine_tune(tmp_path / "texts", exported, tmp_path / "run", "training.max_updates=2") == (0, "")
    (exported / "config.json").write_text("{")
    code, said = fine_tune(tmp_path / "texts", exported, tmp_path / "other")
    assert code == 2 and "exported/config.json: the run's config cannot be read" in " ".join(said.split())


@pytest.mark.processes
def test_fine_tuning_s_mistakes_are_said(pretrained: Path, tmp_path: Path) -> None:
    write_texts(tmp_path / "texts")
    code, said = fine_tune(tmp_path / "texts", tmp_path / "nothing", tmp_path / "run")
    assert code == 2 and "there is no vocabulary to cut the texts with" in said
    with (tmp_path / "texts" / "valid.en.tsv").open("a") as stream:
        stream.write("door without a tab\n")
    code, said = fine_tune(tmp_path / "texts", pretrained, tmp_path / "run")
    assert code == 2 and "valid.en.tsv, line 17: a line without a tab" in " ".join(said.split())
    write_texts(tmp_path / "labels")
    with (tmp_path / "labels" / "test.de.tsv").open("a") as stream:
        stream.write("friut\teinen roten Apfel\n")
    code, said = fine_tune(tmp_path / "labels", pretrained, tmp_path / "run")
    assert code == 2 and "test.de.tsv, line 17: unknown label 'friut'" in " ".join(said.split())
    code, said = fine_tune(tmp_path / "texts2", pretrained, tmp_path / "run")
    assert code == 2 and "the folder of labelled texts does not exist" in said

"""Image classification: samples, augmentation, the criterion, and moe-train on images, interrupted and resumed."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moe_train.config import ImageConfig, RunConfig, TrainingConfig, build, to_mapping
from moe_train.config.evaluation import EvaluateConfig, TranslateConfig
from moe_train.data.batching import split_micro_batch
from moe_train.data.images import open_images
from moe_train.data.text.lines import sha256
from moe_train.errors import ConfigError, DataError
from moe_train.evaluation.inference.translate_stream import translate_input
from moe_train.evaluation.measure_task import evaluate_task
from moe_train.tasks.augmentation import augment
from moe_train.tasks.classification_criterion import ClassificationCriterion, count_classes, macro_f1
from moe_train.tasks.images import ImageTask
from tests.commands.test_train import here
from tests.data.image_files import coloured_squares, write_class_folders, write_idx_folder
from tests.models.test_vision import SMALL
from tests.training.toy_run import assert_same_bits, final_tensors

MODEL = {**SMALL, "patch_size": 2}


@pytest.fixture(scope="module")
def squares(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("squares")
    write_idx_folder(folder, *coloured_squares(300), *coloured_squares(60, seed=2))
    return folder


def make_task(data: Path, routing: dict[str, Any] | None = None, **task: Any) -> ImageTask:
    routing = routing or {"name": "switch", "num_experts": 4}
    mapping = {"name": "image_classification", **task}
    config = build(RunConfig, {"data": str(data), "model": MODEL, "routing": routing, "task": mapping})
    config = dataclasses.replace(config, training=TrainingConfig(tokens_per_update=32, label_smoothing=0.0))
    return ImageTask(config, open_images(config.data, config.task))  # type: ignore[arg-type]


def test_the_config_has_the_task_s_own_keys(squares: Path) -> None:
    config = make_task(squares, shift=1).config
    assert isinstance(config.task, ImageConfig) and config.task.shift == 1
    assert build(RunConfig, to_mapping(config)) == config
    with pytest.raises(ConfigError, match=r"unknown key 'task\.shft'"):
        make_task(squares, shft=1)
    with pytest.raises(ConfigError, match="metric=macro_f1 is not measured by task=image_classification"):
        build(RunConfig, {**to_mapping(config), "training": {"validation": {"metric": "macro_f1"}}})
    with pytest.raises(ConfigError, match="has no BLEU"):
        build(RunConfig, {**to_mapping(config), "training": {"validation": {"bleu": True}}})


def test_an_epoch_has_every_image_once_and_ranks_share_them_out(squares: Path) -> None:
    task = make_task(squares, flip=True)
    batches = task.train_batches()
    seen = np.concatenate([b for u in range(batches.updates_per_epoch) for b in batches.update(u).micro_batches])
    assert sorted(seen) == list(range(270))
    (whole,) = batches.update(0).micro_batches
    assert len(whole) == 32
    sample = task.train_sample(whole, 5)
    assert sample["ntokens"] == 32 and sample["net_input"]["images"].dtype == torch.uint8
    parts = [task.train_sample(split_micro_batch(whole, rank, 3), 5) for rank in range(3)]
    for rank, part in enumerate(parts):
        assert torch.equal(part["net_input"]["images"], sample["net_input"]["images"][rank::3])
        assert torch.equal(part["target"], sample["target"][rank::3])
    assert task.train_sample(whole[:0], 5)["net_input"]["images"].shape == (0, 8, 8, 1)


def test_augmentation_is_drawn_by_seed_update_and_image(squares: Path) -> None:
    draws = np.random.default_rng(1)
    images, uids = draws.integers(0, 256, (40, 8, 6, 3)).astype(np.uint8), np.arange(100, 140)
    first = augment(images, uids, seed=1, update=3, flip=True, shift=2)
    assert (first == augment(images, uids, 1, 3, True, 2)).all()
    assert (first[::7] == augment(images[::7], uids[::7], 1, 3, True, 2)).all()
    for other in ((2, 3), (1, 4)):
        assert (first != augment(images, uids, *other, True, 2)).any((1, 2, 3)).mean() > 0.8
    assert (augment(images, uids, 1, 3, False, 0) == images).all()
    mirrored = augment(images, uids, 1, 3, True, 0)
    flipped = (mirrored == images[:, :, ::-1]).all((1, 2, 3))
    assert (mirrored[~flipped] == images[~flipped]).all() and 10 < flipped.sum() < 30
    shifted = augment(images, uids, 1, 3, False, 2)
    found = {
        (down, right)
        for image, moved in zip(images, shifted, strict=True)
        for down in range(-2, 3)
        for right in range(-2, 3)
        if (moved[2:6, 2:4] == image[2 + down : 6 + down, 2 + right : 4 + right]).all()
    }
    assert len(found) > 12


def test_validation_is_never_augmented(squares: Path) -> None:
    task = make_task(squares, flip=True)
    (name, batches), *rest = task.validation_sets().items()
    assert name == "valid" and not rest and sum(len(b) for b in batches) == 30
    sample = task.validation_sample(name, batches[0])
    valid = task.data.splits["valid"]
    assert (sample["net_input"]["images"].numpy() == valid.read(batches[0])).all()
    assert set(task.evaluation_sets("test")) == {"test"}


@pytest.mark.parametrize("routing", [{"name": "soft_moe", "num_experts": 4}, {"name": "thor", "num_experts": 2}])
def test_the_loss_of_ranks_adds_up_to_the_loss_of_one(squares: Path, routing: dict[str, Any]) -> None:
    task = make_task(squares, routing)
    model, criterion = task.build_model().double().train(), task.build_criterion()
    rows = np.arange(24)
    whole = criterion(model, task.train_sample(rows))[0]
    parts = [
        criterion(model, {**task.train_sample(rows[r::2]), "world_ntokens": torch.tensor(24.0)})[0] for r in (0, 1)
    ]
    torch.testing.assert_close(sum(parts), whole, rtol=1e-9, atol=1e-9)


def test_cross_entropy_and_accuracy_are_torch_s(squares: Path) -> None:
    task = make_task(squares, {"name": "dense"})
    model, sample = task.build_model().eval(), task.validation_sample("valid", np.arange(30))
    loss, items, logging = task.build_criterion()(model, sample)
    logits = model(**sample["net_input"])[0]
    expected = torch.nn.functional.cross_entropy(logits, sample["target"], reduction="sum")
    torch.testing.assert_close(loss, expected)
    assert items == 30 and int(logging["accuracy"]) == int((logits.argmax(1) == sample["target"]).sum())


def test_macro_f1_of_a_known_confusion() -> None:
    guesses, target = torch.tensor([0, 0, 1, 1, 1, 2, 2, 0]), torch.tensor([0, 0, 0, 1, 1, 2, 1, 2])
    sums = {name: float(value) for name, value in count_classes(guesses, target, 4).items()}
    # F1: class 0: 2·2/(3+3), class 1: 2·2/(3+3), class 2: 2·1/(2+2); class 3 is nowhere.
    assert macro_f1(sums, 4) == pytest.approx((2 / 3 + 2 / 3 + 1 / 2) / 3)
    sklearn = pytest.importorskip("sklearn.metrics", reason="needs the extra 'images'")
    assert macro_f1(sums, 3) == pytest.approx(sklearn.f1_score(target, guesses, average="macro"))


def test_per_class_counts_only_at_evaluation(squares: Path) -> None:
    task = make_task(squares, {"name": "dense"})
    criterion, sample = ClassificationCriterion(3, per_class=True), task.validation_sample("valid", np.arange(30))
    model = task.build_model()
    assert not [n for n in criterion(model.train(), sample)[2] if n.startswith("class/")]
    logging = criterion(model.eval(), sample)[2]
    assert sum(int(logging[f"class/{c}/items"]) for c in range(3)) == 30
    assert sum(int(logging[f"class/{c}/hits"]) for c in range(3)) == int(logging["accuracy"])


def command(data: Path, folder: Path, updates: int, *more: str) -> list[str]:
    return [
        *("task=image_classification", "model=vit_tiny", f"data={data}", f"hydra.run.dir={folder}"),
        *("model.embed_dim=32", "model.ffn_dim=64", "model.encoder_layers=2", "model.num_heads=2", "task.shift=1"),
        *("training.threads=1", "training.tokens_per_update=64", "training.accumulation=2", "training.log_every=5"),
        *("training.optimizer.lr=0.01", "training.schedule.warmup_updates=5", "training.schedule.name=constant"),
        *("training.checkpoint.every_updates=10", "training.validation.every_updates=10"),
        f"training.max_updates={updates}",
        *more,
    ]


@pytest.mark.processes
def test_moe_train_learns_images_and_resumes_bit_for_bit(squares: Path, tmp_path: Path) -> None:
    soft = ("routing=soft_moe", "routing.num_experts=4")
    assert here(command(squares, tmp_path / "whole", 40, *soft), tmp_path)[0] == 0
    last = {name: (tmp_path / "whole" / name).read_text().splitlines()[-1] for name in ("train.jsonl", "valid.jsonl")}
    train, valid = (json.loads(line) for line in last.values())
    assert valid["accuracy"] > 0.9 and valid["directions"]["valid"]["sentences"] == 30
    assert valid["images_per_second"] > 0 and train["images_per_second"] > 0
    said = (tmp_path / "whole" / "logs" / "rank_0.log").read_text()
    assert " images/s" in said and "words/s" not in said
    for updates in (20, 40):
        assert here(command(squares, tmp_path / "parts", updates, *soft), tmp_path)[0] == 0
    assert_same_bits(final_tensors(tmp_path / "whole"), final_tensors(tmp_path / "parts"))


@pytest.mark.processes
def test_an_image_altered_after_training_is_refused(tmp_path: Path) -> None:
    """No manifest has its checksum: the run keeps it."""
    for split, count in (("train", 12), ("val", 3), ("test", 3)):
        write_class_folders(tmp_path / "input" / split, {"cat": count, "dog": count}, size=(8, 8))
    words = command(tmp_path / "input", tmp_path / "run", 1, "routing=dense")
    assert here(words, tmp_path) == (0, "")
    kept = json.loads((tmp_path / "run" / "data.json").read_text())["files"]
    assert len(kept) == 36 and kept["test/cat/1.png"] == sha256(tmp_path / "input" / "test" / "cat" / "1.png")
    evaluate_task(EvaluateConfig(str(tmp_path / "run")))
    with pytest.raises(ConfigError, match="the task 'image_classification' does not translate"):
        translate_input(TranslateConfig(str(tmp_path / "run"), "en", "de"))
    victim = tmp_path / "input" / "test" / "cat" / "1.png"
    content = bytearray(victim.read_bytes())
    content[-1] ^= 1
    victim.write_bytes(bytes(content))
    with pytest.raises(DataError, match=r"cat/1\.png: the file was altered since .*run was trained on it"):
        evaluate_task(EvaluateConfig(str(tmp_path / "run")))
    copy = shutil.copytree(tmp_path / "input", tmp_path / "copy")
    with pytest.raises(DataError, match=r"copy/test/cat/1\.png: the file was altered since"):
        evaluate_task(EvaluateConfig(str(tmp_path / "run"), data=str(copy)))
    verified = (tmp_path / "run" / "test.json").read_bytes()
    evaluate_task(EvaluateConfig(str(tmp_path / "run"), data_verify="never"))
    assert verified in [path.read_bytes() for path in (tmp_path / "run").glob("test?*.json")]
    code, said = here([*words, "training.max_updates=2"], tmp_path)
    assert code == 2 and "cat/1.png: the file was altered since" in " ".join(said.split()), said


def test_moe_train_says_what_is_wrong(squares: Path, tmp_path: Path) -> None:
    code, said = here(command(squares, tmp_path / "run", 5, "model.patch_size=3"), tmp_path)
    assert code == 2 and "patches of 3 pixels do not fill images of 8 x 8" in said
    code, said = here(command(squares, tmp_path / "run", 5, "model=tiny"), tmp_path)
    assert code == 2 and "not for images" in said
    code, said = here(command(squares, tmp_path / "run", 5, "task.image_size=12"), tmp_path)
    assert code == 2 and "images of 8 x 8 pixels, not 12 x 12 as in task.image_size" in said
    cut = tmp_path / "cut"
    shutil.copytree(squares, cut)
    labels = cut / "train-labels-idx1-ubyte"
    labels.write_bytes(labels.read_bytes()[:-1])
    code, said = here(command(cut, tmp_path / "run", 5), tmp_path)
    assert code == 2 and f"{labels.name}: the IDX file is cut short" in " ".join(said.split())
    assert not (tmp_path / "run" / "checkpoints").exists()  # nothing was started

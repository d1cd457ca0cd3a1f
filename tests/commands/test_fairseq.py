"""fairseq's own command lines on our task, model and criterion."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from moe_train.commands.fairseq import main
from moe_train.data.folder import DataFolder
from moe_train.errors import ConfigError
from moe_train.models.fairseq_arch import composed
from moe_train.tasks.translation.fairseq_task import FairseqTranslationTask, FolderPieces

pytestmark = pytest.mark.warm_start

MODEL = "model=tiny model.embed_dim=32 model.ffn_dim=64 routing=switch routing.num_experts=4"
TRAIN = [
    *("--task", "moe_translation", "--arch", "moe_transformer", "--moe-config", MODEL),
    *("--criterion", "moe_label_smoothed_cross_entropy", "--optimizer", "adam", "--lr", "5e-3"),
    *("--max-tokens", "1024", "--max-update", "5", "--no-epoch-checkpoints"),
    *("--log-format", "simple", "--log-interval", "1"),
]


def moe_fairseq(
    *words: str, launcher: tuple[str, ...] = (), typed: str = "", code: int = 0, env: dict[str, str] | None = None
) -> str:
    """Runs the command in a process of its own and returns its output."""
    command = [sys.executable, *launcher, "-m", "moe_train.commands.fairseq", *words]
    done = subprocess.run(
        command,
        input=typed,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **(env or {})},
    )
    assert done.returncode == code, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def losses(log: str) -> list[float]:
    """Training losses by update."""
    return [float(loss) for loss in re.findall(r"train_inner .*? loss=([\d.]+)", log)]


def lines(output: str, kind: str) -> dict[int, list[str]]:
    """S-, T-, H-, D- or P- lines: number of the sentence -> fields."""
    found = [line.split("\t") for line in output.splitlines() if re.match(rf"{kind}-\d", line)]
    return {int(fields[0][2:]): fields[1:] for fields in found}


@pytest.mark.processes
@pytest.mark.warm_start(False)
def test_altered_data_is_refused(tiny_data: DataFolder, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_data.path, tmp_path / "data"))
    victim = copy / "train.en-de.de.bin"
    victim.write_bytes(bytes(victim.stat().st_size))
    seen = moe_fairseq("train", str(copy), *TRAIN, "--save-dir", str(tmp_path / "checkpoints"), code=2)
    assert f"moe-fairseq: {victim}: the file's checksum is not the manifest's" in seen


@pytest.fixture(scope="module")
def trained(tiny_data: DataFolder, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A checkpoint after five updates of a sparse model, and the log."""
    folder = tmp_path_factory.mktemp("fairseq")
    log = moe_fairseq("train", str(tiny_data.path), *TRAIN, "--cpu", "--save-dir", str(folder))
    return folder / "checkpoint_last.pt", log


@pytest.mark.processes
def test_train_lowers_the_loss_of_a_sparse_model(trained: tuple[Path, str]) -> None:
    checkpoint, log = trained
    assert checkpoint.is_file()
    assert len(losses(log)) == 5 and losses(log)[-1] < losses(log)[0] - 0.5
    assert all(1.0 <= float(b) < 2.0 for b in re.findall(r"train_inner .*? balance_loss=([\d.]+)", log))
    # two sparse layers of four experts 32 -> 64 -> 32
    assert f"num. expert model params: {2 * 4 * (2 * 32 * 64 + 64 + 32)}" in log


@pytest.mark.processes
def test_generate_prints_every_line_that_scripts_read(trained: tuple[Path, str], tiny_data: DataFolder) -> None:
    direction = ("--source-lang", "en", "--target-lang", "de")
    output = moe_fairseq(
        *("generate", str(tiny_data.path), "--task", "moe_translation", "--path", str(trained[0]), *direction),
        *("--beam", "4", "--max-len-b", "12", "--gen-subset", "test", "--cpu"),
    )
    source, target = tiny_data.raw("test", "en-de")
    kinds = {kind: lines(output, kind) for kind in "STHDP"}
    assert all(sorted(found) == list(range(20)) for found in kinds.values())
    assert [kinds["S"][i][0] for i in range(20)] == source  # plain text: no pieces, no tag
    assert [kinds["T"][i][0] for i in range(20)] == target
    for number in range(20):
        scores = [float(score) for score in kinds["P"][number][0].split(" ")]
        assert len(scores) == len(kinds["H"][number][1].split(" ")) + 1  # and the end
        assert float(kinds["H"][number][0]) == pytest.approx(sum(scores) / len(scores), abs=1e-3)
    assert "Generate test with beam=4: BLEU4" in output


@pytest.mark.slow
def test_interactive_translates_what_is_typed(trained: tuple[Path, str], tiny_data: DataFolder) -> None:
    output = moe_fairseq(
        *("interactive", str(tiny_data.path), "--task", "moe_translation", "--path", str(trained[0]), "--cpu"),
        *("--source-lang", "en", "--target-lang", "fr", "--max-len-b", "8", "--buffer-size", "2", "--batch-size", "2"),
        typed="The teacher sees a red apple today.\nMy sister buys fresh bread.\n",
    )
    assert sorted(lines(output, "D")) == [0, 1]
    [shown] = lines(output, "S")[0]  # fairseq shows what the model was given: tag and pieces
    pieces = FolderPieces(tiny_data.tokenizer(), tiny_data.dictionary())
    assert shown.startswith("__fr__ ") and pieces.decode(shown) == "The teacher sees a red apple today."


@pytest.mark.slow
def test_two_processes_train(tiny_data: DataFolder, tmp_path: Path) -> None:
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    log = moe_fairseq(
        *("train", str(tiny_data.path), *TRAIN, "--cpu", "--save-dir", str(tmp_path)),
        *("--distributed-backend", "gloo", "--ddp-backend", "legacy_ddp", "--max-update", "3"),
        launcher=launcher,
    )
    assert (tmp_path / "checkpoint_last.pt").is_file()
    assert "training on 2 devices" in log and len(losses(log)) == 3


def flags(folder: DataFolder, **changes: object) -> Namespace:
    plain = {"source_lang": None, "target_lang": None, "directions": "", "source_tag": "target", "target_tag": "none"}
    return Namespace(**{"data": str(folder.path), "seed": 1, **plain, **changes})


def test_a_sentence_that_is_cut_is_said(tiny_data: DataFolder, caplog: pytest.LogCaptureFixture) -> None:
    """The model has 40 positions, of which a tag and an end take two."""
    task = FairseqTranslationTask(flags(tiny_data, source_lang="en", target_lang="fr"))
    task.with_config(model=dataclasses.replace(task.config.model, max_positions=40))
    dataset = task.build_dataset_for_inference([torch.full((39,), 9), torch.full((301,), 9)], [39, 301])
    assert [dataset.size(n) for n in range(2)] == [40, 40]
    assert caplog.messages == ["sentence 2 of 300 tokens was cut to the model's first 38"]


def test_a_checkpoints_tags_hold_at_generation(tiny_data: DataFolder) -> None:
    task = FairseqTranslationTask(flags(tiny_data, source_lang="en", target_lang="fr"))
    task.load_dataset("test", task_cfg=flags(tiny_data, source_tag="source", target_tag="target"))
    sample = task.dataset("test").collater([0])
    assert task.dictionary[sample["net_input"]["src_tokens"][0, 0]] == "__en__"
    assert task.dictionary[sample["net_input"]["prev_output_tokens"][0, 0]] == "__fr__"


def test_one_direction_several_or_all(tiny_data: DataFolder) -> None:
    assert FairseqTranslationTask(flags(tiny_data, source_lang="fr", target_lang="en")).directions == ("fr-en",)
    assert FairseqTranslationTask(flags(tiny_data, directions="en-de,ja-en")).directions == ("en-de", "ja-en")
    assert FairseqTranslationTask(flags(tiny_data)).directions == tiny_data.directions
    with pytest.raises(ConfigError, match="the direction is not known"):
        FairseqTranslationTask(flags(tiny_data)).build_dataset_for_inference([], [])
    with pytest.raises(ConfigError, match="tag cannot be 'both'"):
        FairseqTranslationTask(flags(tiny_data, source_tag="both"))


def test_fairseqs_batches_are_short_to_long_and_hold_everything(tiny_data: DataFolder) -> None:
    task = FairseqTranslationTask(flags(tiny_data))
    task.load_dataset("train")
    dataset = task.dataset("train")
    batches = task.get_batch_iterator(dataset, max_tokens=500, max_positions=task.max_positions()).frozen_batches
    assert sorted(i for batch in batches for i in batch) == list(range(len(dataset)))
    assert all(len(batch) * max(dataset.num_tokens(i) for i in batch) <= 500 for batch in batches)
    assert dataset.collater([]) == {}


def test_pieces_become_text_and_joined_text_stays(tiny_data: DataFolder) -> None:
    pieces = FolderPieces(tiny_data.tokenizer(), tiny_data.dictionary())
    text = "Notre voisin oublie une pomme rouge."
    assert pieces.decode(f"__fr__ {pieces.encode(text)}") == text
    assert pieces.decode(text) == text


def test_the_moe_config_is_composed_from_the_shipped_groups() -> None:
    model, routing = composed("model=base routing=top_k routing.top_k=3 model.dropout=0.3 model.sparse_layers=[1,3]")
    assert (model.embed_dim, model.dropout, model.sparse_layers) == (512, 0.3, (1, 3))
    assert (routing["name"], routing["top_k"]) == ("top_k", 3)
    assert composed("")[1]["name"] == "switch"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("training.max_updates=3", "takes model and routing only"),
        ("routing=swich", "cannot be composed"),
        ("routing.num_exprts=3", "cannot be composed"),
        ("model.embed_dim=-1", "must be above 0"),
    ],
)
def test_a_wrong_moe_config_is_named(overrides: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        composed(overrides)


def test_mistakes_are_one_message(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trian"]) == 2
    assert "Did you mean 'train'?\n" in capsys.readouterr().err
    assert main([]) == 0
    assert "moe-fairseq train DATA" in capsys.readouterr().out

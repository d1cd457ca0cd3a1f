"""Hostile fairseq checkpoints: no code runs, no other file is opened, and each is one error with the file's name."""

from __future__ import annotations

import copy
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.core.config_store import ConfigStore
from torch import nn

from moe_train.commands.fairseq import main, register
from moe_train.errors import CheckpointError
from moe_train.launch.hydra_store import forget_foreign_schemas

DATA = Path(__file__).with_name("old_runs") / "data"
CODE = "__import__('os').mkdir('ran')"
TASK = {
    "task": "moe_translation",
    "criterion": "cross_entropy",
    "data": str(DATA),
    "seed": 1,
    "directions": "",
    "source_lang": "en",
    "target_lang": "de",
    "source_tag": "target",
    "target_tag": "none",
}
_POSITIONS = {"max_source_positions": 64, "max_target_positions": 64}
HISTORY = {"criterion_name": "x", "optimizer_name": "x", "lr_scheduler_state": {}, "num_updates": 0}
MODEL = "model=tiny model.embed_dim=16 model.ffn_dim=16 routing=dense"
CONFIG = {
    "model": {"_name": "moe_transformer", "moe_config": MODEL},
    "task": {"_name": "moe_translation", **{key: TASK[key] for key in TASK if key not in ("task", "criterion")}},
    "criterion": {"_name": "cross_entropy", "sentence_avg": True},
    "common": {"user_dir": None, "plasma_path": "/tmp/plasma"},
    "checkpoint": {"save_dir": "/somewhere/else", "restore_file": "checkpoint_last.pt"},
    "bpe": {"_name": "sentencepiece", "sentencepiece_model": "/somewhere/spm.model"},
}

Change = Callable[[dict[str, Any]], None]


def state(**parts: Any) -> dict[str, Any]:
    extra = {"train_iterator": {"epoch": 1}, "epoch": 1}
    given = {"args": None, "cfg": None, "model": {}, "optimizer_history": [dict(HISTORY)], "extra_state": extra}
    return {**given, "task_state": {}, **parts}


def legacy(**options: Any) -> dict[str, Any]:
    """As fairseq before 0.10 wrote it: one Namespace."""
    return state(args=Namespace(**{**TASK, **_POSITIONS, "arch": "transformer", **options}))


def current(**changes: Any) -> dict[str, Any]:
    """As fairseq writes it now; ``changes``: dotted option, its dots as ``__``, or a whole group."""
    config: dict[str, Any] = copy.deepcopy(CONFIG)
    for name, value in changes.items():
        *groups, last = name.split("__")
        place = config
        for group in groups:
            place = place[group]
        place[last] = value
    return state(cfg=config)


def architecture(name: str, **options: Any) -> dict[str, Any]:
    return current(model={"_name": name, **options})


def looped() -> list[Any]:
    loop: list[Any] = []
    loop.append(loop)
    return loop


def many_times_over() -> list[Any]:
    """10^20 values in a few bytes."""
    value: list[Any] = [0]
    for _ in range(20):
        value = [value] * 10
    return value


def deep(levels: int) -> Any:
    value: Any = 0
    for _ in range(levels):
        value = {"in": value}
    return value


# What a config may not say → the words that refuse it.
NO_VALUE, FILE, CODE_DIRECTORY = "is not a plain value", "names a further file", "names code to import"
HOSTILE: dict[str, tuple[dict[str, Any], str]] = {
    # options that fairseq's models, tasks and criterions pass to eval
    "transformer": (legacy(adaptive_softmax_cutoff=CODE), NO_VALUE),
    "fconv encoder_layers": (legacy(arch="fconv", encoder_layers=CODE), NO_VALUE),
    "fconv decoder_layers": (legacy(arch="fconv", decoder_layers=CODE), NO_VALUE),
    "fconv decoder_attention": (legacy(arch="fconv", decoder_attention=CODE), NO_VALUE),
    "fconv_lm": (legacy(arch="fconv_lm", decoder_layers=CODE, tokens_per_sample=8), NO_VALUE),
    "fconv_self_att": (legacy(arch="fconv_self_att", pretrained=CODE), NO_VALUE),
    "lightconv_lm": (
        legacy(arch="lightconv_lm", character_embeddings=True, character_filters=CODE, tokens_per_sample=8),
        NO_VALUE,
    ),
    "lstm decoder_attention": (legacy(arch="lstm", decoder_attention=CODE), NO_VALUE),
    "transformer now": (architecture("transformer", adaptive_softmax_cutoff=CODE), ""),
    "transformer_lm": (
        architecture("transformer_lm", character_embeddings=True, character_filters=CODE, tokens_per_sample=8),
        "",
    ),
    "wav2vec": (architecture("wav2vec", conv_feature_layers=CODE), NO_VALUE),
    "wav2vec aggregator": (architecture("wav2vec", conv_aggregator_layers=CODE), NO_VALUE),
    "wav2vec2": (architecture("wav2vec2", conv_feature_layers=CODE), NO_VALUE),
    "code in a list": (architecture("wav2vec2", conv_feature_layers=f"[(512, 10, 5)] + [{CODE}]"), NO_VALUE),
    "code by a format": (architecture("wav2vec2", conv_feature_layers=f"f'{{{CODE}}}'"), NO_VALUE),
    "code in a loop": (architecture("wav2vec2", conv_feature_layers=f"[{CODE} for _ in (1,)]"), NO_VALUE),
    # values that no option has
    "interpolation": (current(model__moe_config="${oc.env:HOME}"), "interpolation"),
    "interpolation within": (current(task__source_lang="e${oc.env:HOME}"), "interpolation"),
    "interpolation in a list": (current(task__directions=["a", {"b": "${task.seed}"}]), "interpolation"),
    "interpolation as a key": (current(task={"${oc.env:HOME}": 1}), "not a name"),
    "interpolation of a group": (current(criterion="${model}"), "is not a registered name"),
    "legacy interpolation": (legacy(encoder_embed_dim="${oc.env:HOME}"), "interpolation"),
    "a tensor": (current(model__moe_config=torch.ones(2)), "contains a Tensor"),
    "bytes": (legacy(encoder_embed_dim=b"1"), "contains a bytes"),
    "a set": (legacy(encoder_embed_dim={1}), "contains a set"),
    "deep": (current(model=deep(200)), "nested more than"),
    "in itself": (current(model__moe_config=looped()), "nested more than"),
    "many times over": (legacy(encoder_layers=many_times_over()), "parts"),
    "a huge integer": (current(task__seed=10**30), "64 bits"),
    "a huge legacy integer": (legacy(encoder_layers=10**100), "64 bits"),
    "a huge text": (legacy(encoder_layers="9" * 2_000_000), "characters"),
    # further files
    "user_dir": (current(common__user_dir="/tmp/code"), CODE_DIRECTORY),
    "legacy user_dir": (legacy(user_dir="code"), CODE_DIRECTORY),
    "nested user_dir": (current(model={"_name": "x", "w2v_args": {"common": {"user_dir": "code"}}}), CODE_DIRECTORY),
    "embeddings": (legacy(encoder_embed_path="emb.txt"), FILE),
    "another checkpoint": (architecture("fconv", pretrained_checkpoint="other.pt"), FILE),
    "wav2vec's checkpoint": (architecture("wav2vec_ctc", w2v_path="/somewhere/w2v.pt"), FILE),
    "a path in any option": (architecture("transformer", activation_fn="../relu"), FILE),
    "a group's file": (legacy(bpe="../../../tmp/config"), "is not a registered name"),
    "an architecture's file": (architecture("../transformer"), "is not a registered name"),
    "moe-config's file": (current(model__moe_config="model=../../tmp/config"), FILE),
    # sizes
    "layers": (architecture("transformer", encoder={"layers": 10**9, "embed_dim": 16}), "more than"),
    "legacy layers": (legacy(encoder_layers=10**9, encoder_embed_dim=16, encoder_ffn_embed_dim=16), "more than"),
    "width": (legacy(encoder_embed_dim=10**9, encoder_attention_heads=1), "more than"),
    "width that fits": (legacy(encoder_embed_dim=2_000_000, encoder_attention_heads=1), "more than"),
    "convolutions": (architecture("wav2vec2", conv_feature_layers="[(1000000, 1000, 1)] * 3"), "more than"),
    "a huge list": (legacy(arch="fconv", encoder_layers="[(512, 3)] * 1000000"), NO_VALUE),
    "moe layers": (current(model__moe_config=f"{MODEL} model.encoder_layers=1000000000"), "encoder_layers"),
    "moe width": (current(model__moe_config=f"{MODEL} model.embed_dim=1600000000"), "must be 131072 or less"),
    # what is no checkpoint of fairseq
    "no options": (state(), "Neither args nor cfg"),
    "a list as config": (state(cfg=[1, 2]), "cannot load"),
    "a text as model": (current(model="transformer"), "cannot load"),
    "no architecture": (architecture("nonesuch"), "cannot load"),
    "no history": (current() | {"optimizer_history": {}}, "cannot load"),
    "no tensors": (current() | {"model": [1]}, "cannot load"),
    "moe-config's quotes": (current(model__moe_config="model='tiny"), "cannot be read"),
}


@pytest.fixture(scope="module", autouse=True)
def _schemas_of_fairseq() -> Iterator[None]:
    """Puts into Hydra's store what importing fairseq puts there: our commands in this process take it out."""
    from fairseq.dataclass.initialize import hydra_init
    from fairseq.models import MODEL_DATACLASS_REGISTRY
    from fairseq.registry import REGISTRIES
    from fairseq.tasks import TASK_DATACLASS_REGISTRY

    groups = {"task": TASK_DATACLASS_REGISTRY, "model": MODEL_DATACLASS_REGISTRY}
    groups |= {group: registry["dataclass_registry"] for group, registry in REGISTRIES.items()}
    hydra_init()
    for group, dataclasses_of in groups.items():
        for name, dataclass in dataclasses_of.items():
            if dataclass is not None:
                node = dataclass()
                node._name = name
                ConfigStore.instance().store(name=name, group=group, node=node, provider="fairseq")
    yield
    forget_foreign_schemas()


@pytest.fixture(scope="module", autouse=True)
def registered() -> None:
    register()


@pytest.fixture(autouse=True)
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def saved(content: Any) -> Path:
    torch.save(content, "hostile.pt")
    return Path("hostile.pt").absolute()


def words(command: str, path: Path) -> list[str]:
    """A command line that is right, but for its checkpoint."""
    common = [str(DATA), "--task", "moe_translation", "--cpu"]
    search = ["--path", str(path), "--source-lang", "en", "--target-lang", "de", "--beam", "1", "--max-len-b", "2"]
    train = ["--arch", "moe_transformer", "--moe-config", MODEL, "--criterion", "moe_label_smoothed_cross_entropy"]
    train += ["--optimizer", "adam", "--lr", "1e-3", "--max-tokens", "500", "--max-update", "1", "--save-dir", "save"]
    return {
        "generate": ["generate", *common, *search, "--gen-subset", "test", "--batch-size", "8"],
        "interactive": ["interactive", *common, *search],
        "validate": ["validate", *common, "--path", str(path), "--max-tokens", "500"],
        "restore": ["train", *common, *train, "--restore-file", str(path)],
        "finetune": ["train", *common, *train, "--finetune-from-model", str(path)],
    }[command]


def refusal(capsys: pytest.CaptureFixture[str], given: list[str], path: Path) -> str:
    """Runs a command, which must end with one line about the file, and gives that line."""
    before = set(Path.cwd().iterdir())
    assert main(given) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("moe-fairseq: ")]
    assert line.startswith(f"moe-fairseq: {path}: ") and "Traceback" not in line and len(line) < 900
    assert {entry.name for entry in set(Path.cwd().iterdir()) - before} <= {"save"}, "something has run"
    return line


@pytest.fixture(scope="module")
def generate() -> Callable[[Path], None]:
    """``moe-fairseq generate`` from where its command line is read, which takes longer than all the rest."""
    from fairseq import options
    from fairseq.dataclass.utils import convert_namespace_to_omegaconf
    from fairseq_cli.generate import main as run

    parsed = options.parse_args_and_arch(options.get_generation_parser(), words("generate", Path("x.pt"))[1:])
    config = convert_namespace_to_omegaconf(parsed)

    def on(path: Path) -> None:
        config.common_eval.path = str(path)
        run(config)

    return on


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_checkpoints_are_one_error(name: str, generate: Callable[[Path], None]) -> None:
    content, message = HOSTILE[name]
    path = saved(content)
    with pytest.raises(CheckpointError) as caught:
        generate(path)
    line = str(caught.value)
    assert line.startswith(f"{path}: ") and message in line
    assert len(line.splitlines()) == 1 and len(line) < 900
    assert [entry.name for entry in Path.cwd().iterdir()] == [path.name], "something has run"


@pytest.mark.parametrize("command", ["interactive", "validate", "restore", "finetune"])
@pytest.mark.parametrize("name", ["interpolation within", "user_dir"])
def test_every_command_that_reads_a_checkpoint_refuses(
    name: str, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    content, message = HOSTILE[name]
    path = saved(content)
    assert message in refusal(capsys, words(command, path), path)


@pytest.mark.parametrize("command", ["generate", "interactive", "validate"])
def test_code_of_a_model_that_the_command_builds(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    content, message = HOSTILE["fconv encoder_layers"]
    path = saved(content)
    assert message in refusal(capsys, words(command, path), path)


def our_model() -> nn.Module:
    from omegaconf import OmegaConf

    from moe_train.tasks.translation.fairseq_task import FairseqTranslationTask

    task = FairseqTranslationTask(OmegaConf.create(CONFIG["task"]))
    model = task.build_model(OmegaConf.create(CONFIG["model"]))
    assert isinstance(model, nn.Module)
    return model


def test_code_of_a_criterion(capsys: pytest.CaptureFixture[str]) -> None:
    """validate builds it from the checkpoint, once the model is loaded."""
    content = current(criterion={"_name": "ctc", "wer_args": CODE}) | {"model": our_model().state_dict()}
    path = saved(content)
    assert NO_VALUE in refusal(capsys, words("validate", path), path)


@pytest.mark.processes
@pytest.mark.parametrize("command", ["generate", "validate", "restore"])
def test_what_is_not_hostile_is_loaded(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Paths that nobody opens are no fault: every checkpoint names the folder that it was saved in."""
    content = current() | {"model": our_model().state_dict()}
    assert main([*words(command, saved(content)), "--reset-optimizer"][: None if command == "restore" else -1]) == 0
    assert "moe-fairseq:" not in capsys.readouterr().err


def test_what_the_command_line_names_itself_is_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """A training with --user-dir, or with embeddings from a file, goes on with the same words."""
    from fairseq.checkpoint_utils import load_checkpoint_to_cpu

    path = str(saved(current(common__user_dir="mine", model__encoder_embed_path="emb.txt")))
    with pytest.raises(CheckpointError, match="names"):
        load_checkpoint_to_cpu(path)
    monkeypatch.setattr(sys, "argv", ["moe-fairseq train", "--user-dir", "mine", "--encoder-embed-path=emb.txt"])
    assert load_checkpoint_to_cpu(path)["cfg"].common.user_dir == "mine"
    monkeypatch.setattr(sys, "argv", ["moe-fairseq generate"])
    replaced = {"user_dir": None, "encoder_embed_path": None}
    assert load_checkpoint_to_cpu(path, replaced)["cfg"].model.encoder_embed_path is None


def test_damaged_files_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    for content in (b"", b"PK\x03\x04" + b"\x00" * 400):
        Path("hostile.pt").write_bytes(content)
        path = Path("hostile.pt").absolute()
        assert "checkpoint" in refusal(capsys, words("generate", path), path)
    Path("hostile.pt").unlink()
    assert "not found" in refusal(capsys, words("generate", path), path)


def test_other_failures_of_training_keep_their_traceback() -> None:
    """Only those of a checkpoint that is there become one message."""
    given = words("restore", Path("nowhere.pt"))
    given += ["--train-subset", "nonesuch"]
    with pytest.raises(Exception, match="dataset is empty"):
        main(given)

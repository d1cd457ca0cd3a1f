"""Words on the command line that cannot be."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from moe_train.commands.cli.app import plain
from moe_train.commands.cli.overrides import check_overrides
from moe_train.commands.plan import main
from moe_train.config import RunConfig, build
from moe_train.config.paths import configs_directory
from moe_train.errors import ConfigError
from moe_train.launch.hydra_store import forget_foreign_schemas
from moe_train.routing import routing_config


@pytest.fixture(autouse=True)
def _hydra_alone() -> None:
    forget_foreign_schemas()


@pytest.mark.parametrize(
    "words",
    [
        ["data=x"],
        ["routing=top_k", "routing.top_k=2", "training.max_updates=3"],
        ["routing=switch,top_k", "seed=1,2", "routing.num_experts=4"],
        ["experiment=memorise", "training.optimizer.lr=1e-3"],
        ["hydra.run.dir=/tmp/x", "hydra/launcher=submitit_slurm", "hydra.sweep.subdir=a"],
        ["+routing.decoder.name=switch", "++training.clip_norm=0"],
        ["task.directions=[en-de,de-en]", "data='a b'"],
        ["training.optimizer.betas=[0.9,0.99]", "training.optimizer={lr:0.1}"],
    ],
)
def test_what_exists_passes(words: list[str]) -> None:
    check_overrides("train", words)


def test_schemas_that_a_plug_in_has_imported_are_not_ours() -> None:
    """A module of user_dir may import fairseq after the command has started, with a task/translation of its own."""
    for group, name in (("task", "translation"), ("optimizer", "adam")):
        ConfigStore.instance().store(group=group, name=name, node={"left_pad": True})
    check_overrides("train", ["task=translation", "data=x"])
    assert "task" not in ConfigStore.instance().repo


def test_a_folder_alone_is_offered_with_its_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs").mkdir()
    with pytest.raises(ConfigError, match="Did you mean 'run=outputs' or 'data=outputs'"):
        check_overrides("evaluate", ["outputs"])
    with pytest.raises(ConfigError, match="Write key=value"):
        check_overrides("evaluate", ["output"])


def test_values_with_characters_that_hydra_reads_only_in_quotes_are_quoted() -> None:
    for word, value in (("data=/home/jürgen/a b", "/home/jürgen/a b"), ("data=it's/ü", "it's/ü"), ("run=ü", "ü")):
        (found,) = check_overrides("train", [word])
        assert OverridesParser.create().parse_override(found).value() == value
    for word in ("task.directions=[ü]", "training.optimizer={ü: 1}", "dätä=x", "jürgen"):
        with pytest.raises(ConfigError, match="token recognition error"):
            check_overrides("train", [word])


@pytest.mark.parametrize("words", [["seed=range(1,10000000000)"], ["seed=range(0,200)", "data_verify=range(0,99)"]])
def test_a_sweep_without_end_is_refused(words: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"the sweep has [\d,]{6,} jobs with it\. Choose values for 1 to 10,000 jobs"):
        check_overrides("train", ["routing=switch", *words], multirun=True)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("run=null", "hydra.run.dir=null: the run folder must be a path. Write run=FOLDER"),
        ("run=[x]", "the run folder must be a path"),
        ("run=", "the run folder must be a path"),
        ("model=null", "'model' must be one of its options, not null"),
        ("routing=null", "'routing' must be one of its options, not null"),
        ("seed=range(1,9,0)", r"seed=range\(1,9,0\): the sweep has 0 jobs"),
        ("seed=range(1,0)", r"seed=range\(1,0\): the sweep has 0 jobs"),
        ("training.max_update=3", r"unknown key 'training\.max_update'.*'training\.max_updates'"),
        ("max_updates=3", r"unknown key 'max_updates'.*'training\.max_updates'"),
        ("trainig.seed=3", "unknown key 'trainig.seed'"),
        ("routing=swich", "there is no routing 'swich'.*'switch'"),
        ("routing=switch,thro", "there is no routing 'thro'.*'thor'"),
        ("modle=tiny", "unknown key 'modle'.*'model'"),
        ("model=gigantic", "there is no model 'gigantic'.*base"),
        ("routing.capacity_facter=1", r"'routing\.capacity_factor'"),
        ("routing.strata=[4,4]", "unknown key 'routing.strata': it belongs to routing=smoe. .*choose routing=smoe"),
        ("routing.top_k=2", "it belongs to routing=sam, routing=smoe, routing=top_k"),
        ("routing.k=2", r"key 'routing.k': 'routing.top_k' belongs to routing=sam, routing=smoe, routing=top_k"),
        ("engine.offload_optimizer=true", "it belongs to engine=deepspeed"),
        ("seed.x=3", "'seed' is a value, not a group"),
        ("training.zzz=1", r"unknown key 'training\.zzz'.*known in training: .*max_updates"),
        ("seed", "cannot read 'seed'"),
        (f"seed={'1' * 5000}", "cannot read 'seed=1.*Exceeds the limit"),
        ("training.optimizer.betas={a:1}", r"'training.optimizer.betas' must be a list, not {'a': 1}"),
        ("training.optimizer=[1]", r"'training.optimizer' must be a group of keys, not \[1\]"),
        ("data=[", r"cannot read 'data=\['"),
        ("experiment=nothing", "there is no experiment 'nothing'.*memorise"),
    ],
)
def test_what_does_not_exist_is_named_with_near_spellings(word: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"(?i){message}"):
        check_overrides("train", [word])


def test_k_is_taken_for_top_k_where_the_strategy_has_it() -> None:
    with pytest.raises(ConfigError, match=r"unknown key 'routing\.k'\. Did you mean 'routing\.top_k'\?$"):
        check_overrides("train", ["routing=top_k", "routing.k=2"])


def composed(*words: str) -> dict[str, Any]:
    with initialize_config_dir(str(configs_directory()), version_base="1.3"):
        return plain(compose("train", overrides=["data=x", *words]))


def leaves(content: Any, prefix: str = "") -> set[str]:
    if not isinstance(content, dict):
        return {prefix.rstrip(".")}
    return set().union(*(leaves(value, f"{prefix}{name}.") for name, value in content.items()))


def test_the_files_hold_every_key_and_the_dataclasses_defaults() -> None:
    """What can be set can be seen: a key that no file shows could be set only with '+'."""
    content = composed()
    config = build(RunConfig, {key: value for key, value in content.items() if key != "experiment"})
    everything = leaves(content) | leaves(composed("engine=deepspeed")) | leaves(composed("model=vit_tiny"))
    shown = {key for key in everything if not key.startswith("routing.") and key != "experiment"}
    known = leaves(OmegaConf.to_container(OmegaConf.create(dataclasses.asdict(config))))
    assert shown == {key for key in known if not key.startswith("routing.")}
    for group in ("training", "engine", "launch", "layout", "search", "task"):
        assert getattr(config, group) == type(getattr(config, group))(), group


def test_memorise_learns_by_heart() -> None:
    config = build(RunConfig, {k: v for k, v in composed("experiment=memorise").items() if k != "experiment"})
    assert (config.model.dropout, config.model.attention_dropout, config.model.activation_dropout) == (0.0, 0.0, 0.0)
    assert config.training.label_smoothing == 0.0 and config.training.schedule.name == "linear"
    assert routing_config(config.routing).name == "switch"


def test_a_missing_value_is_asked_for() -> None:
    with initialize_config_dir(str(configs_directory()), version_base="1.3"):
        config = compose("train")
    with pytest.raises(ConfigError, match="the key 'data' has no value"):
        plain(config)


@pytest.mark.parametrize(
    ("word", "key", "found"),
    [
        ("tiers.languages={sw: low}", "tiers.languages", {"sw": "low"}),
        ("corpus.codes={pt: pt_PT}", "corpus.codes", {"zh": "zh_Hans", "pt": "pt_PT"}),
        ("vocabulary={size: 500}", "vocabulary.size", 500),
    ],
)
def test_a_mapping_adds_its_keys(word: str, key: str, found: object) -> None:
    words = check_overrides("prepare", ["corpus=l10n", word])
    with initialize_config_dir(str(configs_directory()), version_base="1.3"):
        config = compose("prepare", overrides=words)
    assert OmegaConf.select(config, key) == found


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("training.lr=1e-3", r"did you mean 'training\.optimizer\.lr'\?$"),
        ("lr=1e-3", r"did you mean 'training\.optimizer\.lr'\?$"),
        ("+training.lr=1e-3", r"'training\.optimizer\.lr'"),
        ("training.dropout=0.1", r"did you mean 'model\.dropout'\?$"),
        ("training.name=cosine", r"did you mean 'training\.optimizer\.name' or 'training\.schedule\.name'\?$"),
        ("schedule=cosine", r"did you mean 'training\.schedule\.name'\?$"),
        ("training.schedule=cosine", r"must be a group of keys.*write training\.schedule\.name=cosine"),
        ("out=x", r"did you mean 'hydra\.run\.dir', in short 'run'\?$"),
        ("run.dir=x", r"did you mean 'hydra\.run\.dir', in short 'run'\?$"),
    ],
)
def test_a_key_whose_last_part_stands_elsewhere_is_suggested(word: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"(?i){message}"):
        content = composed(*check_overrides("train", [word]))
        build(RunConfig, {key: value for key, value in content.items() if key != "experiment"})


def test_the_run_folder_has_a_short_name() -> None:
    assert check_overrides("train", ["run='a b'", "data=x"]) == ["hydra.run.dir='a b'", "data=x"]
    assert check_overrides("train", ["run=x"], multirun=True) == ["hydra.sweep.dir=x"]
    assert check_overrides("evaluate", ["run=x"]) == ["run=x"]  # a key of its own there
    with pytest.raises(ConfigError, match=r"(?i)did you mean 'runs'\?"):
        check_overrides("report", ["run=x"])


def test_an_option_of_a_folder_that_is_named(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text("embed_dim: 8\n")
    assert check_overrides("train", ["model=mine"], str(tmp_path)) == ["model=mine"]
    with pytest.raises(ConfigError, match=r"--config-dir .*: the folder does not exist"):
        check_overrides("train", ["model=mine"], str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-m", "--cfg", "job"], "only one of"),
        (["--resolve"], "--resolve needs --cfg"),
        (["--experimental-rerun", "job.pickle"], "reads a pickle"),
    ],
)
def test_flags_that_cannot_be_are_one_message(
    words: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["moe-plan", *words])
    with pytest.raises(SystemExit) as left:
        main()
    said = capsys.readouterr().err
    assert left.value.code == 2 and message in said and said.count("\n") == 2, said


def test_flags_may_stand_between_overrides(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["moe-plan", "layout.world=16", "--cfg", "job", "model=big"])
    main()
    shown = capsys.readouterr().out
    assert "world: 16" in shown and "embed_dim: 1024" in shown

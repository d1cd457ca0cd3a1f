"""``moe-plan`` as a command."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from moe_train.commands.cli.overrides import check_overrides
from moe_train.commands.plan import main
from moe_train.config import RunConfig, build
from moe_train.errors import ConfigError
from moe_train.launch.hydra_store import forget_foreign_schemas

pytestmark = [pytest.mark.processes, pytest.mark.warm_start]

ROOT = Path(__file__).resolve().parents[2]


def moe_plan(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "moe_train.commands.plan", *words]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=250, check=False)


@pytest.mark.timeout(600)
def test_it_prints_tables_and_writes_json(tmp_path: Path) -> None:
    words = ("layout.world=64", "model=base", "routing=sam", "routing.num_experts=64", "routing.num_groups=8")
    (tmp_path / "plan.json.tmp").write_text("mine")
    done = moe_plan(*words, "json=plan.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "plan.json.tmp").read_text() == "mine"
    (tmp_path / "plan.json.tmp").unlink()
    for part in (
        "Cluster: dgx_a100, 8 nodes of 8 ranks; cluster=… sets another",
        "Parameters",
        "Memory of a rank",
        "What a rank sends",
        "Time of a step",
        "Layouts",
        "Choice:",
    ):
        assert part in done.stdout
    content = json.loads((tmp_path / "plan.json").read_text())
    assert content["chosen"]["world"] == 64 and content["chosen"]["num_groups"] == 8
    assert {path.name for path in tmp_path.iterdir()} == {"plan.json"}
    last = done.stdout.splitlines()[-1]
    assert last.startswith(
        "sbatch --nodes=8 --ntasks-per-node=8 --gpus-per-node=8 scripts/slurm/train.sbatch data=DIR "
    )
    assert last.endswith(" ".join(content["train_words"]))
    config = trained_with(content["train_words"])
    assert config.layout.expert_parallel == content["chosen"]["expert_parallel"]
    assert config.layout.two_level == content["chosen"]["two_level"] and config.training.precision == "bf16"
    assert config.model.embed_dim == 512 and config.routing["num_experts"] == 64 and config.routing["num_groups"] == 8


def trained_with(words: list[str]) -> RunConfig:
    """What moe-train makes of words."""
    forget_foreign_schemas()  # of fairseq, which another test may have imported
    check_overrides("train", words)
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        config = OmegaConf.to_container(compose("train", overrides=["data=DIR", *words]), resolve=True)
    assert isinstance(config, dict)
    return build(RunConfig, {str(key): value for key, value in config.items() if key not in ("experiment", "user_dir")})


def test_one_rank_is_told_as_one(tmp_path: Path) -> None:
    words = ("layout.world=1", "model=vit_s16", "routing=soft_moe", "cluster=cpu", "training.optimizer=adamw")
    done = moe_plan(*words, "model.dropout=0.2", "training.accumulation=2", "training.recompute=true", cwd=tmp_path)
    assert "Cluster: cpu, 1 node of 1 rank; cluster=…" in done.stdout, done.stderr
    command, data, *last = done.stdout.splitlines()[-1].split()
    config = trained_with(last)
    assert (command, data) == ("moe-train", "data=DIR") and config.launch.processes == 1
    assert config.task.name == "image_classification" and config.model.dropout == 0.2
    assert config.training.optimizer.name == "adamw" and config.training.recompute
    assert config.training.tokens_per_update == 8192 and config.training.accumulation == 2


def test_help_names_the_cluster_that_it_takes(tmp_path: Path) -> None:
    done = moe_plan("--help", cwd=tmp_path)
    taken = yaml.safe_load((ROOT / "configs" / "plan.yaml").read_text(encoding="utf-8"))["defaults"]
    (name,) = (entry["cluster"] for entry in taken if "cluster" in entry)
    assert f"The cluster is {name} unless cluster=… names another" in " ".join(done.stdout.split()), done.stderr


@pytest.mark.warm_start(False)
def test_a_mistake_is_one_message(tmp_path: Path) -> None:
    done = moe_plan("layout.worlds=64", cwd=tmp_path)
    assert done.returncode == 2 and "layout.world" in done.stderr and "Traceback" not in done.stderr


def test_a_file_that_cannot_be_written_is_one_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["moe-plan", "layout.world=1", "json=/"])
    with pytest.raises(SystemExit) as raised:
        main()
    assert raised.value.code == 2 and "json=/: the plan cannot be written (" in capsys.readouterr().err


def test_a_group_of_another_command_is_refused() -> None:
    check_overrides("plan", ["engine=deepspeed", "layout.world=16", "cluster=ethernet"])
    with pytest.raises(ConfigError, match="layout"):
        check_overrides("plan", ["layout=two_level"])

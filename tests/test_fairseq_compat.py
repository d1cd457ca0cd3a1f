"""fairseq's patches: each is needed, all together make fairseq work from preprocessing to beam search."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from moe_train import fairseq_compat
from moe_train.errors import CheckpointError, MissingDependency

CHECKS = Path(__file__).with_name("fairseq_patch_checks.py")

# What goes wrong without each patch: the test must fail for this reason and no other.
FAILURES = {
    "dataclass_defaults": "mutable default .*CommonConfig",
    "deepspeed_probe": "import fairseq imported deepspeed",
    "checkpoint_loading": "Unsupported global: GLOBAL argparse.Namespace",
    "plain_values": "an option ran as code",
    "object_broadcast": "Unsupported global: GLOBAL fairseq.distributed.utils._TensorPlaceholder",
    "single_node_store": "tcp://localhost:.* listens",
    "encoder_layer_loading": "Tensor-likes are not close",
    "hydra_compose": "hydra.experimental.initialize.* is no longer experimental",
    "ddp_on_cpu": "device_ids and output_device arguments only work with",
    "numpy_names": "module 'numpy' has no attribute 'int'",
}


def run_checks(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(CHECKS), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240, check=False)


@pytest.fixture(scope="module")
def without() -> dict[str, str]:
    """The traceback of each check when its own patch is left out; "" where it passes all the same."""
    done = run_checks("--without", *FAILURES)
    assert done.returncode == 0, done.stderr
    reports: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return reports


@pytest.mark.processes
def test_every_check_passes_with_every_patch() -> None:
    done = run_checks()
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[1::2] == [patch.name for patch in fairseq_compat.PATCHES]
    assert "UserWarning" not in done.stderr, "importing fairseq or composing its config warns"


@pytest.mark.processes
@pytest.mark.parametrize("name", [patch.name for patch in fairseq_compat.PATCHES])
def test_each_patch_is_needed(name: str, without: dict[str, str]) -> None:
    assert without[name], f"{name} is no longer needed: take it out"
    assert re.search(FAILURES[name], without[name]), without[name]


def test_every_patch_says_why() -> None:
    for patch in fairseq_compat.PATCHES:
        assert len(patch.reason) > 40, patch.name


def test_apply_is_idempotent_and_rejects_unknown_names() -> None:
    names = fairseq_compat.apply()
    assert names == tuple(patch.name for patch in fairseq_compat.PATCHES)
    checkpoint_utils = __import__("fairseq.checkpoint_utils").checkpoint_utils
    loader = checkpoint_utils.load_checkpoint_to_cpu
    assert fairseq_compat.apply() == names
    assert checkpoint_utils.load_checkpoint_to_cpu is loader, "patched twice"
    with pytest.raises(ValueError, match="unknown patches: nonesuch"):
        fairseq_compat.apply(skip=("nonesuch",))


def test_attribute_gives_fairseq_and_nothing_else() -> None:
    from moe_train.fairseq_compat import fairseq

    assert fairseq.__name__ == "fairseq" and fairseq is sys.modules["fairseq"]
    with pytest.raises(AttributeError, match="nonesuch"):
        _ = fairseq_compat.nonesuch


def test_dataclasses_are_given_back() -> None:
    import dataclasses

    fairseq_compat.apply()
    assert dataclasses.dataclass.__module__ == "dataclasses"
    with pytest.raises(ValueError, match="mutable default"):
        dataclasses.make_dataclass("Mine", [("field", list, dataclasses.field(default=[]))])


def test_missing_fairseq_is_said_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "fairseq", raising=False)
    monkeypatch.setattr(fairseq_compat.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependency) as caught:
        fairseq_compat.require_fairseq()
    assert str(caught.value).startswith("fairseq is required and not installed.")
    assert "scripts/setup.sh" in str(caught.value)


class Harmful:
    """Pickles as a call: what an altered checkpoint could hold."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str, ...]]:
        return os.mkdir, (str(self.marker),)


def test_code_in_a_checkpoint_is_refused(tmp_path: Path) -> None:
    import torch

    fairseq_compat.apply()
    from fairseq import checkpoint_utils

    torch.save({"args": None, "model": {}, "extra": Harmful(tmp_path / "ran")}, tmp_path / "bad.pt")
    with pytest.raises(CheckpointError, match=r"bad\.pt: .*more than plain data.*mkdir"):
        checkpoint_utils.load_checkpoint_to_cpu(str(tmp_path / "bad.pt"))
    assert not (tmp_path / "ran").exists()


# Several of fairseq's commands in one process, as its own console scripts would run them.
DRIVER = """
import importlib, json, sys
from moe_train.fairseq_compat import apply
apply()
for name, *arguments in json.load(sys.stdin):
    sys.argv = [name, *arguments]
    importlib.import_module("fairseq_cli." + name).cli_main()
"""


def fairseq_commands(*commands: list[str]) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    driver = [sys.executable, "-c", DRIVER]
    text = json.dumps(commands)
    done = subprocess.run(driver, input=text, capture_output=True, text=True, env=environment, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.mark.processes
def test_stock_fairseq_works_from_text_to_translation(tmp_path: Path) -> None:
    """preprocess, train, resume, generate: a stock Transformer of fairseq learns to copy three sentences."""
    text = ["one two three", "two three one four", "four one"]
    for split in ("train", "valid"):
        for language in ("xx", "yy"):
            (tmp_path / f"{split}.{language}").write_text("\n".join(text) + "\n")
    data, save = str(tmp_path / "bin"), str(tmp_path / "save")
    prefixes = [f"--{split}pref={tmp_path / split}" for split in ("train", "valid")]
    prepare = ["preprocess", "--source-lang=xx", "--target-lang=yy", *prefixes, f"--destdir={data}"]
    dimensions = ("layers=1", "embed-dim=16", "ffn-embed-dim=16")
    size = [f"--{side}-{dimension}" for side in ("encoder", "decoder") for dimension in dimensions]
    train = ["train", data, "--arch=transformer", *size, "--optimizer=adam", "--lr=0.02", "--max-tokens=64", "--cpu"]
    train += ["--dropout=0", f"--save-dir={save}", "--no-epoch-checkpoints", "--share-all-embeddings"]
    train += ["--disable-validation", "--save-interval=1000"]
    generate = ["generate", data, f"--path={save}/checkpoint_last.pt", "--gen-subset=valid", "--beam=4", "--cpu"]
    output = fairseq_commands(
        [*prepare, "--joined-dictionary"], [*train, "--max-update=60"], [*train, "--max-update=80"], generate
    )
    assert re.search(r"Loaded checkpoint .*checkpoint_last\.pt \(epoch 61 @ 60 updates\)", output)
    hypotheses = re.findall(r"^D-(\d)\t\S+\t(.*)$", output, flags=re.MULTILINE)
    assert {text[int(number)]: words for number, words in hypotheses} == {line: line for line in text}

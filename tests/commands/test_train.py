"""``moe-train`` as a command on a small corpus: real processes, the real task and model."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from moe_train.analysis.report.load_runs import find_runs, read_run, read_runs
from moe_train.commands.train import main
from moe_train.data.folder import DataFolder
from moe_train.training.checkpoint.store import CheckpointStore
from moe_train.training.run.run_folder import recorded_overrides
from tests.small_disks import mounted_disk
from tests.training.toy_run import assert_same_bits, final_tensors, lines

pytestmark = pytest.mark.warm_start

COMMAND = [sys.executable, "-m", "moe_train.commands.train"]
SMALL = [
    *("model.embed_dim=32", "model.ffn_dim=64", "model.num_heads=2", "routing.num_experts=4"),
    *("training.max_updates=20", "training.tokens_per_update=600", "training.accumulation=2", "training.log_every=5"),
    *("training.checkpoint.every_updates=4", "training.validation.every_updates=10", "training.optimizer.lr=0.01"),
    *("training.schedule.warmup_updates=5", "training.validation.max_sentences=10", "training.threads=1"),
]


def words(data: DataFolder, folder: Path, *more: str) -> list[str]:
    return [*COMMAND, f"data={data.path}", f"hydra.run.dir={folder}", *SMALL, *more]


def run(command: list[str], cwd: Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, check=False, cwd=cwd)
    assert done.returncode == code, done.stdout + done.stderr
    return done


def here(arguments: list[str], cwd: Path) -> tuple[int, str]:
    """The command in this process, which has imported everything already: the same road without seconds of imports.

    Returns:
        The exit code, and what was said on stderr.
    """
    said = io.StringIO()
    with contextlib.chdir(cwd), contextlib.redirect_stderr(said), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["moe-train", *arguments])
        # Coverage traces, which Hydra takes for a debugger and then raises what it would report.
        patch.setattr("hydra._internal.utils.is_under_debugger", lambda: False)
        try:
            main()
        except SystemExit as left:
            return int(left.code or 0), said.getvalue()
    return 0, said.getvalue()


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, tiny_data: DataFolder) -> Path:
    """A finished run of two processes."""
    path = tmp_path_factory.mktemp("two")
    done = run(words(tiny_data, path / "run", "launch.processes=2"), path)
    assert "update 5/20: loss" in done.stdout and "finished at update 20" in done.stdout
    assert re.search(r"processes +2 on cpu, 1 threads each", done.stdout)
    return path / "run"


@pytest.mark.processes
def test_the_run_folder(two: Path, tiny_data: DataFolder) -> None:
    trained, validated = lines(two), lines(two, "valid.jsonl")
    assert [line["update"] for line in trained] == [5, 10, 15, 20]
    assert trained[-1]["nll_loss"] < trained[0]["nll_loss"]
    assert {"balance_loss", "grad_norm", "lr", "ppl", "load", "dropped", "epoch"} <= trained[0].keys()
    assert all(sum(load) == pytest.approx(1.0) and len(load) == 4 for load in trained[0]["load"].values())
    assert set(validated[0]["directions"]) == {"de-en", "en-de", "en-fr", "en-ja", "fr-en", "ja-en"}
    assert validated[1]["loss"] < validated[0]["loss"]
    info = json.loads((two / "run.json").read_text())
    assert info["status"] == "finished" and info["world"]["processes"] == 2
    assert 0 < info["parameters"]["active"] < info["parameters"]["total"] and info["flops_per_token"] > 0
    assert all(pairs == 1 for pairs in trained[-1]["pairs_per_token"].values())  # Switch, dropless
    assert info["flops_per_token_measured"] == trained[-1]["flops_per_token"] == info["flops_per_token"]
    assert "update 20" in (two / "logs" / "rank_1.log").read_text()
    assert {f"data={tiny_data.path}", *SMALL} < set(recorded_overrides(two)) and list((two / "tensorboard").iterdir())
    assert CheckpointStore(two / "checkpoints").resolve("best").name == "step_20"


@pytest.mark.processes
def test_killed_and_resumed_ends_in_the_same_bits(two: Path, tiny_data: DataFolder, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    command = words(tiny_data, folder, "launch.processes=2")
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=tmp_path)
    wait_for(folder / "train.jsonl", running)
    running.kill()
    running.wait()
    reached = len(lines(folder)) * 5
    assert reached < 20
    again = run(command, tmp_path)
    assert "resumes from" in again.stdout or reached < 4
    assert_same_bits(final_tensors(folder), final_tensors(two))
    assert lines(folder) == lines(two) and lines(folder, "valid.jsonl") == lines(two, "valid.jsonl")


def wait_for(log: Path, running: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 200
    while not (log.exists() and log.read_text().count("\n")):
        assert time.monotonic() < deadline and running.poll() is None
        time.sleep(0.01)


@pytest.mark.processes
@pytest.mark.warm_start(False)
def test_sigterm_saves_and_says_how_to_go_on(tiny_data: DataFolder, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    command = words(tiny_data, folder, "launch.processes=2", "training.max_updates=5000")
    running = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=tmp_path)
    wait_for(folder / "train.jsonl", running)  # type: ignore[arg-type]
    running.send_signal(signal.SIGTERM)
    out, _ = running.communicate(timeout=100)
    assert running.returncode == 75 and "interrupted at update" in out
    update = json.loads((folder / "run.json").read_text())["update"]
    assert CheckpointStore(folder / "checkpoints").resolve("last").name == f"step_{update}"


def under_torchrun(data: DataFolder, cwd: Path, *options: str, **keys: object) -> subprocess.Popen[str]:
    """Two ranks in the default run folder."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *options, "-m"]
    changes = [f"{key}={value}" for key, value in keys.items()]
    command = [*torchrun, *(word for word in words(data, cwd)[2:] if not word.startswith("hydra.run.dir")), *changes]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=cwd)
    deadline = time.monotonic() + 200
    while not any(log.read_text() for log in cwd.glob("outputs/[0-9]*/*/train.jsonl")):
        assert time.monotonic() < deadline and running.poll() is None
        time.sleep(0.01)
    return running


@pytest.mark.slow
def test_a_worker_killed_under_torchrun(two: Path, tiny_data: DataFolder, tmp_path: Path) -> None:
    """All ranks share one folder, the default one, and so do both lives; the end has the bits of an unbroken run."""
    running = under_torchrun(tiny_data, tmp_path, "--max-restarts=2")
    worker = subprocess.run(["pgrep", "-P", str(running.pid)], capture_output=True, text=True, check=True)
    os.kill(int(worker.stdout.split()[-1]), signal.SIGKILL)
    out, _ = running.communicate(timeout=250)
    assert running.returncode == 0, out
    (folder,) = (tmp_path / "outputs").glob("[0-9]*/*")
    assert_same_bits(final_tensors(folder), final_tensors(two))
    assert lines(folder) == lines(two)
    assert {path.name for path in (folder / "logs").iterdir()} == {"rank_0.log", "rank_1.log"}
    sessions = json.loads((folder / "run.json").read_text())["sessions"]
    assert len(sessions) == 2 and not any("hydra.run.dir" in word for word in sessions[1]["command"])


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_torchrun_asked_to_stop(number: signal.Signals, tiny_data: DataFolder, tmp_path: Path) -> None:
    """Its agent passes the signal on and waits until the workers have saved. Half a minute."""
    running = under_torchrun(tiny_data, tmp_path, **{"training.max_updates": 5000})
    running.send_signal(number)
    out, _ = running.communicate(timeout=100)
    (folder,) = (tmp_path / "outputs").glob("[0-9]*/*")
    info = json.loads((folder / "run.json").read_text())
    assert running.returncode == 1 and info["status"] == "interrupted", out
    assert CheckpointStore(folder / "checkpoints").resolve("last").name == f"step_{info['update']}"


def test_a_sweep_in_one_process(tiny_data: DataFolder, tmp_path: Path) -> None:
    sweep = [f"hydra.sweep.dir={tmp_path}/sweep", "routing=dense,switch", "training.max_updates=2"]
    keys = [word for word in words(tiny_data, tmp_path)[3:] if not word.startswith(("hydra.run", "routing."))]
    assert here(["-m", *keys, *sweep], tmp_path)[0] == 0
    for number, name in enumerate(("dense", "switch")):
        info = json.loads((tmp_path / "sweep" / str(number) / "run.json").read_text())
        config = json.loads((tmp_path / "sweep" / str(number) / "config.json").read_text())["config"]
        assert info["status"] == "finished" and config["routing"]["name"] == name


def test_the_mistakes_in_a_sweep_are_told_once_each(tiny_data: DataFolder, tmp_path: Path) -> None:
    """With the jobs that they are about, and without a traceback; the report has them too."""
    sweep = [f"hydra.sweep.dir={tmp_path}/sweep", "model.num_heads=2,3", "training.clip_norm=-1,1"]
    keys = [word for word in words(tiny_data, tmp_path)[3:] if not word.startswith("model.num_heads")]
    code, said = here(["-m", *keys, *sweep, "training.max_updates=2"], tmp_path)
    assert code == 2 and "Traceback" not in said and "HYDRA_FULL_ERROR" not in [*said.split(), *os.environ]
    assert said.count("Error: ") == 2 and "Error: job 0: 'training.clip_norm' must not be negative" in said
    assert "Error: jobs 2, 3: model.embed_dim=32 is not divisible by model.num_heads=3" in said
    runs = read_runs([tmp_path / "sweep"])
    assert [run.status for run in runs] == ["failed", "finished", "failed", "failed"]
    assert "model.num_heads=3" in runs[3].overrides and "num_heads=3" in runs[3].cause


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory, tiny_data: DataFolder) -> Path:
    """A finished run of one process."""
    path = tmp_path_factory.mktemp("one")
    assert here(words(tiny_data, path / "run", "training.max_updates=8")[3:], path)[0] == 0
    return path / "run"


@pytest.mark.parametrize(
    ("changes", "messages"),
    [
        (["training.max_updates=8"], ["is finished (8 updates)", "training.max_updates"]),
        (["training.clip_norm=5"], ["another config", "training.clip_norm=1.0 then, 5.0 now"]),
        (["resume=never"], ["resume=never, but the folder holds a run"]),
    ],
)
def test_a_folder_that_cannot_be_gone_on_in(
    changes: list[str], messages: list[str], one: Path, tiny_data: DataFolder, tmp_path: Path
) -> None:
    """And whose record stays as it was, byte by byte."""
    before = contents(one)
    code, said = here(words(tiny_data, one, *changes)[3:], tmp_path)
    assert code == 2 and all(message in said for message in messages), said
    assert contents(one) == before and "training.max_updates=8" in read_run(one, "one").overrides
    assert read_run(one, "one").status == "finished"


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.processes
def test_a_start_that_failed_leaves_nothing_that_a_report_lists(tiny_data: DataFolder, tmp_path: Path) -> None:
    """Neither one that is refused at once nor one that comes as far as its processes; the user's files stay."""
    named = tmp_path / "named"
    named.mkdir()
    (named / "notes").write_text("mine")
    keys = words(tiny_data, named)[3:]
    unnamed = [word for word in keys if not word.startswith("hydra.run.dir=")]
    late = "training.init_from=/nowhere"
    for command in (
        [*keys, "training.clip_norm=-1"],
        [*unnamed, "training.clip_norm=-1"],
        [word for word in unnamed if not word.startswith("data=")],
        [*unnamed, late],
        [*keys, late, "launch.processes=2"],
    ):
        code, said = here(command, tmp_path)
        assert code == 2 and said.startswith("Error: "), said
        assert not list(tmp_path.glob("outputs/*")) and contents(named).keys() <= {named / "notes", named / ".lock"}
        assert not find_runs(tmp_path)
    assert (named / "notes").read_text() == "mine"


def test_a_run_that_fails_after_it_began_is_reported(tiny_data: DataFolder, tmp_path: Path) -> None:
    """And so is a start in a folder with a run: its record stays."""
    keys = [*words(tiny_data, tmp_path / "run")[3:], "training.max_updates=9"]
    broken = ["training.optimizer.lr=1e4", "training.nonfinite_limit=2", "training.clip_norm=0", "resume=auto"]
    code, said = here([*keys, *broken], tmp_path)
    assert code == 2 and read_run(tmp_path / "run", "run").failed, said
    assert "finite" in read_run(tmp_path / "run", "run").cause, said


@pytest.mark.slow
def test_a_damaged_checkpoint_is_skipped_where_the_key_says_so(
    two: Path, tiny_data: DataFolder, tmp_path: Path
) -> None:
    """Nothing is lost beyond the last whole one, and the end has the same bits."""
    folder = tmp_path / "run"
    shutil.copytree(two, folder, symlinks=True)
    shard = next((folder / "checkpoints" / "step_20").glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(bytes(content))
    keys = ["training.max_updates=21", "training.checkpoint.damaged=skip", "training.validation.every_updates=10"]
    run(words(tiny_data, folder, "launch.processes=2", *keys), tmp_path)
    sessions = json.loads((folder / "run.json").read_text())["sessions"]
    assert sessions[-1]["from_update"] == 16 and (folder / "checkpoints" / "step_20.damaged").is_dir()
    assert_same_bits(final_tensors(folder, "step_20"), final_tensors(two))


def test_a_damaged_checkpoint_is_named(one: Path, tiny_data: DataFolder, tmp_path: Path) -> None:
    shard = next((one / "checkpoints" / "step_8").glob("*.safetensors"))
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-8])
    try:
        code, said = here(words(tiny_data, one, "training.max_updates=9")[3:], tmp_path)
    finally:
        shard.write_bytes(whole)
    assert code == 2 and str(shard) in said and "step_4, is whole" in said


@pytest.mark.parametrize(
    ("changes", "messages"),
    [
        (["data=/nowhere"], ["/nowhere: the data folder does not exist", "moe-prepare"]),
        (["task.directions=[en-xx]"], ["no direction 'en-xx'"]),
        (["training.clip_norm=-1"], ["'training.clip_norm' must not be negative"]),
        (["training.max_updates=many"], ["'training.max_updates' must be a whole number, not 'many'"]),
        (["training.temperature=1e-9"], ["'training.temperature' must be 0.05 or more, not 1e-09"]),
        (["training.optimizer.betas=[1,1]"], ["'training.optimizer.betas[0]' must be below 1, not 1"]),
        (["training.optimizer.betas=[0.9]"], ["'training.optimizer.betas' has 1 numbers, and Adam takes two"]),
        (["search.length_penalty=nan"], ["'search.length_penalty' must be a finite number, not nan"]),
        (["training.validation.max_sentences=-1"], ["'training.validation.max_sentences' must not be negative"]),
        (["routing=expert_choice", "routing.decoder=null"], ["expert_choice looks at later tokens", "routing.decoder"]),
        (["routing=soft_moe", "routing.decoder=null"], ["soft_moe looks at later tokens", "routing.decoder=top_k"]),
        (["routing=smoe", "routing.strata=[4,12]"], ["routing.strata=[4, 12] sum to 16", "routing.num_experts=8"]),
        (["routing=sam", "routing.num_groups=4", "routing.top_k=3"], ["routing.top_k=3 is more than", "of a group"]),
        (["routing=sam", "routing.num_groups=3"], ["routing.num_groups=3 does not divide routing.num_experts=8"]),
        (["routing=top_k", "routing.top_k=9"], ["routing.top_k=9 is more than routing.num_experts, 8"]),
        (["routing=switch", "routing.capacity_factor=-1"], ["'routing.capacity_factor' must be above 0, not -1"]),
        (["routing=expert_choice", "routing.capacity_factor=-1"], ["'routing.capacity_factor' must be above 0"]),
        (["routing=thor", "routing.inferrence=token"], ["unknown key 'routing.inferrence'", "'routing.inference'"]),
        (["routing=thor", "routing.inference=tokens"], ["'routing.inference' cannot be 'tokens'", "'token'"]),
        (["routing=switch", "routing.strata=[4,4]"], ["unknown key 'routing.strata'", "belongs to routing=smoe"]),
        (["routing=swich"], ["there is no routing 'swich'", "'switch'"]),
        (["model.embed_dim=33"], ["not divisible"]),
        (["launch.processes=2", "layout.expert_parallel=3"], ["above the 2 ranks", "layout.expert_parallel to 1 or 2"]),
    ],
)
def test_mistakes_are_found_before_any_process_starts(
    changes: list[str], messages: list[str], tiny_data: DataFolder, tmp_path: Path
) -> None:
    command = [word for word in words(tiny_data, tmp_path / "run")[3:] if word.split("=")[0] not in _keys(changes)]
    if changes[0].startswith("routing="):
        command = [word for word in command if not word.startswith("routing.")]
    code, said = here([*command, *changes], tmp_path)
    assert code == 2 and all(message in said for message in messages), said
    assert not (tmp_path / "run" / "checkpoints").exists()


def _keys(words: list[str]) -> list[str]:
    return [word.split("=")[0] for word in words]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for one checkpoint of the small model and not for two."""
    with mounted_disk(tmp_path, "2m") as disk:
        yield disk


@pytest.mark.processes
def test_a_disk_that_fills_while_a_checkpoint_is_written(
    small_disk: Path, tiny_data: DataFolder, tmp_path: Path
) -> None:
    folder = small_disk / "run"
    done = run(words(tiny_data, folder, "launch.processes=2"), tmp_path, code=2)
    assert "No space left on device" in done.stderr and "step_4 is whole: the run resumes from it" in done.stderr
    assert "Traceback" not in done.stderr
    store = CheckpointStore(folder / "checkpoints")
    assert store.updates() == [4] and store.resolve("last").name == "step_4"
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    assert here(words(tiny_data, folder)[3:], tmp_path)[0] == 0  # room was made: it goes on, in one process even
    assert json.loads((folder / "run.json").read_text())["status"] == "finished"


def test_nothing_is_left_in_the_environment() -> None:
    assert "RANK" not in os.environ

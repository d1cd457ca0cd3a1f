"""Loggers: threads that hold up nothing, missing libraries, and W&B's and MLflow's stores read back.

The stores need a Python that has this environment's packages, wandb and mlflow:

    scripts/logger_environment.sh outputs/loggers
    MOE_TRAIN_LOGGERS_PYTHON=$PWD/outputs/loggers/bin/python pytest -m slow tests/training/metrics/test_loggers.py
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import threading
from collections.abc import Mapping
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest

from moe_train.errors import MissingDependency
from moe_train.training.metrics import logger_thread
from moe_train.training.metrics.logger_registry import find_loggers
from moe_train.training.metrics.logger_thread import LoggerThread

LOGGERS_PYTHON = os.environ.get("MOE_TRAIN_LOGGERS_PYTHON", "")
DATA = Path(__file__).parents[2] / "old_runs" / "data"
SMALL = [
    *(f"data={DATA}", "model.embed_dim=16", "model.ffn_dim=32", "model.num_heads=2", "model.max_positions=40"),
    *("model.encoder_layers=1", "model.decoder_layers=1", "model.sparse_layers=all", "routing=switch"),
    *("training.tokens_per_update=256", "training.threads=1", "training.log_every=1", "routing.num_experts=2"),
    *("training.validation.max_sentences=4", "training.validation.bleu=true", "training.validation.every_updates=2"),
    *("search.beam=1", "search.max_length_ratio=1"),
]


class Recorder:
    """Keeps lines; fails or waits where a line says so."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, int]] = []
        self.released = threading.Event()

    def trained(self, line: Mapping[str, Any]) -> None:
        self.lines.append(("trained", line["update"]))
        if line.get("fail"):
            raise ConnectionError("the server is gone")
        if line.get("wait"):
            self.released.wait()

    def validated(self, line: Mapping[str, Any]) -> None:
        self.lines.append(("validated", line["update"]))

    def close(self) -> None:
        self.lines.append(("closed", 0))


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_logger_gets_all_lines_in_their_order_before_it_is_closed(caplog: pytest.LogCaptureFixture) -> None:
    recorder = Recorder()
    thread = LoggerThread("one", lambda: recorder)
    for update in range(100):
        thread.put("trained" if update % 10 else "validated", {"update": update})
    thread.close()
    assert [number for _, number in recorder.lines] == [*range(100), 0] and recorder.lines[-1][0] == "closed"
    assert [kind for kind, number in recorder.lines if number == 90] == ["validated"] and not warnings(caplog)


def test_a_logger_that_fails_is_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    recorder = Recorder()
    thread = LoggerThread("one", lambda: recorder)
    for update in range(3):
        thread.put("trained", {"update": update, "fail": True})
    thread.close()
    other = LoggerThread("two", lambda: {}["nothing"])
    other.close()
    assert recorder.lines == [("trained", 0)]
    assert warnings(caplog) == [
        f"the logger '{name}' has failed and is left out from now on" for name in ("one", "two")
    ]


def test_a_logger_that_waits_holds_up_neither_training_nor_the_end(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logger_thread, "MOST_WAITING", 4)
    ends, full = Recorder(), Recorder()
    never = LoggerThread("ends", lambda: ends, close_seconds=0.05)
    never.put("trained", {"update": 0, "wait": True})
    never.close()
    slow = LoggerThread("full", lambda: full, close_seconds=0.05)
    for update in range(20):
        slow.put("trained", {"update": update, "wait": True})
    slow.close()
    assert warnings(caplog) == [
        "the logger 'ends' did not end in 0.05 seconds and is left out from now on",
        "the logger 'full' has not taken the last 4 lines and is left out from now on",
    ]
    for recorder in (ends, full):
        recorder.released.set()


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_logger_whose_library_is_missing_is_found_before_training(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / name).mkdir()  # such as W&B's own folder of runs
    if name in packages_distributions():
        pytest.skip(f"{name} is installed")
    with pytest.raises(MissingDependency, match=rf"Pip install 'moe_train\[{name}\]'"):
        find_loggers([name])


# --- W&B and MLflow --------------------------------------------------------------------------------------------------

KILLER = """
import os, signal, time
from pathlib import Path
from moe_train.training.metrics.logger_registry import register_logger

def services():
    every = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    for pid in every:
        try:
            about = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            if int(about[1]) == os.getpid() and "wandb-core" in Path(f"/proc/{pid}/cmdline").read_text():
                yield pid
        except OSError:
            pass

@register_logger("killer")
class Killer:
    def __init__(self, folder, config, update):
        self.folder = folder

    def trained(self, line):
        while not list(self.folder.glob("wandb/offline-run-*/*.wandb")):
            time.sleep(0.05)
        for pid in services():
            os.kill(pid, signal.SIGKILL)
            (self.folder / "killed").touch()

    def validated(self, line):
        pass

    def close(self):
        pass
"""
READ = """
import json, struct, sys
from pathlib import Path
from mlflow.tracking import MlflowClient
from wandb.proto import wandb_internal_pb2 as proto

def records(path):  # of LevelDB's log format: blocks of 32 KiB, records in parts with checksum, length and kind
    content, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", content, at)
        whole += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            record = proto.Record()
            record.ParseFromString(whole)
            yield record
            whole = b""

folder = Path(sys.argv[1])
found = {"wandb": {}, "sessions": []}
for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
    for record in records(path):
        if record.WhichOneof("record_type") == "run":
            config = {item.key: json.loads(item.value_json) for item in record.run.config.update}
            found["sessions"].append([record.run.run_id, record.run.display_name, config.get("routing")])
        if record.WhichOneof("record_type") == "history":
            line = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
            for name, value in line.items():
                found["wandb"].setdefault(name, []).append([line["update"], value])
client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
(run,) = client.search_runs([client.get_experiment_by_name("moe_train").experiment_id])
found["mlflow"] = {
    name: [[metric.step, metric.value] for metric in client.get_metric_history(run.info.run_id, name)]
    for name in run.data.metrics
}
found["run"] = [run.info.run_name, run.info.status, run.data.params]
print(json.dumps(found))
"""


def train(at: Path, *words: str) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "MLFLOW_"))}
    command = [LOGGERS_PYTHON, "-m", "moe_train.commands.train", *SMALL, f"hydra.run.dir={at}", *words]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=250, check=False, env=environment, cwd=at.parent
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return (at / "logs" / "rank_0.log").read_text()


@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.skipif(not LOGGERS_PYTHON, reason="MOE_TRAIN_LOGGERS_PYTHON names no Python with wandb and mlflow")
def test_wandb_and_mlflow_hold_what_the_logs_hold(tmp_path: Path) -> None:
    """Loss, BLEU and expert loads of two sessions, in one run of each; W&B's part is a file, since it is offline."""
    at = tmp_path / "first"
    for updates in (4, 6):
        log = train(at, "training.loggers=[wandb,mlflow]", f"training.max_updates={updates}")
        assert "is left out" not in log
    read = subprocess.run(
        [LOGGERS_PYTHON, "-c", READ, str(at)], capture_output=True, text=True, timeout=100, check=False
    )
    assert read.returncode == 0, read.stderr
    found = json.loads(read.stdout.splitlines()[-1])
    lines = {
        kind: [json.loads(line) for line in (at / f"{kind}.jsonl").read_text().splitlines()]
        for kind in ("train", "valid")
    }
    wanted = {
        "train/loss": [[line["update"], line["loss"]] for line in lines["train"]],
        "train/load/0/1": [[line["update"], line["load"]["0"][1]] for line in lines["train"]],
        "valid/nll_loss": [[line["update"], line["nll_loss"]] for line in lines["valid"]],
        "valid/bleu": [[line["update"], line["bleu"]] for line in lines["valid"]],
        "valid/bleu_by_direction/en-de": [
            [line["update"], line["bleu_by_direction"]["en-de"]] for line in lines["valid"]
        ],
    }
    assert len(wanted["train/loss"]) == 6 and len(wanted["valid/bleu"]) == 3
    for name, values in wanted.items():
        assert found["wandb"][name] == values == found["mlflow"][name], name
    (first, name, routing), second = found["sessions"]
    assert first == second[0] and name == "first" and routing["name"] == "switch"
    name, status, parameters = found["run"]
    assert (name, status, parameters["routing.name"]) == ("first", "FINISHED", "switch")


@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.skipif(not LOGGERS_PYTHON, reason="MOE_TRAIN_LOGGERS_PYTHON names no Python with wandb and mlflow")
def test_a_killed_service_of_wandb_ends_no_training(tmp_path: Path) -> None:
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "killer.py").write_text(KILLER)
    words = ["training.loggers=[wandb,killer]", f"user_dir={tmp_path / 'code'}", "training.max_updates=60"]
    log = train(tmp_path / "run", *words, "training.validation.every_updates=60")
    assert (tmp_path / "run" / "killed").exists()
    assert log.count("the logger 'wandb'") == 1 and "finished at update 60" in log

"""Commands whose standard streams are closed by their reader, full, not UTF-8, or closed from the start."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from moe_train.commands import plan, report, train, translate
from moe_train.commands.cli.app import run_app
from moe_train.data.folder import DataFolder
from moe_train.training.checkpoint.store import CheckpointStore
from tests.analysis.report_folders import trained
from tests.evaluation.runs import make_run
from tests.streams import opened, pipe_without_reader, standard_streams

pytestmark = pytest.mark.warm_start

SMALL = [
    *("model.embed_dim=32", "model.ffn_dim=64", "model.num_heads=2", "routing.num_experts=4", "training.threads=1"),
    *("training.max_updates=2", "training.tokens_per_update=600", "training.log_every=1"),
    *("training.validation.max_sentences=10", "training.precision=fp32"),
]


def run(main: Callable[[], None], *words: str) -> int:
    """A command in this process; gives its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["moe-test", *words])
        # Coverage traces, which Hydra takes for a debugger and then raises what it would report.
        patch.setattr("hydra._internal.utils.is_under_debugger", lambda: False)
        try:
            main()
        except SystemExit as left:
            return int(left.code or 0)
    return 0


@contextmanager
def pipe_to_head() -> Iterator[int]:
    """A descriptor for writing into ``head -n 3``."""
    with subprocess.Popen(["head", "-n", "3"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as head:
        assert head.stdin is not None
        yield head.stdin.fileno()
        head.stdin.close()


@pytest.mark.processes
@pytest.mark.parametrize(
    ("processes", "out", "err", "reasons"),
    [
        (1, pipe_to_head, opened, ("Broken pipe", "No space left on device")),
        (1, opened, pipe_without_reader, ("No space left on device", "Broken pipe")),
        (2, pipe_to_head, opened, ("Broken pipe", "No space left on device")),
    ],
    ids=["head", "full", "two processes"],
)
def test_a_training_does_not_end_of_its_console(
    processes: int, out: Callable, err: Callable, reasons: tuple[str, str], tiny_data: DataFolder, tmp_path: Path
) -> None:
    words = [f"data={tiny_data.path}", f"hydra.run.dir={tmp_path / 'run'}", f"launch.processes={processes}", *SMALL]
    with out() as stdout, err() as stderr, standard_streams(stdout, stderr):
        code = run(train.main, *words)
    assert code == 0 and json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "finished"
    assert CheckpointStore(tmp_path / "run" / "checkpoints").resolve("last").name == "step_2"
    log = (tmp_path / "run" / "logs" / "rank_0.log").read_text().splitlines()
    for name, reason in zip(("output", "error"), reasons, strict=True):
        assert len([line for line in log if f"standard {name} cannot be written ({reason})" in line]) == 1, log
    assert any("update 2/2" in line for line in log)


def test_a_report_into_head_ends_quietly_and_one_onto_a_full_disk_says_so(tmp_path: Path) -> None:
    """Either way its files are written."""
    for name in "ab":
        trained(tmp_path / "runs" / name)
    words = (f"runs=[{tmp_path / 'runs'}]", "samples=0", "html=false")
    board = tmp_path / "runs" / "leaderboard.md"
    full = "Error: standard output cannot be written (No space left on device)"
    for lost, code, said in ((pipe_without_reader, 0, ""), (opened, 2, full)):
        err = tmp_path / lost.__name__
        with lost() as stdout, opened(str(err)) as stderr, standard_streams(stdout, stderr):
            assert run(report.main, *words) == code
        assert err.read_text().startswith(said) and err.read_text().count("\n") == (code != 0)
        assert "| a | switch | finished |" in board.read_text()
        board.unlink()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_tables_on_a_stream_that_is_not_utf8(encoding: str, tmp_path: Path) -> None:
    """Of runs whose name cannot be shown as it is: one is of letters, one of bytes that are no text."""
    for name in ("größer", "\udcff"):
        trained(tmp_path / "runs" / name)
    with opened(str(tmp_path / "out")) as stdout, standard_streams(stdout, 2, encoding):
        assert run(report.main, f"runs=[{tmp_path / 'runs'}]", "samples=0", "html=false") == 0
        assert run(plan.main, "model=tiny", "routing=switch") == 0
    shown = (tmp_path / "out").read_bytes().decode(encoding)
    assert "gr\\xf6\\xdfer" in shown if encoding == "ascii" else "größer" in shown
    assert "\\udcff" in shown and "Cluster: dgx_a100" in shown


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory, tiny_data: DataFolder) -> Path:
    return make_run(tmp_path_factory.mktemp("run"), tiny_data, directions=("de-en", "en-de"))


def test_translations_that_cannot_be_written_end_the_command(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (f"run={run_folder}", "source=de", "target=en", "search.beam=1", "search.max_length_ratio=0.5")
    (tmp_path / "text").write_text("Der Arzt\n" * 1000)
    for lost, code in ((pipe_without_reader, 0), (opened, 2)):
        err = tmp_path / lost.__name__
        with (
            lost() as stdout,
            opened(str(err)) as stderr,
            (tmp_path / "text").open() as typed,
            standard_streams(stdout, stderr),
        ):
            monkeypatch.setattr(sys, "stdin", typed)
            assert run(translate.main, *words, "buffer=2") == code
        told = err.read_text()
        assert ("Error: standard output cannot be written (No space left on device)" in told) == (code == 2)
        assert "translated 2 sentences" in told and "Traceback" not in told


def test_input_that_is_closed_or_cannot_be_read(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (f"run={run_folder}", "source=de", "target=en")
    monkeypatch.setattr(sys, "stdin", None)  # so Python starts after `<&-`
    assert run(translate.main, *words) == 2
    written = capsys.readouterr().err
    assert written == "Error: standard input is closed. Redirect text to it: moe-translate … < FILE.\n"
    with opened("/dev/null") as writing, open(writing, closefd=False) as stream:  # as after `0>/dev/null`
        monkeypatch.setattr(sys, "stdin", stream)
        assert run(translate.main, *words) == 2
    assert "Error: the input cannot be read after line 0 (Bad file descriptor)." in capsys.readouterr().err


def test_a_command_that_is_interrupted_says_so_in_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["moe-plan"])
    with pytest.raises(SystemExit) as left:
        run_app("plan", lambda config: signal.raise_signal(signal.SIGINT))
    assert left.value.code == 130 and capsys.readouterr().err == "Interrupted.\n"

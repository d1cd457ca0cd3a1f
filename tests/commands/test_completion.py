"""What the Tab key offers, asked of the command and in a real shell."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from moe_train.commands.cli.completion import candidates
from moe_train.commands.train import main
from moe_train.launch.hydra_store import forget_foreign_schemas
from tests.streams import Terminal


@pytest.fixture(autouse=True)
def _hydra_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forget_foreign_schemas()
    monkeypatch.chdir(tmp_path)


def test_keys_groups_and_options_of_the_command() -> None:
    """Groups of other commands are left out; words before, and wrong ones among them, do not disturb."""
    offered = candidates("train", "moe-train ")
    assert {"data=", "run=", "routing=", "routing.", "resume="} < set(offered) and "corpus=" not in offered
    assert candidates("train", "moe-train run=out data=x routing=swi") == ["routing=switch"]
    assert candidates("train", "moe-train -m routing=thor routing.inf") == ["routing.inference="]
    assert candidates("train", "moe-train sead=1 training.optimizer.l") == ["training.optimizer.lr="]


def test_files_and_folders(tmp_path: Path) -> None:
    """But no name that the shell would take for a command of its own when it reads the candidates."""
    (tmp_path / "data-bin").mkdir()
    for name in ("data.txt", ".hidden", "data$(touch pwned)", "data two"):
        (tmp_path / name).write_text("")
    assert candidates("evaluate", "moe-evaluate run=da") == ["run=data-bin/", "run=data.txt"]
    assert candidates("evaluate", "moe-evaluate run=") == ["run=data-bin/", "run=data.txt"]


def test_what_a_shell_installs_asks_for_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["/somewhere/moe-train", "-sc", "install=bash"])
    main()
    script = capsys.readouterr().out
    assert script.rstrip().endswith("-F hydra_bash_completion moe-train") and "-sc query=bash" in script
    monkeypatch.setattr(sys, "argv", ["/somewhere/moe-train", "-sc", "query=bash"])
    monkeypatch.setenv("COMP_LINE", "moe-train routing=th")
    main()
    assert capsys.readouterr().out == "routing=thor\n"


@pytest.fixture
def bash() -> Iterator[Terminal]:
    """An interactive shell without anybody's settings, which finds our commands."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    words = ["bash", "--norc", "--noprofile", "-i"]
    shell = Terminal(lambda: os.execvpe("bash", words, {**os.environ, "PATH": path, "PS1": "$ "}))
    yield shell
    shell.type(b"\x15exit\n")  # Ctrl-U empties the line: after Ctrl-C the shell may miss what follows
    shell.wait()


@pytest.mark.processes
def test_a_tab_in_bash_completes(bash: Terminal) -> None:
    bash.type(b'eval "$(moe-train -sc install=bash)"; echo installed $?\n')
    bash.read_until(b"installed 0")
    bash.type(b"moe-train routing=swi\t")
    bash.read_until(b"routing=switch")

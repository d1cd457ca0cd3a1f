"""ruff and mypy are clean on the whole checkout: the lint and types of both runs of scripts/test.sh."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("arguments", [("check",), ("format", "--check")], ids=["lint", "format"])
def test_ruff(root: Path, arguments: tuple[str, ...]) -> None:
    command = [Path(sys.executable).with_name("ruff"), *arguments, "--output-format=concise", "."]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_mypy(root: Path) -> None:
    command = Path(sys.executable).with_name("mypy")
    done = subprocess.run([command], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr

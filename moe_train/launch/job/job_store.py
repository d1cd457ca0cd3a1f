"""Small texts that the ranks of a job leave for one another when collectives do not work.

A local launch keeps them as files of its own folder, which only its user can enter. Under torchrun and Slurm they lie
in torch's TCP store, which anyone who reaches its port can read and write: there each text carries an HMAC of a secret
of the job, and what carries none is ignored (docs/faults.md says what stays open).
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch.distributed as dist

from moe_train.errors import LaunchError
from moe_train.parallel.isolation import SECRET

_SHORTEST = 16  # characters
_PAUSE = 0.05  # seconds
_LOG = logging.getLogger(__name__)


class JobStore(Protocol):
    """Texts by name. Methods raise OSError, RuntimeError or torch's DistError where the store has gone."""

    def put(self, name: str, text: str) -> None:
        """Replaces what was there."""

    def put_first(self, name: str, text: str) -> str:
        """Puts a text unless there is one; gives the one that holds."""

    def get(self, names: Sequence[str]) -> list[str | None]:
        """The texts: empty ones where there are none, None where somebody else has altered or removed one."""


@dataclass(frozen=True)
class FolderStore:
    """A store for processes of one user on one host: a file a text, each replaced as a whole."""

    folder: Path

    def put(self, name: str, text: str) -> None:
        """See :class:`JobStore`."""
        os.replace(self._written(text), self._path(name))

    def put_first(self, name: str, text: str) -> str:
        """See :class:`JobStore`."""
        written = self._written(text)
        try:
            os.link(written, self._path(name))
        except FileExistsError:
            return self._path(name).read_text(encoding="utf-8")
        finally:
            written.unlink()
        return text

    def get(self, names: Sequence[str]) -> list[str | None]:
        """See :class:`JobStore`."""
        texts: list[str | None] = []
        for name in names:
            try:
                texts.append(self._path(name).read_text(encoding="utf-8"))
            except FileNotFoundError:
                texts.append("")
        return texts

    def _path(self, name: str) -> Path:
        return self.folder / name.replace("/", "_")

    def _written(self, text: str) -> Path:
        path = self.folder / f".{os.getpid()}.{threading.get_ident()}"
        path.write_text(text, encoding="utf-8")
        return path


@dataclass(frozen=True)
class MessageSigner:
    """Signs what goes into a store that others can write to, and tells what is the job's own when it comes back.

    Attributes:
        secret: shared by the ranks; empty: nothing is signed and everything is taken.
    """

    secret: bytes = b""

    @classmethod
    def from_environment(cls) -> MessageSigner:
        """With the secret that the job was given.

        Raises:
            LaunchError: it is too short.
        """
        secret = os.environ.get(SECRET, "")
        if 0 < len(secret) < _SHORTEST:
            raise LaunchError(
                f"the job's secret has {len(secret)} characters, at least {_SHORTEST} are needed",
                SECRET,
                f"export {SECRET}=$(openssl rand -hex 32), the same on all hosts, or leave it unset",
            )
        return cls(secret.encode())

    def sign(self, name: str, text: str) -> str:
        """The text with its HMAC, which holds under this name only."""
        return f"{self._code(name, text.encode())} {text}" if self.secret else text

    def open(self, name: str, content: bytes) -> str | None:
        """The text that was signed under this name; None where this is not what a rank of the job has put there."""
        if not self.secret:
            return content.decode(errors="replace")
        code, _, text = content.partition(b" ")
        return text.decode() if hmac.compare_digest(code, self._code(name, text).encode()) else None

    def wait_for(self, store: dist.Store, name: str, deadline: float) -> str:
        """Waits until a rank of the job has put a text there, at most until ``deadline`` of ``time.monotonic``.

        Raises:
            DistStoreError, RuntimeError: none did.
        """
        while (text := self.open(name, store.get(name))) is None:
            ignore(name)
            if time.monotonic() > deadline:
                raise dist.DistStoreError(f"the entry '{name}' of the store is not from this job")
            time.sleep(_PAUSE)
        return text

    def _code(self, name: str, text: bytes) -> str:
        return hmac.new(self.secret, name.encode() + b"\0" + text, hashlib.sha256).hexdigest()


def ignore(name: str) -> None:
    """Logs that an entry is not the job's own."""
    _LOG.warning("the entry '%s' of the job's store is not from a rank of this job: it is ignored", name)


class SignedStore:
    """A store of torch's, to which others may write too.

    Args:
        job: a name that no other job and no earlier start of this one has: signatures hold under it only.
    """

    def __init__(self, store: dist.Store, seal: MessageSigner, job: str) -> None:
        self._store, self._seal, self._job = store, seal, job
        self._own: set[str] = set()  # names under which texts of this job have been seen
        self._logged: set[str] = set()

    def put(self, name: str, text: str) -> None:
        """See :class:`JobStore`."""
        self._store.set(self._key(name), self._seal.sign(self._key(name), text))

    def put_first(self, name: str, text: str) -> str:
        """See :class:`JobStore`."""
        signed = self._seal.sign(self._key(name), text)
        held = self._opened(name, self._store.compare_set(self._key(name), "", signed))
        if held is None:
            self.put(name, text)
        return text if held is None else held

    def get(self, names: Sequence[str]) -> list[str | None]:
        """See :class:`JobStore`."""
        there = [name for name in names if self._store.check([self._key(name)])]
        contents = self._store.multi_get([self._key(name) for name in there]) if there else []
        texts: dict[str, str | None] = {name: None if name in self._own else "" for name in names}
        texts.update({name: self._opened(name, content) for name, content in zip(there, contents, strict=True)})
        return [texts[name] for name in names]

    def _key(self, name: str) -> str:
        return f"moe_train/{self._job}/{name}"

    def _opened(self, name: str, content: bytes) -> str | None:
        text = self._seal.open(self._key(name), content)
        if text is not None:
            self._own.add(name)
        elif name not in self._logged:
            self._logged.add(name)
            ignore(name)
        return text

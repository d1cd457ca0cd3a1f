"""Key-value store through which the ranks of a job exchange short texts when collectives do not work.

A local launch keeps the texts as files of its job folder, which only its user can enter. Under torchrun and Slurm they
are in torch's TCP store, which anyone who reaches its port can read and write: there each text carries an HMAC with the
job's secret, and a text without a valid one is ignored (docs/faults.md says what is not protected).
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

_MIN_SECRET = 16  # characters
_POLL = 0.05  # seconds
_LOG = logging.getLogger(__name__)


class JobStore(Protocol):
    """Texts by name. Methods raise OSError, RuntimeError or torch's DistError where the store is gone."""

    def put(self, name: str, text: str) -> None:
        """Writes a text, replacing an earlier one."""

    def put_first(self, name: str, text: str) -> str:
        """Writes a text unless there is one; returns the one in the store."""

    def get(self, names: Sequence[str]) -> list[str | None]:
        """The texts: empty where there is none, None where another process has altered or removed one."""


@dataclass(frozen=True)
class FolderStore:
    """A store for processes of one user on one host: one file per text, replaced atomically."""

    folder: Path

    def put(self, name: str, text: str) -> None:
        """See :class:`JobStore`."""
        os.replace(self._write_temporary(text), self._path(name))

    def put_first(self, name: str, text: str) -> str:
        """See :class:`JobStore`."""
        written = self._write_temporary(text)
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

    def _write_temporary(self, text: str) -> Path:
        path = self.folder / f".{os.getpid()}.{threading.get_ident()}"
        path.write_text(text, encoding="utf-8")
        return path


@dataclass(frozen=True)
class MessageSigner:
    """Signs texts for a store that others can write to, and verifies them when they are read.

    Attributes:
        secret: shared by the ranks; empty: nothing is signed and every text is accepted.
    """

    secret: bytes = b""

    @classmethod
    def from_environment(cls) -> MessageSigner:
        """A signer with the secret from the environment.

        Raises:
            LaunchError: the secret is too short.
        """
        secret = os.environ.get(SECRET, "")
        if 0 < len(secret) < _MIN_SECRET:
            raise LaunchError(
                f"the job's secret has {len(secret)} characters, at least {_MIN_SECRET} are needed",
                SECRET,
                f"export {SECRET}=$(openssl rand -hex 32), the same on all hosts, or leave it unset",
            )
        return cls(secret.encode())

    def sign(self, name: str, text: str) -> str:
        """The text with its HMAC, which is valid under this name only."""
        return f"{self._hmac(name, text.encode())} {text}" if self.secret else text

    def verify(self, name: str, content: bytes) -> str | None:
        """The text that was signed under this name; None where the signature is not valid."""
        if not self.secret:
            return content.decode(errors="replace")
        code, _, text = content.partition(b" ")
        return text.decode() if hmac.compare_digest(code, self._hmac(name, text).encode()) else None

    def wait_for(self, store: dist.Store, name: str, deadline: float) -> str:
        """Waits for a text that a rank of the job has signed, at most until ``deadline`` (``time.monotonic``).

        Raises:
            DistStoreError, RuntimeError: there is none in time.
        """
        while (text := self.verify(name, store.get(name))) is None:
            log_ignored(name)
            if time.monotonic() > deadline:
                raise dist.DistStoreError(f"the entry '{name}' of the store is not from this job")
            time.sleep(_POLL)
        return text

    def _hmac(self, name: str, text: bytes) -> str:
        return hmac.new(self.secret, name.encode() + b"\0" + text, hashlib.sha256).hexdigest()


def log_ignored(name: str) -> None:
    """Logs that an entry of the store is not from this job."""
    _LOG.warning("the entry '%s' of the job's store is not from a rank of this job: it is ignored", name)


class SignedStore:
    """A torch store to which others may write, too; texts are signed.

    Args:
        job: unique name of this start of the job; a signature is valid under it only.
    """

    def __init__(self, store: dist.Store, signer: MessageSigner, job: str) -> None:
        self._store, self._signer, self._job = store, signer, job
        self._seen: set[str] = set()  # names under which texts of this job have been read
        self._logged: set[str] = set()

    def put(self, name: str, text: str) -> None:
        """See :class:`JobStore`."""
        self._store.set(self._key(name), self._signer.sign(self._key(name), text))

    def put_first(self, name: str, text: str) -> str:
        """See :class:`JobStore`."""
        signed = self._signer.sign(self._key(name), text)
        stored = self._verified(name, self._store.compare_set(self._key(name), "", signed))
        if stored is None:
            self.put(name, text)
        return text if stored is None else stored

    def get(self, names: Sequence[str]) -> list[str | None]:
        """See :class:`JobStore`."""
        present = [name for name in names if self._store.check([self._key(name)])]
        contents = self._store.multi_get([self._key(name) for name in present]) if present else []
        texts: dict[str, str | None] = {name: None if name in self._seen else "" for name in names}
        texts.update({name: self._verified(name, content) for name, content in zip(present, contents, strict=True)})
        return [texts[name] for name in names]

    def _key(self, name: str) -> str:
        return f"moe_train/{self._job}/{name}"

    def _verified(self, name: str, content: bytes) -> str | None:
        text = self._signer.verify(self._key(name), content)
        if text is not None:
            self._seen.add(name)
        elif name not in self._logged:
            self._logged.add(name)
            log_ignored(name)
        return text

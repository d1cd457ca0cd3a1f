"""The folder of a run: its config, logs and checkpoints, and the lock of the process that writes into it."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import math
import multiprocessing
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from moe_train.config import RunConfig, to_mapping
from moe_train.errors import CheckpointError, ConfigError, DataError
from moe_train.plugins import user_dir
from moe_train.training.checkpoint.checksums import replace_text
from moe_train.training.optim.schedule_extension import ENDS, FINISHED, ends_with_session
from moe_train.training.run.heartbeat import other_host
from moe_train.training.run.recorded_config import note_ignored_keys, recorded_config, to_record, with_defaults
from moe_train.utils.json_files import finite, parse_object, read_object
from moe_train.utils.regular_files import LARGEST_LOG, read_regular

CONFIG, INFO, TRAIN, VALID = "config.json", "run.json", "train.jsonl", "valid.jsonl"
ALIVE = ".alive"  # touched while a process trains here, for other hosts (moe_train.training.run.heartbeat)
DATA_FILES = "data.json"  # checksums of input files that no manifest lists (moe_train.training.run.run_data)
EXPORTED_DATA = "data"  # the folder of dictionaries inside an export, and the data folder's name in its config
FAILURE = "failure.json"  # why the last session failed; if older than run.json, an earlier session
LOG = logging.getLogger("moe_train")
_INFO_KINDS: Mapping[str, type] = {"status": str, "update": int, "sessions": list}
# Keys that may differ between the sessions of one run: they change where it runs, how long, and what it keeps.
FREE = ("launch", "layout", "engine", "resume", "search", "data", "data_verify", "evaluate", "kernels")
FREE_TRAINING = ("max_updates", "threads", "checkpoint", "schedule.extend", "loggers", "log_every", "compile")


@dataclass(frozen=True)
class RunFolder:
    """Paths and small files of a run folder. Only rank 0 writes, apart from checkpoints and the ranks' own logs."""

    path: Path

    @classmethod
    def open(cls, path: Path | str) -> RunFolder:
        """The folder of an existing run.

        Raises:
            ConfigError: there is none.
        """
        folder = cls(Path(path))
        if not (folder.path / CONFIG).is_file():
            raise ConfigError(
                f"this is no run folder: {CONFIG} is missing", str(path), "name the folder of a moe-train run"
            )
        note_ignored_keys(folder.content["config"], folder.path / CONFIG)
        if folder.note_on_user_dir and multiprocessing.parent_process() is None:
            _print_once(folder.note_on_user_dir)
        return folder

    @property
    def user_dir(self) -> str | None:
        """The ``user_dir`` of the last session, for information: nothing is imported because a file names it."""
        found = self.content.get("user_dir")
        return found if isinstance(found, str) and found else None

    @property
    def note_on_user_dir(self) -> str:
        """A note that the run used code from outside and the present command does not; "" otherwise."""
        if self.user_dir in (None, user_dir()):
            return ""
        return (
            f"{self.path} was made with user_dir={self.user_dir!r:.300}, which is not imported because a file names it:"
            " if its code is needed and you trust it, give user_dir=… yourself"
        )

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints lie."""
        return self.path / "checkpoints"

    @property
    def logs(self) -> Path:
        """Where each rank's log lies."""
        return self.path / "logs"

    @property
    def train_log(self) -> Path:
        """JSON lines, one per log interval."""
        return self.path / TRAIN

    @property
    def valid_log(self) -> Path:
        """JSON lines, one per validation."""
        return self.path / VALID

    @property
    def exists(self) -> bool:
        """Whether a run was begun here."""
        return (self.path / CONFIG).is_file()

    @property
    def unused(self) -> bool:
        """Whether no run was ever begun here. Other files may be here."""
        return not any(path.exists() for path in (self.path / CONFIG, self.checkpoints, self.logs))

    @property
    def config(self) -> RunConfig:
        """The run's config as it was last started.

        Raises:
            ConfigError: it is damaged.
        """
        content = self.content["config"]
        try:
            return recorded_config(content)
        except (ConfigError, OverflowError) as error:  # its remedy, if any, is about the command line
            what = f"the run's config cannot be used: {error.what if isinstance(error, ConfigError) else error}"
            raise ConfigError(what, str(self.path / CONFIG), "restore the file") from error

    @property
    def info(self) -> dict[str, Any]:
        """``run.json``; empty where there is none yet.

        Raises:
            DataError: it is damaged.
        """
        path, remedy = self.path / INFO, "restore it, or move it away: training continues without it"
        info = read_object(path, remedy) or {}
        for key, kind in _INFO_KINDS.items():
            if key in info and (not isinstance(info[key], kind) or isinstance(info[key], bool)):
                raise DataError(f"the file is damaged ('{key}' cannot be {info[key]!r:.40})", str(path), remedy)
        return info

    @property
    def finished(self) -> bool:
        """Whether the run has ended (finished or stopped early)."""
        return self.info.get("status") in FINISHED

    @property
    def session(self) -> tuple[int, int] | None:
        """Changes whenever a session begins; None if there was none."""
        try:
            written = (self.path / CONFIG).stat()
        except OSError:
            return None
        return written.st_ino, written.st_mtime_ns

    @property
    def content(self) -> dict[str, Any]:
        """``config.json``: ``config``, ``data_fingerprint``, and in an export the description of its data.

        Raises:
            ConfigError: it cannot be read.
        """
        path = self.path / CONFIG
        try:
            content = read_object(path) or {}
        except DataError as error:
            raise ConfigError(f"the run's config cannot be read: {error.what}", str(path)) from error
        if not isinstance(content.get("config"), dict):
            raise ConfigError("the run's config cannot be read: there is no 'config' in it", str(path))
        return {"data_fingerprint": "", **content}

    # -- beginning -------------------------------------------------------------------------------------------------

    def check(self, config: RunConfig, data_fingerprint: str = "") -> None:
        """Checks whether this config may begin or resume a run here, by the key ``resume``.

        ``auto``: begins in a new folder, resumes an unfinished run or one whose ``training.max_updates`` was raised;
        ``never``: only begins; ``must``: only resumes (and does nothing if the run is finished);
        ``missing``: as ``auto``, but does nothing if the run is finished.

        Raises:
            ConfigError: a finished run; a run with another config (the keys are named) or other data.
            CheckpointError: ``resume=must`` and there is no run to resume.
        """
        if not self.exists:
            if config.resume == "must":
                raise CheckpointError(
                    "resume=must, but no run was begun here", str(self.path), "correct hydra.run.dir=…"
                )
            return
        if config.resume == "never":
            raise ConfigError(
                "resume=never, but the folder holds a run", str(self.path), "choose another hydra.run.dir=…"
            )
        self._check_same(config, data_fingerprint)
        more = self.extended_by(config) or self.unscored(config)
        if self.finished and config.resume not in ("must", "missing") and not more:
            raise ConfigError(
                f"the run in this folder is finished ({self.info.get('update')} updates)",
                str(self.path),
                "raise training.max_updates to train on, choose another hydra.run.dir=…, or leave it: resume=missing",
            )

    def extended_by(self, config: RunConfig) -> bool:
        """Whether ``config`` wants more updates than the run has done."""
        return config.training.max_updates > int(self.info.get("update", 0))

    def unscored(self, config: RunConfig) -> bool:
        """Whether ``config`` asks for scores that do not exist, as after an end between training and evaluation."""
        return config.evaluate is not None and not (self.path / f"{config.evaluate}.json").is_file()

    def _check_same(self, config: RunConfig, data_fingerprint: str) -> None:
        before = self.content
        note_ignored_keys(before["config"], self.path / CONFIG)
        different = differing_keys(with_defaults(recorded_config(before["config"])), with_defaults(config))
        if different:
            raise ConfigError(
                f"the folder holds a run with another config: {'; '.join(different)}",
                str(self.path),
                "set these keys as they were, or choose another hydra.run.dir=…",
            )
        if before["data_fingerprint"] != data_fingerprint:
            trained_on = before["config"].get("data")
            moved = f"data={trained_on} then, {config.data} now, with another manifest"
            raise ConfigError(
                "the folder holds a run on other data: "
                + ("the data folder's manifest has changed since" if trained_on == config.data else moved),
                str(self.path),
                "give the data folder that the run began with, or choose another hydra.run.dir=…",
            )

    def begin(self, config: RunConfig, data_fingerprint: str = "", overrides: Sequence[str] = ()) -> None:
        """Makes the folder and writes the config.

        Args:
            overrides: this session's command line.
        """
        for folder in (self.path, self.checkpoints, self.logs):
            folder.mkdir(parents=True, exist_ok=True)
        if self.exists and (ends := ends_with_session(self.info, self.config, config)):
            self.describe(**{ENDS: [asdict(end) for end in ends]})
        content = {
            "format": 1,
            "config": to_record(config),
            "data_fingerprint": data_fingerprint,
            "overrides": list(overrides),
            **({"user_dir": outside} if (outside := user_dir()) else {}),
        }
        replace_text(self.path / CONFIG, json.dumps(content, indent=1) + "\n")

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """While entered, no other process on this host can claim the folder. The lock ends with the process.

        Other hosts see the lock if the file system shares it (NFS 4, Lustre with ``flock``). If not, or if there are no
        locks, a warning is logged.

        Raises:
            ConfigError: another process trains here.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / ".lock").open("w") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigError(
                    "another process is training in this folder",
                    str(self.path),
                    "wait for it, or choose another hydra.run.dir=…",
                ) from None
            except OSError as error:  # file systems without locks
                LOG.warning("%s cannot be locked (%s): make sure that only one run trains there", self.path, error)
            if other := other_host(self.path / ALIVE):
                LOG.warning("%s was in use by %s a moment ago: end that run if it is still there", self.path, other)
            yield

    def forget_start(self) -> None:
        """Removes the files of :meth:`begin` and of the ranks from a folder that was :attr:`unused`; the lock stays."""
        for path in (self.path / CONFIG, self.path / DATA_FILES, self.path / ALIVE, *self.logs.glob("rank_*.log")):
            path.unlink(missing_ok=True)
        for folder in (self.checkpoints, self.logs):
            with suppress(OSError):  # it holds other files
                folder.rmdir()

    def describe(self, **values: Any) -> None:
        """Adds to run.json."""
        replace_text(self.path / INFO, json.dumps({**self.info, **values}, indent=1) + "\n")

    # -- logs ------------------------------------------------------------------------------------------------------

    def cut(self, update: int, pending: bool = False) -> None:
        """Removes log lines beyond ``update``, a last one that was not written to its end, and what cannot be read.

        Args:
            pending: the validation of ``update`` is yet to come: its line is removed, too.

        Raises:
            DataError: a log cannot be read.
        """
        for path, last in ((self.train_log, update), (self.valid_log, update - pending)):
            if path.exists():
                try:
                    lines = read_regular(path, LARGEST_LOG).split(b"\n")
                except OSError as error:
                    what, remedy = f"the log cannot be read ({error.strerror or error})", "restore it, or move it away"
                    raise DataError(what, str(path), remedy) from error
                kept = [line for line in lines if _update_of(line) <= last]
                replace_text(path, "".join(f"{line.decode()}\n" for line in kept))


@cache
def _print_once(text: str) -> None:
    """Prints a note to standard error, once: a command opens the same run several times."""
    print(f"note: {text}", file=sys.stderr)


def recorded_overrides(path: Path) -> tuple[str, ...]:
    """The command line of the last session of the run in a folder, or of the one that failed to begin.

    Folders of earlier versions have only Hydra's file: a YAML list with one plain word per line.
    """
    for name in (CONFIG, FAILURE):
        try:
            return tuple(map(str, (read_object(path / name) or {})["overrides"]))
        except (DataError, KeyError, TypeError):
            continue
    try:
        text = read_regular(path / ".hydra" / "overrides.yaml").decode("utf-8", "replace")
    except OSError:
        return ()
    return tuple(line[2:].strip().strip("'\"") for line in text.splitlines() if line.startswith("- "))


def differing_keys(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """``key=one then, other now`` for every key that must not change within a run.

    Groups with another option (``routing=switch then, thor now``) come first, without their keys.
    """
    old, new = dict(_flat(before)), dict(_flat(now))
    keys = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key) and not _is_free(key)]
    groups = [key.removesuffix(".name") for key in keys if key.endswith(".name") and key.count(".") == 1]
    choices = [f"{group}={old.get(f'{group}.name')} then, {new.get(f'{group}.name')} now" for group in groups]
    others = [key for key in keys if key.partition(".")[0] not in groups]
    return choices + [f"{key}={_show(old.get(key))} then, {_show(new.get(key))} now" for key in others]


def config_digest(config: RunConfig) -> str:
    """Equal for all sessions of a run."""
    fixed = {key: value for key, value in _flat(to_mapping(config)) if not _is_free(key)}
    return hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()


def _is_free(key: str) -> bool:
    first, _, rest = key.partition(".")
    return first in FREE or (first == "training" and (rest in FREE_TRAINING or rest.split(".")[0] in FREE_TRAINING))


def _flat(mapping: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in mapping.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", list(value) if isinstance(value, tuple) else value


def _show(value: Any) -> str:
    return json.dumps(value, default=str)


def _update_of(line: bytes) -> float:
    """The update of a log line; infinity if the line cannot be read."""
    try:
        update = finite(parse_object(line).get("update"))
    except ValueError:
        return math.inf
    return math.inf if update is None else update

"""Names of the files with scores and outputs of an evaluation, by the set of sentences evaluated.

    test.json                hypotheses/test.en-de.de               the whole split, every trained direction
    test.first-3.json        hypotheses/first-3/test.en-de.de       the first 3 sentences of each direction
    test.only-en-de.json     hypotheses/only-en-de/test.en-de.de    one direction of several
    test.replaced-1.json     hypotheses/replaced-1/test.en-de.de    earlier results, made with other settings

An evaluation of a part never changes the files of the whole split, and earlier results are never deleted.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import logging
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from moe_train.errors import ConfigError, DataError
from moe_train.evaluation.hypothesis_files import OutputFiles, hypotheses_folder
from moe_train.training.checkpoint.checksums import why_not_writable

LOCK = ".evaluate.lock"
LOG = logging.getLogger("moe_train")
_LONGEST = 80  # characters of a part's name


def part_name(directions: Sequence[str] = (), max_sentences: int = 0) -> str:
    """The evaluated part of a split, as a part of file names; "" for the whole split.

    Args:
        directions: sorted; empty where they are those evaluated by default.
        max_sentences: of each direction; 0: all.
    """
    names = []
    if directions:
        wanted = ",".join(directions)
        if len(wanted) > _LONGEST or not re.fullmatch(r"[\w.,=+@-]+", wanted):
            digest = hashlib.sha256(wanted.encode()).hexdigest()[:8]
            wanted = f"{len(directions)}-directions-{digest}"
        names.append(f"only-{wanted}")
    if max_sentences:
        names.append(f"first-{max_sentences}")
    return ".".join(names)


@dataclass(frozen=True)
class ResultFiles:
    """The files of one set of sentences.

    Attributes:
        folder: the run folder, or another folder for results.
        split: ``test`` or ``valid``.
        part: see :func:`part_name`.
    """

    folder: Path
    split: str
    part: str = ""

    @property
    def scores(self) -> Path:
        """``test.json``, ``test.first-3.json`` …"""
        return self.folder / ".".join(name for name in (self.split, self.part, "json") if name)

    def outputs(self, direction: str) -> OutputFiles:
        """The outputs of one direction."""
        return OutputFiles(self.folder, self.split, direction, self.part)

    def keep_earlier(self) -> str:
        """Renames scores and outputs to the first free number; returns a note. Call it only within :func:`writing`.

        The scores are renamed last: if this is interrupted they keep their name, and the next call continues.
        """
        outputs = [path for path in hypotheses_folder(self.folder, self.part).glob(f"{self.split}.*") if path.is_file()]
        for number in count(1):
            renamed = dataclasses.replace(self, part=f"{self.part}.replaced-{number}".lstrip("."))
            target = hypotheses_folder(self.folder, renamed.part)
            if not renamed.scores.exists() and not any((target / path.name).exists() for path in outputs):
                break
        for path in outputs:
            target.mkdir(parents=True, exist_ok=True)
            os.replace(path, target / path.name)
        os.replace(self.scores, renamed.scores)
        return f"the earlier {self.scores.name} was made with other settings, and is kept in {renamed.scores.name}"


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """While entered, no other evaluation writes into the folder: a second one waits for the lock.

    Raises:
        DataError: a file could not be written, such as on a full disk.
    """
    try:
        with (folder / LOCK).open("a") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX)
            except OSError as error:  # file systems without locks
                LOG.warning("%s cannot be locked (%s): do not run two evaluations that write there", folder, error)
            yield
    except OSError as error:
        what = f"the results could not be written ({error.strerror or error})"
        raise DataError(what, str(folder), "free disk space, or set another folder: out=…") from error


def writable_folder(run: Path, variant: str, out: str | None) -> tuple[Path, str]:
    """The folder for results, made and tested before any work is done, and a note where it is not the run folder.

    Args:
        run: the run folder.
        variant: a folder below it; "" for none.
        out: the folder to use instead. None: the run folder, or where that cannot be written (a read-only file system,
            another user's run), one in the working directory.

    Raises:
        ConfigError: ``out``, or none of them, can be written.
    """
    if out is not None:
        folder = Path(out) / variant
        if error := why_not_writable(folder):
            raise ConfigError(f"results cannot be written there ({error})", str(folder), "choose another out=…")
        return folder, ""
    expected = run / variant
    error = why_not_writable(expected)
    if not error:
        return expected, ""
    name = f"{run.resolve().name}-{hashlib.sha256(str(run.resolve()).encode()).hexdigest()[:8]}"
    fallback = Path.cwd() / "evaluated" / name / variant
    if why_not_writable(fallback):
        raise ConfigError(f"results cannot be written ({error})", str(expected), "set a folder for them: out=…")
    return (
        fallback,
        f"the run folder cannot be written ({error}): results are in {fallback}; out=… sets another folder",
    )

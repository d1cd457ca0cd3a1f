"""Records the data that a run was trained on, and checks whether other data fits it.

``run.json`` has ``vocabulary`` (checksums of ``spm.model`` and ``dict.txt``) and ``trained`` (directions or
languages); an export has the same in its ``config.json``. ``data.json`` has the checksums of input files that no
manifest lists.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_train.config.run import DataVerify
from moe_train.data.folder import DataFolder
from moe_train.data.verification import InputFiles, sha256_of_files
from moe_train.errors import DataError, UserError, note, plural
from moe_train.tasks import TaskData, TrainingTask, build_task, open_data
from moe_train.training.checkpoint.store import run_on_all_ranks
from moe_train.training.run.run_folder import DATA_FILES, EXPORTED_DATA, RunFolder
from moe_train.training.runtime.world import World
from moe_train.utils.atomic_io import replace_text
from moe_train.utils.json_files import entry, read_object


@dataclass(frozen=True)
class RunData:
    """Description of a run's data.

    Attributes:
        vocabulary: file of the data folder -> checksum; None: unknown. Empty: there is no vocabulary.
        trained: directions or languages; None: unknown.
    """

    vocabulary: Mapping[str, str] | None = None
    trained: tuple[str, ...] | None = None

    @classmethod
    def of_task(cls, task: TrainingTask) -> RunData:
        """The description for a run of this task.

        Raises:
            DataError: the vocabulary cannot be read.
        """
        vocabulary = task.vocabulary
        return cls({} if vocabulary is None else vocabulary.vocabulary_digests(), tuple(task.trained))

    @classmethod
    def recorded_in(cls, folder: RunFolder) -> RunData:
        """What the folder of a run or an export records; runs of earlier versions record nothing."""
        content = {**folder.content, **folder.info}
        vocabulary, trained = content.get("vocabulary"), content.get("trained")
        return cls(
            dict(vocabulary) if isinstance(vocabulary, Mapping) else None,
            tuple(map(str, trained)) if isinstance(trained, list) else None,
        )

    @classmethod
    def of_run(
        cls, folder: RunFolder, opened: tuple[TaskData, TrainingTask] | None = None, keep: bool = True
    ) -> RunData:
        """The description of a run or an export.

        If an earlier version did not record it, it is taken from the data that the run was trained on, if that still
        exists, and written into a finished run, with a note.

        Args:
            opened: data that may be the same, and a task on it.
            keep: write it and print the note; one of several processes does.
        """
        recorded = cls.recorded_in(folder)
        if recorded.vocabulary is not None and recorded.trained is not None:
            return recorded
        is_run = folder.checkpoints.is_dir()  # an export has its own dictionary
        try:
            same = opened is not None and opened[0].fingerprint == folder.content["data_fingerprint"]
            taken = cls.of_task(opened[1] if opened is not None and same else _own_task(folder))
        except UserError as error:
            if keep:
                note(f"{folder.path} does not record the vocabulary of its training, and it cannot be found: {error}")
            return recorded
        if keep and is_run:
            note(f"{folder.path} keeps no checksums of its vocabulary yet: taken from its data folder")
            if folder.finished:
                with suppress(OSError):  # a folder of another user
                    folder.describe(**taken.to_json())
        return taken

    def to_json(self) -> dict[str, Any]:
        """Keys of ``run.json``."""
        return {"vocabulary": dict(self.vocabulary or {}), "trained": list(self.trained or ())}

    def check_vocabulary(self, task: TrainingTask, run: Path) -> None:
        """Checks that this task has the vocabulary that the run was trained with.

        Raises:
            DataError: it has another.
        """
        folder = task.vocabulary
        if folder is None or not self.vocabulary:
            return
        for name, digest in folder.vocabulary_digests().items():
            if self.vocabulary.get(name) != digest:
                raise DataError(
                    f"this is another vocabulary than {run} was trained with: its {name} differs",
                    str(folder.path / name),
                    "give the data folder that was trained on, or prepare this text with its vocabulary: "
                    "moe-prepare vocabulary.reuse=FOLDER",
                )


def _own_task(folder: RunFolder) -> TrainingTask:
    """The task of a run or an export, on its own data.

    Raises:
        UserError: the data is not there, or is not what was trained on.
    """
    config = folder.config
    if config.data == EXPORTED_DATA and not folder.checkpoints.is_dir():
        config = dataclasses.replace(config, data=str(folder.path / EXPORTED_DATA))
    data = open_data(config)
    if folder.content.get("data_fingerprint") not in ("", None, data.fingerprint):
        raise DataError("the data was changed after training", config.data)
    return build_task(config, data)


def run_of(source: str | Path) -> RunFolder | None:
    """The run or export whose folder, or one of whose checkpoints, a path is; None if there is none."""
    path = Path(source).absolute()
    for folder in (path, *path.parents[:2]):
        if RunFolder(folder).exists:
            return RunFolder(folder)
    return None


def check_initial_vocabulary(source: str, task: TrainingTask) -> None:
    """Checks that the run of ``training.init_from`` was trained with this task's vocabulary.

    Raises:
        DataError: it was trained with another.
    """
    run = run_of(source)
    if run is None:
        if not Path(source).exists():
            return  # an error where the weights are read
        note(f"{source} is in no run folder: its vocabulary cannot be compared with that of the data")
        return
    RunData.of_run(run).check_vocabulary(task, run.path)


def verify_data(
    data: TaskData, task: TrainingTask | None, how: DataVerify, world: World | None = None, training: bool = True
) -> None:
    """Compares a data folder, and the one of the vocabulary, with the checksums of their manifests.

    Every rank calls it. The ranks of a host share the files that it sees.

    Args:
        training: include the sentences that only training reads.

    Raises:
        DataError: on every rank, if any of them found a difference; names the file.
    """
    world = world or World()
    vocabulary = task.vocabulary if task is not None else None
    folders = {id(found): found for found in (data, vocabulary) if isinstance(found, DataFolder)}

    def verify() -> None:
        for folder in folders.values():
            folder.verify(how, training and folder is data, (world.local_rank, world.local_size))

    run_on_all_ranks(world, verify)


def check_input_files(folder: RunFolder, data: TaskData, how: DataVerify, keep: bool) -> None:
    """Compares input files that no manifest lists with the checksums that the run has kept; one process calls it.

    Args:
        keep: write the checksums if the run has none yet.

    Raises:
        DataError: a file is missing or altered; it is named.
    """
    inputs = data.inputs
    if how == "never" or not inputs.names:
        return
    path = folder.path / DATA_FILES
    before = _read(path) if folder.exists else None  # without a run, the file is of a start that failed
    if before is None:
        if keep:
            if folder.exists:
                note(f"{folder.path} keeps no checksums of its data yet: taken from {inputs.root}")
            content = {"format": 1, "folder": str(inputs.root.absolute()), "files": _digests(inputs, how)}
            replace_text(path, json.dumps(content, indent=1) + "\n")
        return
    for name in before.keys() - set(inputs.names):
        raise _altered(inputs, name, "the file is gone", folder)
    for name, digest in _digests(inputs, how).items():
        if before.get(name, digest) != digest:
            raise _altered(inputs, name, "the file was altered", folder)
    if more := len(set(inputs.names) - before.keys()):
        note(f"{inputs.root} has {plural(more, 'file')} that {folder.path} has not read in its training")


def note_changed_folder(folder: RunFolder, data: TaskData, main: bool) -> None:
    """Prints a note if a data folder is, by its manifest, not what the run was trained on; ``main``: this is rank 0."""
    if main and isinstance(data, DataFolder) and folder.content["data_fingerprint"] not in ("", data.fingerprint):
        note(f"{data.path} was prepared again or altered after {folder.path} was trained on it")


def _digests(inputs: InputFiles, how: DataVerify) -> dict[str, str]:
    return dict(sorted(sha256_of_files(inputs.root, inputs.names, how).items()))


def _altered(inputs: InputFiles, name: str, what: str, folder: RunFolder) -> DataError:
    return DataError(
        f"{what} since {folder.path} was trained on it",
        str(inputs.root / name),
        "restore it, or leave the comparison out: data_verify=never",
    )


def _read(path: Path) -> dict[str, str] | None:
    """Name -> checksum; None if the run has kept none."""
    try:
        content = read_object(path)
        if content is None:
            return None
        return {name: str(digest) for name, digest in entry(content, "files", dict).items()}
    except (DataError, ValueError) as error:
        reason = error.what if isinstance(error, DataError) else error
        remedy = "remove it: the next start takes the checksums again"
        raise DataError(f"the checksums of the run's data cannot be read ({reason})", str(path), remedy) from error

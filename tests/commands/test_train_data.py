"""``moe-train`` on data that is altered, gone, or of another vocabulary than the weights it starts from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from moe_train.data.folder import DataFolder
from moe_train.data.text.lines import sha256
from moe_train.training.run.run_folder import RunFolder
from tests.commands.test_train import SMALL, here
from tests.data.tiny_corpus import prepare_tiny
from tests.evaluation.runs import make_run

ONE = [*SMALL, "training.max_updates=1", "training.validation.every_updates=1", "training.log_every=1"]


def train(data: Path, run: Path, *more: str) -> tuple[int, str]:
    """Exit code, and what was said on stderr, its line ends taken out."""
    code, said = here([*ONE, f"data={data}", f"hydra.run.dir={run}", *more], run.parent)
    return code, " ".join(said.split())


@pytest.fixture
def copy(tiny_data: DataFolder, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_data.path, tmp_path / "data"))


def zeroed(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def swapped(path: Path) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([lines[1], lines[0], *lines[2:]]))


@pytest.mark.parametrize(
    ("name", "alter"),
    [
        ("train.en-de.de.bin", zeroed),
        ("dict.txt", swapped),
        ("spm.model", zeroed),
        ("raw/test.en-fr.en", swapped),
        ("valid.en-ja.ja.idx", zeroed),
        ("manifest.json", zeroed),
    ],
)
def test_altered_data_is_refused_before_the_start(
    copy: Path, name: str, alter: Callable[[Path], None], tmp_path: Path
) -> None:
    alter(copy / name)
    code, said = train(copy, tmp_path / "run")
    assert code == 2 and f"{copy / name}: " in said and ("checksum" in said or "cannot be read" in said), said
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_run_keeps_what_it_was_trained_on_and_refuses_what_has_changed(
    copy: Path, tiny_data: DataFolder, tmp_path: Path
) -> None:
    run, victim = tmp_path / "run", copy / "train.en-de.de.bin"
    assert train(copy, run) == (0, "")
    info = json.loads((run / "run.json").read_text())
    assert info["vocabulary"] == {name: sha256(copy / name) for name in ("spm.model", "dict.txt")}
    assert info["trained"] == list(tiny_data.directions)
    whole = victim.read_bytes()
    zeroed(victim)
    code, said = train(copy, run, "training.max_updates=2")
    assert code == 2 and f"{victim}: the file's checksum is not the manifest's" in said, said
    victim.write_bytes(whole)
    assert train(copy, run, "training.max_updates=2") == (0, "")
    lines = (copy / "dict.txt").read_bytes().splitlines(keepends=True)
    (copy / "dict.txt").write_bytes(b"".join([*lines[:5], lines[6], lines[5], *lines[7:]]))
    code, said = train(copy, run, "training.max_updates=3", "data_verify=never")
    assert code == 2 and "another vocabulary" in said and "its dict.txt differs" in said, said
    assert RunFolder(run).info["update"] == 2


def test_never_takes_data_as_it_is(copy: Path, tmp_path: Path) -> None:
    content = bytearray((copy / "train.en-de.de.bin").read_bytes())
    content[:2] = content[2:4]  # another piece in the place of the first
    (copy / "train.en-de.de.bin").write_bytes(bytes(content))
    assert train(copy, tmp_path / "run", "data_verify=never") == (0, "")


def test_a_token_beyond_the_dictionary_ends_with_its_file(copy: Path, tmp_path: Path) -> None:
    victim = copy / "train.en-de.de.bin"
    victim.write_bytes(b"\xff" * victim.stat().st_size)
    code, said = train(copy, tmp_path / "run", "data_verify=never", "training.max_updates=20")
    assert code == 2 and f"{victim}: the token id 65535 is none of the dictionary's 488 entries" in said, said


def test_an_older_unfinished_run_gets_its_checksums(copy: Path, tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    assert train(copy, run.path) == (0, "")
    info = {key: value for key, value in run.info.items() if key not in ("vocabulary", "trained")}
    (run.path / "run.json").write_text(json.dumps({**info, "status": "interrupted"}))
    code, said = train(copy, run.path, "training.max_updates=2")
    assert (
        code == 0 and said == f"note: {run.path} keeps no checksums of its vocabulary yet: taken from its data folder"
    )
    assert set(run.info["vocabulary"]) == {"spm.model", "dict.txt"} and run.info["trained"]


def test_weights_of_another_vocabulary_are_no_start(tiny_data: DataFolder, tmp_path: Path) -> None:
    other = prepare_tiny(tmp_path / "other", train=120, valid=6, test=6)
    source = make_run(tmp_path / "source", other)
    code, said = train(tiny_data.path, tmp_path / "run", f"training.init_from={source}")
    assert code == 2 and f"another vocabulary than {source} was trained with: its spm.model differs" in said, said

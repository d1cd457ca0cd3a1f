"""What a run keeps of its data, and what it refuses when that has changed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from moe_train.config.tasks import ImageConfig
from moe_train.data.folder import DataFolder
from moe_train.data.images import open_images
from moe_train.data.images.folders import MAX_RECORDED
from moe_train.data.labelled import LabelledTexts
from moe_train.errors import DataError
from moe_train.tasks import TaskData
from moe_train.training.run.run_data import check_input_files, run_of
from moe_train.training.run.run_folder import RunFolder
from tests.data.image_files import write_class_folders
from tests.distributed.world import Worlds
from tests.training import run_data_jobs
from tests.training.toy import toy_config


@pytest.mark.parametrize("how", ["once", "always"])
def test_the_ranks_of_a_host_share_the_files(worlds: Worlds, tiny_data: DataFolder, tmp_path: Path, how: str) -> None:
    copy = Path(shutil.copytree(tiny_data.path, tmp_path / "data"))
    names = sorted(Path(name).name for name in tiny_data.manifest.files)
    found = worlds(2).run(run_data_jobs.verified, str(copy), how)
    assert sorted(name for reads, _ in found for name in reads) == names
    assert [said for _, said in found] == ["", ""] and all(len(reads) > 3 for reads, _ in found)
    victim = copy / "train.en-ja.ja.bin"
    victim.write_bytes(bytes(victim.stat().st_size))
    found = worlds(2).run(run_data_jobs.verified, str(copy), how)
    assert all(said.startswith(f"{victim}: the file's checksum is not") for _, said in found), "on both ranks"
    assert [said for _, said in worlds(2).run(run_data_jobs.verified, str(copy), "never")] == ["", ""]


# --- data without a manifest -----------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A folder that is ready for a run."""
    (tmp_path / "run").mkdir()
    return RunFolder(tmp_path / "run")


def images(path: Path) -> TaskData:
    return open_images(str(path), ImageConfig())


def labelled(path: Path) -> TaskData:
    return LabelledTexts.open(path, ["en"])


@pytest.fixture(params=["class_folders", "labelled"])
def case(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[TaskData, Path]:
    """Data, and one of its files."""
    path = tmp_path / "input"
    if request.param == "labelled":
        path.mkdir()
        for split in ("train", "valid", "test"):
            (path / f"{split}.en.tsv").write_text("yes\ta red apple\nno\tthe green door\n")
        return labelled(path), path / "test.en.tsv"
    write_class_folders(path, {"cat": 4, "dog": 4}, size=(6, 6))
    return images(path), path / "cat" / "1.png"


def opened_again(data: TaskData) -> TaskData:
    return labelled(data.path) if isinstance(data, LabelledTexts) else images(data.path)


def flipped(path: Path) -> None:
    """Other content of the same size that can still be read."""
    content = path.read_bytes()
    if path.suffix == ".tsv":
        path.write_bytes(content.replace(b"red", b"rad"))
    else:
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def test_a_run_keeps_checksums_where_no_manifest_has_them(case: tuple[TaskData, Path], run: RunFolder) -> None:
    data, victim = case
    check_input_files(run, data, "never", keep=True)
    assert not (run.path / "data.json").exists()
    (run.path / "data.json").write_text("what a start that came to nothing has left")
    check_input_files(run, data, "once", keep=True)
    run.begin(toy_config())
    kept = json.loads((run.path / "data.json").read_text())["files"]
    assert str(victim.relative_to(data.path)) in kept and len(kept) == (3 if isinstance(data, LabelledTexts) else 8)
    check_input_files(run, opened_again(data), "once", keep=True)
    flipped(victim)
    for how in ("once", "always"):
        with pytest.raises(DataError, match=r"the file was altered since .*run was trained on it") as raised:
            check_input_files(run, opened_again(data), how, keep=True)  # type: ignore[arg-type]
        assert raised.value.where == str(victim)
    check_input_files(run, opened_again(data), "never", keep=True)
    assert json.loads((run.path / "data.json").read_text())["files"] == kept


def test_a_file_that_is_gone_is_named_and_a_new_one_is_said(
    run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_class_folders(tmp_path / "input", {"cat": 4, "dog": 4}, size=(6, 6))
    victim = tmp_path / "input" / "dog" / "2.png"
    check_input_files(run, images(tmp_path / "input"), "once", keep=True)
    run.begin(toy_config())
    shutil.copyfile(victim, victim.with_name("new.png"))
    check_input_files(run, images(tmp_path / "input"), "once", keep=True)
    assert "has 1 file that" in capsys.readouterr().err
    victim.unlink()
    with pytest.raises(DataError, match="the file is gone since") as raised:
        check_input_files(run, images(tmp_path / "input"), "once", keep=True)
    assert raised.value.where == str(victim)


def test_a_run_that_began_without_checksums_says_when_it_takes_them(
    case: tuple[TaskData, Path], run: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    run.begin(toy_config())
    check_input_files(run, case[0], "once", keep=True)
    assert "keeps no checksums of its data yet" in capsys.readouterr().err and (run.path / "data.json").is_file()


@pytest.mark.parametrize("content", ["{", "[]", '{"files": 1}'])
def test_damaged_checksums_are_named(case: tuple[TaskData, Path], content: str, run: RunFolder) -> None:
    run.begin(toy_config())
    (run.path / "data.json").write_text(content)
    with pytest.raises(DataError, match=r"data\.json: the checksums of the run's data cannot be read"):
        check_input_files(run, case[0], "once", keep=True)


def test_digits_are_a_file_of_their_library() -> None:
    pytest.importorskip("sklearn", reason="needs the extra 'images'")
    inputs = open_images("digits", ImageConfig()).inputs
    assert [(inputs.root / name).is_file() for name in inputs.names] == [True]


def test_too_many_images_are_known_by_name_and_size_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_class_folders(tmp_path, {"cat": 4, "dog": 4}, size=(6, 6))
    assert MAX_RECORDED >= 50_000 and len(open_images(str(tmp_path), ImageConfig()).inputs.names) == 8
    monkeypatch.setattr("moe_train.data.images.folders.MAX_RECORDED", 7)
    assert open_images(str(tmp_path), ImageConfig()).inputs.names == ()


def test_a_checkpoint_outside_a_run_is_of_nobody(tmp_path: Path) -> None:
    (tmp_path / "a" / "b" / "step_5").mkdir(parents=True)
    assert run_of(tmp_path / "a" / "b" / "step_5") is None

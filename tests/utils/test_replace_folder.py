"""Replacing a folder: nothing is lost wherever the process is killed, and nothing of the user's is touched."""

from __future__ import annotations

import itertools
import json
import logging
import os
import shutil
from pathlib import Path

import pytest

from moe_train.errors import ConfigError
from moe_train.utils.replace_folder import MARKER, FolderReplacement, replacing_folder
from tests.killed import killed_before


def write(folder: Path, word: str) -> None:
    """Content whose parts differ from the whole."""
    for name in ("first", "sub/second", "third"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(word)


def read(folder: Path) -> str | None:
    """The word of a whole folder; None where there is no such folder."""
    if not folder.exists():
        return None
    words = {(folder / name).read_text() for name in ("first", "sub/second", "third")}
    assert len(words) == 1
    return words.pop()


def replace(place: Path, word: str, keep: bool = False) -> Path | None:
    with replacing_folder(place) as replacement:
        write(replacement.begin(), word)
        return replacement.finish(keep)


def leave_over(place: Path) -> Path:
    """The work folder of a process that is killed when all is written and nothing renamed."""
    assert killed_before(0, lambda: replace(place, "half"), events=("os.rename",))
    work = place.with_name(f"{place.name}.partial")
    assert read(work / "new") == "half"
    return work


USERS = ("out.old", "out.partial", "out.partial.mine", ".out.partial", "out.replaced.mine")


@pytest.mark.processes
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("older", [None, "old"])
def test_killed_at_any_step_it_is_whole_after_the_next_start(tmp_path: Path, keep: bool, older: str | None) -> None:
    for step in itertools.count():
        folder = tmp_path / str(step)
        place = folder / "out"
        for name in USERS:
            write(folder / name, f"the user's {name}")
        if older:
            write(place, older)
        killed = killed_before(step, lambda place=place: replace(place, "new", keep))
        assert read(place) in (older, "new", None)
        with replacing_folder(place):  # the next start
            assert read(place) in (older, "new")
            assert not (keep and older) or "old" in (read(place), read(folder / "out.replaced"))
        replace(place, "newer")
        assert read(place) == "newer"
        assert all(read(folder / name) == f"the user's {name}" for name in USERS)
        others = set(os.listdir(folder)) - {*USERS, "out", "out.replaced"}
        # A work folder without a marker (killed early) is empty, and its owner is unknown.
        assert not others or (others == {"out.partial-2"} and not os.listdir(folder / "out.partial-2"))
        if not killed:
            break
    assert step > 15 and not others


@pytest.mark.processes
def test_a_swap_cut_off_between_its_renames_is_completed(tmp_path: Path) -> None:
    place = tmp_path / "out"
    write(place, "old")
    assert killed_before(1, lambda: replace(place, "new"), events=("os.rename",))
    assert os.listdir(tmp_path / "out.partial") and not place.exists()
    with replacing_folder(place):
        assert read(place) == "new"
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.processes
def test_a_former_folder_is_not_removed_where_another_has_come_to_its_place(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place = tmp_path / "out"
    write(place, "old")
    assert killed_before(1, lambda: replace(place, "new"), events=("os.rename",))
    write(place, "the user's own")
    with caplog.at_level(logging.WARNING), replacing_folder(place):
        assert read(place) == "the user's own"
    assert read(tmp_path / "out.partial" / "old") == "old" and read(tmp_path / "out.partial" / "new") == "new"
    assert "out.partial is left alone" in caplog.text


@pytest.mark.processes
def test_a_former_folder_comes_back_where_the_new_one_was_taken_away(tmp_path: Path) -> None:
    place = tmp_path / "out"
    write(place, "old")
    assert killed_before(1, lambda: replace(place, "new"), events=("os.rename",))
    shutil.rmtree(tmp_path / "out.partial" / "new")
    with replacing_folder(place):
        assert read(place) == "old"


def test_one_process_at_a_time(tmp_path: Path) -> None:
    with replacing_folder(tmp_path / "out") as first:
        write(first.begin(), "first")
        with (
            pytest.raises(ConfigError, match=rf"another process is writing .*\(process {os.getpid()} on"),
            replacing_folder(tmp_path / "out"),
        ):
            pass
        first.finish()
    assert read(tmp_path / "out") == "first" and os.listdir(tmp_path) == ["out"]


def test_a_work_folder_in_use_is_kept_without_its_lock(tmp_path: Path) -> None:
    with replacing_folder(tmp_path / "out") as first:
        write(first.begin(), "first")
        (tmp_path / ".out.lock").unlink()
        with replacing_folder(tmp_path / "out") as second:
            assert read(tmp_path / "out.partial" / "new") == "first"
            write(second.begin(), "second")
            second.finish()
        with pytest.raises(ConfigError, match="something else has been put here"):
            first.finish()
    assert read(tmp_path / "out") == "second" and os.listdir(tmp_path) == ["out"]


@pytest.mark.processes
def test_copies_and_renamed_work_folders_are_the_users(tmp_path: Path) -> None:
    work = leave_over(tmp_path / "out")
    shutil.copytree(work, tmp_path / "out.partial-copy")
    work.rename(tmp_path / "out.partial.kept")
    replace(tmp_path / "out", "new")
    assert sorted(os.listdir(tmp_path)) == ["out", "out.partial-copy", "out.partial.kept"]
    (tmp_path / "out.partial.kept").rename(work)
    replace(tmp_path / "out", "newer")
    assert sorted(os.listdir(tmp_path)) == ["out", "out.partial-copy"]


@pytest.mark.processes
def test_what_the_user_has_put_into_a_work_folder_stays(tmp_path: Path) -> None:
    work = leave_over(tmp_path / "out")
    (work / "notes").write_text("mine")
    replace(tmp_path / "out", "new")
    assert os.listdir(work) == ["notes"]


@pytest.mark.processes
def test_a_work_folder_of_another_machine_stays(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    work = leave_over(tmp_path / "out")
    mark = json.loads((work / MARKER).read_text())
    (work / MARKER).write_text(json.dumps({**mark, "host": "elsewhere", "boot": "another"}))
    with caplog.at_level(logging.WARNING):
        replace(tmp_path / "out", "new")
    assert read(work / "new") == "half" and "was made on elsewhere" in caplog.text


@pytest.mark.processes
@pytest.mark.parametrize("mark", ["", "[]", "{}", "null", "[" * 100_000])
def test_an_empty_marker_is_no_marker(tmp_path: Path, mark: str) -> None:
    work = leave_over(tmp_path / "out")
    (work / MARKER).write_text(mark)
    replace(tmp_path / "out", "new")
    assert read(work / "new") == "half"


def test_a_file_of_the_users_by_the_name_of_the_lock_is_left_as_it_is(tmp_path: Path) -> None:
    lock = tmp_path / ".out.lock"
    lock.write_text("mine")
    replace(tmp_path / "out", "new")
    assert lock.read_text() == "mine"
    lock.write_text("")
    replace(tmp_path / "out", "newer")
    assert lock.read_text() == ""


def test_a_target_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    place = tmp_path / "out"
    with replacing_folder(place) as replacement:
        write(replacement.begin(), "new")
        write(place, "the user's")
        with pytest.raises(ConfigError, match="something else has been put here"):
            replacement.finish()
    assert read(place) == "the user's" and os.listdir(tmp_path) == ["out"]


def test_a_rename_that_fails_puts_the_former_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = os.rename

    def full(source: Path, target: Path) -> None:
        if source.name == "new":
            raise OSError(28, "No space left on device")
        rename(source, target)

    write(tmp_path / "out", "old")
    monkeypatch.setattr(os, "rename", full)
    with pytest.raises(OSError, match="No space"):
        replace(tmp_path / "out", "new")
    assert read(tmp_path / "out") == "old" and os.listdir(tmp_path) == ["out"]


def test_symbolic_links_are_followed(tmp_path: Path) -> None:
    write(tmp_path / "disk" / "data", "old")
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "data")
    replace(tmp_path / "out", "new")
    assert (tmp_path / "out").is_symlink() and read(tmp_path / "disk" / "data") == "new"
    assert os.listdir(tmp_path / "disk") == ["data"]


def test_replaces_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    replace(Path("."), "new")
    assert read(tmp_path / "here") == "new"


def test_a_mount_point_is_refused_before_anything_is_made() -> None:
    with pytest.raises(ConfigError, match="a mount point cannot be replaced"):
        FolderReplacement(Path("/proc")).begin()

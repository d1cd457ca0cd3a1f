"""Results of different sets of sentences have files of their own; what is set aside is never lost."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from moe_train.errors import ConfigError, DataError
from moe_train.evaluation.result_files import ResultFiles, part_name, writable_folder, writing
from moe_train.evaluation.translations import Translation


def put(files: ResultFiles, text: str, *directions: str) -> None:
    """Results whose every file says ``text``."""
    for direction in directions or ("en-de",):
        files.outputs(direction).write([text], [text], [Translation(text, 0.0, 1)])
    files.scores.write_text(text)


def found(files: ResultFiles, direction: str = "en-de") -> set[str]:
    """What the files of a set say."""
    return {files.scores.read_text(), *files.outputs(direction).read()[0], *files.outputs(direction).read()[1]}


def test_names() -> None:
    assert part_name() == "" and part_name(max_sentences=3) == "first-3"
    assert part_name(["de-en", "en-de"]) == "only-de-en,en-de"
    assert part_name(["de-en"], 7) == "only-de-en.first-7"
    many = [f"en-{chr(97 + n // 26)}{chr(97 + n % 26)}" for n in range(100)]
    names = {part_name(many), part_name(many[1:]), part_name(["../../x-y"])}
    assert len(names) == 3 and all(len(name) < 60 and "/" not in name for name in names)
    assert part_name(many).startswith("only-100-directions-")
    files = ResultFiles(Path("run"), "test", "first-3")
    assert files.scores == Path("run/test.first-3.json")
    assert files.outputs("en-de").hypotheses == Path("run/hypotheses/first-3/test.en-de.de")


def test_whatever_is_set_aside_is_kept_under_a_number(tmp_path: Path) -> None:
    files, part, valid = (ResultFiles(tmp_path, *names) for names in (("test",), ("test", "first-3"), ("valid",)))
    (tmp_path / "test.replaced.json").write_text("of an earlier version")
    for text in ("one", "two", "three"):
        put(valid, "valid")
        put(part, "part")
        put(files, text, "en-de", "fr-en")
        assert "test.json was made with other settings, and is kept in test.replaced-" in files.keep_earlier()
    assert "kept in test.first-3.replaced-1.json" in part.keep_earlier()
    assert not files.scores.exists() and found(valid) == {"valid"}
    for number, text in enumerate(("one", "two", "three"), 1):
        aside = ResultFiles(tmp_path, "test", f"replaced-{number}")
        assert found(aside) == found(aside, "fr-en") == {text}
    assert found(ResultFiles(tmp_path, "test", "first-3.replaced-1")) == {"part"}
    assert (tmp_path / "test.replaced.json").read_text() == "of an earlier version"


def test_a_move_that_is_cut_off_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At every file of it; the next call goes on where it was."""
    replace = os.replace
    for moves in range(9):
        files = ResultFiles(tmp_path / str(moves), "test")
        put(ResultFiles(files.folder, "test", "replaced-1"), "older")
        put(files, "one", "en-de", "de-en")
        left = [moves]

        def cut_off(source: Path, target: Path, left: list[int] = left) -> None:
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            replace(source, target)

        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr("moe_train.evaluation.result_files.os.replace", cut_off)
            files.keep_earlier()
        assert files.scores.read_text() == "one"
        files.keep_earlier()
        aside = ResultFiles(files.folder, "test", "replaced-2")
        assert found(aside) == found(aside, "de-en") == {"one"}
        assert found(ResultFiles(files.folder, "test", "replaced-1")) == {"older"}


def test_evaluations_of_one_run_take_turns(tmp_path: Path) -> None:
    """Four at once, ten times each: every result is kept, whole."""
    files = ResultFiles(tmp_path, "test")

    def evaluate(name: str) -> None:
        for number in range(10):
            with writing(tmp_path):
                if files.scores.exists():
                    files.keep_earlier()
                put(files, f"{name}{number}")

    threads = [threading.Thread(target=evaluate, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sets = [found(files), *(found(ResultFiles(tmp_path, "test", f"replaced-{n}")) for n in range(1, 40))]
    assert all(len(texts) == 1 for texts in sets)
    assert set.union(*sets) == {f"{name}{number}" for name in "abcd" for number in range(10)}


def test_a_disk_that_is_full_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"could not be written \(No space left on device\).*out="), writing(tmp_path):
        Path("/dev/full").write_text("x")


def test_results_go_elsewhere_where_the_run_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file in the place of a folder refuses root, too."""
    run = tmp_path / "run"
    run.mkdir()
    assert writable_folder(run, "", None) == (run, "") and not list(run.iterdir())
    assert writable_folder(run, "variants/x", str(tmp_path / "out")) == (tmp_path / "out" / "variants" / "x", "")
    (run / "variants").write_text("")
    monkeypatch.chdir(tmp_path)
    folder, note = writable_folder(run, "variants/x", None)
    assert folder.is_relative_to(tmp_path / "evaluated") and folder.parts[-2:] == ("variants", "x")
    assert folder.is_dir() and str(folder) in note and "Not a directory" in note and "out=" in note
    with pytest.raises(ConfigError, match=r"cannot be written there \(Not a directory\).*Choose another out="):
        writable_folder(run, "", str(run / "variants" / "y"))
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "evaluated").write_text("")
    monkeypatch.chdir(tmp_path / "sub")
    with pytest.raises(ConfigError, match=r"cannot be written.*Set a folder for them: out="):
        writable_folder(run, "variants/x", None)

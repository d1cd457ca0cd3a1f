"""Checksums of data files: taken when they must be, and not oftener."""

from __future__ import annotations

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from moe_train.data import verification
from moe_train.data.text.lines import sha256
from moe_train.data.verification import sha256_of_files
from moe_train.errors import DataError

NAMES = ("a.bin", "raw/b.txt")


class Reads:
    """Counts the files that are read for their checksums."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.names: list[str] = []
        patch.setattr(verification, "sha256", self)

    def __call__(self, path: Path) -> str:
        self.names.append(path.name)
        return sha256(path)

    def taken(self) -> list[str]:
        """The files read since the last time."""
        names, self.names = sorted(self.names), []
        return names


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "moe_train" / "verified"


@pytest.fixture
def folder(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two files that count as settled although they are just written."""
    monkeypatch.setattr(verification, "_MIN_AGE", 0)
    (tmp_path / "data" / "raw").mkdir(parents=True)
    for name in NAMES:
        (tmp_path / "data" / name).write_text(f"this is {name}\n")
    time.sleep(0.03)  # file systems count time in steps of up to 10 ms: what changes the files now has another one
    return tmp_path / "data"


def expected(folder: Path) -> dict[str, str]:
    return {name: sha256(folder / name) for name in NAMES}


def test_once_reads_each_version_of_a_file_once(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads, before = Reads(monkeypatch), sorted(folder.rglob("*"))
    for wanted in (["a.bin", "b.txt"], [], []):
        assert sha256_of_files(folder, NAMES) == expected(folder)
        assert reads.taken() == wanted
    assert sha256_of_files(folder, NAMES, "always") == expected(folder) and reads.taken() == ["a.bin", "b.txt"]
    assert sha256_of_files(folder, NAMES, "never") == {} and reads.taken() == []
    assert sorted(folder.rglob("*")) == before, "nothing is written into the data folder"
    assert [path.suffix for path in sorted(cache.iterdir())] == [".json", ".lock"]
    assert cache.stat().st_mode & 0o077 == 0


def _rewritten(path: Path) -> None:
    """Other content of the same size, and the old mtime: the ctime tells."""
    before = path.stat()
    path.write_bytes(path.read_bytes().swapcase())
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def _replaced(path: Path) -> None:
    """The same content, size and mtime in another inode."""
    before, other = path.stat(), path.with_name("other")
    other.write_bytes(path.read_bytes())
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.replace(path)


def _grown(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"!")


@pytest.mark.parametrize("change", [_rewritten, _replaced, _grown, os.utime])
def test_a_file_that_has_changed_is_read_again(folder: Path, change: object, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = Reads(monkeypatch)
    sha256_of_files(folder, NAMES)
    reads.taken()
    change(folder / "a.bin")  # type: ignore[operator]
    assert sha256_of_files(folder, NAMES) == expected(folder)
    assert reads.taken() == ["a.bin"]
    assert sha256_of_files(folder, NAMES) == expected(folder) and reads.taken() == []


def test_a_file_that_was_just_written_is_not_recorded(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be written again within what its file system counts as the same time."""
    monkeypatch.setattr(verification, "_MIN_AGE", 3_600_000_000_000)
    reads = Reads(monkeypatch)
    for _ in range(2):
        assert sha256_of_files(folder, NAMES) == expected(folder) and reads.taken() == ["a.bin", "b.txt"]
    assert not cache.exists()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"files": 3}', '{"files": {"a.bin": 7}}', "[" * 100_000])
def test_a_damaged_record_is_not_believed(
    folder: Path, cache: Path, content: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sha256_of_files(folder, NAMES)
    (record,) = cache.glob("*.json")
    record.write_text(content)
    reads = Reads(monkeypatch)
    assert sha256_of_files(folder, NAMES) == expected(folder) and reads.taken() == ["a.bin", "b.txt"]
    assert sha256_of_files(folder, NAMES) == expected(folder) and reads.taken() == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_somebody_else_s_record_is_not_believed(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sha256_of_files(folder, NAMES)
    (record,) = cache.glob("*.json")
    os.chown(record, 65534, 65534)
    reads = Reads(monkeypatch)
    assert sha256_of_files(folder, NAMES) == expected(folder) and reads.taken() == ["a.bin", "b.txt"]


def test_another_host_has_a_record_of_its_own(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = Reads(monkeypatch)
    for host, wanted in (("one", ["a.bin", "b.txt"]), ("two", ["a.bin", "b.txt"]), ("one", [])):
        monkeypatch.setattr("socket.gethostname", lambda host=host: host)
        assert sha256_of_files(folder, NAMES) == expected(folder) and reads.taken() == wanted
    assert len(list(cache.glob("*.json"))) == 2


def test_without_a_place_for_records_files_are_read_each_time(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    reads = Reads(monkeypatch)
    for _ in range(2):
        assert sha256_of_files(folder, NAMES) == expected(folder) and reads.taken() == ["a.bin", "b.txt"]


def test_who_reads_at_the_same_time_adds_to_one_record(folder: Path, cache: Path) -> None:
    names = [f"{number}.bin" for number in range(40)]
    for name in names:
        (folder / name).write_text(name)
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda first: sha256_of_files(folder, names[first::8]), range(8)))
    (record,) = cache.glob("*.json")
    assert json.loads(record.read_text())["files"].keys() == set(names)


def test_a_file_that_changes_while_it_is_read_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def while_it_is_written(path: Path) -> str:
        digest = sha256(path)
        _grown(path)
        return digest

    monkeypatch.setattr(verification, "sha256", while_it_is_written)
    with pytest.raises(DataError, match=r"a\.bin: the file changes while it is read"):
        sha256_of_files(folder, ["a.bin"])


def test_a_file_that_is_gone_is_named(folder: Path) -> None:
    with pytest.raises(DataError, match=r"c\.bin: it cannot be read \(No such file"):
        sha256_of_files(folder, ["c.bin"])

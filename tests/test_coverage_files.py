"""Coverage data files that a killed process has left."""

from __future__ import annotations

from pathlib import Path

from coverage import CoverageData

from tests.coverage_files import remove_damaged


def test_only_damaged_files_are_removed(tmp_path: Path) -> None:
    for name in ("intact", "cut", "overwritten"):
        data = CoverageData(str(tmp_path / f".coverage.{name}"))
        data.add_lines({f"/code/file_{number}.py": range(1, 400, number + 2) for number in range(300)})
        data.close()
    cut, overwritten = tmp_path / ".coverage.cut", tmp_path / ".coverage.overwritten"
    cut.write_bytes(cut.read_bytes()[:5000])
    content = bytearray(overwritten.read_bytes())
    content[8192:20000] = bytes(20000 - 8192)
    overwritten.write_bytes(content)
    tmp_path.joinpath(".coverage.empty").write_bytes(b"")
    assert sorted(remove_damaged(tmp_path)) == [".coverage.cut", ".coverage.empty", ".coverage.overwritten"]
    assert [path.name for path in tmp_path.iterdir()] == [".coverage.intact"]

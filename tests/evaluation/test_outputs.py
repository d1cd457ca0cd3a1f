"""Scores of other settings are set aside, not lost."""

from __future__ import annotations

from pathlib import Path

from moe_train.evaluation.outputs import set_aside


def _run(folder: Path, split: str, text: str) -> None:
    (folder / "hypotheses").mkdir(exist_ok=True)
    (folder / f"{split}.json").write_text(text)
    (folder / "hypotheses" / f"{split}.en-{text}.{text}").write_text(text)


def test_what_stood_there_is_kept_and_the_other_split_stays(tmp_path: Path) -> None:
    _run(tmp_path, "test", "de")
    _run(tmp_path, "valid", "fr")
    assert "test.replaced.json" in set_aside(tmp_path, "test")
    assert (tmp_path / "test.replaced.json").read_text() == "de"
    assert not (tmp_path / "test.json").exists()
    assert [p.name for p in (tmp_path / "hypotheses.replaced").iterdir()] == ["test.en-de.de"]
    assert [p.name for p in (tmp_path / "hypotheses").iterdir()] == ["valid.en-fr.fr"]


def test_only_the_last_is_kept_whole(tmp_path: Path) -> None:
    for text in ("de", "ja"):
        _run(tmp_path, "test", text)
        set_aside(tmp_path, "test")
    assert (tmp_path / "test.replaced.json").read_text() == "ja"
    assert [p.name for p in (tmp_path / "hypotheses.replaced").iterdir()] == ["test.en-ja.ja"]

"""A trained run beside data that it was not trained on: another vocabulary, altered files, untrained directions."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from moe_train.config import RunConfig, SearchConfig, build
from moe_train.config.corpus import PrepareConfig
from moe_train.config.evaluation import EvaluateConfig, ExportConfig, TranslateConfig
from moe_train.data.folder import DataFolder
from moe_train.data.prepare.pipeline import prepare
from moe_train.data.text.lines import sha256
from moe_train.errors import DataError
from moe_train.evaluation.evaluate_split import evaluate
from moe_train.evaluation.export_model import export_run
from moe_train.evaluation.inference.translate_stream import translate_input
from moe_train.evaluation.loading import open_run
from moe_train.evaluation.measure_task import evaluate_task, show_measures
from moe_train.evaluation.scoring.results import read_results
from moe_train.evaluation.scoring.score_table import print_scores
from moe_train.training.run.run_data import check_initial_vocabulary
from moe_train.training.run.run_folder import RunFolder
from tests.data.tiny_corpus import prepare_tiny, sentence, sentences, write_corpus
from tests.evaluation.runs import make_run, make_task_run

SEARCH = SearchConfig(beam=1, max_length_ratio=0.2, max_length_offset=3)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory, tiny_data: DataFolder) -> DataFolder:
    """The same languages and as many pieces, learnt from less text: others."""
    folder = prepare_tiny(tmp_path_factory.mktemp("other"), train=120, valid=6, test=6)
    assert folder.manifest.vocabulary == tiny_data.manifest.vocabulary
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_data: DataFolder) -> Path:
    return make_run(tmp_path_factory.mktemp("run") / "run", tiny_data)


@pytest.fixture(scope="module")
def exported(run: Path) -> Path:
    return export_run(ExportConfig(str(run), str(run.parent / "out")))


def uses(run: Path, data: Path, out: Path) -> dict[str, Callable[[], object]]:
    """Everything that takes a run and a data folder."""
    few = {"directions": ("en-de",), "max_sentences": 2, "search": SEARCH}
    return {
        "evaluate": lambda: evaluate(EvaluateConfig(str(run), data=str(data), **few)),  # type: ignore[arg-type]
        "translate": lambda: translate_input(TranslateConfig(str(run), "en", "de", data=str(data), search=SEARCH)),
        "export": lambda: export_run(ExportConfig(str(run), str(out), data=str(data))),
        "open": lambda: open_run(run, data=data),
    }


@pytest.mark.parametrize("use", ["evaluate", "translate", "export", "open"])
@pytest.mark.parametrize("kind", ["run", "export"])
def test_another_vocabulary_of_equal_size_is_refused(
    run: Path, exported: Path, other: DataFolder, use: str, kind: str, tmp_path: Path
) -> None:
    source = run if kind == "run" else exported
    with pytest.raises(DataError, match=r"another vocabulary than .* trained with: its spm\.model differs") as raised:
        uses(source, other.path, tmp_path / "out")[use]()
    assert raised.value.where == str(other.path / "spm.model") and "vocabulary.reuse=FOLDER" in raised.value.remedy
    assert not (tmp_path / "out").exists()


def test_a_vocabulary_of_another_size_is_said_to_be_another(run: Path, tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus", targets=("de",), train=40, valid=3, test=3)
    keys = {"name": "text", "path": str(corpus)}
    small = prepare(build(PrepareConfig, {"out": str(tmp_path / "data"), "corpus": keys, "vocabulary": {"size": 310}}))
    with pytest.raises(DataError, match=r"another vocabulary than .* trained with"):
        open_run(run, data=small.path)


def test_an_export_without_a_data_folder_asks_for_one(exported: Path) -> None:
    with pytest.raises(DataError, match="An export has no held-out text: give a prepared data folder, data=FOLDER"):
        evaluate(EvaluateConfig(str(exported), search=SEARCH))


def test_a_dictionary_in_another_order_is_refused(run: Path, tiny_data: DataFolder, tmp_path: Path) -> None:
    """Whatever is not compared with the manifest: pieces have other numbers there."""
    copy = Path(shutil.copytree(tiny_data.path, tmp_path / "data"))
    lines = (copy / "dict.txt").read_bytes().splitlines(keepends=True)
    (copy / "dict.txt").write_bytes(b"".join([*lines[:5], lines[6], lines[5], *lines[7:]]))
    with pytest.raises(DataError, match=r"its dict\.txt differs"):
        open_run(run, data=copy, verify="never")


def test_text_with_the_run_s_vocabulary_is_taken(run: Path, tiny_data: DataFolder, tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus", targets=("de",), train=30, valid=3, test=3)
    keys = {"name": "text", "path": str(corpus)}
    mapping = {"out": str(tmp_path / "data"), "corpus": keys, "vocabulary": {"reuse": str(tiny_data.path)}}
    folder = prepare(build(PrepareConfig, mapping))
    for name, use in uses(run, folder.path, tmp_path / "out").items():
        if name != "translate":  # which reads standard input
            use()
    check_initial_vocabulary(str(run), open_run(run, data=folder.path).task)


@pytest.mark.parametrize("place", ["", "checkpoints/step_5", "checkpoints/best", "export"])
def test_weights_for_other_pieces_are_no_start(
    run: Path, exported: Path, tiny_data: DataFolder, other: DataFolder, place: str
) -> None:
    source = exported if place == "export" else run / place
    check_initial_vocabulary(str(source), open_run(run).task)
    altered = make_run(other.path.parent / "another", other)
    with pytest.raises(DataError, match=r"another vocabulary than .* its spm\.model differs"):
        check_initial_vocabulary(str(source), open_run(altered).task)


# --- runs of an earlier version ------------------------------------------------------------------------------------


def older(run: Path, to: Path) -> Path:
    """A copy of a run as commit 1d87158 wrote it, which says nothing of its vocabulary."""
    copy = RunFolder(Path(shutil.copytree(run, to, symlinks=True)))
    info = {key: value for key, value in copy.info.items() if key not in ("vocabulary", "trained")}
    (copy.path / "run.json").write_text(json.dumps(info))
    return copy.path


def test_an_older_run_s_vocabulary_is_taken_once_from_its_data(
    run: Path, tiny_data: DataFolder, other: DataFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = older(run, tmp_path / "old")
    with pytest.raises(DataError, match=r"its spm\.model differs"):
        open_run(old, data=other.path)
    said = capsys.readouterr()
    assert said.err == f"note: {old} keeps no checksums of its vocabulary yet: taken from its data folder\n"
    assert said.out == ""
    kept = json.loads((old / "run.json").read_text())
    assert kept["vocabulary"] == {name: sha256(tiny_data.path / name) for name in ("spm.model", "dict.txt")}
    assert kept["trained"] == list(tiny_data.directions) and kept["status"] == "finished"
    open_run(old)
    with pytest.raises(DataError, match=r"its spm\.model differs"):
        open_run(old, data=other.path)
    assert not capsys.readouterr().err


def test_an_older_run_whose_data_is_gone_is_used_with_a_note(
    run: Path, tiny_data: DataFolder, other: DataFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = older(run, tmp_path / "old")
    content = json.loads((old / "config.json").read_text())
    content["config"]["data"] = str(tmp_path / "gone")
    (old / "config.json").write_text(json.dumps(content))
    assert open_run(old, data=other.path).trained == tiny_data.directions
    assert "does not record the vocabulary of its training, and it cannot be found" in capsys.readouterr().err
    moved = Path(shutil.copytree(tiny_data.path, tmp_path / "moved"))  # the same manifest: the same data
    open_run(old, data=moved)
    assert "taken from its data folder" in capsys.readouterr().err
    with pytest.raises(DataError, match=r"its spm\.model differs"):
        open_run(old, data=other.path)


def test_an_older_export_has_its_own_dictionary(
    exported: Path, other: DataFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = json.loads((exported / "config.json").read_text())
    assert set(content.pop("vocabulary")) == {"spm.model", "dict.txt"} and len(content.pop("trained")) == 6
    old = RunFolder(Path(shutil.copytree(exported, tmp_path / "old")))
    (old.path / "config.json").write_text(json.dumps(content))
    manifest = json.loads((old.path / "manifest.json").read_text())
    config = (old.path / "config.json").read_bytes()
    manifest["files"]["config.json"] = {"sha256": sha256(old.path / "config.json"), "bytes": len(config)}
    (old.path / "manifest.json").write_text(json.dumps(manifest))
    assert len(open_run(old.path).trained) == 6 and not capsys.readouterr().err
    with pytest.raises(DataError, match=r"its spm\.model differs"):
        open_run(old.path, data=other.path)


# --- altered data ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use", ["evaluate", "translate", "export", "open"])
def test_altered_references_are_refused(run: Path, tiny_data: DataFolder, use: str, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_data.path, tmp_path / "data"))
    victim = copy / "raw" / "test.en-de.de"
    victim.write_bytes(victim.read_bytes().swapcase())
    with pytest.raises(DataError, match="the file's checksum is not the manifest's") as raised:
        uses(run, copy, tmp_path / "out")[use]()
    assert raised.value.where == str(victim)
    assert open_run(run, data=copy, verify="never").data.path == copy


def test_data_prepared_anew_in_its_place_is_said(
    run: Path, tiny_data: DataFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = Path(shutil.copytree(tiny_data.path, tmp_path / "data"))
    own = make_run(tmp_path / "run", DataFolder.open(copy))
    manifest = json.loads((copy / "manifest.json").read_text())
    del manifest["counts"]["test"]["en-ja"]
    (copy / "manifest.json").write_text(json.dumps(manifest))
    open_run(own)
    assert f"{copy} was prepared again or altered after {own} was trained on it" in capsys.readouterr().err


# --- directions without training text --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def partly(tmp_path_factory: pytest.TempPathFactory) -> DataFolder:
    """Training text of de-fr, test text of en-fr too."""
    corpus = tmp_path_factory.mktemp("partly")
    files = {("train", "de-fr"): (0, 200), ("valid", "de-fr"): (200, 6), ("test", "de-fr"): (210, 6)}
    for (split, pair), (start, count) in {**files, ("test", "en-fr"): (220, 6)}.items():
        for language in pair.split("-"):
            lines = [sentence(language, *parts) for parts in sentences(count, start)]
            (corpus / f"{split}.{pair}.{language}").write_text("".join(f"{line}\n" for line in lines))
    settings = {"size": 400, "character_coverage": 1.0}
    keys = {"name": "text", "path": str(corpus)}
    return prepare(build(PrepareConfig, {"out": str(corpus / "data"), "corpus": keys, "vocabulary": settings}))


def test_a_direction_with_test_text_only_is_zero_shot(partly: DataFolder, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", partly)
    assert json.loads((run / "run.json").read_text())["trained"] == ["de-fr", "fr-de"]
    results = evaluate(EvaluateConfig(str(run), search=SEARCH))
    assert list(results.directions) == ["de-fr", "fr-de"] and "zero-shot" not in results.groups
    named = evaluate(EvaluateConfig(str(run), directions=("en-fr", "de-fr"), search=SEARCH))
    assert [name for name, result in named.directions.items() if result.zero_shot] == ["en-fr"]
    assert "en-fr: not trained in this run (zero-shot)" in named.notes
    assert read_results(run / "test.only-de-fr,en-fr.json") == named
    assert named.groups["trained"] == ["de-fr"] and named.groups["zero-shot"] == ["en-fr"]
    shown = io.StringIO()
    print_scores(named, Console(file=shown, width=200))
    assert "en-fr (zero-shot)" in shown.getvalue() and "trained (1)" in shown.getvalue()


def test_an_older_run_is_told_by_its_data(partly: DataFolder, tmp_path: Path) -> None:
    old = older(make_run(tmp_path / "run", partly), tmp_path / "old")
    assert open_run(old).trained == ("de-fr", "fr-de")


def test_an_export_knows_what_was_trained(partly: DataFolder, tmp_path: Path) -> None:
    """It has no sentences to tell it by."""
    out = export_run(ExportConfig(str(make_run(tmp_path / "run", partly)), str(tmp_path / "out")))
    assert open_run(out, data=partly.path).trained == ("de-fr", "fr-de")


def test_a_direction_that_was_asked_for_and_has_no_training_text_is_said(
    partly: DataFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run", partly, directions=("de-fr", "en-fr"))
    open_run(run).task.check_data()
    assert "no training text for en-fr" in capsys.readouterr().err


def test_a_language_with_test_text_only_is_left_out_of_the_average(partly: DataFolder, tmp_path: Path) -> None:
    mapping: dict[str, Any] = {
        "data": str(partly.path),
        "task": {"name": "cross_lingual_lm"},
        "routing": {"name": "switch", "num_experts": 2},
        "model": {"name": "encoder", "encoder_layers": 2, "embed_dim": 16, "ffn_dim": 24, "num_heads": 2},
    }
    run = make_task_run(tmp_path / "run", build(RunConfig, mapping), partly)
    content = evaluate_task(EvaluateConfig(str(run)))
    assert set(content["sets"]) == {"de", "en", "fr"} and content["zero_shot"] == ["en"]
    mean = (content["sets"]["de"]["ppl"] + content["sets"]["fr"]["ppl"]) / 2
    assert content["average"]["ppl"] == pytest.approx(mean)
    shown = io.StringIO()
    show_measures(content, Console(file=shown, width=200))
    assert "en (zero-shot)" in shown.getvalue()

"""What moe-export writes: one directory that translates as the run does, and that is a checkpoint too."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from moe_train.commands.export import main
from moe_train.config import SearchConfig
from moe_train.config.evaluation import EvaluateConfig, ExportConfig, Inference
from moe_train.data.folder import DataFolder
from moe_train.errors import CheckpointError, ConfigError
from moe_train.evaluation.evaluate_split import evaluate
from moe_train.evaluation.export_model import export_run
from moe_train.evaluation.loading import LoadedRun, load_run
from moe_train.evaluation.translator import Translator
from moe_train.models.accounting import sparse_blocks
from moe_train.training.checkpoint.init_from import initialise_from
from moe_train.training.checkpoint.state_dict import model_tensors
from moe_train.training.checkpoint.tensor_shards import INDEX
from moe_train.utils.replace_folder import replacing_folder
from tests.evaluation.runs import make_run
from tests.killed import killed_before

SENTENCES = ["der Hund schläft", "ein kleines Haus", "sie liest ein Buch"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_data: DataFolder) -> Path:
    return make_run(tmp_path_factory.mktemp("export") / "run", tiny_data, "top_k")


@pytest.fixture(scope="module")
def exported(made: Path) -> Path:
    """In files of at most 60 KB."""
    return export_run(ExportConfig(str(made), str(made.parent / "out"), shard_mb=0.06))


def outputs(run: LoadedRun) -> list[str]:
    translator = Translator(run.task, run.model, SearchConfig(beam=2), torch.device("cpu"))
    return [translation.text for translation in translator.translate(SENTENCES, "de", "en")]


def test_it_translates_as_the_run_does_without_its_data(made: Path, exported: Path, tmp_path: Path) -> None:
    moved = exported.rename(tmp_path / "moved")
    try:
        loaded = load_run(moved)
        assert Path(loaded.config.data) == moved / "data"
        want = outputs(load_run(made))
        assert any(want) and outputs(loaded) == want
        assert outputs(load_run(made, "last")) != want, "the export is of the best checkpoint"
    finally:
        moved.rename(exported)


def test_what_is_in_it(made: Path, exported: Path) -> None:
    kinds = {path.suffix for path in exported.rglob("*") if path.is_file()}
    assert kinds == {".safetensors", ".json", ".md", ".txt", ".model"}
    want = model_tensors(load_run(made).model)
    places = json.loads((exported / INDEX).read_text())["weight_map"]
    assert places.keys() == want.keys() and len(set(places.values())) > 2
    for path in exported.glob("*.safetensors"):
        with safe_open(path, "pt") as content:
            for name in content.keys():  # noqa: SIM118
                assert places[name] == path.name and torch.equal(content.get_tensor(name), want[name])
    described = json.loads((exported / "config.json").read_text())
    assert described["exported"]["update"] == 5 and described["config"]["routing"]["name"] == "top_k"
    text = (exported / "README.md").read_text()
    assert "fc1_weight.@0 … .@3` | [32, 48] | float32 |" in text and "source=en" in text
    assert DataFolder.open(exported / "data", verify=True).languages == load_run(made).data.languages


def test_another_run_can_begin_with_it(made: Path, exported: Path) -> None:
    model = load_run(made, "last").model
    assert initialise_from(model, str(exported)) == exported
    want = model_tensors(load_run(made).model)
    assert all(torch.equal(tensor, want[name]) for name, tensor in model_tensors(model).items())


def test_it_is_evaluated_as_the_run_is(made: Path, exported: Path, tiny_data: DataFolder, tmp_path: Path) -> None:
    """With sentences from elsewhere, since it has none; what evaluation writes does not harm it."""
    copy = Path(shutil.copytree(exported, tmp_path / "copy"))
    search = SearchConfig(beam=2, max_length_ratio=0.5, max_length_offset=5, batch_tokens=160)
    scores = [
        evaluate(
            EvaluateConfig(str(run), data=str(tiny_data.path), directions=("de-en",), max_sentences=6, search=search)
        ).directions["de-en"].scores
        for run in (made, copy)
    ]  # fmt: skip
    assert scores[0] == scores[1] and (copy / "test.only-de-en.first-6.json").is_file()
    assert load_run(copy).config.routing["name"] == "top_k"


def test_damage_is_named(made: Path, tmp_path: Path) -> None:
    out = export_run(ExportConfig(str(made), str(tmp_path / "out"), checkpoint="last"))
    (file,) = out.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: .*truncated"):
        load_run(out)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: .*truncated"):
        initialise_from(load_run(made).model, str(out))


def test_a_write_that_fails_leaves_nothing(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("moe_train.training.checkpoint.checksums.write_manifest", full)
    with pytest.raises(ConfigError, match=r"could not be written \(No space left on device\)"):
        export_run(ExportConfig(str(made), str(tmp_path / "out")))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.processes
def test_what_a_killed_export_leaves_goes_and_neighbours_stay(made: Path, tmp_path: Path) -> None:
    def half() -> None:
        with replacing_folder(tmp_path / "out") as replacement:
            (replacement.begin() / "model.safetensors").write_text("half")
            replacement.finish()

    assert killed_before(0, half, events=("os.rename",))
    assert os.listdir(tmp_path) and not (tmp_path / "out").exists()
    for name in (".out.partial", "out.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "notes").write_text("mine")
    with (
        replacing_folder(tmp_path / "out"),
        pytest.raises(ConfigError, match=rf"another process is writing this folder \(process {os.getpid()}"),
    ):
        export_run(ExportConfig(str(made), str(tmp_path / "out")))
    export_run(ExportConfig(str(made), str(tmp_path / "out")))
    assert sorted(os.listdir(tmp_path)) == [".out.partial", "out", "out.old"]
    assert all((tmp_path / name / "notes").read_text() == "mine" for name in (".out.partial", "out.old"))


def test_the_command(made: Path, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["moe-export", f"run={made}", "out=out"])
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        main()
    assert "exported: out" in said.getvalue()
    assert [path.name for path in tmp_path.glob("out/*.safetensors")] == ["model.safetensors"]
    with pytest.raises(ConfigError, match=r"exists already.*Set another folder: out="):
        export_run(ExportConfig(str(made), str(exported)))


def test_thor_as_a_dense_model(tmp_path: Path, tiny_data: DataFolder) -> None:
    """It translates as the run does with one expert of each layer, and is smaller."""
    thor = make_run(tmp_path / "thor", tiny_data, "thor")
    out = export_run(ExportConfig(str(thor), str(tmp_path / "dense"), dense=True))
    loaded = load_run(out)
    assert loaded.config.routing == {"name": "dense"} and not list(sparse_blocks(loaded.model))
    want = outputs(load_run(thor, inference=Inference({"inference": "fixed"})))
    assert any(want) and outputs(loaded) == want
    whole = export_run(ExportConfig(str(thor), str(tmp_path / "whole")))
    assert sum(p.stat().st_size for p in out.iterdir()) < sum(p.stat().st_size for p in whole.iterdir())


def test_only_thor_can_be_written_as_a_dense_model(made: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the tokens have different experts"):
        export_run(ExportConfig(str(made), str(tmp_path / "out"), dense=True))
    assert not (tmp_path / "out").exists()

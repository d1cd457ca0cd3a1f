"""The routing atlas of a trained run: what it measures, when it is made again, and why there may be none."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from moe_train.analysis.probe import atlas as probe_atlas
from moe_train.analysis.report.atlas_cache import ATLAS, cached_atlas
from moe_train.analysis.report.load_runs import read_run
from moe_train.data.folder import DataFolder
from tests.analysis.report_folders import trained
from tests.commands.test_train import here


@pytest.mark.processes
def test_the_atlas_of_a_run(tiny_data: DataFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = shutil.copytree(tiny_data.path, tmp_path / "data")
    words = [
        *("model=tiny", "model.embed_dim=16", "model.ffn_dim=32", "model.num_heads=2", "routing=switch"),
        *("routing.num_experts=4", "training.threads=1", "training.max_updates=6", "training.tokens_per_update=300"),
        *("training.checkpoint.every_updates=3", "training.schedule.warmup_updates=2", "training.optimizer.lr=0.01"),
        *("training.validation.max_sentences=4", f"data={data}", f"hydra.run.dir={tmp_path / 'run'}"),
    ]
    assert here(words, tmp_path)[0] == 0
    run = read_run(tmp_path / "run", "run")
    atlas, reason = cached_atlas(run, 16)
    assert not reason and atlas["checkpoints"] == [3, 6] and 0 < atlas["sentences"] <= 16
    encoder, decoder = atlas["layers"]
    assert (encoder["name"], decoder["name"]) == ("encoder layer 1", "decoder layer 1")
    assert list(run.layers.values()) == ["encoder layer 1", "decoder layer 1"], "the config says the same"
    for layer in atlas["layers"]:
        assert len(layer["load"]) == len(layer["groups"]) > 1 and layer["experts"] == 4 and not layer["soft"]
        assert all(sum(shares) == pytest.approx(1.0) for shares in layer["load"])
        assert layer["fluctuation"][0] is None and 0 <= layer["fluctuation"][1] <= 1
        assert all(0 <= value <= 1 for value in layer["specialisation"])
    example = atlas["examples"][0]
    source, target = example["set"].split("-")
    assert source in encoder["groups"] and target in decoder["groups"] and example["decoder"][0] == "</s>"
    assert example["encoder"][0] == f"__{target}__" and example["encoder"][-1] == "</s>"
    assert len(example["experts"]["0"]) == len(example["encoder"])
    assert len(example["experts"]["1"]) == len(example["decoder"])

    # The same checkpoints are not probed again, even without the data; other sentences are.
    shutil.move(data, tmp_path / "elsewhere")
    assert cached_atlas(run, 16) == (json.loads(json.dumps(atlas)), "")
    assert cached_atlas(run, 8) == ({}, f"the data folder of the training does not exist: {data}")
    shutil.rmtree(run.path / "checkpoints" / "step_3")
    assert "does not exist" in cached_atlas(run, 16)[1], "the atlas is of other checkpoints"
    (run.path / ATLAS).write_text('{"key": 1}')
    shutil.move(tmp_path / "elsewhere", data)
    again, _ = cached_atlas(run, 16)
    assert again["checkpoints"] == [6] and again["layers"][0]["load"] == encoder["load"]

    def failing(*_: object) -> None:
        raise AssertionError("it is read from the file")

    monkeypatch.setattr(probe_atlas, "routing_atlas", failing)
    assert cached_atlas(run, 16) == (again, "")


def test_runs_without_an_atlas(tmp_path: Path) -> None:
    run = read_run(trained(tmp_path / "run"), "run")
    assert cached_atlas(run, 0) == ({}, "sentences=0: the run was not probed")
    assert cached_atlas(run, 8) == ({}, "the run folder has no checkpoints")
    assert cached_atlas(read_run(trained(tmp_path / "dense", "dense"), ""), 8) == ({}, "a dense model has no experts")
    for update in (1, 2):
        checkpoint = tmp_path / "run" / "checkpoints" / f"step_{update}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "manifest.json").write_text("{}")
    found, reason = cached_atlas(run, 8)
    assert not found and reason, "damaged ones are a reason"
    content = json.loads((run.path / "run.json").read_text())
    content["parameters"]["total"] = 10**10
    (run.path / "run.json").write_text(json.dumps(content))
    assert "10,000,000,000 parameters" in cached_atlas(read_run(run.path, ""), 8)[1]

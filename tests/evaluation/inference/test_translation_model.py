"""``moe_train.load``: translations, scores and experts in Python are those of the commands."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import moe_train
from moe_train import TranslationModel
from moe_train.config.evaluation import ExportConfig
from moe_train.data.folder import DataFolder
from moe_train.errors import ConfigError, DataError
from moe_train.evaluation.export_model import export_run
from tests.evaluation.runs import make_run

LINES = ["Der Arzt mag frisches Brot heute.", "", "Das Kind kauft das neue Buch am Abend.", "ja"]
KEYS: dict[str, Any] = {"beam": 3, "max_length_ratio": 0.5}


@pytest.fixture(scope="module")
def run_path(tmp_path_factory: pytest.TempPathFactory, tiny_data: DataFolder) -> Path:
    return make_run(tmp_path_factory.mktemp("run"), tiny_data, directions=("de-en", "en-de"))


@pytest.fixture(scope="module")
def model(run_path: Path) -> TranslationModel:
    return moe_train.load(run_path, device="cpu", **KEYS)


@pytest.mark.processes
def test_the_package_itself_stays_light() -> None:
    code = "import sys, moe_train; assert 'load' in dir(moe_train); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_translations_are_in_order_and_the_same_in_any_batch(model: TranslationModel) -> None:
    found = model.translate(LINES, "de", "en")
    assert [str(one) for one in found] == [one.text for one in found]
    assert [bool(one.text) for one in found] == [True, False, True, True]
    reverse = model.translate(LINES[::-1], source="de", target="en", batch_tokens=1)[::-1]
    assert [one.pieces for one in reverse] == [one.pieces for one in found]
    assert [one.score for one in reverse] == pytest.approx([one.score for one in found], abs=1e-5)
    assert model.translate([], "de", "en") == []
    assert (model.languages, model.directions) == (("de", "en", "fr", "ja"), ("de-en", "en-de"))


def test_an_export_gives_the_same(model: TranslationModel, run_path: Path, tmp_path: Path) -> None:
    export_run(ExportConfig(str(run_path), str(tmp_path / "export")))
    exported = moe_train.load(tmp_path / "export", device="cpu", **KEYS)
    assert exported.translate(LINES, "de", "en") == model.translate(LINES, "de", "en")


@pytest.mark.parametrize("sampling", [False, True])
def test_scores_of_the_search_are_those_of_the_translation(model: TranslationModel, sampling: bool) -> None:
    """The search goes step by step with cached keys, `score` in one forward pass."""
    keys = {"n_best": 3, "return_scores": True, "sampling": sampling, "temperature": 1.0, "length_penalty": 1.0}
    for line, best in zip(LINES, model.translate(LINES, "de", "en", **keys), strict=True):
        for found in best.hypotheses if line else ():
            assert len(found.pieces) == len(found.token_scores) == found.tokens
            assert found.score == pytest.approx(sum(found.token_scores) / found.tokens, abs=1e-5)
            (given,) = model.score([(line, found.text)], "de", "en")
            if given.pieces == found.pieces:  # encoding may divide the words in another way
                assert given.token_scores == pytest.approx(found.token_scores, abs=2e-5)
                assert given.score == pytest.approx(found.score * found.tokens, abs=1e-4)
        scores = [found.score for found in best.hypotheses]
        assert scores == sorted(scores, reverse=True) and len(scores) == (3 if line else 1)


def test_score_is_the_teacher_forced_log_probability(model: TranslationModel) -> None:
    pairs = [("Das Kind mag Brot.", "The child likes bread."), ("", "bread"), ("ja", ""), ("ja", "bread " * 60)]
    found = model.score(pairs, "de", "en")
    assert [(one.text, one.cut) for one in found] == [(text, number == 3) for number, (_, text) in enumerate(pairs)]
    task, dictionary = model.translator.task, model.translator.task.target_dictionary
    for (sentence, translation), one in zip(pairs, found, strict=True):
        tokenizer = task.folder.tokenizer()
        sample = task.inference_sample([tokenizer.encode(sentence)], "de", "en", [0])["net_input"]
        ids = tokenizer.encode(translation)[: task.max_positions()[1] - 1]
        sample["prev_output_tokens"] = torch.tensor([[int(sample["prev_output_tokens"]), *ids]])
        with torch.no_grad():
            log_probs = model.run.model(**sample)[0].log_softmax(-1)[0]
        wanted = log_probs[torch.arange(len(ids) + 1), torch.tensor([*ids, dictionary.eos()])].tolist()
        assert one.pieces == (*(dictionary[i] for i in ids), "</s>")
        assert one.token_scores == pytest.approx(wanted, abs=2e-5)
        assert one.score == pytest.approx(sum(wanted), abs=1e-4)


def test_a_translation_begins_as_it_is_told(model: TranslationModel) -> None:
    forced = model.translate(LINES, "de", "en", prefixes=["The old man", "", "A blue", ""], return_scores=True)
    assert forced[0].text.startswith("The old man") and forced[2].text.startswith("A blue")
    assert forced[3].text == model.translate(LINES, "de", "en")[3].text
    (given,) = model.score([(LINES[0], forced[0].text)], "de", "en")
    if given.pieces == forced[0].pieces:
        assert given.token_scores == pytest.approx(forced[0].token_scores, abs=2e-5)
    with pytest.raises(DataError, match="1 prefixes for 4 sentences"):
        model.translate(LINES, "de", "en", prefixes=["The"])


def test_samples_depend_on_the_seed_and_the_sentence_alone(model: TranslationModel) -> None:
    keys = {"sampling": True, "beam": 4, "n_best": 4, "temperature": 1.5}
    together = model.translate(LINES, "de", "en", **keys)
    alone = [model.translate([line], "de", "en", **keys)[0] for line in LINES]
    assert [one.text for one in together] == [one.text for one in alone]
    assert len({found.text for found in together[0].hypotheses}) > 1
    assert model.translate(LINES, "de", "en", seed=2, **keys) != together


@pytest.mark.parametrize("strategy", ["switch", "top_k", "smoe", "thor", "soft_moe", "dense"])
def test_experts_of_each_token(strategy: str, tiny_data: DataFolder, tmp_path: Path) -> None:
    keys = {"decoder": {"name": "switch", "num_experts": 4}} if strategy == "soft_moe" else {}
    model = moe_train.load(make_run(tmp_path, tiny_data, strategy, **keys), device="cpu", **KEYS)
    found = model.routing(LINES, "de", "en")
    translated = model.translate(LINES, "de", "en", return_experts=True)
    assert [one.experts for one in translated if one.text] == [one for one in found if len(one.target) > 1]
    assert model.routing(LINES[:1], "de", "en", translations=[translated[0].text])[0].source == found[0].source
    for one, line in zip(found, LINES, strict=True):
        assert one.source[-1] == "</s>" and len(one.source) >= (3 if line else 1)
        for side, tokens in ((one.encoder, one.source), (one.decoder, one.target)):
            assert [len(layer.experts) for layer in side] == [len(tokens)] * (0 if strategy == "dense" else 2)
            for layer in side:
                assert all(0 <= expert < 4 for token in layer.experts for expert in token)
                assert [len(token) for token in layer.experts] == [len(token) for token in layer.weights]
    if strategy == "switch":
        assert all(len(token) == 1 for token in found[0].encoder[0].experts)
        assert all(0.25 <= weight <= 1 for (weight,) in found[0].decoder[1].weights)
    if strategy == "top_k":
        assert all(len(set(token)) == 2 for token in found[0].encoder[0].experts)
    if strategy == "soft_moe":
        assert sum(found[0].encoder[0].weights[0]) == pytest.approx(1, abs=1e-4)


def test_experts_are_those_of_the_routers(model: TranslationModel) -> None:
    """The load of each layer, counted by the search's own statistics of the same forward pass."""
    from moe_train.evaluation.routed_tokens import collect_routing

    with collect_routing(model.run.model) as counted:
        found = model.routing(LINES, "de", "en", translations=["The child.", "", "A blue bird", "yes"])
    layers = counted().routing()
    for number, layer in layers.items():
        chosen = [
            expert
            for one in found
            for own in (*one.encoder, *one.decoder)
            if own.layer == number
            for token in own.experts
            for expert in token
        ]
        assert torch.bincount(torch.tensor(chosen), minlength=4).tolist() == layer.requested.long().tolist()
    assert len(layers) == 4


def test_mistakes(model: TranslationModel, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no language 'ru'"):
        model.translate(LINES, "de", "ru")
    with pytest.raises(ConfigError, match=r"unknown key 'search\.beams'.*beam"):
        model.translate(LINES, "de", "en", beams=3)
    with pytest.raises(ConfigError, match=r"search\.n_best=9 is more than search\.beam=3"):
        model.translate(LINES, "de", "en", n_best=9)
    with pytest.raises(TypeError, match="a list of strings"):
        model.translate("Das Kind", "de", "en")
    with pytest.raises(ConfigError, match="device: there is no device 'gpu'"):
        moe_train.load(model.run.folder.path, device="gpu")
    with pytest.raises(ConfigError, match="no run folder"):
        moe_train.load(tmp_path)


@pytest.fixture
def with_a_run(run_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The working directory that the page and the notebook expect."""
    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs" / "first").symlink_to(run_path)
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("with_a_run")
def test_the_page_runs(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (root / "docs" / "python.md").read_text(encoding="utf-8"), re.DOTALL)
    names: dict[str, Any] = {}
    for block in blocks:
        exec(block, names)
    assert len(blocks) == 5 and "</s>" in capsys.readouterr().out
    assert names["forced"][0].text.startswith("The child") and len(names["samples"][1].hypotheses) == 5


@pytest.mark.usefixtures("with_a_run")
def test_the_notebook_runs(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    notebook = json.loads((root / "docs" / "python.ipynb").read_text(encoding="utf-8"))
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    names: dict[str, Any] = {}
    for cell in cells:
        exec(cell, names)
    assert "layer 3:" in capsys.readouterr().out and sum(names["used"].values()) == 2 * len(names["experts"].source)
    assert not any(cell.get("outputs") for cell in notebook["cells"]), "a run's outputs do not belong into the file"

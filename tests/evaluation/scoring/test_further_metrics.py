"""Metrics besides BLEU and chrF++: TER, spBLEU and COMET, and what a metric of one's own may do."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.tokenizers import tokenizer_spm
from sentencepiece import SentencePieceProcessor

from moe_train.errors import DataError, UserError
from moe_train.evaluation.scoring import further_metrics
from moe_train.evaluation.scoring.further_metrics import (
    Corpus,
    CorpusMetric,
    MetricScore,
    find_metrics,
    measure,
    register_corpus_metric,
    register_metric,
)

SPM = Path(__file__).parents[2] / "old_runs" / "data" / "spm.model"
COMET_PYTHON = os.environ.get("MOE_TRAIN_COMET_PYTHON", "")
GERMAN = Corpus("en-de", ["a", "b"], ["der Hund lief fort", "ja"], ["der Hund lief weg", "ja"])
CHINESE = Corpus("en-zh", ["a"], ["我喜欢猫"], ["我喜欢狗"])


def scores(name: str, corpora: Sequence[Corpus], **settings: Any) -> list[MetricScore]:
    (metric,) = find_metrics([name], {name: settings} if settings else {}).values()
    found, failed = measure(name, metric, corpora)
    assert not failed, failed
    return [found[corpus.direction] for corpus in corpora]


def test_ter_counts_edits_per_word_and_per_character_of_chinese() -> None:
    german, chinese = scores("ter", [GERMAN, CHINESE])
    assert german.score == 20.0 and chinese.score == 25.0
    assert "norm:no" in german.signature and "norm:yes" in chinese.signature and "asian:yes" in chinese.signature


def test_spbleu_is_bleu_over_the_pieces_of_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pieces = SentencePieceProcessor(model_file=str(SPM))
    split = [
        [" ".join(pieces.encode(line, out_type=str)) for line in lines]
        for lines in (GERMAN.hypotheses, GERMAN.references)
    ]
    wanted = round(BLEU(tokenize="none", force=True).corpus_score(split[0], [split[1]]).score, 4)
    (by_path,) = scores("spbleu", [GERMAN], model=str(SPM))
    assert 0 < by_path.score == wanted and "tok:spm-" in by_path.signature
    monkeypatch.setattr(tokenizer_spm, "SACREBLEU_DIR", str(tmp_path))
    with pytest.raises(DataError, match=r"'flores200' is not on this machine.*metric\.spbleu\.model=FILE"):
        find_metrics(["spbleu"])
    (tmp_path / "models").mkdir()
    shutil.copy(SPM, tmp_path / "models" / tokenizer_spm.SPM_MODELS["flores200"]["url"].rpartition("/")[2])
    (by_name,) = scores("spbleu", [GERMAN])
    assert by_name.score == wanted and "tok:flores200" in by_name.signature


@pytest.mark.parametrize(
    ("names", "settings", "said"),
    [
        (["spbleu"], {"spbleu": {"model": "missing"}}, "SentencePiece model of spBLEU cannot be read"),
        (["spbleu"], {"spbleu": {"model": str(Path(__file__))}}, "SentencePiece model of spBLEU cannot be read"),
        (["spbleu"], {"spbleu": {"modle": "x"}}, "unknown key 'metric.spbleu.modle'.*'model'"),
        (["ter"], {"ter": {"case": 1}}, "metric.ter: it has no setting 'case'"),
        (["ter"], {"spbleu": {"model": "x"}}, "metric.spbleu: metrics=.* does not have 'spbleu'"),
        (["ter"], {"ter": 3}, "metric.ter: this must be a group of keys"),
        (["terr"], {}, "there is no metric 'terr'. Did you mean 'ter'"),
        (["comet"], {}, "metric.comet.python: COMET runs in a Python of its own"),
        (["comet"], {"comet": {"python": "no-such-python"}}, "no-such-python: this is no program"),
        (["comet"], {"comet": {"python": sys.executable, "model": "no"}}, "model=no: there is no COMET checkpoint"),
        (["comet"], {"comet": {"python": sys.executable, "minutes": 0}}, "metric.comet.minutes"),
    ],
)
def test_wrong_settings_are_found_before_anything_is_translated(
    names: list[str], settings: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        find_metrics(names, settings)


def test_a_metric_of_ones_own_may_have_settings_and_read_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(further_metrics, "_METRICS", {})

    @register_corpus_metric("copied")
    class Copied(CorpusMetric):
        def __init__(self, settings: Any) -> None:
            self.scale = float(settings.get("scale", 1))

        def score(self, corpora: Sequence[Corpus]) -> Sequence[MetricScore]:
            shares = [sum(map(str.__eq__, c.sources, c.hypotheses)) / len(c.sources) for c in corpora]
            return [MetricScore(self.scale * share, f"scale:{self.scale:g}") for share in shares]

    copy = Corpus("de-en", ["x", "y"], ["x", "z"], ["x", "y"])
    assert scores("copied", [copy, GERMAN], scale=100) == [MetricScore(50, "scale:100"), MetricScore(0, "scale:100")]
    with pytest.raises(ValueError, match="in use"):
        register_metric("copied")(lambda hypotheses, references, language: 0.0)


def test_a_failure_in_one_direction_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(further_metrics, "_METRICS", {})

    @register_metric("fragile")
    def fragile(hypotheses: Sequence[str], references: Sequence[str], language: str) -> float:
        return math.nan if language == "zh" else 1 / (len(hypotheses) - 1)

    (metric,) = find_metrics(["fragile"]).values()
    corpora = [GERMAN, CHINESE, Corpus("en-fr", ["a"], ["b"], ["b"])]
    found, failed = measure("fragile", metric, corpora)
    assert found == {"en-de": MetricScore(1.0)}
    assert [note.partition(": the metric 'fragile' failed (")[::2] for note in failed] == [
        ("en-zh", "its score is nan)"),
        ("en-fr", "ZeroDivisionError: division by zero)"),
    ]


# --- COMET -----------------------------------------------------------------------------------------------------------

ANSWERS = """#!{python}
import json, os, sys, time
job, *segments = map(json.loads, sys.stdin)
assert sys.argv[1] == "-I" and os.environ["HF_HUB_OFFLINE"] == "1" and "PYTHONPATH" not in os.environ
{body}
"""
SCORED = """
print(json.dumps({"version": "2.2.7", "model": os.path.basename(job["model"]), "sha256": "0123456789abcdef"}))
for segment in segments:
    print(json.dumps({"score": len(segment["src"]) + 10 * (segment["mt"] == segment["ref"])}))
"""
FAILURES = {
    "exit code 3: out of memory": "print('out of memory', file=sys.stderr); sys.exit(3)",
    "gave 1 lines for 4": "print('{}')",
    "JSONDecodeError": "print('no JSON\\n' * 4, end='')",
    "took longer than metric.comet.minutes=0.01": "time.sleep(60)",
    "KeyError": "print('{}\\n' * 4, end='')",
}


def stand_in(folder: Path, body: str) -> dict[str, Any]:
    """Settings of a COMET whose Python is a script that answers in its place."""
    program, model = folder / "python", folder / "model.ckpt"
    program.write_text(ANSWERS.format(python=sys.executable, body=body))
    program.chmod(0o755)
    model.write_bytes(b"")
    return {"python": str(program), "model": str(model)}


@pytest.mark.processes
def test_comet_gets_all_directions_at_once_as_json_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/nowhere")
    settings = stand_in(tmp_path, SCORED)
    german, chinese = scores("comet", [GERMAN, CHINESE], **settings)
    assert (german.score, chinese.score) == (6.0, 1.0)
    assert german.signature == "unbabel-comet:2.2.7|model:model.ckpt|sha256:0123456789ab"


@pytest.mark.processes
@pytest.mark.parametrize(("said", "body"), FAILURES.items())
def test_a_comet_that_fails_is_a_note(said: str, body: str, tmp_path: Path) -> None:
    minutes = 0.01 if "took longer" in said else 2.0
    (metric,) = find_metrics(["comet"], {"comet": {**stand_in(tmp_path, body), "minutes": minutes}}).values()
    found, (note,) = measure("comet", metric, [GERMAN, CHINESE])
    assert not found and note.startswith("en-de, en-zh: the metric 'comet' failed (") and said in note


@pytest.mark.processes
def test_a_python_without_comet_is_a_note(tmp_path: Path) -> None:
    settings = {**stand_in(tmp_path, ""), "python": sys.executable}
    (metric,) = find_metrics(["comet"], {"comet": settings}).values()
    _, (note,) = measure("comet", metric, [GERMAN])
    assert "No module named 'comet'" in note


TINY_COMET = """
import json, sys
from pathlib import Path
import torch, yaml
from comet.models import RegressionMetric
from tokenizers import Tokenizer, models
from transformers import XLMRobertaConfig, XLMRobertaTokenizerFast
folder = Path(sys.argv[1])
torch.manual_seed(0)
words = ["<s>", "<pad>", "</s>", "<unk>", *"abcdefghijklmnopqrstuvwxyz", "<mask>"]
pieces = Tokenizer(models.Unigram([(word, -1.0) for word in words], unk_id=3))
XLMRobertaTokenizerFast(tokenizer_object=pieces).save_pretrained(folder / "encoder")
XLMRobertaConfig(
    vocab_size=len(words), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
    max_position_embeddings=64, pad_token_id=1, bos_token_id=0, eos_token_id=2,
).save_pretrained(folder / "encoder")
model = RegressionMetric(
    pretrained_model=str(folder / "encoder"), hidden_sizes=[16, 8], batch_size=2, load_pretrained_weights=False,
    layer_transformation="softmax",
)
(folder / "checkpoints").mkdir()
import pytorch_lightning as pl
torch.save({
    "state_dict": model.state_dict(), "hyper_parameters": dict(model.hparams), "epoch": 0, "global_step": 0,
    "pytorch-lightning_version": pl.__version__,
}, folder / "checkpoints" / "model.ckpt")
(folder / "hparams.yaml").write_text(yaml.dump({"class_identifier": "regression_metric"}))
segments = json.loads(sys.argv[2])
print(json.dumps(model.eval().predict(segments, batch_size=2, gpus=0, num_workers=0, progress_bar=False).scores))
"""


@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.skipif(not COMET_PYTHON, reason="MOE_TRAIN_COMET_PYTHON names no Python with unbabel-comet")
def test_a_tiny_comet_gives_its_own_scores(tmp_path: Path) -> None:
    """The checkpoint has random weights; its scores by unbabel-comet itself are those of the metric."""
    rows = zip(GERMAN.sources, GERMAN.hypotheses, GERMAN.references, strict=True)
    segments = [{"src": source, "mt": hypothesis, "ref": reference} for source, hypothesis, reference in rows]
    command = [COMET_PYTHON, "-I", "-c", TINY_COMET, str(tmp_path), json.dumps(segments)]
    made = subprocess.run(command, capture_output=True, text=True, timeout=250, check=False)
    assert made.returncode == 0, made.stderr
    wanted = json.loads(made.stdout.splitlines()[-1])
    model = str(tmp_path / "checkpoints" / "model.ckpt")
    (found,) = scores("comet", [GERMAN], python=COMET_PYTHON, model=model)
    assert found.score == pytest.approx(sum(wanted) / 2, abs=1e-4) and found.signature.startswith("unbabel-comet:2.")

"""Scores against sacrebleu's own numbers, tokenizers per language, significance."""

from __future__ import annotations

import importlib.util
import random
import shutil
from pathlib import Path

import pytest
import sacrebleu

from moe_train.data.folder import DataFolder
from moe_train.errors import DataError, MissingDependency
from moe_train.evaluation.scoring.bleu_chrf import Scorer, require_tokenizer, tokenization

REFERENCES = ["The cat sat on the mat.", "It is raining, again.", "Where is the station?", "We left at 8:30 a.m."]
HYPOTHESES = ["The cat sat on a mat.", "It rains again.", "Where is the train station?", "We left at 8:30."]


def test_numbers_are_sacrebleus_own() -> None:
    scorer = Scorer("en")
    found = scorer.score(HYPOTHESES, REFERENCES)
    assert found.bleu == pytest.approx(sacrebleu.corpus_bleu(HYPOTHESES, [REFERENCES]).score, abs=1e-4)
    assert found.chrf == pytest.approx(sacrebleu.corpus_chrf(HYPOTHESES, [REFERENCES], word_order=2).score, abs=1e-4)
    assert "tok:13a" in scorer.bleu_signature and f"version:{sacrebleu.__version__}" in scorer.bleu_signature
    assert "nw:2" in scorer.chrf_signature


def test_chinese_is_not_scored_as_one_word_per_sentence() -> None:
    references, hypotheses = (
        ["我们今天去北京的学校。", "他昨天没有来上班。"],
        ["我们今天去上海的学校。", "他今天没有来上班。"],
    )
    scorer = Scorer("zh_CN")
    expected = sacrebleu.corpus_bleu(hypotheses, [references], tokenize="zh").score
    assert scorer.score(hypotheses, references).bleu == pytest.approx(expected, abs=1e-4)
    assert expected > 30 > sacrebleu.corpus_bleu(hypotheses, [references], tokenize="13a").score
    assert "tok:zh" in scorer.bleu_signature


@pytest.mark.parametrize(
    ("language", "name"),
    [
        *[(code, "13a") for code in ("de", "pt_BR", "uk", "sr@latin", "vi", "hi", "am", "xx", "zh_Latn", "ja_Latn")],
        *[
            (code, "zh")
            for code in ("zh_TW", "zho_Hans", "zh@hans", "zh_Hant_HK", "chi", "cmn_Hans", "yue", "yue_Hant")
        ],
        *[(code, "zh") for code in ("lzh", "wuu", "nan_Hant", "hak", "gan", "hsn", "cdo", "vi_Hani", "xx_Hans")],
        *[(code, "char") for code in ("th", "lao_Laoo", "km", "my", "mya_Mymr", "shn_Mymr", "shn", "bo", "bod_Tibt")],
        *[(code, "char") for code in ("dz", "dzo_Tibt", "tha_Thai", "bur", "khm_Khmr", "nod", "tts", "ryu", "jv_Java")],
        *[(code, "char") for code in ("pi_Mymr", "xx_Thai")],
    ],
)
def test_tokenizer_per_language(language: str, name: str) -> None:
    chosen = tokenization(language)
    assert chosen.name == name
    assert bool(chosen.note) == (name == "char")


@pytest.mark.parametrize("language", ["ja", "ko", "jpn_Jpan", "kor_Hang"])
@pytest.mark.parametrize("installed", [True, False])
def test_mecab_where_installed_else_characters_with_a_note(
    language: str, installed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda module: object() if installed else None)
    chosen = tokenization(language)
    if installed:
        assert chosen.name == f"{'ja' if language.startswith('j') else 'ko'}-mecab"
        assert not chosen.note
    else:
        assert chosen.name == "char"
        assert "pip install" in chosen.note and language in chosen.note


def test_a_model_that_sacrebleu_would_fetch_must_be_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sacrebleu.tokenizers.tokenizer_spm.SACREBLEU_DIR", str(tmp_path))
    model = tmp_path / "models" / "flores200sacrebleuspm"
    with pytest.raises(DataError) as raised:
        Scorer("de", "flores200")
    assert raised.value.where == str(model) and "is not on this machine" in raised.value.what
    assert f"curl --create-dirs -L -o '{model}' https://tinyurl.com/flores200sacrebleuspm" in raised.value.remedy
    assert not model.parent.exists()
    model.parent.mkdir()
    model.write_bytes(b"")  # a download that broke off
    with pytest.raises(DataError, match=r"flores200sacrebleuspm: the SentencePiece model .* cannot be read.*Delete it"):
        require_tokenizer("flores200")


def test_spbleu_for_every_language(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_data: DataFolder) -> None:
    monkeypatch.setattr("sacrebleu.tokenizers.tokenizer_spm.SACREBLEU_DIR", str(tmp_path))
    (tmp_path / "models").mkdir()
    shutil.copy(tiny_data.path / "spm.model", tmp_path / "models" / "flores200sacrebleuspm")
    pieces = tiny_data.tokenizer()
    references, hypotheses = (
        ["Der Lehrer kauft heute einen roten Apfel."],
        ["Der Lehrer kauft heute einen blauen Apfel."],
    )
    cut = [[" ".join(pieces.to_pieces(line)) for line in lines] for lines in (hypotheses, references)]
    expected = sacrebleu.corpus_bleu(cut[0], [cut[1]], tokenize="none", force=True).score
    for language in ("de", "ja", "th"):
        scorer = Scorer(language, "flores200")
        assert scorer.score(hypotheses, references).bleu == pytest.approx(expected, abs=1e-4)
        assert "tok:flores200" in scorer.bleu_signature and not scorer.tokenization.note


def test_a_tokenizer_that_is_not_known_or_not_installed() -> None:
    with pytest.raises(DataError, match=r"no tokenizer '13b'. Did you mean '13a'"):
        Scorer("de", "13b")
    if importlib.util.find_spec("MeCab") is None:
        with pytest.raises(MissingDependency, match=r"ja-mecab is not installed. Pip install 'sacrebleu\[ja\]'"):
            Scorer("de", "ja-mecab")


def test_japanese_without_mecab_scores_characters() -> None:
    scorer = Scorer("ja")
    found = scorer.score(["今日は天気がいいです"], ["今日は天気が悪いです"])
    assert found.bleu > 20
    assert f"tok:{scorer.tokenization.name}" in scorer.bleu_signature


def test_unequal_and_empty_files_are_refused() -> None:
    with pytest.raises(DataError, match="1 hypotheses for 2 references"):
        Scorer("de").score(["a"], ["a", "b"])
    with pytest.raises(DataError, match="no references"):
        Scorer("de").score([], [])
    with pytest.raises(DataError, match="1 hypotheses for 2 references"):
        Scorer("de").compare(["a", "b"], {"other": ["a"]}, ["a", "b"])


def _noisy(references: list[str], keep: float, seed: int) -> list[str]:
    draw = random.Random(seed)
    words = [f"word{i}" for i in range(60)]
    return [" ".join(w if draw.random() < keep else draw.choice(words) for w in r.split()) for r in references]


def test_paired_bootstrap_tells_better_from_equal() -> None:
    references = _noisy(["x " * 12] * 200, 0.0, 7)
    baseline = _noisy(references, 0.6, 5)
    systems = {"better": _noisy(references, 0.8, 2), "equal": _noisy(references, 0.6, 4), "same": baseline}
    found = Scorer("de").compare(baseline, systems, references, samples=300)
    assert found["better"].difference.bleu > 5
    assert found["better"].bleu_p < 0.01 and found["better"].chrf_p < 0.01
    assert found["equal"].bleu_p > 0.05
    assert found["same"].difference.bleu == 0 and found["same"].bleu_p > 0.9
    again = Scorer("de").compare(baseline, systems, references, samples=300)
    assert again == found, "the bootstrap is seeded"
    alone = Scorer("de").score(systems["better"], references)
    assert found["better"].scores == alone
    assert Scorer("de").compare(baseline, {}, references) == {}

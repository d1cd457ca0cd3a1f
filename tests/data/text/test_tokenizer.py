"""SentencePiece: byte fallback, one normalisation for every road to the model, round trips."""

from __future__ import annotations

import pickle
import re
import unicodedata
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from moe_train.config.corpus import VocabularyConfig
from moe_train.data.folder import DataFolder
from moe_train.data.text.normalisation import normalise
from moe_train.data.text.tokenizer import EOS, OFFSET, PAD, UNK, Tokenizer
from moe_train.data.text.vocabulary import read_piece_ids, train_sentencepiece
from moe_train.errors import ConfigError, DataError
from tests.data import tiny_corpus


@given(st.text(st.characters(exclude_categories=["Cs", "Cn", "Co"]), max_size=60))
def test_any_text_comes_back_normalised(tiny_data: DataFolder, text: str) -> None:
    tokenizer = tiny_data.tokenizer()
    ids = tokenizer.encode(text)
    assert UNK not in ids
    decoded = tokenizer.decode([*ids, EOS, PAD])
    # The model composes pairs of code points; sequences of several marks may stay apart, which means the same text.
    assert unicodedata.normalize("NFC", decoded) == normalise(text.replace("▁", " "))


@pytest.mark.parametrize("text", ["e\u0301te\u0301\u00a0ici", "a\u2028b\u200bc", "\u212b and \u00c5", "全角，。！１"])
def test_the_model_itself_normalises_as_we_do(tiny_data: DataFolder, text: str) -> None:
    bare = sentencepiece.SentencePieceProcessor(model_file=str(tiny_data.path / "spm.model"))
    assert bare.encode(text) == bare.encode(normalise(text))
    assert bare.decode(bare.encode(text)) == normalise(text)


def test_ids_are_pieces_plus_three(tiny_data: DataFolder) -> None:
    tokenizer = tiny_data.tokenizer()
    lines = ["The doctor buys a red apple.", "", "先生は"]
    assert [[i + OFFSET for i in ids] for ids in tokenizer.encode_batch(lines, threads=2)] == [
        tokenizer.encode(line) for line in lines
    ]
    assert tokenizer.pieces[0] == "<0x00>" and len(tokenizer.pieces) == len(tokenizer) - 1


def test_ids_by_the_names_of_a_dictionary_in_another_order(tiny_data: DataFolder, tmp_path: Path) -> None:
    plain = tiny_data.tokenizer()
    missing, text = plain.pieces[-1], "The doctor buys a red apple."
    lines = [f"{piece} 1" for piece in [*reversed(plain.pieces[:-1]), "__de__", "further"]]
    (tmp_path / "dict.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    tokenizer = Tokenizer(plain.path, read_piece_ids(tmp_path / "dict.txt", plain))
    last = len(plain) + 1  # the id of the first piece
    assert tokenizer.encode(text) == [last - (i - 4) for i in plain.encode(text)] and tokenizer.encode("") == []
    assert tokenizer.decode([*tokenizer.encode(text), last + 1, last + 2, EOS]) == text
    assert UNK in tokenizer.to_ids([plain.pieces.index(missing) + 1]) and tokenizer.decode([UNK]) == plain.decode([UNK])
    assert pickle.loads(pickle.dumps(tokenizer)).encode(text) == tokenizer.encode(text)


def test_tags_mask_and_special_symbols_vanish_in_decoding(tiny_data: DataFolder) -> None:
    tokenizer, dictionary = tiny_data.tokenizer(), tiny_data.dictionary()
    ids = [dictionary.index("__de__"), *tokenizer.encode("a red apple"), dictionary.index("<mask>"), EOS, PAD, PAD]
    assert tokenizer.decode(ids) == "a red apple"


def test_travels_between_processes(tiny_data: DataFolder) -> None:
    tokenizer = tiny_data.tokenizer()
    assert pickle.loads(pickle.dumps(tokenizer)).encode("a red apple") == tokenizer.encode("a red apple")


def test_digits_are_single(tiny_data: DataFolder) -> None:
    assert tiny_data.tokenizer().to_pieces("2024")[-4:] == ["<0x32>", "<0x30>", "<0x32>", "<0x34>"]


@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
def test_both_kinds_of_model_and_their_limits(tmp_path: Path, model_type: str) -> None:
    lines = [tiny_corpus.sentence("en", *part) for part in tiny_corpus.sentences(200)]
    config = VocabularyConfig(size=320, model_type=model_type, character_coverage=1.0)  # type: ignore[arg-type]
    train_sentencepiece(lines, config, tmp_path / "spm.model")
    tokenizer = Tokenizer(tmp_path / "spm.model")
    assert len(tokenizer) == 320
    assert tokenizer.decode(tokenizer.encode(lines[0])) == lines[0]
    too_large = VocabularyConfig(size=60_000, model_type=model_type)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"vocabulary\.size: .*60000 pieces"):
        train_sentencepiece(lines, too_large, tmp_path / "large.model")
    assert not (tmp_path / "large.model").exists()


LITTLE = {
    "sentences": ["the dog sees a cat", "a cat sees the house", "the house is old"],
    "letters": ["abcdefghijklmnopqrstuvwxyz"],
    "no spaces": ["今日は良い天気です", "明日は雨が降ります"],
    "a word": ["hello"],
}


@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
@pytest.mark.parametrize("lines", LITTLE.values(), ids=LITTLE)
def test_advice_on_little_text_works(tmp_path: Path, lines: list[str], model_type: str) -> None:
    """From a size far too large and one far too small; the two never contradict each other."""

    def advised(size: int, kind: str = model_type) -> int:
        config = VocabularyConfig(size=size, model_type=kind, character_coverage=1.0)  # type: ignore[arg-type]
        with pytest.raises(DataError) as raised:
            train_sentencepiece(lines, config, tmp_path / "none.model")
        assert ("model_type=bpe" in raised.value.remedy) == (kind == "unigram" and size == 8000)
        return int(re.findall(r"set vocabulary\.size=(\d+)", raised.value.remedy)[0])

    most, least = advised(8000), advised(1)
    assert 257 < least <= most < 400
    for size in {least, (least + most) // 2, most}:
        config = VocabularyConfig(size=size, model_type=model_type, character_coverage=1.0)  # type: ignore[arg-type]
        train_sentencepiece(lines, config, tmp_path / "spm.model")
        assert len(Tokenizer(tmp_path / "spm.model")) == size
    assert model_type == "bpe" or advised(8000, "bpe") > most


@pytest.mark.parametrize("lines", [[], ["", " "]])
def test_no_text_at_all_is_said(tmp_path: Path, lines: list[str]) -> None:
    with pytest.raises(DataError, match="there is no text to learn a vocabulary from"):
        train_sentencepiece(lines, VocabularyConfig(), tmp_path / "spm.model")


def test_a_size_beyond_all_bounds_is_refused() -> None:
    with pytest.raises(ConfigError, match="must be 10000000 or less"):
        VocabularyConfig(size=2**31 - 1)


def test_what_is_no_model_is_said(tmp_path: Path) -> None:
    (tmp_path / "spm.model").write_bytes(b"not a model")
    for name in ("spm.model", "missing.model"):
        with pytest.raises(DataError, match=rf"{name}: cannot read the SentencePiece model"):
            Tokenizer(tmp_path / name)

"""Trains the joint SentencePiece model, and writes and reads the fairseq dictionary of it."""

from __future__ import annotations

import io
import re
import tempfile
from collections.abc import Iterable, Sequence
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

import sentencepiece

from moe_train.config.corpus import VocabularyConfig
from moe_train.data.text.lines import reading
from moe_train.data.text.normalisation import rules
from moe_train.data.text.pairs import MASK, tag
from moe_train.data.text.tokenizer import UNK, Tokenizer
from moe_train.errors import DataError
from moe_train.fairseq_compat import apply

if TYPE_CHECKING:
    from fairseq.data import Dictionary

# Floating-point sums depend on the number of threads: it is fixed, so that all machines train the same model.
_THREADS = 4
_LONGEST = 8192  # bytes; SentencePiece would drop longer sentences with a warning: they are cut at a character


def train_sentencepiece(sentences: Iterable[str], config: VocabularyConfig, path: Path) -> None:
    """Trains the model on sentences and writes it.

    Raises:
        DataError: the vocabulary is larger than the text allows, or too small for its characters.
    """
    model = io.BytesIO()
    with tempfile.TemporaryDirectory() as folder:
        rule_file = Path(folder) / "rules.tsv"
        rule_file.write_text(rules(), encoding="ascii")
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=(sentence[: _LONGEST // 4] for sentence in sentences),
                model_writer=model,
                vocab_size=config.size,
                model_type=config.model_type,
                character_coverage=config.character_coverage,
                byte_fallback=True,
                split_digits=config.split_digits,
                normalization_rule_tsv=str(rule_file),
                max_sentence_length=_LONGEST,
                unk_id=0,
                bos_id=-1,
                eos_id=-1,
                pad_id=-1,
                num_threads=_THREADS,
                train_extremely_large_corpus=config.sample_sentences > 10_000_000,
                minloglevel=2,
            )
        except RuntimeError as error:
            raise _explain(error, config) from error
    path.write_bytes(_without_paths(model.getvalue()))


def _without_paths(model: bytes) -> bytes:
    """The model without the name of the temporary rule file; the rules themselves are compiled into it."""
    from sentencepiece import sentencepiece_model_pb2

    content = sentencepiece_model_pb2.ModelProto.FromString(model)
    content.normalizer_spec.ClearField("normalization_rule_tsv")
    return content.SerializeToString(deterministic=True)  # type: ignore[no-any-return]


def _explain(error: RuntimeError, config: VocabularyConfig) -> DataError:
    """The user error for an error of SentencePiece, with a size that works."""
    text = str(error)
    if found := re.search(r"value <= (\d+)", text):
        more = " (vocabulary.model_type=bpe finds more pieces in little text)" if config.model_type == "unigram" else ""
        return DataError(
            f"a vocabulary of {config.size} pieces is larger than the text allows: at most {found[1]}",
            "vocabulary.size",
            f"set vocabulary.size={found[1]}{more}, or use more text",
        )
    if found := re.search(r"required_chars\D*\d+ vs (\d+)", text):
        return DataError(
            f"a vocabulary of {config.size} pieces is too small: bytes and characters of the text need {found[1]}",
            "vocabulary.size",
            f"set vocabulary.size={found[1]} or more, or lower vocabulary.character_coverage",
        )
    if "sentences_.empty()" in text or "all_chars_count" in text:
        return DataError(
            "there is no text to learn a vocabulary from", remedy="use training text that contains characters"
        )
    return DataError(
        f"SentencePiece could not train {config.size} pieces ({text.strip()})",
        "vocabulary.size",
        "set a smaller vocabulary.size, or use more text",
    )


def dictionary_size(tokenizer: Tokenizer, languages: Sequence[str]) -> int:
    """Entries of the dictionary: fairseq's three further special symbols, the pieces, a tag per language, the mask."""
    return 3 + len(tokenizer) + len(languages) + 1


def write_dictionary(path: Path, tokenizer: Tokenizer, languages: Sequence[str], counts: Sequence[int]) -> None:
    """Writes ``dict.txt``: pieces in SentencePiece's order with their counts, then a tag per language, then the mask.

    Args:
        counts: how often each piece occurs in the training text; entry i is piece i, <unk> included.

    Raises:
        DataError: a piece looks like a tag or a special symbol.
    """
    entries = [
        *zip(tokenizer.pieces, counts[1:], strict=True),
        *((tag(language), 0) for language in languages),
        (MASK, 0),
    ]
    symbols = [symbol for symbol, _ in entries] + ["<s>", "<pad>", "</s>", "<unk>"]
    if len(set(symbols)) != len(symbols):
        raise DataError(
            "the vocabulary contains a symbol twice", str(path), "remove language tags and <mask> from the text"
        )
    with path.open("w", encoding="utf-8", newline="\n") as stream:
        stream.writelines(f"{symbol} {count}\n" for symbol, count in entries)


def read_piece_ids(path: Path, tokenizer: Tokenizer) -> list[int]:
    """Dictionary id of each piece, by the names in a ``dict.txt`` of any order; a piece that it lacks is unknown.

    Raises:
        DataError: the file cannot be read.
    """
    with reading(path):
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    symbols = [line.rpartition(" ")[0] for line in lines if line]
    ids = dict(zip(("<s>", "<pad>", "</s>", "<unk>", *symbols), count(), strict=False))
    return [ids.get(piece, UNK) for piece in ("<unk>", *tokenizer.pieces)]


def load_dictionary(path: Path) -> Dictionary:
    """Reads a ``dict.txt`` with fairseq.

    Raises:
        DataError: it cannot be read, or is not a dictionary.
        MissingDependency: fairseq is not installed.
    """
    apply()
    from fairseq.data import Dictionary

    dictionary = Dictionary()
    try:
        with reading(path), path.open(encoding="utf-8") as stream:
            dictionary.add_from_file(stream)
    except (ValueError, RuntimeError) as error:  # not UTF-8, a line without a count, a symbol twice
        raise DataError(f"this is not a dictionary ({error})", str(path), "run moe-prepare again") from error
    return dictionary

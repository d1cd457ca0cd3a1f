"""Reads the tokenizer of a Hugging Face folder: the SentencePiece model, names of all ids, language tags."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from moe_train.data.text.pairs import LANGUAGE, tag
from moe_train.data.text.tokenizer import Tokenizer
from moe_train.errors import DataError
from moe_train.utils.json_files import read_object

SENTENCEPIECE, CONFIG = "sentencepiece.bpe.model", "tokenizer_config.json"
FILES = (SENTENCEPIECE, CONFIG, "vocab.json", "tokenizer.json", "special_tokens_map.json", "added_tokens.json")
SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")
# Tags of M2M-100 in order; its tokenizer has them in its code, and its folders name none.
_M2M100 = (
    "af am ar ast az ba be bg bn br bs ca ceb cs cy da de el en es et fa ff fi fr fy ga gd gl gu ha he hi hr "
    "ht hu hy id ig ilo is it ja jv ka kk km kn ko lb lg ln lo lt lv mg mk ml mn mr ms my ne nl no ns oc or pa "
    "pl ps pt ro ru sd si sk sl so sq sr ss su sv sw ta th tl tn tr uk ur uz vi wo xh yi yo zh zu"
)
_M2M100_CODES = {"m2m100": _M2M100.split(), "wmt21": ["en", "ha", "is", "ja", "cs", "ru", "zh", "de"]}


@dataclass(frozen=True)
class HfVocabulary:
    """A vocabulary with its tokenizer.

    Attributes:
        sentencepiece: the model file.
        symbols: the name of every id from 4 on; tags as ``__en__``.
        languages: sorted.
        source_tag_place: as in :class:`moe_train.config.TaskConfig`.
    """

    sentencepiece: Path
    symbols: tuple[str, ...]
    languages: tuple[str, ...]
    source_tag_place: Literal["start", "end"] = "start"


Names = dict[int, str]
Reader = Callable[[Path, Mapping[str, Any], Tokenizer], tuple[Names, dict[int, str]]]


def read_vocabulary(folder: Path, entries: int) -> HfVocabulary:
    """Reads the tokenizer's files.

    Args:
        entries: ``vocab_size`` of the model; ids without a name are padding of the vocabulary.

    Raises:
        DataError: a file is missing or damaged, or the tokenizer is of another kind.
    """
    config = _object(folder, CONFIG)
    kind = str(config.get("tokenizer_class", "")).removesuffix("Fast")
    if kind not in _READERS:
        known = " or ".join(sorted(_READERS))
        raise DataError(f"the tokenizer '{kind[:60]}' is not supported, only {known}", str(folder / CONFIG))
    spm = folder / SENTENCEPIECE
    if not spm.is_file():
        raise DataError("the SentencePiece model is missing", str(spm), "download or copy it from the original model")
    tokenizer = Tokenizer(spm)
    names, codes = _READERS[kind](folder, config, tokenizer)
    for number, symbol in enumerate(SPECIAL):
        if names.get(number) != symbol:
            what = f"special symbols in another order: {number} is {names.get(number)!r:.40}, and must be {symbol}"
            raise DataError(what, str(folder))
    names |= {number: tag(code) for number, code in codes.items()}
    if wrong := next((code for code in codes.values() if not LANGUAGE.fullmatch(code)), None):
        raise DataError(f"the tag {wrong!r:.60} is not a language code", str(folder))
    if max(names) >= entries:
        what = f"the tokenizer has {max(names) + 1} entries, and the model {entries} (vocab_size)"
        raise DataError(what, str(folder), "restore the folder: its files are of different models")
    symbols = tuple(names.get(number, f"madeupword{number:06}") for number in range(len(SPECIAL), entries))
    if wrong := next((symbol for symbol in symbols if not symbol or not {*" \r\n"}.isdisjoint(symbol)), None):
        raise DataError(f"the vocabulary has the symbol {wrong!r:.60}, which a dictionary cannot hold", str(folder))
    if len(set(symbols)) != len(symbols) or not set(SPECIAL).isdisjoint(symbols):
        raise DataError("the vocabulary contains a symbol twice", str(folder))
    place: Literal["start", "end"] = "end" if config.get("legacy_behaviour") is True else "start"
    return HfVocabulary(spm, symbols, tuple(sorted(set(codes.values()))), place)


def _m2m100(folder: Path, config: Mapping[str, Any], tokenizer: Tokenizer) -> tuple[Names, dict[int, str]]:
    """Pieces have the ids of vocab.json; the tags follow in their fixed order."""
    ids = _object(folder, "vocab.json")
    if not all(type(number) is int and number >= 0 for number in ids.values()):
        raise DataError("the file is damaged: not every value is an id", str(folder / "vocab.json"))
    names = {number: symbol for symbol, number in ids.items()}
    if len(names) != len(ids):
        raise DataError("the file is damaged: two symbols have one id", str(folder / "vocab.json"))
    kind = config.get("language_codes", "m2m100")
    if kind not in _M2M100_CODES:
        raise DataError(f"language_codes={kind!r:.40} is not supported", str(folder / CONFIG))
    return names, dict(enumerate(_M2M100_CODES[kind], len(ids)))


def _nllb(folder: Path, config: Mapping[str, Any], tokenizer: Tokenizer) -> tuple[Names, dict[int, str]]:
    """Pieces have SentencePiece's ids plus one; tags and mask have the ids that the folder names."""
    if tokenizer.pieces[:2] != ["<s>", "</s>"]:
        what = "the SentencePiece model does not begin with <unk>, <s> and </s>, as NLLB's does"
        raise DataError(what, str(tokenizer.path))
    names = dict(enumerate(SPECIAL)) | dict(enumerate(tokenizer.pieces[2:], len(SPECIAL)))
    added = {symbol: number for number, symbol in _added(folder, config).items() if symbol not in SPECIAL}
    codes = {number: symbol for symbol, number in added.items() if symbol != "<mask>"}
    if not codes:
        raise DataError("the tokenizer's files name no language tags with ids", str(folder), f"add them to {CONFIG}")
    return names | {number: symbol for symbol, number in added.items() if symbol == "<mask>"}, codes


def _added(folder: Path, config: Mapping[str, Any]) -> Names:
    """Added tokens: from tokenizer_config.json, added_tokens.json and tokenizer.json, whichever have them."""
    found: dict[Any, Any] = {}
    decoder = config.get("added_tokens_decoder", {})
    found |= {key: value.get("content") for key, value in decoder.items() if isinstance(value, Mapping)}
    if (folder / "added_tokens.json").is_file():
        found |= {str(number): symbol for symbol, number in _object(folder, "added_tokens.json").items()}
    if (folder / "tokenizer.json").is_file():
        listed: Sequence[Any] = _object(folder, "tokenizer.json").get("added_tokens", [])
        found |= {str(one.get("id")): one.get("content") for one in listed if isinstance(one, Mapping)}
    if not all(str(number).isdecimal() and isinstance(symbol, str) for number, symbol in found.items()):
        raise DataError("the file is damaged: an added token has no id or no name", str(folder / CONFIG))
    return {int(number): symbol for number, symbol in found.items()}


def _object(folder: Path, name: str) -> dict[str, Any]:
    content = read_object(folder / name)
    if content is None:
        raise DataError("the file is missing", str(folder / name), "restore the folder")
    return content


_READERS: Mapping[str, Reader] = {"M2M100Tokenizer": _m2m100, "NllbTokenizer": _nllb}

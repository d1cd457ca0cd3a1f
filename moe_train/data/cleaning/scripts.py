"""Scripts of letters and languages. One code letter per script makes counting fast (``str.translate``)."""

from __future__ import annotations

import unicodedata
from functools import cache

from moe_train.data.text.languages import Language

# First word of a character's Unicode name -> script code (ISO 15924).
_BY_NAME = {
    "LATIN": "Latn",
    "FULLWIDTH": "Latn",
    "CYRILLIC": "Cyrl",
    "GREEK": "Grek",
    "ARABIC": "Arab",
    "HEBREW": "Hebr",
    "DEVANAGARI": "Deva",
    "BENGALI": "Beng",
    "GURMUKHI": "Guru",
    "GUJARATI": "Gujr",
    "ORIYA": "Orya",
    "TAMIL": "Taml",
    "TELUGU": "Telu",
    "KANNADA": "Knda",
    "MALAYALAM": "Mlym",
    "SINHALA": "Sinh",
    "THAI": "Thai",
    "LAO": "Laoo",
    "TIBETAN": "Tibt",
    "MYANMAR": "Mymr",
    "KHMER": "Khmr",
    "GEORGIAN": "Geor",
    "ARMENIAN": "Armn",
    "ETHIOPIC": "Ethi",
    "HANGUL": "Hang",
    "CJK": "Hani",
    "IDEOGRAPHIC": "Hani",
    "HIRAGANA": "Kana",
    "KATAKANA": "Kana",
    "KATAKANA-HIRAGANA": "Kana",
    "HALFWIDTH": "Kana",
}
_OTHER = "?"
_CODES = {script: chr(ord("A") + i) for i, script in enumerate(dict.fromkeys(_BY_NAME.values()))}
_DENSE = {_CODES[s]: weight for s, weight in {"Hani": 2.0, "Kana": 1.5, "Hang": 1.0}.items()}
_UNSPACED = frozenset(_CODES[s] for s in ("Hani", "Kana", "Thai", "Laoo", "Khmr", "Mymr", "Tibt"))

_LANGUAGES = {
    "Latn": "af ast az br bs ca ceb cs cy da de en eo es et eu fi fil fo fr fy ga gd gl ha hr hsb ht hu ia id ig is it "
    "jv kab lb ln lt lv mg ms mt nb nl nn no oc pl pt rm ro rw sc sk sl so sq sv sw tk tl tr uz vi wo xh yo zu",
    "Cyrl": "ab ba be bg cv kk ky mk mn os ru sah tg tt udm uk",
    "Grek": "el grc",
    "Arab": "ar arz ckb fa ps sd ug ur",
    "Hebr": "he iw yi",
    "Deva": "bho hi mai mr ne sa",
    "Beng": "as bn",
    "Guru": "pa",
    "Gujr": "gu",
    "Orya": "or",
    "Taml": "ta",
    "Telu": "te",
    "Knda": "kn",
    "Mlym": "ml",
    "Sinh": "si",
    "Thai": "th",
    "Laoo": "lo",
    "Tibt": "bo dz",
    "Mymr": "my",
    "Khmr": "km",
    "Geor": "ka",
    "Armn": "hy",
    "Ethi": "am ti",
    "Hang Hani": "ko",
    "Hani": "lzh wuu yue zh",
    "Hani Kana": "ja",
}
_SUFFIXES = {"Hans": "Hani", "Hant": "Hani", "Jpan": "Hani Kana", "Kore": "Hang Hani", "Latin": "Latn"}
_SUFFIXES |= {"Cyrillic": "Cyrl", "Arabic": "Arab", "Devanagari": "Deva"}


class _ScriptTable(dict[int, str]):
    """Character -> script code for letters and their marks, nothing for everything else; filled on demand."""

    def __missing__(self, point: int) -> str:
        character = chr(point)
        code = ""
        if unicodedata.category(character)[0] in "LM":
            first = unicodedata.name(character, "?").split()[0]
            code = _CODES.get(_BY_NAME.get(first, ""), _OTHER)
        self[point] = code
        return code


_script_table = cache(_ScriptTable)


def script_codes(text: str) -> str:
    """One code per letter of the text, in order; other characters are left out."""
    return text.translate(_script_table())


def codes_of_language(language: str) -> str:
    """The script codes of a language; empty where they are not known (then nothing is checked)."""
    base, *parts = language.replace("@", "_").split("_")
    for part in parts:
        scripts = _SUFFIXES.get(part.title(), part.title())
        if all(s in _CODES for s in scripts.split()):
            return "".join(_CODES[s] for s in scripts.split())
    return "".join(_CODES[s] for s in _scripts_by_language().get(Language.of(base).letters, "").split())


@cache
def _scripts_by_language() -> dict[str, str]:
    return {Language.of(code).letters: scripts for scripts, codes in _LANGUAGES.items() for code in codes.split()}


def weighted_length(text: str, codes: str) -> float:
    """Number of characters, with larger weights for denser scripts, so that translations have similar lengths."""
    return len(text) + sum(codes.count(code) * _DENSE[code] for code in _DENSE.keys() & set(codes))


def weighted_letters(codes: str, of: str) -> float:
    """Letters among the codes ``of``, weighted as in :func:`weighted_length`."""
    return sum(codes.count(code) * (1.0 + _DENSE.get(code, 0.0)) for code in of)


def count_words(text: str, codes: str) -> float:
    """Words at spaces; where a script has no spaces, two letters count as one word."""
    unspaced = sum(codes.count(code) for code in _UNSPACED.intersection(codes))
    return len(text.split()) + unspaced / 2 if unspaced > len(codes) / 2 else len(text.split())

"""Each rule of the cleaning, on sentences that it should and should not touch."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from moe_train.config.corpus import CleaningConfig
from moe_train.data.cleaning import Cleaner, clean_block
from moe_train.data.cleaning.normalizers import strip_accelerators, strip_markup
from moe_train.data.cleaning.placeholders import placeholders
from moe_train.data.cleaning.scripts import codes_of_language, script_codes
from moe_train.data.text.normalisation import normalise
from moe_train.data.text.pairs import Pair


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("&File", "File"),
        ("Save &As…", "Save As…"),
        ("E&xit", "Exit"),
        ("_Open", "Open"),
        ("Save _As", "Save As"),
        ("文件(&F)", "文件"),
        ("ファイル (_F)…", "ファイル…"),
        ("AT&T", "AT&T"),
        ("R&D", "R&D"),
        ("Drag&Drop", "Drag&Drop"),
        ("salt & pepper", "salt & pepper"),
        ("see http://x.org/?a=1&b=2", "see http://x.org/?a=1&b=2"),
        ("the key max_updates is set here", "the key max_updates is set here"),
        ("a snake_case_name", "a snake_case_name"),
        ("All %(total_count)s selected", "All %(total_count)s selected"),
        ("Delete {file_name}", "Delete {file_name}"),
        ("", ""),
    ],
)
def test_accelerators(text: str, expected: str) -> None:
    assert strip_accelerators(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a <b>bold</b> word", "a bold word"),
        ('<a href="http://x.org/?a=1">here</a>', "here"),
        ("line<br/>break", "line break"),
        ("Tom &amp; Jerry&#39;s &lt;tag&gt;", "Tom & Jerry's <tag>"),
        ("<emphasis>closed</emphasis>", "closed"),
        ("usage: copy <file> <folder>", "usage: copy <file> <folder>"),
        ('use the <meta name="x"> tag', 'use the <meta name="x"> tag'),
        ("2 < 3 and 4 > 1", "2 < 3 and 4 > 1"),
        ("AT&T", "AT&T"),
    ],
)
def test_markup(text: str, expected: str) -> None:
    assert strip_markup(text) == expected


@pytest.mark.parametrize(
    ("left", "right", "same"),
    [
        ("%s of %d", "%d von %s", True),
        ("%1$s of %2$s", "%s 中 %s", True),
        ("选择%s查看", "Select %s", True),
        ("%(name)s is here", "hier ist %(name)s", True),
        ("%(name)s is here", "hier ist %(nom)s", False),
        ("{count} files", "{count} Dateien", True),
        ("{count} files", "{n} Dateien", False),
        ("a minute ago", "%(count)s минуту назад", False),
        ("100% done", "100 % fertig", True),
        ("100% of it", "100% davon", True),
        ("no files", "%s keine", False),
        ("${home} dir", "Ordner ${home}", True),
        ("%1 of %2", "%2 中の %1", True),
    ],
)
def test_placeholders_are_compared_whatever_their_order(left: str, right: str, same: bool) -> None:
    assert (placeholders(left) == placeholders(right)) is same


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  a\u00a0 b\u2028c ", "a b c"),
        ("e\u0301te\u0301", "été"),
        ("zero\u200bwidth\ufeff", "zerowidth"),
        ("می\u200cخواهم", "می\u200cخواهم"),
        ("\x00bell\x07", "bell"),
        ("全角，。！", "全角，。！"),
        ("right\u200fto\u202aleft", "righttoleft"),
    ],
)
def test_normalisation(text: str, expected: str) -> None:
    assert normalise(text) == expected


PAIRS = [
    ("kept", "The door is open today.", "Die Tür ist heute offen."),
    ("empty", "   ", "Die Tür."),
    ("unicode", "A broken \ufffd sign here", "Ein kaputtes Zeichen hier"),
    ("length", "word " * 300, "Wort " * 300),
    ("ratio", "One word.", "Das ist ein sehr langer Satz, der viel mehr sagt als das eine Wort da drüben."),
    ("letters", "1.2.3-4/5.6 (7) x", "1.2.3-4/5.6 (7) y"),
    ("letters", "%(a)s / %(b)s", "%(a)s / %(b)s"),
    ("untranslated", "Excel Open XML", "Excel open XML"),
    ("placeholders", "Send %s mails now", "Sende jetzt Mails"),
    ("script", "The door is open.", "Дверь открыта."),
]


@pytest.mark.parametrize(("rule", "source", "target"), PAIRS)
def test_each_filter_drops_its_pair_and_counts_it(rule: str, source: str, target: str) -> None:
    cleaner = Cleaner(CleaningConfig(), Pair("en", "de"))
    kept = cleaner(source, target)
    assert (kept is not None) is (rule == "kept")
    dropped = {name for name in cleaner.counts if name.startswith("dropped_")}
    assert dropped == (set() if rule == "kept" else {f"dropped_{rule}"})
    assert cleaner.counts["read"] == 1


@pytest.mark.parametrize("rule", ["untranslated", "placeholders", "script"])
def test_filters_can_be_turned_off(rule: str) -> None:
    source, target = next(pair[1:] for pair in PAIRS if pair[0] == rule)
    config = dataclasses.replace(CleaningConfig(), **{rule: False})
    assert Cleaner(config, Pair("en", "de"))(source, target) is not None


def test_without_cleaning_only_empty_lines_go() -> None:
    cleaner = Cleaner(CleaningConfig(enabled=False), Pair("en", "de"))
    results = {rule: cleaner(source, target) for rule, source, target in PAIRS}
    assert [rule for rule, result in results.items() if result is None] == ["empty"]
    assert cleaner("<b>&File</b>", "<b>&Datei</b>") == ("<b>&File</b>", "<b>&Datei</b>")


def test_mended_text_is_what_stays() -> None:
    cleaner = Cleaner(CleaningConfig(), Pair("en", "zh_Hans"))
    assert cleaner("<b>Open</b> the &File menu", "打开<b>文件</b>菜单(&F)") == ("Open the File menu", "打开文件菜单")
    assert cleaner.counts == {"read": 1, "mended_markup": 2, "mended_accelerators": 2}


@pytest.mark.parametrize(
    ("language", "text"),
    [
        ("ru", "дверь"),
        ("ja", "ドアを開ける"),
        ("ko", "문을 열다"),
        ("zh_Hant", "開門"),
        ("el", "πόρτα"),
        ("hi", "दरवाज़ा"),
        ("sr_Latn", "vrata"),
        ("deu_Latn", "Tür"),
    ],
)
def test_scripts_of_languages(language: str, text: str) -> None:
    assert set(script_codes(text)) <= set(codes_of_language(language))


def test_unknown_languages_may_have_any_script() -> None:
    assert codes_of_language("tlh") == ""
    assert Cleaner(CleaningConfig(), Pair("en", "tlh"))("The door is open.", "Дверь открыта.") is not None


def test_product_names_do_not_make_a_foreign_script() -> None:
    cleaner = Cleaner(CleaningConfig(), Pair("en", "ja"))
    assert cleaner("Open the page in Firefox", "Firefoxでページを開く") is not None


def test_block_of_lines_keeps_sides_and_keys_together() -> None:
    pairs = [pair[1:] for pair in PAIRS] + [("Line\u2028two here", "Zeile\u0085zwei hier")]
    block = clean_block((CleaningConfig(), Pair("en", "de"), pairs))
    assert block.sides[0] == "The door is open today.\nLine two here\n"
    assert block.sides[1] == "Die Tür ist heute offen.\nZeile zwei hier\n"
    assert block.keys.shape == (2, 3) and block.keys.dtype == np.uint64
    assert block.counts["read"] == len(pairs)

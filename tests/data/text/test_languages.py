"""Codes: which are equal, which are English, and what is offered."""

from __future__ import annotations

import pytest

from moe_train.data.cleaning.scripts import codes_of_language
from moe_train.data.text.languages import (
    Language,
    find_english,
    find_same,
    is_english,
    is_same,
    offer_direction,
    offer_language,
    one_code_each,
)


@pytest.mark.parametrize(
    "codes",
    [
        ("en", "eng", "eng_Latn", "EN", "en_Latn", "en@latin"),
        ("zh", "zho", "chi", "cmn", "zho_Hans", "zh_Hans", "zh@hans"),
        ("ar", "ara", "arb_Arab"),
        ("no", "nor"),
        ("sr", "srp_Cyrl", "sr@cyrillic"),
        ("sr@latin", "sr_Latn", "srp_Latn"),
        ("ko", "kor_Hang", "kor_Kore"),
        ("pt_BR", "por_BR", "pt_Latn_BR"),
        ("xyz", "XYZ"),
    ],
)
def test_codes_of_one_language_are_equal(codes: tuple[str, ...]) -> None:
    assert len({Language.of(code) for code in codes}) == 1
    assert all(is_same(codes[0], code) and find_same(code, ["xx", codes[0]]) == codes[0] for code in codes)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        *[("en", other) for other in ("en_GB", "ang", "de")],
        *[("zh", other) for other in ("zh_Hant", "zh_TW", "yue")],
        *[("nb", other) for other in ("nn", "no")],
        *[("pt", "pt_BR"), ("sr", "sr@latin"), ("xyz", "xyz_Latn")],
    ],
)
def test_codes_of_two_languages_differ(one: str, other: str) -> None:
    assert not is_same(one, other) and find_same(one, [other]) is None


def test_english() -> None:
    assert all(map(is_english, ("en", "eng", "eng_Latn", "en_GB", "en@boldquot", "EN")))
    assert not any(map(is_english, ("de", "ang", "enm", "sgn", "english")))
    assert find_english(["de", "en_GB", "eng_Latn"]) == "eng_Latn"
    assert find_english(["de", "en_GB"]) == "en_GB" and find_english(["de"]) is None


def test_the_first_code_of_a_language_is_the_one() -> None:
    codes = ["en", "deu_Latn", "eng_Latn", "de", "fr"]
    assert one_code_each(codes) == {
        "en": "en",
        "eng_Latn": "en",
        "deu_Latn": "deu_Latn",
        "de": "deu_Latn",
        "fr": "fr",
    }


def test_equal_codes_are_offered_before_near_spellings() -> None:
    assert offer_language("deu_Latn", ["da", "de"]) == "did you mean 'de'?"
    assert offer_language("dee", ["da", "de"]) == "did you mean 'de'?"
    assert offer_direction("eng_Latn-deu_Latn", ["de-en", "en-de"]) == "did you mean 'en-de'?"
    assert offer_direction("xx-yy", ["de-en", "en-de"]) == "known: de-en, en-de"


@pytest.mark.parametrize(("code", "same"), [("deu", "de"), ("zh@hans", "zh"), ("jpn", "ja"), ("srp@latin", "sr_Latn")])
def test_cleaning_expects_the_same_script_of_equal_codes(code: str, same: str) -> None:
    assert codes_of_language(code) == codes_of_language(same) != ""

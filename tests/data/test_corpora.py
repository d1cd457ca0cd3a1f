"""The readers of l10n, IWSLT14, OPUS-100 and FLORES-200, on small folders in the layouts of the real ones."""

from __future__ import annotations

import dataclasses
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import polib
import pytest

from moe_train.config import build
from moe_train.config.corpus import CorpusConfig, WheelConfig
from moe_train.data.corpora import CorpusText, read_corpus
from moe_train.data.corpora import wheels as wheels_module
from moe_train.data.corpora.wheels import cache_folder, fetch_wheels
from moe_train.data.prepare.pipeline import prepare
from moe_train.data.stage_progress import Progress
from moe_train.data.text.lines import sha256, write_lines
from moe_train.errors import ConfigError, DataError
from tests.data import tiny_corpus
from tests.data.prepare.test_pipeline import settings


def texts(**config: Any) -> Mapping[str, CorpusText]:
    return {text.name: text for text in read_corpus(build(CorpusConfig, config), Progress())}


# --- l10n -------------------------------------------------------------------------------------------------------------


def write_wheel(folder: Path, project: str, catalogues: Mapping[str, polib.POFile]) -> WheelConfig:
    """A wheel with compiled catalogues, named as pip would name it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{project}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for locale, catalogue in catalogues.items():
            archive.writestr(f"{project}/locale/{locale}/LC_MESSAGES/django.mo", catalogue.to_binary())
        metadata = {"METADATA": f"Metadata-Version: 2.1\nName: {project}\nVersion: 1.0\n", "RECORD": ""}
        metadata["WHEEL"] = "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        for name, text in metadata.items():
            archive.writestr(f"{project}-1.0.dist-info/{name}", text)
        archive.writestr(f"{project}/locale/{next(iter(catalogues))}/notes.mo", b"no catalogue")
    return WheelConfig(project, "1.0", sha256(path))


def catalogue(language: str, count: int = 200) -> polib.POFile:
    messages = polib.POFile()
    messages.metadata = {"Content-Type": "text/plain; charset=UTF-8"}
    for part in tiny_corpus.sentences(count):
        source, target = tiny_corpus.sentence("en", *part), tiny_corpus.sentence(language, *part)
        messages.append(polib.POEntry(msgid=source, msgstr=target))
    messages.append(polib.POEntry(msgid="Save _As", msgstr="Kurz"))
    messages.append(polib.POEntry(msgid="Not translated at all", msgstr=""))
    messages.append(polib.POEntry(msgid="One of a kind", msgctxt="noun", msgstr="Etwas ganz Besonderes"))
    plural = {0: "%(n)s kleine Tasse", 1: "%(n)s kleine Tassen"}
    messages.append(polib.POEntry(msgid="%(n)s small cup", msgid_plural="%(n)s small cups", msgstr_plural=plural))
    return messages


@pytest.fixture
def wheel(tmp_path: Path) -> WheelConfig:
    return write_wheel(
        tmp_path / "cache", "words", {"de": catalogue("de"), "pt_BR": catalogue("fr"), "ru": catalogue("ru")}
    )


def test_messages_of_catalogues(tmp_path: Path, wheel: WheelConfig) -> None:
    config = {"name": "l10n", "cache": str(tmp_path / "cache"), "languages": ["de", "pt"], "codes": {"pt": "pt_BR"}}
    found = texts(**config, wheels=[dataclasses.asdict(wheel)], min_message_words=3)
    assert set(found) == {"en-de", "en-pt"}
    pairs = set(found["en-de"].read())
    assert len(pairs) == 203
    assert ("One of a kind", "Etwas ganz Besonderes") in pairs
    assert ("%(n)s small cup", "%(n)s kleine Tasse") in pairs
    assert ("%(n)s small cups", "%(n)s kleine Tassen") in pairs
    assert found["en-de"].split is None


def test_a_language_with_one_plural_form_gives_one_pair(tmp_path: Path) -> None:
    messages = polib.POFile()
    messages.metadata = {"Content-Type": "text/plain; charset=UTF-8"}
    messages.append(polib.POEntry(msgid="one cup here", msgid_plural="many cups here", msgstr_plural={0: "カップ"}))
    wheel = write_wheel(tmp_path, "words", {"ja": messages})
    found = texts(name="l10n", cache=str(tmp_path), languages=["ja"], wheels=[dataclasses.asdict(wheel)])
    assert list(found["en-ja"].read()) == [("many cups here", "カップ")]


def test_catalogues_become_a_data_folder_without_a_network(
    tmp_path: Path, wheel: WheelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wheels_module.subprocess, "run", lambda *_, **__: pytest.fail("the network was asked"))
    config = settings(
        tmp_path,
        tmp_path / "out",
        corpus={
            "name": "l10n",
            "cache": str(tmp_path / "cache"),
            "languages": ["de", "ru"],
            "wheels": [dataclasses.asdict(wheel)],
            "split": {"valid": 0.1, "test": 0.1},
        },
        vocabulary__size=400,
    )
    folder = prepare(config)
    assert folder.directions == ("de-en", "en-de", "en-ru", "ru-en")
    assert set(folder.manifest.sources) == {"words-1.0-py3-none-any.whl"}
    held_out = {language: set(folder.raw("test", f"en-{language}")[0]) for language in ("de", "ru")}
    assert len(held_out["ru"]) > 5 and held_out["ru"] <= held_out["de"]


def test_catalogues_under_other_codes(tmp_path: Path, wheel: WheelConfig) -> None:
    config = {"name": "l10n", "cache": str(tmp_path / "cache"), "wheels": [dataclasses.asdict(wheel)]}
    found = texts(**config, languages=["eng_Latn", "deu_Latn", "ru"])
    assert set(found) == {"eng_Latn-deu_Latn", "eng_Latn-ru"}
    assert len(list(found["eng_Latn-deu_Latn"].read())) == 204


def test_a_broken_catalogue_ends_a_preparation_with_one_message(tmp_path: Path, wheel: WheelConfig) -> None:
    path = tmp_path / "cache" / "words-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("words/locale/de/LC_MESSAGES/broken.mo", b"half a catalogue")
    broken = dataclasses.replace(wheel, sha256=sha256(path))
    corpus = {"name": "l10n", "cache": str(path.parent), "languages": ["de"], "wheels": [dataclasses.asdict(broken)]}
    with pytest.raises(DataError, match=rf"{path}: the catalogue words/locale/de/LC_MESSAGES/broken\.mo is damaged"):
        prepare(settings(tmp_path, tmp_path / "out", corpus=corpus))


def test_unknown_locale_is_offered_near_ones(tmp_path: Path, wheel: WheelConfig) -> None:
    with pytest.raises(DataError, match=r"no catalogue has the language 'pt_PT'.*'pt_BR'"):
        texts(name="l10n", cache=str(tmp_path / "cache"), languages=["pt_PT"], wheels=[dataclasses.asdict(wheel)])


@pytest.mark.processes
def test_wheel_with_another_checksum_is_not_used(
    tmp_path: Path, wheel: WheelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = tmp_path / "served"
    other = write_wheel(served, "words", {"de": catalogue("de", count=3)})
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(served))
    cache = tmp_path / "empty"
    with pytest.raises(DataError, match=rf"has the sha256 {other.sha256} instead of {wheel.sha256}"):
        fetch_wheels((wheel,), cache, Progress())
    assert list(cache.iterdir()) == []
    assert fetch_wheels((other,), cache, Progress()) == [cache / "words-1.0-py3-none-any.whl"]


@pytest.mark.processes
def test_wheel_that_cannot_be_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    missing = WheelConfig("words", "9.9", "0" * 64)
    with pytest.raises(DataError, match=r"cannot download words==9\.9 from PyPI \(No matching.*by hand"):
        fetch_wheels((missing,), tmp_path, Progress())


@pytest.mark.processes
def test_a_wheel_with_other_content_in_the_cache_is_not_used_and_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = tmp_path / "served"
    wheel = write_wheel(served, "words", {"de": catalogue("de", count=3)})
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "words-1.0-py3-none-any.whl").write_bytes(b"half a wheel")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(served))
    (fetched,) = fetch_wheels((wheel,), cache, Progress())
    assert sha256(fetched) == wheel.sha256 and fetch_wheels((wheel,), cache, Progress()) == [fetched]
    assert (cache / "words-1.0-py3-none-any.whl").read_bytes() == b"half a wheel" and len(list(cache.iterdir())) == 2


def test_cache_is_the_users_unless_configured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder(None) == tmp_path / "moe_train" / "wheels"
    assert cache_folder("/somewhere") == Path("/somewhere")
    with pytest.raises(ConfigError, match="64 hexadecimal digits"):
        WheelConfig("words", "1.0", "abc")


# --- IWSLT14 ----------------------------------------------------------------------------------------------------------


def write_iwslt(folder: Path, language: str, count: int = 100) -> None:
    name = f"{language}-en"
    place = folder / name
    place.mkdir(parents=True)
    for side in (language, "en"):
        lines = [tiny_corpus.sentence(side, *part) for part in tiny_corpus.sentences(count, start=10)]
        head = ["<url>http://talks</url>", "<keywords>talks</keywords>", f"<title> {lines[0]}</title>"]
        write_lines(
            place / f"train.tags.{name}.{side}", [*head, *(f"{line} " for line in lines[1:]), "<reviewer></reviewer>"]
        )
        for number, name_of_set in enumerate(("dev2010", "tst2011")):
            parts = tiny_corpus.sentences(5, start=5 * number)
            segments = [
                f'<seg id="{i + 1}"> {tiny_corpus.sentence(side, *part)} &amp; so </seg>'
                for i, part in enumerate(parts)
            ]
            text = ["<?xml version='1.0'?>", "<doc>", *segments, "</doc>"]
            write_lines(place / f"IWSLT14.TED.{name_of_set}.{name}.{side}.xml", text)


def test_iwslt14(tmp_path: Path) -> None:
    write_iwslt(tmp_path / "iwslt", "de")
    write_iwslt(tmp_path / "iwslt", "fr")
    found = texts(name="iwslt14", path=str(tmp_path / "iwslt"))
    assert set(found) == {"de-en", "test.de-en", "fr-en", "test.fr-en"}
    parts = tiny_corpus.sentences(110)
    assert list(found["de-en"].read()) == [
        (tiny_corpus.sentence("de", *part), tiny_corpus.sentence("en", *part)) for part in parts[10:]
    ]
    test = [tiny_corpus.sentence("en", *part) + " & so" for part in parts[:10]]
    assert [english for _, english in found["test.de-en"].read()] == test
    corpus = {"name": "iwslt14", "path": str(tmp_path / "iwslt"), "split": {"valid": 0.1, "test": 0.0}}
    folder = prepare(settings(tmp_path, tmp_path / "out", corpus=corpus))
    assert folder.manifest.counts["test"] == {"de-en": 10, "fr-en": 10}
    assert folder.raw("valid", "en-de")[0] == folder.raw("valid", "en-fr")[0]  # cut by the English they share
    assert folder.raw("test", "de-en")[1] == test


def test_iwslt14_segments_must_match(tmp_path: Path) -> None:
    write_iwslt(tmp_path, "de")
    path = tmp_path / "de-en" / "IWSLT14.TED.tst2011.de-en.de.xml"
    path.write_text(path.read_text().replace("<seg", "<gone", 1))
    with pytest.raises(DataError, match=r"tst2011\.de-en\.de\.xml has 4 segments, .*\.en\.xml has 5"):
        list(texts(name="iwslt14", path=str(tmp_path))["test.de-en"].read())
    path.unlink()
    with pytest.raises(DataError, match="other side of a parallel text is missing"):
        texts(name="iwslt14", path=str(tmp_path))


# --- OPUS-100 ---------------------------------------------------------------------------------------------------------


def write_opus(folder: Path) -> None:
    for place, pair, splits in (
        ("supervised", "de-en", {"train": 60, "dev": 5, "test": 5}),
        ("supervised", "en-fr", {"train": 60, "dev": 5, "test": 5}),
        ("zeroshot", "de-fr", {"test": 5}),
    ):
        (folder / place / pair).mkdir(parents=True)
        start = 0
        for split, count in splits.items():
            for language in pair.split("-"):
                lines = [tiny_corpus.sentence(language, *part) for part in tiny_corpus.sentences(count, start)]
                write_lines(folder / place / pair / f"opus.{pair}-{split}.{language}", lines)
            start += count


def test_opus100_with_zero_shot_test_sets(tmp_path: Path) -> None:
    write_opus(tmp_path / "opus" / "v1.0")
    corpus = {"name": "opus100", "path": str(tmp_path / "opus")}
    folder = prepare(settings(tmp_path, tmp_path / "out", corpus=corpus, vocabulary__size=350))
    assert folder.directions_of("train") == ("de-en", "en-de", "en-fr", "fr-en")
    assert folder.directions_of("test") == ("de-en", "de-fr", "en-de", "en-fr", "fr-de", "fr-en")
    assert folder.manifest.counts["valid"] == {"de-en": 5, "en-fr": 5}
    only = texts(**corpus, languages=["en", "fr"])
    assert set(only) == {"train.en-fr", "valid.en-fr", "test.en-fr"}


# --- FLORES-200 -------------------------------------------------------------------------------------------------------


def write_flores(folder: Path) -> None:
    for name, start in (("dev", 0), ("devtest", 8)):
        (folder / name).mkdir(parents=True)
        for language, code in {"en": "eng_Latn", "de": "deu_Latn", "fr": "fra_Latn", "ja": "jpn_Jpan"}.items():
            lines = [tiny_corpus.sentence(language, *part) for part in tiny_corpus.sentences(8, start)]
            write_lines(folder / name / f"{code}.{name}", lines)


def test_flores200_with_training_text(tmp_path: Path) -> None:
    write_flores(tmp_path / "flores")
    training = tiny_corpus.write_corpus(tmp_path / "text", targets=("de", "fr"), train=100)
    corpus = {"name": "flores200", "path": str(tmp_path / "flores"), "train_path": str(training)}
    folder = prepare(settings(tmp_path, tmp_path / "out", corpus=corpus))
    assert folder.manifest.counts == {
        "train": {"en-de": 100, "en-fr": 100},
        "valid": {"en-de": 8, "en-fr": 8},
        "test": {"en-de": 8, "en-fr": 8},
    }


@pytest.mark.parametrize("codes", [("en", "de", "fr"), ("eng_Latn", "deu_Latn", "fra_Latn"), ("eng", "deu", "fra")])
@pytest.mark.parametrize("wanted", [["eng_Latn", "deu_Latn", "fra_Latn"], ["en", "de", "fr"], ["deu_Latn", "fr"]])
def test_flores200_joins_training_text_of_any_codes(tmp_path: Path, codes: tuple[str, ...], wanted: list[str]) -> None:
    write_flores(tmp_path / "flores")
    english, *others = codes
    for other in others:
        for code in (english, other):
            write_lines(tmp_path / f"{english}-{other}.{code}", ["a line"])
    corpus = {"name": "flores200", "path": str(tmp_path / "flores"), "train_path": str(tmp_path)}
    names = {f"{split}{english}-{other}" for split in ("", "valid.", "test.") for other in others}
    assert set(texts(**corpus, languages=wanted)) == set(texts(**corpus)) == names
    only = texts(**corpus, pairs=["eng-deu_Latn"])
    assert set(only) == {f"{split}{english}-{codes[1]}" for split in ("", "valid.", "test.")}


def test_flores200_takes_the_codes_of_a_reused_vocabulary(tmp_path: Path, tiny_data: Any) -> None:
    write_flores(tmp_path / "flores")
    corpus = {"name": "flores200", "path": str(tmp_path / "flores"), "languages": ["eng_Latn", "deu_Latn"]}
    folder = prepare(settings(tmp_path, tmp_path / "out", corpus=corpus, vocabulary={"reuse": str(tiny_data.path)}))
    assert folder.directions_of("test") == ("de-en", "en-de")


def test_flores200_for_evaluation_alone(tmp_path: Path, tiny_data: Any) -> None:
    write_flores(tmp_path / "flores")
    corpus = {"name": "flores200", "path": str(tmp_path / "flores"), "pairs": ["de-ja"]}
    folder = prepare(settings(tmp_path, tmp_path / "out", corpus=corpus, vocabulary={"reuse": str(tiny_data.path)}))
    assert folder.directions_of("test") == ("de-ja", "ja-de")
    assert folder.languages == tiny_data.languages
    assert len(folder.dictionary()) == len(tiny_data.dictionary())


def test_flores200_must_be_told_what_is_wanted(tmp_path: Path) -> None:
    write_flores(tmp_path)
    with pytest.raises(ConfigError, match=r"languages or pairs.*corpus\.languages=\[en,de,fr\]"):
        texts(name="flores200", path=str(tmp_path))
    with pytest.raises(DataError, match="no language 'rus_Cyrl'"):
        texts(name="flores200", path=str(tmp_path), languages=["ru"])
    assert set(texts(name="flores200", path=str(tmp_path), languages=["de"])) == {"valid.en-de", "test.en-de"}


@pytest.mark.parametrize("name", ["iwslt14", "opus100", "flores200"])
def test_folder_of_something_else_shows_what_is_expected(tmp_path: Path, name: str) -> None:
    (tmp_path / "holiday.jpg").write_bytes(b"")
    with pytest.raises(DataError, match=r"\(found: holiday\.jpg\)\. Unpack"):
        texts(name=name, path=str(tmp_path))

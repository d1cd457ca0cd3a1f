"""``corpus=l10n``: messages of programs and their translations, from gettext catalogues inside wheels on PyPI.

A small real corpus in many languages: no account, no licence form, a few tens of megabytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from moe_train.config.corpus import CorpusConfig
from moe_train.data.corpora.base import CorpusText, register
from moe_train.data.corpora.gettext_catalogues import catalogues, messages
from moe_train.data.corpora.wheels import cache_folder, fetch_wheels
from moe_train.data.stage_progress import Progress
from moe_train.data.text.languages import find_same, is_same
from moe_train.data.text.pairs import Pair
from moe_train.errors import ConfigError, DataError, did_you_mean

ENGLISH = "en"


@register("l10n")
def read_l10n(config: CorpusConfig, progress: Progress) -> list[CorpusText]:
    """English messages with their translation into each of ``corpus.languages``.

    Raises:
        ConfigError: no wheels or no languages.
        DataError: a wheel cannot be downloaded, or no wheel has a language.
    """
    source = find_same(ENGLISH, config.languages) or ENGLISH
    targets = [language for language in config.languages if not is_same(language, source)]
    if not config.wheels or not targets:
        raise ConfigError("corpus=l10n needs wheels and languages", "corpus", "start from configs/corpus/l10n.yaml")
    wheels = tuple(fetch_wheels(config.wheels, cache_folder(config.cache), progress))
    locales = {locale for wheel in wheels for locale, _ in catalogues(wheel)}
    return [_text(Pair(source, language), config, wheels, sorted(locales)) for language in targets]


def _text(pair: Pair, config: CorpusConfig, wheels: tuple[Path, ...], locales: Sequence[str]) -> CorpusText:
    language = pair.target
    locale = config.codes.get(language) or find_same(language, locales) or language
    if locale not in locales:
        raise DataError(f"no catalogue has the language '{locale}'", "corpus.languages", did_you_mean(locale, locales))

    def read() -> Iterator[tuple[str, str]]:
        for wheel in wheels:
            for source, target in messages(wheel, locale, config.max_expansion):
                if len(source.split()) >= config.min_message_words:
                    yield source, target

    return CorpusText(pair, None, read, wheels)

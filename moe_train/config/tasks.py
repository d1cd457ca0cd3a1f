"""The keys of tasks other than translation, a dataclass each."""

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
        format: ``class_folders``, ``idx``, ``digits`` (scikit-learn's), or ``auto``: whichever the folder looks like.
        image_size: pixels of a side of the square that the model sees (None: as the images are, all of one size).
        resize: class folders only: scale and crop images of any size to ``image_size``.
        channels: 1 (grey), 3 (colour), None: as the images are.
        valid_share: share of the training images held out for validation where the data has no such split.
        flip: mirror half of the training images.
        shift: move training images by up to this many pixels each way.
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
        """What may choose the best checkpoint."""
        return ("loss", "accuracy")

    @property
    def subject(self) -> str:
        """The format."""
        return f"images, {self.format}"

    @property
    def unit(self) -> str:
        """Images: one label each."""
        return "images"


@dataclass(frozen=True)
class LanguageModelConfig(TaskConfig):
    """Masked-language-model pre-training in many languages (BERT's, XLM's and X-MoE's).

    Attributes:
        languages: only these (empty: all of the data folder).
        sides: which sides of the folder's directions are read as text: ``target``, ``source`` or ``both``; text of
            single languages is read whatever it says.
        pack: an item is a block of one language's sentences, in the order of the data and as many as fit into
            ``training.max_sentence_tokens`` (and ``model.max_positions``), instead of one sentence.
        translation_lm: also train on pairs, a sentence behind its translation (XLM's TLM).
        exponent: α of re-balancing: a language of n sentences is drawn in proportion to n^α (XLM: 0.5 and 0.7; 1: as
            the data is).
        mask_probability: share of the tokens to predict.
        mask_share, random_share: of these, how many are replaced by ``<mask>`` and by a random piece; the others stay.
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
            raise ConfigError("task.mask_share and task.random_share make more than 1", remedy="lower one of them")

    @property
    def metrics(self) -> tuple[str, ...]:
        """What may choose the best checkpoint."""
        return ("loss",)

    @property
    def subject(self) -> str:
        """Languages."""
        return ", ".join(self.languages) or "all languages"

    @property
    def unit(self) -> str:
        """Tokens, of which some are predicted."""
        return "tokens"


@dataclass(frozen=True)
class ClassificationConfig(TaskConfig):
    """Fine-tuning of a ``cross_lingual_lm`` run on labelled texts: trained in some languages, measured in all.

    Attributes:
        languages: whose ``train.XX.tsv`` and ``valid.XX.tsv`` are trained on and validated with.
        vocabulary: the data folder whose pieces cut the texts (None: that of the run in ``training.init_from``).
        max_tokens: longer texts lose their tail.
        pooling: what the classifier looks at: the ``mean`` of a text's states, or the ``first`` one (BERT's).
        freeze_routing: routers and experts keep their values, as in X-MoE (§3.3); the same as ``routing.frozen``.
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
        """What may choose the best checkpoint."""
        return ("loss", "accuracy", "macro_f1")

    @property
    def subject(self) -> str:
        """Languages."""
        return f"trained in {', '.join(self.languages)}"

    @property
    def unit(self) -> str:
        """Tokens: texts are batched by length."""
        return "tokens of texts"

"""The flags of the task and criterion on fairseq's command line.

No ``from __future__ import annotations`` here: fairseq builds its parsers from annotations that are types, not strings,
and of unions it understands ``Optional`` alone.
"""

from dataclasses import dataclass, field
from typing import Optional

from moe_train.fairseq_compat import apply

apply()
from fairseq.dataclass import FairseqDataclass  # noqa: E402
from omegaconf import II  # noqa: E402


@dataclass
class MoETranslationFlags(FairseqDataclass):  # type: ignore[misc]
    """Flags of ``--task moe_translation``."""

    data: str = field(default="", metadata={"help": "folder made by moe-prepare"})
    source_lang: Optional[str] = field(default=None, metadata={"help": "one direction only: its source language"})  # noqa: UP045
    target_lang: Optional[str] = field(default=None, metadata={"help": "one direction only: its target language"})  # noqa: UP045
    directions: str = field(default="", metadata={"help": "several directions, e.g. en-de,de-en (default: all)"})
    source_tag: str = field(default="target", metadata={"help": "tag in front of the source: source, target or none"})
    target_tag: str = field(default="none", metadata={"help": "the decoder's first token: source, target or none"})
    seed: int = II("common.seed")


@dataclass
class MoECriterionFlags(FairseqDataclass):  # type: ignore[misc]
    """Flags of the criterion; passes and consistency come from the routing that the model is built with."""

    label_smoothing: float = field(default=0.1, metadata={"help": "share of the target spread over the other words"})

"""Cross-lingual classification: fine-tuned in some languages, measured in all (X-MoE's zero-shot transfer)."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from moe_train.config import ClassificationConfig, RunConfig
from moe_train.data.batching import BatchSettings, Indices, WorldBatches
from moe_train.data.folder import DataFolder
from moe_train.data.labelled import LabelledFile, LabelledTexts
from moe_train.data.length_buckets import batch_by_length
from moe_train.data.text.languages import find_english, find_same
from moe_train.errors import ConfigError, DataError
from moe_train.models.encoder import build_text_classifier
from moe_train.models.trainable import TrainableModel
from moe_train.routing import RoutingConfig, routing_config
from moe_train.tasks.base import Sample, TrainingTask
from moe_train.tasks.classification_criterion import ClassificationCriterion, macro_f1
from moe_train.tasks.lm import token_frequency
from moe_train.tasks.registry import register_task

if TYPE_CHECKING:
    from fairseq.data import Dictionary

LOG = logging.getLogger(__name__)
TRANSLATED = ".in_en"  # the same items, in English


@dataclass(frozen=True)
class EncodedFiles:
    """Files cut into pieces, the items of all files in one array.

    Attributes:
        pieces: flat dictionary ids of all items, beginnings and ends included.
        starts, lengths, labels, uids, languages: [N].
        sizes: items of each file.
    """

    pieces: Indices
    starts: Indices
    lengths: Indices
    labels: Indices
    uids: Indices
    languages: Indices
    sizes: tuple[int, ...]


def _open(config: RunConfig) -> LabelledTexts:
    assert isinstance(config.task, ClassificationConfig)
    return LabelledTexts.open(config.data, config.task.languages)


@register_task("cross_lingual_classification", _open)
class ClassificationTask(TrainingTask):
    """Texts and their classes: one target per text."""

    def __init__(self, config: RunConfig, data: LabelledTexts) -> None:
        assert isinstance(config.task, ClassificationConfig)
        self.config, self.keys, self.data = config, config.task, data
        self._encoded: dict[tuple[str, tuple[str, ...]], EncodedFiles] = {}

    @cached_property
    def vocabulary(self) -> DataFolder:
        """The data folder whose SentencePiece model cuts the texts.

        Raises:
            ConfigError: neither ``task.vocabulary`` nor ``training.init_from`` names one.
        """
        return DataFolder.open(self.keys.vocabulary or _data_of_run(self.config.training.init_from))

    @cached_property
    def dictionary(self) -> Dictionary:
        """The joint dictionary."""
        return self.vocabulary.dictionary()

    @cached_property
    def routing(self) -> RoutingConfig:
        """The strategy's config, frozen if ``task.freeze_routing``."""
        routing = routing_config(self.config.routing)
        return dataclasses.replace(routing, frozen=True) if self.keys.freeze_routing else routing

    def check_data(self) -> None:
        """Checks that there is something to validate with, and a vocabulary.

        Raises:
            DataError, ConfigError: there is not.
        """
        for language in self.keys.languages:
            if language not in self.data.splits["valid"]:
                raise DataError(f"the file valid.{language}.tsv is missing", str(self.data.path), "give some items")
        self.vocabulary.tokenizer()
        if self.data.unread:
            LOG.warning("%s: not read: %s", self.data.path, ", ".join(self.data.unread))

    # --- training ---------------------------------------------------------------------------------------------------

    def build_model(self, layout: Any = None) -> TrainableModel:
        """The model of the config; ``layout``: the experts that this rank holds (None: all)."""
        return build_text_classifier(
            self.config.model,
            self.routing,
            self.dictionary,
            len(self.data.classes),
            seed=self.config.seed,
            pooling=self.keys.pooling,
            layout=layout,
            token_frequency=token_frequency(self.dictionary),
        )

    def build_criterion(self) -> nn.Module:
        """Cross-entropy with the routing losses, also if routing is frozen."""
        return ClassificationCriterion(
            len(self.data.classes),
            label_smoothing=self.config.training.label_smoothing,
            passes=self.routing.passes,
            consistency_weight=self.routing.consistency_weight,
            per_class=True,
        )

    def train_batches(self) -> WorldBatches:
        """Micro-batches of the world, drawn by (seed, update); ``training.tokens_per_update`` counts texts' tokens."""
        training, text = self.config.training, self.encoded("train", self.keys.languages)
        settings = BatchSettings(
            tokens_per_update=training.tokens_per_update,
            accumulation=training.accumulation,
            temperature=training.temperature,
            max_sentence_tokens=self.config.model.max_positions,
            seed=self.config.seed,
        )
        return WorldBatches(text.lengths, text.lengths, text.sizes, settings, self.keys.languages)

    def train_sample(self, indices: Indices, update: int = 0) -> Sample:
        """A rank's rows of a training micro-batch."""
        return self._sample(self.encoded("train", self.keys.languages), indices)

    # --- evaluation -------------------------------------------------------------------------------------------------

    def validation_sets(self) -> Mapping[str, Sequence[Indices]]:
        """The training languages' valid files."""
        return {name: self._batches("valid", name, 0) for name in self.keys.languages}

    def evaluation_sets(self, split: str, max_items: int = 0) -> Mapping[str, Sequence[Indices]]:
        """Every file of a split: languages, and those of the same items in English.

        Raises:
            DataError: there is none.
        """
        if not self.data.splits.get(split):
            raise DataError(f"there are no files {split}.XX.tsv", str(self.data.path), "give some")
        return {name: self._batches(split, name, max_items) for name in self.data.splits[split]}

    def evaluation_sample(self, split: str, name: str, indices: Indices) -> Sample:
        """Rows of a batch of :meth:`evaluation_sets`."""
        return self._sample(self.encoded(split, (name,)), indices)

    def measures(self, sums: Mapping[str, float]) -> dict[str, Any]:
        """Means per item of a criterion's sums, and macro-F1."""
        found = super().measures({name: value for name, value in sums.items() if not name.startswith("class/")})
        items, _ = found.pop("sentences"), found.pop("tokens")
        return {**found, "macro_f1": macro_f1(dict(sums), len(self.data.classes)), "sentences": items}

    def summary(self, sets: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """``gap`` of each language to the same items in English, and ``zero_shot``, the mean of the others."""
        scores = ("accuracy", "macro_f1")
        gap = {
            name: {score: sets[name][score] - sets[name + TRANSLATED][score] for score in scores}
            for name in sets
            if name + TRANSLATED in sets
        }
        unseen = [name for name in sets if not name.endswith(TRANSLATED) and name not in self.keys.languages]
        zero_shot = {score: float(np.mean([sets[name][score] for name in unseen])) for score in scores if unseen}
        return {"gap": gap, "zero_shot": zero_shot}

    def encoded(self, split: str, names: Sequence[str]) -> EncodedFiles:
        """Files of a split, cut into pieces once."""
        key = (split, tuple(names))
        if key not in self._encoded:
            self._encoded[key] = self._encode([self.data.splits[split][name] for name in names])
        return self._encoded[key]

    def _encode(self, files: Sequence[LabelledFile]) -> EncodedFiles:
        entries, room = self.dictionary, min(self.keys.max_tokens, self.config.model.max_positions) - 2
        known = self.vocabulary.languages
        texts = [text for file in files for text in file.texts]
        tokenizer = self.vocabulary.tokenizer()
        cut = tokenizer.encode_batch(texts)
        items = [[entries.bos(), *tokenizer.to_ids(pieces[:room]), entries.eos()] for pieces in cut]
        lengths = np.array([len(item) for item in items], np.int64)
        english = find_english(known)
        codes = [
            english if file.name.endswith(TRANSLATED) else find_same(file.name.split(".")[0], known) for file in files
        ]
        numbers = [-1 if code is None else known.index(code) for code in codes]
        sizes = [len(file.texts) for file in files]
        return EncodedFiles(
            pieces=np.array([piece for item in items for piece in item], np.int64),
            starts=np.cumsum(lengths) - lengths,
            lengths=lengths,
            labels=np.array([label for file in files for label in file.labels], np.int64),
            uids=np.concatenate([file.first_uid + np.arange(len(file.texts)) for file in files]),
            languages=np.repeat(np.array(numbers, np.int64), sizes),
            sizes=tuple(sizes),
        )

    def _batches(self, split: str, name: str, max_items: int) -> list[Indices]:
        text = self.encoded(split, (name,))
        items = np.arange(len(text.labels))[: max_items or None]
        lengths = text.lengths[items]
        return batch_by_length(items, lengths, lengths, self.config.training.micro_batch_tokens)

    def _sample(self, text: EncodedFiles, indices: Indices) -> Sample:
        indices = np.asarray(indices, np.int64)
        lengths = text.lengths[indices]
        columns = np.arange(max(1, lengths.max(initial=0)))
        real = columns < lengths[:, None]
        tokens = np.full(real.shape, self.dictionary.pad(), np.int64)
        tokens[real] = text.pieces[(text.starts[indices][:, None] + columns)[real]]
        languages = torch.from_numpy(text.languages[indices])
        return {
            "id": torch.from_numpy(indices),
            "nsentences": len(indices),
            "ntokens": len(indices),
            "real_tokens": [int(lengths.sum())],
            "target": torch.from_numpy(text.labels[indices]),
            "net_input": {
                "src_tokens": torch.from_numpy(tokens),
                "src_lengths": torch.from_numpy(lengths),
                "sentence_uid": torch.from_numpy(text.uids[indices]),
                "src_lang": languages,
                "tgt_lang": languages,
            },
        }


def _data_of_run(init_from: str | None) -> str:
    """The data folder of the run that ``training.init_from`` names, by its folder or one of its checkpoints.

    The config of an export names its data folder by a relative path.
    """
    for folder in [Path(init_from), *Path(init_from).absolute().parents[:2]] if init_from else []:
        path = folder / "config.json"
        if path.is_file():
            try:
                return str(folder / json.loads(path.read_text(encoding="utf-8"))["config"]["data"])
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise ConfigError(f"the run's config cannot be read ({error!r})", str(path)) from error
    raise ConfigError(
        "there is no vocabulary to cut the texts with",
        remedy="start from a cross_lingual_lm run, training.init_from=RUN, or set task.vocabulary=DATA_FOLDER",
    )

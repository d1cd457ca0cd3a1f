"""Cross-lingual language modelling: masked tokens of many languages, and of pairs (X-MoE's pre-training)."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from moe_train.config import LanguageModelConfig, RunConfig
from moe_train.data.batching import BatchSettings, Indices, WorldBatches
from moe_train.data.folder import DataFolder
from moe_train.data.length_buckets import batch_by_length
from moe_train.data.text.pairs import tag
from moe_train.errors import ConfigError, DataError
from moe_train.models.encoder import build_masked_language_model
from moe_train.models.trainable import TrainableModel
from moe_train.tasks.base import Sample, TrainingTask
from moe_train.tasks.criterion import MoELabelSmoothedCrossEntropy
from moe_train.tasks.masking import Masking
from moe_train.tasks.monolingual_text import MonolingualText, languages_read, open_text
from moe_train.tasks.registry import register_task

if TYPE_CHECKING:
    from fairseq.data import Dictionary

_log = logging.getLogger(__name__)

# Held-out text is masked the same way in every run, for any seed: perplexities are of the same tokens.
_EVALUATION_SEED, _EVALUATION_UPDATE = 1, -1


@register_task("cross_lingual_lm")
class LanguageModelTask(TrainingTask):
    """Masked language models; losses are per masked token, perplexities per language.

    An item is a sentence, a pair of them, or with ``task.pack`` a block of sentences, in training and evaluation alike.
    """

    def __init__(self, config: RunConfig, folder: DataFolder) -> None:
        assert isinstance(config.task, LanguageModelConfig)
        self.config, self.keys, self.folder = config, config.task, folder
        if config.training.temperature != 1.0:
            raise ConfigError(
                "languages are balanced by task.exponent here, not by training.temperature",
                remedy=f"set task.exponent={1 / config.training.temperature:.3g} and leave training.temperature at 1",
            )
        self._splits: dict[str, MonolingualText] = {}

    @property
    def vocabulary(self) -> DataFolder:
        """The data folder whose pieces the model reads and predicts."""
        return self.folder

    @property
    def trained(self) -> tuple[str, ...]:
        """The languages of the training text; others may have held-out text only."""
        return languages_read(self.folder, "train", self.keys)

    @cached_property
    def dictionary(self) -> Dictionary:
        """The joint dictionary."""
        return self.folder.dictionary()

    @property
    def target_dictionary(self) -> Dictionary:
        """The joint dictionary."""
        return self.dictionary

    @cached_property
    def masking(self) -> Masking:
        """What may be masked, and by what."""
        entries = self.dictionary
        if self.folder.manifest.ids_by_name:
            what = "the vocabulary is that of an imported translation model, in which pieces and tags have any order"
            raise DataError(what, str(self.folder.path), "prepare the text with a vocabulary of its own")
        first_tag = min(entries.index(tag(language)) for language in self.folder.languages)
        return Masking(self.keys, entries.index("<mask>"), entries.pad(), entries.nspecial, first_tag)

    def split(self, name: str) -> MonolingualText:
        """The text of ``train``, ``valid`` or ``test``, opened once."""
        if name not in self._splits:
            block = self._batching.longest if self.keys.pack else None
            self._splits[name] = open_text(self.folder, name, self.keys, self.dictionary, block)
        return self._splits[name]

    def check_data(self) -> None:
        """Opens what training and validation read.

        Raises:
            DataError: no text in the languages wanted.
        """
        for name in ("train", "valid"):
            self.split(name)

    # --- training ---------------------------------------------------------------------------------------------------

    def build_model(self, layout: Any = None) -> TrainableModel:
        """The model of the config; ``layout``: the experts that this rank holds (None: all)."""
        return build_masked_language_model(
            self.config.model,
            self.routing,
            self.dictionary,
            seed=self.config.seed,
            layout=layout,
            token_frequency=token_frequency(self.dictionary),
        )

    def build_criterion(self) -> nn.Module:
        """Cross-entropy at masked tokens, with the routing losses."""
        return MoELabelSmoothedCrossEntropy.build_criterion(self.config.training, self)

    def train_batches(self) -> WorldBatches:
        """Micro-batches of the world, drawn by (seed, update); ``training.tokens_per_update`` counts all tokens.

        Raises:
            DataError: no sentence to train on.
        """
        text = self.split("train")
        return WorldBatches(text.lengths, text.lengths, text.sizes, self._batching, text.names)

    @property
    def _batching(self) -> BatchSettings:
        training = self.config.training
        return BatchSettings(
            tokens_per_update=training.tokens_per_update,
            accumulation=training.accumulation,
            temperature=1.0 / self.keys.exponent,
            max_sentence_tokens=min(training.max_sentence_tokens, self.config.model.max_positions),
            seed=self.config.seed,
        )

    def train_sample(self, indices: Indices, update: int = 0) -> Sample:
        """A rank's rows of a training micro-batch, with new masks in every update."""
        return self._sample(self.split("train"), indices, self.config.seed, update)

    # --- evaluation -------------------------------------------------------------------------------------------------

    def evaluation_sets(self, split: str, max_items: int = 0) -> Mapping[str, Sequence[Indices]]:
        """Batches of a held-out split by language; sentences beyond ``model.max_positions`` are left out, and counted.

        Raises:
            DataError: no text there.
        """
        text, limit = self.split(split), self.config.model.max_positions
        budget = self.config.training.micro_batch_tokens
        sets: dict[str, Sequence[Indices]] = {}
        for name in text.names:
            items = text.items(name)
            kept = items[text.lengths[items] <= limit]
            if len(kept) < len(items):
                _log.warning(
                    "%s %s: %d sentences of more than %d tokens left out", split, name, len(items) - len(kept), limit
                )
            kept = kept[: max_items or None]
            sets[name] = batch_by_length(kept, text.lengths[kept], text.lengths[kept], budget)
        return sets

    def evaluation_sample(self, split: str, name: str, indices: Indices) -> Sample:
        """Rows of a batch of :meth:`evaluation_sets`, always masked the same way."""
        return self._sample(self.split(split), indices, _EVALUATION_SEED, _EVALUATION_UPDATE)

    def _sample(self, text: MonolingualText, indices: Indices, seed: int, update: int) -> Sample:
        indices = np.asarray(indices, np.int64)
        tokens, uids, languages = text.tokens(indices)
        seen, target = self.masking.apply(tokens, uids, seed, update)
        masked = int((target != text.pad).sum())
        return {
            "id": torch.from_numpy(indices),
            "nsentences": len(indices),
            "ntokens": masked,
            "real_tokens": [int(text.lengths[indices].sum())],
            "real_targets": masked,
            "target": torch.from_numpy(target),
            "net_input": {
                "src_tokens": torch.from_numpy(seen),
                "src_lengths": torch.from_numpy(text.lengths[indices]),
                "sentence_uid": torch.from_numpy(uids),
                "src_lang": torch.from_numpy(languages[:, 0].copy()),
                "tgt_lang": torch.from_numpy(languages[:, 1].copy()),
            },
        }


def token_frequency(dictionary: Any) -> Tensor:
    """[V] occurrences of each dictionary id in the training text, counted by ``moe-prepare``."""
    counts = torch.tensor(dictionary.count, dtype=torch.float64)
    counts[: dictionary.nspecial] = 0.0
    return counts

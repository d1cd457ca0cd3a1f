"""Translation in many directions at once, from a prepared data folder."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from moe_train.config import RunConfig
from moe_train.data.batching import Batches, BatchSettings, Indices, WorldBatches
from moe_train.data.folder import DataFolder
from moe_train.data.length_buckets import batch_by_length
from moe_train.data.text.languages import offer_direction
from moe_train.data.text.pairs import tag
from moe_train.data.windows import WindowedBatches
from moe_train.errors import DataError, note
from moe_train.fairseq_compat import apply
from moe_train.models import build_model
from moe_train.models.trainable import TrainableModel
from moe_train.tasks.base import Sample, TranslatingTask
from moe_train.tasks.criterion import MoELabelSmoothedCrossEntropy
from moe_train.tasks.registry import register_task
from moe_train.tasks.translation.parallel_text import ParallelText, Tags, open_split

apply()
from fairseq.tasks import FairseqTask  # noqa: E402

if TYPE_CHECKING:
    from fairseq.data import Dictionary

_log = logging.getLogger(__name__)


@register_task("translation")
class TranslationTask(TranslatingTask, FairseqTask):  # type: ignore[misc]
    """Translation, as one of fairseq's tasks too.

    Args:
        config: ``task``, ``training``, ``model``, ``routing`` and ``seed`` are read.
        folder: the prepared data.

    Raises:
        DataError: a direction that the folder does not have.
    """

    def __init__(self, config: RunConfig, folder: DataFolder) -> None:
        super().__init__(config)
        self.config, self.folder = config, folder
        if not folder.directions:
            raise DataError(
                "the data folder holds text of single languages, and nothing to translate it into",
                str(folder.path),
                "train a masked language model on it (task=cross_lingual_lm), or prepare pairs (corpus=text)",
            )
        self._directions = config.task.directions or folder.directions
        known = set(folder.directions)
        for name in self._directions:
            if name not in known:
                remedy = offer_direction(name, folder.directions)
                raise DataError(f"the data folder has no direction '{name}'", str(folder.path), remedy)
        self._splits: dict[str, ParallelText] = {}
        self._held_out: dict[str, dict[str, ParallelText]] = {}

    @property
    def directions(self) -> tuple[str, ...]:
        """``task.directions``; all of the folder if there are none."""
        return self._directions

    @property
    def vocabulary(self) -> DataFolder:
        """The data folder whose pieces the model reads and writes."""
        return self.folder

    @property
    def trained(self) -> tuple[str, ...]:
        """The chosen directions that have training text; others may have held-out text only (zero-shot)."""
        return tuple(name for name in self.directions if self.folder.has("train", name))

    @cached_property
    def dictionary(self) -> Dictionary:
        """The joint dictionary."""
        return self.folder.dictionary()

    @property
    def source_dictionary(self) -> Dictionary:
        """The joint dictionary."""
        return self.dictionary

    @property
    def target_dictionary(self) -> Dictionary:
        """The joint dictionary."""
        return self.dictionary

    def max_positions(self) -> tuple[int, int]:
        """Longest source and target in tokens."""
        return self.config.model.max_positions, self.config.model.max_positions

    def split(self, name: str) -> ParallelText:
        """The chosen directions of ``train``, ``valid`` or ``test``, opened once."""
        if name not in self._splits:
            self._splits[name] = open_split(self.folder, name, self.directions, self.config.task, self.dictionary)
        return self._splits[name]

    def check_data(self) -> None:
        """Checks that there is text to train on and to validate with.

        Raises:
            DataError: there is none.
        """
        if untrained := [name for name in self.config.task.directions if name not in self.trained]:
            note(f"no training text for {', '.join(untrained)}: task.directions names it, and it is not trained")
        for split in ("train", "valid"):
            if not any(self.folder.has(split, direction) for direction in self.directions):
                raise DataError(
                    f"the split '{split}' has no sentences for {', '.join(self.directions)}",
                    str(self.folder.path),
                    "give files for it and run moe-prepare again",
                )

    # --- training ---------------------------------------------------------------------------------------------------

    def build_model(self, layout: Any = None) -> TrainableModel:
        """The model of the config; ``layout``: the experts that this rank holds (None: all)."""
        return build_model(
            self.config.model,
            self.routing,
            self.source_dictionary,
            self.target_dictionary,
            seed=self.config.seed,
            layout=layout,
            token_frequency=self.token_frequency(),
        )

    def build_criterion(self) -> nn.Module:
        """Label-smoothed cross-entropy with the routing losses."""
        return MoELabelSmoothedCrossEntropy.build_criterion(self.config.training, self)

    def train_batches(self) -> Batches:
        """Micro-batches of the world, drawn by (seed, update).

        Raises:
            DataError: no sentence to train on.
        """
        training, text = self.config.training, self.split("train")
        settings = BatchSettings(
            tokens_per_update=training.tokens_per_update,
            accumulation=training.accumulation,
            temperature=training.temperature,
            max_sentence_tokens=min(training.max_sentence_tokens, self.config.model.max_positions),
            seed=self.config.seed,
        )
        names = [d.name for d in text.directions]
        batches: Batches
        if self.plan_version > 1 and len(text) > training.shuffle_window:
            batches = WindowedBatches(text.lengths, text.sizes, settings, training.shuffle_window, names)
        else:
            batches = WorldBatches(text.source_lengths, text.target_lengths, text.sizes, settings, names)
        if left_out := {name: count for name, count in batches.left_out.items() if count}:
            _log.warning("train: sentences of more than %d tokens left out: %s", settings.longest, left_out)
        return batches

    def train_sample(self, indices: Indices, update: int = 0) -> Sample:
        """A rank's rows of a training micro-batch."""
        return self.split("train").sample(indices)

    def token_frequency(self) -> Tensor:
        """[V] occurrences of each dictionary id in training, in encoder and decoder together.

        Pieces have the counts of the dictionary, written by ``moe-prepare``; ends and tags are counted from the
        directions, on the same scale.
        """
        text, entries = self.split("train"), self.dictionary
        counts = np.array(entries.count, dtype=np.float64)
        markers = [entries.eos(), *(entries.index(tag(language)) for language in self.folder.languages)]
        counts[: entries.nspecial] = 0.0
        counts[markers] = 0.0
        for direction in text.directions:
            for marker in (entries.eos(), direction.tags.first, direction.tags.source, direction.tags.target):
                if marker is not None:
                    counts[marker] += len(direction) / 2  # a sentence's pieces are counted once, and used on two sides
        return torch.from_numpy(counts)

    # --- validation -------------------------------------------------------------------------------------------------

    def evaluation_sets(self, split: str, max_items: int = 0) -> Mapping[str, Sequence[Indices]]:
        """Batches by direction, always the same, of the budget of tokens that training has.

        Sentences beyond the model's ``max_positions`` are left out, with a warning that counts them.
        """
        budget, limit = self.config.training.micro_batch_tokens, self.config.model.max_positions
        sets: dict[str, Sequence[Indices]] = {}
        for name, text in self._by_direction(split).items():
            kept = np.maximum(text.source_lengths, text.target_lengths) <= limit
            if not kept.all():
                _log.warning("%s %s: %d sentences of more than %d tokens left out", split, name, (~kept).sum(), limit)
            items = np.flatnonzero(kept)[: max_items or None]
            sets[name] = batch_by_length(items, text.source_lengths[items], text.target_lengths[items], budget)
        return sets

    def evaluation_sample(self, split: str, name: str, indices: Indices) -> Sample:
        """Rows of a batch of :meth:`evaluation_sets`."""
        return self._by_direction(split)[name].sample(indices)

    def _by_direction(self, split: str) -> dict[str, ParallelText]:
        """Each direction's sentences of a split, of directions that have some."""
        if split not in self._held_out:
            text = self.split(split)
            self._held_out[split] = {d.name: ParallelText([d], text.pad) for d in text.directions if len(d)}
        return self._held_out[split]

    # --- translating ------------------------------------------------------------------------------------------------

    def tags(self, direction: str) -> Tags:
        """The tags of the direction ``en-de``, for any two languages of the folder.

        Raises:
            DataError: not two languages of the folder.
        """
        return Tags.of(direction, self.config.task, self.folder.languages, self.dictionary)

    def source_room(self, direction: str) -> int:
        """Longest source in tokens, without tag and end; the rest of a longer one is cut off."""
        return self.config.model.max_positions - 1 - (self.tags(direction).source is not None)

    def decoder_prefix(self, direction: str) -> int:
        """The first token that a search starts from; it is not part of the hypothesis and has no score."""
        return self.tags(direction).first

    def encode_source(self, lines: Sequence[str], source: str, target: str) -> list[Tensor]:
        """Source sentences as the encoder sees them: [length] int64 each, tag and end included.

        Sentences longer than the model's ``max_positions`` lose their tail.
        """
        tokenizer, tags = self.folder.tokenizer(), self.tags(f"{source}-{target}")
        return [self._framed(tokenizer.encode(line), tags) for line in lines]

    def inference_sample(
        self, sentences: Sequence[Sequence[int] | Tensor], source: str, target: str, uids: Sequence[int]
    ) -> Sample:
        """A batch to translate.

        Args:
            sentences: dictionary ids of each source, without end and without tags.
            source, target: languages.
            uids: a number for each sentence, which random routing draws by.

        Returns:
            ``id``, ``nsentences`` and ``net_input``, whose ``prev_output_tokens`` [B, 1 or 2] a search starts from.
        """
        tags = self.tags(f"{source}-{target}")
        framed = [self._framed(ids.tolist() if isinstance(ids, Tensor) else ids, tags) for ids in sentences]
        rows = len(framed)
        longest = max((len(ids) for ids in framed), default=1)
        tokens = torch.full((rows, longest), self.dictionary.pad(), dtype=torch.int64)
        for row, ids in enumerate(framed):
            tokens[row, : len(ids)] = ids
        uid = torch.as_tensor(uids, dtype=torch.int64).reshape(rows)
        return {
            "id": uid,
            "nsentences": rows,
            "net_input": {
                "src_tokens": tokens,
                "src_lengths": torch.tensor([len(ids) for ids in framed], dtype=torch.int64),
                "prev_output_tokens": torch.tensor(tags.decoder_start, dtype=torch.int64).repeat(rows, 1),
                "sentence_uid": uid,
                "src_lang": torch.full((rows,), tags.source_language, dtype=torch.int64),
                "tgt_lang": torch.full((rows,), tags.target_language, dtype=torch.int64),
            },
        }

    def _framed(self, ids: Sequence[int], tags: Tags) -> Tensor:
        framed = tags.framed(ids, self.dictionary.eos(), self.config.model.max_positions)
        return torch.tensor(framed, dtype=torch.int64)

    def with_config(self, **changes: Any) -> None:
        """Replaces parts of the config before a model is built from it, for fairseq's command line."""
        self.config = dataclasses.replace(self.config, **changes)
        self.__dict__.pop("routing", None)

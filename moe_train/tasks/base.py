"""What the training loop asks of a task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import nn

from moe_train.data.batching import Indices, WorldBatches
from moe_train.data.folder import DataFolder
from moe_train.models.trainable import TrainableModel

# A batch in fairseq's form: "id" [B], "nsentences", "ntokens", "target" [B, T] and "net_input", which holds
# "src_tokens" [B, S], "src_lengths" [B], "prev_output_tokens" [B, T], "sentence_uid", "src_lang" and "tgt_lang" [B].
Sample = dict[str, Any]


class TrainingTask(Protocol):
    """A task as the loop sees it: batches of the world, samples of a rank, a model and a criterion."""

    @property
    def vocabulary(self) -> DataFolder | None:
        """The data folder whose pieces the model reads and writes; None for a model of something else."""

    @property
    def trained(self) -> tuple[str, ...]:
        """Directions or languages that are trained on, by the names of evaluation's sets.

        Others are zero-shot, and left out where sets are averaged. Empty: all sets count alike.
        """

    def check_data(self) -> None:
        """Raises DataError where there is nothing to train on or to validate with."""

    def build_model(self, layout: Any = None) -> TrainableModel:
        """The model as configured; ``layout`` says which experts this rank holds (None: all)."""

    def build_criterion(self) -> nn.Module:
        """``criterion(model, sample) -> (loss, sample_size, logging)`` with sums over the rank's target tokens."""

    def train_batches(self) -> WorldBatches:
        """The world's micro-batches of every update."""

    def train_sample(self, indices: Indices, update: int = 0) -> Sample:
        """A rank's rows of a micro-batch; no rows give tensors of shape [0, 1].

        Args:
            update: updates done so far, for what is drawn anew each time (masks, augmentation).
        """

    def validation_sets(self) -> Mapping[str, Sequence[Indices]]:
        """Validation micro-batches by name (a direction, for translation)."""

    def validation_sample(self, name: str, indices: Indices) -> Sample:
        """A rank's rows of a validation micro-batch."""

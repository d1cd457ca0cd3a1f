"""The interface of tasks: everything that training, validation, evaluation and the run folder ask of one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from moe_train.config import RunConfig
from moe_train.data.batching import PLAN_VERSION, Batches, Indices
from moe_train.data.folder import DataFolder
from moe_train.errors import DataError
from moe_train.models.trainable import TrainableModel
from moe_train.routing import RoutingConfig, routing_config
from moe_train.tasks.metric_registry import per_token

# A batch in fairseq's form: "id" [B], "nsentences", "ntokens", "target" [B, T] and "net_input", which holds
# "src_tokens" [B, S], "src_lengths" [B], "prev_output_tokens" [B, T], "sentence_uid", "src_lang" and "tgt_lang" [B].
# A sample may have the numbers "real_tokens", tokens of the source and of the decoder's input that are not padding, and
# "real_targets", of the target: the host then does not wait for the device to count them.
Sample = dict[str, Any]


class TrainingTask(ABC):
    """A task: batches of the world, samples of a rank, a model, a criterion, and the measures of held-out data.

    A task registered by :func:`moe_train.tasks.register_task` is built as ``Task(config, data)``.

    Attributes:
        config: of the run.
        unit: name of the items where each has one target, such as "images": log lines then have ``images_per_second``.
        trained: names of the held-out sets (directions or languages) that are trained on. Other sets are zero-shot and
            left out of averages over sets. Empty: all sets count alike.
        vocabulary: the data folder whose pieces the model reads and writes; None: the model has no vocabulary.
        plan_version: of the way in which batches are planned; that of a run which is resumed.
        directions: what a translating task translates, such as "en-de".
    """

    config: RunConfig
    unit: str | None = None
    plan_version: int = PLAN_VERSION

    @property
    def trained(self) -> tuple[str, ...]:
        """See the class."""
        return ()

    @property
    def vocabulary(self) -> DataFolder | None:
        """See the class."""
        return None

    @property
    def directions(self) -> tuple[str, ...]:
        """See the class."""
        return ()

    @cached_property
    def routing(self) -> RoutingConfig:
        """The routing strategy's config."""
        return routing_config(self.config.routing)

    def check_data(self) -> None:
        """Checks, before processes start, that there is something to train on and to validate with.

        Raises:
            DataError: there is not.
        """
        if not any(self.validation_sets().values()):
            raise DataError("there is nothing to validate with", self.config.data, "add a split 'valid'")

    # --- training ---------------------------------------------------------------------------------------------------

    @abstractmethod
    def build_model(self, layout: Any = None) -> TrainableModel:
        """The model as configured.

        Args:
            layout: :class:`moe_train.parallel.layout.ExpertLayout`, the experts that this rank holds; None: all.
        """

    @abstractmethod
    def build_criterion(self) -> nn.Module:
        """``criterion(model, sample) -> (loss, sample_size, logging)``, sums over the rank's target tokens.

        ``logging`` has ``loss``, ``nll_loss``, ``ntokens`` and ``nsentences``, further metrics
        (:mod:`moe_train.tasks.metric_registry`), and ``routing`` (layer → statistics) where the sample has
        ``world_ntokens``.
        """

    @abstractmethod
    def train_batches(self) -> Batches:
        """The world's micro-batches of every update."""

    @abstractmethod
    def train_sample(self, indices: Indices, update: int = 0) -> Sample:
        """A rank's rows of a micro-batch; without rows, tensors of shape [0, 1].

        Args:
            update: finished updates, for what each update draws (masks, augmentation).
        """

    # --- validation and evaluation ----------------------------------------------------------------------------------

    @abstractmethod
    def evaluation_sets(self, split: str, max_items: int = 0) -> Mapping[str, Sequence[Indices]]:
        """Batches of a held-out split, always the same, by the name of their set (a direction, a language).

        Args:
            max_items: at most this many items of each set, the first ones (0: all).

        Raises:
            DataError: there is no such split.
        """

    @abstractmethod
    def evaluation_sample(self, split: str, name: str, indices: Indices) -> Sample:
        """Rows of a batch of :meth:`evaluation_sets`."""

    def validation_sets(self) -> Mapping[str, Sequence[Indices]]:
        """Batches of the split ``valid``, the first ``training.validation.max_sentences`` items of each set."""
        return self.evaluation_sets("valid", self.config.training.validation.max_sentences)

    def validation_sample(self, name: str, indices: Indices) -> Sample:
        """Rows of a batch of :meth:`validation_sets`."""
        return self.evaluation_sample("valid", name, indices)

    def measures(self, sums: Mapping[str, float]) -> dict[str, Any]:
        """The measures of a set from the criterion's sums over it; ``sentences`` is among them."""
        return per_token(sums)

    def summary(self, sets: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """What the measures of all sets say together, for ``summary`` of ``<split>.json``."""
        return {}


class TranslatingTask(TrainingTask):
    """A task whose model writes text: ``moe-evaluate`` translates its ``directions``, ``moe-translate`` any text.

    Attributes:
        folder: the prepared data.
    """

    folder: DataFolder

    @property
    @abstractmethod
    def target_dictionary(self) -> Any:
        """fairseq's Dictionary of the target side."""

    @abstractmethod
    def inference_sample(
        self, sentences: Sequence[Sequence[int] | Tensor], source: str, target: str, uids: Sequence[int]
    ) -> Sample:
        """A batch to translate: ids without end and tags → ``net_input`` with ``prev_output_tokens`` [B, P]."""

    @abstractmethod
    def max_positions(self) -> tuple[int, int]:
        """Longest source and target in tokens."""

    @abstractmethod
    def source_room(self, direction: str) -> int:
        """Longest source in tokens, without tag and end; the rest of a longer one is cut off."""

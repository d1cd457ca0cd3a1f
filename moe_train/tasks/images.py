"""Image classification by a vision Transformer with experts (Soft MoE's task)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from moe_train.config import ImageConfig, RunConfig
from moe_train.data.batching import BatchSettings, Indices, WorldBatches
from moe_train.data.images import DIGITS, Images, ImageSet, open_images
from moe_train.errors import DataError
from moe_train.models.trainable import TrainableModel
from moe_train.models.vision import ImageShape, build_vision_model
from moe_train.tasks.augmentation import augment
from moe_train.tasks.base import Sample, TrainingTask
from moe_train.tasks.classification_criterion import ClassificationCriterion
from moe_train.tasks.registry import register_task


def _open(config: RunConfig) -> Images:
    assert isinstance(config.task, ImageConfig)
    return open_images(config.data, config.task)


@register_task("image_classification", _open, built_in=(DIGITS,))
class ImageTask(TrainingTask):
    """Images and their classes; an image is what a sentence is in translation.

    ``training.tokens_per_update`` counts images: each has one target, its label.
    """

    unit = "images"

    def __init__(self, config: RunConfig, data: Images) -> None:
        assert isinstance(config.task, ImageConfig)
        self.config, self.keys, self.data = config, config.task, data

    @property
    def shape(self) -> ImageShape:
        """Shape of every image, and the number of classes."""
        data = self.data
        return ImageShape(data.height, data.width, data.channels, len(data.classes))

    def check_data(self) -> None:
        """Checks that there are images to train on and to validate with.

        Raises:
            DataError: there are none.
        """
        for split in ("train", "valid"):
            if not len(self.data.splits[split]):
                raise DataError(f"the split '{split}' has no images", str(self.data.path), "give some")

    def build_model(self, layout: Any = None) -> TrainableModel:
        """The model of the config; ``layout``: the experts that this rank holds (None: all)."""
        return build_vision_model(self.config.model, self.routing, self.shape, seed=self.config.seed, layout=layout)

    def build_criterion(self) -> nn.Module:
        """Cross-entropy with the routing losses."""
        return ClassificationCriterion(
            len(self.data.classes),
            label_smoothing=self.config.training.label_smoothing,
            passes=self.routing.passes,
            consistency_weight=self.routing.consistency_weight,
        )

    def train_batches(self) -> WorldBatches:
        """Micro-batches of the world, drawn by (seed, update); every image once an epoch."""
        training, ones = self.config.training, np.ones(len(self.data.splits["train"]), np.int64)
        settings = BatchSettings(training.tokens_per_update, training.accumulation, seed=self.config.seed)
        return WorldBatches(ones, ones, [len(ones)], settings, ["train"])

    def train_sample(self, indices: Indices, update: int = 0) -> Sample:
        """A rank's rows of a training micro-batch, augmented."""
        return self._sample(self.data.splits["train"], indices, update)

    def evaluation_sets(self, split: str, max_items: int = 0) -> Mapping[str, Sequence[Indices]]:
        """Batches of a held-out split, always the same.

        Raises:
            DataError: there is no such split.
        """
        if split not in self.data.splits:
            known = ", ".join(self.data.splits)
            raise DataError(f"the images have no split '{split}'", str(self.data.path), f"it has: {known}")
        items = np.arange(len(self.data.splits[split]))[: max_items or None]
        size = self.config.training.micro_batch_tokens
        return {split: np.split(items, range(size, len(items), size))}

    def evaluation_sample(self, split: str, name: str, indices: Indices) -> Sample:
        """Rows of a batch of :meth:`evaluation_sets`."""
        return self._sample(self.data.splits[split], indices, None)

    def _sample(self, images: ImageSet, indices: Indices, update: int | None) -> Sample:
        indices = np.asarray(indices, np.int64)
        uids = images.uids(indices)
        shape = (0, self.data.height, self.data.width, self.data.channels)
        pixels = images.read(indices) if len(indices) else np.empty(shape, np.uint8)
        if update is not None:
            pixels = augment(pixels, uids, self.config.seed, update, self.keys.flip, self.keys.shift)
        return {
            "id": torch.from_numpy(indices),
            "nsentences": len(indices),
            "ntokens": len(indices),
            "target": torch.from_numpy(images.labels[indices]),
            "net_input": {"images": torch.from_numpy(pixels), "sentence_uid": torch.from_numpy(uids)},
        }

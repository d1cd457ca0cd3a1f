"""Cross-entropy over classes of images or texts, with the routing losses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moe_train.kernels.cross_entropy import label_smoothed_nll
from moe_train.tasks.base import Sample
from moe_train.tasks.criterion import known_counts, repeat_batch, symmetric_divergence, unwrap, with_routing_losses


class ClassificationCriterion(nn.Module):
    """Sums over the rank's items, one target each; see :mod:`moe_train.tasks.criterion` for the routing losses.

    Args:
        num_classes: C.
        label_smoothing: ε.
        passes: forward passes over a training batch (1 or 2: THOR, R-Drop).
        consistency_weight: α of the divergence between two passes.
        per_class: at evaluation, count hits, guesses and items of each class (for F1).
    """

    def __init__(
        self,
        num_classes: int,
        label_smoothing: float = 0.0,
        passes: int = 1,
        consistency_weight: float = 0.0,
        per_class: bool = False,
    ) -> None:
        super().__init__()
        self.num_classes, self.label_smoothing = num_classes, label_smoothing
        self.passes, self.consistency_weight, self.per_class = passes, consistency_weight, per_class

    def forward(self, model: nn.Module, sample: Sample) -> tuple[Tensor, int, dict[str, Any]]:
        """The loss of a sample whose ``target`` is [B].

        Returns:
            The summed loss; the items to divide by; and sums for the log, among them ``accuracy`` (items whose best
            class is the right one).
        """
        passes = self.passes if model.training else 1
        logits, extra = model(
            **repeat_batch(sample["net_input"], passes), **known_counts(unwrap(model), sample, passes)
        )
        target = sample["target"].repeat(passes)
        loss, nll = label_smoothed_nll(logits, target, self.label_smoothing)
        parts: dict[str, Any] = {"nll_loss": nll.detach() / passes}
        if passes > 1 and self.consistency_weight:
            consistency = symmetric_divergence(*logits.chunk(2))
            loss = loss + self.consistency_weight * consistency
            parts["consistency_loss"] = consistency.detach()
        guesses = logits.detach().argmax(1)
        parts["accuracy"] = (guesses == target).sum() / passes
        if self.per_class and not model.training:
            parts |= count_classes(guesses, target, self.num_classes)
        return with_routing_losses(loss, parts, extra["routing"], sample, model.training)


def count_classes(guesses: Tensor, target: Tensor, num_classes: int) -> dict[str, Tensor]:
    """``class/<c>/hits``, ``/guesses`` and ``/items`` of guesses and targets [B]."""

    def counted(labels: Tensor) -> Tensor:
        return torch.bincount(labels, minlength=num_classes)

    columns = {"hits": counted(target[guesses == target]), "guesses": counted(guesses), "items": counted(target)}
    return {f"class/{c}/{name}": counts[c] for name, counts in columns.items() for c in range(num_classes)}


def macro_f1(sums: dict[str, float], num_classes: int) -> float:
    """The mean over classes of F1 = 2 · hits / (guesses + items), from what :func:`count_classes` counts.

    A class without items and guesses is left out of the mean.
    """
    scores = []
    for c in range(num_classes):
        hits, guesses, items = (sums[f"class/{c}/{name}"] for name in ("hits", "guesses", "items"))
        if guesses + items:
            scores.append(2.0 * hits / (guesses + items))
    return sum(scores) / len(scores) if scores else 0.0

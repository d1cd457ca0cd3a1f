"""Label-smoothed cross-entropy with the routing losses, and with the consistency of two passes (THOR).

The cross-entropy is a sum over this rank's target tokens; the training step divides by the target tokens of the update.

    loss = Σ_tokens CE + Σ_names (mean over layers of value · weight) · world_ntokens

``value`` is the router's share: this rank's part of a routing loss, so the sum over ranks is the loss of the
micro-batch of all ranks. Over an update the routing loss is the mean over micro-batches, weighted by their target
tokens. It is the same for any number of ranks, and each micro-batch is counted once.

With two passes (THOR, Zuo et al. 2022; with one expert this is R-Drop) the batch goes through the model twice in one
forward:

    Σ_tokens CE_1 + CE_2 + α · CR,    CR = ½ Σ_v (p_1 - p_2)(log p_1 - log p_2)

with gradients through both passes. As in THOR's code both cross-entropies are divided by the tokens of *one* pass, so
the loss is about twice that of one pass; ``nll_loss`` is the mean of the passes and stays comparable. Evaluation takes
one pass, without routing losses in the loss, so that strategies can be compared by it.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moe_train.fairseq_compat import apply
from moe_train.kernels.cross_entropy import fused_label_smoothed_nll, label_smoothed_nll
from moe_train.layers import RoutingRecord
from moe_train.layers.batch_context import indices_of
from moe_train.routing.types import AuxiliaryLoss
from moe_train.tasks.base import Sample
from moe_train.tasks.flags import MoECriterionFlags
from moe_train.tasks.metric_registry import COUNTS, reduction

apply()
from fairseq import metrics  # noqa: E402
from fairseq.criterions import FairseqCriterion, register_criterion  # noqa: E402


@register_criterion("moe_label_smoothed_cross_entropy", dataclass=MoECriterionFlags)
class MoELabelSmoothedCrossEntropy(FairseqCriterion):  # type: ignore[misc]
    """The criterion of translation with experts.

    Args:
        task: gives the padding index.
        label_smoothing: ε of the smoothed target, 1 - ε for the right word and ε / (V - 1) for each other.
        passes: forward passes over a training batch (1 or 2).
        consistency_weight: α; needs two passes.
    """

    def __init__(
        self, task: Any, label_smoothing: float = 0.1, passes: int = 1, consistency_weight: float = 0.0
    ) -> None:
        super().__init__(task)
        self.padding_idx: int = task.target_dictionary.pad()
        self.label_smoothing, self.passes, self.consistency_weight = label_smoothing, passes, consistency_weight

    @classmethod
    def build_criterion(cls, cfg: Any, task: Any) -> MoELabelSmoothedCrossEntropy:
        """The criterion of a task, for our tasks and fairseq's command line.

        Args:
            cfg: has ``label_smoothing``.
            task: has ``routing`` and ``target_dictionary``; fairseq's has them when it has built the model.
        """
        return cls(task, cfg.label_smoothing, task.routing.passes, task.routing.consistency_weight)

    def forward(self, model: nn.Module, sample: Sample, reduce: bool = True) -> tuple[Tensor, int, dict[str, Any]]:
        """The loss of a sample.

        Args:
            model: takes ``net_input`` and ``features_only``; possibly wrapped (DDP).
            reduce: ignored; fairseq's signature.
            sample: as :mod:`moe_train.tasks.base` says; ``world_ntokens`` where several ranks share the micro-batch.

        Returns:
            The summed loss; the tokens to divide by; and sums for the log: ``loss``, ``nll_loss``, ``ntokens``,
            ``nsentences``, each routing loss times the target tokens, and in moe-train's loop ``routing``,
            the statistics of each sparse layer.
        """
        passes, inner = self.passes if model.training else 1, unwrap(model)
        known = known_counts(inner, sample, passes)
        features, extra = model(**repeat_batch(sample["net_input"], passes), **known, features_only=True)
        count = passes * sample["real_targets"] if "real_targets" in sample else None
        target = sample["target"].repeat(passes, 1)
        if (rows := extra.get("rows")) is not None:  # features of real tokens only
            target = target.view(-1).index_select(0, rows)
        features, target = non_padding_rows(features, target, self.padding_idx, count)
        parts = self._cross_entropy(inner, features, target, passes)
        return with_routing_losses(parts.pop("loss"), parts, extra["routing"], sample, model.training)

    def _cross_entropy(self, model: nn.Module, features: Tensor, target: Tensor, passes: int) -> dict[str, Tensor]:
        """``loss`` with its graph, and the detached sums ``nll_loss`` and, with two passes, ``consistency_loss``."""
        if passes == 1 or not self.consistency_weight:
            loss, nll = fused_label_smoothed_nll(features, model.output_weight, target, self.label_smoothing)  # type: ignore[arg-type]
            return {"loss": loss, "nll_loss": nll.detach() / passes}
        logits = model.output_layer(features)  # type: ignore[operator]
        loss, nll = label_smoothed_nll(logits, target, self.label_smoothing)
        consistency = symmetric_divergence(*logits.chunk(2))
        loss = loss + self.consistency_weight * consistency
        return {"loss": loss, "nll_loss": nll.detach() / passes, "consistency_loss": consistency.detach()}

    @classmethod
    def reduce_metrics(cls, logging_outputs: list[dict[str, Any]]) -> None:
        """For fairseq's command lines: ``loss`` and ``nll_loss`` per token to base 2 as in its own criterions."""
        totals: dict[str, float] = defaultdict(float)
        for output in logging_outputs:
            for name, value in output.items():
                if name != "routing" and reduction(name) == "max":
                    totals[name] = max(totals.get(name, -math.inf), float(value))
                elif name != "routing":
                    totals[name] += float(value)
        tokens = max(totals["ntokens"], 1.0)
        for name in ("loss", "nll_loss"):
            metrics.log_scalar(name, totals[name] / tokens / math.log(2), tokens, round=3)
        metrics.log_derived("ppl", lambda meters: round(2.0 ** min(meters["nll_loss"].avg, 100.0), 2))
        for name in totals.keys() - {*COUNTS, "loss", "nll_loss"}:
            value = totals[name] / tokens if reduction(name) == "mean" else totals[name]
            metrics.log_scalar(name, value, tokens, round=4)

    @staticmethod
    def logging_outputs_can_be_summed() -> bool:
        """True: all are sums (statistics of layers are logged in moe-train's loop only)."""
        return True


def with_routing_losses(
    loss: Tensor, further_sums: Mapping[str, Any], routing: Sequence[RoutingRecord], sample: Sample, training: bool
) -> tuple[Tensor, int, dict[str, Any]]:
    """A criterion's result: the loss, with the routing losses in training; the target tokens; the logging output.

    Args:
        loss: of the task, summed over this rank's target tokens.
        further_sums: for the log.
        routing: of each sparse layer.
    """
    losses = mean_over_layers(routing)
    tokens: Any = sample.get("world_ntokens", sample["ntokens"])
    if training:
        loss = loss + sum(average.weighted_mean for average in losses.values()) * tokens
    logged: dict[str, Any] = {
        "loss": loss.detach(),
        "ntokens": sample["ntokens"],
        "nsentences": sample["nsentences"],
        "sample_size": sample["ntokens"],
        **further_sums,
        **{name: average.mean.detach() * tokens for name, average in losses.items()},
    }
    if "world_ntokens" in sample:
        logged["routing"] = {record.layer: record.statistics for record in routing}
    return loss, sample["ntokens"], logged


@dataclass(frozen=True)
class LayerMean:
    """A routing loss averaged over the layers that have it: plain, and times its weight."""

    mean: Tensor
    weighted_mean: Tensor


def mean_over_layers(records: Iterable[RoutingRecord]) -> dict[str, LayerMean]:
    """The routing losses of a forward pass by name."""
    by_name: dict[str, list[AuxiliaryLoss]] = defaultdict(list)
    for record in records:
        for name, loss in record.losses.items():
            by_name[name].append(loss)
    return {name: _mean(by_name[name]) for name in sorted(by_name)}


def _mean(losses: Sequence[AuxiliaryLoss]) -> LayerMean:
    values = torch.stack([loss.value for loss in losses])
    weighted = torch.stack([loss.value * loss.weight for loss in losses])
    return LayerMean(values.mean(), weighted.mean())


def symmetric_divergence(logits_1: Tensor, logits_2: Tensor) -> Tensor:
    """½ [KL(p1‖p2) + KL(p2‖p1)] summed over rows, of logits [N, V] each; in fp32 or wider, differentiable by both."""
    dtype = torch.promote_types(logits_1.dtype, torch.float32)
    log_1, log_2 = (torch.log_softmax(logits, dim=-1, dtype=dtype) for logits in (logits_1, logits_2))
    return 0.5 * ((log_1.exp() - log_2.exp()) * (log_1 - log_2)).sum()


def repeat_batch(net_input: Mapping[str, Tensor], passes: int) -> dict[str, Tensor]:
    """The batch repeated ``passes`` times; ``pass_index`` [passes · B] numbers the copies."""
    if passes == 1:
        return dict(net_input)
    copies = {name: torch.cat([value] * passes) for name, value in net_input.items()}
    first = next(iter(net_input.values()))  # every tensor has a row per sentence
    index = torch.arange(passes, device=first.device)
    return {**copies, "pass_index": index.repeat_interleave(first.shape[0])}


def known_counts(model: nn.Module, sample: Sample, passes: int) -> dict[str, list[int]]:
    """The argument ``real_tokens`` of a model that takes it, for a sample that has it."""
    if not getattr(model, "takes_real_tokens", False) or "real_tokens" not in sample:
        return {}
    return {"real_tokens": [passes * count for count in sample["real_tokens"]]}


def non_padding_rows(features: Tensor, target: Tensor, pad: int, count: int | None = None) -> tuple[Tensor, Tensor]:
    """features [.., d] and target [..] → the rows of real tokens, [N, d] and [N]; ``count`` is N, if known."""
    flat, target = features.reshape(-1, features.shape[-1]), target.reshape(-1)
    rows = indices_of(target.ne(pad), count)
    if rows.numel() == target.numel():
        return flat, target
    return flat.index_select(0, rows), target.index_select(0, rows)


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DDP and its like."""
    while isinstance(getattr(model, "module", None), nn.Module):
        model = model.module  # type: ignore[assignment]
    return model

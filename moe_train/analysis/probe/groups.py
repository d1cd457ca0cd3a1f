"""Load per expert and language, and requested capacity per token, language and layer.

- *Load* of expert e in group g: processed (token, expert) pairs over those of the group. *Utilisation* is load times E:
  1 is ideal, 0 is dead.
- *Specialisation*: I(group; expert) / H(group) of pairs, 0 where all groups use experts equally and 1 where the expert
  determines the group.
- *Requested capacity* (SMoE, Xu et al., 2023, §5): the number of experts, that is passes, of a token in one block,
  averaged over tokens and then over the blocks of the encoder or decoder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

_TINY = torch.finfo(torch.float64).tiny


def pairs_by_group(experts: Tensor, groups: Tensor, num_experts: int, num_groups: int) -> Tensor:
    """[G, E] int64 counts of pairs.

    Args:
        experts: [P] expert of each pair.
        groups: [P] group of each pair's token (such as its language), in 0 .. G - 1.
    """
    pairs = torch.bincount(groups * num_experts + experts, minlength=num_groups * num_experts)
    return pairs.view(num_groups, num_experts)


def load_by_group(counts: Tensor) -> Tensor:
    """[G, E] fp64 fractions of counts [G, E]; zeros for a group without pairs."""
    counts = counts.double()
    return counts / counts.sum(1, keepdim=True).clamp(min=1.0)


def specialisation(counts: Tensor) -> float:
    """I(group; expert) / H(group) of counts [G, E]; 0 for one group."""
    joint = counts.double() / counts.double().sum().clamp(min=_TINY)
    groups, experts = joint.sum(1, keepdim=True), joint.sum(0, keepdim=True)
    information = (joint * (joint.clamp(min=_TINY) / (groups * experts).clamp(min=_TINY)).log()).sum()
    entropy = torch.special.entr(groups).sum()
    return float(information / entropy) if float(entropy) > 0 else 0.0


def load_statistics(load: Tensor) -> dict[str, float]:
    """Of load [E] (counts or fractions): ``max_over_mean``, ``variation`` (deviation over mean), ``dead`` experts."""
    load = load.double()
    mean = load.mean().clamp(min=_TINY)
    deviation = load.std(unbiased=False)
    return {
        "max_over_mean": float(load.max() / mean),
        "variation": float(deviation / mean),
        "dead": float((load == 0).sum()),
    }


def mean_by_label(values: Tensor, labels: Tensor) -> dict[int, float]:
    """The mean of values [T] for each label [T]: requested capacity by vocabulary id, or by language."""
    names, members = torch.unique(labels, return_inverse=True)
    sums = torch.zeros(len(names), dtype=torch.float64).index_add_(0, members, values.double())
    counts = torch.bincount(members, minlength=len(names))
    return {int(name): float(total / count) for name, total, count in zip(names, sums, counts, strict=True)}


def requested_capacity_by_layer(passes: Mapping[int, Tensor], layers: Sequence[int]) -> float:
    """The mean over blocks of their tokens' mean passes; ``passes``: block → [T], ``layers``: such as an encoder's.

    Raises:
        ValueError: ``layers`` is empty.
    """
    if not layers:
        raise ValueError("requested capacity is the mean over at least one block")
    return sum(float(passes[layer].double().mean()) for layer in layers) / len(layers)

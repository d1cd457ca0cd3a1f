"""Log-probabilities of given translations, in one forward pass with the translation as the decoder's input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from moe_train.evaluation.search.beam_search import SpecialSymbols


def padded(rows: Sequence[Sequence[int]], pad: int, device: torch.device | str = "cpu") -> Tensor:
    """[N, longest] int64 of the rows, padded on the right."""
    longest = max((len(row) for row in rows), default=1)
    filled = [[*row, *[pad] * (longest - len(row))] for row in rows]
    return torch.tensor(filled, dtype=torch.int64, device=device).view(len(rows), longest)


def with_target(net_input: Mapping[str, Any], targets: Sequence[Sequence[int]], pad: int) -> dict[str, Any]:
    """The model's input, whose ``prev_output_tokens`` continue with the targets' ids (without tag and end)."""
    start = net_input["prev_output_tokens"]
    return {**net_input, "prev_output_tokens": torch.cat((start, padded(targets, pad, start.device)), dim=1)}


@torch.no_grad()
def token_log_probabilities(
    model: Any, net_input: Mapping[str, Any], targets: Sequence[Sequence[int]], dictionary: SpecialSymbols
) -> list[list[float]]:
    """log p of each token of each target and of the end symbol after it, in nats.

    Args:
        model: in eval mode; called as in training, with the target as ``prev_output_tokens``.
        net_input: as for a search.
        targets: ids of each sentence's translation, without tag and end.
    """
    pad, eos = dictionary.pad(), dictionary.eos()
    first = net_input["prev_output_tokens"].shape[1] - 1
    logits = model(**with_target(net_input, targets, pad))[0][:, first:].float()
    labels = padded([[*target, eos] for target in targets], pad, logits.device)
    if not targets:  # a rank without sentences took part in the forward pass
        return []
    found = logits.gather(2, labels.unsqueeze(2)).squeeze(2) - logits.logsumexp(2)
    return [row[: len(target) + 1] for row, target in zip(found.tolist(), targets, strict=True)]

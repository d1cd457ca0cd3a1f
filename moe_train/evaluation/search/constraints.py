"""What may follow in a hypothesis: no repeated n-grams, and forced tokens. Shapes: N hypotheses, V symbols."""

from __future__ import annotations

import torch
from torch import Tensor


def block_repeats(log_probs: Tensor, tokens: Tensor, size: int) -> None:
    """Forbids symbols that would complete an n-gram that the hypothesis has already.

    fairseq's rule (``no_repeat_ngram_size``), as its CUDA kernel has it: the Python of 0.12.2 compares with the end of
    its buffer and blocks nothing.

    Args:
        log_probs: [N, V], overwritten.
        tokens: [N, t] of the hypotheses so far.
        size: n.
    """
    length = tokens.shape[1]
    if length < size:
        return
    following = tokens[:, size - 1 :]
    repeats = torch.ones_like(following, dtype=torch.bool)
    for i in range(size - 1):
        repeats &= tokens[:, i : length - size + 1 + i] == tokens[:, length - size + 1 + i, None]
    log_probs.scatter_add_(
        1, following, torch.zeros_like(following, dtype=log_probs.dtype).masked_fill_(repeats, -torch.inf)
    )


def only_forced(log_probs: Tensor, tokens: Tensor, chosen: Tensor, forced: Tensor) -> None:
    """Leaves one symbol to the hypotheses whose next one is forced.

    Args:
        log_probs: [N, V], overwritten.
        tokens: [N, 1], the symbols.
        chosen: [N, 1], their log-probabilities.
        forced: [N, 1] bool.
    """
    kept = torch.where(forced, chosen, log_probs.gather(1, tokens))
    log_probs.masked_fill_(forced, -torch.inf).scatter_(1, tokens, kept)

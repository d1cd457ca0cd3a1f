"""Writes sentences in fairseq's memory-mapped format: pieces and end symbol, without tags."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from moe_train.data.text.tokenizer import EOS, Tokenizer
from moe_train.fairseq_compat import apply
from moe_train.utils.process_map import blocks

if TYPE_CHECKING:
    from torch import Tensor

_BATCH = 20_000


def binarise(
    lines: Iterable[str],
    prefix: Path,
    tokenizer: Tokenizer,
    vocabulary: int,
    threads: int = 1,
    advance: Callable[[int], None] = lambda n: None,
) -> tuple[int, np.ndarray]:
    """Writes ``prefix.bin`` and ``prefix.idx``.

    Args:
        vocabulary: entries of the dictionary; determines the integer type of the file.
        threads: native threads that encode; the result does not depend on them.
        advance: called with the number of sentences done since the last call.

    Returns:
        The number of sentences, and how often each SentencePiece piece occurred, shape [pieces].
    """
    apply()  # here, so that user errors are reported before torch and fairseq are imported
    from fairseq.data.indexed_dataset import MMapIndexedDatasetBuilder, best_fitting_int_dtype

    builder = MMapIndexedDatasetBuilder(f"{prefix}.bin", best_fitting_int_dtype(vocabulary))
    counts = np.zeros(len(tokenizer), dtype=np.int64)
    sentences = 0
    for batch in blocks(lines, _BATCH, len):
        encoded = tokenizer.encode_batch(batch, threads)
        flat = np.fromiter(chain.from_iterable(encoded), dtype=np.int64)
        counts += np.bincount(flat, minlength=len(counts))
        for ids in _with_end(tokenizer.to_ids(flat), encoded):
            builder.add_item(ids)
        sentences += len(batch)
        advance(len(batch))
    builder.finalize(f"{prefix}.idx")
    return sentences, counts


def _with_end(flat: np.ndarray, encoded: list[list[int]]) -> tuple[Tensor, ...]:
    """Splits ids [pieces] of a batch into sentences and appends the end symbol to each."""
    import torch

    sizes = np.array([len(pieces) for pieces in encoded], dtype=np.int64)
    ends = np.cumsum(sizes)
    whole = torch.from_numpy(np.insert(flat, ends, EOS))
    return torch.split(whole, (sizes + 1).tolist())

"""A stand-in for torch's attention over packed rows, which has no kernel for CPUs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_train.kernels.varlen import VarlenAttention


def attend_by_sentence(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    window_size: tuple[int, int],
) -> Tensor:
    """As ``varlen_attn``: one product per sequence. Queries without keys get 0, as with a mask that hides all."""
    assert window_size in ((-1, -1), (-1, 0))
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert query.shape[0] == int(cu_seq_q[-1]) and key.shape[0] == int(cu_seq_k[-1]), "a row is in no sequence"
    queries, keys = cu_seq_q.diff().tolist(), cu_seq_k.diff().tolist()
    assert max(queries) <= max_q and max(keys) <= max_k
    parts = []
    for q, k, v in zip(query.split(queries), key.split(keys), value.split(keys), strict=True):
        heads = (rows.transpose(0, 1).unsqueeze(0) for rows in (q, k, v))
        attended = F.scaled_dot_product_attention(*heads, is_causal=window_size[1] == 0)
        parts.append(attended.squeeze(0).transpose(0, 1) if len(k) else torch.zeros_like(q))
    return torch.cat(parts)


BY_SENTENCE = VarlenAttention(attend_by_sentence, (torch.float32, torch.float64))

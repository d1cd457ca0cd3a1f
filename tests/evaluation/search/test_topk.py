"""The best continuations, against a plain topk over everything."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_train.evaluation.search.topk import best_candidates, log_probabilities


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 4),
    st.integers(1, 5),
    st.sampled_from([5, 64, 511, 512, 513, 576, 700, 1000]),
    st.integers(0, 10_000),
    st.booleans(),
)
def test_same_as_topk_over_all_beams(sentences: int, beams: int, vocabulary: int, seed: int, dead: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    log_probs = torch.randn(sentences * beams, vocabulary, generator=generator)
    scores = torch.randn(sentences, beams, generator=generator)
    if dead:
        scores[:, 1:] = -torch.inf
        log_probs[:, ::3] = -torch.inf
    count = min(2 * beams, beams * vocabulary)
    total = log_probs.view(sentences, beams, vocabulary) + scores.unsqueeze(-1)
    expected = total.view(sentences, -1).topk(count, dim=1).values
    found = best_candidates(log_probs, scores, 2 * beams)
    torch.testing.assert_close(found.score, expected, rtol=0, atol=0)
    index = torch.arange(sentences).unsqueeze(1)
    torch.testing.assert_close(total[index, found.beam, found.token], expected, rtol=0, atol=0)
    number = (found.beam * vocabulary + found.token).masked_fill(expected == -torch.inf, -1)
    distinct = [len(set(row) - {-1}) for row in number.tolist()]
    assert distinct == (expected > -torch.inf).sum(1).tolist(), "a continuation was listed twice"


def test_a_number_that_is_none_comes_first() -> None:
    log_probs = torch.zeros(2, 1000)
    log_probs[1, 987] = torch.nan
    found = best_candidates(log_probs, torch.zeros(2, 1), 2)
    assert not found.score[0].isnan().any()
    assert found.score[1, 0].isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_log_probabilities_are_fp32(dtype: torch.dtype) -> None:
    logits = torch.randn(3, 40).to(dtype)
    expected = logits.double().log_softmax(-1)
    found = log_probabilities(logits)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-5)

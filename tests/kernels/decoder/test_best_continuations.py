"""The best continuations by the C kernel, against a plain topk over masked log-probabilities."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_train.kernels.cpu import thread_pool
from moe_train.kernels.decoder.best_continuations import Choice, is_supported, search

pytestmark = pytest.mark.skipif(not is_supported(torch.zeros(1)), reason="no matrix units (AMX) here, or no C compiler")
PAD, EOS, UNK = 1, 2, 3


@given(
    st.integers(0, 5),
    st.integers(1, 5),
    st.sampled_from([5, 16, 63, 64, 65, 700]),
    st.integers(0, 999),
    st.booleans(),
    st.booleans(),
    st.sampled_from([0.0, 2.0]),
)
def test_same_as_topk(
    sentences: int, beam: int, vocabulary: int, seed: int, dead: bool, may_end: bool, penalty: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(sentences * beam, vocabulary, generator=generator)
    scores = torch.randn(sentences, beam, generator=generator)
    must_end = torch.rand(sentences, generator=generator) < 0.3
    if dead:
        scores[:, 1:] = -torch.inf
    log_probs = logits.double().log_softmax(1)
    log_probs[:, PAD] = -torch.inf
    log_probs[:, UNK] -= penalty
    if not may_end:
        log_probs[:, EOS] = -torch.inf
    ends = log_probs[:, EOS].clone()
    log_probs[must_end.repeat_interleave(beam)] = -torch.inf
    log_probs[:, EOS] = ends
    total = log_probs.view(sentences, beam, vocabulary) + scores.double().unsqueeze(-1)
    count = 2 * beam
    wanted = total.flatten(1).topk(min(count, beam * vocabulary), dim=1).values
    choice = Choice(vocabulary, beam, count, PAD, UNK, EOS, penalty, may_end)
    score, token, rank, finite = search(logits, scores, must_end, choice)
    assert finite
    torch.testing.assert_close(score.double()[:, : wanted.shape[1]], wanted, rtol=0, atol=2e-5)
    real = score > -torch.inf
    index = torch.arange(sentences).unsqueeze(1)
    torch.testing.assert_close(total[index, rank, token][real], score.double()[real], rtol=0, atol=2e-5)
    distinct = [len(set(row) - {-1}) for row in (rank * vocabulary + token).masked_fill(~real, -1).tolist()]
    assert distinct == real.sum(1).tolist(), "a continuation was listed twice"
    assert (token[~real] == PAD).all()


@pytest.mark.parametrize("threads", [1, 3])
def test_numbers_that_are_none_are_found(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thread_pool, "_MIN_PARALLEL_FLOPS", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    choice = Choice(100, 2, 4, PAD, UNK, EOS, 0.0, True)
    for value, finite in ((0.0, True), (torch.nan, False), (torch.inf, False), (-torch.inf, True)):
        logits = torch.zeros(8, 100)
        logits[5, 77] = value
        assert search(logits, torch.zeros(4, 2), None, choice)[3] == finite

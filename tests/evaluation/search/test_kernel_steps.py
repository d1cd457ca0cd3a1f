"""Steps of a search by C kernels give what torch's operators give."""

from __future__ import annotations

import pytest
import torch

from moe_train.config import SearchConfig
from moe_train.evaluation.search import beam_search
from moe_train.evaluation.search.beam_search import BeamSearch
from moe_train.kernels.decoder.best_continuations import is_supported
from tests.evaluation.recurrent import Recurrent


@pytest.mark.skipif(not is_supported(torch.zeros(1)), reason="no matrix units (AMX) here, or no C compiler")
@pytest.mark.parametrize("symbols", [6, 40, 900])  # with 6 too few symbols continue
@pytest.mark.parametrize("beam", [1, 2, 5])
@pytest.mark.parametrize("keys", [{}, {"length_penalty": 0.4, "min_length": 5, "unk_penalty": -2.0}])
def test_same_as_torch(symbols: int, beam: int, keys: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(3):
        model = Recurrent(symbols, eos_bias=seed - 1.0, seed=seed)
        search = BeamSearch(model, model.words, SearchConfig(beam=beam, max_length_offset=3, **keys))  # type: ignore[arg-type]
        given = model.sample([9, 4, 7, 7, 12, 3], seed)
        found = search(given)
        with monkeypatch.context() as patched:
            patched.setattr(beam_search, "is_supported", lambda _: False)
            wanted = search(given)
        assert torch.equal(found.lengths, wanted.lengths)
        assert torch.equal(found.tokens, wanted.tokens)
        torch.testing.assert_close(found.scores, wanted.scores, rtol=1e-5, atol=1e-5)

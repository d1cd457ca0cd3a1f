"""THOR with its experts divided over four ranks: the draws and counts of one process, and ranks that stay busy."""

from __future__ import annotations

import pytest
import torch

from tests.distributed.world import Worlds
from tests.layers.rank_jobs import LENGTH, SENTENCES, two_passes

EXPERTS, RANKS = 8, 4
PAIRS = 2 * RANKS * SENTENCES * LENGTH


@pytest.mark.parametrize("draw", ["token", "sentence", "batch"])
def test_draws_are_those_of_one_process_and_ranks_stay_balanced(worlds: Worlds, draw: str) -> None:
    routing = {"name": "thor", "num_experts": EXPERTS, "draw": draw}
    found = worlds(RANKS).run(two_passes, routing)
    for rank, spread in enumerate(found):
        alone = two_passes(routing, rank)
        assert torch.equal(spread.load, alone.load)
        for uid, expert in alone.expert.items():
            assert torch.equal(spread.expert[uid], expert)
            assert (expert[0] != expert[1]).all(), "the two passes have different experts"
    load = torch.stack([spread.load for spread in found]).sum(0)
    rows = torch.tensor([spread.rows for spread in found])
    assert int(load.sum()) == int(rows.sum()) == PAIRS
    assert torch.equal(rows, load.view(RANKS, -1).sum(1)), "a rank carries out what its experts were drawn for"
    if draw == "batch":  # what is warned of: one expert, and so one rank, for all tokens of a pass
        assert int(load.count_nonzero()) == 2 and int(rows.max()) >= PAIRS // 2
        return
    draws = PAIRS if draw == "token" else 2 * RANKS * SENTENCES
    deviation = (draws * (1 / RANKS) * (1 - 1 / RANKS)) ** 0.5 * PAIRS / draws
    assert (rows - PAIRS / RANKS).abs().max() < 4 * deviation
    assert rows.max() < (1.1 if draw == "token" else 1.4) * PAIRS / RANKS

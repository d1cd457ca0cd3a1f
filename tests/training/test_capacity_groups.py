"""What is counted within a rank (capacity, choice over a batch), against one process that emulates those groups.

The process takes the ranks' shares one after the other, as micro-batches of their own. Balance losses look at all ranks
and are off here; they are held elsewhere.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from moe_train.data.folder import DataFolder
from tests.distributed.world import Worlds
from tests.training.parity_jobs import Case, compare, train, train_all
from tests.training.test_parity import updates

TIGHT: dict[str, Any] = {"num_experts": 8, "capacity_factor": 0.7, "balance_weight": 0.0}
STRATEGIES: dict[str, dict[str, Any]] = {
    "switch": {"name": "switch", **TIGHT},
    "top_k, prioritised": {"name": "top_k", **TIGHT, "batch_prioritised": True},
    "sam, both capacities": {
        "name": "sam", "num_groups": 4, "group_capacity_factor": 0.9, "group_balance_weight": 0.0,
        "alignment_weight": 0.0, **TIGHT,
    },
    "expert choice over the batch": {
        "name": "expert_choice", "num_experts": 8, "scope": "batch", "decoder": {"name": "hash", "num_experts": 8},
    },
}  # fmt: skip
LAYOUTS: dict[int, dict[str, Any]] = {2: {"expert_parallel": 2}, 4: {"expert_parallel": 2}}


def case(name: str, group: str, **changes: Any) -> Case:
    return Case({**STRATEGIES[name], "capacity_group": group}, updates()[:3], **changes)


@pytest.mark.parametrize("world", LAYOUTS)
def test_each_rank_is_a_group(worlds: Worlds, tiny_data: DataFolder, world: int) -> None:
    """And the ranks' groups are others than the world's one, which again is that of one process."""
    path = str(tiny_data.path)
    cases = [case(name, "rank", **LAYOUTS[world]) for name in STRATEGIES]
    cases += [case(name, "global", **LAYOUTS[world]) for name in STRATEGIES]
    found = worlds(world).run(train_all, path, cases)
    for number, asked in enumerate(cases):
        mine = [results[number] for results in found]
        if asked.routing["capacity_group"] == "global":
            # Evaluation of a batch belongs to one rank: outputs before training are those of shares under either.
            want = train(path, dataclasses.replace(asked, expert_parallel=1))
            seen = train(path, dataclasses.replace(asked, expert_parallel=1, shares=world, updates=asked.updates[:1]))
            compare(mine, dataclasses.replace(want, outputs=seen.outputs), 1e-12)
            continue
        want = train(path, dataclasses.replace(asked, expert_parallel=1, shares=world))
        compare([dataclasses.replace(result, load=want.load) for result in mine], want, 1e-12)
        whole = found[0][number + len(STRATEGIES)]
        assert mine[0].norms != pytest.approx(whole.norms, rel=1e-6), "groups must matter in this test"

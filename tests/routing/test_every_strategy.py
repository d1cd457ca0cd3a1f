"""What holds for every strategy whose tokens go through the sparse layer."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from moe_train.routing import strategy
from tests.routing.helpers import (
    batch_context,
    make_experts,
    make_router,
    mix,
    objective,
    on_ranks,
    pairs_by_token,
    rank_context,
    rank_rows,
    shares,
    tokens,
)

CASES: dict[str, dict[str, Any]] = {
    "switch": {"name": "switch"},
    "switch_all_options": {"name": "switch", "jitter": 0.1, "z_weight": 0.1, "expert_output_masking": 0.2},
    "switch_capacity": {"name": "switch", "capacity_factor": 1.0, "capacity_group": "global"},
    "switch_prioritised": {
        "name": "switch",
        "capacity_factor": 0.5,
        "capacity_group": "global",
        "batch_prioritised": True,
    },
    "top_k": {"name": "top_k"},
    "top_k_raw": {"name": "top_k", "top_k": 3, "normalise": "none"},
    "top_k_sampling": {"name": "top_k", "second_expert": "sampling", "normalise": "before_drop", "top_k": 3},
    "top_k_random": {"name": "top_k", "second_expert": "random", "capacity_factor": 0.7, "capacity_group": "global"},
    "top_k_sigmoid": {"name": "top_k", "scores": "sigmoid", "balancing_bias_rate": 0.001, "z_weight": 0.01},
    "top_k_vmoe": {
        "name": "top_k",
        "normalise": "none",
        "score_noise": 1.0,
        "importance_weight": 0.005,
        "load_weight": 0.005,
        "capacity_factor": 0.8,
        "capacity_group": "global",
        "batch_prioritised": True,
    },
    "hash": {"name": "hash"},
    "hash_random": {"name": "hash", "table": "random"},
    "random": {"name": "random"},
    "random_sentence": {"name": "random", "draw": "sentence"},
    "thor": {"name": "thor", "inference": "token"},
    "thor_token": {"name": "thor", "draw": "token", "pair": "independent"},
    "thor_ensemble": {"name": "thor", "draw": "sentence", "inference": "ensemble"},
    "xmoe": {"name": "xmoe"},
    "xmoe_sigmoid": {"name": "xmoe", "gate": "sigmoid", "routing_dim": 4, "z_weight": 0.1},
    "xmoe_torchscale": {"name": "xmoe", "mode": "torchscale"},
    "sam": {"name": "sam", "num_groups": 3, "alignment_gradient": "both"},
    "sam_two": {"name": "sam", "num_groups": 2, "matrices": "two", "alignment_gradient": "both", "z_weight": 0.1},
    "sam_capacity": {
        "name": "sam",
        "num_groups": 2,
        "top_k": 3,
        "capacity_factor": 0.8,
        "group_capacity_factor": 0.9,
        "capacity_group": "global",
        "batch_prioritised": True,
        "alignment_gradient": "both",
    },
    "smoe": {"name": "smoe", "strata": [2, 4]},
    "smoe_official": {
        "name": "smoe",
        "strata": [2, 2, 2],
        "second_expert": "sampling",
        "normalise": "after_drop",
        "capacity_factor": 0.6,
        "capacity_group": "global",
    },
    "smoe_random": {"name": "smoe", "second_expert": "random", "expert_output_masking": 0.1, "jitter": 0.1},
    "expert_choice": {"name": "expert_choice"},
    "expert_choice_noise": {"name": "expert_choice", "score_noise": 1.0},
    "expert_choice_batch": {
        "name": "expert_choice",
        "scope": "batch",
        "capacity_group": "global",
        "capacity_factor": 1.0,
    },
}
INPUTS = {"vocabulary": 50, "token_frequency": torch.arange(50, 0, -1), "seed": 3}
LENGTHS = [3, 1, 4, 2, 5]

every = pytest.mark.parametrize("case", CASES)
CAUSAL = [case for case, keys in CASES.items() if strategy(keys["name"]).router.causal]


def build(case: str) -> Any:
    return make_router(inputs=INPUTS, **{"num_experts": 6, **CASES[case]})


@every
@pytest.mark.parametrize("training", [True, False])
def test_gradients_against_finite_differences(case: str, training: bool) -> None:
    router, experts = build(case), make_experts(6)
    context = batch_context([2, 3], training=training)
    names = [n for n, _ in router.named_parameters()]
    parameters = [p.detach().clone().requires_grad_() for _, p in router.named_parameters()]
    x = tokens(5).requires_grad_()

    def function(x: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        named = dict(zip(names, values, strict=True))
        routing = torch.func.functional_call(router, named, (x, context))
        losses = [a.value for a in shares(routing).values()]
        return torch.cat([mix(x, routing.assignment, experts).reshape(-1), *[v.reshape(1) for v in losses]])

    assert torch.autograd.gradcheck(function, (x, *parameters), eps=1e-7, atol=1e-5, fast_mode=True)


@every
def test_recomputation_gives_the_same_gradients(case: str) -> None:
    found = []
    for recompute in (False, True):
        router, experts = build(case), make_experts(6)
        context = batch_context(LENGTHS, training=True, update=7)
        x = tokens(15).requires_grad_()

        def run(x: torch.Tensor, router: Any = router, experts: Any = experts, context: Any = context) -> torch.Tensor:
            return objective(router, experts, x, context)[0]

        loss = checkpoint(run, x, use_reentrant=False) if recompute else run(x)
        loss.backward()
        found.append([x.grad, *[p.grad for p in router.parameters()], *[p.grad for p in experts]])
    for plain, recomputed in zip(*found, strict=True):
        assert (plain is None) == (recomputed is None)
        assert plain is None or torch.equal(plain, recomputed)


@every
@pytest.mark.parametrize("training", [True, False])
def test_no_tokens_at_all(case: str, training: bool) -> None:
    router = build(case)
    x = tokens(0).requires_grad_()
    loss, routing = objective(router, make_experts(6), x, batch_context([], training=training))
    assert routing.assignment.token.numel() == 0
    assert loss.item() == 0
    assert all(a.value.item() == 0 for a in shares(routing).values())
    assert routing.statistics.load.tolist() == [0] * 6


# At evaluation a batch belongs to one rank: what depends on the batch is left out there.
RANK_CASES = [(c, t) for c in CASES for t in (True, False) if t or c != "expert_choice_batch"]


@pytest.mark.parametrize("size", [2, 3, 7])
@pytest.mark.parametrize(("case", "training"), RANK_CASES)
def test_the_number_of_ranks_changes_nothing(case: str, size: int, training: bool) -> None:
    context = batch_context(LENGTHS, training=training, update=3)
    x = tokens(15)
    alone, experts = build(case), make_experts(6)
    routers = [build(case) for _ in range(size)]  # not in the threads, which share torch's generator
    whole, routing = objective(alone, experts, x, context)
    whole.backward()

    def one_rank(ranks: Any) -> Any:
        router, own = routers[ranks.rank], make_experts(6)
        rows = rank_rows(context, ranks.rank, size)
        loss, result = objective(router, own, x[rows], rank_context(context, ranks.rank, size, ranks))
        loss.backward() if loss.requires_grad else None
        return rows, loss.detach(), result, [p.grad for p in [*router.parameters(), *own]]

    results = on_ranks(size, one_rank)
    expected = pairs_by_token(routing, 15)
    for rows, _, result, _ in results:
        for row, found in zip(rows.tolist(), pairs_by_token(result, len(rows)), strict=True):
            assert found == pytest.approx(expected[row], rel=1e-12)
        assert torch.equal(result.choices, routing.choices[rows])
        assert torch.equal(result.kept, routing.kept[rows])
    assert sum(loss.item() for _, loss, _, _ in results) == pytest.approx(whole.item(), rel=1e-12)
    for i, parameter in enumerate([*alone.parameters(), *experts]):
        parts = [grads[i] for *_, grads in results if grads[i] is not None]
        total = sum(parts) if parts else torch.zeros_like(parameter)
        reference = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
        torch.testing.assert_close(total, reference, rtol=1e-10, atol=1e-12)
    for name in ("load", "requested", "tokens", "entropy"):
        total = sum(getattr(result.statistics, name) for _, _, result, _ in results)
        torch.testing.assert_close(total, getattr(routing.statistics, name), check_dtype=False)


@pytest.mark.parametrize("case", [c for c in CASES if c != "expert_choice_batch"])
def test_a_sentence_does_not_depend_on_its_batch_mates(case: str) -> None:
    router = build(case)
    context, x = batch_context(LENGTHS), tokens(15)
    whole = pairs_by_token(router(x, context), 15)
    for sentences in ([2], [0, 3], [1, 2, 4]):
        rows = torch.isin(context.sentence, torch.tensor(sentences)).nonzero().squeeze(1)
        assert pairs_by_token(router(x[rows], context.select(rows)), len(rows)) == [
            pytest.approx(whole[r], rel=1e-12) for r in rows.tolist()
        ]


@pytest.mark.parametrize("case", CAUSAL)
def test_evaluation_sees_one_token_at_a_time_as_it_sees_them_all(case: str) -> None:
    """Step-by-step decoding, other batch mates, other orders: the same pairs for the same token."""
    router = build(case)
    context, x = batch_context(LENGTHS, seed=5), tokens(15)
    whole = pairs_by_token(router(x, context), 15)
    for rows in (torch.tensor([4]), torch.tensor([0, 7, 14]), torch.arange(4, 8)):
        assert pairs_by_token(router(x[rows], context.select(rows)), len(rows)) == [
            pytest.approx(whole[r], rel=1e-12) for r in rows.tolist()
        ]


@every
def test_evaluation_repeats_itself_and_training_depends_on_the_update_only_through_counted_draws(case: str) -> None:
    router, x = build(case), tokens(15)
    for training in (True, False):
        context = batch_context(LENGTHS, training=training, update=11)
        first, second = (pairs_by_token(router(x, context), 15) for _ in range(2))
        assert first == second


@every
def test_scores_are_fp32_under_autocast_and_half_precision(case: str) -> None:
    router = build(case).float()
    x, context = tokens(15).float(), batch_context(LENGTHS)
    plain = router(x, context)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        autocast = router(x, context)
    assert autocast.assignment.weight.dtype == torch.float32
    assert torch.equal(plain.assignment.weight, autocast.assignment.weight)
    half = router(x.bfloat16(), context)
    widened = router(x.bfloat16().float(), context)
    assert half.assignment.weight.dtype == torch.float32
    torch.testing.assert_close(half.assignment.weight, widened.assignment.weight, rtol=1e-5, atol=1e-6)
    assert torch.equal(half.choices, widened.choices)


@every
def test_statistics_count_what_is_carried_out(case: str) -> None:
    router = build(case)
    routing = router(tokens(15), batch_context(LENGTHS, training=True))
    statistics = routing.statistics
    pairs = routing.assignment
    assert torch.equal(statistics.load, torch.bincount(pairs.expert, minlength=6))
    assert pairs.load is not None and torch.equal(pairs.load, statistics.load)
    if pairs.per_token:
        assert torch.equal(pairs.token, torch.arange(15).repeat_interleave(pairs.per_token))
    asked = routing.choices[routing.choices >= 0]
    assert torch.equal(statistics.requested, torch.bincount(asked, minlength=6))
    assert int(statistics.dropped) == len(asked) - len(pairs.token)
    assert int(statistics.tokens) == 15
    assert torch.equal(routing.kept.sum(), torch.tensor(len(pairs.token)))


@every
def test_padding_needs_no_mask_because_it_never_arrives(case: str) -> None:
    """Contexts carry real tokens only: an empty sentence between others changes nothing."""
    router = build(case)
    x, context = tokens(9), batch_context([3, 0, 4, 2], training=True)
    without = batch_context([3, 4, 2], training=True)
    without = dataclasses.replace(without, sentence_uid=context.sentence_uid, token_id=context.token_id)
    assert pairs_by_token(router(x, context), 9) == pairs_by_token(router(x, without), 9)


@every
def test_a_router_stays_in_full_precision_in_a_half_precision_model(case: str) -> None:
    router = build(case).float()
    before = {n: v.clone() for n, v in router.state_dict().items()}
    torch.nn.Sequential(router).bfloat16()
    for name, value in router.state_dict().items():
        assert torch.equal(value, before[name]) and value.dtype == before[name].dtype

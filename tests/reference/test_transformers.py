"""Our routers and layers against Hugging Face's Switch, NLLB-MoE, Mixtral and DeepSeek-V3, with equal weights."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from tests.reference.routings import (
    DIM,
    EXPERTS,
    TOKENS,
    combine_matrix,
    difference,
    draws,
    gate,
    gradients,
    layer,
    loss,
    routed,
)

pytest.importorskip("transformers", reason="needs transformers (pip install transformers==4.57.6)")


@pytest.mark.parametrize("capacity", [3, 7, TOKENS])
def test_switch(capacity: int) -> None:
    """Choices, weights, drops, both losses and their gradients."""
    from transformers import SwitchTransformersConfig
    from transformers.models.switch_transformers.modeling_switch_transformers import (
        SwitchTransformersTop1Router,
        load_balancing_loss_func,
        router_z_loss_func,
    )

    config = SwitchTransformersConfig(
        hidden_size=DIM, num_experts=EXPERTS, expert_capacity=capacity, router_jitter_noise=0.0
    )
    theirs, weight = SwitchTransformersTop1Router(config).double(), gate()
    theirs.classifier.weight.data.copy_(weight)
    theirs.dtype = torch.float64  # the config takes 32 bits at most
    x = draws(1, TOKENS, DIM).requires_grad_()
    kept, probability, logits = theirs(x)
    factor = capacity * EXPERTS / TOKENS
    ours = routed("switch", x[0], weight, capacity_factor=factor, z_weight=1.0)
    assert torch.equal(combine_matrix(ours, TOKENS, EXPERTS) > 0, kept[0] > 0)
    combined, expected = combine_matrix(ours, TOKENS, EXPERTS), (kept * probability)[0]
    assert difference(combined, expected) < 1e-12
    choices = logits.argmax(-1)
    balance = load_balancing_loss_func(torch.softmax(logits, -1), choices)
    for mine, reference in (
        (loss(ours, "balance_loss"), balance),
        (loss(ours, "z_loss"), router_z_loss_func(logits)),
        (combined, expected),
    ):
        assert difference(mine, reference) < 1e-7
        assert difference(gradients(mine, x)[0], gradients(reference, x)[0]) < 3e-7, "its counts are in fp32"


POLICIES = [
    (policy, before, prioritised)
    for policy, before, prioritised in itertools.product(("all", "random"), (False, True), (False, True))
    if not (policy == "random" and before)
]


@pytest.mark.parametrize(("policy", "before", "prioritised"), POLICIES)
def test_nllb_moe(policy: str, before: bool, prioritised: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Combine weights of top-2 in training, with and without drops; equal draws for the random policy.

    Left out are ``random`` with weights normalised before drops, where the reference overwrites the normalised weight
    of the second expert and ours follows fairseq, and ``sampling``, whose noise is drawn in another order.
    """
    from transformers import NllbMoeConfig
    from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeTop2Router

    import moe_train.routing.strategies.top_k as top_k

    uniform = draws(TOKENS, seed=5).abs() % 1
    monkeypatch.setattr(torch, "rand_like", lambda _: uniform)
    monkeypatch.setattr(top_k, "counter_uniform", lambda *_: uniform.unsqueeze(1))
    for capacity in (4, 9, 2 * TOKENS):
        config = NllbMoeConfig(
            d_model=DIM,
            num_experts=EXPERTS,
            expert_capacity=capacity,
            router_bias=False,
            second_expert_policy=policy,
            normalize_router_prob_before_dropping=before,
            batch_prioritized_routing=prioritised,
            moe_eval_capacity_token_fraction=0.0,
        )
        theirs, weight, x = NllbMoeTop2Router(config).double().train(), gate(), draws(1, TOKENS, DIM)
        theirs.classifier.weight.data.copy_(weight)
        theirs.dtype = torch.float64
        _, expected = theirs(x)
        ours = routed(
            "top_k",
            x[0],
            weight,
            second_expert=policy,
            normalise="before_drop" if before else "after_drop",
            batch_prioritised=prioritised,
            capacity_factor=capacity * EXPERTS / (2 * TOKENS),
        )
        assert difference(combine_matrix(ours, TOKENS, EXPERTS), expected) < 1e-12


@pytest.mark.parametrize("k", [1, 2, 3])
def test_mixtral(k: int) -> None:
    """Weights of k experts and the balance loss, where the first choices decide it."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock, load_balancing_loss_func

    config = MixtralConfig(hidden_size=DIM, intermediate_size=8, num_local_experts=EXPERTS, num_experts_per_tok=k)
    theirs, weight, x = MixtralSparseMoeBlock(config).double(), gate(), draws(1, TOKENS, DIM)
    theirs.gate.weight.data.copy_(weight)
    with torch.no_grad():
        for number, parameter in enumerate(theirs.experts.parameters()):
            parameter.copy_(draws(*parameter.shape, seed=200 + number))
    expected, logits = theirs(x)
    ours = routed("top_k", x[0], weight, top_k=k, normalise="none" if k == 1 else "after_drop")
    matrix = combine_matrix(ours, TOKENS, EXPERTS)
    if k == 1:
        matrix = (matrix > 0).double()  # the reference divides one weight by itself
    found = sum(matrix[:, e : e + 1] * expert(x[0]) for e, expert in enumerate(theirs.experts))
    assert difference(found, expected[0]) < 1e-6, "the reference's softmax is in fp32"
    first = load_balancing_loss_func((logits,), EXPERTS, top_k=1)
    assert difference(loss(ours, "balance_loss"), first) < 1e-6


def test_deepseek_v3() -> None:
    """Sigmoid scores, a bias that decides the choice and not the weight, normalised weights."""
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

    from tests.routing.helpers import batch_context, make_router

    config = DeepseekV3Config(
        hidden_size=DIM,
        n_routed_experts=EXPERTS,
        num_experts_per_tok=3,
        n_group=1,
        topk_group=1,
        norm_topk_prob=True,
        routed_scaling_factor=1.0,
    )
    theirs, weight, x = DeepseekV3TopkRouter(config), gate(), draws(TOKENS, DIM)
    bias = draws(EXPERTS, seed=7) / 10
    theirs.weight.data.copy_(weight)
    theirs.e_score_correction_bias.copy_(bias)
    choices, weights = theirs(x.float())
    expected = torch.zeros(TOKENS, EXPERTS).scatter(1, choices, weights)
    router = make_router("top_k", num_experts=EXPERTS, top_k=3, scores="sigmoid", balancing_bias_rate=0.001)
    with torch.no_grad():
        router.gate.weight.copy_(weight)
        router.balancing_bias.copy_(bias)
    ours = router(x, batch_context([TOKENS]))
    matrix = combine_matrix(ours, TOKENS, EXPERTS)
    assert torch.equal(matrix > 0, expected > 0)
    assert difference(matrix, expected.double()) < 1e-6, "the reference is in fp32"


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_a_switch_layer_with_its_experts(activation: str) -> None:
    """The whole layer: outputs, and gradients of the input and of every weight."""
    from transformers import SwitchTransformersConfig
    from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersSparseMLP

    hidden = 10
    config = SwitchTransformersConfig(
        d_model=DIM,
        d_ff=hidden,
        num_experts=EXPERTS,
        expert_capacity=TOKENS,
        router_jitter_noise=0.0,
        dropout_rate=0.0,
        dense_act_fn=activation,
    )
    theirs = SwitchTransformersSparseMLP(config).double()
    theirs.router.dtype = torch.float64
    ours = layer("switch", hidden, activation, num_experts=EXPERTS)
    (stack,) = ours.block.pool.sublayers
    with torch.no_grad():
        stack.fc1_bias.zero_()
        stack.fc2_bias.zero_()
        theirs.router.classifier.weight.copy_(ours.block.router.gate.weight)
        for e, expert in enumerate(theirs.experts.values()):
            expert.wi.weight.copy_(stack.fc1_weight[e].T)
            expert.wo.weight.copy_(stack.fc2_weight[e].T)
    x = draws(2, TOKENS // 2, DIM).requires_grad_()
    expected, _ = theirs(x)
    found, _ = ours(x)
    assert difference(found, expected) < 1e-12
    experts = list(theirs.experts.values())
    their_leaves = [
        x,
        theirs.router.classifier.weight,
        *(e.wi.weight for e in experts),
        *(e.wo.weight for e in experts),
    ]
    theirs_found = gradients(expected, *their_leaves)
    mine: Any = gradients(found, x, ours.block.router.gate.weight, stack.fc1_weight, stack.fc2_weight)
    assert difference(mine[0], theirs_found[0]) < 1e-12 and difference(mine[1], theirs_found[1]) < 1e-12
    for e in range(EXPERTS):
        assert difference(mine[2][e].T, theirs_found[2 + e]) < 1e-12
        assert difference(mine[3][e].T, theirs_found[2 + EXPERTS + e]) < 1e-12

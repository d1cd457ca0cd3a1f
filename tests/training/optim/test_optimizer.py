from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from moe_train.config import OptimizerConfig
from moe_train.routing import RouterInputs, build_router, routing_config
from moe_train.training.optim.optimizer import build_optimizer, parameter_groups
from tests.training.toy import ToyModel


def test_biases_and_norms_do_not_decay_not_even_in_stacks() -> None:
    model = ToyModel(0.0)
    model.stacked_bias = nn.Parameter(torch.zeros(4, 16))
    model.stacked_bias.expert = True  # type: ignore[attr-defined]
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, spared = parameter_groups(model, 0.3)
    assert decayed["weight_decay"] == 0.3 and spared["weight_decay"] == 0.0
    assert {names[id(p)] for p in decayed["params"]} == {"embed.weight", "experts", "output.weight"}  # type: ignore[attr-defined]
    assert {names[id(p)] for p in spared["params"]} == {"stacked_bias", "norm.weight", "norm.bias", "output.bias"}  # type: ignore[attr-defined]


def test_frozen_and_tied_parameters() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    model[2].requires_grad_(False)
    counted = [p for group in parameter_groups(model, 0.1) for p in group["params"]]  # type: ignore[attr-defined]
    assert len(counted) == 3


@pytest.mark.parametrize(
    ("keys", "kind"),
    [
        ({"name": "adam", "betas": (0.8, 0.9), "eps": 1e-5}, torch.optim.Adam),
        ({"name": "adamw", "betas": (0.9, 0.98), "weight_decay": 0.1}, torch.optim.AdamW),
        ({"name": "sgd", "momentum": 0.9}, torch.optim.SGD),
    ],
)
def test_a_step_is_the_optimizers_own(keys: dict[str, Any], kind: type[torch.optim.Optimizer]) -> None:
    torch.manual_seed(0)
    model, other = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
    other.load_state_dict(model.state_dict())
    config = OptimizerConfig(lr=0.1, **keys)
    plain = {key: value for key, value in keys.items() if key != "name"}
    ours, reference = build_optimizer(model, config), kind(other.parameters(), lr=0.1, **plain)  # type: ignore[call-arg]
    for _ in range(3):
        for network, optimizer in ((model, ours), (other, reference)):
            optimizer.zero_grad()
            network(torch.ones(2, 3)).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(model.weight, other.weight)
    assert type(ours) is kind


def test_a_parameter_can_say_whether_it_decays() -> None:
    model = ToyModel(0.0)
    model.embed.weight.decays = False  # type: ignore[assignment]
    model.norm.weight.decays = True  # type: ignore[assignment]
    for decay, spared in (("matrices", {"embed.weight", "norm.bias", "output.bias"}), ("all", {"embed.weight"})):
        assert without_decay(model, decay) == spared


def test_the_scale_of_soft_moe_decays_and_its_slots_do_not() -> None:
    keys = {"name": "soft_moe", "num_experts": 4, "slots_per_expert": 2}
    for more, spared in (({}, {"phi"}), ({"decayed": "scale"}, {"phi"}), ({"decayed": "slots"}, {"scale"})):
        router = build_router(routing_config({**keys, **more}), RouterInputs(6))
        assert without_decay(router, "matrices") == without_decay(router, "all") == spared


def without_decay(model: nn.Module, decay: Any) -> set[str]:
    names = {id(p): name for name, p in model.named_parameters()}
    groups = [group for group in parameter_groups(model, 0.3, decay) if not group["weight_decay"]]
    return {names[id(p)] for group in groups for p in group["params"]}  # type: ignore[attr-defined]


@pytest.mark.parametrize(("name", "decay"), [("adamw", "all"), ("adamw", "matrices"), ("adam", "all")])
def test_adamw_of_all_parameters_is_fairseq_s_adam(name: Any, decay: Any) -> None:
    """fairseq decays every parameter, decoupled; with eps of 1e-12 its other place in the quotient does not show."""
    from moe_train.fairseq_compat import apply

    apply()
    from fairseq.optim.adam import Adam

    torch.manual_seed(0)
    model, other = (nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 2)).double() for _ in range(2))
    other.load_state_dict(model.state_dict())
    config = OptimizerConfig(name=name, lr=0.02, betas=(0.9, 0.98), eps=1e-12, weight_decay=0.3, decay=decay)
    theirs = Adam(other.parameters(), lr=0.02, betas=(0.9, 0.98), eps=1e-12, weight_decay=0.3)
    ours, x = build_optimizer(model, config), torch.randn(8, 4, dtype=torch.float64)
    for _ in range(6):
        for network, optimizer in ((model, ours), (other, theirs)):
            optimizer.zero_grad()
            network(x).square().sum().backward()
            optimizer.step()
    same = [torch.allclose(a, b, rtol=1e-9) for a, b in zip(model.parameters(), other.parameters(), strict=True)]
    assert all(same) == ((name, decay) == ("adamw", "all"))

"""``routing=smoe``: Stratified Mixture of Experts (Xu et al., Findings of EMNLP 2023, arXiv 2305.02176, §3).

The E experts are divided into L strata. Stratum i has its own gate over E_i, the experts of the strata i … L (Eq. 5). A
token starts at stratum 1, is processed by its top-k experts (k = 2), and continues at the stratum after that of its
first choice, even if capacity drops that choice; it leaves after an expert of the last stratum. So tokens make 1 to L
passes. The passes, their norms and residuals are in :mod:`moe_train.layers.stratified`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor, nn

from moe_train.config.check import Range
from moe_train.errors import ConfigError
from moe_train.routing.balance_losses import WorldSums
from moe_train.routing.base import ExpertCount, LayerKind, Router, RouterInputs, RoutingConfig
from moe_train.routing.capacity import group_tokens
from moe_train.routing.context import RoutingContext
from moe_train.routing.counter_rng import hash_numbers
from moe_train.routing.expected_load import ExpectedChoices
from moe_train.routing.gate import LinearGate, linear_init
from moe_train.routing.noise import jitter
from moe_train.routing.registry import register
from moe_train.routing.strategies.top_k import SecondExpert, select, skip_second
from moe_train.routing.token_choice import Normalise, RouterScores, TokenChoiceConfig, TokenChoiceRouter, check_top_k
from moe_train.routing.types import RouterLoss, Routing


@dataclass(frozen=True)
class SMoEConfig(TokenChoiceConfig):
    """Keys in addition to those of all token-choice strategies. Values of the official code are in brackets.

    With ``capacity_factor`` c an expert takes c · k · ⌈T_i / E_i⌉ of the T_i tokens that are active at stratum i, as in
    the paper; T_i is the maximum over ranks.

    Attributes:
        strata: sizes of the strata in order; None: two halves.
        top_k: k.
        second_expert: how the second expert is chosen in training [sampling].
        normalise: raw weights (Eq. 6), or weights divided by their sum [after_drop].
        norm: ``paper``: x + experts(LN_i(x)) in every pass (Eq. 4, 7); ``official``: a token's residual stream is
            normalised when it enters a later stratum, and when it leaves.
        balance_over: the balance losses of the gates are averaged over all ``strata`` (Eq. 11), or over the
            ``executed`` passes, those with a token [executed].
    """

    name: str = "smoe"
    strata: Annotated[tuple[int, ...] | None, Range(above=0, most=2**20)] = None
    top_k: ExpertCount = 2
    second_expert: SecondExpert = "all"
    normalise: Normalise = "none"
    norm: Literal["paper", "official"] = "paper"
    balance_over: Literal["strata", "executed"] = "strata"

    def __post_init__(self) -> None:
        super().__post_init__()
        if sum(self.sizes) != self.num_experts:
            raise ConfigError(
                f"routing.strata={list(self.sizes)} sum to {sum(self.sizes)}, not to "
                f"routing.num_experts={self.num_experts}",
                remedy="choose sizes that sum to the number of experts",
            )
        check_top_k(self.top_k, self.sizes[-1], "the experts of the last stratum (routing.num_experts, routing.strata)")
        if self.second_expert == "random" and self.top_k != 2:
            raise ConfigError(
                f"routing.second_expert=random is defined for two experts, not {self.top_k}",
                remedy="set routing.top_k=2, or routing.second_expert=all or sampling",
            )

    @property
    def sizes(self) -> tuple[int, ...]:
        """n_1 … n_L."""
        if self.strata is not None:
            return self.strata
        half = self.num_experts // 2
        return (half, self.num_experts - half) if half else (self.num_experts,)


@dataclass(frozen=True)
class MeanOverGates:
    """The mean of a loss over the gates (Eq. 11).

    Attributes:
        gates: the loss of each.
        weight: coefficient in the objective.
        tokens: [L] tokens of this rank at each gate, if only gates with a token on any rank count; None: all count.
    """

    gates: tuple[RouterLoss, ...]
    weight: float
    tokens: Tensor | None = None

    @property
    def sums(self) -> tuple[Tensor, ...]:
        """Those of the gates, and the tokens."""
        own = tuple(vector for gate in self.gates for vector in gate.sums)
        return own if self.tokens is None else (*own, self.tokens)

    def share(self, world: WorldSums) -> Tensor:
        """See :class:`~moe_train.routing.types.RouterLoss`."""
        count: Tensor | int = len(self.gates)
        if self.tokens is not None:
            count = (world.of(self.tokens) > 0).sum().clamp(min=1)
        return torch.stack([gate.share(world) for gate in self.gates]).sum() / count


class StratumRouter(TokenChoiceRouter):
    """The gate of one stratum. Its input are the active tokens; the expert ids that it returns are global.

    Attributes:
        first: the first expert that it can choose.
        num_experts: E_i.
    """

    def __init__(self, config: SMoEConfig, inputs: RouterInputs, stratum: int) -> None:
        super().__init__(config, inputs)
        self.config: SMoEConfig = config
        self.stratum = stratum
        self.first = sum(config.sizes[:stratum])
        self.num_experts = config.num_experts - self.first
        self.gate = LinearGate(inputs.dim, self.num_experts, linear_init)

    def forward(self, x: Tensor, context: RoutingContext) -> Routing:
        """Routes the T_i active tokens x [T_i, d]."""
        config = self.config
        context = context.at_layer(hash_numbers(context.layer, self.stratum))  # different draws in each pass
        policy: SecondExpert = config.second_expert if context.training else "all"
        if config.jitter:
            x = jitter(x, config.jitter, context)
        logits = self.gate(x)
        probabilities = torch.softmax(logits, dim=-1)
        choices = select(probabilities.detach(), logits.detach(), config.top_k, policy, context)
        weights = probabilities.gather(1, choices)
        if policy == "random":
            choices = skip_second(choices, weights.detach(), config.normalise, context)
        return self.with_global_ids(
            self.build_routing(RouterScores(logits, probabilities), choices, weights, context, config.normalise)
        )

    def may_skip_choices(self, context: RoutingContext) -> bool:
        """True with the random policy, which skips second experts."""
        return self.config.second_expert == "random" and context.training

    def capacity(self, factor: float, choices: Tensor, context: RoutingContext) -> Tensor:
        """0-dim: c · k · ⌈T_i / E_i⌉ (§4.3)."""
        tokens = group_tokens(choices, context, self.config.capacity_group)
        if context.training and self.config.capacity_group == "rank":
            tokens = context.ranks.max(tokens)
        return torch.ceil(factor * choices.shape[1] * torch.ceil(tokens / self.num_experts))

    def with_global_ids(self, routing: Routing) -> Routing:
        """The same routing, with experts numbered from the first stratum."""
        assignment, statistics, choices = routing.assignment, routing.statistics, routing.choices
        load, requested = (nn.functional.pad(n, (self.first, 0)) for n in (statistics.load, statistics.requested))
        return dataclasses.replace(
            routing,
            assignment=dataclasses.replace(assignment, expert=assignment.expert + self.first, load=load),
            choices=torch.where(choices < 0, -1, choices + self.first),
            statistics=dataclasses.replace(statistics, load=load, requested=requested),
        )


@register("smoe", SMoEConfig)
class SMoERouter(Router):
    """The gates of all strata.

    Attributes:
        strata: one :class:`StratumRouter` per stratum.
        stratum_of: [E] int64, stratum of each expert.
    """

    layer_kind: ClassVar[LayerKind] = "stratified"
    strata: Sequence[StratumRouter]
    stratum_of: Tensor

    def __init__(self, config: SMoEConfig, inputs: RouterInputs) -> None:
        super().__init__(config, inputs)
        self.config: SMoEConfig = config
        self.strata = nn.ModuleList(  # type: ignore[assignment]
            StratumRouter(config, inputs, i) for i in range(len(config.sizes))
        )
        sizes = torch.tensor(config.sizes, device="cpu")
        stratum_of = torch.arange(len(config.sizes), device="cpu").repeat_interleave(sizes)
        self.register_buffer("stratum_of", stratum_of, persistent=False)

    def forward(self, x: Tensor, context: RoutingContext, stratum: int = 0) -> Routing:
        """Routes the tokens x [T_i, d] that are active at ``stratum`` (numbered from 0)."""
        routing: Routing = self.strata[stratum](x, context)
        return routing

    def next_stratum(self, choices: Tensor) -> Tensor:
        """[T]: the next stratum of each token after ``choices`` [T, k], dropped or not; L: the token leaves."""
        return self.stratum_of[choices[:, 0]] + 1

    def block_losses(self, passes: Sequence[Routing]) -> Mapping[str, RouterLoss]:
        """The mean of each loss over the gates."""
        executed = self.config.balance_over == "executed"
        tokens = torch.stack([p.statistics.tokens for p in passes]) if executed else None
        return {
            name: MeanOverGates(tuple(p.losses[name] for p in passes), loss.weight, tokens)
            for name, loss in passes[0].losses.items()
        }

    @classmethod
    def experts_per_token(cls, config: RoutingConfig) -> float:
        """k times the expected passes with uniform routing over the visible experts, as in the paper's FLOPs."""
        assert isinstance(config, SMoEConfig)
        return config.top_k * sum(expected_visits(config.sizes))

    @classmethod
    def expected_choices(cls, config: RoutingConfig) -> tuple[ExpectedChoices, ...]:
        """One part per stratum: the tokens that visit it choose k of its visible experts."""
        assert isinstance(config, SMoEConfig)
        starts = [sum(config.sizes[:i]) for i in range(len(config.sizes))]
        return tuple(
            ExpectedChoices(
                visits, first, config.num_experts - first, min(config.top_k, config.num_experts - first), stage=i
            )
            for i, (visits, first) in enumerate(zip(expected_visits(config.sizes), starts, strict=True))
        )

    @classmethod
    def router_flops_per_token(cls, config: RoutingConfig, dim: int) -> float:
        """FLOPs of each gate times its expected number of visits."""
        assert isinstance(config, SMoEConfig)
        sizes = config.sizes
        return sum(v * 2.0 * dim * sum(sizes[i:]) for i, v in enumerate(expected_visits(sizes)))


def expected_visits(sizes: Sequence[int]) -> tuple[float, ...]:
    """Expected visits of a token to each stratum with uniform routing; the sum is the paper's mean number of passes.

    For equal strata the sum is the harmonic number H_L.
    """
    visits = [1.0] + [0.0] * (len(sizes) - 1)
    for i in range(len(sizes)):
        visible = sum(sizes[i:])
        for j in range(i, len(sizes) - 1):
            visits[j + 1] += visits[i] * sizes[j] / visible
    return tuple(visits)

"""Shape of one expert f_e, independent of the number of experts and of the layout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moe_train.config import check
from moe_train.errors import ConfigError

Activation = Literal["relu", "gelu"]
Initialisation = Literal["kaiming", "xavier"]


@dataclass(frozen=True)
class ExpertSpec:
    """One expert: f(x) = W2 · dropout(act(W1 x + b1)) + b2, or several such sub-layers stacked.

    With ``sublayers`` > 1 (X-MoE §3.5, as in BASE) an expert is a stack x ← x + FFN(LN(x)), each sub-layer with its own
    norm and weights. Its output is stack(x) − x, so that the layer's residual and the router's weight give
    h + g·(stack(h) − h), which is BASE's g·stack(h) + (1 − g)·h.

    Attributes:
        dim: d, width of a token.
        hidden: inner width of a feed-forward.
        sublayers: residual sub-layers of one expert.
        activation: between the two products.
        bias: whether the products have biases.
        dropout: probability, after the activation (fairseq's ``activation_dropout``).
        init: ``kaiming`` draws as ``nn.Linear`` does (fairseq's feed-forward, NLLB, SMoE, THOR), ``xavier`` uniform
            with zero biases; each expert separately.
        zero_output: initialises W2 and b2 with zeros (BASE), so that a stack starts as the identity.
    """

    dim: int
    hidden: int
    sublayers: int = 1
    activation: Activation = "relu"
    bias: bool = True
    dropout: float = 0.0
    init: Initialisation = "kaiming"
    zero_output: bool = False

    def __post_init__(self) -> None:
        for key in ("dim", "hidden", "sublayers"):
            check.positive(f"experts.{key}", getattr(self, key))
        check.probability("experts.dropout", self.dropout)
        for key, known in (("activation", ("relu", "gelu")), ("init", ("kaiming", "xavier"))):
            if getattr(self, key) not in known:
                raise ConfigError(
                    f"'experts.{key}' cannot be {getattr(self, key)!r}", remedy=f"choose {' or '.join(known)}"
                )

    @property
    def norm(self) -> bool:
        """Whether sub-layers have their own LayerNorm (a single sub-layer uses the Transformer layer's norm)."""
        return self.sublayers > 1

    @property
    def parameters(self) -> int:
        """Number of parameters of one expert."""
        products = 2 * self.dim * self.hidden
        biases = self.dim + self.hidden if self.bias else 0
        norms = 2 * self.dim if self.norm else 0
        return self.sublayers * (products + biases + norms)

    @property
    def flops_per_row(self) -> float:
        """FLOPs of one expert on one row, forward, products only (a multiply-add counts as two)."""
        return 4.0 * self.sublayers * self.dim * self.hidden

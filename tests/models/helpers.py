"""Small models and batches for the tests of models."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_train.config import ModelConfig
from moe_train.errors import ConfigError
from moe_train.models import TransformerModel, build_model
from moe_train.routing import Router, registered_strategies, routing_config
from moe_train.routing.registry import decoder_config

PAD = 1


class Words:
    """A vocabulary of n words, with fairseq's first four."""

    def __init__(self, size: int = 40) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def pad(self) -> int:
        return PAD


#: What a strategy needs besides its name and four experts; then strategies with other options than the defaults.
_KEYS: dict[str, dict[str, Any]] = {
    "smoe": {"strata": [2, 2]},
    "sam": {"num_groups": 2, "top_k": 2},
    "expert_choice": {"decoder": "top_k"},
    "soft_moe": {"decoder": "top_k"},
    "random by sentence": {"name": "random", "draw": "sentence"},
    "sam of two matrices": {"name": "sam", "num_groups": 2, "matrices": "two"},
    "smoe, official": {"name": "smoe", "strata": [1, 1, 2], "norm": "official", "normalise": "after_drop"},
    "thor by token": {"name": "thor", "inference": "token"},
    "thor by position": {"name": "thor", "inference": "position"},
    "thor, ensemble": {"name": "thor", "inference": "ensemble"},
    "top_k, DeepSeek": {"name": "top_k", "scores": "sigmoid", "balancing_bias_rate": 0.01, "shared_expert": True},
    "xmoe, torchscale": {"name": "xmoe", "mode": "torchscale"},
    "xmoe, sub-layers": {"name": "xmoe", "expert_sublayers": 3, "gate": "sigmoid"},
}
VARIANTS = [name for name in _KEYS if name not in registered_strategies()]


def routing_keys(name: str) -> dict[str, Any]:
    return {"name": name, "num_experts": 4, **_KEYS.get(name, {})}


def causal_strategies() -> list[str]:
    """Every registered strategy that a decoder may use."""
    names = []
    for name in sorted(registered_strategies()):
        try:
            decoder_config(routing_config({**routing_keys(name), "decoder": None}))
        except ConfigError:
            continue
        names.append(name)
    return names


def small_model(routing: str | dict[str, Any] = "dense", seed: int = 3, **changes: Any) -> TransformerModel:
    shape: dict[str, Any] = {
        "encoder_layers": 2, "decoder_layers": 2, "embed_dim": 16, "ffn_dim": 32, "num_heads": 2,
        "max_positions": 64, "dropout": 0.0, "attention_dropout": 0.0, "sparse_layers": "all",
    }  # fmt: skip
    keys = routing_keys(routing) if isinstance(routing, str) else routing
    model = build_model(ModelConfig(**{**shape, **changes}), routing_config(keys), Words(), Words(), seed=seed)
    assert isinstance(model, TransformerModel)
    return spread_routers(model)


def spread_routers(model: TransformerModel) -> TransformerModel:
    """Makes scores far from ties, so that a rounding error cannot change a choice."""
    generator = torch.Generator().manual_seed(5)
    for module in model.modules():
        if isinstance(module, Router):
            for parameter in module.parameters():
                if parameter.dim() > 1:
                    parameter.data.normal_(generator=generator)
    return model


def sentences(lengths: list[int], seed: int = 0, left: bool = False) -> Tensor:
    """[B, longest] word ids without padding inside."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    rows = torch.full((len(lengths), width), PAD)
    for row, length in zip(rows, lengths, strict=True):
        words = torch.randint(4, 40, (length,), generator=generator)
        row[width - length :] = words if left else row[width - length :]
        if not left:
            row[:length] = words
    return rows


def facts(rows: int) -> dict[str, Tensor]:
    """Who the sentences are."""
    uid = torch.arange(rows) * 7 + 100
    return {"sentence_uid": uid, "src_lang": torch.zeros(rows).long(), "tgt_lang": uid % 3}

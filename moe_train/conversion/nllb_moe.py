"""``nllb-moe``: NLLB-200 with experts (NLLB Team, 2022, arXiv 2207.04672), that is ``routing=top_k`` with k = 2."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from moe_train.config import ModelConfig
from moe_train.config.placement import place
from moe_train.conversion.family import Link, Settings, register_family
from moe_train.conversion.m2m100 import M2M100, both
from moe_train.errors import ConfigError

_EXPERTS = "feed_forward.block.pool.sublayers.0."


@register_family
class NllbMoe(M2M100):
    """M2M-100's layers, of which some have experts."""

    model_type = "nllb-moe"
    architecture = "NllbMoeForConditionalGeneration"
    names: ClassVar[Mapping[str, str]] = {
        **M2M100.names,
        "cross_attention": "cross_attention",
        "cross_residual.norm": "cross_attention_layer_norm",
        "feed_forward.residual.norm": "ff_layer_norm",
        "feed_forward.block": "ffn.",
    }

    def check(self, settings: Settings) -> None:
        """Refuses what the model here has not."""
        super().check(settings)
        settings.require("router_dtype", ("float32",), "float32")
        settings.require("second_expert_policy", ("all", "sampling", "random"), "all")
        if settings.get("moe_eval_capacity_token_fraction", float, 1.0) <= 0:
            settings.require("expert_capacity", (None,), 64)

    def model(self, settings: Settings) -> ModelConfig:
        """The model config, with the layers that have experts."""
        dense = super().model(settings)
        values = {field: getattr(dense, field) for field in dense.__dataclass_fields__}
        sparse = {
            "sparse_layers": _placement(settings.get("encoder_sparse_step", int, 4), dense.encoder_layers),
            "decoder_sparse_layers": _placement(settings.get("decoder_sparse_step", int, 4), dense.decoder_layers),
        }
        return ModelConfig(**{**values, **sparse})

    def routing(self, settings: Settings) -> dict[str, Any]:
        """Top-2 routing. The capacity of training is fairseq's, two shares of the tokens."""
        experts, share = settings.get("num_experts", int), settings.get("moe_eval_capacity_token_fraction", float, 1.0)
        # Of tokens whose two experts differ, no expert gets more than all.
        factor = None if share >= 1 else share * experts / 2 if share > 0 else 1.0
        before = settings.get("normalize_router_prob_before_dropping", bool, False)
        return {
            "name": "top_k",
            "num_experts": experts,
            "top_k": 2,
            "normalise": "before_drop" if before else "after_drop",
            "second_expert": settings.get("second_expert_policy", str, "all"),
            "gate_bias": settings.get("router_bias", bool, False),
            "capacity_factor": 1.0,
            "capacity_rounding": "result" if 0 < share < 1 else "share",
            "evaluation_capacity_factor": factor,
            "batch_prioritised": settings.get("batch_prioritized_routing", bool, False),
            "expert_output_masking": float(settings.get("moe_token_dropout", float, 0.2)),
            "balance_weight": float(settings.get("router_aux_loss_coef", float, 0.001)),
            "z_weight": float(settings.get("router_z_loss_coef", float, 0.001)),
        }

    def feed_forward(
        self, ours: str, theirs: str, side: str, layer: int, model: ModelConfig, routing: Mapping[str, Any]
    ) -> Iterator[Link]:
        """The feed-forward of a layer: dense, or a router and experts."""
        spec = model.sparse_layers if side == "encoder" else model.for_decoder
        layers = model.encoder_layers if side == "encoder" else model.decoder_layers
        if layer not in place(spec, layers).replaced:
            yield from super().feed_forward(ours, theirs, side, layer, model, routing)
            return
        gate = both(f"{ours}feed_forward.block.router.gate", f"{theirs}ffn.router.classifier")
        yield from (link for link in gate if routing["gate_bias"] or link.ours.endswith("weight"))
        for expert in range(routing["num_experts"]):
            for name in ("fc1", "fc2"):
                source = f"{theirs}ffn.experts.expert_{expert}.{name}"
                yield Link(f"{ours}{_EXPERTS}{name}_weight.@{expert}", (f"{source}.weight",), transposed=True)
                yield Link(f"{ours}{_EXPERTS}{name}_bias.@{expert}", (f"{source}.bias",))


def _placement(step: int, layers: int) -> str:
    """Every ``step``-th layer, counted from 1."""
    if step < 0:
        raise ConfigError(f"a sparse step cannot be {step}")
    return f"every:{step}:{step - 1}" if 0 < step <= layers else "none"

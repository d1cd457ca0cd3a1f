"""``m2m_100``: M2M-100 (Fan et al., JMLR 2021, arXiv 2010.11125) and the dense NLLB-200 (arXiv 2207.04672)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from moe_train.config import ModelConfig
from moe_train.conversion.family import EOS, PAD, Family, Link, Settings, register_family
from moe_train.errors import ConfigError

_EMBEDDING, _OUTPUT = "model.shared.weight", "lm_head.weight"


@register_family
class M2M100(Family):
    """A pre-norm encoder-decoder with sinusoidal positions."""

    model_type = "m2m_100"
    architecture = "M2M100ForConditionalGeneration"
    # Our sub-module → theirs, in a layer.
    names: ClassVar[Mapping[str, str]] = {
        "self_attention": "self_attn",
        "attention_residual.norm": "self_attn_layer_norm",
        "cross_attention": "encoder_attn",
        "cross_residual.norm": "encoder_attn_layer_norm",
        "feed_forward.residual.norm": "final_layer_norm",
        "feed_forward.block": "",
    }

    def check(self, settings: Settings) -> None:
        """Refuses what the model here has not."""
        settings.require("activation_function", ("relu", "gelu"), "relu")
        settings.require("scale_embedding", (True,), True)
        settings.require("is_encoder_decoder", (True,), True)
        for key, wanted in (("bos_token_id", 0), ("pad_token_id", PAD), ("eos_token_id", EOS)):
            settings.require(key, (wanted,), wanted)
        settings.require("decoder_start_token_id", (EOS,), EOS)
        settings.require("quantization_config", (None,), None)
        for key in ("attention_heads", "ffn_dim"):
            wanted = settings.get(f"encoder_{key}", int)
            settings.require(f"decoder_{key}", (wanted,), None)

    def model(self, settings: Settings) -> ModelConfig:
        """The model config."""
        return ModelConfig(
            encoder_layers=settings.get("encoder_layers", int),
            decoder_layers=settings.get("decoder_layers", int),
            embed_dim=settings.get("d_model", int),
            ffn_dim=settings.get("encoder_ffn_dim", int),
            num_heads=settings.get("encoder_attention_heads", int),
            activation=settings.get("activation_function", str, "relu"),
            dropout=float(settings.get("dropout", float, 0.1)),
            attention_dropout=float(settings.get("attention_dropout", float, 0.1)),
            activation_dropout=float(settings.get("activation_dropout", float, 0.0)),
            share_embeddings=settings.get("tie_word_embeddings", bool, True),
            max_positions=settings.get("max_position_embeddings", int),
            sparse_layers="none",
        )

    def routing(self, settings: Settings) -> dict[str, Any]:
        """Dense."""
        return {"name": "dense"}

    def settings(self, model: ModelConfig, routing: Mapping[str, Any]) -> dict[str, Any]:
        """The keys of ``config.json``."""
        if routing["name"] != "dense":
            raise ConfigError(f"a model without experts, and routing={routing['name']} has them")
        return self.shape_settings(model)

    def shape_settings(self, model: ModelConfig) -> dict[str, Any]:
        """Keys that do not depend on the routing."""
        if model.name != "transformer":
            raise ConfigError(f"an encoder-decoder, and model.name is '{model.name}'")
        if model.norm_order != "pre":
            raise ConfigError("norms stand before their sub-layers (model.norm_order=pre)")
        both = {"attention_heads": model.num_heads, "ffn_dim": model.ffn_dim, "layerdrop": 0.0}
        return {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            "d_model": model.embed_dim,
            "encoder_layers": model.encoder_layers,
            "decoder_layers": model.decoder_layers,
            "num_hidden_layers": model.encoder_layers,
            **{f"{side}_{key}": value for side in ("encoder", "decoder") for key, value in both.items()},
            "activation_function": model.activation,
            "dropout": model.dropout,
            "attention_dropout": model.attention_dropout,
            "activation_dropout": model.activation_dropout,
            "tie_word_embeddings": model.share_embeddings,
            "max_position_embeddings": model.max_positions,
            "scale_embedding": True,
            "is_encoder_decoder": True,
            "bos_token_id": 0,
            "pad_token_id": PAD,
            "eos_token_id": EOS,
            "decoder_start_token_id": EOS,
            "dtype": "float32",
            "use_cache": True,
        }

    def links(self, model: ModelConfig, routing: Mapping[str, Any]) -> Iterator[Link]:
        """Embeddings, layers and last norms."""
        yield Link("model.encoder.embed.tokens.weight", (_EMBEDDING,))
        if not model.share_embeddings:
            yield Link("model.decoder.embed.tokens.weight", (_EMBEDDING,))
            yield Link("model.decoder.output.weight", (_OUTPUT,))
        for side, layers in (("encoder", model.encoder_layers), ("decoder", model.decoder_layers)):
            yield from both(f"model.{side}.stack.norm", f"model.{side}.layer_norm")
            for layer in range(layers):
                ours, theirs = f"model.{side}.stack.layers.{layer}.", f"model.{side}.layers.{layer}."
                yield from self._layer(ours, theirs, side == "decoder")
                yield from self.feed_forward(ours, theirs, side, layer, model, routing)

    def _layer(self, ours: str, theirs: str, is_decoder: bool) -> Iterator[Link]:
        """Attention and norms of a layer."""
        names = self.names
        for norm in ("attention_residual.norm", "feed_forward.residual.norm"):
            yield from both(f"{ours}{norm}", f"{theirs}{names[norm]}")
        attention = f"{theirs}{names['self_attention']}."
        yield _stack(f"{ours}self_attention.qkv_weight", attention, "qkv")
        yield from _attention(f"{ours}self_attention.", attention)
        if is_decoder:
            yield from both(f"{ours}cross_residual.norm", f"{theirs}{names['cross_residual.norm']}")
            attention = f"{theirs}{names['cross_attention']}."
            yield _stack(f"{ours}cross_attention.query_weight", attention, "q")
            yield _stack(f"{ours}cross_attention.key_value_weight", attention, "kv")
            yield from _attention(f"{ours}cross_attention.", attention)

    def feed_forward(
        self, ours: str, theirs: str, side: str, layer: int, model: ModelConfig, routing: Mapping[str, Any]
    ) -> Iterator[Link]:
        """The feed-forward of a layer."""
        for part in ("fc1", "fc2"):
            yield from both(f"{ours}feed_forward.block.{part}", f"{theirs}{self.names['feed_forward.block']}{part}")

    def aliases(self, model: ModelConfig) -> Mapping[str, str]:
        """Other names of the embedding."""
        further = ["model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight"]
        return dict.fromkeys([*further, *([_OUTPUT] if model.share_embeddings else [])], _EMBEDDING)

    def is_unused(self, name: str) -> bool:
        """Key biases, which softmax cancels; tables of positions; a bias of the output, which must be zero."""
        return name.endswith((".k_proj.bias", ".embed_positions.weights")) or name == "final_logits_bias"


def both(ours: str, theirs: str) -> Iterator[Link]:
    """Weight and bias of a module."""
    for part in ("weight", "bias"):
        yield Link(f"{ours}.{part}", (f"{theirs}.{part}",))


def _stack(ours: str, attention: str, parts: str) -> Link:
    return Link(ours, tuple(f"{attention}{part}_proj.weight" for part in parts))


def _attention(ours: str, theirs: str) -> Iterator[Link]:
    yield Link(f"{ours}query_bias", (f"{theirs}q_proj.bias",))
    yield Link(f"{ours}value_bias", (f"{theirs}v_proj.bias",))
    yield from both(f"{ours}out", f"{theirs}out_proj")

"""Converts weights of fairseq's Transformer to the names of :class:`TransformerModel`; the function is identical."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from moe_train.errors import CheckpointError

_RENAMED = {
    "self_attn.out_proj": "self_attention.out",
    "self_attn_layer_norm": "attention_residual.norm",
    "encoder_attn.out_proj": "cross_attention.out",
    "encoder_attn_layer_norm": "cross_residual.norm",
    "fc1": "feed_forward.block.fc1",
    "fc2": "feed_forward.block.fc2",
    "final_layer_norm": "feed_forward.residual.norm",
}


def convert_state_dict(stock: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State dict of a dense model from that of fairseq 0.12.2's ``transformer``.

    Query, key and value become one matrix (key and value in cross-attention). Key biases are dropped, since softmax
    cancels them, and so are parameters that fairseq registers but never trains.

    Args:
        stock: ``TransformerModel.state_dict()`` or ``checkpoint["model"]``, with sinusoidal positions.

    Raises:
        CheckpointError: not a Transformer, or one with learned positions, which are not supported.
    """
    if any(name.endswith("embed_positions.weight") for name in stock):
        raise CheckpointError("the model has learned positions", remedy="convert a model with sinusoidal positions")
    try:
        state = {f"{side}.embed.tokens.weight": stock[f"{side}.embed_tokens.weight"] for side in ("encoder", "decoder")}
    except KeyError as error:
        raise CheckpointError(
            f"{error} is missing: this is not a fairseq Transformer", remedy="name another file"
        ) from None
    output = stock.get("decoder.output_projection.weight")
    if output is not None and not torch.equal(output, state["decoder.embed.tokens.weight"]):
        state["decoder.output.weight"] = output
    for side in ("encoder", "decoder"):
        for part in ("weight", "bias"):
            if f"{side}.layer_norm.{part}" in stock:
                state[f"{side}.stack.norm.{part}"] = stock[f"{side}.layer_norm.{part}"]
        for layer in range(_layers(stock, side)):
            state.update(_convert_layer(stock, f"{side}.layers.{layer}.", f"{side}.stack.layers.{layer}."))
    return {name: tensor.clone() for name, tensor in state.items()}


def _layers(stock: Mapping[str, Tensor], side: str) -> int:
    numbers = {int(name.split(".")[2]) for name in stock if name.startswith(f"{side}.layers.")}
    return len(numbers)


def _convert_layer(stock: Mapping[str, Tensor], theirs: str, ours: str) -> dict[str, Tensor]:
    state = {}
    for old, new in _RENAMED.items():
        for part in ("weight", "bias"):
            if f"{theirs}{old}.{part}" in stock:
                state[f"{ours}{new}.{part}"] = stock[f"{theirs}{old}.{part}"]

    def projections(attention: str, *parts: str) -> Tensor:
        return torch.cat([stock[f"{theirs}{attention}.{part}_proj.weight"] for part in parts])

    state[f"{ours}self_attention.qkv_weight"] = projections("self_attn", "q", "k", "v")
    attentions = {"self_attn": "self_attention"}
    if f"{theirs}encoder_attn.q_proj.weight" in stock:
        attentions["encoder_attn"] = "cross_attention"
        state[f"{ours}cross_attention.query_weight"] = projections("encoder_attn", "q")
        state[f"{ours}cross_attention.key_value_weight"] = projections("encoder_attn", "k", "v")
    for old, new in attentions.items():
        state[f"{ours}{new}.query_bias"] = stock[f"{theirs}{old}.q_proj.bias"]
        state[f"{ours}{new}.value_bias"] = stock[f"{theirs}{old}.v_proj.bias"]
    return state

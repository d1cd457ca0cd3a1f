"""Models: the translation Transformer behind fairseq's interface, built from config."""

from __future__ import annotations

from moe_train.models.builder import build_model
from moe_train.models.decoder_state import DecoderState
from moe_train.models.encoder_decoder import TransformerDecoder, TransformerEncoder, TransformerModel

__all__ = ["DecoderState", "TransformerDecoder", "TransformerEncoder", "TransformerModel", "build_model"]

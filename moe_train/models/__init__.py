"""Models: Transformers for translation, text encoding and images, built from config, with fairseq's interface."""

from __future__ import annotations

from moe_train.models.builder import build_model
from moe_train.models.decoder_state import DecoderState
from moe_train.models.encoder_decoder import TransformerDecoder, TransformerEncoder, TransformerModel

__all__ = ["DecoderState", "TransformerDecoder", "TransformerEncoder", "TransformerModel", "build_model"]

"""The translation model: a Transformer encoder-decoder with experts, with fairseq's model interface."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from moe_train import fairseq_compat
from moe_train.errors import ConfigError
from moe_train.kernels.decoder.program import WeightFormat
from moe_train.layers.batch_context import BatchContext, BatchInfo, RoutingSettings, batch_context
from moe_train.layers.block import Records, start_losses
from moe_train.layers.linear import linear
from moe_train.layers.stack import DecoderStack, EncoderStack
from moe_train.models.decoder_state import DecoderState, repeat_rows, select_rows
from moe_train.models.embedding import TokenEmbedding, Vocabulary
from moe_train.models.packed_decoder import PackedDecoder, PackedState
from moe_train.models.routed import ModelParts, RoutedModel

fairseq_compat.apply()

from fairseq.models import FairseqEncoder, FairseqEncoderDecoderModel, FairseqIncrementalDecoder  # noqa: E402

EncoderOut = dict[str, Any]

_log = logging.getLogger(__name__)

_STATE = "moe_train.decoder_state"
_INITIAL_POSITIONS = 32


class TransformerEncoder(FairseqEncoder):  # type: ignore[misc]
    """Encoder: source tokens → hidden states."""

    def __init__(
        self, dictionary: Vocabulary, embed: TokenEmbedding, stack: EncoderStack, settings: RoutingSettings
    ) -> None:
        super().__init__(dictionary)
        self.embed = embed
        self.stack = stack
        self.settings = settings

    def forward(
        self,
        src_tokens: Tensor,
        src_lengths: Tensor | None = None,
        sentence_uid: Tensor | None = None,
        src_lang: Tensor | None = None,
        tgt_lang: Tensor | None = None,
        pass_index: Tensor | None = None,
        real_tokens: Sequence[int] = (),
        keep_packed: bool = False,
    ) -> EncoderOut:
        """Encodes src_tokens [B, S], padded on either side.

        Args:
            keep_packed: return packed rows if the layers had them.

        Returns:
            fairseq's dictionary of lists of tensors, batch first: ``encoder_out`` [B, S, d], ``encoder_padding_mask``
            [B, S] (True at padding; the list is empty if there is none); also the sentences' metadata ``info``,
            ``routing``, the records of the encoder's sparse blocks, ``real_tokens`` for the decoder, and ``packed``:
            where ``encoder_out`` is packed rows [R, d] the context, else None.
        """
        info = BatchInfo(sentence_uid, tgt_lang, pass_index)
        context = self.context(src_tokens, info, real_tokens[0] if real_tokens else None)
        x = self.embed(src_tokens, padding=context.padding)
        context = context.packed_for(x, self.stack.varlen)
        x, records = self.stack(context.enter(x), context)
        if not keep_packed:
            x, context = context.leave(x), context.padded
        mask = [] if context.padding is None else [context.padding]
        found = {"encoder_out": [x], "encoder_padding_mask": mask, "info": info, "routing": records}
        return {**found, "real_tokens": real_tokens, "packed": None if context.packed is None else context}

    def context(self, src_tokens: Tensor, info: BatchInfo, real_tokens: int | None = None) -> BatchContext:
        """Context of the batch for the layers."""
        return batch_context(
            self.embed.padding(src_tokens),
            (src_tokens.shape[0], src_tokens.shape[1]),
            self.settings,
            info,
            token_ids=src_tokens,
            real_tokens=real_tokens,
            training=self.training,
            device=src_tokens.device,
        )

    def reorder_encoder_out(self, encoder_out: EncoderOut, new_order: Tensor) -> EncoderOut:
        """The sentences new_order [M] of the batch, for fairseq's generator."""
        chosen = {
            name: [value.index_select(0, new_order) for value in encoder_out[name]]
            for name in ("encoder_out", "encoder_padding_mask")
        }
        return {**chosen, "info": select_rows(encoder_out["info"], new_order), "routing": ()}

    def max_positions(self) -> int:
        """Longest source in tokens."""
        return self.embed.positions.max_positions


class TransformerDecoder(FairseqIncrementalDecoder):  # type: ignore[misc]
    """Decoder: encoder output and target so far → scores of the next token. ``output`` None: tied to the embedding."""

    def __init__(
        self,
        dictionary: Vocabulary,
        embed: TokenEmbedding,
        stack: DecoderStack,
        settings: RoutingSettings,
        output: nn.Linear | None = None,
    ) -> None:
        super().__init__(dictionary)
        self.embed = embed
        self.stack = stack
        self.settings = settings
        self.output = output

    def forward(
        self,
        prev_output_tokens: Tensor,
        encoder_out: EncoderOut | None = None,
        incremental_state: dict[str, Any] | None = None,
        **unused: Any,
    ) -> tuple[Tensor, dict[str, Any]]:
        """Logits [B, T, V], or with an ``incremental_state`` [B, 1, V] of the last position (fairseq's protocol)."""
        if encoder_out is None:
            raise ValueError("the decoder needs the encoder's output")
        if incremental_state is None:
            x, extra = self.extract_features(prev_output_tokens, encoder_out)
            return self.output_layer(x), extra
        state = incremental_state.setdefault(_STATE, None) or self.start(encoder_out, 1, _INITIAL_POSITIONS)
        incremental_state[_STATE] = state
        for column in range(state.step, prev_output_tokens.shape[1]):
            x, records = self.step(prev_output_tokens[:, column], state)
        return self.output_layer(x), {"routing": records, "attn": [None]}

    def extract_features(
        self, prev_output_tokens: Tensor, encoder_out: EncoderOut, incremental_state: None = None
    ) -> tuple[Tensor, dict[str, Any]]:
        """prev_output_tokens [B, T], padded on the right → ([B, T, d], {"routing": records of encoder and decoder})."""
        x, extra, context = self.extract_in_context(prev_output_tokens, encoder_out)
        return context.leave(x), extra

    def extract_in_context(
        self, prev_output_tokens: Tensor, encoder_out: EncoderOut
    ) -> tuple[Tensor, dict[str, Any], BatchContext]:
        """As :meth:`extract_features`, with the context of the target; packed rows where the memory is packed."""
        real_tokens = encoder_out.get("real_tokens")
        context = batch_context(
            self.embed.padding(prev_output_tokens),
            (prev_output_tokens.shape[0], prev_output_tokens.shape[1]),
            self.settings,
            encoder_out["info"],
            token_ids=prev_output_tokens,
            real_tokens=real_tokens[1] if real_tokens else None,
            training=self.training,
            device=prev_output_tokens.device,
        )
        memory, mask = _memory(encoder_out)
        x = self.embed(prev_output_tokens)
        if (source := encoder_out.get("packed")) is not None:
            memory, mask = encoder_out["encoder_out"][0], source.packed
            context = context.packed_for(x, self.stack.varlen)
        x, records = self.stack(context.enter(x), memory, mask, context)
        records = start_losses(encoder_out["routing"] + records, self.settings.ranks)
        return x, {"routing": records, "attn": [None]}, context

    def output_layer(self, features: Tensor) -> Tensor:
        """features [..., d] → logits [..., V]."""
        return linear(features, self.output_weight)

    @property
    def output_weight(self) -> Tensor:
        """[V, d], a parameter."""
        return self.embed.tokens.weight if self.output is None else self.output.weight

    def start(self, encoder_out: EncoderOut, beam: int, max_length: int) -> DecoderState:
        """The state before the first token, with ``beam`` hypotheses per sentence."""
        memory, mask = _memory(encoder_out)
        return DecoderState(self.stack.cache(memory, mask, beam, max_length), repeat_rows(encoder_out["info"], beam))

    @torch.no_grad()
    def step(self, tokens: Tensor, state: DecoderState) -> tuple[Tensor, Records]:
        """Decodes one position: tokens [N] → features [N, 1, d], and the records."""
        column = tokens.view(-1, 1)
        context = batch_context(
            None,
            (column.shape[0], 1),
            self.settings,
            state.info,
            token_ids=column,
            start=state.step,
            training=self.training,
            device=tokens.device,
        )
        return self.stack.step(self.embed(column, start=state.step), state.cache, context)

    def reorder_incremental_state(self, incremental_state: dict[str, Any], new_order: Tensor) -> None:
        """Reorders hypotheses by new_order [M], for fairseq's generator."""
        state = incremental_state.get(_STATE)
        if state is not None:
            state.reorder(new_order)

    def max_positions(self) -> int:
        """Longest target in tokens."""
        return self.embed.positions.max_positions


class TransformerModel(RoutedModel, FairseqEncoderDecoderModel):  # type: ignore[misc]
    """Encoder and decoder with shared routing settings, and step-by-step decoding."""

    takes_real_tokens: ClassVar[bool] = True
    encoder: TransformerEncoder
    decoder: TransformerDecoder

    def __init__(self, encoder: TransformerEncoder, decoder: TransformerDecoder, settings: RoutingSettings) -> None:
        super().__init__(encoder, decoder)
        self.settings = settings

    def forward(
        self,
        src_tokens: Tensor,
        src_lengths: Tensor | None,
        prev_output_tokens: Tensor,
        sentence_uid: Tensor | None = None,
        src_lang: Tensor | None = None,
        tgt_lang: Tensor | None = None,
        pass_index: Tensor | None = None,
        logits_at: Tensor | None = None,
        features_only: bool = False,
        real_tokens: Sequence[int] = (),
    ) -> tuple[Tensor, dict[str, Any]]:
        """One forward pass with a given target (teacher forcing).

        Args:
            src_tokens: [B, S], padded on either side.
            src_lengths: not used; padding is found in the tokens.
            prev_output_tokens: [B, T], the target shifted right, padded on the right.
            sentence_uid, src_lang, tgt_lang, pass_index: [B] each, sentence metadata for routers.
            logits_at: [P] flat positions (row · T + column) whose logits are computed, so that a criterion can skip the
                vocabulary product at padding.
            features_only: return features, for a criterion that fuses the vocabulary product with its loss; an option
                of this method, since DDP and other wrappers must see a forward pass.
            real_tokens: tokens of src_tokens and of prev_output_tokens that are not padding, where they are known: the
                host then does not wait for a count.

        Returns:
            logits [B, T, V], or [P, V], or features of as many rows; and ``{"routing": records, encoder first,
            "attn": [None]}``. With packed rows ``features_only`` gives features [N, d] of the N real tokens, and
            ``rows`` says where they stand among the B · T positions (None: N = B · T).
        """
        encoder_out = self.encoder(
            src_tokens, src_lengths, sentence_uid, src_lang, tgt_lang, pass_index, real_tokens, keep_packed=True
        )
        features, extra, context = self.decoder.extract_in_context(prev_output_tokens, encoder_out)
        if features_only and logits_at is None and context.packed is not None:
            return context.pack(features), {**extra, "rows": context.real}
        features = context.leave(features)
        if logits_at is not None:
            features = features.view(-1, features.shape[-1]).index_select(0, logits_at)
        return features if features_only else self.output_layer(features), extra

    def output_layer(self, features: Tensor) -> Tensor:
        """features [..., d] → logits [..., V]."""
        return self.decoder.output_layer(features)  # type: ignore[no-any-return]

    @property
    def output_weight(self) -> Tensor:
        """[V, d], the matrix of :meth:`output_layer`; the target embedding if they are tied."""
        return self.decoder.output_weight  # type: ignore[no-any-return]

    def parts(self) -> ModelParts:
        """Encoder, decoder, and the output product."""
        return ModelParts(self.encoder.stack, self.decoder.stack, 0.0, 2.0 * self.output_weight.numel())

    def pack_decoder(self, weights: WeightFormat) -> PackedDecoder | None:
        """The decoder for a search, with its present weights in a format; None if its kernels cannot be used here.

        Raises:
            ConfigError: the model is on a GPU, and the format is not ``fp32``.
        """
        if PackedDecoder.supports(self.decoder):
            return PackedDecoder(self.decoder, weights)
        if weights != "fp32":
            if self.output_weight.device.type != "cpu":
                what = f"search.weights={weights} is for CPUs, and the model is on {self.output_weight.device}"
                raise ConfigError(what, remedy="set search.weights=fp32")
            _log.warning(
                "search.weights=%s needs a CPU with AMX and a C compiler; the search uses fp32 instead", weights
            )
        return None

    def start_decoding(self, encoder_out: EncoderOut, beam: int, max_length: int) -> DecoderState:
        """A state for ``beam`` hypotheses per sentence, with ``max_length`` positions allocated.

        Computes keys and values of the source, once per sentence.
        """
        return self.decoder.start(encoder_out, beam, max_length)  # type: ignore[no-any-return]

    def decode_step(self, tokens: Tensor, state: DecoderState | PackedState) -> Tensor:
        """Decodes one position: tokens [N], the last token of every hypothesis → logits [N, V]."""
        if isinstance(state, PackedState):
            return state.decode(tokens)
        features, _ = self.decoder.step(tokens, state)
        return self.output_layer(features.squeeze(1))


def _memory(encoder_out: EncoderOut) -> tuple[Tensor, Tensor | None]:
    """Encoder output [B, S, d] and its mask [B, 1, 1, S], True = visible."""
    masks = encoder_out["encoder_padding_mask"]
    mask = ~masks[0][:, None, None, :] if masks else None
    return torch.as_tensor(encoder_out["encoder_out"][0]), mask

"""A small recurrent translation model with both decoding interfaces: ours and fairseq's. Untrained, sharply peaked."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moe_train.fairseq_compat import apply

apply()

from fairseq.data import Dictionary  # noqa: E402
from fairseq.models import FairseqEncoder, FairseqEncoderDecoderModel, FairseqIncrementalDecoder  # noqa: E402


def dictionary(symbols: int) -> Dictionary:
    """fairseq's four special symbols and ``symbols - 4`` others."""
    made = Dictionary()
    for i in range(symbols - 4):
        made.add_symbol(f"w{i}")
    return made


class Encoder(FairseqEncoder):
    """The mean of the source's embeddings."""

    def __init__(self, symbols: Dictionary, dim: int) -> None:
        super().__init__(symbols)
        self.embed = nn.Embedding(len(symbols), dim)

    def forward(self, src_tokens: Tensor, src_lengths: Tensor | None = None, **_: Any) -> dict[str, Tensor]:
        real = src_tokens.ne(self.dictionary.pad()).unsqueeze(-1)
        return {"mean": (self.embed(src_tokens) * real).sum(1) / real.sum(1)}

    def reorder_encoder_out(self, encoder_out: dict[str, Tensor], new_order: Tensor) -> dict[str, Tensor]:
        return {"mean": encoder_out["mean"][new_order]}


class Decoder(FairseqIncrementalDecoder):
    """A GRU cell whose state starts as the source's mean."""

    def __init__(self, symbols: Dictionary, dim: int, longest: int, eos_bias: float) -> None:
        super().__init__(symbols)
        self.embed = nn.Embedding(len(symbols), dim)
        self.cell = nn.GRUCell(dim, dim)
        self.out = nn.Linear(dim, len(symbols))
        self.longest = longest
        with torch.no_grad():
            self.out.weight.mul_(6.0)
            self.out.bias[symbols.eos()] += eos_bias

    def forward(
        self, prev_output_tokens: Tensor, encoder_out: Any = None, incremental_state: Any = None, **_: Any
    ) -> tuple[Tensor, None]:
        hidden = self.get_incremental_state(incremental_state, "hidden") if incremental_state is not None else None
        state = encoder_out["mean"] if hidden is None else hidden["h"]
        columns = prev_output_tokens[:, -1:] if incremental_state is not None else prev_output_tokens
        steps = []
        for column in columns.unbind(1):
            state = self.cell(self.embed(column), state)
            steps.append(self.out(state))
        if incremental_state is not None:
            self.set_incremental_state(incremental_state, "hidden", {"h": state})
        return torch.stack(steps, 1), None

    def reorder_incremental_state(self, incremental_state: Any, new_order: Tensor) -> None:
        hidden = self.get_incremental_state(incremental_state, "hidden")
        if hidden is not None:
            self.set_incremental_state(incremental_state, "hidden", {"h": hidden["h"][new_order]})

    def max_positions(self) -> int:
        return self.longest


class State:
    """Hidden states [N, d]."""

    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden

    def reorder(self, rows: Tensor) -> None:
        self.hidden = self.hidden[rows]


class Recurrent(FairseqEncoderDecoderModel):
    """Both interfaces over the same parameters."""

    def __init__(self, symbols: int, dim: int = 16, longest: int = 64, eos_bias: float = 0.0, seed: int = 0) -> None:
        torch.manual_seed(seed)
        words = dictionary(symbols)
        super().__init__(Encoder(words, dim), Decoder(words, dim, longest, eos_bias))
        self.words = words
        self.rows_per_step: list[int] = []

    def start_decoding(self, encoder_out: dict[str, Tensor], beam: int, max_length: int) -> State:
        self.room, self.rows_per_step = max_length, []
        return State(encoder_out["mean"].repeat_interleave(beam, dim=0))

    def decode_step(self, tokens: Tensor, state: State) -> Tensor:
        self.rows_per_step.append(tokens.shape[0])
        assert len(self.rows_per_step) <= self.room
        state.hidden = self.decoder.cell(self.decoder.embed(tokens), state.hidden)
        return self.decoder.out(state.hidden)

    def sample(self, lengths: list[int], seed: int = 1, prefix: list[int] | None = None) -> dict[str, Tensor]:
        """A net_input of random sentences with the given lengths, end symbol included."""
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.full((len(lengths), max(lengths)), self.words.pad())
        for row, length in enumerate(lengths):
            tokens[row, : length - 1] = torch.randint(4, len(self.words), (length - 1,), generator=generator)
            tokens[row, length - 1] = self.words.eos()
        start = torch.tensor([prefix or [self.words.eos()]]).expand(len(lengths), -1)
        return {"src_tokens": tokens, "src_lengths": torch.tensor(lengths), "prev_output_tokens": start}

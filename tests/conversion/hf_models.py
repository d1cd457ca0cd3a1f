"""Small models of Hugging Face transformers with random weights, and tokenizers trained on a few sentences."""

from __future__ import annotations

import json
import random
import socket
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from torch import Tensor, nn

SENTENCES = (
    "The doctor buys a red apple.",
    "Der Arzt kauft einen roten Apfel.",
    "le médecin achète une pomme rouge",
    "we see many birds in the garden today",
    "wir sehen heute viele Vögel im Garten",
    "the red birds eat an apple",
)
SHAPE = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "max_position_embeddings": 48,
}
EXPERTS = {"num_experts": 8, "encoder_sparse_step": 2, "decoder_sparse_step": 2, "router_bias": True}


@cache
def transformers() -> Any:
    """The library. On import urllib3 binds a socket to find out about IPv6, unless Python has none."""
    has, socket.has_ipv6 = socket.has_ipv6, False
    try:
        import requests  # noqa: F401
        import transformers
    finally:
        socket.has_ipv6 = has
    return transformers


def train_pieces(folder: Path) -> Path:
    """A SentencePiece model with <unk>, <s> and </s> in front, as fairseq's models have."""
    path = folder / "pieces.model"
    with path.open("wb") as stream:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(SENTENCES * 20), model_writer=stream, vocab_size=100, model_type="bpe",
            unk_id=0, bos_id=1, eos_id=2, num_threads=1, minloglevel=2,
        )  # fmt: skip
    return path


def save_m2m100_tokenizer(folder: Path, pieces: Path) -> int:
    """M2M-100's: ids by vocab.json, here in another order and without two of the pieces; returns the ids used."""
    processor = sentencepiece.SentencePieceProcessor(model_file=str(pieces))
    names = [processor.id_to_piece(i) for i in range(3, len(processor))]
    random.Random(0).shuffle(names)
    vocabulary = folder / "vocab.json"
    vocabulary.write_text(json.dumps({name: i for i, name in enumerate(["<s>", "<pad>", "</s>", "<unk>", *names[2:]])}))
    transformers().M2M100Tokenizer(str(vocabulary), str(pieces)).save_pretrained(folder)
    return 4 + len(names) - 2 + 100


def save_nllb_tokenizer(folder: Path, pieces: Path, legacy: bool = False) -> int:
    """NLLB's; returns the ids used."""
    tokenizer = transformers().NllbTokenizer(str(pieces), legacy_behaviour=legacy)
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 0) -> None:
    """Random values for every parameter: none of the biases is zero, and norms are not the identity.

    The end symbol is likely enough that hypotheses end, and padding is not.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(tensor: Tensor, std: float) -> Tensor:
        return torch.empty_like(tensor).normal_(0, std, generator=generator)

    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            base = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.copy_(base + normal(parameter, 0.2))
        elif "router" in name:
            parameter.copy_(normal(parameter, 1.0))
        else:
            scale = 3.0 if any(part in name for part in ("out_proj", "fc2", "q_proj")) else 1.2
            parameter.copy_(normal(parameter, scale * parameter.shape[1] ** -0.5))
    last = model.model.decoder.layer_norm.bias / model.model.decoder.layer_norm.bias.norm()  # type: ignore
    for table in {id(t): t for t in (model.model.shared.weight, model.lm_head.weight)}.values():  # type: ignore
        table[2] += 2.0 * last  # type: ignore
        table[1] -= 3.0 * last  # type: ignore


def save_model(folder: Path, kind: str, used: int, **keys: Any) -> Any:
    """Builds a model by the name of its class, with padding of the vocabulary, and saves it; returns the model."""
    torch.manual_seed(0)
    config = getattr(transformers(), f"{kind}Config")(vocab_size=used + 13, **{**SHAPE, **keys})
    model = getattr(transformers(), f"{kind}ForConditionalGeneration")(config).eval()
    randomise(model)
    model.save_pretrained(folder, max_shard_size="60KB")
    return model


def encode(tokenizer: Any, language: str, sentences: Sequence[str]) -> Mapping[str, Tensor]:
    """Padded inputs of a batch."""
    tokenizer.src_lang = language
    return dict(tokenizer(list(sentences), return_tensors="pt", padding=True))


def generate(model: Any, inputs: Mapping[str, Tensor], tag: int, beams: int) -> list[list[int]]:
    """Hypotheses of 4 to 38 symbols as fairseq ranks them without length penalty, from the tag to the end symbol."""
    found = model.generate(
        **inputs, num_beams=beams, do_sample=False, min_length=6, max_length=40, forced_bos_token_id=tag,
        suppress_tokens=[1], **({"early_stopping": True, "length_penalty": 0.0} if beams > 1 else {}),
    )  # fmt: skip
    return [[int(i) for i in row if i != 1] for row in found[:, 1:]]

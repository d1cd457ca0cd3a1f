"""Decoding by C kernels with packed weights, against torch's operators."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor

from moe_train.config import ModelConfig, SearchConfig
from moe_train.errors import ConfigError
from moe_train.evaluation.search.beam_search import BeamSearch
from moe_train.experts import packed_pool
from moe_train.kernels.decoder.program import WeightFormat, is_supported
from moe_train.models import build_model
from moe_train.models.encoder_decoder import TransformerModel
from moe_train.models.packed_decoder import PackedDecoder
from moe_train.routing import registered_strategies, routing_config
from tests.evaluation.recurrent import Recurrent, dictionary

needs_kernels = pytest.mark.skipif(
    not is_supported(torch.zeros(1)), reason="no matrix units (AMX) here, or no C compiler"
)
WORDS = dictionary(60)
TOLERANCE = {"fp32": 1e-4, "bf16": 0.05, "int8": 0.15}


def model_of(strategy: str = "dense", norm_order: str = "pre", activation: str = "relu") -> TransformerModel:
    config = ModelConfig(
        encoder_layers=1,
        decoder_layers=2,
        embed_dim=24,
        ffn_dim=40,
        num_heads=2,
        norm_order=norm_order,  # type: ignore[arg-type]
        activation=activation,  # type: ignore[arg-type]
        sparse_layers="odd",
        max_positions=32,
    )
    keys = {"name": strategy} if strategy == "dense" else {"name": strategy, "num_experts": 4}
    keys |= {"num_groups": 2} if strategy == "sam" else {}
    built = build_model(config, routing_config(keys), WORDS, WORDS, seed=1)
    assert isinstance(built, TransformerModel)
    torch.manual_seed(1)
    for name, parameter in built.named_parameters():  # biases and norms that are not at their first values
        if name.endswith("bias") or "norm" in name:
            torch.nn.init.normal_(parameter, mean=float(name.endswith("norm.weight")), std=0.2)
    return built.eval()


def batch() -> dict[str, Tensor]:
    source = torch.randint(4, 60, (4, 7), generator=torch.Generator().manual_seed(1))
    source[1, :3] = source[2, 5:] = WORDS.pad()  # on either side
    return {"src_tokens": source, "sentence_uid": torch.arange(4) * 7 + 1}


@torch.no_grad()
def difference(model: TransformerModel, weights: WeightFormat, beam: int = 3) -> float:
    """Largest difference of logits over a search in which hypotheses continue others and a sentence leaves."""
    encoded, generator = model.encoder(**batch()), torch.Generator().manual_seed(2)
    packed = model.pack_decoder(weights)
    assert packed is not None
    plain, ours = model.start_decoding(encoded, beam, 20), packed.start_decoding(encoded, beam, 20)
    left, worst = 4, 0.0
    for step in range(20):
        tokens = torch.randint(4, 60, (left * beam,), generator=generator)
        wanted, found = model.decode_step(tokens, plain), model.decode_step(tokens, ours)
        worst = max(worst, float((wanted - found).abs().max()))
        kept = torch.tensor([0, 2, 3]) if step == 5 else torch.arange(left)
        parents = torch.randint(beam, (len(kept), beam), generator=generator)
        left = len(kept)
        if step % 3:  # between two steps without a new order, as with forced tokens
            order = (kept[:, None] * beam + parents).view(-1)
            plain.reorder(order)
            ours.reorder(order)
        assert (step == 5) <= (step % 3 > 0)
    with pytest.raises(ValueError, match="room for 20 positions"):
        model.decode_step(tokens, ours)
    return worst


@needs_kernels
@pytest.mark.parametrize("weights", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize(("norm_order", "activation"), [("pre", "relu"), ("post", "relu"), ("pre", "gelu")])
def test_same_logits_as_torch(weights: WeightFormat, norm_order: str, activation: str) -> None:
    assert difference(model_of("dense", norm_order, activation), weights) < TOLERANCE[weights]


@needs_kernels
@pytest.mark.parametrize("strategy", sorted(set(registered_strategies()) - {"dense", "expert_choice", "soft_moe"}))
@pytest.mark.parametrize("packs_experts", [True, False])
def test_same_logits_with_sparse_blocks(strategy: str, packs_experts: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_pool, "MOST_BYTES", 2**30 if packs_experts else 0)
    assert difference(model_of(strategy), "fp32") < TOLERANCE["fp32"]


@needs_kernels
@pytest.mark.parametrize("weights", ["bf16", "int8"])
def test_routing_is_the_same_in_all_formats(weights: WeightFormat) -> None:
    """Experts are packed too; THOR's draws do not depend on rows, so logits stay close."""
    assert difference(model_of("thor"), weights) < TOLERANCE[weights]


@needs_kernels
def test_a_model_that_is_sure_of_itself_translates_alike_in_all_formats() -> None:
    built = model_of()
    with torch.no_grad():
        built.output_weight.mul_(8.0)
    data = {**batch(), "prev_output_tokens": torch.full((4, 1), WORDS.eos())}
    limits = {"max_length_ratio": 0.0, "max_length_offset": 12}
    found = [BeamSearch(built, WORDS, SearchConfig(weights=w, **limits))(data).best() for w in ("fp32", "bf16", "int8")]
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("weights", ["fp32", "int8"])
def test_without_kernels_torch_decodes_and_a_warning_says_so(
    weights: WeightFormat, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    data = {**batch(), "prev_output_tokens": torch.full((4, 1), WORDS.eos())}
    wanted = BeamSearch(model_of(), WORDS, SearchConfig())(data)
    monkeypatch.setattr(PackedDecoder, "supports", staticmethod(lambda _: False))
    with caplog.at_level(logging.WARNING):
        found = BeamSearch(model_of(), WORDS, SearchConfig(weights=weights))(data)
    assert found.best() == wanted.best()
    torch.testing.assert_close(found.scores, wanted.scores, rtol=1e-4, atol=1e-4)
    assert ("search.weights=int8 needs a CPU with AMX" in caplog.text) == (weights == "int8")


def test_other_devices_and_other_models_have_fp32_weights_only() -> None:
    with pytest.raises(ConfigError, match=r"search\.weights=int8 is for CPUs, and the model is on meta"):
        BeamSearch(model_of().to("meta"), WORDS, SearchConfig(weights="int8"))
    other = Recurrent(60)
    with pytest.raises(ConfigError, match=r"cannot search with search\.weights=bf16"):
        BeamSearch(other, other.words, SearchConfig(weights="bf16"))

"""Models on packed rows compute what they compute on padded batches."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_train.kernels.varlen import torch_varlen
from moe_train.layers.batch_context import BatchContext
from moe_train.models import TransformerModel
from moe_train.routing import registered_strategies
from moe_train.routing.registry import strategy
from moe_train.tasks.criterion import MoELabelSmoothedCrossEntropy
from tests.kernels.by_sentence import BY_SENTENCE
from tests.models.helpers import PAD, VARIANTS, Words, facts, routing_keys, sentences, small_model

LENGTHS = [5, 1, 9, 3]


def sample(lengths: list[int], targets: list[int], known: bool = False) -> dict[str, Any]:
    source, target = sentences(lengths), sentences(targets, seed=1)
    previous = torch.where(target == PAD, PAD, sentences(targets, seed=2))
    net_input = {"src_tokens": source, "src_lengths": torch.tensor(lengths), "prev_output_tokens": previous}
    tokens = sum(targets)
    counts = {"real_tokens": [sum(lengths), tokens], "real_targets": tokens} if known else {}
    return {
        "net_input": {**net_input, **facts(len(lengths))},
        "target": target,
        "ntokens": tokens,
        "nsentences": len(lengths),
        "world_ntokens": torch.tensor(tokens),
        **counts,
    }


def criterion(name: str) -> MoELabelSmoothedCrossEntropy:
    found = strategy(routing_keys(name)["name"])
    config = found.config(**{k: tuple(v) if isinstance(v, list) else v for k, v in routing_keys(name).items()})
    task: Any = SimpleNamespace(target_dictionary=Words())
    return MoELabelSmoothedCrossEntropy(task, 0.1, config.passes, config.consistency_weight).train()


def step(model: TransformerModel, name: str, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Any], dict[str, Tensor]]:
    model.zero_grad(set_to_none=True)
    loss, _, logged = criterion(name)(model, batch)
    (loss / batch["ntokens"]).backward()
    return loss / batch["ntokens"], logged, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("name", sorted(registered_strategies()) + VARIANTS)
def test_loss_statistics_and_gradients_are_those_of_the_padded_batch(name: str, dtype: torch.dtype) -> None:
    """Ragged sentences, one without target, one without source and target; THOR with its two passes."""
    model = small_model(name).to(dtype).train()
    batch = sample([*LENGTHS, 2, 0], [4, 7, 1, 8, 0, 0], known=name == "switch")
    padded = step(model, name, batch)
    model.set_packed(BY_SENTENCE)
    packed = step(model, name, batch)
    bounds = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-10, "atol": 1e-12}
    torch.testing.assert_close(packed[0], padded[0], **bounds)
    assert packed[1].keys() == padded[1].keys()
    for key, value in padded[1].items():
        if key != "routing":
            torch.testing.assert_close(torch.as_tensor(packed[1][key]), torch.as_tensor(value), **bounds)
    for layer, statistics in padded[1]["routing"].items():
        other = packed[1]["routing"][layer]
        assert torch.equal(other.load, statistics.load) and torch.equal(other.requested, statistics.requested)
        assert torch.equal(other.tokens, statistics.tokens)
        torch.testing.assert_close(other.entropy, statistics.entropy, rtol=1e-5, atol=1e-6)
    assert packed[2].keys() == padded[2].keys()
    for parameter, gradient in padded[2].items():
        torch.testing.assert_close(packed[2][parameter], gradient, **bounds, msg=lambda m, p=parameter: f"{p}: {m}")


@pytest.mark.parametrize("norm_order", ["pre", "post"])
def test_callers_who_want_padded_batches_get_them(norm_order: str) -> None:
    model = small_model("top_k", norm_order=norm_order).double().eval()
    source, target = sentences(LENGTHS, left=True), sentences([4, 7, 1, 8], seed=1)
    real = target.ne(PAD)
    expected, _ = model(source, None, target)
    hidden = model.encoder(source)["encoder_out"][0]
    model.set_packed(BY_SENTENCE)
    logits, _ = model(source, None, target)
    at = real.view(-1).nonzero().squeeze(1)
    chosen, _ = model(source, None, target, logits_at=at)
    encoded = model.encoder(source)
    assert encoded["packed"] is None
    torch.testing.assert_close(logits[real], expected[real], rtol=0, atol=1e-12)
    torch.testing.assert_close(chosen, expected[real], rtol=0, atol=1e-12)
    torch.testing.assert_close(encoded["encoder_out"][0][source.ne(PAD)], hidden[source.ne(PAD)], rtol=0, atol=1e-12)


def test_a_batch_is_packed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of rows of a [B, S, d] batch, one selection of the source and one of the target; no scattering."""
    calls = {"pack": 0, "unpack": 0}

    def counted(name: str) -> Any:
        original = getattr(BatchContext, name)

        def call(self: BatchContext, x: Tensor) -> Tensor:
            calls[name] += self.packed is None
            return original(self, x)  # type: ignore[no-any-return]

        return call

    for name in calls:
        monkeypatch.setattr(BatchContext, name, counted(name))
    model = small_model("switch").train()
    batch = sample(LENGTHS, [4, 7, 1, 8])
    step(model, "switch", batch)
    assert calls == {"pack": 4, "unpack": 4}, "padded: every sparse layer"
    model.set_packed(BY_SENTENCE)
    calls.update(pack=0, unpack=0)
    step(model, "switch", batch)
    assert calls == {"pack": 2, "unpack": 0}


@pytest.mark.parametrize("name", ["dense", "switch", "soft_moe", "smoe"])
def test_recomputation_changes_no_gradient_of_packed_rows(name: str) -> None:
    model = small_model(name, dropout=0.1).double().train()
    model.set_packed(BY_SENTENCE)
    found = []
    for recompute in (False, True):
        model.set_recompute(recompute)
        torch.manual_seed(0)
        found.append(step(model, name, sample(LENGTHS, [4, 7, 1, 8]))[2])
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-12)


def test_an_empty_batch_leaves_gradients() -> None:
    model = small_model("switch").train()
    model.set_packed(BY_SENTENCE)
    nothing = torch.empty(0, 1, dtype=torch.long)
    features, extra = model(nothing, None, nothing, features_only=True)
    assert features.shape == (0, 16)
    (features.sum() + sum(loss.value for record in extra["routing"] for loss in record.losses.values())).backward()
    inside = {name: p.grad for name, p in model.named_parameters() if "embed" not in name}
    assert all(gradient is not None and not gradient.any() for gradient in inside.values())


def test_attention_dropout_is_refused() -> None:
    model = small_model("dense", attention_dropout=0.1).train()
    model.set_packed(BY_SENTENCE)
    with pytest.raises(ValueError, match=r"model\.attention_dropout=0"):
        model(sentences([3]), None, sentences([4]))
    model.eval()(sentences([3]), None, sentences([4]))


def test_a_type_that_the_attention_does_not_take_stays_padded() -> None:
    model = small_model("dense").to(torch.bfloat16).eval()
    model.set_packed(BY_SENTENCE)
    features, extra = model(sentences([3, 5]), None, sentences([4, 2]), features_only=True)
    assert features.shape == (2, 4, 16) and "rows" not in extra


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["dense", "top_k", "soft_moe"])
def test_torchs_attention_trains_as_on_padded_batches(name: str) -> None:
    device = torch.device("cuda")
    attention = torch_varlen(device, 32)
    if attention is None:
        pytest.skip("this torch or this GPU has no attention over packed rows")
    model = small_model(name, embed_dim=64, ffn_dim=128).to(device).train()
    batch = sample([33, 1, 60, 3], [40, 7, 1, 58])
    batch["net_input"] = {name: value.to(device) for name, value in batch["net_input"].items()}
    batch["target"] = batch["target"].to(device)
    found = []
    for packed in (None, attention):
        model.set_packed(packed)
        with torch.autocast("cuda", torch.bfloat16):
            found.append(step(model, name, batch))
    assert found[1][0].item() == pytest.approx(found[0][0].item(), rel=1e-2)
    norms = [torch.nn.utils.get_total_norm(gradients.values()) for _, _, gradients in found]
    assert norms[1].item() == pytest.approx(norms[0].item(), rel=5e-2)

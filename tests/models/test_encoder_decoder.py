"""The translation model: what a position may see, steps against the full pass, reordering, recomputation, building."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_train.errors import ConfigError, DataError
from moe_train.models import TransformerModel
from moe_train.routing import registered_strategies
from tests.models.helpers import PAD, VARIANTS, causal_strategies, facts, sentences, small_model

CAUSAL = causal_strategies()
DECODERS = [*CAUSAL, *VARIANTS]
EVERY = [*sorted(registered_strategies()), *VARIANTS]  # strategies that decoders reject are used in the encoder


def full(model: TransformerModel, source: Tensor, target: Tensor, **who: Tensor) -> Tensor:
    with torch.no_grad():
        logits, _ = model.eval()(source, None, target, **who)
    return logits


def test_what_sees_later_tokens_is_not_among_them() -> None:
    assert set(registered_strategies()) - set(CAUSAL) == {"expert_choice", "soft_moe"}


@pytest.mark.parametrize(
    ("name", "norm_order"), [(n, "pre") for n in DECODERS] + [(n, "post") for n in CAUSAL], ids=str
)
def test_steps_give_the_logits_of_the_full_pass(name: str, norm_order: str) -> None:
    model, source, target, who = (
        small_model(name, norm_order=norm_order),
        sentences([7, 4, 6]),
        sentences([6] * 3),
        facts(3),
    )
    expected = full(model, source, target, **who)
    with torch.no_grad():
        encoded = model.encoder(source, None, **who)
        state = model.start_decoding(encoded, beam=2, max_length=3)  # and let it grow
        steps = [model.decode_step(target[:, t].repeat_interleave(2), state) for t in range(6)]
    both = torch.stack(steps, 1).view(3, 2, 6, -1)
    torch.testing.assert_close(both[:, 0], expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(both[:, 1], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", CAUSAL)
def test_fairseqs_incremental_protocol_gives_the_same(name: str) -> None:
    model, source, target, who = small_model(name), sentences([7, 4]), sentences([5, 5]), facts(2)
    expected = full(model, source, target, **who)
    order = torch.tensor([1, 0, 0])
    with torch.no_grad():
        encoded = model.encoder(source, None, **who)
        state: dict[str, object] = {}
        for t in range(3):
            logits, _ = model.decoder(target[:, : t + 1], encoder_out=encoded, incremental_state=state)
            torch.testing.assert_close(logits[:, 0], expected[:, t], atol=1e-5, rtol=0)
        model.decoder.reorder_incremental_state_scripting(state, order)
        encoded = model.encoder.reorder_encoder_out(encoded, order)
        logits, _ = model.decoder(target[order, :4], encoder_out=encoded, incremental_state=state)
    torch.testing.assert_close(logits[:, 0], expected[order, 3], atol=1e-5, rtol=0)


@given(data=st.data())
@settings(max_examples=20)
def test_any_reordering_equals_decoding_each_history_alone(data: st.DataObject) -> None:
    """Beams swap, sentences finish and move: every hypothesis scores as its own history does in a full pass."""
    beam, steps, batch = 3, 5, 3
    model = small_model("thor")
    source, who = sentences([7, 4, 6]), facts(batch)
    encoded = model.eval().encoder(source, None, **who)
    state = model.start_decoding(encoded, beam, 2)
    state.cache.compact_interval = data.draw(st.sampled_from([1, 2, 8]))
    histories = torch.empty(batch * beam, 0, dtype=torch.long)
    owner = torch.arange(batch).repeat_interleave(beam)
    draw = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    for _ in range(steps):
        tokens = torch.randint(4, 40, (len(histories),), generator=draw)
        histories = torch.cat((histories, tokens[:, None]), 1)
        logits = model.decode_step(tokens, state)
        here = {key: value[owner] for key, value in who.items()}
        torch.testing.assert_close(logits, full(model, source[owner], histories, **here)[:, -1], atol=1e-5, rtol=0)
        groups = len(histories) // beam
        order = data.draw(st.permutations(range(groups)))[: data.draw(st.integers(1, groups))]
        rows = torch.tensor([g * beam + data.draw(st.integers(0, beam - 1)) for g in order for _ in range(beam)])
        state.reorder(rows)
        histories, owner = histories[rows], owner[rows]
        assert state.rows == len(rows)


def test_a_search_whose_sentences_are_all_done_goes_on_without_rows() -> None:
    """Ranks that hold experts for others must keep in step with them."""
    model = small_model("switch").eval()
    state = model.start_decoding(model.encoder(sentences([5, 3])), beam=2, max_length=4)
    model.decode_step(torch.tensor([5, 6, 7, 8]), state)
    nobody = torch.empty(0, dtype=torch.long)
    state.reorder(nobody)
    assert state.rows == 0
    assert model.decode_step(nobody, state).shape == (0, 40)


def test_slots_without_descendants_are_removed() -> None:
    """Beams that come from one parent at every step keep one slot per position between them."""
    model, beam, steps = small_model(), 4, 40
    state = model.start_decoding(model.encoder(sentences([5, 5])), beam, steps)
    for _ in range(steps):
        model.decode_step(torch.full((2 * beam,), 7), state)
        state.reorder(torch.tensor([0] * beam + [beam] * beam))
    assert state.step == steps
    assert steps <= state.cache.used <= steps + state.cache.compact_interval * beam < steps * beam


def test_beams_of_a_sentence_cannot_continue_another() -> None:
    model = small_model()
    state = model.start_decoding(model.encoder(sentences([3, 3])), beam=2, max_length=4)
    with pytest.raises(ValueError, match="one sentence"):
        state.reorder(torch.tensor([0, 2, 2, 3]))


@pytest.mark.parametrize("name", DECODERS)
def test_a_later_token_changes_nothing_earlier(name: str) -> None:
    model, source, target, who = small_model(name), sentences([5, 5]), sentences([6, 6]), facts(2)
    changed = target.clone()
    changed[:, 4] = (changed[:, 4] + 7) % 30 + 4
    before, after = full(model, source, target, **who), full(model, source, changed, **who)
    torch.testing.assert_close(before[:, :4], after[:, :4], atol=1e-6, rtol=0)
    assert (before[:, 4] - after[:, 4]).abs().max() > 1e-3


@pytest.mark.parametrize("name", EVERY)
def test_a_sentence_does_not_depend_on_its_batch_mates(name: str) -> None:
    model, source, target, who = small_model(name), sentences([4, 9, 6]), sentences([5, 8, 3]), facts(3)
    together = full(model, source, target, **who)
    alone = full(model, source[:1, :4], target[:1, :5], **{key: value[:1] for key, value in who.items()})
    torch.testing.assert_close(together[:1, :5], alone, atol=1e-5, rtol=0)


def test_a_source_may_be_padded_on_the_left() -> None:
    model, target = small_model("switch"), sentences([5, 5])
    right, left = sentences([4, 7]), sentences([4, 7], left=True)
    assert right[0, -1] == PAD and left[0, 0] == PAD
    torch.testing.assert_close(full(model, left, target), full(model, right, target), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", EVERY)
def test_recomputation_changes_no_gradient(name: str) -> None:
    model = small_model(name, dropout=0.1, attention_dropout=0.1).train()
    source, target, who = sentences([5, 3]), sentences([4, 6]), facts(2)
    gradients = []
    for recompute in (False, True):
        model.set_recompute(recompute)
        model.zero_grad(set_to_none=True)
        torch.manual_seed(0)
        logits, extra = model(source, None, target, **who)
        losses = [loss.value for record in extra["routing"] for loss in record.losses.values()]
        (logits.square().mean() + sum(losses)).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for parameter, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][parameter], msg=lambda m, p=parameter: f"{p}: {m}")


@pytest.mark.parametrize("name", ["dense", "switch"])
def test_every_parameter_gets_a_gradient(name: str) -> None:
    """No dead parameters: DDP would wait for them for ever."""
    for share in (True, False):
        model = small_model(name, share_embeddings=share).train()
        logits, _ = model(sentences([5, 3]), None, sentences([4, 6]))
        logits.logsumexp(-1).sum().backward()
        assert [n for n, p in model.named_parameters() if p.grad is None] == []


def test_an_empty_batch_passes_through_and_leaves_gradients() -> None:
    model = small_model("switch").train()
    nothing = torch.empty(0, 1, dtype=torch.long)
    logits, extra = model(nothing, None, nothing)
    assert logits.shape == (0, 1, 40)
    (logits.sum() + sum(loss.value for record in extra["routing"] for loss in record.losses.values())).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


def test_logits_at_chosen_positions_and_features() -> None:
    model, source, target = small_model("switch"), sentences([5, 3]), sentences([4, 6])
    run_on_all_ranks = full(model, source, target)
    real = target.view(-1).ne(PAD).nonzero().squeeze(1)
    chosen, _ = model(source, None, target, logits_at=real)
    torch.testing.assert_close(chosen, run_on_all_ranks.view(-1, 40)[real])
    features, _ = model(source, None, target, features_only=True)
    torch.testing.assert_close(model.output_layer(features), run_on_all_ranks)


def test_sparse_blocks_are_numbered_through_the_model() -> None:
    model = small_model("switch", sparse_layers="odd", decoder_sparse_layers="insert_after:1")
    _, extra = model(sentences([5]), None, sentences([4]))
    assert [record.layer for record in extra["routing"]] == [0, 1]
    assert model.encoder.stack.layers[0].feed_forward.block.__class__.__name__ == "FeedForward"
    assert model.decoder.stack.layers[0].inserted is not None
    assert model.decoder.stack.layers[1].inserted is None


def test_weights_follow_the_seed_and_nothing_else() -> None:
    torch.manual_seed(1)
    first = small_model("switch", seed=5).state_dict()
    torch.manual_seed(2)
    again = small_model("switch", seed=5).state_dict()
    other = small_model("switch", seed=6).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    name = "encoder.stack.layers.0.self_attention.qkv_weight"
    assert not torch.equal(first[name], other[name])
    dense = small_model("dense", seed=5).state_dict()
    assert torch.equal(first[name], dense[name])  # independent of the other modules


def test_a_sentence_beyond_the_positions_is_refused() -> None:
    with pytest.raises(DataError, match=r"65 tokens.*64 positions"):
        small_model()(sentences([65]), None, sentences([3]))


def test_an_unknown_architecture_offers_the_known() -> None:
    with pytest.raises(ConfigError, match="transformer"):
        small_model(name="transformr")


def test_a_router_stays_in_fp32_where_the_model_is_cast() -> None:
    model = small_model("switch").bfloat16()
    kinds = {p.dtype for n, p in model.named_parameters() if ".router." in n}
    assert kinds == {torch.float32}
    logits, _ = model(sentences([5, 3]), None, sentences([4, 6]))
    assert logits.dtype == torch.bfloat16
    assert {p.dtype for p in model.double().parameters()} == {torch.float64}


def test_autocast_routes_as_fp32_does() -> None:
    """The first sparse block sees inputs that bf16 has hardly touched: with scores in fp32 it chooses the same."""
    model, source, target = small_model("switch", norm_order="pre").eval(), sentences([9, 9]), sentences([8, 8])
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        _, low = model(source, None, target)
        weights = low["routing"][0].routing[0].assignment.weight
    assert weights.dtype == torch.float32

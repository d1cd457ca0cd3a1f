"""Probes of models: what blocks saw is what went in, and a run's measures along its checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from moe_train.analysis.probe.collapse import representation_collapse
from moe_train.analysis.probe.groups import specialisation
from moe_train.analysis.probe.probing import LayerProbe, capacity_by_stack, describe_probe, probe, probe_run
from moe_train.data.folder import DataFolder
from moe_train.layers import StratifiedLayer
from tests.commands.test_train import here
from tests.models.helpers import PAD
from tests.models.test_encoder import language_model
from tests.models.test_vision import pictures, vision

TOKENS = torch.tensor([[0, 7, 8, 9, 2], [0, 11, 2, PAD, PAD]])


@pytest.fixture(autouse=True)
def _the_same_models() -> None:
    """Weights that send all of a few tokens to one expert would leave nothing to measure."""
    torch.manual_seed(0)


def sample(**more: Any) -> dict[str, Any]:
    languages = torch.tensor([0, 1])
    return {"net_input": {"src_tokens": TOKENS, "src_lang": languages, "tgt_lang": languages, **more}}


def test_what_a_block_saw_and_chose() -> None:
    model = language_model({"name": "switch", "num_experts": 4}).eval()
    found = probe(model, [sample(), sample()])
    assert list(found) == [0, 1]
    layer = found[1]
    assert torch.cat(layer.states).shape == (16, 16) and layer.first.shape == (16,)
    assert torch.cat(layer.token_id)[:8].tolist() == [0, 7, 8, 9, 2, 0, 11, 2]
    assert torch.cat(layer.language)[:8].tolist() == [0] * 5 + [1] * 3
    with torch.no_grad():
        _, extra = model(**sample()["net_input"])
    assert torch.equal(layer.first[:8], extra["routing"][1].routing[0].choices[:, 0])
    content = describe_probe(layer)
    states, token = torch.cat(layer.states), torch.cat(layer.token_id)
    assert content["collapse_by_token"] == representation_collapse(states, token)
    assert sum(content["load"]) == 16 and content["dropped_fraction"] == 0.0
    assert len(content["load_by_language"]) == 2 and 0.0 <= content["specialisation"] <= 1.0
    assert not [m for m in model.modules() if m._forward_hooks]


def test_strata_tell_the_capacity_that_tokens_request() -> None:
    model = language_model({"name": "smoe", "num_experts": 4, "strata": [1, 3]})
    found = probe(model, [sample()])
    content = describe_probe(found[0])
    assert 1.0 <= content["requested_capacity"] <= 2.0
    capacities = [describe_probe(layer)["requested_capacity"] for layer in found.values()]
    assert capacity_by_stack(found) == {"encoder": pytest.approx(sum(capacities) / 2)}
    found[1].stack = "decoder"
    assert list(capacity_by_stack(found).values()) == pytest.approx(capacities)
    by_language = content["requested_capacity_by_language"]
    assert content["requested_capacity"] == pytest.approx((5 * by_language[0] + 3 * by_language[1]) / 8)
    often = describe_probe(probe(model, [sample()] * 6)[0])["requested_capacity_by_token"]
    assert set(often) == {0, 2} and content["requested_capacity_by_token"] == {}  # twice a batch, the others once


def test_what_the_measures_say_of_known_choices() -> None:
    """Two languages, two choices each, one pair dropped, one token without an expert."""
    layer = LayerProbe(
        3,
        states=[torch.eye(4)],
        choices=[torch.tensor([[0, 1], [0, 2]]), torch.tensor([[2, 1], [1, -1]])],
        kept=[torch.tensor([[True, True], [True, False]]), torch.tensor([[True, True], [False, False]])],
        language=[torch.tensor([0, 0]), torch.tensor([1, 1])],
        token_id=[torch.tensor([5, 6]), torch.tensor([5, 6])],
    )
    content = describe_probe(layer)
    assert content["load"] == [2, 2, 1] and content["dead"] == 0.0
    assert content["load_by_language"] == [pytest.approx([2 / 3, 1 / 3, 0.0]), [0.0, 0.5, 0.5]]
    counts = torch.tensor([[2, 1, 0], [0, 1, 1]])
    assert content["specialisation"] == specialisation(counts) > 0.3
    assert content["dropped_fraction"] == 0.25 and content["dropped_pairs"] == pytest.approx(2 / 7)
    assert "requested_capacity" not in content


@pytest.mark.parametrize("factor", [None, 0.5])
@pytest.mark.parametrize(
    ("routing", "pairs"),
    [
        ({"name": "top_k", "top_k": 3}, 24),
        ({"name": "sam", "num_groups": 2, "top_k": 2}, 16),
        ({"name": "smoe", "strata": [1, 1, 2]}, None),
    ],
    ids=lambda value: value["name"] if isinstance(value, dict) else "",
)
def test_load_is_of_all_choices_and_passes_that_are_carried_out(
    routing: dict[str, Any], pairs: int | None, factor: float | None
) -> None:
    """As the router counts them, which the log shows; eight tokens."""
    model = language_model({"num_experts": 4, "evaluation_capacity_factor": factor, **routing}).eval()
    found = probe(model, [sample()])
    with torch.no_grad():
        _, extra = model(**sample()["net_input"])
    for record in extra["routing"]:
        layer, statistics = found[record.layer], record.statistics
        content = describe_probe(layer)
        assert content["load"] == statistics.load.tolist()
        asked = pairs if pairs is not None else 2 * int(sum(p.sum() for p in layer.passes))
        assert int(statistics.requested.sum()) == asked
        assert content["dropped_pairs"] == pytest.approx(1 - sum(content["load"]) / asked)
        assert (content["dropped_pairs"] > 0) == (factor is not None)
        totals = [sum(load) for load in content["load_by_language"]]
        assert all(total == pytest.approx(1.0) or (factor and total == 0.0) for total in totals)
        nobody = torch.stack([~(p.kept & (p.choices >= 0)).any(1) for p in record.routing]).all(0)
        assert content["dropped_fraction"] == pytest.approx(float(nobody.double().mean()))


@pytest.mark.parametrize("norm", ["paper", "official"])
def test_strata_show_what_their_first_gate_sees(norm: str) -> None:
    model = language_model({"name": "smoe", "num_experts": 4, "strata": [1, 3], "norm": norm}).eval()
    with torch.no_grad():  # a fresh norm's are 1 and 0
        for module in model.modules():
            if isinstance(module, StratifiedLayer):
                module.norms[0].weight.uniform_(0.5, 1.5)
    seen: dict[int, torch.Tensor] = {}
    for module in model.modules():
        if isinstance(module, StratifiedLayer):
            module.router.strata[0].register_forward_pre_hook(
                lambda gate, inputs, layer=module.layer: seen.update({layer: inputs[0]})
            )
    found = probe(model, [sample()])
    assert sorted(seen) == sorted(found) == [0, 1]
    for number, layer in found.items():
        torch.testing.assert_close(layer.states[0], seen[number], rtol=0, atol=0)
        assert describe_probe(layer)["collapse_by_expert"] == representation_collapse(seen[number], layer.first)


def test_soft_blocks_tell_of_their_mixes() -> None:
    model = vision({"name": "soft_moe", "num_experts": 3})
    images = {"net_input": {"images": pictures(4), "sentence_uid": torch.arange(4)}}
    content = describe_probe(probe(model, [images])[0])
    assert 1.0 <= content["tokens_per_slot"] <= 6.0 and 1.0 <= content["slots_per_token"] <= 6.0
    assert content["tokens"] == 24 and "load" not in content and "requested_capacity" not in content
    text = describe_probe(probe(language_model({"name": "soft_moe", "num_experts": 2}), [sample()])[0])
    assert text["tokens"] == 8 and 1.0 <= text["tokens_per_slot"] <= 5.0  # sentences of 5 and of 3, padding left out


def test_expert_choice_counts_tokens_that_nobody_takes() -> None:
    model = vision({"name": "expert_choice", "num_experts": 3, "capacity_factor": 0.5})
    images = {"net_input": {"images": pictures(4), "sentence_uid": torch.arange(4)}}
    assert describe_probe(probe(model, [images])[0])["dropped_fraction"] >= 0.5


@pytest.mark.processes
def test_a_run_along_its_checkpoints(tiny_data: DataFolder, tmp_path: Path) -> None:
    words = [
        *(
            "task=cross_lingual_lm",
            "model=encoder_tiny",
            "routing=switch",
            "routing.num_experts=4",
            "training.threads=1",
        ),
        *("model.embed_dim=16", "model.ffn_dim=32", "model.num_heads=2", "model.encoder_layers=2"),
        *("training.max_updates=9", "training.tokens_per_update=300", "training.checkpoint.every_updates=3"),
        *("training.schedule.warmup_updates=2", "training.optimizer.lr=0.01", "training.validation.max_sentences=10"),
        *(f"data={tiny_data.path}", f"hydra.run.dir={tmp_path / 'run'}"),
    ]
    assert here(words, tmp_path)[0] == 0
    found = probe_run(tmp_path / "run", max_sentences=5)
    assert list(found["checkpoints"]) == ["3", "6", "9"]
    (ratios,) = found["fluctuation"].values()
    assert len(ratios) == 2 and all(0.0 <= ratio <= 1.0 for ratio in ratios) and ratios != [0.0, 0.0]
    again = probe_run(tmp_path / "run", max_sentences=5, checkpoints=[9, 9])
    assert list(again["fluctuation"].values()) == [[0.0]]
    tokens = {entry["1" if "1" in entry else "0"]["tokens"] for entry in found["checkpoints"].values()}
    assert len(tokens) == 1
    assert found["requested_capacity"] == {"3": {}, "6": {}, "9": {}}, "Switch has no strata"

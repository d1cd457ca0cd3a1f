from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from moe_train.routing.types import RoutingStatistics, count_statistics
from moe_train.tasks import metric_registry
from moe_train.tasks.metric_registry import per_token
from moe_train.training.metrics.log_lines import MetricInterval, MetricSums, describe_routing, total

CPU = torch.device("cpu")


def statistics(*choices: int, dropped: int = 0) -> RoutingStatistics:
    kept = torch.ones(len(choices), 1, dtype=torch.bool)
    kept[:dropped] = False
    probabilities = torch.full((len(choices), 4), 0.25)
    return count_statistics(torch.tensor(choices).unsqueeze(1), kept, 4, probabilities, {"odd": torch.tensor([1, 2])})


def sums(loss: float, tokens: int, *choices: int, dropped: int = 0) -> MetricSums:
    logging = {
        "loss": torch.tensor(loss),
        "ntokens": tokens,
        "nsentences": 1,
        "routing": {0: statistics(*choices, dropped=dropped), 10: statistics(*choices)},
    }
    return MetricSums.of(logging, CPU)


def test_sums_add_and_come_back_by_name() -> None:
    both = total([sums(1.5, 3, 0, 1, 1), sums(2.0, 2, 3, 3, dropped=1)])
    assert both.scalars() == {"loss": 3.5, "ntokens": 5.0, "nsentences": 2.0}
    layers = both.routing()
    assert list(layers) == [0, 10]
    assert layers[0].load.tolist() == [1, 2, 0, 1] and layers[0].requested.tolist() == [1, 2, 0, 2]
    assert float(layers[0].dropped) == 1.0 and float(layers[0].tokens) == 5.0
    assert layers[10].extra["odd"].tolist() == [2.0, 4.0]


def test_other_names_are_refused() -> None:
    with pytest.raises(ValueError, match="other names"):
        _ = sums(1.0, 1, 0) + MetricSums.of({"loss": 1.0}, CPU)


def test_metrics_are_reduced_as_they_are_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metric_registry, "_METRICS", dict(metric_registry._METRICS))
    metric_registry.register_logged_metric("longest", "max", "longest {:.0f}")
    metric_registry.register_logged_metric("unknown", "sum")
    with pytest.raises(ValueError, match="'longest' is registered twice"):
        metric_registry.register_logged_metric("longest")
    parts = [
        MetricSums.of({"loss": 2.0, "longest": longest, "unknown": 3, "ntokens": 4, "nsentences": 1}, CPU)
        for longest in (7, 9, 8)
    ]
    both = total(parts)
    assert both.has_maxima and not sums(1.0, 1, 0).has_maxima
    line = per_token(both.scalars())
    assert line == {"loss": 0.5, "longest": 9.0, "unknown": 9.0, "tokens": 12, "sentences": 3}
    assert metric_registry.shown_text(line) == ", longest 9"
    assert (
        metric_registry.reduced("longest", [7.0, 9.0]) == 9.0 and metric_registry.reduced("unknown", [3.0, 3.0]) == 6.0
    )
    again = both.with_values(both.values, both.values + 1)  # sums and maxima over ranks
    assert again.scalars() == {**both.scalars(), "longest": 10.0}


def test_json_keeps_every_bit() -> None:
    one = sums(0.1 + 0.2, 3, 0, 1, 1)
    again = MetricSums.from_json(json.loads(json.dumps(one.to_json())))
    assert again.layout == one.layout and torch.equal(again.values, one.values)


def test_an_interval_survives_a_checkpoint() -> None:
    whole, first = MetricInterval(), MetricInterval()
    updates = [(sums(1.5, 3, 0, 1, 1), 0.1), (sums(1.0, 2, 2, 2), None), (sums(0.7, 1, 3), 0.3)]
    for part, norm in updates:
        whole.add(part, norm, 1.0)
    for part, norm in updates[:2]:
        first.add(part, norm, 1.0)
    second = MetricInterval.from_json(json.loads(json.dumps(first.to_json())))
    second.add(*updates[2], 2.0)
    line, resumed = whole.line(), second.line()
    assert line.pop("words_per_second") == 2.0 and resumed.pop("words_per_second") == 0.5
    assert line == resumed
    assert line["loss"] == pytest.approx(3.2 / 6) and line["grad_norm"] == pytest.approx(0.2) and line["tokens"] == 6


def test_routing_is_described_by_fractions() -> None:
    line = describe_routing({3: statistics(0, 0, 0, 1, dropped=1)})
    assert line["load"] == {"3": [2 / 3, 1 / 3, 0.0, 0.0]}
    assert line["load_max_over_mean"]["3"] == pytest.approx(8 / 3)
    assert line["dead_experts"] == 2 and line["dropped"] == 1 and line["dropped_fraction"] == 0.25
    assert line["router_entropy"]["3"] == pytest.approx(1.3863, abs=1e-4)
    assert line["pairs_per_token"] == {"3": 0.75}  # three of four tokens, one was dropped
    assert line["extra_per_token"] == {"3": {"odd": [0.25, 0.5]}}
    assert "extra_per_token" not in describe_routing({3: dataclasses.replace(statistics(0), extra={})})
    assert describe_routing({}) == {}


def test_losses_are_per_token_in_nats() -> None:
    line = per_token({"loss": 12.0, "nll_loss": 6.0, "ntokens": 3.0, "nsentences": 2.0, "balance_loss": 3.0})
    assert line["loss"] == 4.0 and line["balance_loss"] == 1.0 and line["ppl"] == pytest.approx(7.389, abs=1e-3)
    assert line["tokens"] == 3 and line["sentences"] == 2
    assert per_token({"loss": 0.0, "ntokens": 0.0})["loss"] == 0.0

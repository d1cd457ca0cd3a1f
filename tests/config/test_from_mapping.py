"""The strict road from a mapping to frozen dataclasses."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import pytest

from moe_train.config import RunConfig, build, to_mapping
from moe_train.errors import ConfigError


@dataclass(frozen=True)
class Inner:
    rate: float = 0.5
    mode: Literal["mean", "sum"] = "mean"


@dataclass(frozen=True)
class Outer:
    path: str
    count: int = 3
    names: tuple[str, ...] = ()
    spec: str | tuple[int, ...] = "odd"
    limit: int | None = None
    inner: Inner = field(default_factory=Inner)


def test_nested_values_and_defaults() -> None:
    built = build(Outer, {"path": "x", "names": ["a", "b"], "spec": [1, 3], "inner": {"rate": 1}})
    assert built == Outer("x", names=("a", "b"), spec=(1, 3), inner=Inner(rate=1.0))


@pytest.mark.parametrize(
    ("mapping", "words"),
    [
        ({"path": "x", "cuont": 1}, ["unknown key 'cuont'", "'count'"]),
        ({"path": "x", "inner": {"rat": 1}}, ["inner.rat", "'rate'"]),
        ({}, ["'path' has no value", "path="]),
        ({"path": "x", "count": "many"}, ["'count' must be a whole number", "many"]),
        ({"path": "x", "count": True}, ["'count' must be a whole number"]),
        ({"path": "x", "inner": {"mode": "maen"}}, ["inner.mode", "'mean'"]),
        ({"path": "x", "inner": 3}, ["'inner' must be a group of keys"]),
        ({"path": "x", "names": "ab"}, ["'names' must be a list, not 'ab'. Write 'names=[ab]'."]),
        ({"path": "x", "names": {"a": 1}}, ["'names' must be a list", "Correct names=…"]),
    ],
)
def test_what_does_not_fit_is_named_with_a_remedy(mapping: dict[str, object], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        build(Outer, mapping)
    for word in words:
        assert word in str(caught.value)


def test_yaml_reads_exponents_without_a_dot_as_text_and_we_as_numbers() -> None:
    assert build(Inner, {"rate": "1e-3"}).rate == 0.001


def test_a_run_survives_the_way_through_json() -> None:
    import json

    config = build(RunConfig, {"data": "d", "model": {"sparse_layers": [1]}, "routing": {"name": "switch"}})
    assert build(RunConfig, json.loads(json.dumps(to_mapping(config)))) == config


@pytest.mark.parametrize(
    ("mapping", "key"),
    [
        ({"model": {"embed_dim": 10, "num_heads": 3}}, "model.num_heads"),
        ({"model": {"dropout": 1.0}}, "model.dropout"),
        ({"training": {"max_updates": 0}}, "training.max_updates"),
        ({"training": {"validation": {"metric": "bleu"}}}, "training.validation.bleu=true"),
        ({"launch": {"port": 70000}}, "launch.port"),
        ({"task": {"source_tag": "none"}}, "task.source_tag=target"),
    ],
)
def test_invalid_values_name_the_key(mapping: dict[str, object], key: str) -> None:
    with pytest.raises(ConfigError, match=key.replace(".", r"\.")):
        build(RunConfig, {"data": "d", **mapping})

"""The shipped configs/routing/*.yaml: complete, commented, and equal to the defaults in code."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml

from moe_train.config.paths import configs_directory
from moe_train.errors import ConfigError
from moe_train.routing import decoder_config, registered_strategies, routing_config

FILES = sorted((configs_directory() / "routing").glob("*.yaml"))


def test_every_strategy_has_its_file_and_every_file_its_strategy() -> None:
    assert {f.stem for f in FILES} == set(registered_strategies())


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_a_file_says_what_the_code_defaults_to(path: Path) -> None:
    keys = yaml.safe_load(path.read_text())
    assert next(iter(keys)) == "name"
    assert keys["name"] == path.stem
    assert keys["num_experts"] == 8
    config = routing_config(keys)
    if path.stem == "dense":
        return
    defaults = routing_config({"name": path.stem})
    for key in keys:
        if key != "decoder":  # in code what is not causal is refused; the files name a way out
            assert getattr(config, key) == getattr(defaults, key), key


@pytest.mark.parametrize("path", [f for f in FILES if f.stem != "dense"], ids=lambda p: p.stem)
def test_every_key_stands_in_the_file_with_a_comment(path: Path) -> None:
    text = path.read_text()
    keys = yaml.safe_load(text)
    known = {f.name for f in dataclasses.fields(routing_config({"name": path.stem}))}
    own = known - {"expert_sublayers"}  # X-MoE's and BASE's; a file may leave it out
    assert own <= set(keys), f"missing: {sorted(own - set(keys))}"
    for line in text.splitlines():
        if line and not line.startswith(("#", " ", "name:")):
            assert "#" in line, f"no comment: {line}"


def test_an_unknown_strategy_is_answered_with_near_names() -> None:
    with pytest.raises(ConfigError, match="'switch'"):
        routing_config({"name": "swich"})
    with pytest.raises(ConfigError, match="names no strategy"):
        routing_config({})


def test_a_key_of_another_strategy_is_answered_with_its_owner() -> None:
    with pytest.raises(ConfigError, match=r"'routing\.strata' is a key of smoe, not of switch"):
        routing_config({"name": "switch", "strata": [4, 4]})
    with pytest.raises(ConfigError, match=r"'routing\.decoder\.num_groups' is a key of sam, not of top_k"):
        decoder_config(routing_config({"name": "switch", "decoder": {"name": "top_k", "num_groups": 4}}))
    with pytest.raises(ConfigError, match=r"'routing\.top_k' is a key of sam, smoe, top_k, not .*routing\.k out"):
        routing_config({"name": "switch", "k": 2})
    with pytest.raises(ConfigError, match=r"unknown key 'routing\.k'\. Did you mean 'top_k'\?"):
        routing_config({"name": "sam", "k": 2})


def test_the_decoder_inherits_what_both_strategies_have() -> None:
    config = routing_config({"name": "switch", "num_experts": 12, "expert_ffn_dim": 64, "decoder": "top_k"})
    chosen = decoder_config(config)
    assert (chosen.name, chosen.num_experts, chosen.expert_ffn_dim, chosen.decoder) == ("top_k", 12, 64, None)
    mapped = routing_config({"name": "switch", "decoder": {"name": "top_k", "top_k": 4}})
    assert dataclasses.asdict(decoder_config(mapped))["top_k"] == 4
    assert decoder_config(routing_config({"name": "switch"})).name == "switch"
    with pytest.raises(ConfigError, match=r"routing\.decoder\.topk"):
        decoder_config(routing_config({"name": "switch", "decoder": {"name": "top_k", "topk": 4}}))

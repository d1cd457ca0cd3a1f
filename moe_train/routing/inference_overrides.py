"""Overrides of a strategy's ``evaluation_keys``, such as THOR's ``inference``.

These keys decide how a trained model routes, and do not affect its parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moe_train.errors import ConfigError
from moe_train.routing.registry import decoder_config, routing_config

_DECODER = "decoder."


def evaluation_values(keys: Mapping[str, Any]) -> dict[str, Any]:
    """Evaluation keys and their values of a ``routing`` group; those of a decoder's own strategy as ``decoder.KEY``."""
    config = routing_config(keys)
    found = {key: getattr(config, key) for key in config.evaluation_keys}
    if config.decoder is not None:
        decoder = decoder_config(config)
        found |= {f"{_DECODER}{key}": getattr(decoder, key) for key in decoder.evaluation_keys}
    return found


def changed(keys: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The ``routing`` group with ``changes``.

    Args:
        changes: new values; those of a decoder's own strategy in a group ``decoder``, or as ``decoder.KEY``.

    Raises:
        ConfigError: a key is not an evaluation key, or a value is invalid.
    """
    flat, allowed = _flat(changes), evaluation_values(keys)
    for key in flat:
        if key not in allowed:
            known = ", ".join(f"routing.{name}" for name in allowed)
            raise ConfigError(
                f"'routing.{key}' cannot change after training with routing={keys['name']}",
                remedy=f"these can: {known}" if known else "leave it out: no key of this strategy can",
            )
    found = {**keys, **{key: value for key, value in flat.items() if not key.startswith(_DECODER)}}
    inner = {key.removeprefix(_DECODER): value for key, value in flat.items() if key.startswith(_DECODER)}
    if inner:
        before = keys["decoder"]
        found["decoder"] = {**({"name": before} if isinstance(before, str) else before), **inner}
    evaluation_values(found)  # raises ConfigError for invalid values
    return found


def check_draw_seed(keys: Mapping[str, Any], draw_seed: int) -> None:
    """Checks that a seed has an effect.

    Raises:
        ConfigError: neither the ``routing`` group nor its decoder's own strategy draws experts at inference.
    """
    config = routing_config(keys)
    decoder = config if config.decoder is None else decoder_config(config)
    if config.draws_at_inference or decoder.draws_at_inference:
        return
    as_set = [f"routing.{key}={value}" for key, value in evaluation_values(keys).items() if value is not None]
    with_keys = ", ".join([f"routing={config.name}", *as_set])
    raise ConfigError(
        f"'draw_seed={draw_seed}' would change nothing: with {with_keys} no expert is drawn at inference",
        remedy="leave draw_seed out",
    )


def _flat(changes: Mapping[str, Any]) -> dict[str, Any]:
    found = dict(changes)
    inner = found.get("decoder")
    if isinstance(inner, Mapping):
        del found["decoder"]
        found |= {f"{_DECODER}{key}": value for key, value in inner.items()}
    return found

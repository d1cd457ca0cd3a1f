"""Registry of routing strategies by name. Modules in :mod:`moe_train.routing.strategies` register themselves."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from moe_train.config.from_mapping import build
from moe_train.errors import ConfigError, spelt_out
from moe_train.plugins import load_plugin, offer_names
from moe_train.routing.base import Router, RouterInputs, RoutingConfig

R = TypeVar("R", bound=type[Router])


@dataclass(frozen=True)
class Strategy:
    """A registered strategy: its config dataclass and its router class."""

    name: str
    config: type[RoutingConfig]
    router: type[Router]


_STRATEGIES: dict[str, Strategy] = {}


def register(name: str, config: type[RoutingConfig]) -> Callable[[R], R]:
    """Class decorator that makes ``routing=name`` build the decorated router.

    Raises:
        ValueError: the name is already registered.
    """

    def decorate(router: R) -> R:
        if name in _STRATEGIES:
            raise ValueError(f"the strategy {name!r} is registered twice")
        _STRATEGIES[name] = Strategy(name, config, router)
        return router

    return decorate


def registered_strategies() -> Mapping[str, Strategy]:
    """All registered strategies by name, including those of entry points that were looked up before."""
    return dict(_STRATEGIES)


def find_strategy(name: str) -> Strategy | None:
    """The strategy of that name, from this package or from an entry point; None if there is none."""
    load_plugin("strategies", name, _STRATEGIES)
    return _STRATEGIES.get(name)


def strategy(name: str) -> Strategy:
    """The strategy of that name.

    Raises:
        ConfigError: there is none.
    """
    if (found := find_strategy(name)) is None:
        raise ConfigError(f"there is no routing strategy '{name}'", remedy=offer_names("strategies", name, _STRATEGIES))
    return found


def routing_config(keys: Mapping[str, Any]) -> RoutingConfig:
    """Builds the strategy's own config from the ``routing`` group.

    Raises:
        ConfigError: unknown strategy or key, or invalid values.
    """
    name = keys.get("name")
    if not name:
        known = offer_names("strategies", "", _STRATEGIES)
        raise ConfigError("the routing group names no strategy", remedy=f"set routing=…; {known}")
    return _built(strategy(str(name)), keys, "routing")


def _built(target: Strategy, keys: Mapping[str, Any], where: str) -> RoutingConfig:
    """The strategy's config; the error for a key of other strategies names these."""
    own = {f.name for f in dataclasses.fields(target.config)}
    for key in keys:
        full = spelt_out(key)
        owners = [s.name for s in _STRATEGIES.values() if full in {f.name for f in dataclasses.fields(s.config)}]
        if not own & {key, full} and owners:
            raise ConfigError(
                f"'{where}.{full}' is a key of {', '.join(sorted(owners))}, not of {target.name}",
                remedy=f"leave {where}.{key} out, or choose another strategy",
            )
    return build(target.config, keys, where)


def resolve(keys: Mapping[str, Any], *, ranks: int, nodes: int) -> dict[str, Any]:
    """The ``routing`` group with the values ``rank`` and ``node`` of layout keys replaced by numbers.

    Called once, at the first launch; from then on the number is a property of the model, kept in its checkpoints.

    Args:
        ranks: number of ranks over which the experts are divided.
        nodes: number of nodes of these ranks.
    """
    numbers = {"rank": ranks, "node": nodes}
    places = strategy(str(keys.get("name", ""))).config.layout_keys
    found = {k: numbers.get(v, v) if k in places and isinstance(v, str) else v for k, v in keys.items()}
    decoder = keys.get("decoder")
    if isinstance(decoder, Mapping):
        found["decoder"] = resolve(decoder, ranks=ranks, nodes=nodes)
    return found


def decoder_config(config: RoutingConfig) -> RoutingConfig:
    """The decoder's config: ``routing.decoder`` if it is set, else ``config``.

    Keys missing in ``routing.decoder`` that all strategies have (num_experts, expert sizes ...) are taken from the
    encoder's config, so that a strategy's name is enough.

    Raises:
        ConfigError: the strategy is not causal.
    """
    chosen = config
    if config.decoder is not None:
        keys = {"name": config.decoder} if isinstance(config.decoder, str) else dict(config.decoder)
        target = strategy(str(keys.get("name", "")))
        shared = {f.name for f in dataclasses.fields(RoutingConfig)} - {"name", "decoder"}
        inherited = {n: getattr(config, n) for n in shared}
        chosen = _built(target, {**inherited, **keys}, "routing.decoder")
    strategy(chosen.name).router.check_decoder(chosen)
    return chosen


def build_router(config: RoutingConfig, inputs: RouterInputs) -> Router:
    """The router of one sparse block."""
    return strategy(config.name).router(config, inputs)

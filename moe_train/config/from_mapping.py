"""Builds frozen config dataclasses from mappings (from Hydra or JSON), with clear errors.

Independent of Hydra, so that a checkpoint's ``config.json`` and tests use the same code.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, Union, get_args, get_origin

from moe_train.config import check
from moe_train.errors import ConfigError, did_you_mean

T = TypeVar("T")
# It compiles each annotation, at each call.
_type_hints: Callable[[Any], dict[str, Any]] = functools.cache(typing.get_type_hints)


def build(cls: type[T], mapping: Mapping[str, Any], where: str = "") -> T:
    """Builds the dataclass ``cls`` from ``mapping``, strictly.

    Args:
        cls: a dataclass; nested dataclasses are built from nested mappings. A class method ``variant(mapping)`` may
            return the subclass to build (tasks have their own keys).
        mapping: keys are field names; a missing key gets the field's default.
        where: dotted prefix for messages, e.g. ``"model"``.

    Raises:
        ConfigError: an unknown key (similar names are suggested), a missing key, a value of the wrong type, or a number
            outside the range of its field; and errors of the dataclass's ``__post_init__``.
    """
    cls = getattr(cls, "variant", lambda _: cls)(mapping)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    hints = _type_hints(cls)
    for key in mapping:
        if key not in fields:
            below = [_join(where, name) for name in _below(hints, str(key))]
            remedy = f"did you mean {' or '.join(map(repr, below))}?" if below else did_you_mean(str(key), fields)
            raise ConfigError(f"unknown key '{_join(where, key)}'", remedy=remedy)
    values: dict[str, Any] = {}
    for name, field in fields.items():
        if name in mapping:
            values[name] = _convert(hints[name], mapping[name], _join(where, name))
            check.number(check.ranges(cls).get(name, check.ANY), _join(where, name), values[name])
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ConfigError(f"the key '{_join(where, name)}' has no value", remedy=f"set {_join(where, name)}=…")
    return cls(**values)


def without_unknown(cls: type, mapping: Mapping[str, Any], where: str = "") -> tuple[dict[str, Any], tuple[str, ...]]:
    """The part of ``mapping`` with keys of ``cls``, and the dotted names of the other keys.

    For configs recorded by other versions: :func:`build` rejects keys that were removed.
    """
    cls = getattr(cls, "variant", lambda _: cls)(mapping)
    hints = _type_hints(cls)
    fields = {field.name for field in dataclasses.fields(cls) if field.init}
    known: dict[str, Any] = {}
    unknown: list[str] = []
    for key, value in mapping.items():
        if key not in fields:
            unknown.append(_join(where, key))
        elif dataclasses.is_dataclass(hints[key]) and isinstance(value, Mapping):
            known[key], below = without_unknown(typing.cast(type, hints[key]), value, _join(where, key))
            unknown += below
        else:
            known[key] = value
    return known, tuple(unknown)


def to_mapping(config: Any) -> dict[str, Any]:
    """The inverse of :func:`build`: nested dicts and lists for JSON."""
    plain: dict[str, Any] = _plain(dataclasses.asdict(config))
    return plain


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(v) for v in value]
    return value


def _below(hints: Mapping[str, Any], key: str, prefix: str = "") -> list[str]:
    """Dotted names of the keys named ``key`` in nested dataclasses."""
    found = []
    for name, hint in hints.items():
        if dataclasses.is_dataclass(hint):
            nested = _type_hints(hint)
            found += [f"{prefix}{name}.{key}"] if key in nested else _below(nested, key, f"{prefix}{name}.")
    return found


def _join(where: str, name: str) -> str:
    return f"{where}.{name}" if where else str(name)


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin = get_origin(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        return _convert_union(get_args(hint), value, where)
    if origin is typing.Literal:
        return _convert_literal(get_args(hint), value, where)
    if dataclasses.is_dataclass(hint):
        if isinstance(value, hint):  # type: ignore[arg-type]
            return value
        if isinstance(value, str) and any(field.name == "name" for field in dataclasses.fields(hint)):
            remedy = f"write {where}.name={value}"
            raise ConfigError(f"'{where}' must be a group of keys, not {value!r}", remedy=remedy)
        return build(hint, _expect(Mapping, value, where, "a group of keys"), where)  # type: ignore[arg-type]
    if origin in (tuple, list):
        items = _expect(Sequence, value, where, "a list")
        return tuple(_convert(get_args(hint)[0], v, f"{where}[{i}]") for i, v in enumerate(items))
    if origin in (dict, Mapping) or hint is Mapping or (isinstance(origin, type) and issubclass(origin, Mapping)):
        return dict(_expect(Mapping, value, where, "a group of keys"))
    return _convert_scalar(hint, value, where)


def _convert_union(options: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in options:
        return None
    errors: list[ConfigError] = []
    for option in options:
        if option is not type(None):
            try:
                return _convert(option, value, where)
            except ConfigError as error:
                errors.append(error)
    raise errors[0]


def _convert_literal(options: tuple[Any, ...], value: Any, where: str) -> Any:
    # YAML reads a bare `off` or `no` as False; no literal here has these values. Types are compared, since True == 1.
    if any(type(option) is type(value) and option == value for option in options):
        return value
    raise ConfigError(f"'{where}' cannot be {value!r}", remedy=did_you_mean(str(value), [str(o) for o in options]))


def _convert_scalar(hint: Any, value: Any, where: str) -> Any:
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value) if abs(value) <= check.LARGEST_FLOAT else (math.inf if value > 0 else -math.inf)
    if hint is float and isinstance(value, str):  # YAML 1.1 reads 1e-3 as a string
        try:
            return float(value)
        except ValueError:
            pass
    if isinstance(hint, type) and isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    raise ConfigError(f"'{where}' must be {names.get(hint, hint)}, not {value!r}", remedy=f"correct {where}=…")


def _expect(kind: Any, value: Any, where: str, name: str) -> Any:
    if isinstance(value, kind) and not isinstance(value, (str, bytes)):
        return value
    single = kind is Sequence and isinstance(value, (str, int, float)) and "[" not in where
    remedy = f"write '{where}=[{value}]'" if single else f"correct {where}=…"
    raise ConfigError(f"'{where}' must be {name}, not {value!r}", remedy=remedy)

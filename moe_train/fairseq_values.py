"""Replaces ``eval`` in fairseq's modules by a parser of plain values.

fairseq passes options to Python's ``eval``: ``--adam-betas "(0.9, 0.98)"``, ``--encoder-layers "[(512, 3)] * 20"``. The
same options are also read from checkpoints, which must not execute code. So in every module of fairseq, also those
imported later, the name ``eval`` is bound to :func:`read_value`.
"""

from __future__ import annotations

import ast
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NoReturn

from moe_train.errors import ConfigError

PACKAGES = ("fairseq", "fairseq_cli")
LONGEST = 100_000  # characters of an expression
LARGEST = 100_000  # numbers, characters and containers in a value
_INTEGERS = 1 << 63


class ValueRefused(ConfigError):
    """An option of fairseq that is not a plain value."""


def read_value(source: Any, /) -> Any:
    """The value of an expression of numbers, strings, booleans, None, tuples, lists, dicts, ``+`` and ``*``.

    Raises:
        ValueRefused: the expression contains anything else, or its value is too large.
        TypeError: ``source`` is not a string (fairseq relies on eval's TypeError).
    """
    if not isinstance(source, str):
        raise TypeError("eval() arg 1 must be a string")
    if len(source) > LONGEST:
        _refuse(source, f"it has more than {LONGEST:,} characters")
    try:
        return _value(ast.parse(source.lstrip(" \t"), mode="eval").body, source)[0]
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError) as error:
        _refuse(source, str(error).splitlines()[0][:90] if str(error) else "it is nested too deeply", error)


def _refuse(source: str, reason: str, cause: Exception | None = None) -> NoReturn:
    shown = source if len(source) <= 60 else f"{source[:57]}..."
    raise ValueRefused(
        f"an option of fairseq is not a plain value: {shown!r} ({reason})",
        remedy="write numbers, strings, booleans, None, tuples, lists, dicts, + and * only",
    ) from cause


def _value(node: ast.expr, source: str) -> tuple[Any, int]:
    """The value and its size: its numbers, characters and containers, including repetitions."""
    found, size = _unbounded(node, source)
    if size > LARGEST:
        _refuse(source, f"its value has more than {LARGEST:,} parts")
    if isinstance(found, int) and not -_INTEGERS <= found < _INTEGERS:
        _refuse(source, "an integer has more than 64 bits")
    return found, size


def _unbounded(node: ast.expr, source: str) -> tuple[Any, int]:
    if isinstance(node, ast.Constant) and isinstance(node.value, str | int | float | None):
        return node.value, len(node.value) if isinstance(node.value, str) else 1
    if isinstance(node, ast.Tuple | ast.List):
        values, size = _values(node.elts, source)
        return tuple(values) if isinstance(node, ast.Tuple) else values, size
    if isinstance(node, ast.Dict) and None not in node.keys:
        keys, size = _values([key for key in node.keys if key is not None], source)
        values, more = _values(node.values, source)
        return dict(zip(keys, values, strict=True)), size + more
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        operand, size = _value(node.operand, source)
        if isinstance(operand, int | float):
            return -operand if isinstance(node.op, ast.USub) else operand, size
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add | ast.Mult):
        return _computed(_value(node.left, source), _value(node.right, source), isinstance(node.op, ast.Mult), source)
    _refuse(source, f"it contains '{ast.unparse(node)[:40]}'")


def _values(nodes: Sequence[ast.expr], source: str) -> tuple[list[Any], int]:
    parts = [_value(node, source) for node in nodes]
    return [value for value, _ in parts], 1 + sum(size for _, size in parts)


def _computed(left: tuple[Any, int], right: tuple[Any, int], times: bool, source: str) -> tuple[Any, int]:
    """Sum or product; one that would be too large is rejected before it is computed."""
    (a, size_a), (b, size_b) = left, right
    if not times:
        return a + b, size_a + size_b
    if isinstance(a, int) and not isinstance(b, int | float):
        (a, size_a), b = (b, size_b), a
    size = 1 if isinstance(a, int | float) else size_a * max(1, b) if isinstance(b, int) else 1
    if size > LARGEST:
        _refuse(source, f"its value has more than {LARGEST:,} parts")
    return a * b, size


class _Binding(importlib.abc.Loader):
    """Loader of fairseq's modules, which binds ``eval`` before the module's code runs."""

    def __init__(self, loader: importlib.abc.Loader) -> None:
        self._loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        _bind(module)
        self._loader.exec_module(module)

    def __getattr__(self, name: str) -> Any:  # get_source, get_data and the like
        return getattr(self._loader, name)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds fairseq's modules with the other finders, and loads them with :class:`_Binding`."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname.partition(".")[0] not in PACKAGES:
            return None
        others = [finder for finder in sys.meta_path if not isinstance(finder, _Finder)]
        found = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _Binding(spec.loader)
        return spec


def _bind(module: ModuleType) -> None:
    module.__dict__["eval"] = read_value


def guard_eval() -> None:
    """Binds ``eval`` to :func:`read_value` in all modules of fairseq, imported now or later. Idempotent."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in PACKAGES and isinstance(module, ModuleType):
            _bind(module)

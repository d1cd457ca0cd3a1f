"""fairseq's eval: a reader of plain values in every module that calls it, and the same values as before."""

from __future__ import annotations

import ast
import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from moe_train.errors import ConfigError
from moe_train.fairseq_compat import apply
from moe_train.fairseq_values import LARGEST, read_value

RUNS_CODE = {"eval", "exec", "compile", "__import__"}


def fairseq_sources() -> Iterator[tuple[str, ast.Module]]:
    """Module name and syntax tree of every file of fairseq, its examples excluded."""
    for package in ("fairseq", "fairseq_cli"):
        spec = importlib.util.find_spec(package)
        assert spec is not None and spec.origin is not None
        root = Path(spec.origin).parent
        for path in sorted(root.rglob("*.py")):
            parts = [package, *path.relative_to(root).with_suffix("").parts]
            if parts[1] != "examples":
                name = ".".join(part for part in parts if part != "__init__")
                yield name, ast.parse(path.read_text(encoding="utf-8"))


def runs_code(tree: ast.Module) -> set[str]:
    """Built-in functions that run text as code and that a module names, in whatever way."""
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    attributes = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and "builtins" in node.value.id
    }
    return (names | attributes) & RUNS_CODE


@pytest.fixture(scope="module")
def trees() -> dict[str, ast.Module]:
    """Module → syntax tree, for all of the installed fairseq."""
    apply()
    return dict(fairseq_sources())


@pytest.fixture(scope="module")
def sites(trees: dict[str, ast.Module]) -> dict[str, set[str]]:
    """Module → what of :data:`RUNS_CODE` it names."""
    return {name: found for name, tree in trees.items() if (found := runs_code(tree))}


def loaded(name: str) -> ModuleType:
    """A module of fairseq, as far as it can be imported here: some need libraries that are not installed."""
    if name in sys.modules:
        return sys.modules[name]
    with contextlib.suppress(Exception):
        return importlib.import_module(name)
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with contextlib.suppress(Exception):
        spec.loader.exec_module(module)
    return module


def test_every_module_that_calls_eval_has_the_reader(sites: dict[str, set[str]]) -> None:
    assert len(sites) > 15 and "fairseq.utils" in sites and "fairseq_cli.validate" in sites
    assert {name: found for name, found in sites.items() if found != {"eval"}} == {}, "exec, compile: not covered"
    assert [name for name in sites if vars(loaded(name)).get("eval") is not read_value] == []


def test_no_module_binds_eval_anew(sites: dict[str, set[str]], trees: dict[str, ast.Module]) -> None:
    """Nor calls it with scopes, which the reader does not take."""
    for name in sites:
        for node in ast.walk(trees[name]):
            assert not (isinstance(node, ast.Name) and node.id == "eval" and not isinstance(node.ctx, ast.Load)), name
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "eval":
                assert len(node.args) == 1 and not node.keywords, name


def test_modules_that_are_imported_later_have_it_before_their_code_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fairseq

    apply()
    (tmp_path / "added_later.py").write_text("FOUND = eval\nVALUE = eval('[1] * 3')\n")
    monkeypatch.setattr(fairseq, "__path__", [*fairseq.__path__, str(tmp_path)])
    module = importlib.import_module("fairseq.added_later")
    monkeypatch.delitem(sys.modules, "fairseq.added_later")
    assert module.FOUND is read_value and module.VALUE == [1, 1, 1]
    assert module.__loader__.get_source("fairseq.added_later").startswith("FOUND"), "tracebacks show its lines"


def test_fairseqs_own_expressions_have_the_values_that_python_gives(trees: dict[str, ast.Module]) -> None:
    """Every constant of fairseq's sources that reads like a list, a tuple or a dict."""
    found = {
        node.value.strip()
        for tree in trees.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.strip()[:1] in tuple("[({")
    }
    same = 0
    for text in found:
        try:
            expected = eval(text, {"__builtins__": {}})  # fairseq's own constants
        except Exception:
            continue
        if isinstance(expected, list | tuple | dict) and not text.startswith("{} "):  # those are formats
            assert read_value(text) == expected
            same += 1
    assert same >= 20 and "[(512, 3)] * 20" in found


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (" [(512, 10, 5)] + [(512, 3, 2)] * 2", [(512, 10, 5), (512, 3, 2), (512, 3, 2)]),
        ("{'a': [1, -2.5], 3: None, 'b': (True,)}", {"a": [1, -2.5], 3: None, "b": (True,)}),
        ("2 * [1e-8]", [1e-8, 1e-8]),
        ("'ab' * 2 + 'c'", "ababc"),
        ("3 * 4 + 0.5", 12.5),
        ("[1] * -1", []),
    ],
)
def test_values(text: str, value: object) -> None:
    read = read_value(text)
    assert read == value and type(read) is type(value)


@pytest.mark.parametrize(
    "text",
    [
        *("__import__('os').getpid()", "().__class__", "[x for x in ()]", "lambda: 0", "f'{1}'", "a", "1 if 1 else 2"),
        *("2 ** 9 ** 9", "7 // 2", "'%s' % 1", "b'x'", "...", "{1}", "{**{}}", "[*()]", "{[]: 1}", "'a' + 1"),
        *("", "(", "1\x00", "9" * 30, "9" * 5000, "9223372036854775807 + 1"),
        *("[0] * 10000000", "[[0] * 1000] * 1000", "'a' * 1000000", f"[0] * {LARGEST} + [0]", "1 " * LARGEST),
        *("(" * 300 + ")" * 300, "1+" * 40000 + "1", "-" * 90000 + "1", "[" * 50000 + "]" * 50000),
    ],
    ids=lambda text: text[:20],
)
def test_everything_else_is_refused_in_one_message(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^an option of fairseq is not a plain value: ") as caught:
        read_value(text)
    assert len(str(caught.value).splitlines()) == 1 and len(str(caught.value)) < 400


@pytest.mark.parametrize("value", [True, None, 3, [1], b"1"])
def test_what_is_no_text_is_pythons_error(value: object) -> None:
    """``fairseq.utils.eval_bool`` tells by it that a value is none of its kind."""
    with pytest.raises(TypeError, match="eval"):
        read_value(value)

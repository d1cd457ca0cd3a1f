"""The order of the rooms: a room imports only rooms that stand above it, and what needs torch alone imports no more."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOMS = (
    "utils",
    "config",
    "kernels",
    "routing",
    "parallel",
    "experts",
    "layers",
    "models",
    "data",
    "tasks",
    "training",
    "evaluation",
    "analysis",
    "launch",
    "commands",
)
TORCH_ONLY = ("config", "kernels", "routing", "parallel", "experts", "layers")
# Modules of no room: they stand behind this one.
_FAIRSEQ = ("fairseq_checkpoints", "fairseq_compat", "fairseq_values")
_FIRST = ("console", "errors", "parent", "peer_pickles", "plugins", "safe_text", "screen")
BESIDE = {**dict.fromkeys(_FIRST, -1), **dict.fromkeys(_FAIRSEQ, ROOMS.index("layers"))}


def imports(source: str) -> Iterator[str]:
    """Every module that a source imports, in functions too; what only a type checker reads is left out."""
    return _of(ast.parse(source))


def _of(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
        for child in node.orelse:
            yield from _of(child)
        return
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.module and not node.level, "relative imports hide the room"
        yield from (f"{node.module}.{alias.name}" for alias in node.names)
    for child in ast.iter_child_nodes(node):
        yield from _of(child)


def rank(room: str) -> float:
    """Where a room or a module beside the rooms stands; larger is lower."""
    return ROOMS.index(room) if room in ROOMS else BESIDE[room] + 0.5


def room_of(module: str) -> str | None:
    """The room of a module of this package, None for others' modules and for the package's own names."""
    parts = module.split(".")
    inside = parts[0] == "moe_train" and len(parts) > 1 and (parts[1] in ROOMS or parts[1] in BESIDE)
    return parts[1] if inside else None


def violations(room: str, source: str) -> list[str]:
    """Imports of a module in ``room`` that reach a room below it."""
    found = [(module, room_of(module)) for module in imports(source)]
    return [module for module, other in found if other is not None and other != room and rank(other) > rank(room)]


def sources(root: Path) -> list[tuple[str, Path]]:
    """All modules with their room; the package's own ``__init__`` has none."""
    package = root / "moe_train"
    files = sorted(path for path in package.rglob("*.py") if path != package / "__init__.py")
    return [(path.relative_to(package).parts[0].removesuffix(".py"), path) for path in files]


def test_every_folder_is_a_room_that_the_guide_lists(root: Path) -> None:
    assert {room for room, _ in sources(root)} == {*ROOMS, *BESIDE}
    listed = [
        line.split()[0].removeprefix("moe_train/")
        for line in (root / "CONTRIBUTING.md").read_text().splitlines()
        if line.startswith("    moe_train/")
    ]
    assert listed == list(ROOMS)


def test_rooms_import_only_what_stands_above_them(root: Path) -> None:
    wrong = {
        str(path.relative_to(root)): found
        for room, path in sources(root)
        if (found := violations(room, path.read_text(encoding="utf-8")))
    }
    assert not wrong


@pytest.mark.parametrize("room", TORCH_ONLY)
def test_rooms_for_torch_alone_import_nothing_else(root: Path, room: str) -> None:
    allowed = {*sys.stdlib_module_names, "torch", "moe_train"}
    for path in (root / "moe_train" / room).rglob("*.py"):
        packages = {module.split(".")[0] for module in imports(path.read_text(encoding="utf-8"))}
        assert packages <= allowed, f"{path}: {packages - allowed}"


def test_the_check_sees_what_it_should() -> None:
    assert violations("models", "from moe_train.tasks.registry import build_task")
    assert violations("models", "def f():\n    import moe_train.tasks.registry")
    assert violations("tasks", "from moe_train import training")
    assert violations("layers", "import moe_train.fairseq_compat")
    assert not violations("tasks", "from moe_train.data.folder import DataFolder")
    assert not violations("models", "from moe_train.errors import ConfigError\nimport moe_train.fairseq_compat")
    assert not violations("models", "if TYPE_CHECKING:\n    from moe_train.tasks import Task")

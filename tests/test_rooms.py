"""The order of the rooms: a room imports only rooms that stand above it, and what needs torch alone imports no more.

The same holds for the sub-folders of a room. Folders are small, and a file name says which file it is.
"""

from __future__ import annotations

import ast
import sys
from collections import Counter
from collections.abc import Iterator
from graphlib import TopologicalSorter
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
    "conversion",
    "analysis",
    "launch",
    "commands",
)
# Sub-folders of a room in the order of CONTRIBUTING.md; "." are the room's own files. A room's __init__ may import all.
SUBFOLDERS = {
    "kernels": ("cpu", "decoder", "triton", "."),
    "routing": (".", "strategies"),
    "data": ("text", ".", "corpora", "cleaning", "images", "prepare"),
    "tasks": (".", "translation"),
    "training": ("runtime", "optim", "engines", "checkpoint", "run", "metrics", "."),
    "evaluation": ("search", "scoring", ".", "inference", "serving"),
    "analysis": ("planner", "probe", "bench", "report"),
    "launch": ("job", "watchdog", "."),
    "commands": ("cli", "."),
}
LARGEST_FOLDER = 16  # files
SHARED_NAMES = ("__init__", "base", "registry")
TORCH_ONLY = ("config", "kernels", "routing", "parallel", "experts", "layers")
# Modules of no room: they stand behind this one.
_FAIRSEQ = ("fairseq_checkpoints", "fairseq_compat", "fairseq_values")
_FIRST = ("console", "errors", "peer_pickles", "plugins", "safe_text", "screen")
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


def subfolder(module: str) -> str | None:
    """The sub-folder of a room that a module stands in; "." for the room's own files, None where there is no order."""
    parts = module.split(".")
    room = room_of(module)
    if room not in SUBFOLDERS or len(parts) < 3:
        return None
    return parts[2] if parts[2] in SUBFOLDERS[room] else "."


def upward(module: str, source: str) -> list[str]:
    """Imports of ``module`` (dotted) that reach a sub-folder of the same room further down."""
    room, own = room_of(module), subfolder(module)
    if room is None or own is None or module.split(".")[2:] == ["__init__"]:
        return []
    order = SUBFOLDERS[room]
    others = [(other, subfolder(other)) for other in imports(source) if room_of(other) == room]
    return [other for other, place in others if place is not None and order.index(place) > order.index(own)]


def test_sub_folders_import_only_what_stands_above_them(root: Path) -> None:
    wrong = {}
    for _, path in sources(root):
        module = ".".join(path.relative_to(root).with_suffix("").parts)
        if found := upward(module, path.read_text(encoding="utf-8")):
            wrong[module] = found
    assert not wrong


def test_every_sub_folder_has_a_place_in_the_guide(root: Path) -> None:
    guide = (root / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for room, order in SUBFOLDERS.items():
        folders = {p.name for p in (root / "moe_train" / room).iterdir() if p.is_dir() and list(p.glob("*.py"))}
        assert folders == {*order} - {"."}
        assert f"{room}: " + ", ".join("own files" if name == "." else name for name in order) in guide, room


def test_folders_are_small_and_file_names_say_which_file_it_is(root: Path) -> None:
    files = [path for _, path in sources(root)] + [root / "moe_train" / "__init__.py"]
    assert not {f: n for f, n in Counter(path.parent for path in files).items() if n > LARGEST_FOLDER}
    names = Counter(path.stem for path in files if path.stem not in SHARED_NAMES)
    commands = {path.stem for path in (root / "moe_train" / "commands").glob("*.py")}
    assert not {name for name, n in names.items() if n > 1 and name not in commands}


def test_no_module_imports_itself_by_way_of_others(root: Path) -> None:
    modules = {
        ".".join(p.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): p for _, p in sources(root)
    }
    graph = {
        name: {
            other if other in modules else other.rpartition(".")[0]
            for other in imports(path.read_text(encoding="utf-8"))
        }
        & modules.keys() - {name}
        for name, path in modules.items()
        if path.stem != "__init__"
    }
    assert list(TopologicalSorter(graph).static_order())


@pytest.mark.parametrize("room", TORCH_ONLY)
def test_rooms_for_torch_alone_import_nothing_else(root: Path, room: str) -> None:
    """Triton is optional: only its folder imports it, and only device_kernels.py imports from that folder."""
    torch_alone = {*sys.stdlib_module_names, "torch", "moe_train"}
    for path in (root / "moe_train" / room).rglob("*.py"):
        modules = set(imports(path.read_text(encoding="utf-8")))
        allowed = torch_alone | {"triton"} if path.parent.name == "triton" else torch_alone
        packages = {module.split(".")[0] for module in modules}
        assert packages <= allowed, f"{path}: {packages - allowed}"
        if path.name != "device_kernels.py":
            assert not any(module.startswith("moe_train.kernels.triton") for module in modules), path


def test_the_check_sees_what_it_should() -> None:
    assert violations("models", "from moe_train.tasks.registry import build_task")
    assert violations("models", "def f():\n    import moe_train.tasks.registry")
    assert violations("tasks", "from moe_train import training")
    assert violations("layers", "import moe_train.fairseq_compat")
    assert upward("moe_train.training.checkpoint.store", "from moe_train.training.trainer import Trainer")
    assert upward("moe_train.training.optim.optimizer", "import moe_train.training.run.heartbeat")
    assert not upward("moe_train.training.trainer", "from moe_train.training.checkpoint.store import CheckpointStore")
    assert not violations("tasks", "from moe_train.data.folder import DataFolder")
    assert not violations("models", "from moe_train.errors import ConfigError\nimport moe_train.fairseq_compat")
    assert not violations("models", "if TYPE_CHECKING:\n    from moe_train.tasks import Task")

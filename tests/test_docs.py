"""What the documents say holds: links, files, commands, keys and defaults; the worked example runs."""

from __future__ import annotations

import ast
import dataclasses
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import pytest
import yaml
from hydra import compose, initialize_config_dir

from moe_train import __version__
from moe_train.commands import evaluate, plan, prepare, train
from moe_train.commands.cli.app import plain
from moe_train.commands.cli.overrides import check_overrides
from moe_train.config import build
from moe_train.config import run as run_config
from moe_train.config.corpus import PrepareConfig
from moe_train.config.evaluation import EvaluateConfig, ExportConfig, ReportConfig, TranslateConfig
from moe_train.config.paths import configs_directory
from moe_train.config.serving import ServeConfig
from moe_train.data.corpora import base as corpora
from moe_train.data.folder import DataFolder
from moe_train.evaluation.scoring import further_metrics
from moe_train.launch.hydra_store import forget_foreign_schemas
from moe_train.plugins import USER_DIR
from moe_train.routing import RoutingConfig, registered_strategies, registry
from moe_train.routing.token_choice import TokenChoiceConfig
from moe_train.tasks import metric_registry
from moe_train.tasks import registry as tasks
from moe_train.tasks.base import TrainingTask
from tests.test_rooms import ROOMS, SUBFOLDERS

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
NEW = "language_gate"  # the strategy that the worked example adds
FOR_THE_READER = {
    NEW,
    "tab_pairs",
    "copying",
    "counted_translation",
}  # files that the documents ask their reader to write
each_document = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))


def section(document: str, heading: str) -> str:
    """The text below a heading of level 2 or 3, up to the next one of level 2."""
    text = (ROOT / "docs" / document).read_text(encoding="utf-8")
    parts = re.split(rf"^##+ {re.escape(heading)}$", text, flags=re.MULTILINE)
    assert len(parts) == 2, f"{document} needs exactly one section '{heading}'"
    return re.split(r"^## ", parts[1], flags=re.MULTILINE)[0]


def key_tables(text: str) -> list[dict[str, tuple[str, str]]]:
    """Tables of keys: key -> (default, meaning)."""
    row = re.compile(r"^\| `(\w+)` \| `(.*?)` \| (.*) \|$", re.MULTILINE)
    tables = re.split(r"^\| key \| default \| meaning \|\n\|---\|---\|---\|\n", text, flags=re.MULTILINE)[1:]
    return [
        {key: (default, meaning) for key, default, meaning in row.findall(table.split("\n\n", 1)[0])}
        for table in tables
    ]


def defaults(table: dict[str, tuple[str, str]]) -> dict[str, Any]:
    return {key: yaml.safe_load(default) for key, (default, _) in table.items()}


def fields(config: type[RoutingConfig]) -> dict[str, Any]:
    return {f.name: f.default for f in dataclasses.fields(config) if f.name != "name"}


@each_document
def test_relative_links_lead_somewhere(path: Path) -> None:
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"[a-z]+:|#", target):
            assert (path.parent / target.split("#")[0]).exists(), f"{path.name}: {target}"


@each_document
def test_files_and_commands_that_are_named_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for name in re.findall(r"(?:configs|scripts|tests|moe_train)/[\w/.-]+\.(?:yaml|py|sh)\b", text):
        assert (ROOT / name).is_file() or Path(name).stem.removeprefix("test_") in FOR_THE_READER, (
            f"{path.name}: {name}"
        )
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    named = set(re.findall(r"(?:^ {4}|`)(moe-[a-z]+)\b", text, flags=re.MULTILINE))
    assert named <= set(scripts), f"{path.name}: {named - set(scripts)}"


def test_the_code_that_documents_name_exists() -> None:
    """`room/file.py::function` and `room/file.py::Class.method`, as in docs/architecture.md."""
    named = [
        place
        for path in DOCUMENTS
        for place in re.findall(r"`([\w/]+\.py)::([\w.]+)`", path.read_text(encoding="utf-8"))
        if not place[0].startswith("tests/")
    ]
    assert len(named) > 50
    for file, name in named:
        assert name in definitions(ROOT / "moe_train" / file), f"{file}::{name}"


def definitions(path: Path) -> set[str]:
    """Functions and classes of a module, and methods as ``Class.method``."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
            inside = node.body if isinstance(node, ast.ClassDef) else []
            found |= {f"{node.name}.{method.name}" for method in inside if isinstance(method, ast.FunctionDef)}
    return found


def test_the_drawing_has_every_room_and_sub_folder_in_order() -> None:
    (drawing,) = re.findall(
        r"```text\n(.*?)```", (ROOT / "docs" / "architecture.md").read_text("utf-8"), flags=re.DOTALL
    )
    rows = [re.split(r" {2,}", line[20:].strip()) for line in drawing.splitlines()[1:]]
    assert [row[0] for row in rows] == list(ROOMS)
    for line, row in zip(drawing.splitlines()[1:], rows, strict=True):
        order = tuple("." if name == "·" else name for name in line[33:].split()[: len(SUBFOLDERS.get(row[0], "."))])
        assert order == SUBFOLDERS.get(row[0], (".",)), row[0]


def test_the_index_names_every_page() -> None:
    text = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    linked = {target.split("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text)}
    assert {path.name for path in (ROOT / "docs").glob("*.md")} - {"index.md"} <= linked


def test_the_changelog_has_the_version_and_each_kind_of_change_once() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    versions = re.findall(r"^## \[(.+?)\](?: - \d{4}-\d{2}-\d{2})?$", text, flags=re.MULTILINE)
    assert versions[0] == "Unreleased" and __version__ in versions and len(versions) == len(set(versions))
    assert len(versions) == len(re.findall("^## ", text, flags=re.MULTILINE))
    for part in re.split("^## ", text, flags=re.MULTILINE)[1:]:
        kinds = re.findall("^### (.*)$", part, flags=re.MULTILINE)
        assert len(kinds) == len(set(kinds)) and set(kinds) <= {"Added", "Changed", "Removed", "Fixed", "Security"}
        entries = re.findall("^- (.*)$", part, flags=re.MULTILINE)
        assert len(entries) == len(set(entries)) and not re.search("^ ", part, flags=re.MULTILINE)  # one line each


def test_brackets_are_quoted_in_what_a_reader_types() -> None:
    """Shells take them for patterns or lists: zsh refuses such a word, bash may put file names in its place."""
    files = [
        *DOCUMENTS,
        *(ROOT / "configs").rglob("*.yaml"),
        *(p for p in (ROOT / "scripts").rglob("*.s*") if p.is_file()),
    ]
    words = [
        (path.name, word) for path in files for word in re.findall(r"\S*[a-z]=[{\[](?!\")\S*", path.read_text("utf-8"))
    ]
    typed = [(name, word) for name, word in words if re.match(r"`?['\"]?[a-z_.]+=[{\[]", word)]
    assert len(typed) > 15
    assert [found for found in typed if found[1].lstrip("`")[0] not in "'\""] == []


def test_the_recipes_of_data_are_words_that_moe_prepare_takes() -> None:
    text = (ROOT / "docs" / "results.md").read_text(encoding="utf-8").replace("\\\n", " ")
    recipes = [shlex.split(line) for line in re.findall(r"^ {4}moe-prepare (.*)$", text, flags=re.MULTILINE)]
    configs = []
    for recipe in recipes:
        forget_foreign_schemas()
        words = check_overrides("prepare", recipe)
        with initialize_config_dir(str(configs_directory()), version_base="1.3"):
            configs.append(build(PrepareConfig, plain(compose("prepare", overrides=words))))
    assert [config.corpus.name for config in configs] == ["text", "text", "text", "opus100", "flores200", "l10n"]
    tiers = configs[3].tiers.languages
    assert [tiers[code] for code in ("de", "fr", "ru", "zh", "ar", "tr")] == [
        *["high"] * 2,
        *["medium"] * 2,
        *["low"] * 2,
    ]


def test_shared_keys_are_those_of_the_code() -> None:
    every, token_choice = key_tables(section("strategies.md", "Shared keys"))
    assert defaults(every) == fields(RoutingConfig)
    own = {k: v for k, v in fields(TokenChoiceConfig).items() if k not in fields(RoutingConfig)}
    assert defaults(token_choice) == own


@pytest.mark.parametrize("name", list(registered_strategies()))
def test_a_strategy_has_a_section_a_figure_and_its_own_keys(name: str) -> None:
    text, config = section("strategies.md", f"`{name}`"), registered_strategies()[name].config
    for part in ("**Equation.**", "**Keys.**", "**Cost.**", "**Choose it**", "**It cannot**", f"(figures/{name}.svg)"):
        assert part in text, part
    shipped = yaml.safe_load((ROOT / "configs" / "routing" / f"{name}.yaml").read_text(encoding="utf-8"))
    shared = fields(TokenChoiceConfig if issubclass(config, TokenChoiceConfig) else RoutingConfig)
    own = {k: shipped[k] for k in fields(config) if k in shipped and (k not in shared or shipped[k] != shared[k])}
    table = (key_tables(text) or [{}])[0]
    assert defaults(table) == own
    hints = get_type_hints(config)
    for key, (_, meaning) in table.items():
        for option in get_args(hints[key]) if get_origin(hints[key]) is not None else ():
            if isinstance(option, str):
                assert option in meaning, f"{key}: the option {option} is not explained"


@pytest.mark.parametrize(
    ("command", "config"),
    [
        ("moe-evaluate", EvaluateConfig),
        ("moe-translate", TranslateConfig),
        ("moe-serve", ServeConfig),
        ("moe-export", ExportConfig),
        ("moe-report", ReportConfig),
    ],
)
def test_the_keys_of_evaluation_are_explained(command: str, config: type[Any]) -> None:
    text = section("evaluation.md", command)
    for field in dataclasses.fields(config):
        assert re.search(rf"`{field.name}(\.\*)?`", text), field.name


def test_every_strategy_has_a_figure_from_the_script(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="figures need the extra 'dev'")
    runpy.run_path(str(ROOT / "scripts" / "draw_strategies.py"))["main"](tmp_path)
    drawn = {path.stem for path in tmp_path.glob("*.svg")}
    assert drawn == set(registered_strategies()) == {path.stem for path in (ROOT / "docs" / "figures").glob("*.svg")}


@pytest.mark.slow
def test_the_table_of_costs_is_what_the_accounting_says() -> None:
    from tests.models.test_accounting import BASE, accounted

    text = section("strategies.md", "Costs side by side")
    rows = re.findall(r"^\| `(\w+)` \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|", text, flags=re.MULTILINE)
    assert {row[0] for row in rows} == set(registered_strategies())
    for name, *stated in rows:
        keys = yaml.safe_load((ROOT / "configs" / "routing" / f"{name}.yaml").read_text(encoding="utf-8"))
        found = accounted(keys, **BASE)
        flops = found.flops_encoder + found.flops_decoder + found.flops_output
        figures = (found.parameters_total, found.parameters_active, flops)
        assert [f"{value / 1e6:.1f}" for value in figures] == stated, name


CHECKED = (
    "tests/routing/strategies/test_language_gate.py",
    "tests/routing/test_configs.py",
    "tests/routing/test_every_strategy.py",
    "tests/layers/test_every_strategy.py",
    "tests/test_rooms.py",
    "tests/test_docs.py::test_a_strategy_has_a_section_a_figure_and_its_own_keys",
    "tests/test_docs.py::test_the_table_of_costs_is_what_the_accounting_says",
)


def follow_the_page(root: Path) -> None:
    """Takes every step of docs/add-a-strategy.md in a copy of the project."""
    text = (ROOT / "docs" / "add-a-strategy.md").read_text(encoding="utf-8").partition("## From outside")[0]
    code, test = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    (config,) = re.findall(r"```yaml\n(.*?)```", text, flags=re.DOTALL)
    (described,) = re.findall(r"```markdown\n(.*?)```", text, flags=re.DOTALL)
    case, cost, figure = re.findall(rf'^    ((?:"{NEW}"|\| `{NEW}` ).*)$', text, flags=re.MULTILINE)
    for name, content in {
        f"moe_train/routing/strategies/{NEW}.py": code,
        f"configs/routing/{NEW}.yaml": config,
        f"tests/routing/strategies/test_{NEW}.py": test,
    }.items():
        (root / name).write_text(content, encoding="utf-8")
    put_before(root / "tests/routing/test_every_strategy.py", '"hash": {', f"{case}\n    ")
    put_before(root / "docs/strategies.md", "| `soft_moe` |", f"{cost}\n")
    put_before(root / "scripts/draw_strategies.py", '"hash": Figure(', f"{figure}\n    ")
    with (root / "docs/strategies.md").open("a", encoding="utf-8") as page:
        page.write(f"\n{described}")


def put_before(path: Path, mark: str, text: str) -> None:
    before, found, after = path.read_text(encoding="utf-8").partition(mark)
    assert found, f"{path}: {mark}"
    path.write_text(before + text + found + after, encoding="utf-8")


@pytest.mark.processes
def test_the_worked_example_passes_every_test_of_strategies(tmp_path: Path) -> None:
    for name in ("moe_train", "configs", "tests", "docs", "scripts", "hydra_plugins"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "old_runs"))
    for name in ("pyproject.toml", "CONTRIBUTING.md", "README.md"):
        shutil.copy(ROOT / name, tmp_path / name)
    follow_the_page(tmp_path)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}

    def run(*words: str) -> str:
        command = [sys.executable, "-m", *words]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run("scripts.draw_strategies")
    assert (tmp_path / "docs" / "figures" / f"{NEW}.svg").is_file()
    run("ruff", "format", "-q", "moe_train", "scripts")
    run("ruff", "check", "-q", "moe_train", "tests/routing", "scripts")
    run("ruff", "format", "--check", "-q", "moe_train", f"tests/routing/strategies/test_{NEW}.py")
    # Of tests that take all strategies in turn, those of the new one.
    chosen = f"{NEW} or rooms or test_configs or costs"
    said = run("pytest", "-q", "-p", "no:cacheprovider", "-k", chosen, *CHECKED)
    assert int(re.findall(r"(\d+) passed", said)[0]) > 50, said


def test_the_worked_example_works_from_a_folder_of_the_user_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (ROOT / "docs" / "add-a-strategy.md").read_text(encoding="utf-8")
    (config,) = re.findall(r"```yaml\n(.*?)```", text, flags=re.DOTALL)
    (tmp_path / "configs" / "routing").mkdir(parents=True)
    (tmp_path / f"{NEW}.py").write_text(re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)[0], encoding="utf-8")
    (tmp_path / "configs" / "routing" / f"{NEW}.yaml").write_text(config, encoding="utf-8")
    monkeypatch.setattr(registry, "_STRATEGIES", dict(registry._STRATEGIES))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv(USER_DIR, "")
    words = [f"routing={NEW}", "model=tiny", "layout.world=2", "json=-", f"user_dir={tmp_path}"]
    monkeypatch.setattr(sys, "argv", ["moe-plan", *words])
    plan.main()
    sys.modules.pop(NEW)
    typed = json.loads(capsys.readouterr().out)["train_words"]
    assert f"routing={NEW}" in typed and f"user_dir={tmp_path}" in typed


def test_the_corpus_of_the_page_is_prepared_from_a_folder_outside_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Takes the steps of docs/add-a-corpus.md: its two files, and its command."""
    text = (ROOT / "docs" / "add-a-corpus.md").read_text(encoding="utf-8")
    (code,), (config,) = (re.findall(rf"```{kind}\n(.*?)```", text, flags=re.DOTALL) for kind in ("python", "yaml"))
    (command,) = re.findall("^    moe-prepare (.*)$", text, flags=re.MULTILINE)
    files = re.findall(r"^## \d\. .*`(my_code/.*)`$", text, flags=re.MULTILINE)
    assert files == ["my_code/tab_pairs.py", "my_code/configs/corpus/tab_pairs.yaml"]
    for name, content in zip(files, (code, config), strict=True):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content, encoding="utf-8")
    (tmp_path / "DIR").mkdir()
    names = ["".join("abcdefghij"[int(digit)] for digit in str(number)) for number in range(400)]
    lines = [f"the name {name} is here\tder Name {name} steht hier\n" for name in names]
    (tmp_path / "DIR" / "en-de.tsv").write_text("".join(lines), encoding="utf-8")
    monkeypatch.setattr(corpora, "_READERS", dict(corpora._READERS))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr("hydra._internal.utils.is_under_debugger", lambda: False)
    monkeypatch.setenv(USER_DIR, "")
    monkeypatch.chdir(tmp_path)
    small = ["vocabulary.size=300", "workers=1", "corpus.split.valid=0.1", "corpus.split.test=0.1"]
    monkeypatch.setattr(sys, "argv", ["moe-prepare", *shlex.split(command), *small])
    prepare.main()
    data = DataFolder.open(tmp_path / "data-bin" / "tab_pairs")
    assert data.directions == ("de-en", "en-de") and len(data.raw("test", "en-de")[0]) > 10
    (tmp_path / "DIR" / "en-de.tsv").write_text("one column\n")
    with pytest.raises(SystemExit):
        monkeypatch.setattr(sys, "argv", [*sys.argv, "overwrite=true"])
        prepare.main()
    assert "line 1 has 1 columns" in capfd.readouterr().err
    sys.modules.pop("tab_pairs")


SMALL = [
    *(
        "model.embed_dim=16",
        "model.ffn_dim=32",
        "model.num_heads=2",
        "model.encoder_layers=1",
        "model.decoder_layers=1",
    ),
    *("model.sparse_layers=all", "model.max_positions=40", "routing.num_experts=2", "training.max_updates=2"),
    *("training.tokens_per_update=256", "training.threads=1", "training.log_every=1"),
]


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with data, where code from outside the package can be registered."""
    registries = [
        (tasks, "_TASKS"),
        (run_config, "_TASKS"),
        (further_metrics, "_METRICS"),
        (metric_registry, "_METRICS"),
    ]
    for module, name in registries:
        monkeypatch.setattr(module, name, dict(getattr(module, name)))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr("hydra._internal.utils.is_under_debugger", lambda: False)
    monkeypatch.setenv(USER_DIR, "")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data-bin").mkdir()
    shutil.copytree(ROOT / "tests" / "old_runs" / "data", tmp_path / "data-bin" / "l10n")
    return tmp_path


def write_examples(page: str, folder: Path) -> None:
    """Writes each python and yaml block of a page into the file of ``my_code`` that the text before it names last."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    for block in re.finditer(r"```(python|yaml)\n(.*?)```", text, flags=re.DOTALL):
        ending = {"python": "py", "yaml": "yaml"}[block[1]]
        name = re.findall(rf"`(my_code/[\w/]+\.{ending})`", text[: block.start()])[-1]
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(block[2], encoding="utf-8")


def run_command(monkeypatch: pytest.MonkeyPatch, page: str, name: str, *more: str) -> None:
    """Runs the one command of that name on a page, with further words."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    (command,) = re.findall(rf"^    {name} (.*)$", text, flags=re.MULTILINE)
    monkeypatch.setattr(sys, "argv", [name, *shlex.split(command), *more])
    {"moe-train": train, "moe-evaluate": evaluate}[name].main()


def log_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_worked_example_of_a_task_trains_and_is_measured(outside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_examples("add-a-task.md", outside)
    run_command(monkeypatch, "add-a-task.md", "moe-train", *SMALL)
    run = outside / "outputs" / "copying"
    assert [line["update"] for line in log_lines(run / "train.jsonl")] == [1, 2]
    assert log_lines(run / "valid.jsonl")[-1]["directions"].keys() == {"de", "en", "fr"}
    run_command(monkeypatch, "add-a-task.md", "moe-evaluate")
    found = json.loads((run / "test.json").read_text(encoding="utf-8"))
    assert found["task"] == "copying" and found["sets"].keys() == {"de", "en", "fr"} == found["routing"].keys()
    sys.modules.pop("copying")


def test_every_member_of_the_interface_of_tasks_is_explained() -> None:
    text = (ROOT / "docs" / "add-a-task.md").read_text(encoding="utf-8")
    must, may = (
        re.findall(r"^\| (`.*?) \|", part, flags=re.MULTILINE) for part in text.split("The others have a default")
    )
    named = [set(re.findall(r"`(\w+)", " ".join(rows))) for rows in (must, may)]
    assert named[0] == TrainingTask.__abstractmethods__
    members = {name for name in vars(TrainingTask) if not name.startswith("_")}
    assert named[1] == members - named[0]


def test_the_worked_examples_of_metrics_are_logged_and_scored(
    outside: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    write_examples("add-a-metric.md", outside)
    run_command(monkeypatch, "add-a-metric.md", "moe-train", *SMALL)
    run = outside / "outputs" / "counted"
    lines = [*log_lines(run / "train.jsonl"), *log_lines(run / "valid.jsonl")]
    assert len(lines) == 3 and all(line["longest"] >= 3 and 0 <= line["unknown"] < 1 for line in lines)
    assert lines[-1]["longest"] == max(entry["longest"] for entry in lines[-1]["directions"].values())
    assert len(re.findall(r"unknown \d+\.\d%, longest \d+", capfd.readouterr().out)) == 3
    words = ["search.beam=1", "search.max_length_ratio=1"]
    run_command(monkeypatch, "add-a-metric.md", "moe-evaluate", *words)
    scores = json.loads((run / "test.json").read_text(encoding="utf-8"))
    assert scores["average"]["exact_match"] == 0.0
    for name in ("exact_match", "counted_translation"):
        sys.modules.pop(name)


def test_the_worked_example_of_a_metric_is_found_by_its_entry_point(
    outside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_examples("add-a-metric.md", outside)
    text = (ROOT / "docs" / "add-a-metric.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```toml\n(.*?)```", text, flags=re.DOTALL)
    ((group, points),) = tomllib.loads(block)["project"]["entry-points"].items()
    (outside / "my_package").mkdir()
    (outside / "my_package" / "__init__.py").write_text("")
    shutil.copy(outside / "my_code" / "exact_match.py", outside / "my_package")
    about = outside / "my_package-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: my_package\nVersion: 1.0\n")
    listed = "".join(f"{name} = {value}\n" for name, value in points.items())
    (about / "entry_points.txt").write_text(f"[{group}]\n{listed}")
    monkeypatch.syspath_prepend(outside)
    (metric,) = further_metrics.find_metrics(points).values()
    (found,) = metric.score([further_metrics.Corpus("de-en", ["x", "y"], ["a", "b"], ["a", "c"])])
    assert found.score == 50.0
    for name in ("my_package", "my_package.exact_match"):
        sys.modules.pop(name)

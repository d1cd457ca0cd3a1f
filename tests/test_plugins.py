"""Code from outside the package: entry points of a distribution, and modules of ``user_dir``."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent
from types import ModuleType

import pytest
import torch

from moe_train import MoELayer, plugins
from moe_train.commands import evaluate, export, plan, prepare, train
from moe_train.config import TaskConfig, run
from moe_train.data.corpora import base as corpora
from moe_train.errors import ConfigError
from moe_train.evaluation.scoring import further_metrics
from moe_train.evaluation.scoring.results import read_results
from moe_train.routing import registry as strategies
from moe_train.tasks import registry as tasks
from moe_train.training.metrics import logger_registry

DATA = Path(__file__).parent / "old_runs" / "data"
SMALL = [
    *(f"data={DATA}", "model.embed_dim=16", "model.ffn_dim=32", "model.num_heads=2", "model.max_positions=40"),
    *("model.encoder_layers=1", "model.decoder_layers=1", "model.sparse_layers=all", "training.max_updates=2"),
    *("training.tokens_per_update=256", "training.threads=1", "training.log_every=1", "routing.num_experts=2"),
    "training.validation.max_sentences=4",
]
STRATEGY = """
from dataclasses import dataclass
from moe_train.routing.registry import register
from moe_train.routing.strategies.switch import SwitchConfig, SwitchRouter

@dataclass(frozen=True)
class Config(SwitchConfig):
    name: str = "{name}"
    temper: float = 2.0

@register("{name}", Config)
class Router(SwitchRouter):
    pass
"""
YAML = "name: {name}\nnum_experts: 4\ntemper: 2.0\n"
FILES = {
    "outside/__init__.py": "",
    "outside/strategy.py": STRATEGY.format(name="outside"),
    "outside/configs/routing/outside.yaml": YAML.format(name="outside"),
    "outside/configs/task/outside.yaml": "name: outside\nshare: 0.5\n",
    "outside/configs/corpus/outside.yaml": "# @package _global_\ncorpus:\n  name: outside\n",
    "outside/task.py": """
        from dataclasses import dataclass
        from moe_train.config import TaskConfig
        from moe_train.tasks import register_task
        from moe_train.tasks.translation.task import TranslationTask

        @dataclass(frozen=True)
        class Config(TaskConfig):
            name: str = "outside"
            share: float = 0.25
            translates = True

        @register_task("outside")
        class Task(TranslationTask):
            pass
        """,
    "outside/corpus.py": """
        from moe_train.data.corpora.base import CorpusText, register
        from moe_train.data.text.pairs import Pair

        @register("outside")
        def read(config, progress):
            names = ["".join("abcdefghij"[int(digit)] for digit in str(number)) for number in range(400)]
            lines = [(f"the name {name} is here", f"der Name {name} steht hier") for name in names]
            return [CorpusText(Pair("en", "de"), None, lambda: iter(lines), ())]
        """,
    "outside/metric.py": """
        from moe_train.evaluation.scoring.further_metrics import register_metric

        @register_metric("exact")
        def exact(hypotheses, references, language):
            assert language in ("en", "de", "fr", "ru", "ja") and len(hypotheses) == len(references)
            return 100 * sum(h == r for h, r in zip(hypotheses, references)) / len(references) + 0.25

        @register_metric("failing")
        def failing(hypotheses, references, language):
            return float("nan")
        """,
    "outside/logger.py": """
        import json
        from moe_train.training.metrics.logger_registry import register_logger

        @register_logger("outside")
        class Logger:
            def __init__(self, folder, config, update):
                self.file = open(folder / "outside.jsonl", "w")

            def tell(self, kind, line):
                self.file.write(json.dumps({kind: line["update"]}) + "\\n")

            def trained(self, line):
                self.tell("trained", line)

            def validated(self, line):
                self.tell("validated", line)

            def close(self):
                self.tell("closed", {"update": 0})
                self.file.close()

        @register_logger("failing")
        class Failing(Logger):
            def __init__(self, folder, config, update):
                self.file = open(folder / "failing.jsonl", "w")

            def trained(self, line):
                print("told once", file=self.file, flush=True)
                raise ConnectionError("the server is gone")
        """,
    "outside/broken.py": "import nothing_of_that_name\n",
    "outside/silent.py": "",
    "outside-1.5.dist-info/METADATA": "Metadata-Version: 2.1\nName: outside\nVersion: 1.5\n",
    "outside-1.5.dist-info/entry_points.txt": """
        [moe_train.strategies]
        outside = outside.strategy
        broken = outside.broken
        silent = outside.silent
        [moe_train.tasks]
        outside = outside.task
        [moe_train.corpora]
        outside = outside.corpus
        [moe_train.metrics]
        exact = outside.metric:exact
        failing = outside.metric:failing
        [moe_train.loggers]
        outside = outside.logger:Logger
        failing = outside.logger:Failing
        """,
}


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Registries, modules and the environment are as they were when a test ends."""
    registries = [(strategies, "_STRATEGIES"), (tasks, "_TASKS"), (corpora, "_READERS"), (run, "_TASKS")]
    for module, name in (*registries, (further_metrics, "_METRICS"), (logger_registry, "_LOGGERS")):
        monkeypatch.setattr(module, name, dict(getattr(module, name)))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv(plugins.USER_DIR, "")  # which commands set
    modules, threads = set(sys.modules), torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    for name in set(sys.modules) - modules:
        if name.split(".")[0] in ("outside", "mine", "other"):
            del sys.modules[name]


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of ``sys.path`` with the distribution ``outside`` in it."""
    folder = tmp_path / "site"
    for name, text in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(dedent(text), encoding="utf-8")
    monkeypatch.syspath_prepend(folder)
    return folder


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """A ``user_dir`` with the strategy ``mine``, and its config."""
    folder = tmp_path / "user dir"
    (folder / "configs" / "routing").mkdir(parents=True)
    (folder / "mine.py").write_text("import other\n" + STRATEGY.format(name="mine"))
    (folder / "other.py").write_text("imports = 0\n")
    (folder / "test_mine.py").write_text("raise AssertionError('a test is no plug-in')\n")
    (folder / "configs" / "routing" / "mine.yaml").write_text(YAML.format(name="mine"))
    return folder


def call(monkeypatch: pytest.MonkeyPatch, command: ModuleType, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["moe", *words])
    monkeypatch.setattr("hydra._internal.utils.is_under_debugger", lambda: False)
    try:
        command.main()
    except SystemExit as left:
        return int(left.code or 0)
    return 0


def test_an_entry_point_is_imported_when_its_name_is_looked_up(installed: Path) -> None:
    assert MoELayer(dim=4, hidden=8, routing={"name": "switch", "num_experts": 2}) is not None
    assert "outside" not in sys.modules
    layer = MoELayer(dim=4, hidden=8, routing={"name": "outside", "num_experts": 2, "temper": 3.0})
    y, record = layer(torch.randn(2, 3, 4))
    assert y.shape == (2, 3, 4) and int(record.statistics.load.sum()) == 6
    assert "outside.strategy" in sys.modules and "outside.broken" not in sys.modules


def test_a_distribution_brings_strategies_tasks_and_loggers_and_metrics(
    installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    words = [*SMALL, "routing=outside", "task=outside", "task.share=0.75", f"hydra.run.dir={tmp_path / 'run'}"]
    assert call(monkeypatch, train, *words, "training.loggers=[outsde]") == 2
    assert "there is no logger 'outsde'. Did you mean 'outside'?" in capfd.readouterr().err
    assert call(monkeypatch, train, *words, "training.loggers=[outside,failing]") == 0
    told = [json.loads(line) for line in (tmp_path / "run" / "outside.jsonl").read_text().splitlines()]
    assert told == [{"trained": 1}, {"trained": 2}, {"validated": 2}, {"closed": 0}]
    assert (tmp_path / "run" / "failing.jsonl").read_text() == "told once\n"
    assert "the logger 'failing' has failed" in (tmp_path / "run" / "logs" / "rank_0.log").read_text()
    config = json.loads((tmp_path / "run" / "config.json").read_text())["config"]
    assert config["routing"]["temper"] == 2.0 and config["task"] == {**config["task"], "name": "outside", "share": 0.75}
    check_metrics(tmp_path / "run", monkeypatch, capfd)


def check_metrics(at: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    words = [f"run={at}", "split=valid", "search.beam=1", "search.max_length_ratio=1"]
    assert call(monkeypatch, evaluate, *words, "metrics=[exakt]") == 2
    assert "there is no metric 'exakt'. Did you mean 'exact'?" in capfd.readouterr().err
    assert call(monkeypatch, evaluate, *words, "metrics=[chrf,ter,exact,failing]") == 0
    content = json.loads((at / "valid.json").read_text())
    assert content["average"].keys() == {"bleu", "chrf", "ter", "exact"} and content["average"]["exact"] == 0.25
    assert content["average"]["ter"] > 0 and all("punct:yes" in text for text in content["signatures"]["ter"])
    assert all(result["exact"] == 0.25 and "failing" not in result for result in content["directions"].values())
    assert any("the metric 'failing' failed (its score is nan)" in note for note in content["notes"])
    results = read_results(at / "valid.json")
    assert results is not None and results.to_json() == content
    assert call(monkeypatch, evaluate, *words) == 0  # less than the file says: that is set aside
    again = json.loads((at / "valid.json").read_text())
    assert again["average"].keys() == {"bleu", "chrf"} and len(list(at.glob("valid*.json"))) == 2


def test_a_distribution_brings_corpora_and_configs(
    installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert call(monkeypatch, plan, "routing=outside", "model=tiny", f"json={tmp_path / 'plan.json'}") == 0
    size = ["vocabulary.size=300", "workers=1", "corpus.split.valid=0.1", "corpus.split.test=0.1"]
    assert call(monkeypatch, prepare, "corpus=outside", f"out={tmp_path / 'data'}", *size) == 0
    assert (tmp_path / "data" / "manifest.json").is_file()


def test_a_broken_plug_in_is_one_error_that_names_its_distribution(installed: Path) -> None:
    with pytest.raises(ConfigError, match=r"outside 1\.5, entry point broken = outside\.broken: .*nothing_of_that"):
        strategies.strategy("broken")
    with pytest.raises(ConfigError, match=r"outside 1\.5.* does not register 'silent' in strategies"):
        strategies.strategy("silent")
    with pytest.raises(ConfigError, match="Did you mean 'outside'"):
        strategies.strategy("outsid")


def test_two_distributions_with_one_name_are_refused(installed: Path) -> None:
    second = installed / "second-2.0.dist-info"
    second.mkdir()
    (second / "METADATA").write_text("Metadata-Version: 2.1\nName: second\nVersion: 2.0\n")
    (second / "entry_points.txt").write_text("[moe_train.strategies]\noutside = second.strategy\n")
    with pytest.raises(ConfigError, match=r"outside 1\.5 and second 2\.0 both offer 'outside'"):
        strategies.strategy("outside")


def test_user_dir_is_imported_by_the_command_and_by_no_file(
    mine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    at = tmp_path / "run"
    words = [*SMALL, "routing=mine", "evaluate=valid", f"hydra.run.dir={at}"]
    assert call(monkeypatch, train, *words) == 2
    assert "there is no routing 'mine'" in capfd.readouterr().err and not at.exists()
    assert call(monkeypatch, train, *words, f"user_dir={mine}") == 0
    assert json.loads((at / "config.json").read_text())["user_dir"] == str(mine)
    assert call(monkeypatch, export, f"run={at}", f"out={tmp_path / 'export'}", f"user_dir={mine}") == 0
    assert "because a file names it" not in capfd.readouterr().err
    for made in (at, tmp_path / "export"):
        for name in ("mine", "other"):
            sys.modules.pop(name, None)
        strategies._STRATEGIES.pop("mine", None)
        (mine / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
        monkeypatch.setenv(plugins.USER_DIR, "")
        assert call(monkeypatch, evaluate, f"run={made}", "split=valid", "max_sentences=1") == 2
        said = capfd.readouterr().err
        assert said.count(f"{made} was made with user_dir='{mine}', which is not imported because a file names it") == 1
        assert "there is no routing strategy 'mine'" in said and not (tmp_path / "ran").exists()


@pytest.mark.processes
@pytest.mark.warm_start
def test_user_dir_reaches_every_process_of_a_command(mine: Path, tmp_path: Path) -> None:
    """Ranks, and the processes that decode."""
    command = [sys.executable, "-m", "moe_train.commands.train", *SMALL, "routing=mine", f"user_dir={mine.name}"]
    words = ["launch.processes=2", "evaluate=valid", "search.beam=1", f"hydra.run.dir={tmp_path / 'run'}"]
    done = subprocess.run([*command, *words], cwd=tmp_path, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "run" / "valid.json").is_file()
    assert json.loads((tmp_path / "run" / "config.json").read_text())["user_dir"] == str(mine)


def test_the_environment_names_the_folder_too(
    mine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(plugins.USER_DIR, str(mine))
    assert call(monkeypatch, plan, "routing=mine", "model=tiny") == 0
    assert call(monkeypatch, plan, "routing=mine", "model=tiny", "user_dir=null") == 2
    assert "there is no routing 'mine'" in capfd.readouterr().err


def test_a_config_file_names_no_code(
    mine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "first" / "configs" / "experiment").mkdir(parents=True)
    text = f"# @package _global_\nuser_dir: '{mine}'\n"
    (tmp_path / "first" / "configs" / "experiment" / "sly.yaml").write_text(text)
    at = f"hydra.run.dir={tmp_path / 'run'}"
    assert call(monkeypatch, train, f"user_dir={tmp_path / 'first'}", *SMALL, "experiment=sly", at) == 2
    assert "files may not import code" in capfd.readouterr().err
    assert "other" not in sys.modules


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("mine.py", "x = 1\ny = x / 0\n", r"mine\.py:2: .*ZeroDivisionError"),
        ("mine.py", "def broken(:\n", r"mine\.py.*SyntaxError"),
        ("mine.py", "raise SystemExit(0)\n", r"mine\.py:1: .*SystemExit"),
        ("json.py", "", r"json\.py: .*name is taken by"),
        ("my-strategy.py", "", r"my-strategy\.py: .*not a module name"),
        ("README.md", "", "contains no Python module"),
    ],
)
def test_what_cannot_be_imported_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str, message: str
) -> None:
    (tmp_path / name).write_text(text)
    monkeypatch.setenv(plugins.USER_DIR, str(tmp_path))
    with pytest.raises(ConfigError, match=message):
        plugins.import_user_dir()
    shutil.rmtree(tmp_path)
    with pytest.raises(ConfigError, match="user_dir is not a folder"):
        plugins.import_user_dir()


def test_a_task_of_its_own_needs_no_config_class() -> None:
    assert TaskConfig.variant({"name": "no_such_task"}) is TaskConfig

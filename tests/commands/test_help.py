"""``--help`` and ``--version`` of every command: what it says comes from the comments of the config files."""

from __future__ import annotations

import itertools
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from moe_train import __version__
from moe_train.commands import bench, evaluate, export, fairseq, plan, prepare, report, train, translate
from moe_train.commands.cli.comments import read_comments
from moe_train.commands.cli.help_text import help_text
from moe_train.commands.cli.overrides import check_overrides
from moe_train.config.paths import configs_directory
from moe_train.errors import ConfigError

CONFIGURED = {
    module.__name__.rpartition(".")[2]: module.main
    for module in (train, prepare, evaluate, translate, export, report, plan)
}
COMMANDS = {**CONFIGURED, "bench": bench.main, "fairseq": lambda: sys.exit(fairseq.main())}
each_configured = pytest.mark.parametrize("command", list(CONFIGURED))


def said(main: Callable[[], object], capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What a command prints that ends well."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["moe-test", *words])
        try:
            main()
        except SystemExit as left:
            assert not left.code
    return capsys.readouterr().out


@pytest.mark.parametrize("command", list(COMMANDS))
def test_a_version_is_ours(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert said(COMMANDS[command], capsys, "--version") == f"moe_train {__version__}\n"


@pytest.mark.parametrize("words", [[command] for command in COMMANDS] + [["bench", "layer"], ["bench", "inference"]])
def test_help_says_what_a_command_does_and_fits_80_columns(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    lines = said(COMMANDS[words[0]], capsys, *words[1:], "--help").splitlines()
    assert any(re.match(rf"moe-{words[0]}: \w+", line) for line in lines) or words[1:]
    assert max(map(len, lines)) <= 80
    assert words[1:] or any(line.startswith(f"  moe-{words[0]} ") for line in lines), "examples"


def dotted(content: object, prefix: str = "") -> list[str]:
    if not isinstance(content, dict) or not content:
        return [prefix.rstrip(".")]
    return [key for name, below in content.items() for key in dotted(below, f"{prefix}{name}.")]


@each_configured
def test_every_key_of_a_command_has_a_default_and_a_sentence(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    file = configs_directory() / f"{command}.yaml"
    text, comments = said(CONFIGURED[command], capsys, "--help"), read_comments(file).keys
    content = {
        key: value for key, value in yaml.safe_load(file.read_text()).items() if key not in ("defaults", "hydra")
    }
    flat = " ".join(text.split())
    for key in dotted(content):
        assert re.search(rf"\n  {re.escape(key)}=\S", text), key
        assert comments.get(key), f"{key} has no comment"
        assert " ".join(comments[key].split()) in flat, key


def test_every_option_of_a_group_and_each_of_its_keys_is_explained() -> None:
    """A recipe, and another file that sets keys of other groups, need not say again what they are."""
    folder = configs_directory()
    options = {path: read_comments(path) for path in sorted(folder.glob("[!h]*/*.yaml"))}
    assert len(options) > 50
    elsewhere = set(read_comments(folder / "prepare.yaml").keys)
    for path, comments in options.items():
        prefix = "" if comments.is_global else f"{path.parent.name}."
        elsewhere |= {f"{prefix}{key}" for key in comments.keys}
    for path, comments in options.items():
        assert comments.prose, path
        content = yaml.safe_load(path.read_text())
        for key in dotted({name: value for name, value in content.items() if name != "defaults"}):
            if comments.is_global:
                assert {key, key.rpartition(".")[0]} & elsewhere or key == f"{path.parent.name}.name", (path, key)
            else:
                assert key in comments.keys or key == "name", (path, key)


@pytest.mark.parametrize("words", [["routing=thor"], ["task=image_classification"], ["training"]])
def test_a_group_s_keys_have_a_default_and_a_sentence(words: list[str]) -> None:
    lines = help_text("train", words).splitlines()
    start = lines.index("Keys, with their defaults:")
    assert lines[2] and max(map(len, lines)) <= 80
    for line, after in itertools.pairwise(lines[start:]):
        if re.match(r"  [\w.]+=", line):
            assert "  " in line.strip() or after.startswith(" " * 20), line


@each_configured
def test_the_examples_are_words_that_the_command_takes(command: str) -> None:
    examples = read_comments(configs_directory() / f"{command}.yaml").examples
    typed = [shlex.split(example.replace("…", "x"), comments=True) for example in examples]
    words = [word for line in typed if line[0] == f"moe-{command}" for word in line[1:] if "=" in word]
    assert words
    check_overrides(command, list(dict.fromkeys(words)))


def test_words_change_the_defaults_and_name_groups() -> None:
    assert "model.embed_dim=192     d, the width" in help_text("train", ["experiment=quickstart", "model"])
    assert "\n  split=valid " in help_text("evaluate", ["split=valid"])
    assert help_text("train", ["experiment"]).startswith("Options of experiment: memorise")
    for words, message in ((["corpus"], "there is no group 'corpus'"), (["sead=1"], "did you mean 'seed'")):
        with pytest.raises(ConfigError, match=f"(?i){message}"):
            help_text("train", words)


def test_a_user_s_own_option_is_explained(tmp_path: Path) -> None:
    (tmp_path / "routing").mkdir()
    (tmp_path / "routing" / "mine.yaml").write_text("# My way.\nname: switch\nnum_experts: 3   # so many\n")
    text = help_text("train", ["routing=mine"], str(tmp_path))
    assert text.startswith("routing=mine\n\nMy way.\n") and "routing.num_experts=3   so many" in text


def test_comments_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "file.yaml"
    file.write_text(
        "# moe-x: does x.\n# And more.\n#\n#   moe-x a=1\n#   moe-x a='#2'   # why\n"
        "defaults:\n  - model: tiny   # sizes\n\n"
        "a: 1     # first\n"
        "         # and second line\n"
        "# above b\n"
        "b: '# no comment'\n"
        "c:       # of c\n"
        "  d: x#y # of d\n"
        "  # apart\n\n"
        "  e: 3\n"
    )
    comments = read_comments(file)
    assert comments.prose == ["moe-x: does x. And more."]
    assert comments.examples == ["moe-x a=1", "moe-x a='#2'   # why"]
    assert comments.keys == {
        "defaults.model": "sizes",
        "a": "first and second line",
        "b": "above b",
        "c": "of c",
        "c.d": "of d",
    }

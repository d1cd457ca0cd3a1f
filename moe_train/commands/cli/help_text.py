"""``--help``: what a command does and each of its keys, from the comments of the config files."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from hydra import compose
from hydra.core.object_type import ObjectType
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue

from moe_train.commands.cli.comments import ConfigComments, read_comments
from moe_train.commands.cli.hydra_job import composing
from moe_train.commands.cli.overrides import RUN, check_overrides, groups_of, makes_run_folder
from moe_train.errors import ConfigError, did_you_mean

_WIDTH = 80
_COLUMN = 26  # where what is said of a key begins
_FLAGS = {
    "-m": "a sweep: keys and groups may have several values, seed=1,2,3; a run each",
    "--cfg job": "print the whole config of a command line instead of running it",
    "--help GROUP": "the keys of a group; --help GROUP=OPTION: of another option",
    "--version": "print the version",
    "--hydra-help": "other flags, all of Hydra",
    "-sc install=bash": "print completion of keys, groups and options for the Tab key (zsh: install=bash, too; fish: "
    'install=fish): eval "$({command} -sc install=bash)" in ~/.bashrc',
}


def help_text(config_name: str, words: Sequence[str], config_dir: str | None = None) -> str:
    """What ``--help`` prints, at most 80 columns wide.

    Args:
        config_name: of the command.
        words: overrides, which change the defaults that are shown, and names of groups, whose keys are shown instead.
        config_dir: a folder of the user's own configs (``--config-dir``).

    Raises:
        ConfigError: an override that cannot be, or a group that this command does not have.
    """
    overrides = check_overrides(config_name, [word for word in words if "=" in word], config_dir)
    with composing(config_dir) as loader:
        config = compose(config_name, overrides=overrides, return_hydra_config=True)
        choices = groups_of(config)
        options = {group: sorted(loader.get_group_options(group, ObjectType.CONFIG)) for group in choices}
        places = [element.path.removeprefix("file://") for element in loader.get_search_path().get_path()]
    folders = [Path(place) for place in places if "://" not in place]
    page = _Page(config_name, config, choices, options, folders)
    groups = [word.partition("=")[0].partition(".")[0] for word in words if "=" not in word]
    groups += [word.partition("=")[0] for word in words if word.partition("=")[0] in choices]
    return "\n".join([page.group(group) for group in groups] or [page.command()])


@dataclass(frozen=True)
class _Page:
    """What the help is made from.

    Attributes:
        config: composed with Hydra's part.
        choices, options: of each group of the command, what is chosen and what there is.
        folders: where config files lie, in Hydra's order.
    """

    config_name: str
    config: DictConfig
    choices: Mapping[str, str | None]
    options: Mapping[str, Sequence[str]]
    folders: Sequence[Path]

    def command(self) -> str:
        """What the command does, examples, its own keys, its groups and flags."""
        comments = read_comments(self._file(self.config_name))
        lines = [*_prose(comments), "", *_examples(comments), "Keys, with their defaults (key=value changes one):", ""]
        if makes_run_folder(self.config):
            folder = re.sub(r"\$\{now:[^}]*H[^}]*\}", "TIME", str(self.config.hydra.run._get_node("dir")._value()))
            folder = re.sub(r"\$\{now:[^}]*\}", "DATE", folder)
            lines += _hanging(f"{RUN}={folder}", comments.keys.get("hydra.run.dir", ""))
        lines += self._rows(self._content(self.config_name), comments.keys)
        if self.choices:
            lines += ["", "Groups of keys, with their defaults (group=option chooses another):", ""]
            for group, option in sorted(self.choices.items()):
                said = comments.keys.get(f"defaults.{group}", "")
                options = ", ".join(self.options[group])
                lines += _hanging(f"{group}={_shown(option)}", f"{said}: {options}" if said else options)
        lines += ["", "Flags:", ""]
        for flag, said in _FLAGS.items():
            if self.choices or "GROUP" not in flag:
                lines += _hanging(flag, said.format(command=self.config.hydra.job.name))
        return "\n".join(lines)

    def group(self, group: str) -> str:
        """The keys of the option that is chosen."""
        if group not in self.choices:
            raise ConfigError(f"there is no group '{group}' to explain", "--help", did_you_mean(group, self.choices))
        option = self.choices[group]
        options = textwrap.wrap(f"Options of {group}: {', '.join(self.options[group])}", _WIDTH)
        if option is None:
            return "\n".join(options)
        comments = read_comments(self._file(f"{group}/{option}"))
        content, said = self._content(f"{group}/{option}"), comments.keys
        if comments.is_global:  # it sets keys of other groups and of the command, where is said what they are
            said = {**read_comments(self._file(self.config_name)).keys, **self._comments_of_others(group), **said}
        else:
            content, said = {group: content}, _below(group, said)
        content.get(group, {}).pop("name", None)  # which the option is
        head = [f"{group}={option}", "", *_prose(comments), "", *_examples(comments)]
        return "\n".join([*head, "Keys, with their defaults:", "", *self._rows(content, said), "", *options, ""])

    def _comments_of_others(self, group: str) -> dict[str, str]:
        """Of the keys of all chosen options but this group's."""
        found: dict[str, str] = {}
        for other, option in self.choices.items():
            if option is not None and other != group:
                comments = read_comments(self._file(f"{other}/{option}"))
                found |= comments.keys if comments.is_global else _below(other, comments.keys)
        return found

    def _rows(self, content: Mapping[str, Any], said: Mapping[str, str]) -> list[str]:
        """The keys of a file, with their values in the config; what is said of several keys comes before them."""
        lines: list[str] = []
        for key, value in content.items():
            if isinstance(value, dict) and (key not in said or any(name.startswith(f"{key}.") for name in said)):
                if key in said:
                    lines += textwrap.wrap(f"{key}: {said[key]}", _WIDTH, initial_indent="  ", subsequent_indent="    ")
                lines += self._rows({f"{key}.{name}": below for name, below in value.items()}, said)
                continue
            text = said.get(key, "")
            try:
                shown = _shown(OmegaConf.select(self.config, key, throw_on_missing=True))
            except MissingMandatoryValue:
                shown, text = "…", f"{text} (must be given)"
            lines += _hanging(f"{key}={shown}", text)
        return lines

    def _content(self, name: str) -> dict[str, Any]:
        content = yaml.safe_load(self._file(name).read_text(encoding="utf-8")) or {}
        return {key: value for key, value in content.items() if key not in ("defaults", "hydra")}

    def _file(self, name: str) -> Path:
        return next(path for folder in self.folders if (path := folder / f"{name}.yaml").is_file())


def _below(group: str, said: Mapping[str, str]) -> dict[str, str]:
    return {f"{group}.{key}": text for key, text in said.items()}


def _prose(comments: ConfigComments) -> list[str]:
    return [line for text in comments.prose for line in [*textwrap.wrap(text, _WIDTH), ""]][:-1]


def _examples(comments: ConfigComments) -> list[str]:
    """Commands, broken as a shell allows; what is said behind one comes before it."""
    lines: list[str] = []
    for example in comments.examples:
        command, _, said = example.partition("  #")
        if said:
            lines += textwrap.wrap(said.strip(), _WIDTH, initial_indent="  # ", subsequent_indent="  # ")
        broken = textwrap.wrap(
            command, _WIDTH - 2, initial_indent="  ", subsequent_indent="      ", break_long_words=False
        )
        lines += [f"{line} \\" for line in broken[:-1]] + broken[-1:]
    return ["Examples:", "", *lines, ""] if lines else []


def _shown(value: Any) -> str:
    """As it is typed; of a long list only that it is one."""
    content = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
    text = yaml.safe_dump(content, default_flow_style=True, width=float("inf"), allow_unicode=True)
    text = text.removesuffix("...\n").strip()
    if text.startswith("["):
        return "[…]" if len(text) > _COLUMN else text.replace(", ", ",")
    return text


def _hanging(name: str, said: str) -> list[str]:
    """A name, and beside it, or below it where it is long, what is said of it."""
    indent = " " * _COLUMN
    lines = textwrap.wrap(said, _WIDTH, initial_indent=indent, subsequent_indent=indent)
    if len(name) + 4 > _COLUMN or not lines:
        return [f"  {name}", *lines]
    return [f"  {name}".ljust(_COLUMN) + lines[0][_COLUMN:], *lines[1:]]

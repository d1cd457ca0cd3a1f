"""Prints ``--help`` of a command and of each key, from the comments of the config files."""

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
_COLUMN = 26  # where the description of a key begins
_FLAGS = {
    "-m": "a sweep: keys and groups may have several values, as in seed=1,2,3: one run for each",
    "--cfg job": "print the composed config instead of running the command",
    "--help GROUP": "the keys of a group; --help GROUP=OPTION: of another option",
    "--version": "print the version",
    "--hydra-help": "other flags, all of Hydra",
    "-sc install=bash": "print completion of keys, groups and options for the Tab key (zsh: install=bash, too; fish: "
    'install=fish): eval "$({command} -sc install=bash)" in ~/.bashrc',
}


def help_text(config_name: str, words: Sequence[str], config_dir: str | None = None) -> str:
    """The text of ``--help``, at most 80 columns wide.

    Args:
        config_name: of the command.
        words: overrides, which change the defaults that are shown, and names of groups, of which only the keys are
            shown.
        config_dir: a folder of the user's own configs (``--config-dir``).

    Raises:
        ConfigError: an invalid override, or a group that this command does not have.
    """
    overrides = check_overrides(config_name, [word for word in words if "=" in word], config_dir)
    with composing(config_dir) as loader:
        config = compose(config_name, overrides=overrides, return_hydra_config=True)
        choices = groups_of(config)
        options = {group: sorted(loader.repository.get_group_options(group, ObjectType.CONFIG)) for group in choices}
        places = [element.path.removeprefix("file://") for element in loader.get_search_path().get_path()]
    folders = [Path(place) for place in places if "://" not in place]
    page = _Page(config_name, config, choices, options, folders)
    groups = [word.partition("=")[0].partition(".")[0] for word in words if "=" not in word]
    groups += [word.partition("=")[0] for word in words if word.partition("=")[0] in choices]
    return "\n".join([page.group(group) for group in groups] or [page.command()])


@dataclass(frozen=True)
class _Page:
    """Content of the help.

    Attributes:
        config: composed, with Hydra's part.
        choices, options: chosen option and all options of each group of the command.
        folders: of config files, in Hydra's order.
    """

    config_name: str
    config: DictConfig
    choices: Mapping[str, str | None]
    options: Mapping[str, Sequence[str]]
    folders: Sequence[Path]

    def command(self) -> str:
        """Description, examples, keys, groups and flags of the command."""
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
                description = comments.keys.get(f"defaults.{group}", "")
                options = ", ".join(self.options[group])
                lines += _hanging(f"{group}={_shown(option)}", f"{description}: {options}" if description else options)
        lines += ["", "Flags:", ""]
        for flag, description in _FLAGS.items():
            if self.choices or "GROUP" not in flag:
                lines += _hanging(flag, description.format(command=self.config.hydra.job.name))
        return "\n".join(lines)

    def group(self, group: str) -> str:
        """The keys of the chosen option."""
        if group not in self.choices:
            raise ConfigError(f"there is no group '{group}'", "--help", did_you_mean(group, self.choices))
        option = self.choices[group]
        options = textwrap.wrap(f"Options of {group}: {', '.join(self.options[group])}", _WIDTH)
        if option is None:
            return "\n".join(options)
        comments = read_comments(self._file(f"{group}/{option}"))
        content, descriptions = self._content(f"{group}/{option}"), comments.keys
        if comments.is_global:  # it sets keys of the command and of other groups, described in their own files
            descriptions = {
                **read_comments(self._file(self.config_name)).keys,
                **self._comments_of_others(group),
                **descriptions,
            }
        else:
            content, descriptions = {group: content}, _below(group, descriptions)
        content.get(group, {}).pop("name", None)  # that is the option itself
        head = [f"{group}={option}", "", *_prose(comments), "", *_examples(comments)]
        return "\n".join(
            [*head, "Keys, with their defaults:", "", *self._rows(content, descriptions), "", *options, ""]
        )

    def _comments_of_others(self, group: str) -> dict[str, str]:
        """Comments of the keys of all chosen options of other groups."""
        found: dict[str, str] = {}
        for other, option in self.choices.items():
            if option is not None and other != group:
                comments = read_comments(self._file(f"{other}/{option}"))
                found |= comments.keys if comments.is_global else _below(other, comments.keys)
        return found

    def _rows(self, content: Mapping[str, Any], descriptions: Mapping[str, str]) -> list[str]:
        """The keys of a file with their values in the config; a comment on several keys comes before them."""
        lines: list[str] = []
        for key, value in content.items():
            if isinstance(value, dict) and (
                key not in descriptions or any(name.startswith(f"{key}.") for name in descriptions)
            ):
                if key in descriptions:
                    lines += textwrap.wrap(
                        f"{key}: {descriptions[key]}", _WIDTH, initial_indent="  ", subsequent_indent="    "
                    )
                lines += self._rows({f"{key}.{name}": below for name, below in value.items()}, descriptions)
                continue
            text = descriptions.get(key, "")
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


def _below(group: str, descriptions: Mapping[str, str]) -> dict[str, str]:
    return {f"{group}.{key}": text for key, text in descriptions.items()}


def _prose(comments: ConfigComments) -> list[str]:
    return [line for text in comments.prose for line in [*textwrap.wrap(text, _WIDTH), ""]][:-1]


def _examples(comments: ConfigComments) -> list[str]:
    """Example commands, with line breaks that a shell accepts; the comment after a command is shown before it."""
    lines: list[str] = []
    for example in comments.examples:
        command, _, description = example.partition("  #")
        if description:
            lines += textwrap.wrap(description.strip(), _WIDTH, initial_indent="  # ", subsequent_indent="  # ")
        broken = textwrap.wrap(
            command, _WIDTH - 2, initial_indent="  ", subsequent_indent="      ", break_long_words=False
        )
        lines += [f"{line} \\" for line in broken[:-1]] + broken[-1:]
    return ["Examples:", "", *lines, ""] if lines else []


def _shown(value: Any) -> str:
    """A value as it is typed on the command line; ``[…]`` for a long list."""
    content = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
    text = yaml.safe_dump(content, default_flow_style=True, width=float("inf"), allow_unicode=True)
    text = text.removesuffix("...\n").strip()
    if text.startswith("["):
        return "[…]" if len(text) > _COLUMN else text.replace(", ", ",")
    return text


def _hanging(name: str, description: str) -> list[str]:
    """A name with its description on the same line, or below a long name."""
    indent = " " * _COLUMN
    lines = textwrap.wrap(description, _WIDTH, initial_indent=indent, subsequent_indent=indent)
    if len(name) + 4 > _COLUMN or not lines:
        return [f"  {name}", *lines]
    return [f"  {name}".ljust(_COLUMN) + lines[0][_COLUMN:], *lines[1:]]

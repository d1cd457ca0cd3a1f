"""Checks overrides of the command line before Hydra does, whose messages assume knowledge of its internals."""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from importlib.util import find_spec
from itertools import takewhile
from typing import Any

from hydra import compose
from hydra._internal.config_repository import IConfigRepository
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override, RangeSweep
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf

from moe_train.commands.cli.hydra_job import composing
from moe_train.errors import ConfigError, MissingDependency, did_you_mean, first_line, spelt_out
from moe_train.launch.slurm import check_slurm

_NOTHING = "<nothing>"
_MOST_JOBS = 10_000
RUN, RUN_FOLDER, SWEEP_FOLDER = "run", "hydra.run.dir", "hydra.sweep.dir"
# Names of the output folder in other programs.
_FOLDERS = ("dir", "folder", "log_dir", "logdir", "out", "output", "output_dir", "run_dir", "rundir", "save_dir")


def check_overrides(
    config_name: str, overrides: Sequence[str], config_dir: str | None = None, multirun: bool = False
) -> list[str]:
    """Refuses keys, groups and options that do not exist.

    A group that is empty in the config (``routing: {}``) is open: its keys are checked where it is read.

    Args:
        overrides: of the command line, such as ``routing=switch`` or ``training.max_updates=100``.
        config_dir: a folder of the user's own configs (``--config-dir``).
        multirun: whether it is a sweep.

    Returns:
        The overrides for Hydra: those that add keys (to an open group or a mapping such as ``{pt: pt_PT}``) get ``++``;
        ``run=``, the short name of the run folder of a command that makes one, is replaced by the full key.

    Raises:
        ConfigError: names the override, and near spellings.
    """
    with composing(config_dir) as loader:
        plain = compose(config_name, return_hydra_config=True)
        makes_folder, own = makes_run_folder(plain), groups_of(plain)
        if makes_folder:
            sweeps = multirun or "hydra.mode=MULTIRUN" in overrides
            overrides = [_full_name(word, SWEEP_FOLDER if sweeps else RUN_FOLDER) for word in overrides]
        read = _parse(overrides)
        overrides = [override.input_line or "" for override in read]
        parsed = [override for override in read if not _is_hydras(override.key_or_group)]
        _check_sweep(parsed)
        groups = {group: options for group, options in _groups(loader.repository) if group in own or "/" in group}
        grouped = [override for override in parsed if override.key_or_group in groups]
        chosen = [word for override in grouped if (word := _check_group(override, groups))]
        config = _composed(config_name, chosen) if chosen else plain
        content = OmegaConf.to_container(config, resolve=False)
        assert isinstance(content, dict)
        content.pop("hydra", None)
        keys, opened = sorted(_keys(content)), tuple(f"{key}." for key in _open_groups(content))
        for override in parsed:
            if override.key_or_group not in groups and not _is_known(override, keys, opened):
                key = override.key_or_group.split("@", 1)[0]
                if makes_folder and key.rpartition(".")[2] in _FOLDERS:
                    raise ConfigError(f"unknown key '{key}'", remedy=f"did you mean '{RUN_FOLDER}', in short '{RUN}'?")
                group = key.partition(".")[0]
                raise _unknown(key, keys, groups, dict(_with_each(config_name, group, groups.get(group, []))))
            if override.key_or_group not in groups:
                _check_kind(override, config)
    maps = {override.input_line for override in parsed if _is_map(override)}
    return [f"++{word}" if word in maps or (opened and word.startswith(opened)) else word for word in overrides]


def makes_run_folder(config: DictConfig) -> bool:
    """Whether a command makes a folder for each run; commands that have a key ``run`` read one.

    Args:
        config: composed with Hydra's part.
    """
    return RUN not in config and config.hydra.run.dir != "."


def groups_of(config: DictConfig) -> dict[str, str | None]:
    """The groups of a command with the chosen options.

    Args:
        config: composed with Hydra's part.
    """
    choices = OmegaConf.to_container(config.hydra.runtime.choices)
    assert isinstance(choices, dict)
    return {str(group): option for group, option in choices.items() if not str(group).startswith("hydra/")}


def _full_name(word: str, key: str) -> str:
    """``word`` with ``key`` in place of the short name of the run folder."""
    name, equals, value = word.partition("=")
    return f"{key}={value}" if equals and name == RUN else word


def check_launcher(overrides: Sequence[str], multirun: bool) -> None:
    """Refuses a launcher that would not be used, and one that is not installed.

    Raises:
        ConfigError: ``hydra/launcher=…`` without ``-m``.
        MissingDependency: submitit's launchers without submitit.
        LaunchError: submitit's launcher for Slurm without Slurm.
    """
    chosen = [word.partition("=")[2] for word in overrides if word.startswith("hydra/launcher=")]
    if not chosen or chosen[-1] == "basic":
        return
    if not multirun and "hydra.mode=MULTIRUN" not in overrides:
        raise ConfigError(
            "a launcher is only used in a sweep", f"hydra/launcher={chosen[-1]}", "add -m, also for one job"
        )
    if chosen[-1].startswith("submitit") and find_spec("submitit") is None:
        raise MissingDependency(
            "submitit is not installed",
            f"hydra/launcher={chosen[-1]}",
            "run scripts/setup.sh, or pip install submitit hydra-submitit-launcher",
        )
    if chosen[-1] == "submitit_slurm":
        check_slurm()


def _with_each(config_name: str, group: str, options: Sequence[str]) -> Iterator[tuple[str, DictConfig]]:
    """Yields the config with each option of a group; nothing where this command does not have the group."""
    for option in options:
        with suppress(ConfigError):
            yield option, _composed(config_name, [f"{group}={option}"])


def _composed(config_name: str, words: list[str]) -> DictConfig:
    try:
        return compose(config_name, overrides=words)
    except HydraException as error:  # such as a group that only other commands have
        reason = first_line(error)
        raise ConfigError(reason, "command line", f"see the groups and keys in configs/{config_name}.yaml") from None


def _check_sweep(parsed: Iterable[Override]) -> None:
    """Refuses a sweep without jobs, and one of more than ``_MOST_JOBS``."""
    jobs = 1
    for override in parsed:
        match override.value() if override.is_sweep_override() else None:
            case RangeSweep(start=start, stop=stop, step=step):
                jobs *= max(0, math.ceil(((stop or 0) - (start or 0)) / step)) if step else 0
            case ChoiceSweep(list=values):
                jobs *= len(values)
        if not 0 < jobs <= _MOST_JOBS:
            raise ConfigError(
                f"the sweep has {jobs:,} jobs with it",
                override.input_line or "",
                f"choose values for 1 to {_MOST_JOBS:,} jobs",
            )


def _parse(overrides: Sequence[str]) -> list[Override]:
    """All overrides, Hydra's own included."""
    parser = OverridesParser.create()
    parsed = []
    for word in overrides:
        try:
            parsed.append(_read(parser, word))
        except (HydraException, ValueError) as error:  # ValueError: numbers of thousands of digits
            reason = first_line(error)
            remedy = "write key=value, and quote values with special characters"
            if "=" not in word and os.path.isdir(word):
                remedy = f"did you mean '{RUN}={word}' or 'data={word}'? {remedy}"
            raise ConfigError(
                f"cannot read '{word if len(word) < 200 else f'{word[:200]}…'}' ({reason})", "command line", remedy
            ) from None
    for override in parsed:
        is_folder = override.key_or_group in (RUN_FOLDER, SWEEP_FOLDER) and not override.is_sweep_override()
        if is_folder and not isinstance(override.value() or None, str | int | float):
            raise ConfigError("the run folder must be a path", override.input_line or "", "write run=FOLDER")
    return parsed


def _read(parser: OverridesParser, word: str) -> Override:
    """One override; its value in quotes where it has characters that Hydra reads only there (``/home/jürgen``)."""
    try:
        return parser.parse_override(word)
    except HydraException as error:
        key, _, value = word.partition("=")
        if value.startswith(tuple("'\"[{(")) or not first_line(error).startswith("token recognition error"):
            raise
        escaped = value.replace("'", "\\'")
        return parser.parse_override(f"{key}='{escaped}'")


def _is_hydras(key: str) -> bool:
    return key == "hydra" or key.startswith(("hydra.", "hydra/"))


def _groups(configs: IConfigRepository, parent: str = "") -> Iterator[tuple[str, list[str]]]:
    """Group -> its options, for all groups except Hydra's. The loader's own methods copy all configs at each call."""
    for name in configs.get_group_options(parent, ObjectType.GROUP):
        path = f"{parent}/{name}" if parent else name
        if not _is_hydras(path):
            yield path, configs.get_group_options(path, ObjectType.CONFIG)
            yield from _groups(configs, path)


def _check_group(override: Override, groups: Mapping[str, list[str]]) -> str | None:
    """Refuses unknown options; returns an override that chooses the first of them."""
    group, options = override.key_or_group, groups[override.key_or_group]
    if override.is_delete():
        return None
    if override.value() is None:
        raise ConfigError(f"'{group}' must be one of its options, not null", remedy=did_you_mean(group, options))
    values = [str(value) for value in _values(override) if value is not None]
    for value in values:
        if value not in options:
            raise ConfigError(f"there is no {group} '{value}'", remedy=did_you_mean(value, options))
    return f"{'+' if override.is_add() else ''}{group}={values[0]}" if values else None


def _check_kind(override: Override, config: DictConfig) -> None:
    """Refuses a list in place of a group of keys and the reverse, which Hydra cannot merge."""
    key = override.key_or_group
    set_to = None if override.is_sweep_override() or override.is_delete() else override.value()
    now = OmegaConf.select(config, key, default=None, throw_on_missing=False)
    if isinstance(now, ListConfig) and isinstance(set_to, dict):
        raise ConfigError(f"'{key}' must be a list, not {set_to}", remedy=f"write '{key}=[…]'")
    if isinstance(now, DictConfig) and isinstance(set_to, list):
        raise ConfigError(f"'{key}' must be a group of keys, not {set_to}", remedy=f"write '{key}={{KEY: value}}'")
    if isinstance(now, DictConfig) and isinstance(set_to, str):
        below = f"its keys are {', '.join(map(str, now))}" if now else f"write {key}.KEY=…"
        remedy = f"write {key}.name={set_to}" if "name" in now else below
        raise ConfigError(f"'{key}' must be a group of keys, not '{set_to}'", remedy=remedy)


def _is_map(override: Override) -> bool:
    """Whether a key is set to a mapping, which adds keys; those are checked where the config is read."""
    set_to = None if override.is_sweep_override() or override.is_delete() else override.value()
    return isinstance(set_to, dict) and not (override.is_add() or override.is_force_add())


def _values(override: Override) -> Iterable[Any]:
    if override.is_sweep_override():
        return override.sweep_iterator() if override.is_discrete_sweep() else ()
    value = override.value()
    return value if isinstance(value, list) else [value]


def _is_known(override: Override, keys: Sequence[str], opened: tuple[str, ...]) -> bool:
    """Whether the key exists, is to be added, or belongs to an open group."""
    key = override.key_or_group.split("@", 1)[0]
    added = override.is_add() or override.is_force_add()
    return added or key in keys or key.startswith(opened) or any(known.startswith(f"{key}.") for known in keys)


def _unknown(
    key: str, keys: Sequence[str], groups: Mapping[str, list[str]], options: Mapping[str, DictConfig]
) -> ConfigError:
    """The error for an unknown key.

    Args:
        options: the config with each option of the key's group.
    """
    group = key.partition(".")[0]
    full = ".".join([*key.split(".")[:-1], spelt_out(key.rpartition(".")[2])])
    if full != key and full in keys:
        return ConfigError(f"unknown key '{key}'", remedy=f"did you mean '{full}'?")
    owners = [name for name, config in options.items() if OmegaConf.select(config, full, default=_NOTHING) != _NOTHING]
    if owners:
        what = "it" if full == key else f"'{full}'"
        return ConfigError(
            f"unknown key '{key}': {what} belongs to {', '.join(f'{group}={name}' for name in owners)}",
            remedy=f"omit it, or choose {'one of these' if len(owners) > 1 else f'{group}={owners[0]}'}",
        )
    values = [known for known in keys if not any(other.startswith(f"{known}.") for other in keys)]
    if parent := next((known for known in values if key.startswith(f"{known}.")), ""):
        return ConfigError(f"unknown key '{key}'", remedy=f"'{parent}' is a value, not a group: set {parent}=…")
    return ConfigError(f"unknown key '{key}'", remedy=_near(key, keys, groups))


def _near(key: str, keys: Sequence[str], groups: Mapping[str, list[str]]) -> str:
    """Keys with the same last part, near spellings of the whole key or of its last part, or keys of the same group."""
    known = [name for name in dict.fromkeys([*keys, *groups]) if not key.startswith(f"{name}.")]
    last = {name: name.rpartition(".")[2] for name in known}
    word = key.rpartition(".")[2]
    near = _nearest(key, [name for name in known if last[name] == word])
    near = near or difflib.get_close_matches(key, known, n=3, cutoff=0.75)
    if not near:
        words = difflib.get_close_matches(word, sorted(set(last.values())), n=3, cutoff=0.75)
        near = [name for name in known if last[name] in words][:3]
    if near:
        # Of a group with options, such as training.optimizer, the name is the key that takes one word.
        full = [f"{name}.name" if f"{name}.name" in keys and name not in groups else name for name in near]
        return f"did you mean {' or '.join(repr(name) for name in full)}?"
    parent = key.rpartition(".")[0]
    siblings = [name for name in keys if parent and name.rpartition(".")[0] == parent]
    siblings = siblings or sorted({name.split(".", 1)[0] for name in keys})
    return f"known{f' in {parent}' if parent and '.' in siblings[0] else ''}: {', '.join(siblings)}"


def _nearest(key: str, names: Sequence[str]) -> list[str]:
    """At most three names, those that share the most leading parts with ``key``."""

    def shared(name: str) -> int:
        parts = zip(key.split("."), name.split("."), strict=False)
        return len(list(takewhile(lambda pair: pair[0] == pair[1], parts)))

    return [name for name in names if shared(name) == max(map(shared, names))][:3]


def _open_groups(content: Any, prefix: str = "") -> Iterator[str]:
    """Dotted names of the groups that are empty."""
    for name, value in content.items() if isinstance(content, dict) else ():
        if value == {}:
            yield f"{prefix}{name}"
        yield from _open_groups(value, f"{prefix}{name}.")


def _keys(content: Any, prefix: str = "") -> Iterator[str]:
    """Dotted names of all values and groups."""
    if isinstance(content, (dict, DictConfig)):
        for name, value in content.items():
            yield f"{prefix}{name!s}"
            yield from _keys(value, f"{prefix}{name!s}.")

"""Runs a configured command as a Hydra app, and reports user errors as one message with a remedy.

Exit codes: 0 success; 1 an internal error or a failed process, with its traceback; 2 a user error; 75 interrupted by a
signal, checkpoint saved: the same command resumes; 130 interrupted by Ctrl-C with nothing to save.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import hydra
from hydra import compose
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from moe_train import __version__
from moe_train.commands.cli.completion import candidates
from moe_train.commands.cli.help_text import help_text
from moe_train.commands.cli.hydra_job import composing, in_sweep, remove_empty_run_folder, run_directory
from moe_train.commands.cli.messages import INTERRUPTED, print_error, print_interrupted
from moe_train.commands.cli.overrides import check_launcher, check_overrides
from moe_train.commands.cli.sweep_errors import KNOWN, SweepErrors, run_sweep
from moe_train.config.paths import configs_directory
from moe_train.console import lossy_streams, require_output
from moe_train.errors import ConfigError, UserError, first_line
from moe_train.launch.elastic import folder_overrides, note_folder
from moe_train.launch.hydra_store import forget_foreign_schemas
from moe_train.launch.job.env import check_environment, launched_rank, local_rank, under_launcher
from moe_train.launch.job.hard_exit import exit_now
from moe_train.launch.slurm import set_torchrun_env
from moe_train.plugins import USER_DIR, import_user_dir, set_user_dir, take_user_dir, user_dir
from moe_train.safe_text import current_traceback, show_warnings_as_text

_ERROR_DELAY = 15.0  # seconds; rank 0 finds an error some seconds later than others, since it also starts Hydra

Callback = Callable[[dict[str, Any]], Any]


def run_app(config_name: str, callback: Callback) -> None:
    """Runs a command (:func:`_run`); a rank that fails under a launcher ends without waiting for the others.

    Training continues if standard output cannot be written; other commands report it at their end.
    """
    show_warnings_as_text()
    with lossy_streams():
        try:
            _run(config_name, callback)
            if config_name != "train":
                try:
                    require_output()
                except UserError as error:
                    _exit_with(error)
        except SystemExit as end:
            if under_launcher() and end.code:
                exit_now(end.code if isinstance(end.code, int) else 1)
            raise
        except KeyboardInterrupt:
            print_interrupted()
            if under_launcher():
                exit_now(INTERRUPTED)
            raise SystemExit(INTERRUPTED) from None
        except Exception:
            if not under_launcher():
                raise
            print(current_traceback(), file=sys.stderr, end="")
            exit_now(1)


def _run(config_name: str, callback: Callback) -> None:
    """Runs ``callback`` on the composed config, as a Hydra 1.3 app (``-m``, ``--cfg job``, ``hydra.*`` and so on work).

    Under torchrun or srun only rank 0 is a Hydra app, with a run folder; the others only compose the config.

    Args:
        config_name: a file of ``configs/``, without its suffix.
        callback: called with the composed config as nested dicts and lists; its result is the job's, which a sweeper
            may minimise.
    """
    arguments = _parse(sys.argv[1:])
    config_name = arguments.config_name or config_name
    typed, given = sys.argv, arguments.overrides
    try:
        words = take_user_dir(arguments.overrides)
        if arguments.help:
            print(help_text(config_name, words, arguments.config_dir))
            return
        if arguments.shell_completion:
            _complete(config_name, words)
            return
        import_user_dir()
        arguments.overrides = check_overrides(config_name, words, arguments.config_dir, arguments.multirun)
        check_launcher(arguments.overrides, arguments.multirun)
        set_torchrun_env()
        check_environment()
        if launched_rank():
            _run_without_hydra(arguments, config_name, callback)
            return
    except KNOWN as error:
        _exit_with(error)
    folder = [] if arguments.multirun else folder_overrides(arguments.overrides)
    # Hydra requires that overrides are consecutive.
    sys.argv = [typed[0], *arguments.overrides, *folder, *(word for word in typed[1:] if word not in given)]
    errors = SweepErrors()
    job = _job(callback, typed, arguments.overrides, errors)
    app = hydra.main(version_base="1.3", config_path=str(configs_directory()), config_name=config_name)(job)
    if arguments.multirun or "hydra.mode=MULTIRUN" in arguments.overrides:
        run_sweep(app, errors)
    else:
        app()


@contextmanager
def print_error_once() -> Iterator[None]:
    """An error that all ranks of a launcher find is printed by the first rank of each host.

    When that rank ends, torchrun's agent ends the others. They wait for it, and print the error if they are not ended.
    """
    try:
        yield
    except UserError:
        if under_launcher() and local_rank():
            time.sleep(_ERROR_DELAY)
        raise


def plain(config: DictConfig) -> dict[str, Any]:
    """The composed config as nested dicts and lists.

    Raises:
        ConfigError: a mandatory key without a value, or an interpolation that cannot be resolved.
    """
    try:
        content = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as error:
        key = str(error.full_key or error.key)
        remedy = f"set {key}=…; --help explains the keys"
        raise ConfigError(f"the key '{key}' has no value", remedy=remedy) from None
    except OmegaConfBaseException as error:
        raise ConfigError(first_line(error), str(error.full_key or "")) from None
    assert isinstance(content, dict)
    if (named := content.pop("user_dir", user_dir())) != user_dir():
        raise ConfigError(
            f"a config file sets it to {named}, but files may not import code",
            "user_dir",
            f"set user_dir=… on the command line, or the variable {USER_DIR}",
        )
    return {str(key): value for key, value in content.items()}


def log_to_stderr() -> None:
    """Moves Hydra's log lines from standard output, which is for results such as translations, to standard error."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.StreamHandler) and handler.stream in (sys.stdout, sys.__stdout__):
            handler.setStream(sys.stderr)


def _job(callback: Callback, typed: list[str], words: list[str], errors: SweepErrors) -> Callable[[DictConfig], Any]:
    folder = user_dir()  # pickled with the job, which may run on another host

    def moe_train_job(config: DictConfig) -> Any:
        sys.argv = typed  # what the user typed, for run.json
        log_to_stderr()
        try:
            set_torchrun_env()  # for submitit, under which every rank is a Hydra job
            check_environment()
            set_user_dir(folder)
            import_user_dir()
            if not in_sweep():
                note_folder(words, run_directory())
            return callback(plain(config))
        except Exception as error:
            if in_sweep():
                errors.note(int(HydraConfig.get().job.num), error)
            if in_sweep() or not isinstance(error, KNOWN):
                raise  # Hydra runs the other jobs of the sweep
            remove_empty_run_folder()
            return _exit_with(error)
        except (SystemExit, KeyboardInterrupt):
            remove_empty_run_folder()
            raise
        finally:
            forget_foreign_schemas()

    return moe_train_job


def _parse(words: Sequence[str]) -> argparse.Namespace:
    """Parses Hydra's flags, which may be between the overrides; ``--version`` prints ours."""
    parser = get_args_parser()
    parser.usage = "%(prog)s [flags] key=value … (see --help)"
    for action in parser._actions:
        if "--version" in action.option_strings:
            action.version = f"moe_train {__version__}"  # type: ignore[attr-defined]
    given = parser.parse_intermixed_args(words)
    if given.experimental_rerun is not None:
        parser.error("--experimental-rerun reads a pickle, which can run any code: repeat the command line instead")
    if sum(map(bool, (given.run, given.multirun, given.cfg, given.info, given.shell_completion))) > 1:
        parser.error("only one of --run, --multirun, --cfg, --info and --shell-completion can be given")
    if given.resolve and not given.cfg:
        parser.error("--resolve needs --cfg")
    return given


def _complete(config_name: str, words: Sequence[str]) -> None:
    """Answers ``-sc query=…`` of the completion script; Hydra handles ``-sc install=bash`` and so on."""
    if any(word.startswith("query=") for word in words):
        print("\n".join(candidates(config_name, os.environ.get("COMP_LINE", ""))))
    else:
        hydra.main(version_base="1.3", config_path=str(configs_directory()), config_name=config_name)(lambda _: None)()


def _run_without_hydra(arguments: Any, config_name: str, callback: Callback) -> None:
    if arguments.cfg or arguments.help or arguments.info is not None:
        return
    if arguments.multirun:
        raise ConfigError(
            "a sweep cannot run under torchrun or srun",
            remedy="omit torchrun or srun, and set launch.processes=N or hydra/launcher=…",
        )
    with composing(arguments.config_dir):
        config = compose(config_name, overrides=arguments.overrides)
    callback(plain(config))


def _exit_with(error: Exception) -> NoReturn:
    print_error(error)
    raise SystemExit(2 if isinstance(error, UserError) else 1)

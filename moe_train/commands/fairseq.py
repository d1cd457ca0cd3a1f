"""``moe-fairseq``: fairseq's own command lines with our task, criterion and models.

Examples:
  moe-fairseq train DATA --task moe_translation --arch moe_transformer \\
      --moe-config 'model=tiny routing=switch' --optimizer adam --lr 5e-4 \\
      --criterion moe_label_smoothed_cross_entropy --max-tokens 4096 \\
      --save-dir checkpoints
  moe-fairseq generate DATA --task moe_translation \\
      --path checkpoints/checkpoint_last.pt --source-lang en --target-lang de
"""

from __future__ import annotations

import importlib
import itertools
import logging
import multiprocessing
import sys
from collections.abc import Sequence

from moe_train import __version__
from moe_train.commands.cli.messages import INTERRUPTED, print_interrupted
from moe_train.console import lossy_streams, make_streams_lossy
from moe_train.errors import CheckpointError, UserError, did_you_mean
from moe_train.fairseq_checkpoints import describe_exception
from moe_train.fairseq_compat import apply
from moe_train.fairseq_values import ValueRefused
from moe_train.plugins import import_user_dir
from moe_train.safe_text import for_terminal

COMMANDS = {
    "train": "train a model",
    "generate": "translate a split with a checkpoint, and score it",
    "interactive": "translate standard input",
    "validate": "the loss of a checkpoint on a split",
    "score": "BLEU of a file of hypotheses",
    "preprocess": "make a data folder from text",
}
_READING_CHECKPOINT = ("generate", "interactive", "validate")  # task, model and criterion come from a file
_PRINTING = ("generate", "interactive", "score")  # their output is their result


def register() -> None:
    """Registers ``moe_translation``, ``moe_transformer`` and ``moe_label_smoothed_cross_entropy`` with fairseq.

    Raises:
        MissingDependency: fairseq is not installed.
        ConfigError: a module of the user's folder (``MOE_TRAIN_USER_DIR``) cannot be imported.
    """
    apply()
    import_user_dir()
    for module in ("moe_train.models.fairseq_arch", "moe_train.tasks.translation.fairseq_task"):
        importlib.import_module(module)


if multiprocessing.current_process().name != "MainProcess":
    # In a rank that fairseq has spawned: it imports this module before it unpickles fairseq's functions.
    make_streams_lossy(literal=True)
    register()


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs ``moe-fairseq COMMAND …`` and returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    with lossy_streams(vital=words[0] in _PRINTING, literal=True):
        try:
            if words[0] in ("-h", "--help"):
                print(_help())
            elif words[0] == "--version":
                print(f"moe_train {__version__}")
            else:
                _run(words[0], words[1:])
        except UserError as error:
            print(for_terminal(f"moe-fairseq: {error}"), file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print_interrupted()
            return INTERRUPTED
    return 0


def _help() -> str:
    commands = (f"  {command:<12} {does}" for command, does in COMMANDS.items())
    about = (__doc__ or "").replace("``", "")
    return "\n".join([about, "Commands, each with fairseq's own --help:", "", *commands])


def _run(command: str, words: Sequence[str]) -> None:
    if command not in COMMANDS:
        raise UserError(f"unknown command '{command}'", remedy=did_you_mean(command, COMMANDS))
    if command == "interactive" and sys.stdin is None:
        raise UserError("standard input is closed", remedy="redirect text to it: moe-fairseq interactive … < FILE")
    register()
    # fairseq reads sys.argv in several places.
    before, sys.argv = sys.argv, [f"moe-fairseq {command}", *words]
    try:
        importlib.import_module(f"fairseq_cli.{command}").cli_main()
    except UserError as error:
        if isinstance(error, ValueRefused) and command in _READING_CHECKPOINT and not error.where:
            raise CheckpointError(error.what, _checkpoint(words), error.remedy) from error
        raise
    except Exception as error:
        if command not in _READING_CHECKPOINT:
            raise
        logging.getLogger("fairseq").debug("%s failed", command, exc_info=True)
        raise UserError(
            f"fairseq's {command} failed ({describe_exception(error)})",
            _checkpoint(words),
            "set LOGLEVEL=DEBUG in the environment to see the traceback",
        ) from error
    finally:
        sys.argv = before


def _checkpoint(words: Sequence[str]) -> str:
    """The file given by ``--path``; "" without it."""
    given = [word.removeprefix("--path=") for word in words if word.startswith("--path=")]
    given += [after for word, after in itertools.pairwise(words) if word == "--path"]
    return given[-1] if given else ""


if __name__ == "__main__":
    sys.exit(main())

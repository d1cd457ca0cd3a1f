"""The folder of a model that a command writes: it must be free, and is there whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from moe_train.errors import ConfigError
from moe_train.utils.replace_folder import replacing_folder


def check_free(out: Path, command: str) -> None:
    """Checks that the folder does not exist or is empty.

    Args:
        command: ``export`` or ``import``, for the message.

    Raises:
        ConfigError: it has content, or is a file.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(
            f"the {command}'s folder exists already and is not empty", str(out), "set another folder: out=…"
        )


@contextmanager
def new_model_folder(out: Path, command: str, what: str) -> Iterator[Path]:
    """Yields a folder that becomes ``out`` when the block ends without an error.

    Args:
        what: is written, for the message.

    Raises:
        ConfigError: as :func:`check_free`, or it cannot be written.
    """
    try:
        with replacing_folder(out) as replacement:
            check_free(out, command)
            yield replacement.begin()
            replacement.finish()
    except (OSError, SafetensorError) as error:
        failed = f"the {what} could not be written ({getattr(error, 'strerror', None) or error})"
        where = str(getattr(error, "filename", None) or out)
        raise ConfigError(failed, where, "check disk space and permissions, or set another folder: out=…") from error

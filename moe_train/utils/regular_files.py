"""Reads regular files of bounded size: reading a pipe or a device would not end."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

LARGEST = 1 << 28  # bytes; a manifest of 100,000 files has 15 MB
LARGEST_LOG = 1 << 32


def read_regular(path: Path, largest: int = LARGEST) -> bytes:
    """The content of a file.

    Raises:
        OSError: it cannot be read, is not a regular file, or is larger than ``largest`` bytes.
    """
    size = require_regular(path).st_size
    if size > largest:
        raise OSError(errno.EFBIG, f"more than {largest:,} bytes", str(path))
    return path.read_bytes()


def require_regular(path: Path) -> os.stat_result:
    """The status of a regular file, or of the one that a link leads to.

    Raises:
        OSError: there is none, or it is not a regular file.
    """
    status = path.stat()
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return status

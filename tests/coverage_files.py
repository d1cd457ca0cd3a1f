"""Coverage data of processes that were killed while they wrote it."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path


def is_damaged(path: Path) -> bool:
    """Whether a coverage data file is no intact SQLite database with coverage's tables."""
    try:
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database:
            database.execute("select numbits from line_bits").fetchall()
            return database.execute("pragma integrity_check").fetchone() != ("ok",)
    except sqlite3.Error:
        return True


def remove_damaged(folder: Path) -> list[str]:
    """Removes damaged data files, which would end the report of all others; returns their names.

    Tests kill processes at any moment, and coverage writes without a journal.
    """
    damaged = [path for path in folder.glob(".coverage.*") if is_damaged(path)]
    for path in damaged:
        path.unlink()
    return [path.name for path in damaged]

"""Atomic replacement of files: links, permissions, devices and pipes."""

from __future__ import annotations

import os
import threading
from pathlib import Path

from moe_train.utils.atomic_io import replace_text


def test_the_target_of_a_link_is_replaced_and_permissions_stay(tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_text("old")
    target.chmod(0o600)
    link.symlink_to(target)
    replace_text(link, "new")
    assert link.is_symlink() and target.read_text() == "new" and target.stat().st_mode & 0o777 == 0o600
    (tmp_path / "dangling").symlink_to(tmp_path / "made")
    replace_text(tmp_path / "dangling", "new")
    assert (tmp_path / "made").read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dangling", "link", "made", "target"]


def test_a_pipe_is_written_to(tmp_path: Path) -> None:
    pipe, read = tmp_path / "pipe", list[str]()
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()), daemon=True)
    reader.start()
    replace_text(pipe, "new")
    reader.join(10)
    assert read == ["new"] and pipe.is_fifo()

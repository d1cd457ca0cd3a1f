"""Another user of this host, who knows a job's folder, processes, ports and key names, and tries to get in.

Reads the facts from standard input as JSON, imports what it needs, becomes nobody, tries, and prints a JSON list of
what it could do.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch.distributed as dist

NOBODY = 65534
KEYS = ("devices/0", "status/0", "status_0", "diagnosis", "failure", "shown", "default_pg/0//cpu//0/rank_0")
PATIENCE = timedelta(seconds=1)


def main() -> None:
    """See the module."""
    facts = json.load(sys.stdin)
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    at_ports = {port: os.fork() or _ask_store(port) for port in facts["ports"]}
    done = [name for name, act in attempts(facts) if _succeeds(act)]
    print(json.dumps(done + _answered(at_ports)))


def _succeeds(act: Callable[[], Any]) -> bool:
    try:
        act()
    except (OSError, RuntimeError):  # torch's errors of stores are RuntimeErrors
        return False
    return True


def attempts(facts: dict[str, Any]) -> Iterator[tuple[str, Callable[[], Any]]]:
    """What it tries, by name."""
    folder = Path(facts["folder"])
    yield "list the folder", lambda: os.listdir(folder)
    yield "open the folder to others", lambda: folder.chmod(0o777)
    yield "move the folder", lambda: folder.rename(folder.with_name("moved"))
    for name in (*facts["files"], "diagnosis", "forged"):
        yield f"read {name}", (folder / name).read_bytes
        yield f"write {name}", lambda name=name: (folder / name).write_text("{}")
        yield f"remove {name}", (folder / name).unlink
    for key in KEYS:
        yield f"read {key} of the file store", lambda key=key: _file_store(folder).get(key)
        yield f"set {key} of the file store", lambda key=key: _file_store(folder).set(key, "{}")
    for path in facts["unix"]:
        yield f"connect to {path}", lambda path=path: _connect(path)
    for pid in facts["pids"]:
        yield f"signal {pid}", lambda pid=pid: os.kill(pid, signal.SIGTERM)
        for part in ("environ", "mem", "maps"):
            yield f"read {part} of {pid}", lambda pid=pid, part=part: os.open(f"/proc/{pid}/{part}", 0)
        yield f"look at the files of {pid}", lambda pid=pid: os.listdir(f"/proc/{pid}/fd")
    for path in facts["shared"]:
        yield f"read {path}", Path(path).read_bytes


def _file_store(folder: Path) -> dist.Store:
    store = dist.FileStore(str(folder / "rendezvous"), 2)
    store.set_timeout(timedelta(milliseconds=50))
    return store


def _ask_store(port: int) -> NoReturn:
    """In a process of its own: torch's client waits without end for an answer that is none of a store's."""

    def ask() -> None:
        store = dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False, timeout=PATIENCE)
        store.list_keys()
        store.set("diagnosis", "{}")

    os._exit(0 if _succeeds(ask) else 1)


def _answered(at_ports: dict[int, int]) -> list[str]:
    time.sleep(PATIENCE.total_seconds())
    for child in at_ports.values():
        os.kill(child, signal.SIGKILL)
    codes = {port: os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for port, child in at_ports.items()}
    return [f"read and set keys at port {port}" for port, code in codes.items() if code == 0]


def _connect(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as client:
        client.connect("\0" + path[1:] if path.startswith("@") else path)


def listening(pids: list[int]) -> list[tuple[str, int]]:
    """Address and port of every listening socket of these processes, read from the kernel's tables."""
    own = {os.readlink(link) for pid in pids for link in _links(pid)}
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *_, inode = line.split()[:10]
            if state == "0A" and f"socket:[{inode}]" in own:
                address, port = local.split(":")
                words = [bytes.fromhex(address[at : at + 8])[::-1] for at in range(0, len(address), 8)]
                family = socket.AF_INET if table == "tcp" else socket.AF_INET6
                found.append((socket.inet_ntop(family, b"".join(words)), int(port, 16)))
    return found


def unix_sockets(pids: list[int]) -> list[str]:
    """Names of these processes' listening Unix sockets."""
    own = {os.readlink(link) for pid in pids for link in _links(pid)}
    rows = (line.split() for line in Path("/proc/net/unix").read_text().splitlines()[1:])
    return [row[7] for row in rows if len(row) > 7 and f"socket:[{row[6]}]" in own]


def shared_memory(pids: list[int]) -> list[str]:
    """Files under /dev/shm that these processes have open or mapped."""
    lines = [line for pid in pids for line in Path(f"/proc/{pid}/maps").read_text().splitlines()]
    paths = {word for line in lines for word in line.split()[5:] if word.startswith("/dev/shm/")}
    return sorted(path for path in paths if os.path.exists(path) and stat.S_ISREG(os.stat(path).st_mode))


def _links(pid: int) -> Iterator[Path]:
    for link in Path(f"/proc/{pid}/fd").iterdir():
        if os.path.lexists(link):
            yield link


if __name__ == "__main__":
    main()

"""Starts processes of moe_train by forking one that has imported torch, fairseq and the package already.

These imports take four to five CPU seconds a process. While :class:`WarmStart` is enabled, ``subprocess.Popen`` of
``[sys.executable, "-m", MODULE, …]`` with a MODULE of ``FORKED``, of ``[sys.executable, "-c", PROGRAM, …]``, and a
process of multiprocessing's method "spawn", is a fork: a child of the caller with the arguments, environment, working
directory, streams, session, signal mask and exit code that it would have had. The processes that it starts in these
ways are forks too.

A process starts a new interpreter, as without this file, where something differs that only the start of an interpreter
reads: environment variables of ``FIXED``, resource limits, the user, the processors; and with ``preexec_fn``,
``pass_fds`` and the like.

Tests marked ``warm_start`` use it; ``MOE_TRAIN_TESTS_WARM=1`` is for all tests, ``=0`` for none. Do not mark a test
that is about the start itself or about the tree of processes: what is imported and when, hash seeds, command lines in
/proc, the children of a command (a forked command has a further child, which forks for it), streams that are closed
from the start. At least one test of each command keeps a new interpreter.
"""

from __future__ import annotations

import atexit
import ctypes
import fcntl
import gc
import importlib
import inspect
import io
import json
import multiprocessing.util
import os
import posix
import resource
import runpy
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

ROOT = Path(__file__).resolve().parents[1]
PRELOADED = (
    *("torch.distributed.run", "torch.distributed.checkpoint", "torch.utils.tensorboard", "moe_train.launch.worker"),
    *("torch._dynamo", "safetensors.torch"),  # imported by the first step of an optimizer: a CPU second
    *("moe_train.commands._training", "moe_train.commands._scoring", "moe_train.evaluation.translator"),
    *("hydra.main", "hydra_plugins.hydra_optuna_sweeper.optuna_sweeper", "hydra_plugins.hydra_moe_train.launchers"),
    *("hydra_plugins.hydra_joblib_launcher._core", "hydra_plugins.hydra_submitit_launcher.submitit_launcher"),
)
FORKED = tuple(
    f"moe_train.{name}"
    for name in (
        *("launch.worker", "commands.train", "commands.evaluate", "commands.translate", "commands.export"),
        *("commands.bench", "commands.fairseq", "commands.plan"),
    )
)  # other commands do without torch, or are quick to start
FIXED = ("PYTHON", "LC_", "LANG", "LD_", "OMP_", "MKL_", "OPENBLAS_", "KMP_", "MALLOC_", "CUDA_", "COVERAGE", "COV_")
CUDA_DEVICES = "CUDA_VISIBLE_DEVICES"  # read when CUDA is first used, which an import does not
_LIMITS = (resource.RLIMIT_FSIZE, resource.RLIMIT_NOFILE, resource.RLIMIT_AS, resource.RLIMIT_DATA)
_SUBREAPER, _PARENT_DEATH = 36, 1
_LENGTH = struct.Struct("i")


class WarmStart:
    """Patches ``subprocess.Popen`` and multiprocessing; the process that forks starts at the first use."""

    def __init__(self, server: socket.socket | None = None) -> None:
        self.enabled = False
        self._server = server
        self._lock = threading.Lock()
        self._cold = subprocess.Popen._execute_child  # type: ignore[attr-defined]
        self._signature = inspect.signature(self._cold)
        self._environment: dict[str, str] = {}
        self._facts: list[Any] = []

    def install(self) -> None:
        """Patches both. The environment of this moment is that of the forking process."""
        self._environment = dict(os.environ)
        self._facts = _facts(self._environment)
        self._spawn_cold = multiprocessing.util.spawnv_passfds
        multiprocessing.util.spawnv_passfds = self._spawn
        subprocess.Popen._execute_child = lambda *arguments: self._start(*arguments)  # noqa: PLW0108 - called as a method # type: ignore[attr-defined]

    def _start(self, *arguments: Any) -> None:
        given = self._signature.bind(*arguments).arguments
        if not (self.enabled and self._can_fork(given)):
            self._cold(*arguments)
            return
        process, environment = given["self"], given["env"] if given["env"] is not None else os.environ
        words = [os.fsdecode(word) for word in given["args"]]
        sys.audit("subprocess.Popen", words[0], words, given["cwd"], given["env"])
        streams = [given["p2cread"], given["c2pwrite"], given["errwrite"]]
        streams = [own if own >= 0 else place for place, own in enumerate(streams)]
        process.pid = self._ask(words, environment, given["cwd"], given["start_new_session"], streams, [])
        process._child_created = True
        process._close_pipe_fds(*(given[name] for name in _PIPES))

    def _can_fork(self, given: dict[str, Any]) -> bool:
        words, environment = given["args"], given["env"] if given["env"] is not None else os.environ
        usual = not any(given[name] for name in ("preexec_fn", "pass_fds", "shell", "gid", "gids", "uid"))
        usual = usual and given["gid"] is None and given["uid"] is None and given["umask"] < 0
        usual = usual and given["close_fds"] and given["process_group"] == -1
        usual = usual and given["executable"] in (None, sys.executable) and isinstance(words, list | tuple)
        texts = [os.fsdecode(word) for word in words] if usual else []
        if not texts or not (_module(texts) or _code(texts)):
            return False
        folder = os.fsdecode(given["cwd"] or os.getcwd())
        return os.path.isdir(folder) and _facts(environment) == self._facts

    def _spawn(self, path: bytes, words: Sequence[Any], descriptors: Sequence[int]) -> int:
        texts = [os.fsdecode(word) for word in words]
        if not (self.enabled and _code(texts).startswith(_SPAWNED) and _facts(os.environ) == self._facts):
            return self._spawn_cold(path, words, descriptors)
        sys.audit("os.posix_spawn", path, words, None)
        return self._ask(texts, os.environ, None, False, [0, 1, 2], [int(number) for number in descriptors])

    def _ask(
        self, words: list[str], environment: Any, cwd: Any, session: bool, streams: list[int], kept: list[int]
    ) -> int:
        """The process number of a fork. ``streams`` become its 0, 1 and 2; ``kept`` have the same numbers there."""
        request = {
            "words": words,
            "environment": {os.fsdecode(name): os.fsdecode(value) for name, value in environment.items()},
            "cwd": os.path.abspath(os.fsdecode(cwd or os.getcwd())),
            "session": session,
            "blocked": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, ())),
            "places": [0, 1, 2, *kept],
        }
        content = json.dumps(request).encode()
        with self._lock:
            if self._server is None:
                self._server = _start_server(self._environment)
            # The fork's parent ends at once, and a fork without a parent becomes ours.
            _prctl(_SUBREAPER, 1)
            try:
                socket.send_fds(self._server, [_LENGTH.pack(len(content))], [*streams, *kept])
                self._server.sendall(content)
                return int(_LENGTH.unpack(_exactly(self._server, _LENGTH.size))[0])
            finally:
                _prctl(_SUBREAPER, 0)


_SPAWNED = "from multiprocessing.spawn import"  # how a program of multiprocessing's method "spawn" begins
_PIPES = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")


def _module(words: list[str]) -> str:
    """The module that a command runs if it is one of those that may be forked, or nothing."""
    options = words[1:] if words[1:2] != ["-u"] else words[2:]
    if words[0] != sys.executable or options[:1] != ["-m"] or len(options) < 2:
        return ""
    module = options[1]
    return module if module == "torch.distributed.run" or module in FORKED else ""


def _code(words: list[str]) -> str:
    """The program of ``python -c``, or nothing; multiprocessing's may have any options before it."""
    place = words.index("-c") if "-c" in words[:-1] else 0
    code = words[place + 1] if place and words[0] == sys.executable else ""
    return code if code.startswith(_SPAWNED) or words[1:place] in ([], ["-u"]) else ""


def _starts_none(words: list[str]) -> bool:
    """Whether a process starts no process of ours."""
    return _module(words) == "moe_train.launch.worker" or _code(words).startswith(_SPAWNED)


def _facts(environment: Any) -> list[Any]:
    """What the start of an interpreter reads and a fork could not change."""
    names = {os.fsdecode(name): os.fsdecode(value) for name, value in environment.items()}
    fixed = {name: value for name, value in names.items() if name.startswith(FIXED) and name != CUDA_DEVICES}
    return [fixed, *map(resource.getrlimit, _LIMITS), os.getresuid(), os.getresgid(), os.sched_getaffinity(0)]


def _prctl(option: int, value: int) -> None:
    ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


def _exactly(stream: socket.socket, size: int) -> bytes:
    content = b""
    while len(content) < size:
        more = stream.recv(size - len(content))
        if not more:
            raise EOFError("the process that forks has ended")
        content += more
    return content


def _start_server(environment: dict[str, str]) -> socket.socket:
    ours, theirs = socket.socketpair()
    program = f"from tests.warm_process import main; main({theirs.fileno()})"
    subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        pass_fds=[theirs.fileno()],
    )
    theirs.close()
    return ours


def main(descriptor: int) -> None:
    """Imports everything, then forks for whoever holds the other end of the socket until that is closed."""
    for name in PRELOADED:
        importlib.import_module(name)
    if len(os.listdir("/proc/self/task")) != 1:
        raise RuntimeError(f"an import has started threads: {threading.enumerate()}; a fork would lack them")
    gc.collect()
    gc.freeze()
    _run(*_serve(socket.socket(fileno=descriptor)))


def _serve(requests: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """Forks at each request. Returns in the forks, with the request and the descriptors for their streams."""
    stopping = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    while True:
        head, descriptors, *_ = socket.recv_fds(requests, _LENGTH.size, 16)
        if not head:
            posix._exit(0)  # coverage would save what each of us has seen at os._exit
        request = json.loads(_exactly(requests, _LENGTH.unpack(head)[0]))
        middle = os.fork()
        if middle == 0:
            middle = os.getpid()
            if os.fork():
                posix._exit(0)
            while os.getppid() == middle:
                pass
            for number, handler in stopping.items():
                signal.signal(number, handler)
            requests.sendall(_LENGTH.pack(os.getpid()))
            requests.close()
            return request, descriptors
        os.waitpid(middle, 0)
        for descriptor in descriptors:
            os.close(descriptor)


def _run(request: dict[str, Any], descriptors: list[int]) -> None:
    """Becomes the process that was asked for and does its work."""
    if request["session"]:
        os.setsid()
    words: list[str] = request["words"]
    module, code = _module(words), _code(words)
    if not _starts_none(words):
        ours, theirs = socket.socketpair()
        parent = os.getpid()
        if os.fork() == 0:
            _prctl(_PARENT_DEATH, signal.SIGKILL)
            if os.getppid() != parent:
                posix._exit(0)
            ours.close()
            for descriptor in descriptors:
                os.close(descriptor)
            return _run(*_serve(theirs))
        theirs.close()
        warm = WarmStart(socket.socket(fileno=_moved(ours.detach())))
    moved = [_moved(descriptor) for descriptor in descriptors]
    for place, descriptor in zip(request["places"], moved, strict=True):
        os.dup2(descriptor, place)
        os.close(descriptor)
    _renew_streams(unbuffered="-u" in words[:2])
    os.environ.clear()
    os.environ.update(request["environment"])
    if not _starts_none(words):
        warm.enabled = True
        warm.install()
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "20000")  # as importing moe_train does
    os.chdir(request["cwd"])
    sys.path[0] = "" if code else request["cwd"]
    sys.orig_argv[:] = words
    _seed()
    signal.pthread_sigmask(signal.SIG_SETMASK, request["blocked"])
    try:
        if code:
            sys.argv[:] = words[words.index("-c") :]
            del sys.argv[1]
            exec(code, sys.modules["__main__"].__dict__)  # as ``python -c`` does
        else:
            sys.modules.pop(module, None)
            sys.argv[:] = ["-m", *words[words.index("-m") + 2 :]]
            cast(Any, runpy)._run_module_as_main(module)  # what ``python -m`` does
    except SystemExit as left:
        if not isinstance(left.code, int | None):
            raise
        _end(left.code or 0)
        raise
    _end(0)


def _end(code: int) -> None:
    """Leaves as an interpreter does, without taking its modules apart: half a CPU second after what is preloaded.

    Returns, and the interpreter then does that, where a stream cannot be written.
    """
    cast(Any, threading)._shutdown()
    cast(Any, atexit)._run_exitfuncs()
    with suppress(OSError, ValueError):
        for stream in filter(None, (sys.stdout, sys.stderr)):
            stream.flush()
        posix._exit(code & 255)


def _moved(descriptor: int) -> int:
    """The same file at a number that nobody asks for."""
    high = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 500)
    os.close(descriptor)
    return high


def _renew_streams(unbuffered: bool) -> None:
    for place, name in enumerate(("stdin", "stdout", "stderr")):
        before: io.TextIOWrapper = getattr(sys, name)
        raw = open(place, "wb" if place else "rb", buffering=-1, closefd=False)  # noqa: SIM115
        lines = place == 2 or (place == 1 and os.isatty(1))
        stream = io.TextIOWrapper(
            raw, before.encoding, before.errors, line_buffering=lines, write_through=unbuffered and bool(place)
        )
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def _seed() -> None:
    """numpy's own generator, which a fork would share with its siblings; Python's and torch's do as in any process."""
    import numpy as np

    np.random.seed()  # noqa: NPY002 - the legacy generator is the one that a fork copies

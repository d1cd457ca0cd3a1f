"""What all tests share: a quiet environment, hypothesis settings, and where the optional data lies."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Generator, Iterator
from pathlib import Path

import hypothesis
import pytest

from moe_train.data.folder import DataFolder
from tests.coverage_files import remove_damaged
from tests.distributed.world import Worlds
from tests.process_guard import ProcessGuard
from tests.required import is_required, skip_or_fail
from tests.warm_process import WarmStart

ROOT = Path(__file__).resolve().parents[1]

hypothesis.settings.register_profile("moe_train", deadline=None, max_examples=50, derandomize=True, print_blob=True)
hypothesis.settings.register_profile("search", deadline=None, max_examples=1000, print_blob=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "moe_train"))

if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # triton reads it when it is imported

GUARD = ProcessGuard()
WARM = WarmStart()


def pytest_configure() -> None:
    """Ctrl-C is tested: a shell's background job ignores it, and processes that tests start would inherit that."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    GUARD.install()


@pytest.hookimpl(trylast=True)  # coverage has set its variables by then
def pytest_sessionstart() -> None:
    WARM.install()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None, object, object]:
    result = yield
    GUARD.check()
    return result


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_teardown() -> None:
    GUARD.end()  # what ends with this test may belong to others


@pytest.hookimpl(wrapper=True, trylast=True)  # ends before pytest-cov's, which then combines the files
def pytest_runtestloop(session: pytest.Session) -> Generator[None, object, object]:
    result = yield
    if not hasattr(session.config, "workerinput") and session.config.pluginmanager.hasplugin("_cov"):
        for name in remove_damaged(ROOT):
            print(f"\ncoverage: {name} is damaged and left out: its process was killed while it wrote")
    return result


# Files of 20 seconds or more, longest first: one begun last would keep a worker busy while the other idles. Those that
# mostly wait (Slurm, the watchdog) come early, so that they have the other worker's computing beside them.
LONGEST = (
    "test_mutated_inputs.py",
    "slurm/test_train.py",
    "training/test_deepspeed.py",
    "commands/test_train.py",
    "launch/watchdog/test_watchdog.py",
    "training/test_parity.py",
    "test_code_style.py",
    "test_fairseq_compat.py",
    "evaluation/test_evaluate_split.py",
    "test_fairseq_checkpoints.py",
    "commands/test_sweeps.py",
    "tasks/test_lm.py",
    "test_plugins.py",
    "evaluation/test_variants.py",
    "training/test_resume_layouts.py",
    "test_docs.py",
    "kernels/cpu/test_grad_pool.py",
    "launch/test_local.py",
    "slurm/test_sweeps.py",
    "training/test_capacity_groups.py",
    "training/test_parity_engines.py",
    "training/test_exact_resume.py",
    "training/test_asynchronous.py",
    "commands/test_translate.py",
    "test_fine_tuning.py",
)


def _may_fork(item: pytest.Item) -> bool:
    """Whether the test's processes are forked (tests/warm_process.py), which must have no threads of OpenBLAS."""
    marker = item.get_closest_marker("warm_start")
    wanted = os.environ.get("MOE_TRAIN_TESTS_WARM", str(int(marker is not None and marker.args != (False,))))
    return wanted == "1" and os.environ.get("OMP_NUM_THREADS") == "1"


def _turn(item: pytest.Item) -> int:
    """When a test's file is begun: the longest in their order, then all others in pytest's."""
    file = item.path.relative_to(ROOT / "tests").as_posix()
    return LONGEST.index(file) if file in LONGEST else len(LONGEST)


MARKERS = ("gpu", "slurm", "network", "root")


def _absent(marker: str) -> str | None:
    """Why tests with ``marker`` cannot run here."""
    if marker == "gpu":
        import torch

        return None if torch.cuda.is_available() else "needs an accelerator"
    if marker == "slurm":
        return None if shutil.which("slurmctld") else "needs Slurm (apt-get install slurm-wlm munge)"
    if marker == "network":
        return None if os.geteuid() == 0 and shutil.which("ip") else "needs root and the command ip (iproute2)"
    if marker == "root":
        return None if os.geteuid() == 0 else "needs root, which can become another user"
    return None


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=_turn)
    for item in items:
        if "worlds" in getattr(item, "fixturenames", ()) or any(map(item.get_closest_marker, ("slurm", "network"))):
            item.add_marker("processes")
    for marker in MARKERS:
        marked = [item for item in items if item.get_closest_marker(marker)]
        if marked and not is_required(marker) and (reason := _absent(marker)):
            for item in marked:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    GUARD.begin(item)
    WARM.enabled = _may_fork(item)
    for marker in MARKERS:
        if item.get_closest_marker(marker) and is_required(marker) and (reason := _absent(marker)):
            skip_or_fail(marker, reason)


@pytest.fixture(autouse=True)
def _outside_any_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """A torchrun or Slurm step around the tests must not make them ranks of it."""
    for name in (
        "RANK",
        "LOCAL_RANK",
        "WORLD_SIZE",
        "LOCAL_WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
        "SLURM_PROCID",
        "SLURM_STEP_NUM_TASKS",
        "SUBMITIT_EXECUTOR",
        "MOE_TRAIN_SECRET",
    ):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture
def shared() -> Path:
    """Optional data beside the checkout; tests that need it are skipped where it is absent."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip(f"needs the data folder {folder}")
    return folder


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> DataFolder:
    """A prepared data folder, not to be written to: en-de, en-fr, en-ja both ways, 200 training pairs each."""
    from tests.data.tiny_corpus import prepare_tiny

    return prepare_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def worlds() -> Iterator[Worlds]:
    """``worlds(4).run(function, …)`` calls a function on 4 gloo ranks; the processes live for the whole session."""
    started = Worlds()
    yield started
    started.close()

"""The thread pool: the same results, balanced parts, torch's settings unchanged."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_train.experts import ExpertPool, ExpertSpec
from moe_train.kernels.cpu import thread_pool
from moe_train.routing import Assignment


@pytest.fixture
def two_threads() -> object:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@given(st.lists(st.integers(0, 50), min_size=1, max_size=40), st.integers(1, 6))
def test_largest_load_is_within_one_expert_of_even(rows: list[int], parts: int) -> None:
    busy = sorted((e for e, count in enumerate(rows) if count), key=lambda e: -rows[e])
    largest = thread_pool.largest_load(busy, rows, parts)
    assert sum(rows) / parts <= largest <= sum(rows) / parts + max(rows)


@pytest.mark.parametrize(("rows", "threaded"), [([9, 0, 5, 7, 8], True), ([90, 0, 5], False), ([4], False), ([], 0)])
def test_every_expert_with_rows_is_taken_once_largest_first(
    two_threads: None, monkeypatch: pytest.MonkeyPatch, rows: list[int], threaded: bool
) -> None:
    monkeypatch.setattr(thread_pool, "_MIN_PARALLEL_FLOPS", 0.0)
    parts: list[list[int]] = []
    thread_pool.parallel_for(lambda experts: parts.append(list(experts)), rows, 1.0)
    assert len(parts) == (2 if threaded else 1)
    assert sorted(e for part in parts for e in part) == [e for e, count in enumerate(rows) if count]
    assert all([rows[e] for e in part] == sorted((rows[e] for e in part), reverse=True) for part in parts)


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_no_thread_continues_after_an_error(
    two_threads: None, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    """Else threads would write to memory that the caller has let go of."""
    monkeypatch.setattr(thread_pool, "_MIN_PARALLEL_FLOPS", 0.0)
    done: list[int] = []

    def work(experts: Iterable[int]) -> None:
        for e in experts:
            if e == 0 and error is MemoryError:
                raise error
            if e == 0:
                time.sleep(0.2)  # until the caller waits: a signal just before that is noticed when all is done
                signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            time.sleep(0.05)
            done.append(e)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(error):
            thread_pool.parallel_for(work, [9] * 40, 1.0)
    finally:
        signal.signal(signal.SIGINT, before)
    taken = len(done)
    time.sleep(0.2)
    assert len(done) == taken < 40


ASLEEP = """
import os, time, torch
from moe_train.kernels.cpu import thread_pool
torch.set_num_threads(2)

def spent_asleep():
    torch.zeros(1 << 20).add_(1)
    before = time.process_time()
    time.sleep(0.1)
    return time.process_time() - before

awake = max(spent_asleep() for _ in range(3))
thread_pool._MIN_PARALLEL_FLOPS = 0.0
thread_pool.parallel_for(list, [5, 5], 1.0)
print(awake, min(spent_asleep() for _ in range(3)))
"""


@pytest.mark.processes
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores, for two threads to wait awake")
def test_openmp_threads_do_not_block_the_pool() -> None:
    """After a loop its threads wait awake, unless there are more of them than cores: measured as time on cores."""
    command = ["taskset", "-c", ",".join(map(str, sorted(os.sched_getaffinity(0))[:2])), sys.executable, "-c", ASLEEP]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_", "KMP_"))}
    text = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    awake, asleep = map(float, text.split())
    if awake < 0.001:
        pytest.skip("this OpenMP does not wait awake")
    assert asleep < 0.3 * awake


def outcome(seed: int = 0) -> list[torch.Tensor]:
    torch.manual_seed(seed)
    pool = ExpertPool(ExpertSpec(dim=32, hidden=64, dropout=0.2), 8)
    x = torch.randn(400, 32, requires_grad=True)
    token = torch.arange(400).repeat_interleave(2)
    pairs = Assignment(token, torch.randint(8, (800,)), torch.rand(800, requires_grad=True))
    y = pool(x, pairs)
    return [y, *torch.autograd.grad(y.square().sum(), [x, pairs.weight, *pool.parameters()])]


def test_threads_change_no_result(two_threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    executor = thread_pool._executor
    monkeypatch.setattr(thread_pool, "_executor", lambda n: calls.append(n) or executor(n))
    monkeypatch.setattr(thread_pool, "_MIN_PARALLEL_FLOPS", 0.0)
    with_threads = outcome()
    assert 2 in calls, "the test must use threads"
    monkeypatch.setattr(thread_pool, "_MIN_PARALLEL_FLOPS", float("inf"))
    for ours, alone in zip(with_threads, outcome(), strict=True):
        torch.testing.assert_close(ours, alone, rtol=1e-5, atol=1e-6)
    assert torch.get_num_threads() == 2


def test_inference_mode_reaches_the_threads(two_threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thread_pool, "_MIN_PARALLEL_FLOPS", 0.0)
    pool = ExpertPool(ExpertSpec(dim=8, hidden=16), 4)
    token = torch.arange(20)
    pairs = Assignment(token, token % 4, torch.ones(20))
    x = torch.randn(20, 8)
    with torch.inference_mode():
        assert torch.allclose(pool(x, pairs), pool(x, pairs))


def test_an_error_in_a_part_is_raised(two_threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thread_pool, "_MIN_PARALLEL_FLOPS", 0.0)

    def fail(part: object) -> None:
        raise ArithmeticError("of a part")

    with pytest.raises(ArithmeticError, match="of a part"):
        thread_pool.parallel_for(fail, [5, 5], 1.0)


@pytest.mark.processes
def test_a_forked_process_starts_threads_of_its_own(two_threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thread_pool, "_MIN_PARALLEL_FLOPS", 0.0)
    seen: list[int] = []
    thread_pool.parallel_for(seen.extend, [5, 5], 1.0)
    child = os.fork()
    if child == 0:  # with the parent's threads it would wait for ever
        done: list[int] = []
        thread_pool.parallel_for(done.extend, [5, 5], 1.0)
        os._exit(0 if sorted(done) == [0, 1] else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0

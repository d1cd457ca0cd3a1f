"""Memory of freed gradients: used again for the same size, never while anybody has it, given up for other sizes."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from moe_train.experts import ExpertPool, ExpertSpec
from moe_train.kernels.cpu import grad_pool
from moe_train.routing.types import Assignment

LARGE = torch.zeros(1024, 2048)  # 8 MiB
LARGER = torch.zeros(1025, 2048)


@pytest.fixture(autouse=True)
def memory(monkeypatch: pytest.MonkeyPatch) -> grad_pool._Memory:
    """One of the test's own."""
    own = grad_pool._Memory()
    monkeypatch.setattr(grad_pool, "_memory", lambda: own)
    return own


def waiting(memory: grad_pool._Memory) -> dict[int, int]:
    """How many mappings wait, by size."""
    gc.collect()
    return {size: len(mappings) for size, mappings in memory.free.items() if mappings}


def test_freed_memory_is_reused(memory: grad_pool._Memory) -> None:
    first = grad_pool.gradient_like(LARGE)
    first.fill_(1)
    place, part = first.data_ptr(), first[3:]
    del first
    second = grad_pool.gradient_like(LARGE)
    assert second.data_ptr() != place and (part == 1).all()
    del part
    assert waiting(memory) == {8 << 20: 1}
    third = grad_pool.gradient_like(LARGE)
    assert third.data_ptr() == place and third.shape == LARGE.shape and waiting(memory) == {}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_gradient_has_shape_and_dtype_of_the_weight(dtype: torch.dtype) -> None:
    weight = torch.zeros(2, 2100, 1024, dtype=dtype)
    gradient = grad_pool.gradient_like(weight)
    assert gradient.shape == weight.shape and gradient.dtype == dtype and gradient.is_contiguous()
    assert gradient.data_ptr() % 64 == 0


def test_sizes_in_turn_wait_for_each_other(memory: grad_pool._Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where gradients are converted and freed at once."""
    made: list[int] = []
    new = memory._new
    monkeypatch.setattr(memory, "_new", lambda size: made.append(size) or new(size))
    for _ in range(5):
        for like in (LARGE, LARGER):
            grad_pool.gradient_like(like)
            gc.collect()
    assert len(made) == 2


def test_what_waits_for_long_is_given_up(memory: grad_pool._Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was an earlier model's."""
    monkeypatch.setattr(grad_pool, "_MAX_IDLE_ACQUISITIONS", 3)
    early = grad_pool.gradient_like(LARGE)
    kept = grad_pool.gradient_like(LARGE)
    kept.fill_(3)
    del early
    for _ in range(4):
        assert waiting(memory)[8 << 20] == 1
        grad_pool.gradient_like(LARGER)
    later = grad_pool.gradient_like(LARGER)
    later.fill_(4)
    assert 8 << 20 not in waiting(memory) and (kept == 3).all()


def test_not_used_under_a_dispatch_mode(memory: grad_pool._Memory) -> None:
    with FlopCounterMode(display=False):
        grad_pool.gradient_like(LARGE)
    assert memory.free == {} and memory.acquisitions == 0


def test_small_gradients_and_other_devices_use_torch(memory: grad_pool._Memory) -> None:
    assert grad_pool.gradient_like(torch.zeros(3, 4)).shape == (3, 4)
    assert grad_pool.gradient_like(LARGE.to("meta")).device.type == "meta"
    assert memory.free == {}


@pytest.mark.parametrize("tokens", [6, 7], ids=["equal loads", "unequal loads"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_stand_in_it_and_come_back(
    tokens: int, dtype: torch.dtype, memory: grad_pool._Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """autograd takes the tensor as it is, accumulates onto it, and freeing gradients returns it."""
    made: list[int] = []
    new = memory._new
    monkeypatch.setattr(memory, "_new", lambda size: made.append(size) or new(size))
    pool = ExpertPool(ExpertSpec(dim=1024, hidden=2048, bias=False), 2).to(dtype)
    x, once = torch.randn(tokens, 1024).to(dtype), torch.arange(tokens)
    pairs = Assignment(once, once % 2, torch.ones(tokens))
    for _ in range(3):
        pool(x, pairs).sum().backward()
        first = [gradient.clone() for gradient in _gradients(pool)]
        pool(x, pairs).sum().backward()
        for gradient, single in zip(_gradients(pool), first, strict=True):
            torch.testing.assert_close(gradient, 2 * single)
        del gradient
        pool.zero_grad(set_to_none=True)
    size = 2 * 1024 * 2048 * dtype.itemsize
    assert set(made) == {size} and len(made) <= 4 and waiting(memory) == {size: len(made)}


def _gradients(module: nn.Module) -> list[Tensor]:
    return [parameter.grad for parameter in module.parameters() if parameter.grad is not None]


def test_freed_by_any_thread(memory: grad_pool._Memory) -> None:
    held = [[grad_pool.gradient_like(LARGE)] for _ in range(4)]
    threads = [threading.Thread(target=one.clear) for one in held]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert waiting(memory) == {8 << 20: 4}


@pytest.mark.processes
def test_a_process_ends_with_gradients_in_use() -> None:
    code = (
        "import torch\nfrom moe_train.kernels.cpu.grad_pool import gradient_like\n"
        "w = torch.nn.Parameter(torch.zeros(1024, 2048)); w.grad = gradient_like(w); w.grad.fill_(1)\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.returncode == 0 and not ended.stderr

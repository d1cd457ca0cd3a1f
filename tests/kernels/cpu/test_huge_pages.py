"""Large buffers ask for huge pages; small ones, and other devices, are what torch makes of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from moe_train.kernels.cpu import huge_pages


def flags(buffer: Tensor) -> set[str]:
    """The flags that Linux reports for the mapping that contains the middle of a buffer."""
    middle, here = buffer.data_ptr() + buffer.numel() * buffer.element_size() // 2, False
    for line in Path("/proc/self/smaps").read_text(encoding="ascii", errors="replace").splitlines():
        word, _, rest = line.partition(" ")
        if "-" in word and not word.endswith(":"):
            begin, _, end = word.partition("-")
            here = int(begin, 16) <= middle < int(end, 16)
        elif here and word == "VmFlags:":
            return set(rest.split())
    raise AssertionError("the buffer is in no mapping")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_buffers_stand_in_huge_pages(dtype: torch.dtype) -> None:
    if huge_pages._madvise() is None:
        pytest.skip("this kernel lends no huge pages (/sys/kernel/mm/transparent_hugepage/enabled)")
    like = torch.zeros(1, dtype=dtype)
    buffer = huge_pages.empty((48 << 20,), like)  # too large for the heap: a separate mapping
    assert "hg" in flags(buffer) and buffer.dtype == dtype and buffer.shape == (48 << 20,)
    assert "hg" not in flags(torch.empty(48 << 20, dtype=dtype))


def test_small_buffers_and_other_devices_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def never() -> None:
        raise AssertionError("nothing is to be asked")

    monkeypatch.setattr(huge_pages, "_madvise", never)
    assert huge_pages.empty((3, 5), torch.zeros(1, dtype=torch.int64)).dtype == torch.int64
    assert huge_pages.empty_like(torch.zeros(1 << 28, device="meta")).device.type == "meta"


def test_without_huge_pages_the_buffer_is_there_all_the_same(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    switch = tmp_path / "enabled"
    switch.write_text("always madvise [never]\n", encoding="ascii")
    for path in (switch, tmp_path / "absent"):
        monkeypatch.setattr(huge_pages, "_SWITCH", path)
        huge_pages._madvise.cache_clear()
        assert huge_pages._madvise() is None
        assert huge_pages.empty_like(torch.zeros(4 << 20)).shape == (4 << 20,)
    huge_pages._madvise.cache_clear()

"""How many files and collectives a token passes, from MoELayer's forward to its output, with experts on two ranks."""

from __future__ import annotations

import pytest
import torch

from tests.distributed.world import Worlds
from tests.parallel.token_path import token_path


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 25), (torch.bfloat16, 25)], ids=str)
def test_a_token_passes_few_files_and_all_to_alls(dtype: torch.dtype, most: int, worlds: Worlds) -> None:
    """The files of ``kernels=`` included, and in bf16 a kernel of the gate beside those of experts and sums of rows."""
    found = worlds(2).run(token_path, dtype)[0]
    inside = [file for file in found.files if file.startswith(("parallel/", "experts/"))]
    assert len(inside) <= 10, inside
    assert len(found.files) <= most, found.files
    assert found.forward <= 4 and found.backward <= 3, found

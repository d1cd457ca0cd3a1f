"""How many files and collectives a token passes, from MoELayer's forward to its output, with experts on two ranks."""

from __future__ import annotations

import pytest
import torch

from tests.distributed.world import Worlds
from tests.parallel.token_path import token_path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_token_passes_few_files_and_all_to_alls(dtype: torch.dtype, worlds: Worlds) -> None:
    found = worlds(2).run(token_path, dtype)[0]
    inside = [file for file in found.files if file.startswith(("parallel/", "experts/"))]
    assert len(inside) <= 10, inside
    assert len(found.files) <= 22, found.files
    assert found.forward <= 4 and found.backward <= 3, found

"""What runs on the ranks in the test of a token's path through a layer."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

import moe_train
from moe_train import MoELayer
from moe_train.parallel.layout import ExpertLayout
from moe_train.parallel.layout_plan import plan_layout

PACKAGE = Path(moe_train.__file__).parent


@dataclass(frozen=True)
class TokenPath:
    """Files of the package whose functions a forward calls, how many functions, and all-to-alls each way."""

    files: tuple[str, ...]
    functions: int
    forward: int
    backward: int
    names: tuple[str, ...] = ()


def token_path(dtype: torch.dtype) -> TokenPath:
    """What runs on a rank."""
    torch.manual_seed(0)
    layout = ExpertLayout.build(plan_layout(2, 2, 2, 4))
    layer = MoELayer(dim=32, hidden=64, routing={"name": "top_k", "num_experts": 4, "top_k": 2}, layout=layout)
    layer = layer.to(dtype)
    x = torch.randn(2, 9, 32).to(dtype).requires_grad_()
    layer(x)[0].sum().backward()  # what is cached is not counted
    calls = [0]
    original = dist.all_to_all_single

    def counted(*args: Any, **keys: Any) -> Any:
        calls[0] += 1
        return original(*args, **keys)

    seen: set[tuple[str, str, int]] = set()
    with patch("torch.distributed.all_to_all_single", counted):
        y = _profiled(lambda: layer(x)[0], seen)
        forward = calls[0]
        y.sum().backward()
    files = sorted({file for file, _, _ in seen})
    return TokenPath(tuple(files), len(seen), forward, calls[0] - forward, tuple(sorted({n for _, n, _ in seen})))


def _profiled(call: Callable[[], torch.Tensor], seen: set[tuple[str, str, int]]) -> torch.Tensor:
    def profile(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(str(PACKAGE)):
            file = str(Path(code.co_filename).relative_to(PACKAGE))
            seen.add((file, code.co_qualname, code.co_firstlineno))

    sys.setprofile(profile)
    try:
        return call()
    finally:
        sys.setprofile(None)

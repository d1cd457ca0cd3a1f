"""A whole sparse layer with Triton's kernels equals the one with torch's operators, forward and backward."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import pytest
import torch

from moe_train import MoELayer
from moe_train.experts import mlp
from moe_train.kernels.device_kernels import TORCH, DeviceKernels, KernelMode, select_kernels
from moe_train.parallel import permute

pytest.importorskip("triton")
DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


@pytest.mark.parametrize(
    ("routing", "kernels"),
    [
        pytest.param({"name": "switch"}, "top_k order gather combine activation", id="switch"),
        pytest.param({"name": "top_k", "top_k": 2}, "top_k order gather combine activation", id="top_2"),
        pytest.param({"name": "sam", "top_k": 2, "num_groups": 4}, "order gather combine activation", id="sam"),
        pytest.param({"name": "switch", "capacity_factor": 0.5}, "top_k order gather combine activation", id="drops"),
    ],
)
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_a_layer_with_triton_equals_one_with_torch(
    routing: Mapping[str, Any], kernels: str, activation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: grouped products, numbers that the host cannot read. Some experts have no token."""
    monkeypatch.setattr(mlp, "prefers_grouped", lambda _: True)
    monkeypatch.setattr(permute, "_readable_without_sync", lambda _: False)
    used: Counter[str] = Counter()

    def record(self: DeviceKernels, name: str, like: torch.Tensor) -> bool:
        used[name] += name in self.names
        return name in self.names

    monkeypatch.setattr(DeviceKernels, "uses", record)
    modes: tuple[KernelMode, ...] = ("torch", "triton")
    ours, theirs = (results(routing, activation, select_kernels(mode, DEVICE)) for mode in modes)
    assert set(used) >= set(kernels.split()) and all(used[name] for name in kernels.split())
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(theirs[name], value, atol=2e-6, rtol=1e-4, msg=name)


def results(routing: Mapping[str, Any], activation: str, kernels: DeviceKernels) -> dict[str, torch.Tensor]:
    layer = MoELayer(8, 16, {**routing, "num_experts": 12}, activation=activation).to(DEVICE).train()
    layer.set_kernels(kernels)
    assert layer.block.router.kernels == kernels  # type: ignore[union-attr]
    generator = torch.Generator().manual_seed(3)
    x, grad = (torch.randn(2, 5, 8, generator=generator).to(DEVICE) for _ in range(2))
    x.requires_grad_()
    y, record = layer(x, padding_mask=torch.tensor([[False] * 5, [False] * 4 + [True]], device=DEVICE))
    assert record is not None and record.statistics.load.min() == 0
    torch.autograd.backward([y, record.total_loss], [grad, torch.ones((), device=DEVICE)])
    gradients = {name: value.grad for name, value in layer.named_parameters() if value.grad is not None}
    return {"y": y.detach(), "x": x.grad, "load": record.statistics.load, "loss": record.total_loss, **gradients}


def test_layers_begin_with_torch_operators() -> None:
    layer = MoELayer(8, 16, {"name": "switch"})
    assert layer.block.router.kernels is TORCH and layer.block.pool.kernels is TORCH  # type: ignore[union-attr]

"""16-bit copies of fp32 parameters: who has one, when they are made, and how their gradients are added up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from moe_train.config import EngineConfig, OptimizerConfig, TrainingConfig, build
from moe_train.kernels.cpu import amx_linear
from moe_train.kernels.cross_entropy import fused_label_smoothed_nll
from moe_train.layers.feed_forward import FeedForward
from moe_train.layers.transformer import Norm
from moe_train.models import TransformerModel
from moe_train.training.engines import Engine, EngineInputs, build_engine
from moe_train.training.optim.optimizer import build_optimizer
from moe_train.training.optim.precision import ComputeWeights, scaled_step
from moe_train.training.runtime.world import World
from tests.distributed.world import Worlds
from tests.models.helpers import PAD, sentences, small_model
from tests.training.engine_jobs import EXPERTS, Case, joined, run, step_of_feed_forward

HALF = (torch.bfloat16, torch.float16)
BF16: dict[str, Any] = {"precision": "bf16", "optimizer": {"name": "sgd"}}


def engine_of(module: nn.Module) -> Engine:
    settings = build(TrainingConfig, BF16)
    return build_engine(EngineInputs(module, EngineConfig(), settings, World()))  # type: ignore[arg-type]


def micro_batch(engine: Engine) -> None:
    """Forward and backward of a translation model."""
    target = sentences([4, 6])
    with engine.accumulate(last=False):
        with engine.autocast():
            features, _ = engine.model(sentences([5, 3]), None, target, features_only=True)
            assert isinstance(engine.module, TransformerModel)
            loss, _ = fused_label_smoothed_nll(
                features.flatten(0, 1), engine.module.output_weight, target.flatten(), 0.1, PAD
            )
        engine.backward(loss)


class Casts(TorchDispatchMode):
    """Counts casts between fp32 and a 16-bit type: of single tensors, and of all weights at once."""

    def __init__(self) -> None:
        super().__init__()
        self.single = self.of_all_weights = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result, name = function(*args, **(kwargs or {})), function._schema.name
        if name in ("aten::_to_copy", "aten::copy_"):
            source = args[name == "aten::copy_"].dtype
            self.single += {source, result.dtype} in ({torch.float32, half} for half in HALF)
        self.of_all_weights += name == "aten::_foreach_copy_" and args[0][0].dtype in HALF
        return result


@pytest.mark.parametrize("kernels", [False, True])
def test_one_cast_of_all_weights_an_update_and_few_of_activations_a_micro_batch(
    kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both embeddings and their gradients, and the output matrix.

    On a CPU without the C kernels also the probabilities and their gradient in the loss, and eight in the backward pass
    of each of the six attentions, which is fp32 there.
    """
    if kernels and not amx_linear.is_supported(torch.zeros(1, dtype=torch.bfloat16)):
        pytest.skip("no matrix units (AMX) here, or no C compiler")
    if kernels:  # though operators are traced
        monkeypatch.setattr("moe_train.kernels.cpu.compile._get_current_dispatch_mode", lambda: None)
    engine, few = engine_of(small_model("dense")), 5 if kernels else 7 + 6 * 8
    for casts_of_weights in (1, 0):
        with Casts() as casts:
            micro_batch(engine)
        assert (casts.of_all_weights, casts.single) == (casts_of_weights, few)
    engine.step(lr=0.1)
    with Casts() as casts:
        micro_batch(engine)
    assert (casts.of_all_weights, casts.single) == (1, few)


def test_routers_and_embeddings_keep_fp32() -> None:
    model = small_model("switch")
    weights = ComputeWeights(model, torch.bfloat16)
    with weights.in_use(), weights.in_use():
        fp32 = {name for name, p in model.named_parameters() if p.dtype == torch.float32}
        copies = [p for p in model.parameters() if getattr(p, "expert", False)]
        assert copies and all(p.dtype == torch.bfloat16 and len(p.expert_ids) == 4 for p in copies)  # type: ignore[attr-defined]
    parts = (".router.", ".tokens.", "norm.")
    assert fp32 and all(any(part in name for part in parts) for name in fp32), fp32
    assert all(any(part in name for name in fp32) for part in parts)


def test_norms_on_gpus_have_16_bit_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their kernel takes one type; here on a CPU."""
    monkeypatch.setattr(Norm, "computes_in_16_bits", True)
    norm, x = Norm(6), torch.randn(5, 6)
    engine = engine_of(norm)
    with engine.autocast():
        assert norm.weight.dtype == torch.bfloat16
        y = norm(x.bfloat16())
    engine.backward(y.float().square().sum())
    assert norm.weight.grad is not None and norm.weight.grad.dtype == torch.float32
    torch.testing.assert_close(y.float(), norm(x), rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(norm(x.double()).float(), norm(x))


def test_modules_have_their_parameters_again_after_an_error() -> None:
    block = FeedForward(4, 8)
    before = dict(block.named_parameters())
    with pytest.raises(ZeroDivisionError), ComputeWeights(block, torch.bfloat16).in_use():
        raise ZeroDivisionError
    assert all(p is before[name] for name, p in block.named_parameters())


def test_a_shared_parameter_has_one_copy_and_one_gradient() -> None:
    block = FeedForward(4, 4)
    block.fc2.weight = block.fc1.weight
    engine = engine_of(block)
    with engine.autocast():
        assert block.fc2.weight is block.fc1.weight and block.fc1.weight.dtype == torch.bfloat16
        y, _ = block(torch.randn(3, 4, dtype=torch.bfloat16))
    engine.backward(y.float().sum())
    assert block.fc1.weight.grad is not None and block.fc1.weight.grad.dtype == torch.float32


def test_copies_follow_what_is_loaded() -> None:
    block = FeedForward(4, 8)
    weights = ComputeWeights(block, torch.bfloat16)
    for value in (1.0, 2.0):
        with torch.no_grad():
            block.fc1.weight.detach()[0].fill_(value)  # as checkpoints are loaded, row by row
        with weights.in_use():
            assert block.fc1.weight[0].tolist() == [value] * 4


def test_a_parameter_without_a_gradient_has_none_in_the_next_update_either() -> None:
    block = FeedForward(4, 8)
    engine = engine_of(block)
    for used in (True, False):
        with engine.autocast():
            y = block(torch.ones(2, 4, dtype=torch.bfloat16))[0] if used else block.fc2.bias
        engine.backward(y.float().sum())
        assert (block.fc1.weight.grad is not None) == used
        engine.step(lr=0.1)


@pytest.mark.parametrize("size", [1, 2])
def test_gradients_are_added_up_in_fp32_over_micro_batches_and_ranks(worlds: Worlds, size: int) -> None:
    results = worlds(size).run(step_of_feed_forward) if size > 1 else [step_of_feed_forward()]
    for lost, _ in results:
        for name, change in lost.items():
            want = torch.stack([own[name] for _, own in results]).sum(0)
            torch.testing.assert_close(change, want, rtol=1e-5, atol=1e-5)  # a sum in bf16 is off by 4e-3


@pytest.mark.parametrize(("size", "expert_parallel"), [(2, 1), (2, 2), (4, 2)])
def test_ranks_equal_one_process(worlds: Worlds, size: int, expert_parallel: int) -> None:
    tensors, _ = joined(worlds(size).run(run, Case({"name": "ddp"}, BF16, expert_parallel)))
    want = run(Case({"name": "ddp"}, BF16)).tensors
    whole = torch.cat([tensor.flatten() for tensor in want.values()]).norm()
    for name, tensor in tensors.items():
        assert tensor.dtype == torch.float32 and (tensor - want[name]).norm() <= 5e-3 * whole, name


@pytest.mark.parametrize(("first", "then"), [("bf16", "fp32"), ("fp32", "bf16"), ("bf16", "bf16")])
def test_checkpoints_hold_fp32_and_load_in_any_precision(tmp_path: Path, first: str, then: str) -> None:
    def training(precision: str) -> dict[str, Any]:
        return {"precision": precision, "optimizer": {"name": "adam"}}

    ddp, folder = {"name": "ddp"}, str(tmp_path)
    saved = run(Case(ddp, training(first), last=4, folder=folder))
    resumed = run(Case(ddp, training(then), first=4, last=6, folder=folder))
    assert {t.dtype for t in (*saved.tensors.values(), *saved.moments.values())} == {torch.float32}
    whole = run(Case(ddp, training(first), last=6))
    if first == then:
        assert all(torch.equal(tensor, whole.tensors[name]) for name, tensor in resumed.tensors.items())
        assert resumed.losses == whole.losses[4:]
    assert resumed.losses == pytest.approx(whole.losses[4:], rel=0.02)
    assert len([name for name in saved.tensors if "fc1_weight.@" in name]) == EXPERTS


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_scaled_step_is_a_step_with_divided_gradients_or_none(name: str, dtype: torch.dtype) -> None:
    """Fused kernels and those that are not."""
    config = OptimizerConfig(name=name, lr=0.1)  # type: ignore[arg-type]
    ours, want = nn.Linear(3, 2).to(dtype), nn.Linear(3, 2).to(dtype)
    want.load_state_dict(ours.state_dict())
    pairs = list(zip(ours.parameters(), want.parameters(), strict=True))
    optimizers = [build_optimizer(module, config) for module in (ours, want)]
    for update, found_inf in enumerate((1.0, 0.0, 1.0, 0.0)):
        for p, q in pairs:
            q.grad = torch.randn_like(p)
            p.grad = torch.full_like(p, float("nan")) if found_inf else 8 * q.grad
        divisor = torch.tensor(float("nan") if found_inf else 8.0)
        scaled_step(optimizers[0], divisor, torch.tensor(found_inf))
        if not found_inf:
            optimizers[1].step()
        for p, q in pairs:
            assert torch.equal(p, q), update

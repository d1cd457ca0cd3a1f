"""The DeepSpeed engine against torch's DDP on one process: parameters, norms, losses, skipped steps, checkpoints."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_train.config import EngineConfig, RunConfig, build
from moe_train.errors import ConfigError, LaunchError, MissingDependency
from moe_train.training.engines.deepspeed_library import build_cpu_adam, check_deepspeed
from tests.distributed.world import Worlds
from tests.training.engine_jobs import EXPERTS, Case, Result, joined, run

pytest.importorskip("deepspeed")

DDP = {"name": "ddp"}
ADAM = {"optimizer": {"name": "adamw", "weight_decay": 0.01, "betas": [0.9, 0.98]}}


def zero(stage: int, **keys: Any) -> dict[str, Any]:
    return {"name": "deepspeed", "zero_stage": stage, **keys}


@pytest.fixture(scope="module")
def sgd() -> Result:
    """Ten clipped steps by one process."""
    result = run(Case(DDP))
    assert min(result.norms) > 0.5, "clipping must act in these tests"
    return result


def assert_close(ours: dict[str, Tensor], want: dict[str, Tensor], bound: float = 1e-5) -> None:
    """The design's bound: each tensor's error against the norm of them all."""
    assert ours.keys() == want.keys()
    whole = torch.cat([tensor.double().flatten() for tensor in want.values()]).norm()
    for name, tensor in ours.items():
        assert (tensor - want[name]).norm() <= bound * whole, name


def check(results: list[Result], want: Result) -> None:
    for result in results:
        assert result.norms == pytest.approx(want.norms, rel=1e-5)
        assert result.losses == pytest.approx(want.losses, rel=1e-5)
        assert result.applied == want.applied
    tensors, moments = joined(results)
    assert_close(tensors, want.tensors)
    assert_close(moments, want.moments)


@pytest.mark.parametrize("expert_parallel", [1, 2])
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_two_ranks_equal_one_process(worlds: Worlds, sgd: Result, stage: int, expert_parallel: int) -> None:
    results = worlds(2).run(run, Case(zero(stage), expert_parallel=expert_parallel))
    check(results, sgd)
    held = [name for name in results[0].tensors if name.startswith("model.pool.sublayers.0.fc1_weight.@")]
    assert len(held) == EXPERTS // expert_parallel


@pytest.mark.parametrize(
    ("stage", "expert_parallel"), [pytest.param(0, 2, marks=pytest.mark.slow), (1, 2), (2, 2), (2, 4)]
)
def test_four_ranks_equal_one_process(worlds: Worlds, sgd: Result, stage: int, expert_parallel: int) -> None:
    check(worlds(4).run(run, Case(zero(stage), expert_parallel=expert_parallel)), sgd)


@pytest.mark.parametrize(("stage", "expert_parallel"), [(0, 2), (1, 1), (2, 2)])
def test_adam(worlds: Worlds, stage: int, expert_parallel: int) -> None:
    check(worlds(2).run(run, Case(zero(stage), ADAM, expert_parallel)), run(Case(DDP, ADAM)))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("stage", "expert_parallel"), [(1, 1), (2, 2)])
def test_offloaded_adam(worlds: Worlds, stage: int, expert_parallel: int) -> None:
    """Slow because DeepSpeed's CPU Adam is compiled for it, once on a machine."""
    build_cpu_adam()
    results = worlds(2).run(run, Case(zero(stage, offload_optimizer=True), ADAM, expert_parallel))
    check(results, run(Case(DDP, ADAM)))


def test_zero_shares_out_what_it_keeps(worlds: Worlds) -> None:
    """Each rank has about half of Adam's state, and gives about half of it to a checkpoint."""
    own = [sum(t.numel() for t in r.moments.values()) for r in worlds(2).run(run, Case(zero(1), ADAM, last=2))]
    whole = sum(t.numel() for t in run(Case(DDP, ADAM, last=2)).moments.values())
    assert sum(own) == whole and max(own) < 0.75 * whole


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_one_rank_with_an_infinite_gradient_skips_all(worlds: Worlds, stage: int) -> None:
    want = run(Case(DDP, poison=3))
    assert want.applied == [update != 3 for update in range(10)]
    results = worlds(2).run(run, Case(zero(stage), expert_parallel=2 if stage else 1, poison=3))
    for rank, result in enumerate(results):
        assert result.applied == want.applied
        assert result.clean == [update != 3 or rank != 0 for update in range(10)]
        assert torch.tensor(result.norms).isfinite().tolist() == want.applied
    tensors, _ = joined(results)
    assert_close(tensors, want.tensors)


def test_bf16_computes_as_ddp_does_and_keeps_routers_in_fp32(worlds: Worlds) -> None:
    keys = {"precision": "bf16", "optimizer": {"name": "sgd"}}
    want = run(Case(DDP, keys))
    assert want.dtypes == {"inner": "torch.bfloat16", "gate": "torch.float32", "weight": "torch.float32"}
    for stage in (0, 2):
        results = worlds(2).run(run, Case(zero(stage), keys, expert_parallel=2))
        tensors, _ = joined(results)
        assert all(result.dtypes == want.dtypes for result in results)
        assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
        assert_close(tensors, want.tensors, bound=5e-3)


WAYS = [  # (world, engine, expert_parallel), twice: both directions between (4, 4) and (2, 2), (2, 1), (1, 1)
    (4, zero(1), 4, 2, zero(2), 2),
    (4, zero(2), 4, 2, zero(1), 1),
    (4, zero(2), 4, 1, zero(1), 1),
    (2, zero(2), 2, 4, zero(1), 4),
    (2, zero(1), 1, 4, zero(2), 4),
    (1, zero(2), 1, 4, zero(1), 4),
    (2, DDP, 1, 4, zero(2), 2),
    (4, zero(2), 4, 2, DDP, 2),
    (2, zero(2), 2, 2, zero(0), 1),
]


@pytest.mark.parametrize(("world", "engine", "expert_parallel", "then_world", "then_engine", "then_ep"), WAYS)
def test_a_run_goes_on_under_another_engine_and_layout(
    worlds: Worlds,
    tmp_path: Path,
    world: int,
    engine: dict[str, Any],
    expert_parallel: int,
    then_world: int,
    then_engine: dict[str, Any],
    then_ep: int,
) -> None:
    keys = {"optimizer": {"name": "adam"}}
    begun = Case(engine, keys, expert_parallel, last=5, folder=str(tmp_path))
    worlds(world).run(run, begun)
    rest = dataclasses.replace(begun, engine=then_engine, expert_parallel=then_ep, first=5, last=10)
    results = worlds(then_world).run(run, rest)
    want = run(Case(DDP, keys))
    tensors, moments = joined(results)
    assert results[0].norms == pytest.approx(want.norms[5:], rel=1e-5)
    assert_close(tensors, want.tensors)
    assert_close(moments, want.moments)
    ended = run(dataclasses.replace(begun, engine=DDP, expert_parallel=1, first=10, last=10))
    assert_close(ended.tensors, want.tensors)


def test_no_group_no_deepspeed() -> None:
    with pytest.raises(LaunchError, match=r"needs torch\.distributed"):
        run(Case(zero(1)))


# -- what is refused before anything starts -------------------------------------------------------------------------


def config(**keys: Any) -> RunConfig:
    return build(RunConfig, {"data": "none", **keys})


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"name": "deepspeed", "zero_stage": 3}, "ZeRO 3.*zero_stage=2"),
        ({"name": "deepspeed", "zero_stage": 4}, "cannot be 4"),
        ({"name": "ddp", "zero_stage": 2}, "need DeepSpeed"),
        ({"name": "deepspeed", "zero_stage": 0, "offload_optimizer": True}, "needs ZeRO"),
    ],
)
def test_settings_that_cannot_be(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EngineConfig(**keys)


def test_fp16_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"not in fp16.*precision=bf16"):
        check_deepspeed(config(engine=zero(1), training={"precision": "fp16"}))
    check_deepspeed(config(engine=zero(1), training={"precision": "bf16"}))


def test_without_deepspeed_the_remedy_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingDependency, match=r"DeepSpeed is not installed.*Run scripts/setup\.sh"):
        check_deepspeed(config(engine=zero(1)))


def test_offload_wants_adam() -> None:
    keys = {"engine": zero(1, offload_optimizer=True), "training": {"optimizer": {"name": "sgd"}}}
    with pytest.raises(ConfigError, match="CPU Adam, not with 'sgd'"):
        check_deepspeed(config(**keys))


def test_offload_without_a_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    with pytest.raises(ConfigError, match=r"cannot be built here.*compiler.*offload_optimizer=false"):
        check_deepspeed(config(engine=zero(1, offload_optimizer=True)))

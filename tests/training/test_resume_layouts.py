"""A run saved at one layout goes on at any other and ends as if it never had been, Adam's moments included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from moe_train.config.evaluation import ExportConfig
from moe_train.data.folder import DataFolder
from moe_train.evaluation.export_model import export_run
from moe_train.training.checkpoint.dcp import load_tensors, shapes
from moe_train.training.checkpoint.store import CheckpointStore
from tests.distributed.world import Worlds
from tests.training.resume_jobs import go, go_from, spoilt
from tests.training.toy_run import lines

SAM = {"name": "sam", "num_experts": 8, "top_k": 1, "num_groups": "rank"}
FIXED = {**SAM, "num_groups": 4}
PLACES = [(4, 4), (2, 2), (2, 1), (1, 1)]


def start(
    worlds: Worlds, data: DataFolder, run: Path, place: tuple[int, int], routing: dict[str, Any], updates: int
) -> Any:
    """A session at (world, expert_parallel)."""
    world, expert_parallel = place
    arguments = (str(data.path), str(run), routing, {"expert_parallel": expert_parallel}, updates)
    return worlds(world).run(go, *arguments)[0] if world > 1 else go(*arguments)


def tensors(run: Path) -> dict[str, torch.Tensor]:
    step = CheckpointStore(run / "checkpoints").resolve("last")
    found = {name: torch.empty(shape, dtype=torch.float64) for name, shape in shapes(step).items()}
    load_tensors(step, found)
    return found


def norm(named: dict[str, torch.Tensor]) -> float:
    return float(torch.cat([t.double().flatten() for t in named.values()]).norm())


@pytest.fixture(scope="module")
def unbroken(tiny_data: DataFolder, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """Six updates by one process."""
    run = tmp_path_factory.mktemp("unbroken") / "run"
    go(str(tiny_data.path), str(run), FIXED, {}, 6)
    return tensors(run)


def check(run: Path, unbroken: dict[str, torch.Tensor]) -> None:
    found = tensors(run)
    assert found.keys() == unbroken.keys()
    assert {name.split(".@")[1] for name in found if ".fc1_weight.@" in name and name.startswith("model.")} == {
        str(e) for e in range(8)
    }
    for kind in ("model.", "optimizer."):
        mine, theirs = ({n: t for n, t in named.items() if n.startswith(kind)} for named in (found, unbroken))
        difference = {name: mine[name] - theirs[name] for name in theirs}
        assert norm(difference) <= 1e-10 * norm(theirs), kind


@pytest.mark.parametrize("later", PLACES[1:], ids=str)
def test_from_four_ranks_to_fewer(
    worlds: Worlds, tiny_data: DataFolder, tmp_path: Path, unbroken: dict[str, torch.Tensor], later: tuple[int, int]
) -> None:
    run = tmp_path / "run"
    first = start(worlds, tiny_data, run, (4, 4), SAM, 3)
    assert first["world"]["expert_parallel"] == 4 and first["traffic"]["updates"] == 3
    again = start(worlds, tiny_data, run, later, SAM, 6)  # num_groups=rank keeps the number of the first launch
    assert again["world"] == {**again["world"], "processes": later[0], "expert_parallel": later[1]}
    check(run, unbroken)


@pytest.mark.parametrize("first", PLACES[1:], ids=str)
def test_from_fewer_ranks_to_four(
    worlds: Worlds, tiny_data: DataFolder, tmp_path: Path, unbroken: dict[str, torch.Tensor], first: tuple[int, int]
) -> None:
    run = tmp_path / "run"
    start(worlds, tiny_data, run, first, FIXED, 3)
    assert start(worlds, tiny_data, run, (4, 4), FIXED, 6)["update"] == 6
    check(run, unbroken)


def test_an_export_starts_a_run_at_any_layout(worlds: Worlds, tiny_data: DataFolder, tmp_path: Path) -> None:
    """safetensors out of a run on two ranks, into one on four; an export is fp32."""
    start(worlds, tiny_data, tmp_path / "first", (2, 2), FIXED, 2)
    exported = export_run(ExportConfig(str(tmp_path / "first"), str(tmp_path / "exported"), checkpoint="last"))
    arguments = (str(tiny_data.path), str(tmp_path / "second"), FIXED, {"expert_parallel": 4}, str(exported))
    worlds(4).run(go_from, *arguments)
    first, second = tensors(tmp_path / "first"), tensors(tmp_path / "second")
    names = [name for name in first if name.startswith("model.")]
    assert len({name for name in names if ".fc1_weight.@" in name}) == 2 * 8 * 1
    difference = {name: second[name] - first[name] for name in names}
    assert norm(difference) <= 1e-6 * norm({name: first[name] for name in names})


def test_traffic_is_logged_and_told(worlds: Worlds, tiny_data: DataFolder, tmp_path: Path) -> None:
    for name, stops in (("whole", [6]), ("broken", [3, 6])):
        for updates in stops:
            info = start(worlds, tiny_data, tmp_path / name, (2, 2), FIXED, updates)
    whole, broken = ([line["traffic"] for line in lines(tmp_path / name)] for name in ("whole", "broken"))
    assert summed(whole) == summed(broken)
    assert info["traffic"] == {**summed(broken[-2:]), "updates": 3}, "run.json tells of the last session"
    # One row each way for every token whose group stands on the other rank, and as many gradients back (fp64, d = 8).
    for line in whole:
        node = line["node"]
        assert node["dispatched_rows"] == node["returned_rows"] > 0 and node["metadata_bytes"] > 0
        assert node["payload_bytes"] == 4 * node["dispatched_rows"] * 8 * 8
        assert line["across"]["dispatched_rows"] == 0


def summed(traffic: list[dict[str, dict[str, int]]]) -> dict[str, dict[str, int]]:
    return {
        link: {name: sum(line[link][name] for line in traffic) for name in traffic[0][link]}
        for link in ("local", "node", "across")
    }


@pytest.mark.parametrize("world", [2, 4])
def test_experts_that_spoil_an_update_are_named(
    worlds: Worlds, tiny_data: DataFolder, tmp_path: Path, world: int
) -> None:
    """Experts that are divided over ranks, with and without replicas."""
    said = worlds(world).run(spoilt, str(tiny_data.path), str(tmp_path), {**SAM, "num_groups": 2})
    assert len(set(said)) == 1 and "the last was update 1, rank 1" in said[0]

"""Weights to start from: dense ones in sparse models of every kind; from runs, checkpoints and exports; any layout."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moe_train.config import ModelConfig
from moe_train.config.evaluation import ExportConfig
from moe_train.data.folder import DataFolder
from moe_train.errors import CheckpointError
from moe_train.evaluation.export_model import export_run
from moe_train.models.encoder import build_text_classifier
from moe_train.routing import registered_strategies, routing_config
from moe_train.training.checkpoint.dcp import read_tensors
from moe_train.training.checkpoint.init_from import initialise_from
from moe_train.training.checkpoint.state_dict import model_tensors
from moe_train.training.checkpoint.store import CheckpointStore
from tests.commands.test_train import here
from tests.distributed.world import Worlds
from tests.evaluation.runs import make_run
from tests.models.helpers import PAD, Words, routing_keys, sentences, small_model
from tests.models.test_encoder import SMALL, TOKENS, language_model
from tests.models.test_vision import pictures, vision
from tests.training.resume_jobs import go, go_from
from tests.training.toy_run import final_tensors

ONE = {"name": "random", "num_experts": 4}  # one expert of weight 1: the function of the dense model


def translation(routing: Any) -> nn.Module:
    return small_model(routing, share_embeddings=True, seed=len(str(routing)))


def encoder(routing: Any) -> nn.Module:
    model: nn.Module = language_model(routing_keys(routing) if isinstance(routing, str) else routing)
    return model


def images(routing: Any) -> nn.Module:
    return vision(routing, seed=len(str(routing)))


def classifier(routing: dict[str, Any]) -> nn.Module:
    model: nn.Module = build_text_classifier(ModelConfig(**SMALL), routing_config(routing), Words(), 3, seed=9)
    return model


def translated(model: nn.Module) -> Tensor:
    target = sentences([5, 8, 3])
    out: Tensor = model(sentences([7, 4, 6]), None, target)[0][target.ne(PAD)]
    return out


KINDS: list[tuple[Callable[[Any], nn.Module], Callable[[nn.Module], Tensor]]] = [
    (translation, translated),
    (encoder, lambda model: model(TOKENS)[0][TOKENS.ne(PAD)]),
    (images, lambda model: model(pictures(3))[0]),
]


def saved(model: nn.Module, folder: Path) -> Path:
    return CheckpointStore(folder).save(model_tensors(model), {"update": 1}, "step_1")


@pytest.mark.parametrize(("build", "run"), KINDS, ids=["translation", "encoder", "images"])
def test_a_dense_checkpoint_starts_every_kind_of_sparse_model(
    build: Callable[[Any], nn.Module], run: Callable[[nn.Module], Tensor], tmp_path: Path
) -> None:
    """Tied embeddings stand in it once. In fp64, which must arrive as it was written."""
    dense, sparse = build("dense").double().eval(), build(ONE).double().eval()
    with torch.no_grad():
        for parameter in dense.parameters():
            parameter.div_(3.0)  # what fp32 cannot hold
        step = saved(dense, tmp_path)
        assert not torch.allclose(run(sparse), run(dense), atol=1e-3)
        initialise_from(sparse, str(step))
        torch.testing.assert_close(run(sparse), run(dense), atol=1e-12, rtol=1e-12)
    for name in sorted(registered_strategies().keys() - {"dense", "xmoe"}):
        model = build(name)
        initialise_from(model, str(step))
        first = next(p for n, p in model.named_parameters() if n.endswith("fc1_weight"))
        assert all(torch.equal(expert, first[0]) for expert in first), name
    initialise_from(build({"name": "xmoe", "num_experts": 4, "expert_sublayers": 1}), str(step))


def test_a_classifier_starts_from_a_dense_language_model(tmp_path: Path) -> None:
    dense = encoder("dense").eval()
    step = saved(dense, tmp_path)
    sparse = classifier(ONE)
    head = sparse.out.weight.clone()
    initialise_from(sparse, str(step))
    with torch.no_grad():
        want, found = (
            m.eval().encoder(TOKENS, None, None, None, None, None)["encoder_out"][0] for m in (dense, sparse)
        )
    torch.testing.assert_close(found[TOKENS.ne(PAD)], want[TOKENS.ne(PAD)], atol=1e-5, rtol=1e-5)
    assert torch.equal(sparse.out.weight, head)


def test_what_does_not_fit_is_said(tmp_path: Path) -> None:
    untied, tied, sparse = (
        saved(model, tmp_path / name)
        for name, model in (
            ("untied", small_model("dense", share_embeddings=False)),
            ("tied", translation("dense")),
            ("sparse", translation("top_k")),
        )
    )
    with pytest.raises(CheckpointError, match=r"one tensor in the model and differ.*share_embeddings"):
        initialise_from(translation("switch"), str(untied))
    with pytest.raises(CheckpointError, match=r"the dense checkpoint has no decoder\.(embed|output)"):
        initialise_from(small_model("switch", share_embeddings=False), str(tied))
    with pytest.raises(CheckpointError, match=r"has no tensor .* Give the model and routing that it was trained with"):
        initialise_from(translation("sam"), str(sparse))
    with pytest.raises(CheckpointError, match=r"parameters that the model has not"):
        initialise_from(translation("dense"), str(sparse))


@pytest.mark.parametrize("name", ["best", "last", "40", "averaged"])
def test_a_folder_is_taken_whatever_its_name(tmp_path: Path, name: str) -> None:
    """`models/best` is no link of a run, nor `models/40` an update's checkpoint."""
    os.replace(saved(translation("dense"), tmp_path), tmp_path / name)
    saved(small_model("dense", embed_dim=8), tmp_path)  # what such a name would mean in a run
    assert initialise_from(translation("switch"), str(tmp_path / name)) == tmp_path / name
    (tmp_path / name / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"state\.json: .*altered"):
        initialise_from(translation("switch"), str(tmp_path / name))


@pytest.mark.processes
def test_moe_train_upcycles_a_dense_run_and_its_export(tiny_data: DataFolder, tmp_path: Path) -> None:
    dense = make_run(tmp_path / "dense", tiny_data, "dense", model={"share_embeddings": True})
    exported = export_run(ExportConfig(str(dense), str(tmp_path / "best")))
    want = final_tensors(dense, "best")
    shape = [f"model.{key}" for key in ("embed_dim=32", "ffn_dim=48", "num_heads=2", "max_positions=40")]
    shape += ["model.encoder_layers=2", "model.decoder_layers=2", "model.sparse_layers=all"]
    for source in (dense, exported):
        run = tmp_path / f"from_{source.name}"
        words = [f"data={tiny_data.path}", f"training.init_from={source}", f"hydra.run.dir={run}", *shape]
        more = ["routing=switch", "training.max_updates=1", "training.optimizer.lr=1e-9", "training.threads=1"]
        code, said = here(["model=tiny", *words, *more, "training.validation.max_sentences=2"], tmp_path)
        assert code == 0, said
        found = final_tensors(run)
        same = "model.encoder.embed.tokens.weight"
        assert torch.allclose(found[same], want[same], atol=1e-5)
        expert = found["model.decoder.stack.layers.0.feed_forward.block.pool.sublayers.0.fc1_weight.@3"]
        assert torch.allclose(expert.t(), want["model.decoder.stack.layers.0.feed_forward.block.fc1.weight"], atol=1e-5)


def test_ranks_that_divide_the_experts_upcycle_together(worlds: Worlds, tiny_data: DataFolder, tmp_path: Path) -> None:
    dense, run = tmp_path / "dense", tmp_path / "run"
    worlds(2).run(go, str(tiny_data.path), str(dense), {"name": "dense"}, {}, 2)
    routing = {"name": "switch", "num_experts": 4}
    worlds(2).run(go_from, str(tiny_data.path), str(run), routing, {"expert_parallel": 2}, str(dense))
    want, found = (
        read_tensors(CheckpointStore(folder / "checkpoints").resolve("last"), "model.") for folder in (dense, run)
    )
    block = "model.encoder.stack.layers.0.feed_forward.block"
    for expert in range(4):
        copy = found[f"{block}.pool.sublayers.0.fc1_weight.@{expert}"].t()
        torch.testing.assert_close(copy, want[f"{block}.fc1.weight"], atol=1e-9, rtol=0)
    same = "model.encoder.embed.tokens.weight"
    torch.testing.assert_close(found[same], want[same], atol=1e-9, rtol=0)

"""Exports a trained model as one self-contained directory: safetensors, config, dictionaries, SentencePiece.

    OUT/
      model.safetensors      or model-00001-of-00003.safetensors … and model.safetensors.index.json
      config.json            the run's config, and the run and checkpoint exported
      data/                  dict.txt, dict.XX.txt, spm.model and their manifest (languages, directions)
      README.md              the names of the tensors
      manifest.json          sha256 of every file

Tensors keep the names of checkpoints, so the directory can also be read as a checkpoint, by any number of ranks.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

import moe_train
from moe_train.config import to_mapping
from moe_train.config.evaluation import ExportConfig, Inference
from moe_train.data.folder import DataFolder
from moe_train.data.manifest import describe_files
from moe_train.errors import ConfigError
from moe_train.evaluation.export_readme import readme
from moe_train.evaluation.loading import LoadedRun, OpenedRun, open_run
from moe_train.evaluation.model_folder import check_free, new_model_folder
from moe_train.layers import FeedForward
from moe_train.models.accounting import sparse_blocks
from moe_train.routing.inference_overrides import evaluation_values
from moe_train.training.checkpoint import checksums
from moe_train.training.checkpoint.state_dict import model_tensors
from moe_train.training.checkpoint.store import STATE, read_state
from moe_train.training.checkpoint.tensor_shards import plan_shards, write_index
from moe_train.training.run.run_data import RunData
from moe_train.training.run.run_folder import CONFIG, RunFolder
from moe_train.training.run.run_folder import EXPORTED_DATA as DATA


def export_run(config: ExportConfig) -> Path:
    """Exports a checkpoint of a run and returns the new folder, which is written atomically.

    Raises:
        ConfigError: no run folder, or the target exists already.
        CheckpointError: the checkpoint is missing or damaged.
        DataError: the run's data folder, which has the dictionaries, is missing or damaged.
    """
    out = Path(config.out)
    check_free(out, "export")
    run = _dense_run(config) if config.dense else _opened(config).load()
    with new_model_folder(out, "export", "export") as folder:
        _write(run, folder, config.shard_mb)
    return out


def _opened(config: ExportConfig, inference: Inference | None = None) -> OpenedRun:
    return open_run(config.run, config.checkpoint, config.data, inference, verify=config.data_verify)


def _dense_run(config: ExportConfig) -> LoadedRun:
    """The run with one expert of each layer, as a run of ``routing=dense``.

    Raises:
        ConfigError: a token's expert depends on the token, or the model with one expert is no dense one of its config.
    """
    strategy = RunFolder.open(config.run).config.routing
    if "inference" not in evaluation_values(strategy):
        raise ConfigError(
            f"with routing={strategy['name']} the tokens have different experts, which no dense model has",
            "dense=true",
            "it is for routing=thor, whose experts are trained to agree",
        )
    run = _opened(config, Inference({"inference": "fixed"})).load()
    widths = {part.fc1.out_features for part in run.model.modules() if isinstance(part, FeedForward)}
    if sparse_blocks(run.model) or len(widths) > 1:
        raise ConfigError(
            "the model with one expert of each layer is not one that routing=dense builds",
            "dense=true",
            "it needs experts of one width, model.ffn_dim, in place of feed-forwards, in encoder and decoder alike",
        )
    model = dataclasses.replace(run.config.model, ffn_dim=widths.pop())
    return dataclasses.replace(run, config=dataclasses.replace(run.config, routing={"name": "dense"}, model=model))


def _write(run: LoadedRun, folder: Path, shard_mb: float) -> None:
    tensors = model_tensors(run.model)
    _write_tensors(tensors, folder, int(shard_mb * 10**6))
    portable = _write_data(run.data, folder / DATA)
    content = _config_json(run, DATA if portable else run.config.data)
    checksums.write_synced(folder / CONFIG, json.dumps(content, indent=1) + "\n")
    checksums.write_synced(folder / "README.md", readme(content["exported"], run.config, tensors, portable))
    files = describe_files(folder)
    for manifest in folder.glob(f"*/{checksums.MANIFEST}"):
        files[manifest.relative_to(folder).as_posix()] = checksums.digest(manifest)
    checksums.write_manifest(folder, files)
    checksums.sync_folder(folder)


def _write_tensors(tensors: Mapping[str, Tensor], folder: Path, limit: int) -> None:
    from safetensors.torch import save_file

    sizes = {name: tensor.nbytes for name, tensor in tensors.items()}
    shards = plan_shards(sizes, limit)
    for file, names in shards.items():
        # Experts are views of one stacked tensor; safetensors requires that tensors do not share memory.
        save_file({name: tensors[name].clone() for name in names}, folder / file, metadata={"format": "pt"})
    write_index(folder, shards, sum(sizes.values()))


def _write_data(data: Any, folder: Path) -> bool:
    """Writes dictionaries and tokenizer as a data folder without sentences; False where the task has none."""
    if not isinstance(data, DataFolder):
        return False
    folder.mkdir()
    for path in (data.path / "spm.model", *sorted(data.path.glob("dict*.txt"))):
        shutil.copyfile(path, folder / path.name)
    manifest = dataclasses.replace(data.manifest, counts={}, cleaning={}, overlap={}, files=describe_files(folder))
    manifest.write(folder)
    return True


def _config_json(run: LoadedRun, data: str) -> dict[str, Any]:
    """``config.json`` of a run folder, with the run and checkpoint exported."""
    state = read_state(run.checkpoint) if (run.checkpoint / STATE).is_file() else {}
    config = dataclasses.replace(run.config, data=data)
    exported = {
        "run": run.folder.path.resolve().name,
        "checkpoint": run.checkpoint.name,
        "update": state.get("update"),
        "moe_train": moe_train.__version__,
    }
    data_keys = RunData(RunData.of_task(run.task).vocabulary, run.trained).to_json()
    user_dir = {"user_dir": run.folder.user_dir} if run.folder.user_dir else {}
    return {"format": 1, "config": to_mapping(config), "exported": exported, **data_keys, **user_dir}

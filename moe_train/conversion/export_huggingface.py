"""``moe-export format=huggingface``: an imported model as a folder of transformers, after training as well.

Tensors that the model does not compute with, config and tokenizer are those that moe-import has kept. An imported model
that was not trained has every tensor of its original, bit for bit.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from moe_train.config.evaluation import ExportConfig
from moe_train.conversion.family import Family, Link, Settings, families
from moe_train.conversion.hf_tensors import FLOATS
from moe_train.conversion.import_model import ORIGINAL, TENSORS
from moe_train.errors import CheckpointError, ConfigError, DataError
from moe_train.evaluation.loading import LoadedRun, open_run
from moe_train.evaluation.model_folder import check_free, new_model_folder
from moe_train.routing.registry import routing_config
from moe_train.training.checkpoint import checksums
from moe_train.training.checkpoint.state_dict import model_tensors
from moe_train.training.checkpoint.tensor_shards import plan_shards, write_index
from moe_train.training.run.run_data import run_of
from moe_train.training.run.run_folder import CONFIG
from moe_train.utils.json_files import entry, read_object

# Keys of model and routing that change the function at evaluation.
_SHAPE = (
    *("encoder_layers", "decoder_layers", "embed_dim", "ffn_dim", "num_heads", "norm_order", "activation"),
    "share_embeddings",
)
_PLACES = ("sparse_layers", "decoder_sparse_layers")
_ROUTING = (
    *("num_experts", "expert_ffn_dim", "top_k", "normalise", "scores", "shared_expert", "gate_bias"),
    *("batch_prioritised", "expert_output_masking", "evaluation_capacity_factor"),
)
_TYPES = {str(kind).removeprefix("torch."): kind for kind in FLOATS}


def export_huggingface(config: ExportConfig) -> Path:
    """Exports a checkpoint of a run and returns the new folder, which is written atomically.

    Raises:
        ConfigError: the model is not an imported one, has another shape or routing than the original, or the target
            exists already.
        CheckpointError: the checkpoint, or what was kept of the original, is missing or damaged.
    """
    out = Path(config.out)
    check_free(out, "export")
    opened = open_run(config.run, config.checkpoint, config.data, verify=config.data_verify)
    source = _source(opened.config.training.init_from, opened.folder.path)
    content = read_object(source / ORIGINAL / CONFIG) or {}
    settings = Settings(content, str(source / ORIGINAL / CONFIG))
    family = families()[settings.require("model_type", families(), None)]
    run = opened.load()
    _check_config(run, family, settings)
    with new_model_folder(out, "export", "export") as folder:
        _write(run, family, source, folder, int(config.shard_mb * 10**6))
    return out


def _source(init_from: str | None, own: Path) -> Path:
    """The imported folder: the run's own, or the one that its training started from.

    Raises:
        ConfigError: there is none.
    """
    started = run_of(init_from) if init_from else None
    for folder in (own, *([started.path] if started else [])):
        if (folder / ORIGINAL / TENSORS).is_file():
            return folder
    raise ConfigError(
        f"only models of moe-import, or trained from one, can be exported so: there is no {ORIGINAL}/{TENSORS}",
        str(own),
        "keep the folder of training.init_from where it was, or export with format=moe_train",
    )


def _check_config(run: LoadedRun, family: Family, settings: Settings) -> None:
    """Compares the run's model and routing with those of the original.

    Raises:
        ConfigError: a key differs that changes the model's function at evaluation.
    """
    ours, theirs = run.config.model, family.model(settings)
    is_dense = run.config.routing["name"] == "dense"
    for key in (*_SHAPE, *(() if is_dense else _PLACES)):
        if getattr(ours, key) != getattr(theirs, key):
            _refuse(f"model.{key}", getattr(ours, key), getattr(theirs, key), family)
    wanted, given = routing_config(family.routing(settings)), routing_config(run.config.routing)
    if given.name != wanted.name:
        _refuse("routing", given.name, wanted.name, family)
    for key in _ROUTING:
        if getattr(given, key, None) != getattr(wanted, key, None):
            _refuse(f"routing.{key}", getattr(given, key, None), getattr(wanted, key, None), family)


def _refuse(key: str, ours: object, theirs: object, family: Family) -> None:
    what = f"{key}={ours} is not the function of the imported {family.architecture}, which has {theirs}"
    raise ConfigError(what, remedy="export with format=moe_train")


def _write(run: LoadedRun, family: Family, source: Path, folder: Path, limit: int) -> None:
    from safetensors.torch import save_file

    types = _types(source / ORIGINAL / TENSORS)
    known = Tensors(run, family, source)
    sizes = {name: known.read(name).numel() * kind.itemsize for name, kind in types.items()}
    shards = plan_shards(sizes, limit)
    for file, names in shards.items():
        tensors = {name: known.read(name).to(types[name]).contiguous().clone() for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
    write_index(folder, shards, sum(sizes.values()))
    for path in sorted((source / ORIGINAL).iterdir()):
        if path.name != TENSORS:
            shutil.copyfile(path, folder / path.name)
    checksums.sync_folder(folder)


class Tensors:
    """Tensors of a run under the names of the original."""

    def __init__(self, run: LoadedRun, family: Family, source: Path) -> None:
        self._ours, self._source = model_tensors(run.model), source
        self._aliases = family.aliases(run.config.model)
        self._places: dict[str, list[tuple[Link, int]]] = {}
        for link in family.links(run.config.model, vars(routing_config(run.config.routing))):
            for part, name in enumerate(link.theirs):
                self._places.setdefault(name, []).append((link, part))

    def read(self, name: str) -> Tensor:
        """A tensor.

        Raises:
            ConfigError: two tensors of the model are one in the original, and differ.
            CheckpointError: a tensor that was kept is missing.
        """
        name = self._aliases.get(name, name)
        if name not in self._places:
            return self._kept(name)
        first, *others = [self._part(link, part) for link, part in self._places[name]]
        if any(not torch.equal(first, other) for other in others):
            what = f"{name} is one tensor in transformers, and source and target embeddings of this model differ"
            raise ConfigError(what, remedy="export with format=moe_train")
        return first

    def _part(self, link: Link, part: int) -> Tensor:
        ours = self._ours[link.ours]
        return (ours.t() if link.transposed else ours).chunk(len(link.theirs))[part]

    def _kept(self, name: str) -> Tensor:
        for path in sorted(self._source.glob("model*.safetensors")):
            with safe_open(path, "pt") as file:
                if f"{ORIGINAL}.{name}" in file.keys():  # noqa: SIM118
                    return file.get_tensor(f"{ORIGINAL}.{name}")  # type: ignore[no-any-return]
        raise CheckpointError(f"the tensor '{ORIGINAL}.{name}' is missing", str(self._source), "import the model again")


def _types(path: Path) -> Mapping[str, torch.dtype]:
    """Names and types of the original's tensors."""
    try:
        content = entry(read_object(path) or {}, "tensors", dict)
        return {str(name): _TYPES[kind] for name, kind in content.items()}
    except (ValueError, LookupError, TypeError, DataError) as error:
        raise CheckpointError(f"the file is damaged ({error})", str(path), "import the model again") from error

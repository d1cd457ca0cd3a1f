"""``moe-import``: makes a model folder, as moe-export writes them, of a Hugging Face folder, file by file.

OUT/
  model.safetensors …    model.<parameter>, and huggingface.<name>: tensors that the model does not compute with
  config.json, data/     as in an export
  huggingface/           the original config and tokenizer, and tensors.json: names and types of all its tensors
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import moe_train
from moe_train.config import ModelConfig, RunConfig, TaskConfig, to_mapping
from moe_train.config.evaluation import ImportConfig
from moe_train.conversion.family import PAD, Family, Link, Settings, families
from moe_train.conversion.hf_tensors import TensorFiles
from moe_train.conversion.hf_vocabulary import FILES, SPECIAL, HfVocabulary, read_vocabulary
from moe_train.data.manifest import BY_NAME, Manifest, describe_files
from moe_train.errors import CheckpointError, ConfigError, did_you_mean
from moe_train.evaluation.model_folder import check_free, new_model_folder
from moe_train.models import build_model
from moe_train.routing.registry import routing_config
from moe_train.safe_text import for_markdown
from moe_train.training.checkpoint import checksums
from moe_train.training.checkpoint.state_dict import model_tensors
from moe_train.training.checkpoint.tensor_shards import plan_shards, write_index
from moe_train.training.run.run_folder import CONFIG
from moe_train.training.run.run_folder import EXPORTED_DATA as DATA
from moe_train.utils.json_files import read_object

ORIGINAL = "huggingface"  # the folder of original files, and the prefix of tensors kept with the weights
TENSORS = "tensors.json"
BIAS = "final_logits_bias"
_KEPT = (CONFIG, "generation_config.json", *FILES)
_FP32 = 4  # bytes
_TASK_KEYS = ("source_tag", "target_tag", "source_tag_place", "target_tag_place")


@dataclass(frozen=True)
class HfModel:
    """A Hugging Face folder, read and checked but for the values of its tensors.

    Attributes:
        links: every tensor of our model.
        kept: their tensors that our model does not compute with.
    """

    folder: Path
    family: Family
    model: ModelConfig
    routing: Mapping[str, Any]
    vocabulary: HfVocabulary
    files: TensorFiles
    links: tuple[Link, ...]
    kept: tuple[str, ...]


@dataclass(frozen=True)
class Entries:
    """A dictionary of which a model needs only the size."""

    size: int

    def __len__(self) -> int:
        return self.size

    def pad(self) -> int:
        """Index of padding."""
        return PAD


def import_model(config: ImportConfig) -> Path:
    """Imports a folder and returns the new one, which is written atomically.

    Raises:
        ConfigError: the model is of another kind, has a value that is not supported, or the target exists already.
        CheckpointError: the weights are missing, damaged, or not those of the config.
        DataError: the tokenizer is missing, damaged, or not supported.
    """
    out, source = Path(config.out), Path(config.hf)
    check_free(out, "import")
    found = open_hf(source)
    with new_model_folder(out, "import", "model") as folder:
        _write(found, folder, int(config.shard_mb * 10**6) if config.shard_mb else found.files.largest)
    return out


def open_hf(folder: Path) -> HfModel:
    """Reads config, tokenizer and names of tensors; raises as :func:`import_model`."""
    path = folder / CONFIG
    content = read_object(path)
    if content is None:
        raise ConfigError("this is no Hugging Face folder: config.json is missing", str(folder), "correct hf=…")
    settings = Settings(content, str(path))
    kind = settings.get("model_type", str)
    if kind not in (known := families()):
        raise ConfigError(f"model_type={kind!r:.60} cannot be imported", str(path), did_you_mean(kind, known))
    family = known[kind]
    family.check(settings)
    model, routing = family.model(settings), family.routing(settings)
    vocabulary = read_vocabulary(folder, settings.get("vocab_size", int))
    files = TensorFiles(folder)
    links = tuple(_named(link, files.files, family.aliases(model)) for link in family.links(model, routing))
    used = {name for link in links for name in link.theirs} | family.aliases(model).keys()
    rest = sorted(files.files.keys() - used - set(family.aliases(model).values()))
    if unknown := [name for name in rest if not family.is_unused(name)]:
        what = f"{len(unknown)} tensors have no place in the model ({', '.join(unknown[:3])})"
        raise CheckpointError(what, str(folder), f"it is no {family.architecture}")
    if BIAS in rest and files.read(BIAS).any():
        raise CheckpointError(f"{BIAS} is not zero, which is not supported", str(folder))
    found = HfModel(folder, family, model, routing, vocabulary, files, links, tuple(rest))
    _check_shapes(found)
    return found


def _named(link: Link, known: Iterable[str], aliases: Mapping[str, str]) -> Link:
    """The link with names that the files have: a tied tensor may have been saved under any of its names."""

    return Link(link.ours, tuple(chosen_name(name, known, aliases) for name in link.theirs), link.transposed)


def chosen_name(name: str, known: Iterable[str], aliases: Mapping[str, str]) -> str:
    """The first name of a tensor that the files have."""
    others = (alias for alias, base in aliases.items() if base == name)
    return next((one for one in (name, *others) if one in known), name)


def _check_shapes(found: HfModel) -> None:
    """Compares the shapes of all tensors with those of the model, before anything is read or written.

    Raises:
        CheckpointError: a tensor is missing, or has another shape.
    """
    entries = Entries(len(found.vocabulary.symbols) + len(SPECIAL))
    with torch.device("meta"):
        model = build_model(found.model, routing_config(found.routing), entries, entries, seed=1)
    wanted, known = model_tensors(model), found.files.shapes
    for link in found.links:
        if missing := next((name for name in link.theirs if name not in known), None):
            raise CheckpointError(f"the tensor '{missing}' is missing", str(found.folder), "restore the folder")
        parts = [known[name] for name in link.theirs]
        shape = (sum(part[0] for part in parts if part), *parts[0][1:])
        if tuple(wanted[link.ours].shape) != (shape[::-1] if link.transposed else shape):
            what = f"the tensor '{link.theirs[0]}' is {list(parts[0])}, which is not what config.json says"
            raise CheckpointError(what, str(found.folder), "restore the folder")


def read_link(link: Link, files: TensorFiles) -> Tensor:
    """The tensor of a link in fp32."""
    whole = torch.cat([files.read(name).float() for name in link.theirs])
    return (whole.t() if link.transposed else whole).contiguous()


def _write(found: HfModel, folder: Path, limit: int) -> None:
    types = _write_tensors(found, folder, limit)
    original = folder / ORIGINAL
    original.mkdir()
    for name in _KEPT:
        if (found.folder / name).is_file():
            shutil.copyfile(found.folder / name, original / name)
    checksums.write_synced(original / TENSORS, json.dumps({"format": 1, "tensors": types}, indent=1) + "\n")
    directions = tuple(f"{one}-{other}" for one, other in permutations(found.vocabulary.languages, 2))
    _write_data(found.vocabulary, folder / DATA, directions)
    task = TaskConfig(
        source_tag="source",
        target_tag="target",
        source_tag_place=found.vocabulary.source_tag_place,
        target_tag_place="after_end",
    )
    run = RunConfig(data=DATA, model=found.model, routing=dict(found.routing), task=task)
    name = found.folder.resolve().name
    content = {
        "format": 1,
        "config": to_mapping(run),
        "exported": {"run": name, "checkpoint": ORIGINAL, "update": None, "moe_train": moe_train.__version__},
        "vocabulary": {file: digest["sha256"] for file, digest in Manifest.read(folder / DATA).files.items()},
        "trained": list(directions),
    }
    checksums.write_synced(folder / CONFIG, json.dumps(content, indent=1) + "\n")
    checksums.write_synced(folder / "README.md", _readme(name, found, task))
    described = describe_files(folder)
    manifest = folder / DATA / checksums.MANIFEST
    described[manifest.relative_to(folder).as_posix()] = checksums.digest(manifest)
    checksums.write_manifest(folder, described)
    checksums.sync_folder(folder)


def _write_tensors(found: HfModel, folder: Path, limit: int) -> dict[str, str]:
    """Writes the weights; returns the type of every tensor of the original."""
    from safetensors.torch import save_file

    links = {link.ours: link for link in found.links}
    links |= {f"{ORIGINAL}.{name}": Link(f"{ORIGINAL}.{name}", (name,)) for name in found.kept}
    shapes = found.files.shapes
    sizes = {ours: sum(_FP32 * torch.Size(shapes[n]).numel() for n in link.theirs) for ours, link in links.items()}
    shards = plan_shards(sizes, limit)
    types: dict[str, str] = {}
    for file, names in shards.items():
        tensors: dict[str, Tensor] = {}
        for ours in names:
            for name in links[ours].theirs:
                types[name] = str(found.files.read(name).dtype).removeprefix("torch.")
            tensors[ours] = read_link(links[ours], found.files)
        save_file(tensors, folder / file, metadata={"format": "pt"})
    write_index(folder, shards, sum(sizes.values()))
    aliases = found.family.aliases(found.model)
    for name, base in {**aliases, **{base: base for base in aliases.values()}}.items():
        if name in shapes and name not in types:
            types[name] = _tied(name, chosen_name(base, shapes, aliases), found.files)
    return dict(sorted(types.items()))


def _tied(name: str, other: str, files: TensorFiles) -> str:
    """The type of a tensor that must be equal to another one.

    Raises:
        CheckpointError: it is not.
    """
    tensor = files.read(name)
    if not torch.equal(tensor, files.read(other)):
        what = f"{name} and {other} differ, and are one tensor by tie_word_embeddings"
        raise CheckpointError(what, str(files.folder), "correct tie_word_embeddings in config.json")
    return str(tensor.dtype).removeprefix("torch.")


def _write_data(vocabulary: HfVocabulary, folder: Path, directions: tuple[str, ...]) -> None:
    """Writes tokenizer and dictionary as a data folder without sentences."""
    folder.mkdir()
    shutil.copyfile(vocabulary.sentencepiece, folder / "spm.model")
    lines = "".join(f"{symbol} 1\n" for symbol in vocabulary.symbols)
    (folder / "dict.txt").write_text(lines, encoding="utf-8", newline="\n")
    Manifest(
        corpus="imported",
        languages=vocabulary.languages,
        directions=directions,
        counts={},
        vocabulary=len(vocabulary.symbols) + len(SPECIAL),
        settings={"vocabulary": {"ids": BY_NAME}},
        tiers={},
        versions={"moe_train": moe_train.__version__},
        files=describe_files(folder),
    ).write(folder)


def _readme(name: str, found: HfModel, task: TaskConfig) -> str:
    """Markdown text: origin and use."""
    ours, plain = to_mapping(found.model), to_mapping(ModelConfig())
    keys = [f"model.{key}={value}" for key, value in ours.items() if value != plain[key]]
    keys += [f"task.{key}={getattr(task, key)}" for key in _TASK_KEYS]
    keys += [f"routing.{key}={value}" for key, value in found.routing.items() if key != "name"]
    lines = [
        f"# {for_markdown(name)}",
        "",
        f"{found.family.architecture} of Hugging Face transformers, imported by moe_train {moe_train.__version__}.",
        "",
        "    moe-translate run=HERE source=en target=de < text",
        "    moe-evaluate run=HERE data=DATA      (a data folder prepared with vocabulary.reuse=HERE/data)",
        "    moe-export run=HERE out=OUT format=huggingface",
        "",
        "To fine-tune it on DATA (`routing=` may be any strategy if it is dense, docs/fine-tuning.md):",
        "",
        f"    moe-train data=DATA training.init_from=HERE routing={found.routing['name']} \\",
        *(f"      {key} \\" for key in keys[:-1]),
        f"      {keys[-1]}",
    ]
    return "\n".join(lines) + "\n"

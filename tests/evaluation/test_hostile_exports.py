"""Exports and checkpoints that somebody has altered on purpose, checksums and all: one error, with the file's name."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moe_train.errors import CheckpointError, ConfigError, UserError
from moe_train.evaluation.loading import open_run
from moe_train.training.checkpoint.checksums import digest
from moe_train.training.checkpoint.init_from import initialise_from
from moe_train.training.checkpoint.store import read_state
from moe_train.training.run.run_folder import RunFolder

OLD = Path(__file__).parents[1] / "old_runs"
DEEP = '{"files": ' + "[" * 100_000 + "]" * 100_000 + "}"
WEIGHTS = "model.safetensors"

Change = Callable[[Path], None]


@pytest.fixture
def export(tmp_path: Path) -> Path:
    return Path(shutil.copytree(OLD / "export", tmp_path / "export"))


def sealed(folder: Path) -> Path:
    """The folder with the checksums that its files have now."""
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"] = {name: digest(folder / name) for name in manifest["files"] if (folder / name).exists()}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def refusal(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        open_run(folder).load()
    assert len(str(caught.value).splitlines()) == 1 and len(str(caught.value)) < 600
    return str(caught.value)


def test_what_is_not_altered_is_opened(export: Path) -> None:
    assert open_run(sealed(export)).load().model is not None


# --- manifests --------------------------------------------------------------------------------------------------------


def listed(files: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """What may stand in place of a manifest's files."""
    entry = files[WEIGHTS]
    yield "none", {}
    yield "a list", list(files)
    yield "no weights", {name: value for name, value in files.items() if name != WEIGHTS}
    yield "no config", {name: value for name, value in files.items() if name != "config.json"}
    yield "no data manifest", {name: value for name, value in files.items() if name != "data/manifest.json"}
    yield "no checksum", {**files, WEIGHTS: {"bytes": entry["bytes"]}}
    yield "a number as checksum", {**files, WEIGHTS: {**entry, "sha256": 5}}
    yield "a text as size", {**files, WEIGHTS: {**entry, "bytes": "5"}}
    yield "a list as entry", {**files, WEIGHTS: [entry]}
    yield "a path outside", {**files, "../config.json": entry}
    yield "an absolute path", {**files, "/etc/hostname": entry}
    yield "no path", {**files, "": entry}
    yield "a zero byte", {**files, "a\0b": entry}


_FILES = json.loads((OLD / "export" / "manifest.json").read_text())["files"]


@pytest.mark.parametrize(
    ("name", "files"), list(listed(_FILES)), ids=lambda part: part if isinstance(part, str) else ""
)
def test_manifests(name: str, files: Any, export: Path) -> None:
    (export / "manifest.json").write_text(json.dumps({"format": 1, "files": files}))
    assert refusal(export).startswith(f"{export / 'manifest.json'}: the checkpoint's manifest ")


@pytest.mark.parametrize("text", ["", "[]", "null", "5", '"x"', "{}", DEEP, '{"files": ' + "9" * 5000 + "}", "\udcff"])
@pytest.mark.parametrize("file", ["manifest.json", "config.json", "data/manifest.json"])
def test_no_file_of_json_ends_in_a_traceback(file: str, text: str, export: Path) -> None:
    (export / file).write_bytes(text.encode("utf-8", "surrogateescape"))
    assert str(export / file) in refusal(sealed(export) if file != "manifest.json" else export)


# --- sizes and values of the config -----------------------------------------------------------------------------------

HUGE = 10**9
SIZES = {
    "model.encoder_layers": HUGE,
    "model.decoder_layers": HUGE,
    "model.embed_dim": HUGE,
    "model.ffn_dim": HUGE,
    "model.max_positions": 10**15,
    "routing.num_experts": HUGE,
    "routing.expert_ffn_dim": HUGE,
    "model.num_heads": -1,
    "model.embed_dim ": 10**30,
    "model.sparse_layers": "all",
    "model.decoder_sparse_layers": [HUGE],
    "model.name": "vision_transformer",
}


def with_value(folder: Path, key: str, value: Any) -> Path:
    content = json.loads((folder / "config.json").read_text())
    place = content["config"]
    *groups, last = key.strip().split(".")
    for group in groups:
        place = place[group]
    place[last] = value
    (folder / "config.json").write_text(json.dumps(content))
    return sealed(folder)


@pytest.mark.parametrize("key", SIZES)
def test_sizes_that_are_not_the_checkpoints(key: str, export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is built: no tensor of a model takes memory."""
    from moe_train.tasks.translation.task import TranslationTask

    build = TranslationTask.build_model

    def only_without_memory(self: TranslationTask, layout: Any = None) -> Any:
        assert torch.empty(0).device.type == "meta", "a model was built"
        return build(self, layout)

    monkeypatch.setattr(TranslationTask, "build_model", only_without_memory)
    assert refusal(with_value(export, key, SIZES[key])).startswith(f"{export / 'config.json'}: ")


def replaced(value: Any, other: Any) -> Iterator[tuple[str, Any]]:
    """A mapping with each of its values replaced, groups of keys too, one at a time; and the name of the key."""
    for key, inner in value.items():
        yield key, {**value, key: other}
        if isinstance(inner, dict):
            yield from ((f"{key}.{name}", {**value, key: changed}) for name, changed in replaced(inner, other))


_CONFIG = json.loads((OLD / "export" / "config.json").read_text())["config"]
_OTHERS = ({"a": 1}, ["a"], "a", True, 0.5, None, 10**30, -1, 1e308, [[1]])


@pytest.mark.parametrize("other", _OTHERS, ids=str)
def test_values_of_another_type(other: Any, tmp_path: Path) -> None:
    """One that is refused names the file; others are as good as what stood there."""
    refused = 0
    for key, config in replaced(_CONFIG, other):
        (tmp_path / "config.json").write_text(json.dumps({"format": 1, "config": config}))
        try:
            RunFolder.open(tmp_path).config  # noqa: B018
        except ConfigError as error:
            assert error.where == str(tmp_path / "config.json") and len(str(error)) < 900, key
            refused += 1
    assert refused > 8


# --- weights ----------------------------------------------------------------------------------------------------------


def header(folder: Path) -> dict[str, Any]:
    data = (folder / WEIGHTS).read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    found: dict[str, Any] = json.loads(data[8 : 8 + length])
    return found


def rewrite(folder: Path, text: str | bytes, length: int | None = None) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (before,) = struct.unpack("<Q", data[:8])
    text = text.encode() if isinstance(text, str) else text
    said = struct.pack("<Q", len(text) if length is None else length)
    (folder / WEIGHTS).write_bytes(said + text + data[8 + before :])


def changed_tensor(folder: Path, **changes: Any) -> None:
    found = header(folder)
    name = next(name for name in found if name != "__metadata__")
    rewrite(folder, json.dumps({**found, name: {**found[name], **changes}}))


def sharded(folder: Path, places: Any) -> None:
    """As torch's distributed checkpoints say where a part begins."""
    found = header(folder)
    text = places if isinstance(places, str) else json.dumps(places)
    rewrite(folder, json.dumps({**found, "__metadata__": {"DCP_SHARDING_INFO": text}}))


def places(folder: Path, value: Any) -> dict[str, Any]:
    return {name: {"saved_offsets": value} for name in header(folder) if name != "__metadata__"}


def another_type(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    save_file({name: tensor.reshape(-1) for name, tensor in tensors.items()}, folder / WEIGHTS)


HEADERS: dict[str, Change] = {
    "empty": lambda f: (f / WEIGHTS).write_bytes(b"") and None,
    "short": lambda f: (f / WEIGHTS).write_bytes(b"abc") and None,
    "a length without end": lambda f: rewrite(f, "{}", 1 << 63),
    "a length beyond the file": lambda f: rewrite(f, "{}", 1 << 24),
    "no JSON": lambda f: rewrite(f, "{nothing"),
    "no text": lambda f: rewrite(f, b"\xff\xfe"),
    "a list": lambda f: rewrite(f, "[]"),
    "no tensors": lambda f: rewrite(f, "{}"),
    "deep": lambda f: rewrite(f, '{"a": ' + "[" * 10_000 + "]" * 10_000 + "}"),
    "offsets beyond the file": lambda f: changed_tensor(f, data_offsets=[0, 1 << 40]),
    "negative offsets": lambda f: changed_tensor(f, data_offsets=[-1, 5]),
    "an unknown type": lambda f: changed_tensor(f, dtype="X7"),
    "a huge shape": lambda f: changed_tensor(f, shape=[1 << 62, 4]),
    "an empty huge shape": lambda f: changed_tensor(f, shape=[0, (1 << 63) - 1], data_offsets=[0, 0]),
    "a text as shape": lambda f: changed_tensor(f, shape="5"),
    "other shapes": another_type,
    "deep places": lambda f: sharded(f, "[" * 100_000),
    "a list of places": lambda f: sharded(f, []),
    "no places": lambda f: sharded(f, {"a": 1}),
    "places as text": lambda f: sharded(f, places(f, "0")),
    "places that are too few": lambda f: sharded(f, places(f, [])),
    "huge places": lambda f: sharded(f, places(f, [1 << 40, 1 << 40])),
    "endless places": lambda f: sharded(f, places(f, [1 << 70])),
}


@pytest.mark.parametrize("name", HEADERS)
def test_weights(name: str, export: Path) -> None:
    HEADERS[name](export)
    assert str(export) in refusal(sealed(export))


def test_a_run_cannot_begin_with_it(export: Path, tmp_path: Path) -> None:
    """``training.init_from`` reads shapes before anything else, and makes room for what they say."""
    model = open_run(export).load().model
    for name in ("huge places", "deep places", "empty"):
        copy = Path(shutil.copytree(OLD / "export", tmp_path / name))
        HEADERS[name](copy)
        with pytest.raises(CheckpointError, match=r"export|places|empty"):
            initialise_from(model, str(sealed(copy)))


def test_weights_that_the_manifest_does_not_list(export: Path) -> None:
    """All files of weights in a folder are read, whatever the manifest says."""
    save_file({"model.more": torch.ones(2)}, export / "more.safetensors")
    assert "no checksum of more.safetensors" in refusal(export)


def test_states_of_checkpoints(tmp_path: Path) -> None:
    for text in ("", "[]", DEEP, "5"):
        (tmp_path / "state.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"state\.json: "):
            read_state(tmp_path)

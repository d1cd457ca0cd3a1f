"""Folders of Hugging Face that cannot be imported, and weights in PyTorch's own files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from moe_train.config.evaluation import ImportConfig
from moe_train.conversion.import_model import import_model
from moe_train.errors import UserError
from tests.conversion import hf_models as hf


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small M2M-100 in several files, with a bias of the output."""
    folder = tmp_path_factory.mktemp("errors")
    used = hf.save_m2m100_tokenizer(folder, hf.train_pieces(folder))
    hf.save_model(folder, "M2M100", used, encoder_layers=1, decoder_layers=1)
    return folder


def edited(name: str, **keys: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**content, **keys}))

    return edit


def replaced(name: str, content: bytes | None) -> Callable[[Path], None]:
    def replace(folder: Path) -> None:
        path = next(folder.glob(name))
        path.unlink()
        if content is not None:
            path.write_bytes(content)

    return replace


def pickled(folder: Path) -> None:
    for path in folder.glob("model*.safetensors*"):
        path.unlink()
    torch.save({"model.shared.weight": Path("/")}, folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (replaced("config.json", None), r"config\.json is missing"),
        (replaced("config.json", b"["), "the file is damaged"),
        (edited("config.json", model_type="t5"), "model_type='t5' cannot be imported"),
        (edited("config.json", activation_function="silu"), "activation_function='silu' is not supported"),
        (edited("config.json", scale_embedding=False), "scale_embedding=False is not supported"),
        (edited("config.json", decoder_ffn_dim=64), "decoder_ffn_dim=64 is not supported, only 48"),
        (edited("config.json", d_model="32"), "'d_model' cannot be '32'"),
        (edited("config.json", encoder_ffn_dim=64, decoder_ffn_dim=64), "which is not what config.json says"),
        (edited("config.json", encoder_layers=2), r"'model\.encoder\.layers\.1\.\S+' is missing"),
        (edited("config.json", vocab_size=150), "the tokenizer has 199 entries, and the model 150"),
        (edited("config.json", vocab_size=250), "which is not what config.json says"),
        (
            edited("tokenizer_config.json", tokenizer_class="T5Tokenizer"),
            "'T5Tokenizer' is not supported",
        ),
        (edited("tokenizer_config.json", language_codes="mine"), "language_codes='mine' is not supported"),
        (edited("vocab.json", **{"<pad>": 5}), "two symbols have one id"),
        (edited("vocab.json", **{"<pad>": 4000}), "special symbols in another order: 1 is None"),
        (replaced("sentencepiece.bpe.model", None), "the SentencePiece model is missing"),
        (replaced("sentencepiece.bpe.model", b"no"), "cannot read the SentencePiece model"),
        (replaced("model-00002*", None), r"model-00002\S+ of the index is missing"),
        (replaced("model-00002*", b"no"), "header cannot be read"),
        (edited("model.safetensors.index.json", weight_map={"a": "../b.safetensors"}), "is not a file of the folder"),
        (pickled, "it holds more than tensors, which could be code"),
    ],
)
def test_a_folder_that_cannot_be_imported_is_one_clear_error(
    folder: Path, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    damage(copy)
    with pytest.raises(UserError, match=message):
        import_model(ImportConfig(str(copy), str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_weights_of_pytorch_files_are_read_as_data(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    state = {k: v for path in copy.glob("*.safetensors") for k, v in load_file(path).items()}
    for path in copy.glob("model*.safetensors*"):
        path.unlink()
    bias = {"final_logits_bias": torch.zeros(1, len(state["model.shared.weight"]))}
    torch.save({**state, "lm_head.weight": state["model.shared.weight"], **bias}, copy / "pytorch_model.bin")
    outs = (ImportConfig(str(path), str(tmp_path / path.name / "out"), shard_mb=9.0) for path in (folder, copy))
    one, other = map(import_model, outs)
    first, second = (load_file(path / "model.safetensors") for path in (one, other))
    assert second.keys() - first.keys() == {"huggingface.final_logits_bias"}
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    torch.save({**state, "final_logits_bias": bias["final_logits_bias"] + 1}, copy / "pytorch_model.bin")
    with pytest.raises(UserError, match="final_logits_bias is not zero"):
        import_model(ImportConfig(str(copy), str(tmp_path / "third")))

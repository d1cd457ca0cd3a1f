"""Import and export give back every tensor bit for bit, and transformers opens the result."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from moe_train.config.evaluation import ExportConfig, ImportConfig
from moe_train.conversion.export_huggingface import export_huggingface
from moe_train.conversion.import_model import import_model
from moe_train.data.folder import DataFolder
from moe_train.errors import ConfigError
from tests.conversion import hf_models as hf
from tests.evaluation.runs import make_run


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("model*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.parametrize(
    ("kind", "keys", "half"),
    [
        ("M2M100", {}, True),
        ("M2M100", {"tie_word_embeddings": False}, False),
        ("NllbMoe", hf.EXPERTS, False),
    ],
)
def test_import_and_export_give_back_every_tensor(tmp_path: Path, kind: str, keys: dict[str, Any], half: bool) -> None:
    folder, model, out = tmp_path / "original", tmp_path / "model", tmp_path / "out"
    folder.mkdir()
    used = hf.save_nllb_tokenizer(folder, hf.train_pieces(tmp_path))
    theirs = hf.save_model(folder, kind, used, **keys)
    if half:
        theirs.half().save_pretrained(folder)
    import_model(ImportConfig(str(folder), str(model)))
    export_huggingface(ExportConfig(str(model), str(out), shard_mb=0.1))
    before, after = tensors(folder), tensors(out)
    assert before.keys() == after.keys() and any(name.endswith("k_proj.bias") for name in after)
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype and torch.equal(tensor, after[name]), name
    if "tie_word_embeddings" in keys:  # transformers saves the embeddings once and then opens it with random ones
        return
    library = hf.transformers()
    one, other = (library.AutoModelForSeq2SeqLM.from_pretrained(path).float().eval() for path in (folder, out))
    tokenizer = library.AutoTokenizer.from_pretrained(out, use_fast=False)
    inputs = hf.encode(tokenizer, "eng_Latn", hf.SENTENCES)
    tag = tokenizer.convert_tokens_to_ids("deu_Latn")
    assert hf.generate(other, inputs, tag, 2) == hf.generate(one, inputs, tag, 2)


def test_what_transformers_has_not_is_refused(tmp_path: Path, tiny_data: DataFolder) -> None:
    with pytest.raises(ConfigError, match="only models of moe-import"):
        export_huggingface(ExportConfig(str(make_run(tmp_path / "own", tiny_data)), str(tmp_path / "out")))
    folder, model = tmp_path / "original", tmp_path / "model"
    folder.mkdir()
    used = hf.save_m2m100_tokenizer(folder, hf.train_pieces(tmp_path))
    hf.save_model(folder, "NllbMoe", used, **hf.EXPERTS)
    import_model(ImportConfig(str(folder), str(model)))
    config = json.loads((model / "huggingface" / "config.json").read_text())
    (model / "huggingface" / "config.json").write_text(json.dumps({**config, "moe_token_dropout": 0.0}))
    listed = json.loads((model / "manifest.json").read_text())
    del listed["files"]["huggingface/config.json"]
    (model / "manifest.json").write_text(json.dumps(listed))
    with pytest.raises(ConfigError, match=r"routing\.expert_output_masking=0\.2 is not the function"):
        export_huggingface(dataclasses.replace(ExportConfig(str(model), str(tmp_path / "out"))))
    assert not (tmp_path / "out").exists()

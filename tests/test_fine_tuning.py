"""The commands of docs/fine-tuning.md, run one after the other."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moe_train.commands import export, prepare, train
from moe_train.training.checkpoint.dcp import read_tensors
from moe_train.training.checkpoint.init_from import find
from tests.data.tiny_corpus import sentence, sentences, write_corpus

PAGE = Path(__file__).parents[1] / "docs" / "fine-tuning.md"
COMMANDS = {"moe-train": train, "moe-prepare": prepare, "moe-export": export}
FEW = {  # words that make a command quick
    "moe-train": [
        *("model.embed_dim=16", "model.ffn_dim=32", "model.num_heads=2", "model.encoder_layers=2"),
        *("model.decoder_layers=2", "training.max_updates=1", "training.tokens_per_update=128", "training.threads=1"),
        *("training.schedule.warmup_updates=1", "training.validation.max_sentences=4"),
    ],
    "moe-prepare": ["workers=1"],
    "moe-export": [],
}


def commands() -> list[list[str]]:
    found = re.findall(r"^ {4}(moe-.*)$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return [shlex.split(line) for line in found]


def call(monkeypatch: pytest.MonkeyPatch, name: str, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", [name, *words])
    monkeypatch.setattr("hydra._internal.utils.is_under_debugger", lambda: False)
    COMMANDS[name].main()


def weights(place: str) -> dict[str, Tensor]:
    return dict(read_tensors(find(place), "model."))


def test_the_commands_do_what_the_page_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_corpus(tmp_path / "text" / "first", ("de", "fr"), train=100, valid=8, test=8)
    more = tmp_path / "text" / "more"
    more.mkdir()
    for split, count, start in (("train", 100, 300), ("valid", 8, 500)):
        for code in ("de", "fr"):
            text = "".join(f"{sentence(code, *parts)}\n" for parts in sentences(count, start))
            (more / f"{split}.de-fr.{code}").write_text(text, encoding="utf-8")
    threads = torch.get_num_threads()
    try:
        for name, *words in commands():
            first = name == "moe-prepare" and not any(word.startswith("vocabulary.reuse") for word in words)
            call(monkeypatch, name, *words, *FEW[name], *(["vocabulary.size=400"] if first else []))
    finally:
        torch.set_num_threads(threads)
    assert len(commands()) == 10
    base, frozen, tuned = (weights(f"outputs/{name}") for name in ("base", "frozen", "tuned"))
    routed = {key for key in base if ".pool." in key or ".router." in key}
    kept = {key for key in base if torch.equal(base[key], frozen[key])}
    assert routed and routed <= kept and len(kept) < len(base)
    assert all((tuned[key] - base[key]).abs().max() < 1e-3 for key in base), "an update at 1e-4 stays near the start"
    for code in ("de", "ja"):
        (more / f"train.de-ja.{code}").write_text("das Haus\n" * 20, encoding="utf-8")
    again = ["corpus=text", f"corpus.path={more}", "vocabulary.reuse=data-bin/first", "out=data-bin/again"]
    with pytest.raises(SystemExit):
        call(monkeypatch, "moe-prepare", *again)
    assert "has no language 'ja'. Restrict corpus.languages to de, en, fr" in capsys.readouterr().err

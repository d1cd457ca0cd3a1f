"""``moe-prepare`` as a user runs it: the words on the screen and the exit codes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from moe_train.data.folder import DataFolder
from tests.data import tiny_corpus

pytestmark = pytest.mark.processes


def moe_prepare(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "moe_train.commands.prepare", *words]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=200)


def test_makes_a_folder_and_keeps_it(tmp_path: Path) -> None:
    tiny_corpus.write_corpus(tmp_path / "corpus", targets=("de", "fr"), train=100)
    words = ("corpus=text", "corpus.path=corpus", "out=data-bin/tiny", "vocabulary.size=350", "workers=1")
    done = moe_prepare(tmp_path, *words)
    assert done.returncode == 0, done.stderr
    assert "en-de" in done.stdout and "3 languages, 4 directions, vocabulary 357" in done.stdout
    folder = DataFolder.open(tmp_path / "data-bin" / "tiny", verify=True)
    assert folder.manifest.counts["train"] == {"en-de": 100, "en-fr": 100}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus", "data-bin"]
    again = moe_prepare(tmp_path, *words)
    assert again.returncode == 0 and "nothing to do" in again.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("corpus=text", "corpus.path=nowhere", "out=x"), "nowhere: the corpus folder does not exist"),
        (("corpus=txet", "out=x"), "there is no corpus 'txet'. Did you mean 'text'?"),
        (("corpus=l10n",), "the key 'out' has no value"),
        (("corpus=text", "out=x", "corpus.clean.script=false"), "unknown key 'corpus.clean.script'"),
        (("corpus=text", "out=x", "vocabulary.size=huge"), "'vocabulary.size' must be a whole number"),
    ],
)
def test_mistakes_are_one_message_and_exit_code_2(tmp_path: Path, words: tuple[str, ...], message: str) -> None:
    done = moe_prepare(tmp_path, *words)
    assert done.returncode == 2
    assert done.stderr.startswith("Error: ") and message in done.stderr
    assert len(done.stderr.strip().split("\n")) == 1
    assert list(tmp_path.iterdir()) == []

"""From a folder of text to a data folder: splits, overlap, determinism, atomic output, and every mistake of a user."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from moe_train.config import build
from moe_train.config.corpus import CorpusConfig, PrepareConfig
from moe_train.data.corpora.mono import read_mono
from moe_train.data.corpora.text import texts_of_folder
from moe_train.data.folder import DataFolder
from moe_train.data.prepare.contamination import HeldOut, blank_note
from moe_train.data.prepare.pipeline import prepare
from moe_train.data.prepare.summary import print_summary
from moe_train.data.stage_progress import Progress
from moe_train.data.text.dedup_keys import fold
from moe_train.data.text.lines import write_lines
from moe_train.errors import ConfigError, DataError
from tests.data import tiny_corpus
from tests.killed import killed_before


def settings(folder: Path, out: Path, /, **changes: Any) -> PrepareConfig:
    """A small config; ``changes`` are dotted keys with __ for the dot."""
    mapping: dict[str, Any] = {
        "out": str(out),
        "corpus": {"name": "text", "path": str(folder), "cleaning": {}, "split": {}},
        "vocabulary": {"size": 375, "character_coverage": 1.0},
        "workers": 1,
    }
    for key, value in changes.items():
        *groups, name = key.split("__")
        place = mapping
        for group in groups:
            place = place.setdefault(group, {})
        place[name] = value
    return build(PrepareConfig, mapping)


def content(folder: Path) -> Mapping[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return tiny_corpus.write_corpus(tmp_path / "corpus", targets=("de", "fr"), train=120, valid=10, test=10)


@pytest.fixture
def unsplit(tmp_path: Path) -> Path:
    """en-de and en-fr with the same English, de-fr with others; some German sentences translate two English ones."""
    folder = tmp_path / "unsplit"
    folder.mkdir()
    for number, (source, target) in enumerate((("en", "de"), ("en", "fr"), ("de", "fr"))):
        parts = tiny_corpus.sentences(300, start=0 if source == "en" else 200)
        for language in (source, target):
            lines = [tiny_corpus.sentence(language, *part) for part in parts]
            if language == "de" and number == 0:
                lines[150:] = lines[:150]
            write_lines(folder / f"{source}-{target}.{language}", lines)
    return folder


def test_the_same_bytes_twice_and_with_any_number_of_workers(unsplit: Path, tmp_path: Path) -> None:
    first = prepare(settings(unsplit, tmp_path / "a", corpus__split={"valid": 0.1, "test": 0.1}))
    again = prepare(settings(unsplit, tmp_path / "b", corpus__split={"valid": 0.1, "test": 0.1}, workers=2))
    assert content(first.path) == content(again.path)
    other = prepare(settings(unsplit, tmp_path / "c", corpus__split={"valid": 0.1, "test": 0.1}, seed=2))
    assert other.raw("test", "en-de") != first.raw("test", "en-de")


@pytest.mark.processes
def test_many_blocks_through_many_processes_keep_their_order(corpus: Path, tmp_path: Path) -> None:
    from moe_train.config.corpus import CleaningConfig
    from moe_train.data.corpora.text import texts_of_folder
    from moe_train.data.prepare.cleaned import clean_text
    from moe_train.utils.process_map import Workers

    text = next(text for text in texts_of_folder(corpus) if text.name == "train.en-de")
    numbered = [
        (f"{source} Number {i} here.", f"{target} Nummer {i} hier.") for i, (source, target) in enumerate(text.read())
    ]
    many = dataclasses.replace(text, read=lambda: iter(numbered * 100))
    with Workers(2) as workers:
        cleaned = clean_text(many, CleaningConfig(), tmp_path, workers)
    assert cleaned.size == cleaned.counts["read"] == 12000
    assert list(cleaned.lines("en")) == [source for source, _ in numbered] * 100
    assert list(cleaned.lines("de")) == [target for _, target in numbered] * 100


@pytest.mark.processes
def test_a_ctrl_c_reaches_no_worker() -> None:
    """A terminal sends it to all processes, and each would print a traceback: the parent ends them."""
    from moe_train.utils.process_map import Workers

    with Workers(2) as workers:
        blocked = list(workers.map(functools.partial(signal.pthread_sigmask, signal.SIG_BLOCK), [()] * 3))
    assert all(signal.SIGINT in mask for mask in blocked)
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


@pytest.mark.parametrize("direction", ["en-de", "de-en", "en-fr", "fr-en", "de-fr", "fr-de"])
def test_no_sentence_of_a_made_split_is_trained_on_in_any_language(
    unsplit: Path, tmp_path: Path, direction: str
) -> None:
    folder = prepare(settings(unsplit, tmp_path / "out", corpus__split={"valid": 0.1, "test": 0.1}))
    tokenizer = folder.tokenizer()
    source, _ = direction.split("-")
    trained = set()
    for pair in ("en-de", "en-fr", "de-fr"):
        if source in pair.split("-"):
            trained |= {fold(tokenizer.decode(ids)) for ids in _dataset(folder.path / f"train.{pair}.{source}")}
    for split in ("valid", "test"):
        held_out = {fold(line) for line in folder.raw(split, direction)[0]}
        assert len(held_out) >= 5
        assert not held_out & trained


def test_the_same_english_is_held_out_in_every_language(unsplit: Path, tmp_path: Path) -> None:
    folder = prepare(settings(unsplit, tmp_path / "out", corpus__split={"valid": 0.1, "test": 0.1}))
    assert folder.raw("test", "en-de")[0] == folder.raw("test", "en-fr")[0]
    counts = folder.manifest.counts
    rules = folder.manifest.cleaning["en-de"]
    assert counts["train"]["en-de"] == rules["kept"] == 300 - rules["dropped_held_out"] - rules["valid"] - rules["test"]
    assert rules["dropped_held_out"] > 0  # the German sentences that translate two English ones


def test_english_under_any_code_is_held_out_alike(unsplit: Path, tmp_path: Path) -> None:
    """The same text under other codes gives the same held-out sentences; ``eng_Latn`` stands second in a pair."""
    other = tmp_path / "other"
    other.mkdir()
    for pair, name in (("en-de", "deu_Latn-eng_Latn"), ("en-fr", "eng_Latn-fra_Latn")):
        for code in name.split("-"):
            shutil.copy(unsplit / f"{pair}.{code[:2]}", other / f"{name}.{code}")
        (unsplit / "de-fr.de").unlink(missing_ok=True)
        (unsplit / "de-fr.fr").unlink(missing_ok=True)
    split = {"valid": 0.1, "test": 0.1}
    short = prepare(settings(unsplit, tmp_path / "short", corpus__split=split))
    long = prepare(settings(other, tmp_path / "long", corpus__split=split, tiers={"languages": {"en": "high"}}))
    held = long.raw("test", "eng_Latn-deu_Latn")[0]
    assert len(held) > 10 and held == long.raw("test", "eng_Latn-fra_Latn")[0] == short.raw("test", "en-de")[0]
    assert long.manifest.counts["train"]["eng_Latn-fra_Latn"] == short.manifest.counts["train"]["en-fr"]
    console = Console(record=True, width=200, file=StringIO())
    print_summary(long, console)  # the tier of a pair is that of its language other than English
    assert long.tiers["eng_Latn"] == "high" and "high" not in console.export_text()


def test_codes_of_one_language_are_one_language(corpus: Path, tmp_path: Path) -> None:
    """Training text calls it ``en``, the test set ``eng_Latn``, and the config as it likes."""
    for code, name in (("en", "eng_Latn"), ("de", "deu")):
        (corpus / f"test.en-de.{code}").rename(corpus / f"test.eng_Latn-deu.{name}")
    console = Console(record=True, width=200, file=StringIO())
    words = {"corpus__languages": ["eng", "deu_Latn", "ger"], "directions": ["deu-en"]}
    tiers = {"languages": {"deu_Latn": "low"}}
    folder = prepare(settings(corpus, tmp_path / "out", tiers=tiers, **words), Progress(console))
    assert folder.directions_of("test") == folder.directions_of("train") == ("de-en",)
    assert folder.languages == ("de", "en") and folder.tiers["de"] == "low"
    assert (folder.path / "raw" / "test.en-de.de").read_bytes() == (corpus / "test.eng_Latn-deu.deu").read_bytes()
    assert "languages renamed to one code: deu as de, eng_Latn as en" in console.export_text()
    for code, name in (("en", "eng_Latn"), ("de", "deu")):
        shutil.copy(corpus / f"train.en-de.{code}", corpus / f"train.eng_Latn-deu.{name}")
    with pytest.raises(
        DataError, match=r"both 'train\.en-de\.en' and 'train\.eng_Latn-deu\.eng_Latn' would be training"
    ):
        prepare(settings(corpus, tmp_path / "twins", **words))
    shutil.copy(corpus / "train.en-de.en", corpus / "train.en-eng_Latn.en")
    shutil.copy(corpus / "train.en-de.en", corpus / "train.en-eng_Latn.eng_Latn")
    with pytest.raises(DataError, match=r"'en-eng_Latn' names one language twice"):
        prepare(settings(corpus, tmp_path / "twice"))


def test_dev_and_val_are_valid_and_what_is_not_read_is_named(corpus: Path, tmp_path: Path) -> None:
    for code in ("en", "de"):
        (corpus / f"valid.en-de.{code}").rename(corpus / f"dev.en-de.{code}")
    for code in ("en", "fr"):
        (corpus / f"valid.en-fr.{code}").rename(corpus / f"val.en-fr.{code}")
    (corpus / "tset.en-fr.fr").write_text("Une faute.\n")
    (corpus / "test.en-fr.r").write_text("La fin d'un nom de langue.\n")
    (corpus / "test.en-fr.fr.gz").write_bytes(b"a copy")
    (corpus / "more").mkdir()
    (corpus / ".DS_Store").write_text("")
    console = Console(record=True, width=200, file=StringIO())
    folder = prepare(settings(corpus, tmp_path / "out"), Progress(console))
    assert folder.manifest.counts["valid"] == {"en-de": 10, "en-fr": 10}
    unread = "more/, test.en-fr.fr.gz, test.en-fr.r, tset.en-fr.fr"
    assert f"note: not read in {corpus}: {unread}\n" in console.export_text()
    for code in ("en", "de"):
        shutil.copy(corpus / f"dev.en-de.{code}", corpus / f"valid.en-de.{code}")
    with pytest.raises(DataError, match=r"both 'dev\.en-de' and 'valid\.en-de' would be validation text"):
        prepare(settings(corpus, tmp_path / "both"))


def test_text_that_unpacks_to_far_too_much(corpus: Path, tmp_path: Path) -> None:
    import gzip

    folder = prepare(settings(corpus, tmp_path / "out"))
    assert "max_expansion" not in json.dumps(folder.manifest.settings)
    before = (folder.path / "manifest.json").stat().st_mtime_ns
    prepare(settings(corpus, tmp_path / "out", corpus__max_expansion=0))  # changes nothing, so the folder is kept
    assert (folder.path / "manifest.json").stat().st_mtime_ns == before
    line = b"word " * 200_000 + b"\n"
    for code in ("en", "de"):
        (corpus / f"test.en-de.{code}").unlink()
        (corpus / f"test.en-de.{code}.gz").write_bytes(gzip.compress(line * 18))
    with pytest.raises(DataError, match=r"test\.en-de\.en\.gz: the file unpacks to more than 16 MiB"):
        prepare(settings(corpus, tmp_path / "bomb"))


def test_max_sentences_caps_and_returns_the_rest_to_training(unsplit: Path, tmp_path: Path) -> None:
    tmp_path.joinpath("one").mkdir()
    parts = tiny_corpus.sentences(300)
    for language in ("en", "fr"):
        write_lines(tmp_path / "one" / f"en-fr.{language}", [tiny_corpus.sentence(language, *part) for part in parts])
    split = {"valid": 0.2, "test": 0.2, "max_sentences": 7}
    counts = prepare(settings(tmp_path / "one", tmp_path / "out", corpus__split=split)).manifest.counts
    assert counts == {"train": {"en-fr": 286}, "valid": {"en-fr": 7}, "test": {"en-fr": 7}}


def test_given_held_out_files_are_left_as_they_are(corpus: Path, tmp_path: Path) -> None:
    odd = ["", "  \t ", "<b>&File</b>", "same", "same", "a\u2028b", "e\u0301", "日本語", "x" * 3000, "\u00a0"]
    write_lines(corpus / "test.en-de.en", odd)
    write_lines(corpus / "test.en-de.de", list(reversed(odd)))
    console = Console(record=True, width=200, file=StringIO())
    folder = prepare(settings(corpus, tmp_path / "out"), Progress(console))
    assert "has a blank side is kept: 4 of 10 pairs of test.en-de\n" in console.export_text()
    assert folder.raw("test", "en-de") == (odd, list(reversed(odd)))
    assert (folder.path / "raw" / "test.en-de.en").read_bytes() == (corpus / "test.en-de.en").read_bytes()
    data = _dataset(folder.pair_files("test", "en-de").source)
    assert [len(ids) for ids in data][:2] == [1, 1]  # blank lines are an end of sentence alone
    assert folder.tokenizer().decode(data[5]) == "a b"
    assert folder.tokenizer().decode(data[7]) == "日本語"  # spelt in bytes


def test_windows_files_and_compressed_files(corpus: Path, tmp_path: Path) -> None:
    import gzip
    import lzma

    plain = prepare(settings(corpus, tmp_path / "plain"))
    for path in list(corpus.iterdir()):
        text = path.read_bytes()
        if path.name.startswith("test"):
            path.write_bytes(b"\xef\xbb\xbf" + text.replace(b"\n", b"\r\n"))
        else:
            pack = gzip.compress if "fr" in path.name else lzma.compress
            suffix = ".gz" if "fr" in path.name else ".xz"
            path.with_name(path.name + suffix).write_bytes(pack(text))
            path.unlink()
    packed = prepare(settings(corpus, tmp_path / "packed"))
    assert packed.manifest.files == plain.manifest.files


def test_duplicates_in_training_go_and_are_counted(corpus: Path, tmp_path: Path) -> None:
    for language in ("en", "de"):
        path = corpus / f"train.en-de.{language}"
        path.write_text(path.read_text() * 2)
    rules = prepare(settings(corpus, tmp_path / "out")).manifest.cleaning["train.en-de"]
    assert (rules["read"], rules["dropped_duplicate"], rules["kept"]) == (240, 120, 120)
    kept = prepare(settings(corpus, tmp_path / "all", corpus__cleaning={"deduplicate": False}))
    assert kept.manifest.counts["train"]["en-de"] == 240


def _contaminate(corpus: Path) -> None:
    """Puts three test pairs of en-de into training, with other case and punctuation on the English side."""
    for language in ("en", "de"):
        test = (corpus / f"test.en-de.{language}").read_text().split("\n")[:3]
        changed = [line.upper().rstrip(".") + "!" if language == "en" else line for line in test]
        with (corpus / f"train.en-de.{language}").open("a") as stream:
            stream.writelines(f"{line}\n" for line in changed)


def test_overlap_is_reported_and_left_alone(corpus: Path, tmp_path: Path) -> None:
    _contaminate(corpus)
    manifest = prepare(settings(corpus, tmp_path / "out")).manifest
    assert manifest.overlap["test"]["en-de"] == {"sentences": 10, "en": 3, "de": 3}
    assert manifest.overlap["test"]["en-fr"] == {"sentences": 10, "en": 3, "fr": 0}  # the English side is shared
    assert manifest.overlap["valid"]["en-de"] == {"sentences": 10, "en": 0, "de": 0}
    assert manifest.counts["train"]["en-de"] == 123


def test_decontamination_cleans_training_and_never_the_test_set(corpus: Path, tmp_path: Path) -> None:
    _contaminate(corpus)
    folder = prepare(settings(corpus, tmp_path / "out", corpus__decontaminate=True))
    assert folder.manifest.counts["train"]["en-de"] == 120
    assert folder.manifest.cleaning["train.en-de"]["dropped_overlap"] == 3
    assert folder.manifest.overlap["test"]["en-de"] == {"sentences": 10, "en": 0, "de": 0}
    assert (folder.path / "raw" / "test.en-de.en").read_bytes() == (corpus / "test.en-de.en").read_bytes()


def test_directions_limit_what_is_prepared(corpus: Path, tmp_path: Path) -> None:
    folder = prepare(settings(corpus, tmp_path / "out", directions=["de-en"]))
    assert folder.directions == folder.directions_of("train") == ("de-en",)
    assert folder.languages == ("de", "en")
    assert folder.manifest.counts["train"] == {"en-de": 120}
    with pytest.raises(DataError, match="has no direction 'en-de'"):
        folder.pair_files("train", "en-de")


def test_each_order_of_a_pair_may_have_files_of_its_own(corpus: Path, tmp_path: Path) -> None:
    for language in ("en", "de"):
        lines = (corpus / f"train.en-de.{language}").read_text().split("\n")[:50]
        write_lines(corpus / f"train.de-en.{language}", lines)
    folder = prepare(settings(corpus, tmp_path / "out"))
    assert folder.pair_files("train", "de-en").sentences == 50
    assert folder.pair_files("train", "en-de").sentences == 120
    assert folder.pair_files("test", "de-en").pair == "en-de"


def test_max_pairs_takes_a_fixed_subset(corpus: Path, tmp_path: Path) -> None:
    small = prepare(settings(corpus, tmp_path / "small", corpus__max_pairs=40)).manifest
    assert small.counts["train"] == {"en-de": 40, "en-fr": 40}
    assert small.cleaning["train.en-de"]["dropped_beyond_max_pairs"] == 80


def test_vocabulary_of_another_folder(corpus: Path, tmp_path: Path) -> None:
    first = prepare(settings(corpus, tmp_path / "first"))
    other = tmp_path / "other"
    other.mkdir()
    for language in ("en", "de"):
        shutil.copy(corpus / f"test.en-de.{language}", other)
    folder = prepare(settings(other, tmp_path / "second", vocabulary={"reuse": str(first.path)}))
    assert folder.directions_of("test") == ("de-en", "en-de") and folder.directions_of("train") == ()
    for name in ("spm.model", "dict.txt", "dict.fr.txt", "test.en-de.de.bin"):
        assert (folder.path / name).read_bytes() == (first.path / name).read_bytes()
    assert folder.tiers == first.tiers
    with pytest.raises(DataError, match="no training text to learn a vocabulary from"):
        prepare(settings(other, tmp_path / "third"))


def test_tiers_follow_training_pairs(corpus: Path, tmp_path: Path) -> None:
    for language in ("en", "fr"):
        path = corpus / f"train.en-fr.{language}"
        write_lines(path, path.read_text().split("\n")[:20])
    tiers = {"high": 130, "medium": 100, "languages": {"fr": "medium"}}
    folder = prepare(settings(corpus, tmp_path / "out", tiers=tiers))
    assert folder.tiers == {"en": "high", "de": "medium", "fr": "medium"}
    assert json.loads((folder.path / "manifest.json").read_text())["tiers"] == folder.tiers


# --- the place where the folder goes ---------------------------------------------------------------------------------


def test_a_finished_folder_is_kept(corpus: Path, tmp_path: Path) -> None:
    config = settings(corpus, tmp_path / "out")
    folder = prepare(config)
    before = {path: path.stat().st_mtime_ns for path in folder.path.rglob("*")}
    prepare(config)
    assert {path: path.stat().st_mtime_ns for path in folder.path.rglob("*")} == before


def test_a_finished_folder_that_was_altered_is_no_finished_one(corpus: Path, tmp_path: Path) -> None:
    config = settings(corpus, tmp_path / "out")
    folder = prepare(config)
    before, victim = content(folder.path), folder.path / "train.en-de.de.bin"
    victim.write_bytes(bytes(victim.stat().st_size))
    with pytest.raises(DataError, match=r"train\.en-de\.de\.bin: the file's checksum is not the manifest's"):
        prepare(config)
    prepare(dataclasses.replace(config, overwrite=True))
    assert content(folder.path) == before
    model = folder.path / "spm.model"
    model.write_bytes(bytes(model.stat().st_size))
    with pytest.raises(DataError, match=r"spm\.model: the file's checksum"):
        prepare(settings(corpus, tmp_path / "other", vocabulary__reuse=str(folder.path)))


def test_everything_is_on_the_disk_before_the_folder_gets_its_name(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []

    def synced(handle: int, real: Callable[[int], None] = os.fsync) -> None:
        real(handle)
        done.append(os.readlink(f"/proc/self/fd/{handle}"))

    def renamed(source: Path, target: Path, real: Callable[..., None] = os.rename) -> None:
        real(source, target)
        done.append(f"{source} -> {target}")

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "rename", renamed)
    out = prepare(settings(corpus, tmp_path / "out")).path
    (name,) = [number for number, entry in enumerate(done) if entry.endswith(f"-> {out}")]
    made = done[name].partition(" -> ")[0]
    there = {path.relative_to(out) for path in [*out.rglob("*")]}
    assert {str(Path(made) / path) for path in there} | {made} <= set(done[:name])
    assert str(out.parent) in done[name + 1 :]


def test_a_folder_made_otherwise_is_refused_unless_overwritten(corpus: Path, tmp_path: Path) -> None:
    first = content(prepare(settings(corpus, tmp_path / "out")).path)
    with pytest.raises(DataError, match=r"other settings.*\(differs in vocabulary\.size\).*overwrite=true"):
        prepare(settings(corpus, tmp_path / "out", vocabulary__size=380))
    assert content(tmp_path / "out") == first
    changed = prepare(settings(corpus, tmp_path / "out", vocabulary__size=380, overwrite=True))
    assert len(changed.tokenizer()) == 380
    with (corpus / "valid.en-de.en").open("a") as stream, (corpus / "valid.en-de.de").open("a") as other:
        stream.write("One more.\n")
        other.write("Noch einer.\n")
    with pytest.raises(DataError, match="differs in the corpus's files"):
        prepare(settings(corpus, tmp_path / "out", vocabulary__size=380))


def test_a_place_with_other_things_is_never_touched(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("ten years of work")
    with pytest.raises(DataError, match="not a data folder"):
        prepare(settings(corpus, tmp_path / "out", overwrite=True))
    assert (tmp_path / "out" / "thesis.tex").read_text() == "ten years of work"


def test_what_fails_leaves_the_old_folder_and_no_rubbish(corpus: Path, tmp_path: Path) -> None:
    before = content(prepare(settings(corpus, tmp_path / "out")).path)
    with pytest.raises(DataError):
        prepare(settings(corpus, tmp_path / "out", vocabulary__size=30000, overwrite=True))
    assert content(tmp_path / "out") == before
    assert sorted(os.listdir(tmp_path)) == ["corpus", "out"]


def test_neighbours_of_the_place_are_never_touched(corpus: Path, tmp_path: Path) -> None:
    """Whatever their names; a folder that an earlier version has left cannot be told from the user's own."""
    before = content(prepare(settings(corpus, tmp_path / "out")).path)
    for name in ("out.old", "out.partial"):
        shutil.copytree(tmp_path / "out", tmp_path / name)
        (tmp_path / name / "notes").write_text("mine")
    neighbours = {name: content(tmp_path / name) for name in ("out.old", "out.partial")}
    changed = prepare(settings(corpus, tmp_path / "out", vocabulary__size=380, overwrite=True))
    assert content(DataFolder.open(changed.path, verify=True).path) != before
    assert {name: content(tmp_path / name) for name in neighbours} == neighbours
    assert sorted(os.listdir(tmp_path)) == ["corpus", "out", "out.old", "out.partial"]


@pytest.mark.processes
@pytest.mark.parametrize(("step", "size"), [(0, 375), (1, 380)])
def test_killed_while_it_replaces_a_folder(corpus: Path, tmp_path: Path, step: int, size: int) -> None:
    """At its first and its second rename; even a next start that fails leaves the older folder, or the new one."""
    prepare(settings(corpus, tmp_path / "out"))
    other = settings(corpus, tmp_path / "out", vocabulary__size=380, overwrite=True)
    assert killed_before(step, lambda: prepare(other), events=("os.rename",))
    assert (tmp_path / "out").exists() == (step == 0)
    with pytest.raises(DataError, match="the corpus folder does not exist" if step else "larger than the text allows"):
        where = tmp_path / "nowhere" if step else corpus
        prepare(settings(where, tmp_path / "out", vocabulary__size=30000, overwrite=True))
    assert len(DataFolder.open(tmp_path / "out", verify=True).tokenizer()) == size
    assert sorted(os.listdir(tmp_path)) == ["corpus", "out"]


@pytest.mark.processes
def test_two_processes_never_make_one_folder(corpus: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "moe_train.commands.prepare", "corpus=text", f"corpus.path={corpus}"]
    command += [f"out={tmp_path / 'out'}", "vocabulary.size=380", "workers=1"]
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        while not (tmp_path / "out.partial" / "new").exists():
            assert first.poll() is None
            time.sleep(0.01)
        first.send_signal(signal.SIGSTOP)
        with pytest.raises(ConfigError, match=rf"another process is writing this folder \(process {first.pid} on "):
            prepare(settings(corpus, tmp_path / "out"))
        assert (tmp_path / "out.partial" / "new").exists()
    finally:
        first.kill()
        first.wait()
    assert len(prepare(settings(corpus, tmp_path / "out")).tokenizer()) == 375
    assert sorted(os.listdir(tmp_path)) == ["corpus", "out"]


def test_files_of_the_user_in_a_folder_that_is_replaced_are_kept(corpus: Path, tmp_path: Path) -> None:
    prepare(settings(corpus, tmp_path / "out"))
    (tmp_path / "out" / "notes").write_text("mine")
    for number, size in ((1, 380), (2, 385)):
        prepare(settings(corpus, tmp_path / "out", vocabulary__size=size, overwrite=True))
        (tmp_path / "out" / "notes").write_text(f"more {number}")
    assert (tmp_path / "out.replaced" / "notes").read_text() == "mine"
    assert (tmp_path / "out.replaced-2" / "notes").read_text() == "more 1"


@pytest.mark.parametrize("manifest", ["", '{"format": 1, "files": {}}'])
def test_a_folder_with_a_manifest_that_is_not_ours_is_kept(corpus: Path, tmp_path: Path, manifest: str) -> None:
    """Such as an export's or a web page's."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "manifest.json").write_text(manifest)
    (tmp_path / "out" / "model.safetensors").write_text("weeks of work")
    prepare(settings(corpus, tmp_path / "out", overwrite=True))
    assert (tmp_path / "out.replaced" / "model.safetensors").read_text() == "weeks of work"


def test_a_place_that_cannot_be_written(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"reading or writing failed \(Not a directory\)"):
        prepare(settings(corpus, tmp_path / "file" / "out"))


def _dies(block: Any) -> None:
    os._exit(9)


@pytest.mark.processes
def test_a_killed_worker_is_said(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_train.data.prepare.cleaned.clean_block", _dies)
    monkeypatch.setattr("moe_train.data.prepare.cleaned._BLOCK", 10)
    with pytest.raises(DataError, match=r"a worker process was killed.*workers="):
        prepare(settings(corpus, tmp_path / "out", workers=2))
    assert sorted(os.listdir(tmp_path)) == ["corpus"]


# --- mistakes ---------------------------------------------------------------------------------------------------------


def test_missing_corpus_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere: the corpus folder does not exist\. Correct corpus\.path"):
        prepare(settings(tmp_path / "nowhere", tmp_path / "out"))
    with pytest.raises(ConfigError, match=r"corpus\.path"):
        prepare(build(PrepareConfig, {"out": "x", "corpus": {"name": "text"}}))
    with pytest.raises(ConfigError, match=r"no corpus 'tex'. Did you mean 'text'"):
        prepare(build(PrepareConfig, {"out": "x", "corpus": {"name": "tex"}}))


def test_folder_without_parallel_text(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(DataError, match=r"no parallel files here \(found: notes\.txt\)"):
        prepare(settings(tmp_path, tmp_path / "out"))


def test_file_without_its_other_side(corpus: Path, tmp_path: Path) -> None:
    (corpus / "valid.en-fr.fr").unlink()
    with pytest.raises(DataError, match=r"valid\.en-fr\.en has no other side in 'fr'"):
        prepare(settings(corpus, tmp_path / "out"))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: path.symlink_to("nowhere"), "it is a link to 'nowhere', where there is no file"),
        (lambda path: path.symlink_to(path.name), "it is a link that leads back to itself"),
        (Path.mkdir, "it is a folder, not a file"),
        (os.mkfifo, "it cannot be read (not a regular file)"),
    ],
)
def test_a_side_that_is_no_file(corpus: Path, tmp_path: Path, make: Callable[[Path], object], said: str) -> None:
    side = corpus / "valid.en-fr.en"
    side.unlink()
    make(side)
    with pytest.raises(DataError, match=re.escape(f"{side}: {said}. Put the file there, or remove the name")):
        list(texts_of_folder(corpus))
    with pytest.raises(DataError, match=re.escape(said)):
        make(mono := tmp_path / "valid.en")
        read_mono(CorpusConfig("mono", str(tmp_path)), Progress())
    assert mono.name in os.listdir(tmp_path)


@pytest.mark.parametrize("split", ["train", "valid"])
def test_files_of_unequal_length(corpus: Path, tmp_path: Path, split: str) -> None:
    with (corpus / f"{split}.en-de.de").open("a") as stream:
        stream.write("Noch eine Zeile.\n")
    size = {"train": 120, "valid": 10}[split]
    expected = rf"{split}\.en-de\.en has {size} lines, {split}\.en-de\.de has {size + 1}"
    with pytest.raises(DataError, match=expected):
        prepare(settings(corpus, tmp_path / "out"))


def test_line_that_is_not_utf8(corpus: Path, tmp_path: Path) -> None:
    path = corpus / "train.en-de.de"
    lines = path.read_bytes().split(b"\n")
    lines[41] = "schön".encode("latin-1")
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(DataError, match=r"train\.en-de\.de: line 42 is not UTF-8.*iconv"):
        prepare(settings(corpus, tmp_path / "out"))


def test_unknown_language_in_a_direction(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"'en-xx' has the language 'xx', which the corpus does not have.*Known: de, en, fr"
    ):
        prepare(settings(corpus, tmp_path / "out", directions=["en-xx"]))
    with pytest.raises(DataError, match=r"has no text for 'de-fr'"):
        prepare(settings(corpus, tmp_path / "out", directions=["de-fr"]))
    with pytest.raises(ConfigError, match="not a direction"):
        settings(corpus, tmp_path / "out", directions=["ende"])
    with pytest.raises(DataError, match=r"no language 'frr'. Did you mean 'fr'"):
        prepare(settings(corpus, tmp_path / "out", corpus__languages=["en", "frr"]))


@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_empty_split(corpus: Path, tmp_path: Path, split: str) -> None:
    for language in ("en", "fr"):
        (corpus / f"{split}.en-fr.{language}").write_text("")
    with pytest.raises(DataError, match=rf"the split '{split}'.* is empty"):
        prepare(settings(corpus, tmp_path / "out"))


def test_blank_lines_of_held_out_files_are_counted(corpus: Path) -> None:
    write_lines(corpus / "test.en-de.en", ["a", "", "b", " "])
    write_lines(corpus / "test.en-de.de", ["c", "d", "\u00a0", ""])
    texts = [text for text in texts_of_folder(corpus) if text.split == "test"]
    note = blank_note([HeldOut.read(text) for text in texts])
    assert note == "note: held-out text that is blank or has a blank side is kept: 3 of 4 pairs of test.en-de"
    write_lines(corpus / "test.en-de.en", ["", "", "b", " "])
    with pytest.raises(DataError, match=r"'test' of en-de is empty: of its 4 pairs none has text on every side"):
        [HeldOut.read(text) for text in texts]
    assert not blank_note([HeldOut.read(text) for text in texts if text.sides.name == "en-fr"])


def test_split_that_cleaning_empties_says_which_rules_did(corpus: Path, tmp_path: Path) -> None:
    shutil.copy(corpus / "train.en-fr.en", corpus / "train.en-fr.fr")
    with pytest.raises(DataError, match=r"of 120 pairs 0 are left after cleaning \(dropped: untranslated 120\)"):
        prepare(settings(corpus, tmp_path / "out"))


def test_made_split_that_comes_out_empty(unsplit: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"the split 'valid' is empty.*corpus\.split"):
        prepare(settings(unsplit, tmp_path / "out", corpus__split={"valid": 0.0001, "test": 0.2}))


def test_vocabulary_larger_than_the_text_allows(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"of 30000 pieces is larger than the text allows: at most (\d+)") as info:
        prepare(settings(corpus, tmp_path / "out", vocabulary__size=30000))
    offered = int(str(info.value).split("at most ")[1].split(".")[0])
    assert len(prepare(settings(corpus, tmp_path / "out", vocabulary__size=offered)).tokenizer()) == offered


@pytest.mark.parametrize("size", [100, 305])
def test_vocabulary_too_small(corpus: Path, tmp_path: Path, size: int) -> None:
    with pytest.raises(DataError, match="too small: bytes and characters of the text need") as raised:
        prepare(settings(corpus, tmp_path / "out", vocabulary__size=size))
    (needed,) = re.findall(r"set vocabulary\.size=(\d+) or more", raised.value.remedy)
    assert len(prepare(settings(corpus, tmp_path / "out", vocabulary__size=int(needed))).tokenizer()) == int(needed)


def test_two_training_texts_of_one_pair(corpus: Path, tmp_path: Path) -> None:
    for language in ("en", "de"):
        shutil.copy(corpus / f"train.en-de.{language}", corpus / f"en-de.{language}")
    with pytest.raises(DataError, match=r"both 'en-de' and 'train\.en-de' would be training text"):
        prepare(settings(corpus, tmp_path / "out"))


def test_a_given_test_set_beside_text_that_is_to_be_split(corpus: Path, tmp_path: Path) -> None:
    for language in ("en", "de"):
        (corpus / f"train.en-de.{language}").rename(corpus / f"en-de.{language}")
        (corpus / f"valid.en-de.{language}").unlink()
    split = {"valid": 0.2, "test": 0.2}
    folder = prepare(settings(corpus, tmp_path / "out", corpus__split=split, directions=["en-de"]))
    counts = folder.manifest.counts
    assert counts["test"] == {"en-de": 10} and counts["valid"]["en-de"] + counts["train"]["en-de"] == 120
    assert (folder.path / "raw" / "test.en-de.de").read_bytes() == (corpus / "test.en-de.de").read_bytes()


def test_hyphen_inside_a_language_code(corpus: Path, tmp_path: Path) -> None:
    for language in ("en", "zh-CN"):
        shutil.copy(corpus / "train.en-fr.en", corpus / f"train.en-zh-CN.{language}")
    with pytest.raises(DataError, match=r"'en-zh-CN' is not a pair.*underscore"):
        prepare(settings(corpus, tmp_path / "out"))


def _dataset(prefix: Path) -> Any:
    from fairseq.data.indexed_dataset import MMapIndexedDataset

    return MMapIndexedDataset(str(prefix))

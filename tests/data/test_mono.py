"""``corpus=mono``: from files of single languages to a folder that a masked language model trains on, and mistakes."""

from __future__ import annotations

import dataclasses
import gzip
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from rich.console import Console

from moe_train.config import build
from moe_train.config.corpus import CleaningConfig, CorpusConfig, PrepareConfig
from moe_train.config.paths import configs_directory
from moe_train.data.cleaning import Cleaner
from moe_train.data.corpora import read_corpus
from moe_train.data.folder import DataFolder
from moe_train.data.prepare.pipeline import prepare
from moe_train.data.prepare.summary import print_summary
from moe_train.data.stage_progress import Progress
from moe_train.data.text.dedup_keys import fold
from moe_train.data.text.lines import write_lines
from moe_train.data.text.pairs import SPLITS, Single
from moe_train.errors import DataError
from moe_train.launch.hydra_store import forget_foreign_schemas
from moe_train.tasks.indexed_dataset import SentenceFile
from tests.data import tiny_corpus
from tests.tasks.helpers import make_task as make_translation
from tests.tasks.test_lm import make_task

LANGUAGES = ("de", "en", "ja")


def lines_of(language: str, count: int, start: int = 0) -> list[str]:
    return [tiny_corpus.sentence(language, *part) for part in tiny_corpus.sentences(count, start=start)]


def write_mono(folder: Path) -> Path:
    """Different sentences in each language; German repeats itself and holds lines that are held out, or no German."""
    folder.mkdir(parents=True)
    for number, language in enumerate(LANGUAGES):
        for split, count, start in (("train", 120, 0), ("valid", 15, 120), ("test", 10, 135)):
            write_lines(folder / f"{split}.{language}", lines_of(language, count, 200 * number + start))
    train = (folder / "train.de").read_text().splitlines()
    valid = (folder / "valid.de").read_text().splitlines()
    more = [*train[:5], valid[0].upper(), valid[1], "", "Дверь открыта.", "<b>Fett</b> gedruckt"]
    write_lines(folder / "train.de", [*train, *more])
    return folder


def settings(corpus: Path, out: Path, *words: str) -> PrepareConfig:
    """What ``moe-prepare corpus=mono`` reads, from its own config files."""
    given = ["corpus=mono", f"corpus.path={corpus}", f"out={out}", "workers=1", "vocabulary.size=430"]
    forget_foreign_schemas()  # of fairseq, which another test may have imported
    with initialize_config_dir(str(configs_directory()), version_base="1.3"):
        composed = compose("prepare", overrides=[*given, "vocabulary.character_coverage=1.0", *words])
    plain: Any = OmegaConf.to_container(composed, resolve=True)
    return build(PrepareConfig, {key: value for key, value in plain.items() if key != "user_dir"})


@pytest.fixture(scope="module")
def mono(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DataFolder]:
    """A prepared folder of three single languages, in ``data`` beside its ``corpus``."""
    place = tmp_path_factory.mktemp("mono")
    yield prepare(settings(write_mono(place / "corpus"), place / "data"))


def test_lines_are_cleaned_kept_once_and_kept_apart_from_held_out_ones(mono: DataFolder) -> None:
    assert mono.languages == LANGUAGES and mono.directions == ()
    counts = mono.manifest.counts
    assert counts["valid"] == dict.fromkeys(LANGUAGES, 15) and counts["test"] == dict.fromkeys(LANGUAGES, 10)
    rules = mono.manifest.cleaning["train.de"]
    assert (rules["read"], rules["dropped_empty"], rules["dropped_script"]) == (130, 1, 1)
    assert rules["dropped_duplicate"] == 5 and rules["dropped_overlap"] == 2 and rules["mended_markup"] == 1
    assert counts["train"] == {"de": 121, "en": 120, "ja": 120}
    assert mono.manifest.overlap["valid"]["de"] == {"sentences": 15, "de": 0}
    assert set(mono.tiers) == set(LANGUAGES)
    corpus = mono.path.parent / "corpus"
    for split in ("valid", "test"):
        for language in LANGUAGES:
            raw = mono.path / "raw" / f"{split}.{language}"
            assert raw.read_bytes() == (corpus / f"{split}.{language}").read_bytes()


def test_binarised_lines_stand_in_the_corpus_s_order(mono: DataFolder) -> None:
    from fairseq.data.indexed_dataset import MMapIndexedDataset

    DataFolder.open(mono.path, verify=True)
    text = {sides.name: sides for sides in mono.texts("train")}
    assert list(text) == list(LANGUAGES)
    for language in LANGUAGES:
        file = SentenceFile(mono.prefix("train", text[language], language))
        assert len(file) == mono.manifest.counts["train"][language]
        decoded = [mono.tokenizer().decode(file.sentence(n)) for n in range(len(file))]
        given = (mono.path.parent / "corpus" / f"train.{language}").read_text().splitlines()
        assert decoded[:120] == given[:120]
        fairseq = MMapIndexedDataset(str(mono.path / f"train.{language}"))
        assert [ids.tolist() for ids in fairseq] == [file.sentence(n).tolist() for n in range(len(file))]
    held = {fold(line) for line in (mono.path / "raw" / "valid.de").read_text().splitlines()}
    german = SentenceFile(mono.path / "train.de")
    assert not held & {fold(mono.tokenizer().decode(german.sentence(n))) for n in range(len(german))}


def test_the_masked_language_model_reads_it_whatever_task_sides_says(mono: DataFolder) -> None:
    for sides in ("both", "target", "source"):
        task = make_task(mono, sides=sides, translation_lm=True)
        text = task.split("train")
        assert text.names == list(LANGUAGES) and text.sizes == [121, 120, 120]
        task.check_data()
    uids = text.tokens(text.items("en"))[1]
    assert uids.tolist() == list(range(121, 241))
    update = task.train_batches().update(0)
    sample = task.train_sample(update.micro_batches[0])
    assert sample["ntokens"] > 0 and set(task.validation_sets()) == set(LANGUAGES)
    assert make_task(mono, languages=["ja"]).split("valid").names == ["ja"]


def test_translation_refuses_it(mono: DataFolder) -> None:
    with pytest.raises(DataError, match=r"single languages.*task=cross_lingual_lm.*corpus=text"):
        make_translation(mono)


def test_what_is_shown_counts_lines_of_languages(mono: DataFolder) -> None:
    console = Console(width=200, record=True, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115
    print_summary(mono, console)
    shown = console.export_text()
    assert "language" in shown and "dropped 9 of 370 training lines" in shown and "3 languages, 0 directions" in shown


def test_a_given_vocabulary_compressed_files_and_languages(mono: DataFolder, tmp_path: Path) -> None:
    corpus = write_mono(tmp_path / "corpus")
    for path in list(corpus.iterdir()):
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    words = (f"vocabulary.reuse={mono.path}", "corpus.languages=[de,ja]", "corpus.max_pairs=50")
    folder = prepare(settings(corpus, tmp_path / "out", *words))
    assert folder.manifest.counts["train"] == {"de": 50, "ja": 50} and folder.languages == LANGUAGES
    for name in ("spm.model", "dict.txt", "valid.ja.bin"):
        assert (folder.path / name).read_bytes() == (mono.path / name).read_bytes()


def _no_files(corpus: Path) -> None:
    for path in corpus.iterdir():
        path.rename(path.with_name(f"{path.name}.txt"))


def _no_valid(corpus: Path) -> None:
    for path in corpus.glob("valid.*"):
        path.unlink()


MISTAKES = [
    (_no_files, r"no files of single languages here \(found: test\.de\.txt.*Name the files train\.XX"),
    (_no_valid, r"no valid\.XX to evaluate a model"),
    (lambda corpus: (corpus / "train.ja").write_text(""), r"train\.ja: the split 'train' is empty: of 0 lines 0"),
    (lambda corpus: (corpus / "valid.ja").write_text("\n \n"), r"valid\.ja: the split 'valid' of ja is empty"),
    (lambda corpus: (corpus / "train.en").write_bytes(b"Good.\nNa\xefve.\n"), r"train\.en: line 2 is not UTF-8"),
    (lambda corpus: (corpus / "valid.en").write_bytes(b"Na\xefve.\n"), r"valid\.en: line 1 is not UTF-8"),
    (lambda corpus: (corpus / "train.german").write_text("Gut.\n"), r"'german' is not a language code"),
]


@pytest.mark.parametrize(("spoil", "message"), MISTAKES)
def test_mistakes_are_said_and_leave_nothing(tmp_path: Path, spoil: Any, message: str) -> None:
    corpus = write_mono(tmp_path / "corpus")
    spoil(corpus)
    with pytest.raises(DataError, match=message):
        prepare(settings(corpus, tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]


def test_other_words_for_valid_other_codes_and_what_is_not_read(tmp_path: Path) -> None:
    corpus = write_mono(tmp_path / "corpus")
    (corpus / "valid.de").rename(corpus / "dev.de")
    (corpus / "valid.ja").rename(corpus / "val.jpn_Jpan")
    (corpus / "tset.de").write_text("Ein Fehler.\n")
    console = Console(record=True, width=200, file=StringIO())
    texts = {text.name for text in read_corpus(CorpusConfig("mono", path=str(corpus)), Progress(console))}
    assert texts == {f"{split}.{language}" for split in SPLITS for language in LANGUAGES}
    said = console.export_text()
    assert f"note: not read in {corpus}: tset.de\n" in said and "one code: jpn_Jpan as ja" in said
    (corpus / "valid.de").write_text("Noch einer.\n")
    with pytest.raises(DataError, match=r"both 'dev\.de' and 'valid\.de' would be validation text"):
        read_corpus(CorpusConfig("mono", path=str(corpus)), Progress())


def test_directions_are_refused_where_there_is_nothing_to_translate(tmp_path: Path) -> None:
    corpus = write_mono(tmp_path / "corpus")
    with pytest.raises(DataError, match="no text for 'en-de'"):
        prepare(settings(corpus, tmp_path / "out", "directions=[en-de]"))


def test_rules_that_compare_two_sides_rest() -> None:
    config = dataclasses.replace(CleaningConfig(), max_ratio=1.0)
    assert Cleaner(config, Single("de"))("Sende %s Nachrichten jetzt") == ("Sende %s Nachrichten jetzt",)
    cleaner = Cleaner(config, Single("de"))
    assert cleaner("1.2.3-4/5.6 (7) x") is None and cleaner.counts["dropped_letters"] == 1

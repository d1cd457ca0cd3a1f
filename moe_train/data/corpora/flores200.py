"""``corpus=flores200``: FLORES-200 (NLLB team 2022), the same sentences in 200 languages: ``dev`` and ``devtest``.

They become valid and test. It has no training text: that is read from ``corpus.train_path`` (in the layout of
``corpus=text``), or the folder is made only for evaluation, with the vocabulary of another one (``vocabulary.reuse``).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from moe_train.config.corpus import CorpusConfig
from moe_train.data.corpora.base import (
    CorpusText,
    corpus_folder,
    files_text,
    listing,
    register,
    report_unread,
    require_file,
)
from moe_train.data.corpora.text import texts_of_folder
from moe_train.data.stage_progress import Progress
from moe_train.data.text.languages import Language, find_same, is_same
from moe_train.data.text.pairs import Pair
from moe_train.errors import ConfigError, DataError, did_you_mean

LAYOUT = "unpack flores200_dataset.tar.gz there: dev/eng_Latn.dev, devtest/eng_Latn.devtest"
_SPLITS = {"valid": "dev", "test": "devtest"}


@register("flores200")
def read_flores200(config: CorpusConfig, progress: Progress) -> list[CorpusText]:
    """Held-out sets of the selected pairs, and the training text if there is any.

    Raises:
        ConfigError: neither languages nor pairs nor training text select some of the 40,000 directions.
        DataError: no file of the layout, or a language that FLORES-200 does not have.
    """
    folder = corpus_folder(config)
    if not (folder / "dev").is_dir() or not (folder / "devtest").is_dir():
        there = listing(path.name for path in folder.iterdir())
        raise DataError(f"this is not FLORES-200 (found: {there or 'nothing'})", str(folder), LAYOUT)
    training = _training(config, progress)
    held_out = []
    for pair in _pairs(config, training):
        for split in _SPLITS:
            source, target = (_file(folder, split, language, config) for language in pair)
            held_out.append(files_text(pair, split, source, target, config.max_expansion))
    return training + held_out


def _training(config: CorpusConfig, progress: Progress) -> list[CorpusText]:
    if not config.train_path:
        return []
    folder = Path(config.train_path).expanduser()
    if not folder.is_dir():
        raise DataError("the folder of the training text does not exist", str(folder), "correct corpus.train_path=…")
    texts = [text for text in texts_of_folder(folder, config.max_expansion) if text.split in ("train", None)]
    report_unread(folder, texts, progress)
    return texts


def _pairs(config: CorpusConfig, training: Sequence[CorpusText]) -> list[Pair]:
    if config.pairs:
        return [Pair.parse(name) for name in config.pairs]
    if config.languages:
        english = find_same("en", config.languages) or "en"
        return [Pair(english, language) for language in config.languages if not is_same(language, english)]
    if training:
        return sorted({text.sides for text in training if isinstance(text.sides, Pair)})
    raise ConfigError(
        "corpus=flores200 needs a selection of languages or pairs",
        "corpus.languages",
        "add 'corpus.languages=[en,de,fr]' (from and into English), or 'corpus.pairs=[de-fr]'",
    )


def _file(folder: Path, split: str, language: str, config: CorpusConfig) -> Path:
    name = _SPLITS[split]
    known = sorted(path.name.removesuffix(f".{name}") for path in (folder / name).glob(f"*.{name}"))
    code = config.codes.get(language) or find_same(language, known)
    if code not in known:
        code = code or str(Language.of(language))
        raise DataError(f"FLORES-200 has no language '{code}'", str(folder / name), did_you_mean(code, known))
    return require_file(folder / name / f"{code}.{name}")

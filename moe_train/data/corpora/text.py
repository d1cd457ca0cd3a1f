"""``corpus=text``: a folder of line-aligned files named ``{train,valid,test}.XX-YY.{XX,YY}``, plain or compressed.

``dev`` and ``val`` are ``valid``. moe-prepare splits files without a split, ``XX-YY.{XX,YY}``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from moe_train.config.corpus import CorpusConfig
from moe_train.data.corpora.base import (
    CorpusText,
    corpus_folder,
    files_text,
    listing,
    named_files,
    register,
    report_unread,
    require_file,
)
from moe_train.data.stage_progress import Progress
from moe_train.data.text.compressed import EXPANSION
from moe_train.data.text.pairs import SPLIT_WORDS, Pair, refuse_double_splits
from moe_train.errors import DataError

LAYOUT = (
    "name the files {train,valid,test}.XX-YY.XX and .YY (line n of one translates line n of the other), "
    "or XX-YY.XX and XX-YY.YY"
)
_NAME = re.compile(rf"(?:(?P<split>{'|'.join(SPLIT_WORDS)})\.)?(?P<pair>[^.\s]+-[^.\s]+)\.(?P<language>[^.\s]+)")


@register("text")
def read_text(config: CorpusConfig, progress: Progress) -> list[CorpusText]:
    """Finds the texts of ``corpus.path``."""
    folder = corpus_folder(config)
    texts = list(texts_of_folder(folder, config.max_expansion))
    report_unread(folder, texts, progress)
    return texts


def texts_of_folder(folder: Path, expansion: int = EXPANSION) -> Iterator[CorpusText]:
    """Yields the texts of a folder.

    Args:
        expansion: ``corpus.max_expansion``.

    Raises:
        DataError: no files of the layout, a file without the other side, two validation texts of a pair, an invalid
            pair name, or a name of the layout that is not a file.
    """
    found: dict[tuple[str | None, str], dict[str, Path]] = {}
    for file, path in named_files(folder):
        match = _NAME.fullmatch(file)
        if match and _is_side(match["language"], match["pair"]):
            found.setdefault((match["split"], match["pair"]), {}).setdefault(match["language"], path)
    if not found:
        there = listing(p.name for p in folder.iterdir())
        raise DataError(f"no parallel files here (found: {there or 'nothing'})", str(folder), LAYOUT)
    refuse_double_splits(((word, name) for word, name in found if word), folder)
    for (word, name), sides in found.items():
        pair = Pair.parse(name)
        for language in pair:
            if language not in sides:
                other = next(iter(sides.values()))
                raise DataError(f"{other.name} has no other side in '{language}'", str(folder), LAYOUT)
        split = SPLIT_WORDS[word] if word else None
        source, target = (require_file(sides[language]) for language in pair)
        yield files_text(pair, split, source, target, expansion)


def _is_side(language: str, pair: str) -> bool:
    # Not by parsing the pair: a name with two hyphens is refused later, with a remedy.
    return pair.startswith(f"{language}-") or pair.endswith(f"-{language}")

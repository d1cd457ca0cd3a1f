"""``corpus=opus100``: OPUS-100 (Zhang et al. 2020), English-centric text in 100 languages, from the unpacked release.

Its development sets are ``valid``; the zero-shot test sets between other languages are read, too.
"""

from __future__ import annotations

import re
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
from moe_train.data.stage_progress import Progress
from moe_train.data.text.pairs import Pair
from moe_train.errors import DataError

LAYOUT = "unpack the release there: supervised/de-en/opus.de-en-train.de, …-dev.de, …-test.de; zeroshot/ar-de/…"
_NAME = re.compile(r"opus\.(?P<pair>\w+-\w+)-(?P<split>train|dev|test)\.(?P<language>\w+)")
_SPLITS = {"train": "train", "dev": "valid", "test": "test"}


@register("opus100")
def read_opus100(config: CorpusConfig, progress: Progress) -> list[CorpusText]:
    """All texts below ``corpus.path``, which may be any folder of the release.

    Raises:
        DataError: no file of the layout, or a file without the other side.
    """
    folder = corpus_folder(config)
    found: dict[tuple[str, str], dict[str, Path]] = {}
    for path in sorted(folder.rglob("opus.*")):
        if match := _NAME.fullmatch(path.name):
            found.setdefault((match["pair"], match["split"]), {})[match["language"]] = path
    if not found:
        there = listing(path.name for path in folder.iterdir())
        raise DataError(f"no OPUS-100 text here (found: {there or 'nothing'})", str(folder), LAYOUT)
    texts = []
    for (name, split), sides in found.items():
        pair = Pair.parse(name)
        if set(sides) != set(pair):
            raise DataError("the other side of a parallel text is missing", str(next(iter(sides.values()))), LAYOUT)
        source, target = (require_file(sides[language]) for language in pair)
        texts.append(files_text(pair, _SPLITS[split], source, target, config.max_expansion))
    report_unread(folder, texts, progress, sorted(folder.rglob("opus.*")))
    return texts

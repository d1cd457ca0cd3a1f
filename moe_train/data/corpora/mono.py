"""``corpus=mono``: a folder of files ``{train,valid,test}.XX``, one sentence or document per line, plain or compressed.

For masked language models; the texts are not translations of each other.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

from moe_train.config.corpus import CorpusConfig
from moe_train.data.corpora.base import (
    CorpusText,
    corpus_folder,
    listing,
    named_files,
    register,
    report_unread,
    require_file,
)
from moe_train.data.stage_progress import Progress
from moe_train.data.text.lines import read_single
from moe_train.data.text.pairs import SPLIT_WORDS, Single, refuse_double_splits
from moe_train.errors import DataError

LAYOUT = "name the files train.XX, valid.XX and test.XX, XX being the language; a line is a sentence or a document"
_NAME = re.compile(rf"(?P<split>{'|'.join(SPLIT_WORDS)})\.(?P<language>[^.\s-]+)")


@register("mono")
def read_mono(config: CorpusConfig, progress: Progress) -> list[CorpusText]:
    """Finds the texts of ``corpus.path``.

    Raises:
        DataError: no files of the layout, an invalid language code, two validation texts of a language, training
            text without any ``valid.XX``, or a name of the layout that is not a file.
    """
    folder = corpus_folder(config)
    found: dict[tuple[str, str], Path] = {}
    for name, path in named_files(folder):
        if match := _NAME.fullmatch(name):
            found.setdefault((match["split"], match["language"]), path)
    if not found:
        there = listing(path.name for path in folder.iterdir())
        raise DataError(f"no files of single languages here (found: {there or 'nothing'})", str(folder), LAYOUT)
    refuse_double_splits(found, folder)
    splits = {SPLIT_WORDS[word] for word, _ in found}
    if "train" in splits and "valid" not in splits:
        raise DataError(
            "there is training text, but no valid.XX to evaluate a model",
            str(folder),
            "move some lines of train.XX to valid.XX, for example a thousand of each language",
        )
    texts = [
        CorpusText(Single.parse(language), SPLIT_WORDS[word], partial(read_single, path, config.max_expansion), (path,))
        for (word, language), path in ((key, require_file(path)) for key, path in found.items())
    ]
    report_unread(folder, texts, progress)
    return texts

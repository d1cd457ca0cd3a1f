"""``corpus=iwslt14``: TED talks of the IWSLT 2014 campaign, from unpacked archives ``XX-en.tgz``.

As usual in the literature, all ``IWSLT14.TED*.xml`` sets of a pair (dev2010, tst2010 and so on) together are the test
set, and 1/23 of the training text is the validation set. Here a hash selects it, so that no validation sentence occurs
in training in another language (the languages share their English side).
"""

from __future__ import annotations

import html
import os
import re
from collections.abc import Iterator
from pathlib import Path

from moe_train.config.corpus import CorpusConfig
from moe_train.data.corpora.base import CorpusText, corpus_folder, listing, register, report_unread, require_file
from moe_train.data.stage_progress import Progress
from moe_train.data.text.lines import read_lines, read_parallel
from moe_train.data.text.pairs import Pair
from moe_train.errors import DataError

LAYOUT = "unpack the archives XX-en.tgz there: XX-en/train.tags.XX-en.XX and XX-en/IWSLT14.TED.tst2010.XX-en.XX.xml"
_TRAIN = re.compile(r"train\.tags\.(?P<pair>\w+-\w+)\.\w+")
_SEGMENT = re.compile(r"<seg\b[^>]*>(?P<text>.*?)</seg>")
_KEPT_TAGS = re.compile(r"</?(?:title|description)>")


@register("iwslt14")
def read_iwslt14(config: CorpusConfig, progress: Progress) -> list[CorpusText]:
    """Training text and test sets of every pair below ``corpus.path``.

    Raises:
        DataError: no file of the layout, or a file without the other side.
    """
    folder = corpus_folder(config)
    names = {
        match["pair"]: path.parent
        for path in sorted(folder.rglob("train.tags.*"))
        if (match := _TRAIN.fullmatch(path.name))
    }
    if not names:
        names_found = listing(path.name for path in folder.iterdir())
        raise DataError(f"no IWSLT 2014 text here (found: {names_found or 'nothing'})", str(folder), LAYOUT)
    texts = []
    for name, place in sorted(names.items()):
        pair = Pair.parse(name)
        texts.append(_training(pair, place))
        if sets := sorted({path.with_suffix("").with_suffix("") for path in place.glob(f"IWSLT14.TED*.{name}.*.xml")}):
            texts.append(_test(pair, sets))
    report_unread(folder, texts, progress, sorted({*folder.rglob("train.tags.*"), *folder.rglob("*.xml")}))
    return texts


def _training(pair: Pair, folder: Path) -> CorpusText:
    files = tuple(_existing(folder / f"train.tags.{pair.name}.{language}") for language in pair)

    def read() -> Iterator[tuple[str, str]]:
        for source, target in read_parallel(files[0], files[1]):
            source, target = _KEPT_TAGS.sub("", source).strip(), _KEPT_TAGS.sub("", target).strip()
            if not source.startswith("<") and not target.startswith("<"):  # <url>, <keywords>, <speaker> …
                yield source, target

    return CorpusText(pair, None, read, files)


def _test(pair: Pair, sets: list[Path]) -> CorpusText:
    sides = [[_existing(path.with_name(f"{path.name}.{language}.xml")) for path in sets] for language in pair]

    def read() -> Iterator[tuple[str, str]]:
        for source, target in zip(*sides, strict=True):
            yield from _segments(source, target)

    return CorpusText(pair, "test", read, (*sides[0], *sides[1]))


def _segments(source: Path, target: Path) -> Iterator[tuple[str, str]]:
    sides = [
        [html.unescape(m["text"]).strip() for line in read_lines(p) for m in _SEGMENT.finditer(line)]
        for p in (source, target)
    ]
    if len(sides[0]) != len(sides[1]):
        raise DataError(
            f"parallel sets differ in length: {source.name} has {len(sides[0])} segments, "
            f"{target.name} has {len(sides[1])}",
            str(source.parent),
            "unpack the archive again",
        )
    return zip(*sides, strict=True)


def _existing(path: Path) -> Path:
    if not os.path.lexists(path):
        raise DataError("the other side of a parallel text is missing", str(path), LAYOUT)
    return require_file(path)

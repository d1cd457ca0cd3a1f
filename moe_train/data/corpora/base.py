"""Interface of corpora (named texts of pairs or single languages), and the registry of their readers."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from moe_train.config.corpus import CorpusConfig
from moe_train.data.stage_progress import Progress
from moe_train.data.text.compressed import EXPANSION, SUFFIXES
from moe_train.data.text.languages import find_english, find_same, one_code_each
from moe_train.data.text.lines import read_parallel
from moe_train.data.text.pairs import Pair, Sides
from moe_train.errors import ConfigError, DataError, did_you_mean
from moe_train.plugins import load_plugin, offer_names
from moe_train.utils.regular_files import require_regular


@dataclass(frozen=True)
class CorpusText:
    """Text of one pair of languages, line-aligned, or of a single language.

    Attributes:
        sides: the languages in the order of the text.
        split: ``train``, ``valid`` or ``test`` if defined by the corpus; None: moe-prepare takes the missing held-out
            sets of this pair from it.
        read: opens the text and yields a line of each side: (source, target), or (line,).
        inputs: its files; their checksums become part of the manifest.
    """

    sides: Sides
    split: str | None
    read: Callable[[], Iterator[tuple[str, ...]]]
    inputs: tuple[Path, ...]

    @property
    def name(self) -> str:
        """``train.en-de``, ``train.de`` for a single language; ``en-de`` where there is no split."""
        return f"{self.split}.{self.sides.name}" if self.split else self.sides.name

    @property
    def place(self) -> str:
        """Its files, for messages; its name where it has none."""
        return ", ".join(map(str, self.inputs)) or self.name


def files_text(pair: Pair, split: str | None, source: Path, target: Path, expansion: int = EXPANSION) -> CorpusText:
    """A text in two line-aligned files.

    Args:
        expansion: ``corpus.max_expansion``.
    """
    return CorpusText(pair, split, lambda: read_parallel(source, target, expansion), (source, target))


def named_files(folder: Path) -> Iterator[tuple[str, Path]]:
    """Yields the paths in a folder, sorted, with their names without the suffix of compression.

    A plain file comes before its compressed copy, and what is no file comes last: of two with the same name, callers
    use the first, with :func:`require_file`.
    """
    for path in sorted(folder.iterdir(), key=lambda p: (not p.is_file(), p)):
        yield path.name.removesuffix(path.suffix) if path.suffix in SUFFIXES[1:] else path.name, path


def require_file(path: Path) -> Path:
    """The path, if it is a file.

    Raises:
        DataError: it is a folder, a pipe, or a link that leads nowhere.
    """
    try:
        require_regular(path)
    except IsADirectoryError:
        what = "it is a folder, not a file"
    except FileNotFoundError:
        what = (
            f"it is a link to '{os.readlink(path)}', where there is no file" if path.is_symlink() else "it is missing"
        )
    except OSError as error:
        loop = error.errno == errno.ELOOP
        what = "it is a link that leads back to itself" if loop else f"it cannot be read ({error.strerror or error})"
    else:
        return path
    raise DataError(what, str(path), "put the file there, or remove the name")


def report_unread(folder: Path, texts: Iterable[CorpusText], progress: Progress, found: Iterable[Path] = ()) -> None:
    """Prints the files of a folder that were not read, except hidden ones.

    Args:
        found: candidates to report (empty: all files of the folder).
    """
    read = {path for text in texts for path in text.inputs}
    unread = [path for path in found or folder.iterdir() if path not in read and not path.name.startswith(".")]
    if unread:
        names = listing(path.name + "/" * path.is_dir() for path in unread)
        progress.print(f"note: not read in {folder}: {names}")


Reader = Callable[[CorpusConfig, Progress], list[CorpusText]]
_READERS: dict[str, Reader] = {}


def register(name: str) -> Callable[[Reader], Reader]:
    """Decorator that registers a reader for ``corpus.name``.

    Raises:
        ValueError: the name is in use.
    """

    def add(reader: Reader) -> Reader:
        if name in _READERS:
            raise ValueError(f"the corpus {name!r} is registered twice")
        _READERS[name] = reader
        return reader

    return add


def read_corpus(config: CorpusConfig, progress: Progress, names: Sequence[str] = ()) -> list[CorpusText]:
    """Finds the texts of the configured corpus, restricted to ``corpus.languages`` and ``corpus.pairs``.

    Args:
        names: codes to use where the corpus has other codes of the same languages.

    Raises:
        ConfigError: unknown corpus, or missing path.
        DataError: missing folder, no text in it, or a language or pair that the corpus does not have.
    """
    load_plugin("corpora", config.name, _READERS)
    if config.name not in _READERS:
        remedy = offer_names("corpora", config.name, _READERS)
        raise ConfigError(f"there is no corpus '{config.name}'", "corpus.name", remedy)
    texts = _one_name_each(_READERS[config.name](config, progress), names, progress)
    texts = sorted(_only_pairs(_only_languages(texts, config.languages), config.pairs), key=lambda text: text.name)
    if not texts:
        raise DataError("no text is selected", f"corpus={config.name}", "add languages to corpus.languages")
    return texts


def _one_name_each(texts: list[CorpusText], names: Sequence[str], progress: Progress) -> list[CorpusText]:
    """Uses one code for a language where the corpus has several (``en``, ``eng_Latn``): that of the training text."""
    trained = {code for text in texts if text.split in ("train", None) for code in text.sides}
    others = {code for text in texts for code in text.sides}
    code_of = one_code_each([*names, *sorted(trained), *sorted(others)])
    renamed = [f"{code} as {code_of[code]}" for code in sorted(others) if code != code_of[code]]
    if renamed:
        progress.print(f"languages renamed to one code: {', '.join(renamed)}")
    return [replace(text, sides=_with_codes(text, code_of)) for text in texts]


def _with_codes(text: CorpusText, code_of: Mapping[str, str]) -> Sides:
    codes = [code_of[code] for code in text.sides]
    if len(set(codes)) < len(codes):
        raise DataError(f"'{text.sides.name}' names one language twice", text.place, "use two languages")
    return type(text.sides)(*codes)


def _only_languages(texts: list[CorpusText], languages: tuple[str, ...]) -> list[CorpusText]:
    if not languages:
        return texts
    known = sorted({language for text in texts for language in text.sides})
    wanted = set()
    for language in languages:
        code = find_same(language, known)
        if code is None:
            raise DataError(
                f"the corpus has no language '{language}'", "corpus.languages", did_you_mean(language, known)
            )
        wanted.add(code)
    inside = [text for text in texts if set(text.sides) <= wanted]
    if inside:
        return inside
    # Only languages other than English of an English-centric corpus: English is added.
    wanted |= {find_english(known) or ""}
    return [text for text in texts if set(text.sides) <= wanted]


def _only_pairs(texts: list[CorpusText], names: tuple[str, ...]) -> list[CorpusText]:
    if not names:
        return texts
    known = {text.sides for text in texts}
    languages = sorted({language for sides in known for language in sides})
    wanted: set[Sides] = set()
    for name in names:
        pair = Pair(*(find_same(code, languages) or code for code in Pair.parse(name)))
        wanted |= {pair, pair.reversed}
        if not {pair, pair.reversed} & known:
            raise DataError(
                f"the corpus has no pair '{name}'", "corpus.pairs", did_you_mean(name, [p.name for p in known])
            )
    return [text for text in texts if text.sides in wanted]


def corpus_folder(config: CorpusConfig) -> Path:
    """``corpus.path`` as an existing folder.

    Raises:
        ConfigError: it is not set.
        DataError: it does not exist.
    """
    if not config.path:
        raise ConfigError(
            f"corpus={config.name} needs the folder of the text", "corpus.path", "add corpus.path=/folder/of/the/text"
        )
    folder = Path(config.path).expanduser()
    if not folder.is_dir():
        raise DataError(
            "the corpus folder does not exist", str(folder), "correct corpus.path=…, or unpack the corpus in it"
        )
    return folder


def listing(names: Iterable[str], limit: int = 6) -> str:
    """The first ``limit`` names, for a message."""
    names = sorted(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")

"""``manifest.json`` of a prepared data folder: content, settings, and the checksum of every file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from moe_train.data.text.lines import sha256
from moe_train.data.text.pairs import LANGUAGE, SPLITS, Pair, parse_sides
from moe_train.errors import DataError
from moe_train.utils.atomic_io import sync_folder, write_synced
from moe_train.utils.json_files import entry, file_digests, read_object

FILE = "manifest.json"
FORMAT = 1
BY_NAME = "by_name"  # settings.vocabulary.ids of an imported vocabulary
_MAX_VOCABULARY = 1 << 31  # ids have 32 bits


@dataclass(frozen=True)
class Manifest:
    """The content of ``manifest.json``.

    Attributes:
        directions: all directions of the folder (none: single languages); ``counts`` has them by split.
        counts: split -> name of the files' pair or language -> sentences.
        vocabulary: entries of the dictionary, special symbols, tags and mask included.
        tiers: language -> ``high``, ``medium`` or ``low``.
        cleaning: name of the training text -> rule -> pairs or lines (``read``, ``kept``, and the numbers dropped or
            changed by each rule).
        overlap: held-out text that also occurs in training: split -> pair -> counts.
        sources: the corpus's own files, with checksums.
        files: every other file of the folder, relative path -> {"sha256", "bytes"}.
    """

    corpus: str
    languages: tuple[str, ...]
    directions: tuple[str, ...]
    counts: Mapping[str, Mapping[str, int]]
    vocabulary: int
    settings: Mapping[str, Any]
    tiers: Mapping[str, str]
    cleaning: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    overlap: Mapping[str, Mapping[str, Mapping[str, int]]] = field(default_factory=dict)
    sources: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    format: int = FORMAT

    @property
    def ids_by_name(self) -> bool:
        """Whether dict.txt has an order of its own, as an imported vocabulary has; else ids follow from the pieces."""
        vocabulary = self.settings.get("vocabulary")
        return isinstance(vocabulary, Mapping) and vocabulary.get("ids") == BY_NAME

    def write(self, folder: Path) -> None:
        """Writes the manifest; equal content gives equal bytes."""
        text = json.dumps(asdict(self), indent=1, sort_keys=True, ensure_ascii=False)
        write_synced(folder / FILE, text + "\n")

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Reads the manifest of a data folder.

        Raises:
            DataError: no folder, no manifest, or an invalid one: another format, values of other types, or without the
                checksum of a file that belongs to the folder.
        """
        path = folder / FILE
        if not folder.is_dir():
            raise DataError(
                "the data folder does not exist", str(folder), "make it with moe-prepare, or correct data=…"
            )
        if not path.is_file():
            raise DataError(
                "this is not a complete data folder: manifest.json is missing", str(folder), "run moe-prepare"
            )
        try:
            values = read_object(path) or {}
            version = entry(values, "format", int)
            if version == FORMAT:
                values["languages"], values["directions"] = tuple(values["languages"]), tuple(values["directions"])
                manifest = cls(**values)
                problem = next(manifest._problems(), "")
        except (ValueError, LookupError, TypeError, AttributeError, DataError) as error:
            version, problem = FORMAT, error.what if isinstance(error, DataError) else str(error)
        if version != FORMAT:
            what = f"the data folder has format {version}, this version reads {FORMAT}"
            raise DataError(what, str(folder), "run moe-prepare again")
        if problem:
            raise DataError(f"the manifest cannot be read ({problem})", str(path), "run moe-prepare again")
        return manifest

    def _problems(self) -> Iterator[str]:
        """Yields values that :meth:`write` would not write.

        Raises:
            ValueError, LookupError, TypeError, AttributeError, DataError: a value is of another type or form.
        """
        for key in fields(self):
            wanted = {"languages": tuple, "directions": tuple, "vocabulary": int, "corpus": str, "format": int}
            if not isinstance(getattr(self, key.name), wanted.get(key.name, Mapping)):  # type: ignore[arg-type]
                yield f"'{key.name}' is a {type(getattr(self, key.name)).__name__}"
        if type(self.vocabulary) is not int or not 0 < self.vocabulary < _MAX_VOCABULARY:
            yield f"'vocabulary' cannot be {self.vocabulary!r:.40}"
        shapes = {"tiers": (1, str), "cleaning": (2, int), "overlap": (3, int)}
        for name, (depth, kind) in shapes.items():
            if not _holds(getattr(self, name), depth, kind):
                yield f"'{name}' has values of another type"
        for language in self.languages:
            if not LANGUAGE.fullmatch(language):
                yield f"{language!r} is not a language code"
        if sorted(set(self.languages)) != list(self.languages):
            yield "'languages' are not sorted"
        for direction in self.directions:
            if not {*Pair.parse(direction)} <= {*self.languages}:
                yield f"the direction {direction!r} has a language that is not listed"
        for split, texts in self.counts.items():
            for name, count in texts.items():
                if split not in SPLITS or type(count) is not int or count < 0:
                    yield f"there are {count!r} sentences of {name!r} in {split!r}"
                elif not {*parse_sides(name)} <= {*self.languages}:
                    yield f"the text {name!r} has a language that is not listed"
        file_digests(self.files)
        for name in self._needed():
            if name not in self.files:
                yield f"it has no checksum of {name!r}"

    def _needed(self) -> Iterator[str]:
        """Names of the files that readers of the folder need."""
        yield from ("spm.model", "dict.txt")
        for split, texts in self.counts.items():
            for sides in map(parse_sides, texts):
                for file in (f"{split}.{sides.file(language)}" for language in sides):
                    yield from (f"{file}.bin", f"{file}.idx")
                    if split != "train":
                        yield f"raw/{file}"


def _holds(value: Any, depth: int, kind: type) -> bool:
    """Whether a value is mappings, ``depth`` deep, of values of a type; integers are not negative."""
    if depth:
        return isinstance(value, Mapping) and all(_holds(inner, depth - 1, kind) for inner in value.values())
    return type(value) is kind and not (isinstance(value, int) and value < 0)


def describe_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Checksum and size of every file below a folder except the manifest; also syncs the files to disk."""
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != FILE)
    files = {}
    for path in paths:
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
        files[path.relative_to(folder).as_posix()] = {"sha256": sha256(path), "bytes": path.stat().st_size}
    for parent in {path.parent for path in paths} | {folder}:
        sync_folder(parent)
    return files

"""``manifest.json``: what a prepared data folder holds, how it was made, and the checksum of every file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from moe_train.data.lines import sha256
from moe_train.errors import DataError

FILE = "manifest.json"
FORMAT = 1


@dataclass(frozen=True)
class Manifest:
    """The content of ``manifest.json``.

    Attributes:
        directions: every direction that the folder is for (none: single languages); ``counts`` has them by split.
        counts: split -> name of the files' pair or language -> sentences.
        vocabulary: entries of the dictionary, special symbols, tags and mask included.
        tiers: language -> ``high``, ``medium`` or ``low``.
        cleaning: name of the training text -> rule -> pairs or lines (``read``, ``kept``, and what each rule dropped or
            mended).
        overlap: held-out text that also occurs in training: split -> pair -> counts.
        sources: the corpus's own files, with checksums.
        files: every file of the folder but this one, relative path -> {"sha256", "bytes"}.
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

    def write(self, folder: Path) -> None:
        """Writes the manifest; the same content always gives the same bytes."""
        text = json.dumps(asdict(self), indent=1, sort_keys=True, ensure_ascii=False)
        (folder / FILE).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Reads the manifest of a data folder.

        Raises:
            DataError: no folder, no manifest, or not one of ours.
        """
        path = folder / FILE
        if not folder.is_dir():
            raise DataError(
                "the data folder does not exist", str(folder), "make it with moe-prepare, or correct data=…"
            )
        if not path.is_file():
            raise DataError("this is no finished data folder: manifest.json is missing", str(folder), "run moe-prepare")
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            version = values["format"]
            if version != FORMAT:
                raise DataError(
                    f"the data folder has format {version}, this version reads {FORMAT}",
                    str(folder),
                    "run moe-prepare again",
                )
            values["languages"], values["directions"] = tuple(values["languages"]), tuple(values["directions"])
            return cls(**values)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise DataError(f"the manifest cannot be read ({error})", str(path), "run moe-prepare again") from error


def describe_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Checksum and size of every file below a folder, apart from the manifest itself."""
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != FILE)
    return {p.relative_to(folder).as_posix(): {"sha256": sha256(p), "bytes": p.stat().st_size} for p in paths}

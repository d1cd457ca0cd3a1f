"""What a preparation is going to do: texts, directions, settings, and whether a finished folder has it all already."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_train.config import to_mapping
from moe_train.config.corpus import PrepareConfig
from moe_train.data.corpora import CorpusText, read_corpus
from moe_train.data.folder import DataFolder
from moe_train.data.manifest import FILE, Manifest
from moe_train.data.stage_progress import Progress
from moe_train.data.text.languages import find_same
from moe_train.data.text.lines import sha256
from moe_train.data.text.pairs import Pair, Sides
from moe_train.errors import DataError, did_you_mean

_ELSEWHERE = {"out", "overwrite", "workers"}
_PLACES = {"path", "train_path", "cache", "max_expansion"}


@dataclass(frozen=True)
class PreparationPlan:
    """The outcome of looking at config and corpus, before anything is written.

    Attributes:
        texts: in the order of their names.
        settings: what decides the bytes of the folder, apart from the texts themselves.
        sources: checksums of the texts' files.
    """

    texts: tuple[CorpusText, ...]
    directions: tuple[str, ...]
    languages: tuple[str, ...]
    settings: Mapping[str, Any]
    sources: Mapping[str, Mapping[str, Any]]

    @property
    def given(self) -> list[CorpusText]:
        """Held-out files of the user."""
        return [text for text in self.texts if text.split in ("valid", "test")]

    @property
    def trained(self) -> list[CorpusText]:
        """Training text, and text that is still to be split."""
        return [text for text in self.texts if text.split in ("train", None)]

    @property
    def missing(self) -> dict[Sides, list[str]]:
        """Held-out splits to cut, for each pair whose text has no split."""
        there = {(text.split, pair) for text in self.given for pair in (text.sides, text.sides.reversed)}
        unsplit = [text.sides for text in self.texts if text.split is None]
        return {pair: [s for s in ("valid", "test") if (s, pair) not in there] for pair in unsplit}


def make_plan(config: PrepareConfig, progress: Progress) -> PreparationPlan:
    """Reads the corpus's table of contents.

    Raises:
        ConfigError, DataError: whatever is wrong with corpus, languages or directions.
    """
    reused = DataFolder.open(config.vocabulary.reuse).languages if config.vocabulary.reuse else ()
    texts = read_corpus(config.corpus, progress, reused)
    directions = _directions(config.directions, {text.sides for text in texts})
    texts = [t for t in texts if not t.sides.directions or set(t.sides.directions) & set(directions)]
    _refuse_twins(texts)
    languages = sorted({language for text in texts for language in text.sides})
    if config.vocabulary.reuse:
        languages = _languages_of_reused(config.vocabulary.reuse, languages)
    elif not any(text.split in ("train", None) for text in texts):
        raise DataError(
            "there is no training text to learn a vocabulary from",
            f"corpus={config.corpus.name}",
            "add training text (flores200: corpus.train_path=…) or take a data folder's vocabulary: vocabulary.reuse=…",
        )
    return PreparationPlan(tuple(texts), tuple(directions), tuple(languages), _settings(config), _sources(texts))


def _refuse_twins(texts: Sequence[CorpusText]) -> None:
    found: dict[tuple[str, Sides], CorpusText] = {}
    for text in texts:
        other = found.setdefault((text.split or "train", text.sides), text)
        if other is not text:
            # Names are equal where a language had two codes.
            one, two = (t.inputs[0].name if t.inputs and text.name == other.name else t.name for t in (other, text))
            kind = {"valid": "validation", "test": "test"}.get(text.split or "", "training")
            raise DataError(
                f"both '{one}' and '{two}' would be {kind} text of {text.sides.name}",
                str(text.inputs[0].parent) if text.inputs else "",
                "keep one of them, or join them into one",
            )


def _directions(wanted: Sequence[str], sides: set[Sides]) -> list[str]:
    possible = sorted({direction for one in sides for direction in one.directions})
    languages = sorted({language for one in sides for language in one})
    chosen = set()
    for direction in wanted:
        codes = []
        for language in Pair.parse(direction):
            code = find_same(language, languages)
            if code is None:
                raise DataError(
                    f"the direction '{direction}' names the language '{language}', which the corpus has not",
                    "directions",
                    did_you_mean(language, languages),
                )
            codes.append(code)
        chosen.add("-".join(codes))
        if "-".join(codes) not in possible:
            raise DataError(
                f"the corpus has no text for '{direction}'", "directions", did_you_mean(direction, possible)
            )
    return sorted(chosen) or possible


def _languages_of_reused(reuse: str, languages: Sequence[str]) -> list[str]:
    folder = DataFolder.open(reuse)
    folder.verify(training=False)
    known = folder.languages
    for language in languages:
        if language not in known:
            raise DataError(
                f"the vocabulary of {reuse} has no language '{language}'",
                "vocabulary.reuse",
                f"restrict corpus.languages to {', '.join(known)}",
            )
    return list(known)


def _settings(config: PrepareConfig) -> dict[str, Any]:
    settings = {key: value for key, value in to_mapping(config).items() if key not in _ELSEWHERE}
    settings["corpus"] = {key: value for key, value in settings["corpus"].items() if key not in _PLACES}
    if config.vocabulary.reuse:
        settings["vocabulary"]["reuse"] = DataFolder.open(config.vocabulary.reuse).manifest.files["spm.model"]["sha256"]
    return settings


def _sources(texts: Sequence[CorpusText]) -> dict[str, dict[str, Any]]:
    files = sorted({path for text in texts for path in text.inputs}, key=lambda path: (path.name, str(path)))
    sources: dict[str, dict[str, Any]] = {}
    for path in files:
        name = path.name
        while name in sources:  # files of the same name in different folders
            name += "+"
        sources[name] = {"sha256": sha256(path), "bytes": path.stat().st_size}
    return sources


def finished(out: Path, plan: PreparationPlan, overwrite: bool) -> bool:
    """Whether ``out`` already holds what the plan would make.

    Raises:
        DataError: it holds something else, and ``overwrite`` does not allow to replace it.
    """
    if not out.exists():
        return False
    if not (out / FILE).is_file():
        if out.is_dir() and not any(out.iterdir()):
            return False
        raise DataError("the place is taken by something that is no data folder", str(out), "choose another out=…")
    try:
        folder = DataFolder.open(out)
        folder.verify()
    except DataError:
        if overwrite:
            return False
        raise
    changed = _differences(folder.manifest, plan)
    if changed and not overwrite:
        raise DataError(
            f"a data folder made otherwise is here already (differs in {', '.join(changed)})",
            str(out),
            "choose another out=…, or replace it with overwrite=true",
        )
    return not changed


def has_other_files(out: Path) -> bool:
    """Whether a folder holds files that its manifest does not list, or has no manifest that can be read."""
    try:
        listed = {FILE, *Manifest.read(out).files}
    except DataError:
        return True
    files = (path for path in out.rglob("*") if path.is_symlink() or not path.is_dir())
    return any(path.relative_to(out).as_posix() not in listed for path in files)


def _differences(manifest: Manifest, plan: PreparationPlan) -> list[str]:
    old, new = dict(_flat(manifest.settings)), dict(_flat(plan.settings))
    changed = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    return changed + (["the corpus's files"] if dict(manifest.sources) != dict(plan.sources) else [])


def _flat(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    flat: list[tuple[str, Any]] = []
    for key, value in settings.items():
        if isinstance(value, Mapping):
            flat += _flat(value, f"{prefix}{key}.")
        else:
            flat.append((f"{prefix}{key}", value))
    return flat

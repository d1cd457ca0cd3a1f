"""Plans a preparation: texts, directions, settings, and whether the folder exists already with the same content."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_train.config import to_mapping
from moe_train.config.corpus import PrepareConfig
from moe_train.data.corpora import CorpusText, read_corpus
from moe_train.data.folder import DataFolder
from moe_train.data.manifest import BY_NAME, FILE, Manifest
from moe_train.data.stage_progress import Progress
from moe_train.data.text.languages import find_same
from moe_train.data.text.lines import sha256
from moe_train.data.text.pairs import Pair, Sides
from moe_train.errors import DataError, did_you_mean

# Keys that do not change the content of the folder.
_IGNORED = {"out", "overwrite", "workers"}
_IGNORED_OF_CORPUS = {"path", "train_path", "cache", "max_expansion"}


@dataclass(frozen=True)
class PreparationPlan:
    """What is to be made from config and corpus.

    Attributes:
        texts: in the order of their names.
        settings: those that determine the bytes of the folder, besides the texts.
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
        """Training text, and text without a split."""
        return [text for text in self.texts if text.split in ("train", None)]

    @property
    def missing(self) -> dict[Sides, list[str]]:
        """Held-out splits to make, for each pair whose text has no split."""
        present = {(text.split, pair) for text in self.given for pair in (text.sides, text.sides.reversed)}
        unsplit = [text.sides for text in self.texts if text.split is None]
        return {pair: [s for s in ("valid", "test") if (s, pair) not in present] for pair in unsplit}


def plan_preparation(config: PrepareConfig, progress: Progress) -> PreparationPlan:
    """Lists the texts of the corpus.

    Raises:
        ConfigError, DataError: an error in corpus, languages or directions.
    """
    reused = DataFolder.open(config.vocabulary.reuse).languages if config.vocabulary.reuse else ()
    texts = read_corpus(config.corpus, progress, reused)
    directions = _directions(config.directions, {text.sides for text in texts})
    texts = [t for t in texts if not t.sides.directions or set(t.sides.directions) & set(directions)]
    _check_unique(texts)
    languages = sorted({language for text in texts for language in text.sides})
    if config.vocabulary.reuse:
        languages = _languages_of_reused(config.vocabulary.reuse, languages)
    elif not any(text.split in ("train", None) for text in texts):
        raise DataError(
            "there is no training text to learn a vocabulary from",
            f"corpus={config.corpus.name}",
            "add training text (flores200: corpus.train_path=…) or reuse that of a data folder: vocabulary.reuse=…",
        )
    return PreparationPlan(tuple(texts), tuple(directions), tuple(languages), _settings(config), _sources(texts))


def _check_unique(texts: Sequence[CorpusText]) -> None:
    found: dict[tuple[str, Sides], CorpusText] = {}
    for text in texts:
        other = found.setdefault((text.split or "train", text.sides), text)
        if other is not text:
            # Their names are equal if a language had two codes.
            one, two = (t.inputs[0].name if t.inputs and text.name == other.name else t.name for t in (other, text))
            kind = {"valid": "validation", "test": "test"}.get(text.split or "", "training")
            raise DataError(
                f"both '{one}' and '{two}' would be {kind} text of {text.sides.name}",
                str(text.inputs[0].parent) if text.inputs else "",
                "keep one of them, or concatenate them",
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
                    f"the direction '{direction}' has the language '{language}', which the corpus does not have",
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
    settings = {key: value for key, value in to_mapping(config).items() if key not in _IGNORED}
    settings["corpus"] = {key: value for key, value in settings["corpus"].items() if key not in _IGNORED_OF_CORPUS}
    if config.vocabulary.reuse:
        reused = DataFolder.open(config.vocabulary.reuse).manifest
        settings["vocabulary"]["reuse"] = reused.files["spm.model"]["sha256"]
        if reused.ids_by_name:
            settings["vocabulary"]["ids"] = BY_NAME
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


def is_finished(out: Path, plan: PreparationPlan, overwrite: bool) -> bool:
    """Whether ``out`` already contains what the plan would make.

    Raises:
        DataError: it contains something else, and ``overwrite`` is not set.
    """
    if not out.exists():
        return False
    if not (out / FILE).is_file():
        if out.is_dir() and not any(out.iterdir()):
            return False
        raise DataError("it exists already and is not a data folder", str(out), "set another out=…")
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
            f"a data folder with other settings exists already (differs in {', '.join(changed)})",
            str(out),
            "set another out=…, or replace it with overwrite=true",
        )
    return not changed


def has_other_files(out: Path) -> bool:
    """Whether a folder has files that are not in its manifest, or no valid manifest."""
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

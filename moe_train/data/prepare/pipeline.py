"""Makes a data folder from a corpus (``moe-prepare``).

The folder is made under a temporary name and renamed when it is complete (:mod:`moe_train.utils.replace_folder`): a
crash leaves no incomplete folder, and an older folder stays until the new one replaces it.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from importlib.metadata import version
from pathlib import Path
from typing import Any

import moe_train
from moe_train.config.corpus import PrepareConfig, TierConfig
from moe_train.data.folder import DataFolder
from moe_train.data.manifest import Manifest, describe_files
from moe_train.data.prepare.cleaned import CleanedText, clean_text
from moe_train.data.prepare.contamination import HeldOut, blank_note, count_overlap, held_out_keys
from moe_train.data.prepare.preparation_plan import PreparationPlan, has_other_files, is_finished, plan_preparation
from moe_train.data.prepare.sampling import sample_sentences
from moe_train.data.prepare.splits import Selection, select
from moe_train.data.prepare.writer import FolderWriter
from moe_train.data.stage_progress import Progress
from moe_train.data.text.languages import find_same
from moe_train.data.text.pairs import parse_sides
from moe_train.data.text.tokenizer import Tokenizer
from moe_train.data.text.vocabulary import dictionary_size, train_sentencepiece
from moe_train.errors import DataError
from moe_train.fairseq_compat import require_fairseq
from moe_train.utils.process_map import Workers, available_cores
from moe_train.utils.replace_folder import recover_folder, replacing_folder


def prepare(config: PrepareConfig, progress: Progress | None = None) -> DataFolder:
    """Makes the data folder ``config.out``, unless it exists already with the same text and settings.

    Args:
        progress: shows the stages; None: no output.

    Raises:
        ConfigError, DataError: an error in config, corpus or ``out``, whose previous content is not changed.
        MissingDependency: fairseq is not installed.
    """
    require_fairseq()
    progress = progress or Progress()
    out = Path(config.out).expanduser()
    try:
        recover_folder(out)
        plan = plan_preparation(config, progress)
        if is_finished(out, plan, config.overwrite) or not _make(config, plan, out, progress):
            progress.print(f"{out} exists already, made from the same text with the same settings: nothing to do")
    except OSError as error:
        what, where = f"reading or writing failed ({error.strerror})", str(error.filename or out)
        raise DataError(what, where, "check disk space and permissions, or set another out=…") from error
    except BrokenProcessPool as error:
        what = "a worker process was killed, probably because memory ran out"
        raise DataError(what, remedy="run it again with a smaller workers=…") from error
    return DataFolder.open(out)


def _make(config: PrepareConfig, plan: PreparationPlan, out: Path, progress: Progress) -> bool:
    """Makes the folder, unless another process has made it meanwhile."""
    with replacing_folder(out) as replacement:
        if is_finished(out, plan, config.overwrite):
            return False
        _Preparation(config, plan, replacement.begin(), progress).run()
        kept = replacement.finish(keep=has_other_files(out))
    if kept is not None:
        progress.print(f"{out} had files that moe-prepare did not write: the previous folder is kept as {kept}")
    return True


class _Preparation:
    """One run of the pipeline into an empty folder."""

    def __init__(self, config: PrepareConfig, plan: PreparationPlan, folder: Path, progress: Progress) -> None:
        self.config, self.plan, self.folder, self.progress = config, plan, folder, progress
        self.threads = config.workers or available_cores()
        self.reuse = Path(config.vocabulary.reuse).expanduser() if config.vocabulary.reuse else None

    def run(self) -> None:
        """Runs all stages in order."""
        work = self.folder / ".work"
        work.mkdir()
        given = [HeldOut.read(text) for text in self.plan.given]
        if note := blank_note(given):
            self.progress.print(note)
        keys = held_out_keys(given)
        selections = select(self._clean(work), keys, self.plan.missing, self.config.corpus, self.config.seed)
        overlap = count_overlap(given, selections, keys)
        tokenizer = self._tokenizer(selections)
        counts = self._write(selections, given, tokenizer)
        shutil.rmtree(work)
        self._write_manifest(selections, counts, overlap, self._entries(tokenizer))

    def _clean(self, work: Path) -> list[CleanedText]:
        rules = self.config.corpus.cleaning
        with Workers(self.threads) as workers, self.progress.stage("cleaning") as advance:
            return [clean_text(text, rules, work, workers, advance) for text in self.plan.trained]

    def _tokenizer(self, selections: Sequence[Selection]) -> Tokenizer:
        path, settings = self.folder / "spm.model", self.config.vocabulary
        if self.reuse:
            shutil.copyfile(self.reuse / "spm.model", path)
            return Tokenizer(path, DataFolder.open(self.reuse).tokenizer().ids)
        with self.progress.stage("learning the vocabulary", total=1) as advance:
            train_sentencepiece(sample_sentences(selections, settings, self.config.seed), settings, path)
            advance(1)
        return Tokenizer(path)

    def _entries(self, tokenizer: Tokenizer) -> int:
        """Entries of the dictionary."""
        if self.reuse:
            return DataFolder.open(self.reuse).manifest.vocabulary
        return dictionary_size(tokenizer, self.plan.languages)

    def _write(
        self, selections: Sequence[Selection], given: Sequence[HeldOut], tokenizer: Tokenizer
    ) -> dict[str, dict[str, int]]:
        with self.progress.stage("binarising") as advance:
            writer = FolderWriter(
                self.folder, tokenizer, self.plan.languages, self._entries(tokenizer), self.threads, advance
            )
            for selection in selections:
                text, sides = selection.text, selection.text.sides
                writer.add_training(sides, *(text.lines(language, selection.train) for language in sides))
                for split, rows in selection.held_out.items():
                    writer.add_held_out(split, sides, *(list(text.lines(language, rows)) for language in sides))
            for held in given:
                texts = (list(lines) for lines in zip(*held.lines, strict=True))
                writer.add_held_out(str(held.text.split), held.text.sides, *texts)
        writer.write_dictionaries(like=self.reuse / "dict.txt" if self.reuse else None)
        return writer.counts

    def _write_manifest(
        self,
        selections: Sequence[Selection],
        counts: Mapping[str, Mapping[str, int]],
        overlap: Mapping[str, Any],
        entries: int,
    ) -> None:
        Manifest(
            corpus=self.config.corpus.name,
            languages=self.plan.languages,
            directions=self.plan.directions,
            counts=counts,
            vocabulary=entries,
            settings=self.plan.settings,
            tiers=self._tiers(counts["train"]),
            cleaning={selection.text.text.name: dict(selection.text.counts) for selection in selections},
            overlap=overlap,
            sources=self.plan.sources,
            versions={"moe_train": moe_train.__version__, "sentencepiece": version("sentencepiece")},
            files=describe_files(self.folder),
        ).write(self.folder)

    def _tiers(self, training: Mapping[str, int]) -> dict[str, str]:
        if self.reuse and not training:
            return DataFolder.open(self.reuse).tiers
        return tiers(training, self.config.tiers)


def tiers(training: Mapping[str, int], config: TierConfig) -> dict[str, str]:
    """Resource tier of each language by its number of training pairs or lines."""
    sizes: dict[str, int] = {}
    for name, size in training.items():
        for language in parse_sides(name):
            sizes[language] = sizes.get(language, 0) + size
    bounds = {"high": config.high, "medium": config.medium, "low": 0}
    found = {
        language: next(tier for tier, bound in bounds.items() if size >= bound) for language, size in sizes.items()
    }
    return {**found, **{find_same(code, found) or code: tier for code, tier in config.languages.items()}}

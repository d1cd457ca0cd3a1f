"""Files of hypotheses, with which scores can be checked and compared without the model or the data.

hypotheses/test.en-de.de            the outputs, one line per source line
hypotheses/test.en-de.de.reference  the references
hypotheses/test.en-de.en            the sources
hypotheses/test.en-de.de.scores     one score per line: log-probability over length^penalty
hypotheses/test.en-de.de.nbest      with search.n_best: line, rank, score and text of each hypothesis, with tabs between

Files of a part of the split are in a folder with its name: hypotheses/first-3/test.en-de.de
(:mod:`moe_train.evaluation.result_files`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moe_train.data.text.lines import read_lines
from moe_train.errors import DataError
from moe_train.evaluation.translations import Translation
from moe_train.training.checkpoint.checksums import replace_text

_LINE_ENDS = {ord(c): " " for c in "\r\n"}
_TABS = {ord("\t"): " "}


def hypotheses_folder(run: Path, part: str = "") -> Path:
    """Folder of the outputs of a part of a split; "": of the whole split."""
    return run / "hypotheses" / part


@dataclass(frozen=True)
class OutputFiles:
    """The files of one direction in a run folder."""

    run: Path
    split: str
    direction: str
    part: str = ""

    @property
    def _stem(self) -> Path:
        return hypotheses_folder(self.run, self.part) / f"{self.split}.{self.direction}"

    @property
    def hypotheses(self) -> Path:
        """The outputs."""
        return self._with(self.direction.split("-")[1])

    @property
    def references(self) -> Path:
        """The references."""
        return self._with(f"{self.direction.split('-')[1]}.reference")

    @property
    def sources(self) -> Path:
        """The sources."""
        return self._with(self.direction.split("-")[0])

    @property
    def scores(self) -> Path:
        """One score per line."""
        return self._with(f"{self.direction.split('-')[1]}.scores")

    @property
    def n_best(self) -> Path:
        """The best hypotheses of each line."""
        return self._with(f"{self.direction.split('-')[1]}.nbest")

    @property
    def scored(self) -> Path:
        """A JSON line for each translation that was scored."""
        return self._with(f"{self.direction.split('-')[1]}.jsonl")

    def _with(self, suffix: str) -> Path:
        return self._stem.with_name(f"{self._stem.name}.{suffix}")

    def write(self, sources: Sequence[str], references: Sequence[str], translations: Sequence[Translation]) -> None:
        """Writes the four files, each atomically; and the n-best lists where they have more than one hypothesis."""
        self._stem.parent.mkdir(parents=True, exist_ok=True)
        write_lines(self.sources, sources)
        write_lines(self.references, references)
        write_lines(self.scores, [f"{t.score:.6f}" for t in translations])
        if any(t.others for t in translations):
            write_lines(self.n_best, [row for number, t in enumerate(translations, 1) for row in table_rows(number, t)])
        else:
            self.n_best.unlink(missing_ok=True)
        write_lines(self.hypotheses, [t.text for t in translations])

    def read(self) -> tuple[list[str], list[str]]:
        """Hypotheses and references.

        Raises:
            DataError: one is missing, or they are not aligned.
        """
        for path in (self.hypotheses, self.references):
            if not path.is_file():
                raise DataError("an output file is missing", str(path), "run moe-evaluate again")
        # A model with byte fallback may output a NUL.
        hypotheses, references = (list(read_lines(path, nul=True)) for path in (self.hypotheses, self.references))
        if len(hypotheses) != len(references):
            what = f"{len(hypotheses)} hypotheses for {len(references)} references"
            raise DataError(what, str(self.hypotheses), "run moe-evaluate again")
        return hypotheses, references


def table_rows(number: int, translation: Translation) -> list[str]:
    """Line number, rank, score and text of each hypothesis of a line, with tabs between; the text has none."""
    hypotheses = enumerate(translation.hypotheses, 1)
    return [f"{number}\t{rank}\t{one.score:.6f}\t{one.text.translate(_TABS)}" for rank, one in hypotheses]


def write_lines(path: Path, lines: Sequence[str]) -> None:
    """Writes lines atomically; line ends in them become spaces."""
    replace_text(path, "".join(f"{line.translate(_LINE_ENDS)}\n" for line in lines))

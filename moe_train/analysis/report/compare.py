"""Compares each run with a baseline, by direction, with paired bootstrap on the outputs in the run folders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from moe_train.analysis.report.load_runs import RunReport
from moe_train.analysis.report.sentence_sets import differing_sets
from moe_train.errors import ConfigError, DataError, UserError, did_you_mean
from moe_train.evaluation.scoring.bleu_chrf import Comparison, CorpusScores, Scorer


@dataclass(frozen=True)
class Count:
    """Number of directions in which a run is significantly better or worse than the baseline (by BLEU)."""

    better: int
    worse: int
    directions: int


@dataclass(frozen=True)
class Comparisons:
    """All runs against one baseline.

    Attributes:
        baseline: its name; "" without a comparison.
        significance: p values below it are significant.
        by_run: run -> direction -> comparison.
        notes: reasons why runs or directions were not compared.
    """

    baseline: str = ""
    significance: float = 0.05
    samples: int = 0
    by_run: Mapping[str, Mapping[str, Comparison]] = field(default_factory=dict)
    notes: Sequence[str] = ()

    def count(self, run: str, directions: Sequence[str]) -> Count | None:
        """None where the run was not compared in any of the directions."""
        compared = [c for name, c in self.by_run.get(run, {}).items() if name in directions]
        if not compared:
            return None
        significant = [c for c in compared if c.bleu_p < self.significance]
        better = sum(c.difference.bleu > 0 for c in significant)
        return Count(better, len(significant) - better, len(compared))


def choose_baseline(runs: Sequence[RunReport], wanted: str | None) -> RunReport | None:
    """The wanted run, by name, folder or strategy; else the first with scores.

    Raises:
        ConfigError: the run does not exist, or has no scores.
    """
    scored = [run for run in runs if run.results is not None]
    if wanted is None:
        return scored[0] if scored else None
    for kind in ("name", "path", "strategy"):
        fitting = [run for run in runs if str(getattr(run, kind)).rstrip("/") == wanted.rstrip("/")]
        fitting = fitting or [run for run in runs if kind == "path" and str(run.path).endswith(f"/{wanted.strip('/')}")]
        if len(fitting) == 1:
            if fitting[0].results is None:
                raise ConfigError(f"the baseline '{wanted}' has no scores", remedy="run moe-evaluate on it first")
            return fitting[0]
    raise ConfigError(f"no single run is named '{wanted}'", "baseline", did_you_mean(wanted, [r.name for r in runs]))


def compare(runs: Sequence[RunReport], baseline: RunReport | None, samples: int, significance: float) -> Comparisons:
    """Tests every scored run against the baseline in the directions that both have.

    Runs with other references (other data or sentences) are left out, with a note. Other differences of the sets on
    which runs were scored and validated are noted, too.
    """
    notes = differing_sets(runs)
    if baseline is None or samples == 0:
        return Comparisons(significance=significance, notes=notes)
    by_run: dict[str, dict[str, Comparison]] = {}
    others = [run for run in runs if run.results is not None and run is not baseline]
    assert baseline.results is not None
    for direction in baseline.results.directions:
        outputs, references = _outputs(baseline, others, direction, notes)
        if references is None:
            continue
        try:
            scorer = Scorer(direction.split("-")[1], baseline.results.directions[direction].tokenizer)
        except UserError as error:
            notes.append(f"{direction}: not compared: {error}")
            continue
        base = outputs.pop(baseline.name)
        for name, comparison in scorer.compare(base, outputs, references, samples).items():
            by_run.setdefault(name, {})[direction] = comparison
    return Comparisons(baseline.name, significance, samples, by_run, list(dict.fromkeys(notes)))


def intervals(runs: Sequence[RunReport], comparisons: Comparisons) -> dict[str, dict[str, CorpusScores]]:
    """Run -> direction -> half the width of the 95 % interval of its scores, from the samples of the comparison.

    Directions that were not compared are resampled; those without readable outputs are left out.
    """
    found: dict[str, dict[str, CorpusScores]] = {}
    for run in runs if comparisons.samples else ():
        compared = comparisons.by_run.get(run.name, {})
        found[run.name] = {name: comparison.interval for name, comparison in compared.items()}
        for direction, result in run.results.directions.items() if run.results is not None else ():
            if direction not in compared:
                with suppress(UserError):
                    scorer = Scorer(direction.split("-")[1], result.tokenizer)
                    found[run.name][direction] = scorer.interval(*_read(run, direction), comparisons.samples)
    return found


def _outputs(
    baseline: RunReport, others: Sequence[RunReport], direction: str, notes: list[str]
) -> tuple[dict[str, list[str]], list[str] | None]:
    """Hypotheses by run, including the baseline, and their common references (None: the baseline has none)."""
    try:
        hypotheses, references = _read(baseline, direction)
    except DataError as error:
        notes.append(f"{baseline.name}: {error}")
        return {}, None
    found = {baseline.name: hypotheses}
    for run in others:
        if run.results is None or direction not in run.results.directions:
            continue
        try:
            lines, own = _read(run, direction)
        except DataError as error:
            notes.append(f"{run.name}: {error}")
            continue
        if own == references:
            found[run.name] = lines
        else:
            notes.append(
                f"{run.name}: {direction} was evaluated on another text than the baseline, and is not compared"
            )
    return found, references


def _read(run: RunReport, direction: str) -> tuple[list[str], list[str]]:
    """Hypotheses and references of a run.

    Raises:
        DataError: they cannot be read, or their number is not that of the scores.
    """
    files = run.files.outputs(direction)
    try:
        hypotheses, references = files.read()
    except OSError as error:
        raise DataError(f"it cannot be read ({error.strerror or error})", str(files.hypotheses)) from error
    assert run.results is not None
    scored = run.results.directions[direction].sentences
    if len(hypotheses) != scored:
        what = f"it has {len(hypotheses):,} lines, and {scored:,} were scored"
        raise DataError(what, str(files.hypotheses), "run moe-evaluate again")
    return hypotheses, references

"""The claims of THOR, SMoE and SAM in small: translation in six languages at equal active compute, BLEU by tier.

    python scripts/reproduce/translation.py --data data-bin/parallel15 --seeds 2

Experts are narrower where a token passes several, so that all models cost what the dense one costs: top-2 halves them,
SMoE's two strata of top-2 make 1.5 passes of two, SAM with k experts takes a k-th of the width and k times as many.
THOR's second pass costs training time, not inference; its ablation has one expert (R-Drop).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from study import Claim, Study, Variant, parser, wanted

from moe_train.analysis.report_compare import compare
from moe_train.analysis.report_runs import read_runs
from moe_train.evaluation.results import read_results

LANGUAGES = ("de", "fr", "ru", "ja", "tr", "ar")  # two of each tier of the shared corpus
_WIDTH = 768  # of the dense feed-forward


def _experts(strategy: str, count: int, width: int, *more: str) -> tuple[str, ...]:
    return (f"routing={strategy}", f"routing.num_experts={count}", f"routing.expert_ffn_dim={width}", *more)


VARIANTS = (
    Variant("dense", ("routing=dense",)),
    Variant("switch", _experts("switch", 8, _WIDTH)),
    Variant("top_2", _experts("top_k", 16, _WIDTH // 2, "routing.top_k=2")),
    Variant("smoe", _experts("smoe", 24, _WIDTH // 3, "routing.strata=[12,12]", "routing.top_k=2")),
    Variant("sam_1", _experts("sam", 8, _WIDTH, "routing.num_groups=4", "routing.top_k=1")),
    Variant("sam_2", _experts("sam", 16, _WIDTH // 2, "routing.num_groups=4", "routing.top_k=2")),
    Variant("sam_4", _experts("sam", 32, _WIDTH // 4, "routing.num_groups=4", "routing.top_k=4")),
    Variant("thor", _experts("thor", 8, _WIDTH)),
    Variant("thor_1", _experts("thor", 1, _WIDTH)),
)
COLUMNS = (
    ("bleu", "BLEU, all"),
    ("bleu high resource", "high"),
    ("bleu medium resource", "medium"),
    ("bleu low resource", "low"),
    ("chrf", "chrF++"),
    ("better", "directions better than Switch (p < 0.05)"),
    ("worse", "worse"),
    ("words_per_second", "words/s (training)"),
)


def _above(one: str, other: str, paper: str, says: str) -> Claim:
    """The claim that one variant has a higher BLEU than another."""

    def measured(means: Any) -> tuple[str, bool]:
        first, second = means[one]["bleu"], means[other]["bleu"]
        return f"{one} {first:.2f}, {other} {second:.2f} BLEU", first > second

    return Claim(paper, says, (one, other), measured)


def _more_is_better(means: Any) -> tuple[str, bool]:
    scores = [means[f"sam_{k}"]["bleu"] for k in (1, 2, 4)]
    return "k = 1, 2, 4: " + ", ".join(f"{score:.2f}" for score in scores), scores[0] < scores[1] < scores[2]


CLAIMS = (
    _above("thor", "switch", "THOR, abstract", "above Switch (2 BLEU in multilingual translation)"),
    _above("thor", "thor_1", "THOR, our ablation", "above one expert with the same loss (R-Drop)"),
    _above("smoe", "top_2", "SMoE, tables 1 to 3", "above top-2 (0.4 to 1.0 BLEU)"),
    _above("smoe", "switch", "SMoE, table 1", "above Switch (0.9 BLEU)"),
    _above("switch", "dense", "SMoE, table 1", "Switch above dense (2.1 BLEU)"),
    Claim("SAM, abstract", "more active experts are better", ("sam_1", "sam_2", "sam_4"), _more_is_better),
    _above("sam_4", "switch", "SAM, abstract", "above Switch"),
)


def main() -> None:
    """Trains, translates, compares; writes ``translation.json`` and ``translation.md``."""
    options = parser(__doc__ or "", "data-bin/parallel15", seeds=2, updates=2500)
    options.add_argument("--model", default="tiny", help="the model's size; tiny has the widths above")
    options.add_argument("--languages", default=",".join(LANGUAGES), help="each way with English; all: every direction")
    options.add_argument("--max-sentences", type=int, default=150, help="of each test direction (0: all)")
    options.add_argument("--name", default="translation", help="of the results, where several are kept")
    given = options.parse_args()
    study = Study(given.name, "Translation: THOR, SMoE and SAM against Switch, top-2 and dense", COLUMNS, CLAIMS, given)
    study.notes.append("at equal active compute; THOR trains with two passes over each batch")
    for seed in range(1, given.seeds + 1):
        done: list[Path] = []
        for variant in wanted(VARIANTS, given.only):
            folder = study.train(f"{variant.name}-s{seed}", [*common(given, seed), *variant.overrides])
            study.evaluate(folder, "test", f"max_sentences={given.max_sentences}")
            done.append(folder)
            study.note(variant.name, seed, folder, scores(folder))
        _note_significance(study, done, seed)


def common(options: Any, seed: int) -> list[str]:
    """What all runs have."""
    names = [] if options.languages == "all" else options.languages.split(",")
    directions = [direction for code in names for direction in (f"en-{code}", f"{code}-en")]
    tiny = ["model.embed_dim=192", f"model.ffn_dim={_WIDTH}", "model.dropout=0.05"] if options.model == "tiny" else []
    return [
        *(f"model={options.model}", f"data={options.data}", f"seed={seed}"),
        f"task.directions=[{','.join(directions)}]",
        *("training.tokens_per_update=4096", "training.optimizer.lr=0.003", "training.schedule.name=linear", *tiny),
        *("training.schedule.warmup_updates=200", f"training.max_updates={options.updates}", "training.temperature=2"),
        *(f"training.threads={options.threads}", "training.checkpoint.keep=1"),
        *(f"training.checkpoint.every_updates={max(1, options.updates // 2)}", "training.validation.max_sentences=50"),
        f"training.validation.every_updates={max(1, options.updates // 5)}",
    ]


def scores(folder: Path) -> dict[str, float | None]:
    """BLEU and chrF++ on average and by tier, and the speed of training."""
    results = read_results(folder / "test.json")
    assert results is not None
    average = results.average()
    tiers = {
        f"bleu {name}": results.average(members).bleu
        for name, members in results.groups().items()
        if "resource" in name
    }
    (run,) = read_runs([folder])
    return {"bleu": average.bleu, "chrf": average.chrf, **tiers, "words_per_second": run.words_per_second}


def _note_significance(study: Study, folders: Sequence[Path], seed: int) -> None:
    """Paired bootstrap of every run against Switch of the same seed."""
    baseline = next((folder for folder in folders if folder.name == f"switch-s{seed}"), None)
    if baseline is None:
        return
    runs = {run.path: run for run in read_runs(list(folders))}
    reports = list(runs.values())
    found = compare(reports, runs[baseline.resolve()], "test", samples=1000, significance=0.05)
    for report in reports:
        directions = list(report.results.directions) if report.results is not None else []
        count = found.count(report.name, directions)
        if count is not None:
            entry = study.runs[report.path.name]
            entry["measures"] |= {"better": float(count.better), "worse": float(count.worse)}
    study.write()


if __name__ == "__main__":
    main()

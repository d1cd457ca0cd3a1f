"""The claims of THOR, SMoE and SAM in small: translation in six languages at equal active compute, BLEU by tier.

    python scripts/reproduce/translation.py --data data-bin/parallel15 --seeds 2
    python scripts/reproduce/translation.py --data data-bin/parallel15 --budget small --threads 1
    python scripts/reproduce/translation.py --data data-bin/parallel15 --budget gpu --languages all --name on_gpu

Experts are narrower where a token uses several, so that all models have the FLOPs of the dense one: half the width for
top-2, 1.5 passes of two for SMoE's two strata of top-2, and 1/k of the width with k times as many experts for SAM.
THOR's second pass adds training time only; its ablation has one expert (R-Drop). The small budget translates only into
English. Models trained for so short a time hardly translate, so every claim is also tested with the loss on held-out
text, which has far less noise than BLEU.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from measures import Verdict, above
from omegaconf import OmegaConf
from study import Budget, Claim, Study, Variant, parsed, parser, read_lines, wanted

from moe_train.analysis.report.compare import compare
from moe_train.analysis.report.load_runs import read_runs
from moe_train.evaluation.result_files import part_name

MODELS = Path(__file__).parents[2] / "configs" / "model"
LANGUAGES = ("de", "fr", "ru", "zh", "tr", "ar")  # two of each tier of the shared corpus
BUDGETS = {
    "full": Budget(
        updates=2500,
        words=(
            *("training.tokens_per_update=4096", "training.optimizer.lr=0.003", "training.schedule.warmup_updates=200"),
            *("model=tiny", "model.embed_dim=192", "model.ffn_dim=768", "model.dropout=0.05"),
        ),
        items=150,
        takes="about half an hour each on two cores, THOR's twice that",
    ),
    "small": Budget(
        updates=700,
        words=(
            *("training.tokens_per_update=1024", "training.optimizer.lr=0.006", "training.schedule.warmup_updates=50"),
            *("model=tiny", "model.embed_dim=64", "model.ffn_dim=192", "model.dropout=0"),
            "training.max_sentence_tokens=64",
        ),
        items=60,
        takes="into English only, about a minute and a half each on one core, THOR's twice that",
    ),
    "gpu": Budget(
        updates=20_000,
        words=(
            *("training.tokens_per_update=32768", "training.optimizer.lr=0.0007"),
            *("training.schedule.warmup_updates=2000", "training.precision=bf16", "model=base"),
        ),
        items=0,
        takes="not run yet: needs a GPU",
    ),
}


def variants(width: int) -> tuple[Variant, ...]:
    """All variants, with the active compute of a dense feed-forward of ``width``."""

    def experts(strategy: str, count: int, share: int, *more: str) -> tuple[str, ...]:
        dim = f"routing.expert_ffn_dim={width // share}"
        return (f"routing={strategy}", f"routing.num_experts={count}", dim, *more)

    return (
        Variant("dense", ("routing=dense",)),
        Variant("switch", experts("switch", 8, 1)),
        Variant("top_2", experts("top_k", 16, 2, "routing.top_k=2")),
        Variant("smoe", experts("smoe", 24, 3, "routing.strata=[12,12]", "routing.top_k=2")),
        Variant("sam_1", experts("sam", 8, 1, "routing.num_groups=4", "routing.top_k=1")),
        Variant("sam_2", experts("sam", 16, 2, "routing.num_groups=4", "routing.top_k=2")),
        Variant("sam_4", experts("sam", 32, 4, "routing.num_groups=4", "routing.top_k=4")),
        Variant("thor", experts("thor", 8, 1)),
        Variant("thor_1", experts("thor", 1, 1)),
    )


VARIANTS = variants(768)
COLUMNS = (
    ("bleu", "BLEU, all"),
    ("bleu high resource", "high"),
    ("bleu medium resource", "medium"),
    ("bleu low resource", "low"),
    ("chrf", "chrF++"),
    ("copy", "chrF++ of the source as it is"),
    ("loss", "valid nll"),
    ("better", "directions better than Switch (p < 0.05)"),
    ("worse", "worse"),
    ("words_per_second", "words/s (training)"),
)


def _above(one: str, other: str, paper: str, says: str) -> Claim:
    """The claim that one variant has a higher BLEU than another."""

    def measured(means: Any) -> tuple[str, Verdict]:
        text, agrees = above(one, means[one]["bleu"], other, means[other]["bleu"], ".2f")
        return f"{text} (valid nll {means[one]['loss'].text('.3f')} and {means[other]['loss'].text('.3f')})", agrees

    return Claim(paper, says, (one, other), measured)


def _more_is_better(means: Any) -> tuple[str, Verdict]:
    scores, losses = ([means[f"sam_{k}"][measure] for k in (1, 2, 4)] for measure in ("bleu", "loss"))
    both = (", ".join(f"{value:.{digits}f}" for value in values) for values, digits in ((scores, 2), (losses, 3)))
    _, last_above_first = above("4", scores[2], "1", scores[0], ".2f")
    return "k = 1, 2, 4: {} BLEU (valid nll {})".format(*both), last_above_first and scores[0] < scores[1] < scores[2]


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
    options = parser(__doc__ or "", "data-bin/parallel15", 2, BUDGETS)
    options.add_argument("--languages", default=",".join(LANGUAGES), help="with English; all: those of the data")
    options.add_argument("--max-sentences", type=int, help="of each test direction (0: all; default: the budget's)")
    options.add_argument("--name", default="translation", help="of the results, where several are kept")
    given = parsed(options, BUDGETS)
    items = given.size.items if given.max_sentences is None else given.max_sentences
    study = Study(given.name, "Translation: THOR, SMoE and SAM against Switch, top-2 and dense", COLUMNS, CLAIMS, given)
    study.notes.append("at equal active compute; THOR trains with two passes over each batch")
    study.notes.append(
        f"{items or 'all'} test sentences a direction, beam 4; paired bootstrap against the same seed's Switch"
    )
    for seed in range(1, given.seeds + 1):
        done: list[Path] = []
        for variant in wanted(variants(width(given)), given.only):
            folder = study.train(f"{variant.name}-s{seed}", [*common(given, seed), *variant.overrides])
            study.evaluate(folder, max_sentences=items, search={"beam": 4})
            done.append(folder)
            study.note(variant.name, seed, folder, scores(folder, part_name(max_sentences=items)))
        _note_significance(study, done, seed, part_name(max_sentences=items))


def width(options: Any) -> int:
    """Width of the dense feed-forward: the budget's, or the model's own."""
    given = {key: value for key, _, value in (word.partition("=") for word in options.size.words)}
    return int(given.get("model.ffn_dim") or OmegaConf.load(MODELS / f"{given['model']}.yaml").ffn_dim)


def common(options: Any, seed: int) -> list[str]:
    """Overrides of all runs."""
    names = options.languages.split(",")
    both = [f"{code}-en" for code in names] + [f"en-{code}" for code in names if options.budget != "small"]
    directions = "" if options.languages == "all" else ",".join(both)
    return [
        *(f"data={options.data}", f"seed={seed}", f"task.directions=[{directions}]", *options.size.words),
        *("training.schedule.name=linear", "training.temperature=2"),
        *(f"training.max_updates={options.updates}", f"training.threads={options.threads}"),
        *("training.checkpoint.keep=1", f"training.checkpoint.every_updates={max(1, options.updates // 2)}"),
        *("training.validation.max_sentences=50", f"training.validation.every_updates={max(1, options.updates // 3)}"),
    ]


def scores(folder: Path, part: str) -> dict[str, float | None]:
    """BLEU and chrF++ on average and by tier, and the speed of training.

    Args:
        part: of the test split, which was evaluated.
    """
    (run,) = read_runs([folder], part=part)
    results = run.results
    assert results is not None
    average = results.average()
    tiers = {
        f"bleu {name}": results.average(members).bleu for name, members in results.groups.items() if "resource" in name
    }
    copied = results.average(baseline="copy").chrf
    quality = {"bleu": average.bleu, "chrf": average.chrf, "copy": copied, **tiers}
    last = read_lines(folder / "valid.jsonl")[-1]
    return {**quality, "loss": last["nll_loss"], "words_per_second": run.words_per_second}


def _note_significance(study: Study, folders: Sequence[Path], seed: int, part: str) -> None:
    """Paired bootstrap of every run against Switch of the same seed."""
    baseline = next((folder for folder in folders if folder.name == f"switch-s{seed}"), None)
    if baseline is None:
        return
    runs = {run.path: run for run in read_runs(list(folders), part=part)}
    reports = list(runs.values())
    found = compare(reports, runs[baseline.resolve()], samples=1000, significance=0.05)
    for report in reports:
        directions = list(report.results.directions) if report.results is not None else []
        count = found.count(report.name, directions)
        if count is not None:
            study.add(report.path.name, {"better": float(count.better), "worse": float(count.worse)})


if __name__ == "__main__":
    main()

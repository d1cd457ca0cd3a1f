"""Claims of THOR, SMoE and SAM: translation in six languages at equal active compute, BLEU by direction and tier.

    python scripts/reproduce/translation.py --data data-bin/six16000 --stage a      # balance weights
    python scripts/reproduce/translation.py --data data-bin/six16000 --stage b      # the claims, three seeds
    python scripts/reproduce/translation.py --data data-bin/six16000 --stage c      # further strategies, one seed
    python scripts/reproduce/translation.py --data data-bin/six16000 --stage d      # numbers of experts, one seed
    python scripts/reproduce/translation.py --data data-bin/six --budget small --threads 1
    python scripts/reproduce/translation.py --data data-bin/parallel15 --budget gpu --languages all --name on_gpu

Experts are narrower where a token uses several, so that all models have the FLOPs of the dense one: half the width for
top-2, 1.5 passes of two for SMoE's two strata of top-2, and 1/k of the width with k times as many experts for SAM.
THOR's second pass adds training FLOPs, which the learning curves count; its ablation has one expert (R-Drop). The full
and the small budget translate into English only. A claim is decided by the rule in ``decision_rule.py``, from what BLEU
needs of every test line (``results/NAME/RUN.npz``: lengths and counts of n-grams, no text).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from decision_rule import Counts, Decision, decide, line_counts, mean_bleu, sentence_error
from omegaconf import OmegaConf
from study import Budget, Study, Variant, parsed, parser, read_lines, stored_runs, wanted

from moe_train.analysis.report.load_runs import read_runs
from moe_train.data.folder import DataFolder
from moe_train.evaluation.result_files import part_name

MODELS = Path(__file__).parents[2] / "configs" / "model"
LANGUAGES = ("de", "fr", "ru", "zh", "tr", "ar")  # two of each tier of the shared corpus
VALIDATIONS = 10  # points of a learning curve
BALANCE_WEIGHTS = ("0.001", "0.01", "0.1")
BALANCED = ("switch", "top_2", "smoe", "sam_2", "xmoe")  # variants whose weight is searched, for all of a strategy
BUDGETS = {
    "full": Budget(
        updates=4000,  # of a vocabulary of 16,000: the best recipe of results/recipe.json
        words=(
            *("training.tokens_per_update=2048", "training.optimizer.lr=0.003", "training.schedule.warmup_updates=200"),
            *("model=tiny", "model.embed_dim=192", "model.ffn_dim=768", "model.dropout=0"),
            *("model.attention_dropout=0", "training.precision=bf16"),
        ),
        items=0,
        takes="into English only, a quarter of an hour each on one core with matrix units, THOR's twice that",
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
            "model.attention_dropout=0",  # attention over packed rows has none
        ),
        items=0,
        takes="not run yet: needs a GPU",
    ),
}


def experts(width: int, strategy: str, count: int, share: int, *more: str) -> tuple[str, ...]:
    """Overrides of ``count`` experts of ``width / share``."""
    return (f"routing={strategy}", f"routing.num_experts={count}", f"routing.expert_ffn_dim={width // share}", *more)


def variants(width: int) -> tuple[Variant, ...]:
    """Those of the claims, with the active compute of a dense feed-forward of ``width``."""
    of = partial(experts, width)
    return (
        Variant("dense", ("routing=dense",)),
        Variant("switch", of("switch", 8, 1)),
        Variant("top_2", of("top_k", 16, 2, "routing.top_k=2")),
        Variant("smoe", of("smoe", 24, 3, "routing.strata=[12,12]", "routing.top_k=2")),
        Variant("sam_1", of("sam", 8, 1, "routing.num_groups=4", "routing.top_k=1")),
        Variant("sam_2", of("sam", 16, 2, "routing.num_groups=4", "routing.top_k=2")),
        Variant("sam_4", of("sam", 32, 4, "routing.num_groups=4", "routing.top_k=4")),
        Variant("thor", of("thor", 8, 1)),
        Variant("thor_1", of("thor", 1, 1)),
    )


def further_variants(width: int) -> tuple[Variant, ...]:
    """Strategies without a claim of their own here. Two route the encoder only, with top-2 in the decoder."""
    of = partial(experts, width)
    return (
        Variant("hash", of("hash", 8, 1)),
        Variant("random", of("random", 8, 1)),
        Variant("xmoe", of("xmoe", 8, 1)),
        Variant("smoe_3", of("smoe", 24, 4, "routing.strata=[8,8,8]", "routing.top_k=2")),
        Variant("expert_choice", of("expert_choice", 16, 2)),
        Variant("soft_moe", of("soft_moe", 8, 1)),
    )


def sizes(width: int) -> tuple[Variant, ...]:
    """Switch and SMoE with other numbers of experts; SMoE's are a third as wide and count three for one of Switch's."""
    of = partial(experts, width)
    more = (4, 16, 32)
    return (
        *(Variant(f"switch_{n}", of("switch", n, 1)) for n in more),
        *(Variant(f"smoe_{n}", of("smoe", n, 3, f"routing.strata=[{n // 2},{n // 2}]")) for n in (4, 8, *more[1:])),
    )


STAGES: Mapping[str, tuple[Callable[[int], tuple[Variant, ...]], int]] = {  # variants and seeds
    "b": (variants, 3),
    "c": (further_variants, 1),
    "d": (sizes, 1),
}
VARIANTS = variants(768)
COLUMNS = (
    ("bleu", "BLEU, all"),
    ("bleu high resource", "high"),
    ("bleu medium resource", "medium"),
    ("bleu low resource", "low"),
    ("chrf", "chrF++"),
    ("copy", "chrF++ of the source as it is"),
    ("loss", "valid nll"),
    ("training_flops", "training FLOPs"),
    ("words_per_second", "words/s (training)"),
)


@dataclass(frozen=True)
class Contrast:
    """The claim of a paper that a variant is above another one."""

    paper: str
    says: str
    one: str
    other: str

    @property
    def needs(self) -> tuple[str, str]:
        """The variants it compares."""
        return self.one, self.other


CLAIMS = (
    Contrast("SMoE, table 1", "Switch above dense (2.1 BLEU)", "switch", "dense"),
    Contrast("SMoE, table 1", "SMoE above Switch (0.9 BLEU)", "smoe", "switch"),
    Contrast("SMoE, tables 1 to 3", "SMoE above top-2 (0.4 to 1.0 BLEU)", "smoe", "top_2"),
    Contrast("THOR, abstract", "THOR above Switch (2 BLEU in multilingual translation)", "thor", "switch"),
    Contrast("THOR, our ablation", "THOR above one expert with the same loss (R-Drop)", "thor", "thor_1"),
    Contrast("SAM, abstract", "two experts of a group above one", "sam_2", "sam_1"),
    Contrast("SAM, abstract", "four experts of a group above two", "sam_4", "sam_2"),
    Contrast("SAM, abstract", "SAM above Switch", "sam_4", "switch"),
)


@dataclass
class TranslationStudy(Study):
    """A study whose claims are decided from the counts of every test line."""

    contrasts: Sequence[Contrast] = field(default=CLAIMS)

    def counts_file(self, run: str) -> Path:
        """What BLEU needs of every test line of a run, by direction."""
        return self.path.with_suffix("") / f"{run}.npz"

    def counts(self, variant: str) -> dict[int, list[Counts]]:
        """Seed → counts of each direction, sorted by name."""
        found = {}
        for name, run in self.runs.items():
            if run["variant"] == variant:
                with np.load(self.counts_file(name), allow_pickle=False) as stored:
                    found[run["seed"]] = [stored[direction].astype(np.int64) for direction in sorted(stored)]
        return found

    def outcomes(self) -> list[dict[str, Any]]:
        """Each claim with its decision; ``open`` where runs are missing."""
        return [self._outcome(contrast) for contrast in self.contrasts]

    def _outcome(self, contrast: Contrast) -> dict[str, Any]:
        said = {"paper": contrast.paper, "says": contrast.says}
        ones, others = (self.counts(variant) for variant in contrast.needs)
        seeds = sorted({*ones} & {*others})
        if not seeds:
            return {**said, "measured": "not all runs are there yet", "agrees": "open"}
        decision = compared([ones[seed] for seed in seeds], [others[seed] for seed in seeds], len(self.contrasts))
        losses = (self.means()[variant]["loss"].text(".3f") for variant in contrast.needs)
        measured = "{}; valid nll {} and {}".format(decision.text(), *losses)
        if decision.remedy:
            measured += f"; {decision.remedy}"
        return {**said, "measured": measured, "agrees": decision.outcome, "decision": asdict(decision)}


def compared(ones: Sequence[Sequence[Counts]], others: Sequence[Sequence[Counts]], claims: int) -> Decision:
    """The decision on two models from the counts by seed and direction."""
    effects = [mean_bleu(one) - mean_bleu(other) for one, other in zip(ones, others, strict=True)]
    return decide(effects, sentence_error(ones, others), claims)


def main() -> None:
    """Trains, translates, compares; writes ``translation.json`` and ``translation.md``."""
    options = parser(__doc__ or "", "data-bin/six", 0, BUDGETS)
    options.add_argument("--stage", choices=("a", *STAGES), default="b", help="of the full budget (default: b)")
    options.add_argument("--languages", default=",".join(LANGUAGES), help="with English; all: those of the data")
    options.add_argument("--max-sentences", type=int, help="of each test direction (0: all; default: the budget's)")
    options.add_argument("--name", default="translation", help="of the results, where several are kept")
    given = parsed(options, BUDGETS)
    if given.stage == "a":
        balance(given)
        return
    items = given.size.items if given.max_sentences is None else given.max_sentences
    study = TranslationStudy(
        given.name, "Translation: THOR, SMoE and SAM against Switch, top-2 and dense", COLUMNS, (), given
    )
    study.data = DataFolder.open(given.data).fingerprint
    study.notes.append("at equal active compute; THOR trains with two passes over each batch")
    study.notes.append(f"{items or 'all'} test sentences a direction, beam 4; claims decided by decision_rule.py")
    make, seeds = STAGES[given.stage]
    weights = chosen_weights(study.path.with_name("balance.json")) if given.budget == "full" else {}
    for seed in range(1, (given.seeds or seeds) + 1):
        for variant in wanted(make(width(given)), given.only):
            words = [*common(given, seed), *variant.overrides, *weights.get(variant.name.split("_")[0], ())]
            study.cell(variant.name, seed, words, partial(measure_run, study, items))


def balance(options: Any) -> None:
    """Trains every strategy with a balance loss with three weights of it, on a quarter of the tokens."""
    title = "Weight of the balance loss, by held-out loss"
    study = Study("balance", title, (("loss", "valid nll"), ("peak", "largest load over the mean")), (), options)
    study.data = DataFolder.open(options.data).fingerprint
    options.updates //= 4
    strategies = [*variants(width(options)), *further_variants(width(options))]
    for variant in (v for v in strategies if v.name in BALANCED):
        for weight in BALANCE_WEIGHTS:
            words = [*common(options, 1), *variant.overrides, f"routing.balance_weight={weight}"]
            study.cell(f"{variant.name}_{weight}", 1, words, balance_measures)


def balance_measures(folder: Path) -> tuple[dict[str, float | None], Any]:
    """Held-out loss, and how uneven the load is at the end."""
    loads = read_lines(folder / "train.jsonl")[-1]["load_max_over_mean"]
    values = [value for layer in loads.values() for value in (layer if isinstance(layer, list) else [layer])]
    return {"loss": read_lines(folder / "valid.jsonl")[-1]["nll_loss"], "peak": statistics.fmean(values)}, None


def chosen_weights(path: Path) -> dict[str, tuple[str, ...]]:
    """Strategy → override with the balance weight of the lowest held-out loss.

    Raises:
        SystemExit: the runs of stage a are not all there.
    """
    found: dict[str, dict[str, float]] = {}
    for run in stored_runs(path).values():
        name, _, weight = run["variant"].rpartition("_")
        found.setdefault(name.split("_")[0], {})[weight] = run["measures"]["loss"]
    if len(found) < len(BALANCED) or any(len(losses) < len(BALANCE_WEIGHTS) for losses in found.values()):
        raise SystemExit(f"{path} has not all balance weights yet: run --stage a first")
    return {name: (f"routing.balance_weight={min(losses, key=losses.__getitem__)}",) for name, losses in found.items()}


def width(options: Any) -> int:
    """Width of the dense feed-forward: the budget's, or the model's own."""
    given = {key: value for key, _, value in (word.partition("=") for word in options.size.words)}
    return int(given.get("model.ffn_dim") or OmegaConf.load(MODELS / f"{given['model']}.yaml").ffn_dim)


def common(options: Any, seed: int, validations: int = VALIDATIONS) -> list[str]:
    """Overrides of all runs."""
    names = options.languages.split(",")
    both = [f"{code}-en" for code in names] + [f"en-{code}" for code in names if options.budget == "gpu"]
    directions = "" if options.languages == "all" else ",".join(both)
    shown = 50 if options.budget == "small" else 0
    often = max(1, options.updates // validations)
    return [
        *(f"data={options.data}", f"seed={seed}", f"task.directions=[{directions}]", *options.size.words),
        *("training.schedule.name=linear", "training.temperature=2"),
        *(f"training.max_updates={options.updates}", f"training.threads={options.threads}"),
        *("training.checkpoint.keep=1", f"training.checkpoint.every_updates={often}"),
        f"training.validation.max_sentences={shown}",
        f"training.validation.every_updates={often}",
    ]


def measure_run(study: TranslationStudy, items: int, folder: Path) -> tuple[dict[str, float | None], Any]:
    """The scores of a run; writes the counts of its test lines, from which claims are decided."""
    found = measure_scores(study, items, folder)
    (run,) = read_runs([folder], part=part_name(max_sentences=items))
    assert run.results is not None
    counts = {}
    for direction, scored in run.results.directions.items():
        counts[direction] = line_counts(*run.files.outputs(direction).read(), scored.tokenizer).astype(np.uint16)
    path = study.counts_file(folder.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, **counts)
    return found


def measure_scores(study: Study, items: int, folder: Path) -> tuple[dict[str, float | None], Any]:
    """BLEU and chrF++ on average and by tier, held-out loss, speed; by direction; the learning curve."""
    study.evaluate(folder, max_sentences=items, search={"beam": 4})
    (run,) = read_runs([folder], part=part_name(max_sentences=items))
    results = run.results
    assert results is not None
    average = results.average()
    tiers = {
        f"bleu {name}": results.average(members).bleu for name, members in results.groups.items() if "resource" in name
    }
    per_token = 3 * float(run.info["flops_per_token"]) * (run.passes or 1)  # forward and backward of every pass
    tokens = study.options.size.tokens_per_update
    curve = [
        {"tokens": line["update"] * tokens, "flops": line["update"] * tokens * per_token, "nll": line["nll_loss"]}
        for line in run.valid
    ]
    measures: dict[str, float | None] = {
        "bleu": average.bleu,
        "chrf": average.chrf,
        "copy": results.average(baseline="copy").chrf,
        **tiers,
        "loss": run.valid[-1]["nll_loss"],
        "training_flops": curve[-1]["flops"],
        "words_per_second": run.words_per_second,
    }
    by_direction = {
        name: {**asdict(found.scores), "copy_chrf": found.baselines["copy"].chrf}
        for name, found in results.directions.items()
    }
    return measures, {"directions": by_direction, "curve": curve}


if __name__ == "__main__":
    main()

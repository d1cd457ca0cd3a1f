"""X-MoE in small: masked language models of many languages, then zero-shot classification, routing frozen or not.

    python scripts/reproduce/masked_lm.py --data data-bin/parallel15 --texts DIR --seeds 3
    python scripts/reproduce/masked_lm.py --data data-bin/parallel15 --texts DIR --budget small --threads 1

Dense, Switch and X-MoE at equal active compute: an encoder of four layers whose odd ones have eight experts, one per
token (the paper's own placement is experiment=xmoe_xtreme_small). Measured at every checkpoint: the collapse of the
inputs of routers, and the share of tokens that change their expert from one checkpoint to the next. Then each model is
fine-tuned on English texts (DIR contains train.en.tsv, test.XX.tsv …) and evaluated in every language. For consistency
between runs, the first seed's sparse models are fine-tuned with every seed (as in the paper, which uses the loads of
100 mini-batches of fine-tuning; here those of the English test set).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from locks import held
from measures import Verdict, above
from study import Budget, Claim, Study, Variant, parsed, parser, wanted

from moe_train.analysis.probe.stability import inter_run_consistency
from moe_train.config import LanguageModelConfig
from moe_train.data.folder import DataFolder
from moe_train.data.labelled import LabelledTexts
from moe_train.tasks.classification import TRANSLATED
from moe_train.tasks.monolingual_text import MonolingualText, open_text

_CHECKPOINTS = 6
BUDGETS = {
    "full": Budget(
        updates=1000,
        words=(
            "training.tokens_per_update=4096",
            "training.optimizer.lr=0.002",
            "training.schedule.warmup_updates=100",
        ),
        items=0,
        takes="about 4 minutes each on two cores",
    ),
    "small": Budget(
        updates=950,
        words=("training.tokens_per_update=2048", "training.optimizer.lr=0.004", "training.schedule.warmup_updates=60"),
        items=300,
        takes="about 4 minutes each on one core, fine-tunings three quarters of a minute",
    ),
}
VARIANTS = (
    Variant("dense", ("routing=dense",)),
    Variant("switch", ("routing=switch", "routing.num_experts=8")),
    Variant("xmoe", ("routing=xmoe", "routing.num_experts=8")),
)
COLUMNS = (
    ("perplexity", "perplexity (test)"),
    ("collapse_first", "Tr(Σ_W Σ_B⁺) by expert, first checkpoint"),
    ("collapse_last", "… last checkpoint"),
    ("fluctuation", "fluctuation between checkpoints"),
    ("consistency", "consistency between runs"),
    ("english_f1", "macro-F1 English"),
    ("zero_shot_f1", "macro-F1 zero-shot"),
    ("gap_f1", "gap to the same items in English"),
    ("english_f1_frozen", "English, frozen"),
    ("zero_shot_f1_frozen", "zero-shot, frozen"),
)


def _lower(measure: str, one: str, other: str, place: str, says: str) -> Claim:
    """The claim that a measure is lower for ``one`` than for ``other``."""

    def measured(means: Any) -> tuple[str, Verdict]:
        return above(other, means[other][measure], one, means[one][measure], ".3g")

    return Claim(f"X-MoE, {place}", says, (one, other), measured)


def _collapse(means: Any) -> tuple[str, Verdict]:
    change = {name: means[name]["collapse_last"] / means[name]["collapse_first"] for name in ("switch", "xmoe")}
    return f"switch x{change['switch']:.3g} along training, xmoe x{change['xmoe']:.3g}", change["xmoe"] > change[
        "switch"
    ]


def _consistent(means: Any) -> tuple[str, Verdict]:
    return above("xmoe", means["xmoe"]["consistency"], "switch", means["switch"]["consistency"], ".3g")


def _frozen(means: Any) -> tuple[str, Verdict]:
    return above("frozen", means["xmoe"]["zero_shot_f1_frozen"], "free", means["xmoe"]["zero_shot_f1"], ".3g")


CLAIMS = (
    _lower("perplexity", "switch", "dense", "table 2", "perplexity: sparse below dense (19.02 against 23.51)"),
    _lower("perplexity", "xmoe", "switch", "table 2", "perplexity: X-MoE below Switch (18.72 against 19.02)"),
    Claim("X-MoE, §4.5", "Switch's states collapse, X-MoE's do not", ("xmoe", "switch"), _collapse),
    _lower("fluctuation", "xmoe", "switch", "§4.5", "X-MoE's routing fluctuates less"),
    _lower("zero_shot_f1", "switch", "xmoe", "table 1", "zero-shot transfer: X-MoE above Switch"),
    _lower("zero_shot_f1", "dense", "switch", "table 1", "zero-shot transfer: Switch above dense"),
    Claim("X-MoE, §4.5", "runs of X-MoE agree more with each other", ("xmoe", "switch"), _consistent),
    Claim("X-MoE, table 3", "frozen routing transfers better", ("xmoe",), _frozen),
)


def main() -> None:
    """Trains, fine-tunes, measures; writes ``masked_lm.json`` and ``masked_lm.md``."""
    options = parser(__doc__ or "", "data-bin/parallel15", 3, BUDGETS)
    options.add_argument("--texts", default="data/sections11", help="labelled texts: {train,valid,test}.XX.tsv")
    options.add_argument("--fine-tune-updates", type=int, default=200, help="updates of a fine-tuning (default: 200)")
    given = parsed(options, BUDGETS)
    title = "Masked language models: X-MoE against Switch and dense"
    data = f"{DataFolder.open(given.data).fingerprint}, {Path(given.texts).name}"
    study = Study("masked_lm", title, COLUMNS, CLAIMS, given, data, more=along_training)
    study.notes.append("a token's class, for the collapse, is the expert it is routed to; means over sparse layers")
    study.notes.append(
        f"to compare with perplexities: each language's own unigrams have {unigrams(given):.0f}, a mean as theirs"
    )
    study.notes.append(f"to compare with zero-shot scores: uniform guessing has {guessing(given):.3f}")
    chosen = wanted(VARIANTS, given.only)
    for seed in range(1, given.seeds + 1):
        for variant in chosen:
            words = [*pre_training(given, seed), *variant.overrides]
            study.cell(variant.name, seed, words, partial(pre_trained_and_tuned, study, variant, seed))
    for variant in chosen:
        if variant.name != "dense" and given.seeds > 1:
            consistency(study, variant, given)


def pre_trained_and_tuned(
    study: Study, variant: Variant, seed: int, folder: Path
) -> tuple[dict[str, float | None], dict[str, Any]]:
    """Measures of a language model, and of its fine-tunings with free and with frozen routing."""
    measures, details = pre_trained(study, folder)
    for suffix in ("", "_frozen") if variant.name != "dense" else ("",):
        words = tuning(study.options, seed, folder, variant, suffix)
        tuned = study.train(f"{variant.name}{suffix}-tuned-s{seed}", words)
        found, more = transferred(study, tuned, suffix)
        measures, details = {**measures, **found}, {**details, f"transfer{suffix}": more}
    return measures, details


def unigrams(options: Any) -> float:
    """Mean over languages of the unigram perplexity of the test text, from training frequencies plus one."""
    folder = DataFolder.open(options.data)
    entries = folder.dictionary()
    keys = LanguageModelConfig(sides="target")
    train, test = (open_text(folder, split, keys, entries) for split in ("train", "test"))
    found = []
    for name in test.names:
        here, there = (_counts(text, name, len(entries), entries.nspecial) for text in (test, train))
        found.append(float(np.exp(-(here @ np.log((there + 1) / (there + 1).sum())) / here.sum())))
    return statistics.fmean(found)


def guessing(options: Any) -> float:
    """Mean over the zero-shot languages of the macro-F1 of guesses that ignore the text.

    A class of share p among K has precision p and recall 1 / K.
    """
    data, found = LabelledTexts.open(options.texts, ["en"]), []
    for name, file in data.splits["test"].items():
        labels = np.array(file.labels[: options.size.items or None])
        shares = np.bincount(labels, minlength=len(data.classes)) / len(labels)
        if name != "en" and not name.endswith(TRANSLATED):
            found.append(float(np.mean(2 * shares / (len(shares) * shares + 1))))
    return statistics.fmean(found)


def _counts(text: MonolingualText, name: str, size: int, first: int) -> Any:
    """[V] counts of each piece in a language's sentences."""
    counts = np.zeros(size)
    for items in np.array_split(text.items(name), max(1, len(text.items(name)) // 10_000)):
        counts += np.bincount(text.tokens(items)[0].ravel(), minlength=size)
    counts[:first] = 0
    return counts


def pre_training(options: Any, seed: int) -> list[str]:
    """Overrides of all masked language models."""
    updates, every = options.updates, -(-options.updates // _CHECKPOINTS)
    return [
        *("task=cross_lingual_lm", "model=encoder_tiny", f"data={options.data}", f"seed={seed}", "task.sides=target"),
        *(f"training.max_updates={updates}", f"training.threads={options.threads}", *options.size.words),
        *(f"training.checkpoint.every_updates={every}", "training.checkpoint.keep=20"),
        *(f"training.validation.every_updates={every}", "training.validation.max_sentences=60"),
    ]


def tuning(options: Any, seed: int, start: Path, variant: Variant, suffix: str) -> list[str]:
    """Overrides of a fine-tuning, the same for every budget except for the model's size."""
    updates = options.fine_tune_updates
    return [
        *("task=cross_lingual_classification", "model=encoder_tiny", f"data={options.texts}", f"seed={seed}"),
        *(word for word in options.size.words if word.startswith("model.")),
        *(f"training.init_from={start / 'checkpoints' / 'last'}", f"training.max_updates={updates}"),
        *("training.tokens_per_update=2048", "training.optimizer.lr=0.004", "training.schedule.warmup_updates=20"),
        *("task.max_tokens=64", f"training.threads={options.threads}"),
        *(f"training.validation.every_updates={max(1, updates // 2)}", f"training.checkpoint.every_updates={updates}"),
        *("training.checkpoint.keep=1", *variant.overrides, f"task.freeze_routing={'true' if suffix else 'false'}"),
    ]


def pre_trained(study: Study, folder: Path) -> tuple[dict[str, float | None], dict[str, Any]]:
    """Perplexity on the test split, and X-MoE's measures over training."""
    test = study.evaluate(folder, checkpoint="last", max_sentences=study.options.size.items)
    probed = study.probe(folder, max_sentences=60)
    series = [_mean(layers, "collapse_by_expert") for layers in probed["checkpoints"].values()]
    ratios = [ratio for layer in probed["fluctuation"].values() for ratio in layer]
    measures = {
        "perplexity": test["average"]["ppl"],
        "collapse_first": series[0] if series else None,
        "collapse_last": series[-1] if series else None,
        "fluctuation": statistics.fmean(ratios) if ratios else None,
    }
    by_language = {name: entry["ppl"] for name, entry in test["sets"].items()}
    return measures, {"perplexity": by_language, "probe": probed, "load": test["routing"]}


def along_training(runs: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Tables by checkpoint: collapse by each kind of class, and share of tokens with a changed expert."""
    lines: list[str] = []
    for heading, series in (
        ("Tr(Σ_W Σ_B⁺), a token's class is its expert", _collapse_along("collapse_by_expert")),
        ("Tr(Σ_W Σ_B⁺), a token's class is its vocabulary id", _collapse_along("collapse_by_token")),
        ("tokens that changed their expert since the checkpoint before", _fluctuation_along),
    ):
        by_variant: dict[str, list[dict[str, float]]] = {}
        for run in runs.values():
            if found := series(run["details"]["probe"]):
                by_variant.setdefault(run["variant"], []).append(found)
        updates = sorted({update for found in by_variant.values() for run in found for update in run}, key=int)
        lines += ["", f"Along training: {heading} (means over seeds and sparse layers)."] if updates else []
        lines += ["", f"| update | {' | '.join(updates)} |", "|---|" + "---:|" * len(updates)] if updates else []
        for variant, found in by_variant.items():
            values = ([run[update] for run in found if update in run] for update in updates)
            cells = (f"{statistics.fmean(there):.3g}" if there else "" for there in values)
            lines.append(f"| {variant} | {' | '.join(cells)} |")
    return lines[1:]


def _collapse_along(measure: str) -> Callable[[Mapping[str, Any]], dict[str, float]]:
    def series(probed: Mapping[str, Any]) -> dict[str, float]:
        means = {update: _mean(layers, measure) for update, layers in probed["checkpoints"].items()}
        return {update: mean for update, mean in means.items() if mean is not None}

    return series


def _fluctuation_along(probed: Mapping[str, Any]) -> dict[str, float]:
    layers = list(probed["fluctuation"].values())
    later = sorted(probed["checkpoints"], key=int)[1:] if layers else []  # JSON may have sorted them as strings
    return {update: statistics.fmean([ratios[n] for ratios in layers]) for n, update in enumerate(later)}


def transferred(study: Study, folder: Path, suffix: str) -> tuple[dict[str, float | None], Any]:
    """Macro-F1 in English, zero-shot, and the gap to the same items in English."""
    test = study.evaluate(folder, max_sentences=study.options.size.items)
    gaps = [gap["macro_f1"] for gap in test["summary"]["gap"].values()]
    measures = {
        f"english_f1{suffix}": test["sets"]["en"]["macro_f1"],
        f"zero_shot_f1{suffix}": test["summary"]["zero_shot"]["macro_f1"],
        f"gap_f1{suffix}": statistics.fmean(gaps) if gaps else None,
    }
    return measures, {"sets": test["sets"], "summary": test["summary"]}


def consistency(study: Study, variant: Variant, options: Any) -> None:
    """Fine-tunes the first seed's model with every seed; notes the similarity of expert loads in English.

    Where the results hold the run and its folder is gone, as on a fresh clone, the run is trained again.
    """
    run = f"{variant.name}-s1"
    with held(study.folder(run).with_name(f"{run}.lock")) as free:
        noted = study.runs.get(run)
        if not free or noted is None or "consistency" in noted["measures"]:
            return
        start = study.train(run, [*pre_training(options, 1), *variant.overrides])
        names = [f"{variant.name}-{'again' if seed > 1 else 'tuned'}-s{seed}" for seed in range(1, options.seeds + 1)]
        tuned = [study.train(name, tuning(options, n, start, variant, "")) for n, name in enumerate(names, 1)]
        tests = [study.evaluate(folder, max_sentences=options.size.items)["routing"]["en"]["load"] for folder in tuned]
        by_layer = {layer: inter_run_consistency([torch.tensor(load[layer]) for load in tests]) for layer in tests[0]}
        study.add(run, {"consistency": statistics.fmean(by_layer.values())}, {"consistency": by_layer})


def _mean(layers: dict[str, dict[str, Any]], name: str) -> float | None:
    values = [layer[name] for layer in layers.values() if name in layer]
    return statistics.fmean(values) if values else None


if __name__ == "__main__":
    main()

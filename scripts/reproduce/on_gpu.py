"""All strategies on one GPU: translation in all languages both ways, in calls of a few minutes.

    python scripts/reproduce/on_gpu.py --data data-bin/parallel15 --results results/gpu

Every strategy trains the same number of tokens, first those of the first round, then longer. A call begins no run that
would go beyond --minutes, judged by the longest one so far; the next call, on a fresh machine too, continues with what
the results do not hold. Of a machine that is lost only the JSON files are needed, one of each round. On a CPU,
--budget small tries the same in a few minutes.
"""

from __future__ import annotations

import time
from functools import partial

from study import Budget, Study, parsed, parser, wanted
from translation import COLUMNS, common, further_variants, measure_scores, variants, width

from moe_train.data.folder import DataFolder

BUDGETS = {
    "gpu": Budget(
        updates=500,
        words=(
            *(
                "training.tokens_per_update=16384",
                "training.optimizer.lr=0.001",
                "training.schedule.warmup_updates=200",
            ),
            *("training.precision=bf16", "model=base", "model.attention_dropout=0"),
        ),
        items=100,
        takes="at most a minute of training each on one H200",
    ),
    "small": Budget(
        updates=20,
        words=(
            *("training.tokens_per_update=1024", "training.optimizer.lr=0.003", "training.schedule.warmup_updates=5"),
            *("model=tiny", "model.embed_dim=32", "model.ffn_dim=96", "training.max_sentence_tokens=64"),
        ),
        items=3,
        takes="a try on a CPU",
    ),
}
ROUNDS = (1, 4, 16)  # times the updates of the budget
STRATEGIES = (
    *("dense", "switch", "top_2", "smoe", "thor", "sam_2"),
    *("xmoe", "hash", "random", "expert_choice", "soft_moe"),
)
REST = 60.0  # seconds that a call has left at least when it begins its first run


def main() -> None:
    """Trains and measures what is missing until the minutes are over."""
    options = parser(__doc__ or "", "data-bin/parallel15", 1, BUDGETS)
    options.set_defaults(budget="gpu")
    options.add_argument("--minutes", type=float, default=8.5, help="no run is begun that would end later")
    options.add_argument("--max-sentences", type=int, help="of each test direction (0: all; default: the budget's)")
    options.add_argument("--rounds", type=int, default=len(ROUNDS), help="the first N rounds only")
    given = parsed(options, BUDGETS)
    given.languages = "all"
    items = given.size.items if given.max_sentences is None else given.max_sentences
    end, longest, updates = time.monotonic() + 60 * given.minutes, REST, given.updates
    data = DataFolder.open(given.data).fingerprint
    for times in ROUNDS[: given.rounds]:
        given.updates = times * updates
        title = f"All strategies on a GPU, {given.updates:,} updates"
        study = Study(f"on_gpu_{given.updates}", title, COLUMNS, (), given, data)
        study.notes.append(f"all directions, {items or 'all'} test lines each, beam 4, at equal active compute")
        chosen = {variant.name: variant for variant in (*variants(width(given)), *further_variants(width(given)))}
        for variant in wanted([chosen[name] for name in STRATEGIES], given.only):
            words = [*common(given, 1, validations=1), *variant.overrides]
            if study.found(f"{variant.name}-s1", study.key(words)):
                continue
            begun = time.monotonic()
            if begun + longest > end:
                print(f"stopped before {variant.name} of {given.updates} updates: the same command continues")
                return
            study.cell(variant.name, 1, words, partial(measure_scores, study, items))
            longest = max(longest, time.monotonic() - begun)
        longest *= ROUNDS[1] / ROUNDS[0]


if __name__ == "__main__":
    main()

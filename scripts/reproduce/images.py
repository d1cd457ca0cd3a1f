"""Soft MoE, token choice, expert choice and dense on images, at equal FLOPs.

    python scripts/reproduce/images.py --seeds 3
    python scripts/reproduce/images.py --budget small --threads 1

Fashion-MNIST by default (apt-get install dataset-fashion-mnist). A small vision Transformer with experts in its second
half, 16 patches per image: one expert of the dense width per token (token choice, expert choice with factor 1), and for
Soft MoE as many slots as patches, so that all have the FLOPs of the dense model, except for routing.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from measures import Verdict, above
from study import Budget, Claim, Study, Variant, parsed, parser, read_lines, wanted

BUDGETS = {
    "full": Budget(
        updates=4000,
        words=("training.tokens_per_update=128", "training.optimizer.lr=0.001", "training.schedule.warmup_updates=200"),
        items=0,
        takes="about 10 minutes each on two cores",
    ),
    "small": Budget(
        updates=600,
        words=(
            *("training.tokens_per_update=64", "training.optimizer.lr=0.003", "training.schedule.warmup_updates=50"),
            *("task.shift=0", "model.embed_dim=96", "model.ffn_dim=384"),
        ),
        items=0,
        takes="about a minute each on one core",
    ),
}
_PATCH, _EXPERTS = 7, 4  # 28 x 28 pixels are 16 patches; Soft MoE's 16 slots are 4 experts of 4 slots, or 16 of one
_FOUR = ("routing=soft_moe", f"routing.num_experts={_EXPERTS}", "routing.slots_per_expert=4")
VARIANTS = (
    Variant("dense", ("routing=dense",)),
    Variant(
        "token_choice",
        (
            "routing=switch",
            f"routing.num_experts={_EXPERTS}",
            "routing.capacity_factor=1.0",
            "routing.evaluation_capacity_factor=1.0",
            "routing.batch_prioritised=true",
        ),
    ),
    Variant(
        "expert_choice",
        (
            "routing=expert_choice",
            f"routing.num_experts={_EXPERTS}",
            "routing.capacity_factor=1.0",
            "routing.scope=batch",
        ),
    ),
    Variant("soft_moe_4x4", _FOUR),
    Variant("soft_moe_16x1", ("routing=soft_moe", "routing.num_experts=16", "routing.slots_per_expert=1")),
    # Without normalisation the logits are not bounded, and mixes can become sharp from the beginning.
    Variant("soft_moe_4x4_sharp", (*_FOUR, "routing.normalisation=none")),
)
_SPARSE = ("token_choice", "expert_choice")
_SOFT = ("soft_moe_4x4", "soft_moe_16x1")
COLUMNS = (
    ("accuracy", "test accuracy"),
    ("valid_accuracy", "best valid accuracy"),
    ("milliseconds_per_image", "ms per image (test)"),
    ("dropped_fraction", "tokens dropped"),
    ("slots_per_token", "slots that make 90 % of a token's output"),
    ("train_images_per_second", "images/s (training)"),
)


def _beats(other: str) -> Any:
    """Compares the Soft MoE that is better on the validation images, so that it is not chosen by test scores."""

    def measured(means: Any) -> tuple[str, Verdict]:
        name = max(_SOFT, key=lambda soft: means[soft]["valid_accuracy"])
        return above(name, means[name]["accuracy"], other, means[other]["accuracy"], ".2%")

    return measured


def _more_experts(means: Any) -> tuple[str, Verdict]:
    few, many = (means[name]["accuracy"] for name in _SOFT)
    return above("16 x 1", many, "4 x 4", few, ".2%")


def _drops(means: Any) -> tuple[str, Verdict]:
    token, expert = (means[name]["dropped_fraction"] for name in ("token_choice", "expert_choice"))
    return f"token choice {token:.1%}, expert choice {expert:.1%}, Soft MoE none", token > 0 and expert > 0


CLAIMS = (
    Claim("Soft MoE, table 9", "beats dense at equal FLOPs", ("dense", *_SOFT), _beats("dense")),
    Claim("Soft MoE, figure 6 and table 9", "beats token choice", ("token_choice", *_SOFT), _beats("token_choice")),
    Claim("Soft MoE, figure 6 and table 9", "beats expert choice", ("expert_choice", *_SOFT), _beats("expert_choice")),
    Claim("Soft MoE, §3.5", "one slot per expert and most experts are best", _SOFT, _more_experts),
    Claim("Soft MoE, appendix B", "sparse routers drop tokens, about 15 % at C = 1", _SPARSE, _drops),
)


def main() -> None:
    """Trains, evaluates, writes ``images.json`` and ``images.md``."""
    options = parsed(parser(__doc__ or "", "/usr/share/datasets/fashion-mnist", 3, BUDGETS), BUDGETS)
    study = Study("images", "Images: Soft MoE against sparse and dense, at equal FLOPs", COLUMNS, CLAIMS, options)
    study.data = Path(options.data).name
    study.notes.append("dropped: tokens of 256 validation images that no expert processes, mean over sparse layers")
    study.notes.append(
        "of the 16 slots 15 make 90 % of a token's output where mixes are uniform, 1 where they are hard choices"
    )
    for seed in range(1, options.seeds + 1):
        for variant in wanted(VARIANTS, options.only):
            words = [*common(options, seed), *variant.overrides]
            study.cell(variant.name, seed, words, partial(measure_run, study))


def common(options: Any, seed: int) -> list[str]:
    """Overrides of all runs."""
    return [
        *("task=image_classification", "model=vit_tiny", f"data={options.data}", f"seed={seed}", "task.flip=true"),
        *(f"model.patch_size={_PATCH}", f"training.max_updates={options.updates}", *options.size.words),
        *(
            "training.validation.max_sentences=2000",
            "training.checkpoint.keep=1",
            f"training.checkpoint.every_updates={options.updates}",
        ),
        f"training.validation.every_updates={max(1, options.updates // 5)}",
    ]


def measure_run(study: Study, folder: Path) -> tuple[dict[str, float | None], Any]:
    """Returns measures and details of a run."""
    test = study.evaluate(folder)
    probed = study.probe(folder, max_sentences=256)["checkpoints"]
    last = probed[max(probed, key=int)]
    drops, slots = (
        [entry[m] for entry in last.values() if m in entry] for m in ("dropped_fraction", "slots_per_token")
    )
    valid, train = read_lines(folder / "valid.jsonl"), read_lines(folder / "train.jsonl")
    speeds = sorted(line["images_per_second"] for line in train)
    measures: dict[str, float | None] = {
        "accuracy": test["sets"]["test"]["accuracy"],
        "valid_accuracy": max(line["accuracy"] for line in valid),
        "milliseconds_per_image": 1e3 * test["seconds"] / test["items"],
        "dropped_fraction": sum(drops) / len(drops) if drops else 0.0,
        "slots_per_token": sum(slots) / len(slots) if slots else None,
        "train_images_per_second": speeds[len(speeds) // 2],
    }
    return measures, {"layers": last, "routing": test["routing"]}


if __name__ == "__main__":
    main()

"""Every recipe in configs/experiment builds; those of papers have the papers' parameters; each has a small version."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from torch import nn

from moe_train.analysis.planner.choose_layout import compare_layouts
from moe_train.analysis.planner.cost_shape import model_shape
from moe_train.analysis.planner.plan_tables import as_mapping
from moe_train.config import ImageConfig, LanguageModelConfig, RunConfig, build
from moe_train.config.paths import configs_directory
from moe_train.config.planner import PlanConfig, PlanImages
from moe_train.launch.hydra_store import forget_foreign_schemas
from moe_train.models import build_model
from moe_train.models.accounting import Accounting, account
from moe_train.models.encoder import build_masked_language_model
from moe_train.models.vision import ImageShape, build_vision_model
from moe_train.routing import routing_config
from moe_train.training.optim.optimizer import parameter_groups
from tests.models.helpers import Words

RECIPES = sorted(path.stem for path in (configs_directory() / "experiment").glob("*.yaml"))
GENERAL = {"memorise", "quickstart"}  # no paper's
PUBLISHED = [name for name in RECIPES if name not in GENERAL and not name.endswith("_small")]

# Entries of the vocabulary (or classes), and millions of parameters where the specs have them, with their source.
# THOR: the closed form of its experts beyond the dense model; X-MoE: the same.
PAPERS: dict[str, tuple[int, float | None, str]] = {
    "thor_iwslt14": (10_000, None, "no count in the paper's readable part"),
    "smoe_m4": (32_000, 148, "table 1"),
    "smoe_m15": (32_000, 963, "table 2"),
    "smoe_opus100": (64_000, 963 + 32_000 * 1024 / 1e6, "table 2, and 32,000 more pieces"),
    "xmoe_xtreme": (250_002, None, "no count in the paper's readable part"),
    "sam_base": (32_000, None, "the paper's set-up is not known"),
    "soft_moe_s16": (29_593, 933, "table 8"),
    "soft_moe_b16": (29_593, 3_700, "table 1"),
}


def composed(name: str, *more: str) -> RunConfig:
    forget_foreign_schemas()
    with initialize_config_dir(str(configs_directory()), version_base="1.3"):
        config = compose("train", overrides=["data=somewhere", f"experiment={name}", *more])
    plain: Any = OmegaConf.to_container(config, resolve=True)
    return build(RunConfig, {key: value for key, value in plain.items() if key not in ("experiment", "user_dir")})


def model_of(config: RunConfig, entries: int) -> nn.Module:
    """On the meta device, for a vocabulary or number of classes."""
    routing, words = routing_config(config.routing), Words(entries)
    with torch.device("meta"):
        if isinstance(config.task, ImageConfig):
            size = config.task.image_size or 28
            images = ImageShape(size, size, config.task.channels or 1, entries)
            return build_vision_model(config.model, routing, images, seed=1)
        if isinstance(config.task, LanguageModelConfig):
            return build_masked_language_model(config.model, routing, words, seed=1)
        return build_model(config.model, routing, words, words, seed=1)


def accounted(name: str, entries: int, routing: dict[str, Any] | None = None) -> Accounting:
    """Of a recipe, with another strategy where ``routing`` names one (a recipe's keys belong to its own)."""
    config = composed(name)
    return account(model_of(dataclasses.replace(config, routing=routing or config.routing), entries))


def test_every_paper_has_its_recipe_and_every_recipe_its_twin() -> None:
    assert set(PUBLISHED) == set(PAPERS)
    assert {f"{name}_small" for name in PUBLISHED} == {name for name in RECIPES if name.endswith("_small")}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_at_published_size_has_the_paper_s_parameters(name: str) -> None:
    entries, millions, source = PAPERS[name]
    found = accounted(name, entries)
    assert found.blocks
    if millions is not None:
        assert found.parameters_total / 1e6 == pytest.approx(millions, rel=0.01), source


# What the source of a recipe says: optimizer, peak rate, betas, eps, decay, of what, clipping, warm-up and its start.
# fairseq's `adam` decays decoupled and all parameters; vmoe's `adam` decays decoupled, kernels alone.
OPTIMIZERS: dict[str, tuple[Any, ...]] = {
    "thor_iwslt14": ("adamw", 1e-3, (0.9, 0.98), 1e-8, 1e-4, "all", 0.0, 4000, 0.0),  # run_iwslt14_de_en.sh
    "smoe_m4": ("adam", 8e-4, (0.9, 0.98), 1e-6, 0.0, "matrices", 0.0, 8000, 1e-7),  # run_m4.sh, appendix B
    "smoe_m15": ("adam", 8e-4, (0.9, 0.98), 1e-6, 0.0, "matrices", 0.0, 8000, 1e-7),
    "smoe_opus100": ("adam", 5e-4, (0.9, 0.98), 1e-6, 0.0, "matrices", 0.0, 8000, 1e-7),
    "xmoe_xtreme": ("adamw", 5e-4, (0.9, 0.98), 1e-6, 0.01, "all", 2.0, 10000, 0.0),  # torchscale's README
    "soft_moe_s16": ("adamw", 1e-3, (0.9, 0.999), 1e-8, 0.03, "matrices", 1.0, 10000, 1e-7),  # configs/common.py
    "soft_moe_b16": ("adamw", 1e-3, (0.9, 0.999), 1e-8, 0.03, "matrices", 1.0, 10000, 1e-7),
}


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_a_recipe_s_optimizer_is_its_source_s(name: str) -> None:
    training = composed(name).training
    optimizer, schedule = training.optimizer, training.schedule
    adam = (optimizer.name, optimizer.lr, optimizer.betas, optimizer.eps, optimizer.weight_decay, optimizer.decay)
    assert (*adam, training.clip_norm, schedule.warmup_updates, schedule.warmup_init_lr) == OPTIMIZERS[name]


@pytest.mark.parametrize("name", RECIPES)
def test_no_recipe_decays_by_the_gradient(name: str) -> None:
    """Every source of a recipe decays decoupled: ``adam`` with a decay is none of theirs."""
    optimizer = composed(name).training.optimizer
    assert optimizer.name == "adamw" or not optimizer.weight_decay


@pytest.mark.parametrize("name", ["soft_moe_s16", "soft_moe_b16"])
def test_soft_moe_s_recipes_take_the_released_code_s_slots(name: str) -> None:
    config = composed(name)
    model = model_of(config, 10)
    routers = [(key, p) for key, p in model.named_parameters() if key.endswith(("router.phi", "router.scale"))]
    decayed = {id(p) for group in parameter_groups(model, 0.03) if group["weight_decay"] for p in group["params"]}  # type: ignore[attr-defined]
    assert len(routers) == 2 * 6
    assert all((id(p) in decayed) == key.endswith("scale") for key, p in routers)
    assert config.routing["normalisation"] == "official" and config.routing["decayed"] == "scale"


def test_x_moe_s_updates_are_2048_sequences_of_512_tokens() -> None:
    config = composed("xmoe_xtreme")
    training = config.training
    assert isinstance(config.task, LanguageModelConfig) and config.task.pack
    assert min(training.max_sentence_tokens, config.model.max_positions) == 512
    assert training.accumulation * (training.micro_batch_tokens // 512) == 2048


def images_of(config: RunConfig) -> PlanImages:
    """What an image recipe's model sees."""
    return PlanImages(config.task.image_size or 28, config.task.channels or 1)  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", PUBLISHED)
def test_moe_plan_sees_the_same_model(name: str) -> None:
    config, entries = composed(name), PAPERS[name][0]
    images = images_of(config) if isinstance(config.task, ImageConfig) else None
    shape, found = model_shape(config.model, config.routing, entries, images), accounted(name, entries)
    assert shape.dense_parameters + shape.expert_parameters == found.parameters_total
    assert shape.active_parameters == pytest.approx(found.parameters_active, rel=0.01)
    assert sum(stack.is_source for stack in shape.stacks) == (len(shape.stacks) == 2)
    around = found.flops_output * (
        0.15 if isinstance(config.task, LanguageModelConfig) else 1.0
    )  # of masked tokens only
    if images:
        around += 2 * config.model.patch_size**2 * images.channels * config.model.embed_dim
    assert shape.output_flops == pytest.approx(around)


@pytest.mark.parametrize("name", PUBLISHED)
def test_moe_plan_lays_out_every_recipe(name: str) -> None:
    """On 64 ranks, with the recipe's own batch: a layout that computes this very model and fits."""
    config, entries = composed(name), PAPERS[name][0]
    of_images = isinstance(config.task, ImageConfig)
    per_item = (config.task.image_size // config.model.patch_size) ** 2 if of_images else 1  # type: ignore[attr-defined]
    training = config.training
    plan = compare_layouts(
        build(
            PlanConfig,
            {
                "cluster": OmegaConf.to_container(OmegaConf.load(configs_directory() / "cluster" / "dgx_a100.yaml")),
                "model": dataclasses.asdict(config.model),
                "routing": config.routing,
                "layout": {"world": 64},
                "training": {
                    "tokens_per_update": training.tokens_per_update * per_item,
                    "accumulation": training.accumulation,
                    "precision": training.precision,
                    "optimizer": training.optimizer.name,
                },
                "images": dataclasses.asdict(images_of(config)) if of_images else {},
                "vocabulary": entries,
            },
        )
    )
    assert plan.chosen.same_model and plan.chosen.fits and plan.chosen.time.total > 0
    assert plan.chosen.work.sentence_tokens == (per_item if of_images else 32)
    numbers = as_mapping(plan)["chosen"]["parameters"]
    assert numbers["total"] == accounted(name, entries).parameters_total >= numbers["per_rank"]


def test_thor_s_experts_have_the_closed_form() -> None:
    """(N - 1) · 6.30 M beyond the dense model, for N experts in six layers."""
    thor, dense = (accounted("thor_iwslt14", 10_000, routing).parameters_total for routing in (None, {"name": "dense"}))
    assert thor - dense == 6 * (2 * 512 * 1024 + 1024 + 512)


def test_xmoe_s_experts_have_the_closed_form() -> None:
    """About 453 M beyond the dense model: 32 experts of three sub-layers."""
    found = accounted("xmoe_xtreme", 250_002)
    assert found.parameters_experts / 1e6 == pytest.approx(453, rel=0.01)


def test_sam_s_recipe_costs_what_switch_costs() -> None:
    sam, switch = (accounted("sam_base", 32_000, routing) for routing in (None, {"name": "switch", "num_experts": 8}))
    assert sam.parameters_experts == pytest.approx(switch.parameters_experts, rel=0.01)
    experts = [sum(block.flops_experts for block in found.blocks) for found in (sam, switch)]
    assert experts[0] == pytest.approx(experts[1], rel=0.01)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_twin_is_small_and_of_the_same_kind(name: str) -> None:
    paper, twin = composed(name), composed(f"{name}_small")
    assert twin.routing["name"] == paper.routing["name"] and type(twin.task) is type(paper.task)
    assert twin.model.name == paper.model.name and twin.launch.processes == 1
    entries = 10 if isinstance(twin.task, ImageConfig) else 8_000
    found = account(model_of(twin, entries))
    assert found.parameters_total < 15e6 and found.blocks
    assert {block.strategy for block in found.blocks} <= {b.strategy for b in accounted(name, PAPERS[name][0]).blocks}


def test_no_recipe_is_without_its_command(root: Path) -> None:
    for name in RECIPES:
        text = (root / "configs" / "experiment" / f"{name}.yaml").read_text(encoding="utf-8")
        assert f"experiment={name}" in text

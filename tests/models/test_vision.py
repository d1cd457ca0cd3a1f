"""The vision Transformer: patches, what an image's output depends on, every strategy, sizes of the papers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from moe_train.config import ModelConfig, build
from moe_train.config.paths import configs_directory
from moe_train.errors import ConfigError
from moe_train.models.accounting import account
from moe_train.models.vision import ImageShape, PatchEmbedding, VisionTransformer, build_vision_model
from moe_train.routing import registered_strategies, routing_config
from tests.models.helpers import routing_keys

SHAPE = ImageShape(height=8, width=12, channels=2, classes=5)
SMALL: dict[str, Any] = {
    "name": "vision_transformer", "encoder_layers": 2, "decoder_layers": 0, "embed_dim": 16, "ffn_dim": 32,
    "num_heads": 2, "patch_size": 4, "dropout": 0.0, "attention_dropout": 0.0, "activation": "gelu",
    "sparse_layers": "second_half",
}  # fmt: skip


def vision(
    routing: str | dict[str, Any], images: ImageShape = SHAPE, seed: int = 3, **changes: Any
) -> VisionTransformer:
    keys = routing_keys(routing) if isinstance(routing, str) else routing
    return build_vision_model(ModelConfig(**{**SMALL, **changes}), routing_config(keys), images, seed=seed)


def pictures(count: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, SHAPE.height, SHAPE.width, SHAPE.channels), generator=generator).to(
        torch.uint8
    )


def test_a_patch_holds_its_own_pixels() -> None:
    embed = PatchEmbedding(SHAPE, patch=4, dim=16, dropout=0.0)
    images = pictures(3)
    patches = embed.cut(images)
    assert patches.shape == (3, 6, 32)
    assert torch.equal(patches[1, 4].view(4, 4, 2), images[1, 4:8, 4:8])
    moved = images.clone()
    moved[1, 5, 6] = 255 - moved[1, 5, 6]
    changed = (embed(images) != embed(moved)).any(2)
    assert changed.nonzero().tolist() == [[1, 4]]


def test_pixels_are_scaled_to_one() -> None:
    embed = PatchEmbedding(SHAPE, patch=4, dim=16, dropout=0.0)
    for value, scaled in ((0, -1.0), (255, 1.0)):
        images = torch.full((1, 8, 12, 2), value, dtype=torch.uint8)
        expected = embed.project(torch.full((1, 6, 32), scaled)) + embed.positions
        torch.testing.assert_close(embed(images), expected)


@pytest.mark.parametrize("name", sorted(registered_strategies()))
def test_every_strategy_learns_from_every_image_alone(name: str) -> None:
    """An image's scores do not depend on its batch; every parameter gets a gradient; no images make no trouble."""
    model, images = vision(name), pictures(4)
    uid = torch.tensor([7, 3, 9, 1])
    with torch.no_grad():
        together, extra = model.eval()(images, uid)
        alone = torch.cat([model(images[i : i + 1], uid[i : i + 1])[0] for i in range(4)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    assert together.shape == (4, 5)
    assert len(extra["routing"]) == (0 if name == "dense" else 1)
    logits, extra = model.train()(images[:0], uid[:0])
    (logits.sum() + sum(record.total_loss for record in extra["routing"])).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_experts_stand_in_the_second_half() -> None:
    model = vision("switch", encoder_layers=4)
    sparse = ["router" in dict(layer.feed_forward.block.named_children()) for layer in model.stack.layers]
    assert sparse == [False, False, True, True]


def test_soft_moe_has_as_many_slots_as_an_image_has_tokens() -> None:
    model = vision({"name": "soft_moe", "num_experts": 3})
    assert model.patches == 6
    (block,) = [m for m in model.modules() if hasattr(m, "router")]
    assert block.router.phi.shape[0] == 6


def test_what_cannot_be_built_is_said() -> None:
    with pytest.raises(ConfigError, match="patches of 5 pixels do not fill images of 12 x 8") as raised:
        vision("dense", patch_size=5)
    assert "1, 2, 4" in raised.value.remedy
    with pytest.raises(ConfigError, match="not for images"):
        vision("dense", name="transformer", decoder_layers=1)


IMAGENET = ImageShape(224, 224, 3, 29593)  # JFT-4B's classes
# Table 1 and Table 8: parameters in millions; and GFLOPs per image, queries x keys (which we do not count) left out.
SOFT = {"name": "soft_moe", "slots_per_expert": 1}
PUBLISHED = [
    ("vit_s16", {"name": "dense"}, 33),
    ("vit_b16", {"name": "dense"}, 108),
    ("vit_l16", {"name": "dense"}, 333),
    ("vit_s16", {**SOFT, "num_experts": 128}, 933),
    ("vit_b16", {**SOFT, "num_experts": 128}, 3700),
    ("vit_l16", {**SOFT, "num_experts": 128}, 13100),
]


@pytest.mark.parametrize(("size", "routing", "millions"), PUBLISHED)
def test_the_published_sizes(size: str, routing: dict[str, Any], millions: float) -> None:
    keys = yaml.safe_load((configs_directory() / "model" / f"{size}.yaml").read_text())
    with torch.device("meta"):
        model = build_vision_model(build(ModelConfig, keys), routing_config(routing), IMAGENET, seed=1)
    found = account(model)
    # The paper rounds to whole millions, or to a tenth of a billion.
    assert found.parameters_total / 1e6 == pytest.approx(millions, rel=0.01)


def test_flops_of_an_image() -> None:
    keys = yaml.safe_load((configs_directory() / "model" / "vit_s16.yaml").read_text())
    with torch.device("meta"):
        model = build_vision_model(build(ModelConfig, keys), routing_config({"name": "dense"}), IMAGENET, seed=1)
    attention = 12 * 2 * 2 * 196 * 196 * 384
    assert (account(model).flops_per_token * 196 + attention) / 1e9 == pytest.approx(9.2, rel=0.01)

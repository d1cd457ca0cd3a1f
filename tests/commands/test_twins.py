"""The small twin of every paper's recipe trains from its command line: the loss falls, its experts work."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from moe_train.config.paths import configs_directory
from moe_train.data.folder import DataFolder
from tests.commands.test_train import here
from tests.data.image_files import coloured_squares, write_idx_folder

TWINS = sorted(path.stem for path in (configs_directory() / "experiment").glob("*_small.yaml"))


@pytest.fixture(scope="module")
def squares(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of 28 x 28 pixels in MNIST's files."""
    folder = tmp_path_factory.mktemp("squares") / "idx"
    write_idx_folder(folder, *coloured_squares(160, size=28), *coloured_squares(32, size=28, seed=2))
    return folder


# Eight runs of 30 updates, about 10 seconds each on one core.
@pytest.mark.slow
@pytest.mark.parametrize("name", TWINS)
def test_a_twin_trains(name: str, tiny_data: DataFolder, squares: Path, tmp_path: Path) -> None:
    of_images = name.startswith("soft_moe")
    words = [
        *(
            f"experiment={name}",
            f"data={squares if of_images else tiny_data.path}",
            f"hydra.run.dir={tmp_path / 'run'}",
        ),
        *("training.max_updates=30", f"training.tokens_per_update={32 if of_images else 512}", "training.threads=1"),
        *("training.schedule.warmup_updates=5", "training.log_every=10", "training.checkpoint.every_updates=30"),
        "training.validation.every_updates=15",
    ]
    code, said = here(words, tmp_path)
    assert code == 0, said
    valid = [json.loads(line) for line in (tmp_path / "run" / "valid.jsonl").read_text().splitlines()]
    train = [json.loads(line) for line in (tmp_path / "run" / "train.jsonl").read_text().splitlines()]
    assert [line["update"] for line in valid] == [15, 30]
    assert all(math.isfinite(line["loss"]) for line in train) and valid[1]["nll_loss"] < valid[0]["nll_loss"]
    assert train[-1]["nll_loss"] < train[0]["nll_loss"]
    loads = train[-1]["load"].values()
    assert loads and all(max(load) < 1 for load in loads if len(load) > 1)  # no block has one expert do everything
    assert (tmp_path / "run" / "checkpoints" / "step_30").is_dir()

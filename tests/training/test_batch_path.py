"""How many files a batch passes, from the dataset's items to the line in train.jsonl, models and layers apart."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import moe_train
from moe_train.config import RunConfig, build
from moe_train.data.folder import DataFolder
from moe_train.tasks import build_task
from moe_train.training import RunFolder, World
from moe_train.training.build import build_trainer

PACKAGE = Path(moe_train.__file__).parent
DATA = Path(__file__).parents[1] / "old_runs" / "data"
MODEL_ROOMS = ("models/", "layers/", "routing/", "experts/", "parallel/", "kernels/")
CONFIG = {
    "data": str(DATA),
    "routing": {"name": "switch", "num_experts": 2},
    "model": {
        "embed_dim": 16,
        "ffn_dim": 32,
        "num_heads": 2,
        "max_positions": 40,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "sparse_layers": "all",
    },
    "training": {"max_updates": 3, "tokens_per_update": 256, "threads": 1, "log_every": 1},
}


def test_a_batch_passes_few_files(tmp_path: Path) -> None:
    config = build(RunConfig, CONFIG)
    folder = RunFolder(tmp_path)
    folder.begin(config)
    recording, files = threading.Event(), set()

    def profile(frame: FrameType, event: str, _: Any) -> None:
        if recording.is_set() and event == "call" and frame.f_code.co_filename.startswith(str(PACKAGE)):
            files.add(str(Path(frame.f_code.co_filename).relative_to(PACKAGE)))

    threading.setprofile(profile)  # for the thread that makes samples
    sys.setprofile(profile)
    try:
        trainer = build_trainer(config, build_task(config, DataFolder.open(DATA)), folder, World())
        trainer.update()  # what happens once, such as mapping files into memory, is not counted
        recording.set()
        trainer.update()
        trainer.data_loader.close()  # waits for the samples of the update after it
        recording.clear()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    trainer.close()
    assert len(folder.train_log.read_text().splitlines()) == 2
    assert {"tasks/indexed_dataset.py", "training/step.py", "training/metrics/writers.py"} <= files
    passed = sorted(file for file in files if not file.startswith(MODEL_ROOMS))
    assert len(passed) <= 17, passed

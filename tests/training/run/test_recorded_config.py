from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path

import pytest

from moe_train.config import to_mapping
from moe_train.errors import ConfigError
from moe_train.training.run.recorded_config import note_ignored_keys, recorded_config
from moe_train.training.run.run_folder import RunFolder
from tests.training.toy import toy_config


def test_keys_that_no_longer_exist_are_ignored_with_one_note(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    recorded = to_mapping(toy_config())
    recorded["old_group"] = {"key": 1}
    recorded["layout"]["old_key"] = 2
    recorded["routing"] = {"name": "switch", "num_experts": 4, "old_score": True}
    config = recorded_config(recorded)
    assert config.layout == toy_config().layout and config.routing == {"name": "switch", "num_experts": 4}
    with caplog.at_level(logging.WARNING, "moe_train"):
        for _ in range(2):  # a command reads the file more than once
            note_ignored_keys(recorded, tmp_path / "config.json")
    (record,) = caplog.records
    assert "layout.old_key, old_group, routing.old_score" in record.getMessage()


def test_a_run_without_newer_keys_goes_on(tmp_path: Path) -> None:
    """A key that the run does not record has the default, in the routing group too; another value is refused."""
    config = dataclasses.replace(toy_config(), routing={"name": "switch", "num_experts": 4, "jitter": 0.0})
    folder = RunFolder(tmp_path)
    folder.begin(config)
    written = json.loads((tmp_path / "config.json").read_text())
    del written["config"]["routing"]["jitter"], written["config"]["training"]["clip_norm"]
    (tmp_path / "config.json").write_text(json.dumps(written))
    folder.check(config)
    with pytest.raises(ConfigError, match=r"routing\.jitter=0\.0 then, 0\.5 now"):
        folder.check(dataclasses.replace(config, routing={**config.routing, "jitter": 0.5}))

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest

from moe_train.config import LaunchConfig, RunConfig
from moe_train.errors import CheckpointError, ConfigError, DataError
from moe_train.training.run.run_folder import RunFolder, config_digest, recorded_overrides
from tests.training.toy import toy_config


@pytest.fixture
def begun(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    folder.begin(toy_config(), "abc")
    return folder


def change(config: RunConfig, **training: Any) -> RunConfig:
    return dataclasses.replace(config, training=dataclasses.replace(config.training, **training))


def test_config_is_read_back(begun: RunFolder) -> None:
    assert RunFolder.open(begun.path).config == toy_config()
    with pytest.raises(ConfigError, match=r"no run folder: config\.json"):
        RunFolder.open(begun.path.parent)


def test_an_unfinished_run_goes_on(begun: RunFolder) -> None:
    begun.check(toy_config(), "abc")
    begun.describe(status="interrupted", update=4)
    begun.check(toy_config(), "abc")


def test_a_finished_run_is_refused_unless_it_is_extended_or_must(begun: RunFolder) -> None:
    begun.describe(status="finished", update=12)
    with pytest.raises(ConfigError, match=r"is finished \(12 updates\).*training\.max_updates"):
        begun.check(toy_config(), "abc")
    begun.check(change(toy_config(), max_updates=13), "abc")
    begun.check(dataclasses.replace(toy_config(), resume="must"), "abc")


def test_resume_never_and_must(begun: RunFolder, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="resume=never"):
        begun.check(dataclasses.replace(toy_config(), resume="never"), "abc")
    RunFolder(tmp_path / "new").check(dataclasses.replace(toy_config(), resume="never"))
    with pytest.raises(CheckpointError, match="resume=must"):
        RunFolder(tmp_path / "new").check(dataclasses.replace(toy_config(), resume="must"))


def test_another_config_is_refused_with_its_keys(begun: RunFolder) -> None:
    other = dataclasses.replace(change(toy_config(), clip_norm=3.0), seed=9, launch=LaunchConfig(processes=4))
    with pytest.raises(ConfigError) as raised:
        begun.check(other, "abc")
    message = str(raised.value)
    assert "seed=1 then, 9 now" in message and "training.clip_norm=1.0 then, 3.0 now" in message
    assert "launch" not in message


def test_another_choice_is_named_before_all_else_and_without_its_keys(begun: RunFolder) -> None:
    routing = {"name": "thor", "num_experts": 7}
    with pytest.raises(ConfigError) as raised:
        begun.check(dataclasses.replace(toy_config(), routing=routing, seed=9), "abc")
    before = toy_config().routing["name"]
    assert f"with another config: routing={before} then, thor now; seed=1 then, 9 now. Set" in str(raised.value)


def test_other_data_is_refused(begun: RunFolder) -> None:
    elsewhere = dataclasses.replace(toy_config(), data="elsewhere")
    with pytest.raises(ConfigError, match=f"other data: data={toy_config().data} then, elsewhere now"):
        begun.check(elsewhere, "xyz")
    with pytest.raises(ConfigError, match="other data: the data folder's manifest has changed since"):
        begun.check(toy_config(), "other")


def test_digest_is_that_of_the_keys_that_matter() -> None:
    config = toy_config()
    assert config_digest(config) == config_digest(change(config, max_updates=99))
    assert config_digest(config) != config_digest(change(config, clip_norm=9.0))


def test_a_folder_is_claimed_by_one_process_at_a_time(begun: RunFolder) -> None:
    with begun.claimed(), pytest.raises(ConfigError, match="another process is training"), begun.claimed():
        pass
    with begun.claimed():
        pass


def test_logs_are_cut_to_what_was_restored(begun: RunFolder) -> None:
    whole = [json.dumps({"update": update, "loss": 1.0}) + "\n" for update in (4, 8, 12)]
    begun.train_log.write_text("".join(whole) + '{"update": 1')
    begun.cut(8)
    assert [json.loads(line)["update"] for line in begun.train_log.read_text().splitlines()] == [4, 8]
    begun.cut(0)
    assert begun.train_log.read_text() == ""


def test_a_log_that_is_no_file_is_named(begun: RunFolder) -> None:
    os.mkfifo(begun.valid_log)
    with pytest.raises(DataError, match=r"valid\.jsonl: the log cannot be read \(not a regular file\)"):
        begun.cut(0)


def test_a_broken_config_is_named(begun: RunFolder) -> None:
    (begun.path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json: the run's config cannot be read"):
        begun.check(toy_config(), "abc")


@pytest.mark.parametrize(
    "content", [b"[]", b"{", b"\xff", b"[" * 100_000, b'{"update": "4"}', b'{"sessions": {}}', b'{"status": 1}']
)
def test_a_damaged_record_is_named_and_can_be_left_out(begun: RunFolder, content: bytes) -> None:
    begun.describe(status="interrupted", update=4)
    (begun.path / "run.json").write_bytes(content)
    for use in (lambda: begun.info, lambda: begun.check(toy_config(), "abc"), lambda: begun.describe(update=5)):
        with pytest.raises(DataError, match=r"run/run\.json: the file is damaged.*move it away"):
            use()
    assert (begun.path / "run.json").read_bytes() == content
    (begun.path / "run.json").unlink()
    begun.check(toy_config(), "abc")


def test_logs_with_damaged_lines_are_cut(begun: RunFolder) -> None:
    whole = [b'{"update": 1}', b'{"update": 2}']
    odd = [b"\xff\xfe", b"[" * 100_000, b'{"update": 1e999}', b'{"update": [2]}', b"[2]", b'{"update": 3}']
    begun.train_log.write_bytes(b"\n".join([whole[0], *odd, whole[1], b'{"upd']))
    begun.cut(2)
    assert begun.train_log.read_bytes() == b"".join(line + b"\n" for line in whole)


@pytest.mark.parametrize("content", ["[]", "{", "[" * 100_000, '{"config": []}', '{"config": {"seed": "x"}}'])
def test_a_config_of_the_wrong_kind_is_named(begun: RunFolder, content: str) -> None:
    (begun.path / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=r"run/config\.json: the run's config cannot be"):
        _ = begun.config
    assert recorded_overrides(begun.path) == ()

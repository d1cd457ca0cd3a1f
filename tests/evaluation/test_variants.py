"""One trained model, routed in another way or with other draws: outputs, files, processes, commands."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from moe_train.commands.evaluate import main
from moe_train.config import LaunchConfig
from moe_train.config.evaluation import EvaluateConfig, Inference
from moe_train.data.folder import DataFolder
from moe_train.errors import ConfigError
from moe_train.evaluation.evaluate_split import evaluate
from moe_train.evaluation.loading import open_run
from tests.evaluation.jobs import SEARCH
from tests.evaluation.runs import make_run

pytestmark = pytest.mark.warm_start

SENTENCES, DIRECTION = 8, "de-en"
PART = f"only-{DIRECTION}.first-{SENTENCES}"
SCORES = f"test.{PART}.json"
ONE, TWO = LaunchConfig(device="cpu"), LaunchConfig(processes=2, device="cpu")


def config(run: Path, **changes: object) -> EvaluateConfig:
    base = EvaluateConfig(str(run), search=SEARCH, directions=(DIRECTION,), max_sentences=SENTENCES)
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


def outputs(folder: Path) -> list[bytes]:
    return [(folder / "hypotheses" / PART / f"test.{DIRECTION}.en{end}").read_bytes() for end in ("", ".scores")]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_data: DataFolder) -> Path:
    """THOR, by sentence, scored as it was trained."""
    folder = make_run(tmp_path_factory.mktemp("thor"), tiny_data, "thor")
    evaluate(config(folder))
    return folder


@pytest.mark.processes
@pytest.mark.parametrize(("inference", "launch"), [("token", ONE), ("ensemble", TWO)])
def test_a_mode_chosen_later_is_the_mode_of_a_run_that_had_it(
    run: Path, inference: str, launch: LaunchConfig, tiny_data: DataFolder, tmp_path: Path
) -> None:
    before, standard = outputs(run), (run / SCORES).read_bytes()
    found = evaluate(config(run, routing={"inference": inference}, launch=launch))
    twin = make_run(tmp_path, tiny_data, "thor", inference=inference)  # the same weights
    evaluate(config(twin))
    variant = run / "variants" / f"inference={inference}"
    assert outputs(variant) == outputs(twin) != before
    assert found.settings["routing"] == {"inference": inference} and found.settings["draw_seed"] == 1
    assert json.loads((variant / SCORES).read_text()) == found.to_json()
    assert outputs(run) == before and (run / SCORES).read_bytes() == standard
    assert not (twin / "variants").exists(), "nothing is changed there"


def test_draw_seeds_give_other_outputs_that_can_be_had_again(run: Path) -> None:
    found = [
        evaluate(config(run, draw_seed=2)),
        evaluate(config(run, draw_seed=3)),
        evaluate(config(run, draw_seed=3, routing={"inference": "sentence"})),  # as the run has it: no other variant
    ]
    assert [results.settings["draw_seed"] for results in found] == [2, 3, 3]
    assert found[1].directions == found[2].directions
    places = [run / "variants" / f"draw_seed={seed}" for seed in (2, 3)]
    assert len({tuple(outputs(place)) for place in (run, *places)}) == 3
    assert [path.name for path in places[1].glob("*.json")] == [SCORES]
    assert open_run(run, inference=Inference(draw_seed=1)).results == run


def test_a_seed_is_refused_where_all_experts_are_averaged(run: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"with routing=thor, routing\.inference=ensemble no expert.*Leave draw_seed out"
    ):
        evaluate(config(run, routing={"inference": "ensemble"}, draw_seed=2))
    assert not (run / "variants" / "inference=ensemble,draw_seed=2").exists()


@pytest.mark.processes
def test_ranks_that_divide_the_experts_are_told(run: Path) -> None:
    changes = {"routing": {"inference": "token"}, "draw_seed": 9}
    alone = evaluate(config(run, **changes))
    place = run / "variants" / "inference=token,draw_seed=9"
    want, standard = (outputs(folder)[0].splitlines() for folder in (place, run))
    divided = evaluate(config(run, **changes, launch=TWO, expert_parallel=2))
    for counted in (alone.decoding["routing"], divided.decoding["routing"]):
        assert counted["pairs_per_token"] == dict.fromkeys("0123", 1.0) and counted["dropped"] == 0
        assert counted["tokens"]["0"] == counted["tokens"]["1"] and counted["tokens"]["2"] == counted["tokens"]["3"]
    assert divided.decoding["routing"]["tokens"]["0"] == alone.decoding["routing"]["tokens"]["0"]
    assert divided.decoding["routing"]["load"]["0"] == alone.decoding["routing"]["load"]["0"]
    assert divided.settings == alone.settings and divided.decoding["processes"] == 2
    found = outputs(place)[0].splitlines()
    same = sum(a == b for a, b in zip(found, want, strict=True))  # sums in another order may turn a tie
    assert same >= SENTENCES - 1 > sum(a == b for a, b in zip(found, standard, strict=True))


def test_scores_tell_the_capacity_that_was_requested(tmp_path: Path, tiny_data: DataFolder) -> None:
    run = make_run(tmp_path, tiny_data, "smoe", evaluation_capacity_factor=1.0)
    counted = evaluate(config(run)).decoding["routing"]
    assert 0 < counted["dropped_fraction"] < 1
    for layer, extra in counted["extra_per_token"].items():
        once, twice = extra["passes"]
        assert once + twice == pytest.approx(1.0)
        asked = 2 * (once + 2 * twice)  # two experts a pass; with a limit fewer are carried out
        assert counted["pairs_per_token"][layer] < asked
    assert json.loads((run / SCORES).read_text())["decoding"]["routing"] == counted


def test_a_decoder_with_a_strategy_of_its_own(tmp_path: Path, tiny_data: DataFolder) -> None:
    run = make_run(tmp_path, tiny_data, "expert_choice", decoder={"name": "thor"})
    opened = open_run(run, inference=Inference({"decoder": {"inference": "ensemble"}}))
    assert opened.inference.routing == {"decoder.inference": "ensemble"}
    assert opened.results.name == "decoder.inference=ensemble"
    configs = {type(m).__name__: m.config for m in opened.load().model.modules() if hasattr(m, "num_experts")
               and hasattr(m, "config")}  # fmt: skip
    assert configs["ThorRouter"].inference == "ensemble"
    assert open_run(run, inference=Inference(draw_seed=2)).results.name == "draw_seed=2", "the decoder draws"
    for refused in ({"inference": "ensemble"}, {"decoder": {"pair": "independent"}}, {"decoder": "switch"}):
        with pytest.raises(ConfigError, match=r"cannot change after training.*These can: routing\.decoder\.inference"):
            open_run(run, inference=Inference(refused))


def test_a_strategy_without_such_keys_says_so(tmp_path: Path, tiny_data: DataFolder) -> None:
    run = make_run(tmp_path, tiny_data, "hash")
    with pytest.raises(ConfigError, match=r"'routing\.table' cannot change.*no key of this strategy can"):
        open_run(run, inference=Inference({"table": "random"}))
    with pytest.raises(ConfigError, match=r"'routing\.decoder' cannot change"):
        open_run(run, inference=Inference({"decoder": "switch"}))
    with pytest.raises(ConfigError, match=r"draw_seed=2' would change nothing: with routing=hash no expert is drawn"):
        open_run(run, inference=Inference(draw_seed=2))
    assert open_run(run, inference=Inference(draw_seed=1)).results == run, "the run's own is no change"


@pytest.mark.processes
def test_the_command_line(run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Both commands take the keys, and a sweep of seeds leaves every seed's results."""
    words = [f"run={run}", "search.beam=1", "search.max_length_ratio=0.5", "routing.inference=token"]
    seeds = ["draw_seed=11,12", f"directions=[{DIRECTION}]", "max_sentences=2", "-m"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["moe-evaluate", *words, *seeds])
    main()
    for seed in (11, 12):
        place = run / "variants" / f"inference=token,draw_seed={seed}"
        content = json.loads((place / f"test.only-{DIRECTION}.first-2.json").read_text())
        assert content["settings"]["draw_seed"] == seed and "routing.inference=token" in content["command"]
    text = (run / "hypotheses" / PART / f"test.{DIRECTION}.de").read_bytes()
    command = [sys.executable, "-m", "moe_train.commands.translate", *words, "draw_seed=11", "source=de", "target=en"]
    done = subprocess.run(command, input=text, capture_output=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr.decode()
    lines = done.stdout.splitlines()
    hypotheses = run / "variants" / "inference=token,draw_seed=11" / "hypotheses"
    scored = (hypotheses / f"only-{DIRECTION}.first-2" / f"test.{DIRECTION}.en").read_bytes()
    assert len(lines) == SENTENCES and lines[:2] == scored.splitlines()

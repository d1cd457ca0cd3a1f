"""Evaluation end to end on a real run folder: files, scores, baselines, averages, processes."""

from __future__ import annotations

import dataclasses
import io
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import sacrebleu
from rich.console import Console

from moe_train.config import LaunchConfig, SearchConfig
from moe_train.config.evaluation import EvaluateConfig
from moe_train.data.folder import DataFolder
from moe_train.errors import CheckpointError, ConfigError, DataError, LaunchError
from moe_train.evaluation.decode_workers import decode_batches
from moe_train.evaluation.evaluate_split import HeldOutSet, _notes, derange, evaluate
from moe_train.evaluation.hypothesis_files import OutputFiles
from moe_train.evaluation.loading import OpenedRun, open_run
from moe_train.evaluation.scoring.averages import group_directions, tier_of
from moe_train.evaluation.scoring.bleu_chrf import Scorer
from moe_train.evaluation.scoring.results import read_results
from moe_train.evaluation.scoring.score_table import print_scores
from moe_train.evaluation.translator import EncodedLines, encode
from tests.distributed.world import Worlds
from tests.evaluation import jobs
from tests.evaluation.runs import make_run
from tests.read_only import read_only, snapshot

pytestmark = pytest.mark.warm_start

SEARCH = SearchConfig(beam=2, max_length_ratio=0.5, max_length_offset=5, batch_tokens=160)
DIRECTIONS = ["de-en", "en-de", "en-fr", "en-ja", "fr-en", "ja-en"]


def config(run: Path, **changes: object) -> EvaluateConfig:
    return dataclasses.replace(EvaluateConfig(str(run), search=SEARCH), **changes)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory, tiny_data: DataFolder) -> Path:
    run = make_run(tmp_path_factory.mktemp("run"), tiny_data)
    evaluate(config(run))
    return run


def test_json_has_what_others_rely_on(evaluated: Path) -> None:
    content = json.loads((evaluated / "test.json").read_text())
    assert list(content["directions"]) == DIRECTIONS
    for name in ("bleu", "chrf"):
        values = [entry[name] for entry in content["directions"].values()]
        assert content["average"][name] == pytest.approx(sum(values) / 6, abs=1e-3)
        for baseline in ("copy", "shuffled"):
            values = [entry[baseline][name] for entry in content["directions"].values()]
            assert content["baselines"][baseline][name] == pytest.approx(sum(values) / 6, abs=1e-3)
    assert "tok:13a" in content["signatures"]["bleu"]["13a"] and "nw:2" in content["signatures"]["chrf"]
    assert content["averages"]["from English"]["directions"] == 3
    assert content["averages"]["into English"]["directions"] == 3
    assert content["settings"]["checkpoint"] == "step_5"
    assert content["decoding"]["sentences"] == 120 and content["decoding"]["words_per_second"] > 0


def test_scores_are_those_of_the_files(evaluated: Path, tiny_data: DataFolder) -> None:
    results = read_results(evaluated / "test.json")
    assert results is not None
    for direction in ("en-de", "fr-en"):
        files = OutputFiles(evaluated, "test", direction)
        hypotheses, references = files.read()
        sources, expected = tiny_data.raw("test", direction)
        assert references == expected and files.sources.read_text().splitlines() == sources
        assert len(hypotheses) == len(files.scores.read_text().splitlines()) == 20
        found = results.directions[direction]
        assert found.scores.bleu == pytest.approx(sacrebleu.corpus_bleu(hypotheses, [references]).score, abs=1e-3)
        copied = sacrebleu.corpus_chrf(sources, [references], word_order=2).score
        assert found.baselines["copy"].chrf == pytest.approx(copied, abs=1e-3)
        shuffled = derange(hypotheses, f"1/{direction}")
        assert found.baselines["shuffled"].bleu == pytest.approx(
            sacrebleu.corpus_bleu(shuffled, [references]).score, abs=1e-3
        )


@pytest.mark.processes
def test_another_number_of_processes_gives_the_same(evaluated: Path) -> None:
    names = ["test.en-de.de", "test.ja-en.en.scores"]
    before = [(evaluated / "hypotheses" / name).read_bytes() for name in names]
    scores = json.loads((evaluated / "test.json").read_text())["directions"]
    evaluate(config(evaluated, launch=LaunchConfig(processes=2, device="cpu")))
    assert [(evaluated / "hypotheses" / name).read_bytes() for name in names] == before
    after = json.loads((evaluated / "test.json").read_text())
    assert after["directions"] == scores and after["decoding"]["processes"] == 2


FEW = {"directions": ("de-en", "en-fr"), "max_sentences": 7}


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory, tiny_data: DataFolder) -> tuple[Path, dict[str, float]]:
    """A run, and the BLEU of a few of its sentences, all by this process."""
    run = make_run(tmp_path_factory.mktemp("few"), tiny_data)
    found = evaluate(config(run, **FEW, search=jobs.SEARCH)).directions
    return run, {name: entry.scores.bleu for name, entry in found.items()}


@pytest.mark.parametrize(("world", "expert_parallel"), [(4, 4), (4, 2), (2, 1)])
def test_ranks_of_a_group_evaluate_together(
    worlds: Worlds, few: tuple[Path, dict[str, float]], world: int, expert_parallel: int
) -> None:
    run, want = few
    for found in worlds(world).run(jobs.scores, str(run), expert_parallel):
        assert found == pytest.approx(want, abs=0.1)


@pytest.mark.processes
def test_own_processes_divide_the_experts(few: tuple[Path, dict[str, float]]) -> None:
    run, want = few
    launched = LaunchConfig(processes=2, device="cpu")
    found = evaluate(config(run, **FEW, search=jobs.SEARCH, launch=launched, expert_parallel=2))
    assert {name: entry.scores.bleu for name, entry in found.directions.items()} == pytest.approx(want, abs=0.1)


def test_experts_that_cannot_be_divided(few: tuple[Path, dict[str, float]]) -> None:
    with pytest.raises(ConfigError, match=r"^expert_parallel=4 is above the 2 ranks.*Set expert_parallel to 1 or 2"):
        evaluate(config(few[0], launch=LaunchConfig(processes=2, device="cpu"), expert_parallel=4))


def everything(run: Path) -> dict[str, bytes]:
    """The scores of whole splits and their outputs."""
    files = [run / "test.json", *(path for path in (run / "hypotheses").iterdir() if path.is_file())]
    return {path.name: path.read_bytes() for path in files}


def test_a_quick_look_leaves_the_whole_scores_alone(evaluated: Path) -> None:
    """Each limit has files of its own, and so has each choice of directions."""
    before = everything(evaluated)
    assert len(before) == 25
    for limit in (3, 2):
        results = evaluate(config(evaluated, max_sentences=limit))
        assert {entry.sentences for entry in results.directions.values()} == {limit} and not results.notes[1:]
        assert read_results(evaluated / f"test.first-{limit}.json") == results
        outputs = evaluated / "hypotheses" / f"first-{limit}" / "test.ja-en.en"
        assert outputs.read_text().count("\n") == limit
    for chosen, name in ((("en-de", "de-en", "en-de"), "only-de-en,en-de"), (("en-de",), "only-en-de")):
        assert list(evaluate(config(evaluated, directions=chosen)).directions) == sorted(set(chosen))
        assert (evaluated / f"test.{name}.json").is_file()
    evaluate(config(evaluated, directions=("fr-en",), max_sentences=1))
    assert (evaluated / "test.only-fr-en.first-1.json").is_file()
    assert everything(evaluated) == before
    assert list(evaluate(config(evaluated, directions=tuple(DIRECTIONS))).directions) == DIRECTIONS
    assert everything(evaluated).keys() == before.keys(), "all directions by name are the whole split"


def test_another_checkpoint_or_search_sets_the_earlier_results_aside(tmp_path: Path, tiny_data: DataFolder) -> None:
    run = make_run(tmp_path, tiny_data, "dense", directions=("en-de",))
    first = evaluate(config(run))
    assert evaluate(config(run)).directions == first.directions and not (run / "test.replaced-1.json").exists()
    second = evaluate(config(run, checkpoint="last"))
    assert any("test.replaced-1.json" in note for note in second.notes)
    (run / "test.json").write_text((run / "test.json").read_text()[:300])  # might be anything
    third = evaluate(config(run, search=dataclasses.replace(SEARCH, beam=1)))
    assert any("test.replaced-2.json" in note for note in third.notes)
    kept = read_results(run / "test.replaced-1.json")
    assert kept is not None and kept.settings["checkpoint"] == "step_5" and kept.directions == first.directions
    outputs = [
        (run / "hypotheses" / name / "test.en-de.de").read_text() for name in ("replaced-1", "replaced-2", "")
    ]  # fmt: skip
    assert len(set(outputs)) == 3 and all(text.count("\n") == 20 for text in outputs)


@pytest.mark.processes
def test_n_best_lists_stand_beside_the_outputs(few: tuple[Path, dict[str, float]], tmp_path: Path) -> None:
    """The same lists from any number of processes, of samples too."""
    sampling = dataclasses.replace(jobs.SEARCH, beam=3, n_best=3, sampling=True, top_p=0.9)
    written = []
    for search, processes in ((sampling, 1), (sampling, 2), (dataclasses.replace(jobs.SEARCH, n_best=2), 1)):
        out = tmp_path / f"{processes}-{search.n_best}"
        evaluate(config(few[0], **FEW, search=search, launch=LaunchConfig(processes, device="cpu"), out=str(out)))
        (folder,) = (out / "hypotheses").iterdir()
        best = (folder / "test.de-en.en").read_text().split("\n")[:-1]
        rows = [line.split("\t") for line in (folder / "test.de-en.en.nbest").read_text().split("\n")[:-1]]
        numbers = [(line, rank) for line in range(1, 8) for rank in range(1, search.n_best + 1)]
        assert [(int(line), int(rank)) for line, rank, _, _ in rows] == numbers
        assert [text for _, rank, _, text in rows if rank == "1"] == best
        written.append([(text, score[:-2]) for *_, score, text in rows])
    assert written[0] == written[1]
    assert not list((few[0] / "hypotheses").rglob("*.nbest")), "one translation for each line makes no lists"


def test_validation_split_and_few_sentences(tmp_path: Path, tiny_data: DataFolder) -> None:
    run = make_run(tmp_path, tiny_data, "dense", directions=("en-de", "en-fr"))
    screen = io.StringIO()
    results = evaluate(config(run, split="valid", max_sentences=7), Console(file=screen, width=200))
    assert list(results.directions) == ["en-de", "en-fr"]
    assert {r.sentences for r in results.directions.values()} == {7}
    assert f"written: {run / 'valid.first-7.json'}" in screen.getvalue()
    assert not list(run.glob("test*.json")) and not (run / "valid.json").exists()
    zero_shot = evaluate(config(run, split="valid", max_sentences=7, directions=("ja-en",)))
    assert any("zero-shot" in note for note in zero_shot.notes)
    print_scores(results, console := Console(width=80, record=True, file=io.StringIO()))
    assert "the first 7 lines of each direction" in console.export_text()


def test_sources_that_were_cut_are_named(tmp_path: Path, tiny_data: DataFolder) -> None:
    run = make_run(tmp_path, tiny_data, "dense", directions=("en-de",), model={"max_positions": 10})
    notes = evaluate(config(run, max_sentences=2)).notes
    assert "en-de, sources, lines 1 and 2: cut to the model's 10 tokens, tag and end included" in notes


def test_blank_lines_are_counted_on_both_sides() -> None:
    encoded = cast(EncodedLines, SimpleNamespace(truncated=[], lines=[[0]]))
    held = HeldOutSet("en-de", ["a", " ", ""], ["", "b", "\u00a0"], encoded)
    run = cast(OpenedRun, SimpleNamespace(trained=["en-de"]))
    blank = "en-de: 2 blank sources have blank outputs", "en-de: 2 references are blank, which no translation matches"
    assert tuple(_notes(run, Scorer("de"), held)) == blank


def test_results_go_where_out_says_and_elsewhere_from_a_run_that_cannot_be_written(
    tmp_path: Path, tiny_data: DataFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "run", tiny_data, "dense", directions=("en-de",))
    evaluate(config(run, max_sentences=2, out=str(tmp_path / "out")))
    assert (tmp_path / "out" / "test.first-2.json").is_file() and not (run / "hypotheses").exists()
    monkeypatch.chdir(tmp_path)
    before = snapshot(run)
    with read_only(run):
        results = evaluate(config(run, max_sentences=2))
    (scores,) = (tmp_path / "evaluated").glob("run-*/test.first-2.json")
    assert read_results(scores) == results and any("Read-only file system" in note for note in results.notes)
    assert snapshot(run) == before


def test_lengths_that_are_fixed(tmp_path: Path, tiny_data: DataFolder) -> None:
    run = make_run(tmp_path, tiny_data, "dense", directions=("en-de", "en-fr"))
    fixed = SearchConfig(beam=2, max_length_ratio=0.0, max_length_offset=7, min_length=7, unk_penalty=9.0)
    found = evaluate(config(run, directions=("en-de",), max_sentences=4, search=fixed))
    assert found.decoding["tokens"] == 4 * (7 + 1), "the end counts"
    assert found.settings["search"]["min_length"] == 7


def test_unknown_direction(tmp_path: Path, tiny_data: DataFolder) -> None:
    run = make_run(tmp_path, tiny_data, "dense")
    with pytest.raises(DataError, match=r"no direction 'en-dd'.*'en-de'"):
        evaluate(config(run, directions=("en-dd",)))


def test_under_a_launcher(tmp_path: Path, tiny_data: DataFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path, tiny_data, "dense")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(LaunchError, match=r"launch\.processes"):
        evaluate(config(run, max_sentences=2))


@pytest.mark.processes
def test_what_a_process_finds_wrong_is_reported_as_it_is(tmp_path: Path, tiny_data: DataFolder) -> None:
    run = open_run(make_run(tmp_path, tiny_data))  # verified here, and spoilt before the processes read it
    batches = encode(run.task, ["Das Kind."] * 40, "de", "en", 30).batches
    for weights in run.checkpoint.glob("*.safetensors"):
        weights.unlink()
    with pytest.raises(CheckpointError, match="step_5"):
        decode_batches(run, batches, SEARCH, LaunchConfig(processes=2, device="cpu"))


@pytest.mark.processes
def test_killed_processes_are_noticed(tmp_path: Path, tiny_data: DataFolder) -> None:
    run = open_run(make_run(tmp_path, tiny_data))
    batches = encode(run.task, ["Das Kind kauft das Buch."] * 400, "de", "en", 30).batches

    def kill(_: int) -> None:
        for process in multiprocessing.active_children():
            process.kill()

    with pytest.raises(LaunchError, match="exit code -9"):
        decode_batches(run, batches, SEARCH, LaunchConfig(processes=2, device="cpu"), kill)


@pytest.mark.processes
def test_processes_end_with_a_parent_that_is_killed(tmp_path: Path, tiny_data: DataFolder) -> None:
    """It is killed when the first batch is done, with hours of work left."""
    program = """
        import multiprocessing, os, signal, sys
        from moe_train.config import LaunchConfig, SearchConfig
        from moe_train.evaluation.translator import encode
        from moe_train.evaluation.loading import open_run
        from moe_train.evaluation.decode_workers import decode_batches

        def kill(_):
            print(*(process.pid for process in multiprocessing.active_children()), flush=True)
            os.kill(os.getpid(), signal.SIGKILL)

        run = open_run(sys.argv[1])
        batches = encode(run.task, ["Das Kind kauft das Buch."] * 400, "de", "en", 30).batches
        decode_batches(run, batches * 1000, SearchConfig(beam=2), LaunchConfig(processes=2, device="cpu"), kill)
    """
    command = [sys.executable, "-c", textwrap.dedent(program), str(make_run(tmp_path, tiny_data))]
    with (tmp_path / "children").open("w") as told:  # a pipe would be held open by children that are left
        done = subprocess.run(command, stdout=told, timeout=200, check=False)
    children = [int(word) for word in (tmp_path / "children").read_text().split()]
    assert done.returncode == -signal.SIGKILL and len(children) == 2
    deadline = time.monotonic() + 30
    try:
        while any(map(_runs, children)):
            assert time.monotonic() < deadline, "they outlive it"
            time.sleep(0.1)
    finally:
        for child in filter(_runs, children):
            os.kill(child, signal.SIGKILL)


def _runs(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_another_tokenizer_is_a_setting(evaluated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sacrebleu.tokenizers.tokenizer_spm.SACREBLEU_DIR", str(tmp_path))
    with pytest.raises(DataError, match=r"flores200sacrebleuspm: the SentencePiece model .* is not on this machine"):
        evaluate(config(tmp_path / "before anything is opened", tokenizer="flores200"))
    run = tmp_path / "run"
    shutil.copytree(evaluated, run)
    before = read_results(run / "test.json")
    char = evaluate(config(run, tokenizer="char", directions=("en-de",)))
    assert before is not None and "tokenizer" not in before.settings
    assert char.settings["tokenizer"] == char.directions["en-de"].tokenizer == "char"
    assert "tok:char" in char.signatures["bleu"]["char"]
    other = dataclasses.replace(before, settings={**before.settings, "tokenizer": "char"})
    assert before.replaces(before) and not other.replaces(before) and not before.replaces(other)


def test_shuffling_leaves_no_line_in_its_place() -> None:
    lines = [str(i) for i in range(50)]
    shuffled = derange(lines, "seed")
    assert sorted(shuffled, key=int) == lines
    assert all(a != b for a, b in zip(lines, shuffled, strict=True))
    assert derange(lines, "seed") == shuffled != derange(lines, "other")
    assert derange(["one"], "seed") == ["one"] and derange([], "seed") == []


def test_tiers_and_groups() -> None:
    tiers = {"de": "high", "sw": "low", "fi": "medium", "en": "high"}
    assert tier_of("en-sw", tiers) == "low" and tier_of("de-en", tiers) == "high"
    assert tier_of("de-sw", tiers) == "low" and tier_of("de-fi", tiers) == "medium" and tier_of("en-xx", tiers) == ""
    found = group_directions(["en-sw", "de-en", "de-sw", "en_GB-fi"], tiers)
    assert found == {
        "all": ["en-sw", "de-en", "de-sw", "en_GB-fi"],
        "from English": ["en-sw", "en_GB-fi"],
        "into English": ["de-en"],
        "between others": ["de-sw"],
        "high resource": ["de-en"],
        "medium resource": ["en_GB-fi"],
        "low resource": ["en-sw", "de-sw"],
    }


def test_table_fits_a_narrow_screen(evaluated: Path) -> None:
    results = read_results(evaluated / "test.json")
    assert results is not None
    console = Console(width=80, record=True, file=(evaluated / "screen.txt").open("w"))
    print_scores(results, console)
    text = console.export_text()
    for word in ("en-ja", "average (6)", "from English (3)", "shuffled", "copy", "nrefs:1", "words/s"):
        assert word in text
    assert "…" not in text


def test_a_damaged_result_file(evaluated: Path, tmp_path: Path) -> None:
    path = tmp_path / "test.json"
    assert read_results(path) is None
    path.write_text((evaluated / "test.json").read_text()[:300])
    with pytest.raises(DataError, match="Run moe-evaluate again"):
        read_results(path)

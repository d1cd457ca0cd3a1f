"""300 inputs damaged by seed: no command ends in a traceback, and no result changes without a word.

Run folders, data folders, exports and images. A command either refuses what is damaged and names something in the
folder, or does what it did before, or says that something is not as it was.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from safetensors.torch import load_file

from moe_train.commands import evaluate, export, report, train, translate
from moe_train.commands.cli.app import plain
from moe_train.config.paths import configs_directory
from moe_train.errors import UserError
from moe_train.launch.hydra_store import forget_foreign_schemas
from tests.data.image_files import coloured_squares, write_idx_folder
from tests.mutations import mutate
from tests.test_old_runs import OLD, WORDS

SENTENCE = "The teacher sees a red apple today.\n"
SHORT = ["search.beam=1", "search.max_length_ratio=0.5", "search.max_length_offset=2"]


@dataclass
class Inputs:
    """The folders that are damaged, and the mappings that commands get: what Hydra makes of their words."""

    root: Path
    mappings: dict[str, Mapping[str, Any]] = field(default_factory=dict)

    def composed(self, command: str, *words: str) -> dict[str, Any]:
        """The config of a command; made once for the same words."""
        key = " ".join([command, *words])
        if key not in self.mappings:
            forget_foreign_schemas()  # of fairseq, which another test may have imported
            with initialize_config_dir(str(configs_directory()), version_base="1.3"):
                self.mappings[key] = plain(compose(command, overrides=list(words)))
        return dict(self.mappings[key])


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    """``run``, ``unfinished``, ``export`` and ``data`` of an old version; ``idx`` and ``classes``: images, and runs."""
    root = tmp_path_factory.mktemp("inputs")
    for name, there in {"run": "finished", "unfinished": "unfinished", "export": "export", "data": "data"}.items():
        shutil.copytree(OLD / there, root / name, symlinks=True)
    images, labels = coloured_squares(40)
    write_idx_folder(root / "idx" / "images", images, labels, *coloured_squares(12, seed=2))
    write_classes(root / "classes" / "images", images, labels)
    with pytest.MonkeyPatch.context() as patched:
        for name in ("idx", "classes"):
            words = ["task=image_classification", f"data={root / name / 'images'}", "routing=dense", *_IMAGE_MODEL]
            patched.setattr(sys, "argv", ["moe-train", *words, f"hydra.run.dir={root / name / 'run'}"])
            with quiet():
                train.main()
    return Inputs(root)


_IMAGE_MODEL = [
    *("model=vit_tiny", "model.embed_dim=16", "model.ffn_dim=16", "model.encoder_layers=1", "model.num_heads=2"),
    *("model.patch_size=4", "training.max_updates=1", "training.tokens_per_update=16", "training.threads=1"),
]


def write_classes(folder: Path, images: Any, labels: Any) -> None:
    from PIL import Image

    for number, (pixels, label) in enumerate(zip(images, labels, strict=True)):
        split = ("train", "train", "valid", "test")[number % 4]
        place = folder / split / str(label)
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(place / f"{number}.png")


@contextlib.contextmanager
def quiet() -> Iterator[io.StringIO]:
    """What is printed and logged inside goes into the text that this gives."""
    said = io.StringIO()
    handler = logging.StreamHandler(said)
    logger = logging.getLogger("moe_train")
    logger.addHandler(handler)
    try:
        with contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO(), "utf-8")), contextlib.redirect_stderr(said):
            yield said
    finally:
        logger.removeHandler(handler)


# --- commands: what they give that must not change --------------------------------------------------------------------


def evaluated(inputs: Inputs, folder: Path, data: Path) -> Any:
    (folder / "test.json").unlink(missing_ok=True)
    words = ["run=RUN", "data=DATA", "directions=[en-de]", "max_sentences=2", *SHORT]
    evaluate.run({**inputs.composed("evaluate", *words), "run": str(folder), "data": str(data)})
    found = max(folder.glob("test*.json"), key=lambda path: path.stat().st_mtime_ns)
    return json.loads(found.read_text())["directions"]


def translated(inputs: Inputs, folder: Path, data: Path) -> Any:
    mapping = inputs.composed("translate", "run=RUN", "source=en", "target=de", "threads=1", *SHORT)
    before, sys.stdin = sys.stdin, io.TextIOWrapper(io.BytesIO(SENTENCE.encode()))
    try:
        translate.run({**mapping, "run": str(folder)})
        sys.stdout.flush()
        return sys.stdout.buffer.getvalue().decode()  # type: ignore[attr-defined]
    finally:
        sys.stdin = before


def exported(inputs: Inputs, folder: Path, data: Path) -> Any:
    out = folder.parent / "exported"
    export.run(
        {**inputs.composed("export", "run=RUN", "out=OUT"), "run": str(folder), "data": str(data), "out": str(out)}
    )
    return {name: tensor.tolist() for name, tensor in load_file(out / "model.safetensors").items()}


def reported(inputs: Inputs, folder: Path, data: Path) -> Any:
    mapping = inputs.composed("report", "runs=[RUN]", "html=false", "samples=0")
    report.run({**mapping, "runs": [str(folder)]})


def resumed(inputs: Inputs, folder: Path, data: Path) -> Any:
    before, sys.argv = sys.argv, [
        *("moe-train", f"data={data}", *WORDS, f"hydra.run.dir={folder}", "training.max_updates=81")
    ]  # fmt: skip
    try:
        train.main()
    except SystemExit as left:
        said = sys.stderr.getvalue()  # type: ignore[attr-defined]
        raise UserError(said) if left.code == 2 else AssertionError(said[-1500:]) from None
    finally:
        sys.argv = before
    (weights,) = (folder / "checkpoints" / "step_81").glob("*.safetensors")
    return {name: tensor.tolist() for name, tensor in load_file(weights).items()}


def measured(inputs: Inputs, folder: Path, data: Path) -> Any:
    evaluate.run({**inputs.composed("evaluate", "run=RUN"), "run": str(folder)})
    return json.loads((folder / "test.json").read_text())["sets"]


Command = Callable[[Inputs, Path, Path], Any]


@dataclass(frozen=True)
class Case:
    """Which folder is damaged, and what is done with it: the command gets the run and the data folder.

    Attributes:
        covered: whether a checksum covers a file of the damaged folder.
    """

    damaged: str
    run: str
    data: str
    command: Command
    times: int
    covered: Callable[[str], bool] = lambda file: True


def of_checkpoint(file: str) -> bool:
    """A run's other files have no checksum."""
    return file.startswith("checkpoints/")


CASES = {
    "a run is reported": Case("run", "run", "data", reported, 58, of_checkpoint),
    "a run is evaluated": Case("run", "run", "data", evaluated, 30, of_checkpoint),
    "a run is exported": Case("run", "run", "data", exported, 20, of_checkpoint),
    "a run is resumed": Case("unfinished", "unfinished", "data", resumed, 4, of_checkpoint),
    "data is evaluated with": Case("data", "run", "data", evaluated, 60),
    "data is resumed with": Case("data", "unfinished", "data", resumed, 4),
    "an export translates": Case("export", "export", "data", translated, 70),
    "an export is evaluated": Case("export", "export", "data", evaluated, 14),
    "images of classes": Case("classes/images", "classes/run", "classes/images", measured, 20),
    "images in one file": Case("idx/images", "idx/run", "idx/images", measured, 20),
}


def test_there_are_300() -> None:
    assert sum(case.times for case in CASES.values()) == 300


@pytest.mark.parametrize("name", CASES)
def test_mutated_inputs(name: str, inputs: Inputs, tmp_path: Path) -> None:
    case = CASES[name]
    copy(case, inputs, tmp_path / "whole")
    with quiet():
        expected = case.command(inputs, tmp_path / "whole" / case.run, tmp_path / "whole" / case.data)
    first = list(CASES).index(name) * 1000
    problems = [
        outcome(case, inputs, tmp_path / str(seed), seed, expected) for seed in range(first, first + case.times)
    ]
    assert not any(problems), "\n\n".join(filter(None, problems))


def copy(case: Case, inputs: Inputs, work: Path) -> None:
    """Copies of a case's folders below ``work``."""
    for name in {path.partition("/")[0] for path in (case.damaged, case.run, case.data)}:
        shutil.copytree(inputs.root / name, work / name, symlinks=True)
    if "/" in case.data:  # images lie where the run says
        config = work / case.run / "config.json"
        config.write_text(config.read_text().replace(str(inputs.root / case.data), str(work / case.data)))


def outcome(case: Case, inputs: Inputs, work: Path, seed: int, expected: Any) -> str:
    """What is wrong with how a command took a damaged folder; "" where nothing is."""
    copy(case, inputs, work)
    mutation = mutate(work / case.damaged, seed)
    problem = ""
    with quiet() as said:
        try:
            result = case.command(inputs, work / case.run, work / case.data)
        except UserError as error:
            if str(work) not in str(error):
                problem = f"nothing in the folder is named: {error}"
        except Exception:
            problem = "".join(traceback.format_exc().splitlines(keepends=True)[-12:])
        else:
            same = json.dumps(result) == json.dumps(expected)
            if not same and case.covered(mutation.file) and str(work) not in said.getvalue():
                problem = "the result is another, and nothing was said"
    shutil.rmtree(work)
    return problem and f"seed {seed}, {mutation.kind} {mutation.file}: {problem}"

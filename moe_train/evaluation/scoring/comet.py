"""``metrics=[comet]``: COMET (Rei et al., 2020), computed by a Python of its own.

unbabel-comet needs older versions of numpy, protobuf and transformers than this package. Its environment's Python runs
:mod:`moe_train.evaluation.scoring.comet_worker`, once for all directions, and gets the sentences as JSON lines.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from moe_train.config import build
from moe_train.config.check import NonNegativeInt, PositiveInt, Range
from moe_train.errors import ConfigError
from moe_train.evaluation.scoring.further_metrics import Corpus, CorpusMetric, MetricScore

WORKER = Path(__file__).with_name("comet_worker.py")
_LAST_WORDS = 400  # characters of the worker's standard error in a message
_IGNORED = ("PYTHONPATH", "PYTHONHOME", "PYTHONSTARTUP")
_OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


@dataclass(frozen=True)
class CometSettings:
    """``metric.comet``.

    Attributes:
        python: the Python of an environment with unbabel-comet.
        model: a checkpoint (``…/checkpoints/model.ckpt``, next to whose folder ``hparams.yaml`` is). Nothing is
            downloaded: the encoder that it names must be in the Hugging Face cache or be a folder.
        batch_size: sentences per batch.
        gpus: GPUs that the worker uses.
        minutes: time limit for all directions together.
    """

    python: str = ""
    model: str = ""
    batch_size: PositiveInt = 16
    gpus: NonNegativeInt = 0
    minutes: Annotated[float, Range(above=0, most=1e5)] = 60.0


class Comet(CorpusMetric):
    """The mean of COMET's sentence scores; the model is loaded once for all directions."""

    together = True

    def __init__(self, settings: Mapping[str, Any]) -> None:
        own = build(CometSettings, settings, "metric.comet")
        if not own.python:
            remedy = "make an environment with unbabel-comet (docs/evaluation.md) and name its Python"
            raise ConfigError("COMET runs in a Python of its own", "metric.comet.python", remedy)
        python, self._model = shutil.which(os.path.expanduser(own.python)), Path(own.model).expanduser()
        if python is None:
            where = f"metric.comet.python={own.python}"
            raise ConfigError("this is no program", where, "name the python of an environment with unbabel-comet")
        if not self._model.is_file():
            where = f"metric.comet.model={own.model}"
            raise ConfigError("there is no COMET checkpoint", where, "name a file such as checkpoints/model.ckpt")
        self._python, self._own = os.path.abspath(python), own

    def score(self, corpora: Sequence[Corpus]) -> Sequence[MetricScore]:
        """Usually 0 to 1.

        Raises:
            ValueError: the worker failed, gave no scores, or took longer than the limit.
        """
        job = {"model": str(self._model.resolve()), "batch_size": self._own.batch_size, "gpus": self._own.gpus}
        lines = [json.dumps(entry) for entry in (job, *_segments(corpora))]
        answers = self._run("\n".join(lines) + "\n").splitlines()
        if len(answers) != len(lines):
            raise ValueError(f"the worker gave {len(answers)} lines for {len(lines)}")
        about, *scores = (json.loads(answer) for answer in answers)
        signature = f"unbabel-comet:{about['version']}|model:{about['model']}|sha256:{about['sha256'][:12]}"
        rest, found = iter(scores), []
        for corpus in corpora:
            own = [float(next(rest)["score"]) for _ in corpus.references]
            found.append(MetricScore(sum(own) / len(own), signature))
        return found

    def _run(self, text: str) -> str:
        """What the worker answers."""
        environment = {name: value for name, value in os.environ.items() if name not in _IGNORED}
        with subprocess.Popen(
            [self._python, "-I", str(WORKER)],  # -I: neither this folder nor the working directory is searched
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            errors="replace",
            env={**environment, **_OFFLINE},
            start_new_session=True,
        ) as worker:
            try:
                answer, said = worker.communicate(text, timeout=60 * self._own.minutes)
            except subprocess.TimeoutExpired:
                limit = f"metric.comet.minutes={self._own.minutes:g}"
                raise ValueError(f"the worker took longer than {limit} and was ended") from None
            finally:
                with suppress(ProcessLookupError):  # its own processes, too
                    os.killpg(worker.pid, signal.SIGKILL)
        if worker.returncode:
            last = " ".join(said.split())[-_LAST_WORDS:]
            raise ValueError(f"{self._python} ended with exit code {worker.returncode}: {last}")
        return answer


def _segments(corpora: Sequence[Corpus]) -> Iterator[dict[str, str]]:
    for corpus in corpora:
        for source, hypothesis, reference in zip(corpus.sources, corpus.hypotheses, corpus.references, strict=True):
            yield {"src": source, "mt": hypothesis, "ref": reference}

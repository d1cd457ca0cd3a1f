"""``training.loggers=[mlflow]``: MLflow, in a database in the run folder unless MLFLOW_TRACKING_URI names a store."""

from __future__ import annotations

import json
import logging
import os
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from moe_train.config import RunConfig, to_mapping
from moe_train.training.checkpoint.checksums import replace_text
from moe_train.training.metrics.flat_numbers import flat_numbers
from moe_train.training.run.run_folder import RunFolder
from moe_train.utils.json_files import read_object

IDENTITY = "mlflow.json"  # in the run folder: the store and the id that all sessions of the run have
DATABASE = "mlflow.db"
_MOST_METRICS, _MOST_PARAMETERS, _LONGEST = 1000, 100, 6000  # of a request, and characters of a parameter
_UNKNOWN = re.compile(r"[^\w./ :-]")  # what a metric's name may not have


class MlflowLogger:
    """One MLflow run for all sessions of a run, in the experiment MLFLOW_EXPERIMENT_NAME (``moe_train``)."""

    def __init__(self, folder: Path, config: RunConfig, update: int) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow.entities import Param
        from mlflow.tracking import MlflowClient

        logging.getLogger("mlflow").setLevel(logging.WARNING)  # it prints that it creates tables
        self._folder = RunFolder(folder)
        store = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{folder.resolve() / DATABASE}"
        self._client = MlflowClient(tracking_uri=store)
        path = folder / IDENTITY
        known = read_object(path, "remove it: a new MLflow run is begun") or {}
        if known.get("store") == store:
            self._id = str(known["run"])
            self._client.update_run(self._id, status="RUNNING")
            return
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or "moe_train"
        experiment = self._client.get_experiment_by_name(name)
        number = experiment.experiment_id if experiment else self._client.create_experiment(name)
        tags = {"run_folder": str(folder.resolve())}
        self._id = self._client.create_run(number, run_name=folder.name, tags=tags).info.run_id
        parameters = [Param(key, value) for key, value in _flat(to_mapping(config))]
        for first in range(0, len(parameters), _MOST_PARAMETERS):
            self._client.log_batch(self._id, params=parameters[first : first + _MOST_PARAMETERS])
        replace_text(path, json.dumps({"store": store, "run": self._id}) + "\n")

    def trained(self, line: Mapping[str, Any]) -> None:
        """Every number of a line of train.jsonl, as ``train/NAME``."""
        self._log("train", line)

    def validated(self, line: Mapping[str, Any]) -> None:
        """Every number of a line of valid.jsonl, as ``valid/NAME``."""
        self._log("valid", line)

    def _log(self, group: str, line: Mapping[str, Any]) -> None:
        from mlflow.entities import Metric

        now, step = int(1000 * time.time()), int(line["update"])
        numbers = flat_numbers(line, group)
        metrics = [Metric(_UNKNOWN.sub("_", name), value, now, step) for name, value in numbers]
        for first in range(0, len(metrics), _MOST_METRICS):
            self._client.log_batch(self._id, metrics=metrics[first : first + _MOST_METRICS])

    def close(self) -> None:
        """Ends this session of the run."""
        self._client.set_terminated(self._id, status="FINISHED" if self._folder.finished else "KILLED")


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted key and value of every value of a config."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", str(value)[:_LONGEST]

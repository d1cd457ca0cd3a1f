"""fairseq tasks and criterions; :func:`build_task` makes the one that a config names."""

from __future__ import annotations

from moe_train.tasks import translation as translation
from moe_train.tasks.base import Sample, TrainingTask
from moe_train.tasks.registry import build_task, register_task

__all__ = ["Sample", "TrainingTask", "build_task", "register_task"]

"""Tasks and criterions; :func:`build_task` makes the one that a config names."""

from __future__ import annotations

from moe_train.tasks import classification as classification
from moe_train.tasks import images as images
from moe_train.tasks import lm as lm
from moe_train.tasks.base import Sample, TrainingTask
from moe_train.tasks.registry import TaskData, build_task, locate_data, open_data, register_task
from moe_train.tasks.translation import task as task

__all__ = ["Sample", "TaskData", "TrainingTask", "build_task", "locate_data", "open_data", "register_task"]

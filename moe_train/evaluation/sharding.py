"""Jobs over processes. Jobs are cut before it is known who does them, so that any number of them gives the same output.

Every process holds the whole model (all experts) and takes the next job that is free; none talks to another.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from moe_train.config import LaunchConfig, SearchConfig
from moe_train.errors import LaunchError, UserError
from moe_train.evaluation.decoding import Job, Outcome, Translator
from moe_train.evaluation.loading import OpenedRun, choose_device, open_run

Progress = Callable[[int], None]


@dataclass(frozen=True)
class _Recipe:
    """What a process needs to build its own translator."""

    run: Path
    checkpoint: Path
    data: str
    search: SearchConfig
    device: str
    threads: int


def decode(
    run: OpenedRun, jobs: Sequence[Job], search: SearchConfig, launch: LaunchConfig, progress: Progress | None = None
) -> list[Outcome]:
    """Does the jobs in ``launch.processes`` processes.

    Args:
        progress: called with the number of sentences of each job done.

    Returns:
        The outcomes, in the order of the jobs.

    Raises:
        LaunchError: a process died, or this is one of several that another launcher has started.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise LaunchError(
            "evaluation starts its own processes and was started by a launcher",
            remedy="run it once, with launch.processes=N",
        )
    if launch.processes == 1 or len(jobs) < 2:
        return _decode_here(run, jobs, search, launch.device, progress)
    return _decode_in_processes(run, jobs, search, launch, progress)


def _decode_here(
    run: OpenedRun, jobs: Sequence[Job], search: SearchConfig, device: str, progress: Progress | None
) -> list[Outcome]:
    place = choose_device(device)
    translator = Translator(run.task, run.load(place).model, search, place)
    outcomes = []
    for job in jobs:
        outcomes.append(translator.run(job))
        if progress:
            progress(len(job.sentences))
    return outcomes


def _decode_in_processes(
    run: OpenedRun, jobs: Sequence[Job], search: SearchConfig, launch: LaunchConfig, progress: Progress | None
) -> list[Outcome]:
    count = min(launch.processes, len(jobs))
    recipe = _Recipe(
        run.folder.path.resolve(), run.checkpoint.resolve(), run.config.data, search, launch.device, _threads(count)
    )
    context = multiprocessing.get_context("spawn")
    inbox, outbox = context.Queue(), context.Queue()
    for item in (*enumerate(jobs), *[None] * count):
        inbox.put(item)
    processes = [context.Process(target=_work, args=(recipe, n, inbox, outbox), daemon=True) for n in range(count)]
    try:
        for process in processes:
            process.start()
        return _collect(jobs, outbox, processes, progress)
    finally:
        inbox.cancel_join_thread()
        for process in processes:
            process.terminate()
            process.join()


def _collect(
    jobs: Sequence[Job], outbox: Any, processes: Sequence[BaseProcess], progress: Progress | None
) -> list[Outcome]:
    outcomes: dict[int, Outcome] = {}
    while len(outcomes) < len(jobs):
        dead = [p for p in processes if p.exitcode not in (None, 0)]
        try:
            index, result = outbox.get(timeout=1.0)
        except queue.Empty:
            if dead:
                raise LaunchError(
                    f"a decoding process died (exit code {dead[0].exitcode})",
                    remedy="if it ran out of memory, lower search.batch_tokens or launch.processes",
                ) from None
            continue
        if isinstance(result, UserError):
            raise result
        if isinstance(result, str):
            raise RuntimeError(f"a decoding process failed:\n{result}")
        outcomes[index] = result
        if progress:
            progress(len(jobs[index].sentences))
    return [outcomes[i] for i in range(len(jobs))]


def _threads(processes: int) -> int:
    """CPU threads for each of the processes of this host."""
    if "OMP_NUM_THREADS" in os.environ:
        return torch.get_num_threads()
    return max(1, len(os.sched_getaffinity(0)) // processes)


def _work(recipe: _Recipe, number: int, inbox: Any, outbox: Any) -> None:
    """A process: takes (index, job) until None, gives (index, outcome); what goes wrong travels as (-1, error)."""
    try:
        torch.set_num_threads(recipe.threads)
        device = choose_device(recipe.device, number)
        run = open_run(recipe.run, recipe.checkpoint, recipe.data)
        translator = Translator(run.task, run.load(device).model, recipe.search, device)
        for index, job in iter(inbox.get, None):
            outbox.put((index, translator.run(job)))
    except UserError as error:
        outbox.put((-1, error))
    except Exception:
        outbox.put((-1, traceback.format_exc()))

"""Jobs over processes. Jobs are cut before it is known who does them, so that any number of them gives the same output.

With ``expert_parallel=1`` every process holds the whole model and takes the next job that is free; none talks to
another. Above that, and under torchrun, the processes are ranks (:mod:`moe_train.evaluation.decode_ep`).
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import secrets
import tempfile
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from moe_train.config import LaunchConfig, SearchConfig
from moe_train.config.evaluation import Inference
from moe_train.errors import LaunchError, UserError
from moe_train.evaluation.decode_ep import decode_in_step, plan_evaluation
from moe_train.evaluation.loading import OpenedRun, choose_device, open_run
from moe_train.evaluation.translator import Job, JobResult, Translator
from moe_train.parallel.isolation import LOOPBACK, SECRET
from moe_train.parallel.layout_plan import LayoutPlan
from moe_train.plugins import import_user_dir
from moe_train.training.runtime.world import World
from moe_train.utils.process import children_uninterrupted, die_with_parent

Progress = Callable[[int], None]


@dataclass(frozen=True)
class _Recipe:
    """What a process needs to build its own translator; ``plan`` where the processes divide the experts.

    ``parent``: the process that has started it, with which it ends. ``secret``: by it the processes know one another.
    """

    parent: int
    run: Path
    checkpoint: Path
    data: str
    inference: Inference
    search: SearchConfig
    device: str
    threads: int
    plan: LayoutPlan | None = None
    secret: str = ""

    def open(self) -> OpenedRun:
        """The run, whose checkpoint has been verified."""
        import_user_dir()
        return open_run(self.run, self.checkpoint, self.data, self.inference)


def decode(
    run: OpenedRun,
    jobs: Sequence[Job],
    search: SearchConfig,
    launch: LaunchConfig,
    progress: Progress | None = None,
    expert_parallel: int = 1,
) -> list[JobResult]:
    """Does the jobs: on the ranks of the default process group where there is one, else in ``launch.processes``
    processes of its own.

    Args:
        progress: called with the number of sentences of each job done.
        expert_parallel: processes over which the experts of a layer are divided.

    Returns:
        The outcomes, in the order of the jobs.

    Raises:
        ConfigError: experts and processes that do not go together.
        LaunchError: a process died, or a launcher has started several that have not joined a process group.
    """
    if dist.is_initialized():
        return _decode_as_rank(run, jobs, search, launch, progress, expert_parallel)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise LaunchError(
            "this is one of several processes that have not joined one another",
            remedy="run it once, with launch.processes=N",
        )
    plan = plan_evaluation(run.config, expert_parallel, launch.processes)
    if plan.expert_parallel == 1 and (launch.processes == 1 or len(jobs) < 2):
        return _decode_here(run, jobs, search, launch.device, progress)
    return _decode_in_processes(run, jobs, search, launch, progress, plan)


def _decode_as_rank(
    run: OpenedRun,
    jobs: Sequence[Job],
    search: SearchConfig,
    launch: LaunchConfig,
    progress: Progress | None,
    expert_parallel: int,
) -> list[JobResult]:
    """Every rank gets all outcomes. ``progress`` hears of this rank's rounds, as if all had done theirs."""
    world = World.current(choose_device(launch.device, World.current().local_rank))
    plan = plan_evaluation(run.config, expert_parallel, world.size, world.local_size)
    done = {}
    for number, outcome in decode_in_step(run, jobs, search, plan, world.device):
        done[number] = outcome
        if progress:
            first = number - world.rank
            progress(sum(len(job.sentences) for job in jobs[first : first + world.size]))
    shares: list[list[Any]] = world.gather([[number, asdict(outcome)] for number, outcome in done.items()])
    everyone = {number: JobResult.from_json(outcome) for share in shares for number, outcome in share}
    return [everyone[number] for number in range(len(jobs))]


def _decode_here(
    run: OpenedRun, jobs: Sequence[Job], search: SearchConfig, device: str, progress: Progress | None
) -> list[JobResult]:
    place = choose_device(device)
    translator = Translator(run.task, run.load(place).model, search, place)
    outcomes = []
    for job in jobs:
        outcomes.append(translator.run(job))
        if progress:
            progress(len(job.sentences))
    return outcomes


def _decode_in_processes(
    run: OpenedRun,
    jobs: Sequence[Job],
    search: SearchConfig,
    launch: LaunchConfig,
    progress: Progress | None,
    plan: LayoutPlan,
) -> list[JobResult]:
    divided = plan.expert_parallel > 1
    count = plan.world if divided else min(launch.processes, len(jobs))
    recipe = _Recipe(
        os.getpid(),
        run.folder.path.resolve(),
        run.checkpoint.resolve(),
        run.config.data,
        run.inference,
        search,
        launch.device,
        _threads(count),
        plan if divided else None,
        secrets.token_hex(32),
    )
    context = multiprocessing.get_context("spawn")
    inbox, outbox = context.Queue(), context.Queue()
    with tempfile.TemporaryDirectory(prefix="moe_evaluate-") as meeting:
        if divided:
            work: Sequence[Any] = [
                context.Process(target=_work_as_rank, args=(recipe, n, jobs, meeting, outbox), daemon=True)
                for n in range(count)
            ]
        else:
            for item in (*enumerate(jobs), *[None] * count):
                inbox.put(item)
            work = [context.Process(target=_work, args=(recipe, n, inbox, outbox), daemon=True) for n in range(count)]
        try:
            with children_uninterrupted():
                for process in work:
                    process.start()
            return _collect(jobs, outbox, work, progress)
        finally:
            inbox.cancel_join_thread()
            for process in work:
                process.terminate()
                process.join()


def _collect(
    jobs: Sequence[Job], outbox: Any, processes: Sequence[BaseProcess], progress: Progress | None
) -> list[JobResult]:
    outcomes: dict[int, JobResult] = {}
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


def _work_as_rank(recipe: _Recipe, rank: int, jobs: Sequence[Job], meeting: str, outbox: Any) -> None:
    """A process that holds a part of the experts: its share of the jobs, in step with the others."""
    die_with_parent(recipe.parent)
    try:
        assert recipe.plan is not None
        torch.set_num_threads(recipe.threads)
        device = choose_device(recipe.device, rank)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        os.environ.update(LOOPBACK | {SECRET: recipe.secret})
        store = f"file://{meeting}/store"
        dist.init_process_group(backend, init_method=store, rank=rank, world_size=recipe.plan.world)
        run = recipe.open()
        for done in decode_in_step(run, jobs, recipe.search, recipe.plan, device):
            outbox.put(done)
        dist.destroy_process_group()
    except UserError as error:
        outbox.put((-1, error))
    except Exception:
        outbox.put((-1, traceback.format_exc()))


def _work(recipe: _Recipe, number: int, inbox: Any, outbox: Any) -> None:
    """A process: takes (index, job) until None, gives (index, outcome); what goes wrong travels as (-1, error)."""
    die_with_parent(recipe.parent)
    try:
        torch.set_num_threads(recipe.threads)
        device = choose_device(recipe.device, number)
        run = recipe.open()
        translator = Translator(run.task, run.load(device).model, recipe.search, device)
        for index, job in iter(inbox.get, None):
            outbox.put((index, translator.run(job)))
    except UserError as error:
        outbox.put((-1, error))
    except Exception:
        outbox.put((-1, traceback.format_exc()))

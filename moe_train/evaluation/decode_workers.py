"""Decodes batches in several processes. Batches and outputs are the same for any number of processes.

With ``expert_parallel=1`` every process holds the whole model and takes the next free batch from a queue, without
communication. Above that, and under torchrun, the processes are ranks (:mod:`moe_train.evaluation.decode_ep`).
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
from moe_train.evaluation.decode_ep import decode_on_rank, plan_evaluation
from moe_train.evaluation.loading import OpenedRun, choose_device, open_run
from moe_train.evaluation.translations import Batch, BatchResult
from moe_train.evaluation.translator import Translator
from moe_train.parallel.isolation import LOOPBACK, SECRET
from moe_train.parallel.layout_plan import LayoutPlan
from moe_train.plugins import import_user_dir
from moe_train.training.runtime.world import World
from moe_train.utils.process import children_uninterrupted, die_with_parent

Progress = Callable[[int], None]


@dataclass(frozen=True)
class _Failure:
    """What a worker puts into the results when it fails: a user's error, or the traceback of another one."""

    error: UserError | str


@dataclass(frozen=True)
class _WorkerArguments:
    """What a process needs to build its translator.

    Attributes:
        parent: pid of the process that started it; when that ends, this one ends too.
        plan: layout of the experts over the processes; None: every process has all of them.
        secret: authenticates the connections between the processes.
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

    def open_run(self) -> OpenedRun:
        """Opens the run (the parent has verified the checkpoint, so it is not read again)."""
        import_user_dir()
        return open_run(self.run, self.checkpoint, self.data, self.inference)


def decode_batches(
    run: OpenedRun,
    batches: Sequence[Batch],
    search: SearchConfig,
    launch: LaunchConfig,
    progress: Progress | None = None,
    expert_parallel: int = 1,
) -> list[BatchResult]:
    """Decodes batches on the ranks of the default process group where there is one, else in ``launch.processes``
    new processes.

    Args:
        progress: called after each batch, with its number of sentences.
        expert_parallel: processes over which the experts of a layer are divided.

    Returns:
        The results, in the order of the batches.

    Raises:
        ConfigError: ``expert_parallel`` does not fit the experts or the processes.
        LaunchError: a process died, or a launcher has started several processes without a process group.
    """
    if dist.is_initialized():
        return _decode_as_rank(run, batches, search, launch, progress, expert_parallel)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise LaunchError(
            "a launcher has started several processes, which have no process group",
            remedy="run one process, with launch.processes=N",
        )
    plan = plan_evaluation(run.config, expert_parallel, launch.processes)
    if plan.expert_parallel == 1 and (launch.processes == 1 or len(batches) < 2):
        return _decode_in_this_process(run, batches, search, launch.device, progress)
    return _decode_in_processes(run, batches, search, launch, progress, plan)


def _decode_as_rank(
    run: OpenedRun,
    batches: Sequence[Batch],
    search: SearchConfig,
    launch: LaunchConfig,
    progress: Progress | None,
    expert_parallel: int,
) -> list[BatchResult]:
    """Every rank gets all results.

    A round is one batch per rank; its sentences are reported when this rank's batch is finished.
    """
    world = World.current(choose_device(launch.device, World.current().local_rank))
    plan = plan_evaluation(run.config, expert_parallel, world.size, world.local_size)
    done = {}
    for index, result in decode_on_rank(run, batches, search, plan, world.device):
        done[index] = result
        if progress:
            first = index - world.rank
            progress(sum(len(batch.sentences) for batch in batches[first : first + world.size]))
    shares: list[list[Any]] = world.gather([[index, asdict(result)] for index, result in done.items()])
    everyone = {index: BatchResult.from_json(result) for share in shares for index, result in share}
    return [everyone[index] for index in range(len(batches))]


def _decode_in_this_process(
    run: OpenedRun, batches: Sequence[Batch], search: SearchConfig, device: str, progress: Progress | None
) -> list[BatchResult]:
    chosen = choose_device(device)
    translator = Translator(run.translating_task, run.load(chosen).model, search, chosen)
    results = []
    for batch in batches:
        results.append(translator.run(batch))
        if progress:
            progress(len(batch.sentences))
    return results


def _decode_in_processes(
    run: OpenedRun,
    batches: Sequence[Batch],
    search: SearchConfig,
    launch: LaunchConfig,
    progress: Progress | None,
    plan: LayoutPlan,
) -> list[BatchResult]:
    experts_divided = plan.expert_parallel > 1
    count = plan.world if experts_divided else min(launch.processes, len(batches))
    arguments = _WorkerArguments(
        parent=os.getpid(),
        run=run.folder.path.resolve(),
        checkpoint=run.checkpoint.resolve(),
        data=run.config.data,
        inference=run.inference,
        search=search,
        device=launch.device,
        threads=_threads(count),
        plan=plan if experts_divided else None,
        secret=secrets.token_hex(32),
    )
    context = multiprocessing.get_context("spawn")
    tasks, results = context.Queue(), context.Queue()
    with tempfile.TemporaryDirectory(prefix="moe_evaluate-") as store_folder:
        if experts_divided:
            workers: Sequence[Any] = [
                context.Process(target=_run_rank, args=(arguments, rank, batches, store_folder, results), daemon=True)
                for rank in range(count)
            ]
        else:
            for task in (*enumerate(batches), *[None] * count):  # None ends a worker
                tasks.put(task)
            workers = [
                context.Process(target=_run_worker, args=(arguments, number, tasks, results), daemon=True)
                for number in range(count)
            ]
        try:
            with children_uninterrupted():
                for worker in workers:
                    worker.start()
            return _collect(batches, results, workers, progress)
        finally:
            tasks.cancel_join_thread()  # after a failure no process takes the rest, and the exit must not wait for it
            for worker in workers:
                worker.terminate()
                worker.join()


def _collect(
    batches: Sequence[Batch], results: Any, workers: Sequence[BaseProcess], progress: Progress | None
) -> list[BatchResult]:
    finished: dict[int, BatchResult] = {}
    while len(finished) < len(batches):
        # Before the queue is read: what a worker put there before it died is taken first.
        dead = [worker for worker in workers if worker.exitcode not in (None, 0)]
        try:
            message = results.get(timeout=1.0)
        except queue.Empty:
            if dead:
                raise LaunchError(
                    f"a decoding process died (exit code {dead[0].exitcode})",
                    remedy="if it ran out of memory, lower search.batch_tokens or launch.processes",
                ) from None
            continue
        if isinstance(message, _Failure):
            if isinstance(message.error, UserError):
                raise message.error
            raise RuntimeError(f"a decoding process failed:\n{message.error}")
        index, result = message
        finished[index] = result
        if progress:
            progress(len(batches[index].sentences))
    return [finished[index] for index in range(len(batches))]


def _threads(processes: int) -> int:
    """CPU threads for each of the processes of this host."""
    if "OMP_NUM_THREADS" in os.environ:
        return torch.get_num_threads()
    return max(1, len(os.sched_getaffinity(0)) // processes)


def _run_rank(
    arguments: _WorkerArguments, rank: int, batches: Sequence[Batch], store_folder: str, results: Any
) -> None:
    """Runs in a process that holds a part of the experts: decodes its batches in step with the other ranks."""
    die_with_parent(arguments.parent)
    try:
        assert arguments.plan is not None
        torch.set_num_threads(arguments.threads)
        device = choose_device(arguments.device, rank)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        os.environ.update(LOOPBACK | {SECRET: arguments.secret})
        store = f"file://{store_folder}/store"
        dist.init_process_group(backend, init_method=store, rank=rank, world_size=arguments.plan.world)
        run = arguments.open_run()
        for index, result in decode_on_rank(run, batches, arguments.search, arguments.plan, device):
            results.put((index, result))
        dist.destroy_process_group()
    except UserError as error:
        results.put(_Failure(error))
    except Exception:
        results.put(_Failure(traceback.format_exc()))


def _run_worker(arguments: _WorkerArguments, number: int, tasks: Any, results: Any) -> None:
    """Runs in a process: takes (index, batch) until None, puts (index, result), or a _Failure."""
    die_with_parent(arguments.parent)
    try:
        torch.set_num_threads(arguments.threads)
        device = choose_device(arguments.device, number)
        run = arguments.open_run()
        translator = Translator(run.translating_task, run.load(device).model, arguments.search, device)
        for index, batch in iter(tasks.get, None):
            results.put((index, translator.run(batch)))
    except UserError as error:
        results.put(_Failure(error))
    except Exception:
        results.put(_Failure(traceback.format_exc()))

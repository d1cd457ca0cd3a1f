"""Decodes batches in several processes. The batches do not depend on the number of processes, nor do the outputs.

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
from moe_train.evaluation.translator import Batch, BatchResult, Translator
from moe_train.parallel.isolation import LOOPBACK, SECRET
from moe_train.parallel.layout_plan import LayoutPlan
from moe_train.plugins import import_user_dir
from moe_train.training.runtime.world import World
from moe_train.utils.process import children_uninterrupted, die_with_parent

Progress = Callable[[int], None]


@dataclass(frozen=True)
class _WorkerArguments:
    """What a process needs to build its translator.

    Attributes:
        parent: pid of the process that has started it, with which it ends.
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

    def open(self) -> OpenedRun:
        """The run, whose checkpoint has been verified."""
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
        progress: called with the number of sentences of each batch done.
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
    """Every rank gets all results. ``progress`` counts a round as done when this rank has done its batch of it."""
    world = World.current(choose_device(launch.device, World.current().local_rank))
    plan = plan_evaluation(run.config, expert_parallel, world.size, world.local_size)
    done = {}
    for number, outcome in decode_on_rank(run, batches, search, plan, world.device):
        done[number] = outcome
        if progress:
            first = number - world.rank
            progress(sum(len(batch.sentences) for batch in batches[first : first + world.size]))
    shares: list[list[Any]] = world.gather([[number, asdict(outcome)] for number, outcome in done.items()])
    everyone = {number: BatchResult.from_json(outcome) for share in shares for number, outcome in share}
    return [everyone[number] for number in range(len(batches))]


def _decode_in_this_process(
    run: OpenedRun, batches: Sequence[Batch], search: SearchConfig, device: str, progress: Progress | None
) -> list[BatchResult]:
    chosen = choose_device(device)
    translator = Translator(run.task, run.load(chosen).model, search, chosen)
    outcomes = []
    for batch in batches:
        outcomes.append(translator.run(batch))
        if progress:
            progress(len(batch.sentences))
    return outcomes


def _decode_in_processes(
    run: OpenedRun,
    batches: Sequence[Batch],
    search: SearchConfig,
    launch: LaunchConfig,
    progress: Progress | None,
    plan: LayoutPlan,
) -> list[BatchResult]:
    divided = plan.expert_parallel > 1
    count = plan.world if divided else min(launch.processes, len(batches))
    arguments = _WorkerArguments(
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
    with tempfile.TemporaryDirectory(prefix="moe_evaluate-") as rendezvous:
        if divided:
            workers: Sequence[Any] = [
                context.Process(target=_run_rank, args=(arguments, n, batches, rendezvous, outbox), daemon=True)
                for n in range(count)
            ]
        else:
            for item in (*enumerate(batches), *[None] * count):
                inbox.put(item)
            workers = [
                context.Process(target=_run_worker, args=(arguments, n, inbox, outbox), daemon=True)
                for n in range(count)
            ]
        try:
            with children_uninterrupted():
                for process in workers:
                    process.start()
            return _collect(batches, outbox, workers, progress)
        finally:
            inbox.cancel_join_thread()
            for process in workers:
                process.terminate()
                process.join()


def _collect(
    batches: Sequence[Batch], outbox: Any, processes: Sequence[BaseProcess], progress: Progress | None
) -> list[BatchResult]:
    outcomes: dict[int, BatchResult] = {}
    while len(outcomes) < len(batches):
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
            progress(len(batches[index].sentences))
    return [outcomes[i] for i in range(len(batches))]


def _threads(processes: int) -> int:
    """CPU threads for each of the processes of this host."""
    if "OMP_NUM_THREADS" in os.environ:
        return torch.get_num_threads()
    return max(1, len(os.sched_getaffinity(0)) // processes)


def _run_rank(arguments: _WorkerArguments, rank: int, batches: Sequence[Batch], rendezvous: str, outbox: Any) -> None:
    """Runs in a process that holds a part of the experts: decodes its batches at the same time as the others."""
    die_with_parent(arguments.parent)
    try:
        assert arguments.plan is not None
        torch.set_num_threads(arguments.threads)
        device = choose_device(arguments.device, rank)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        os.environ.update(LOOPBACK | {SECRET: arguments.secret})
        store = f"file://{rendezvous}/store"
        dist.init_process_group(backend, init_method=store, rank=rank, world_size=arguments.plan.world)
        run = arguments.open()
        for done in decode_on_rank(run, batches, arguments.search, arguments.plan, device):
            outbox.put(done)
        dist.destroy_process_group()
    except UserError as error:
        outbox.put((-1, error))
    except Exception:
        outbox.put((-1, traceback.format_exc()))


def _run_worker(arguments: _WorkerArguments, number: int, inbox: Any, outbox: Any) -> None:
    """Runs in a process: takes (index, batch) until None, returns (index, result), or (-1, error) where it fails."""
    die_with_parent(arguments.parent)
    try:
        torch.set_num_threads(arguments.threads)
        device = choose_device(arguments.device, number)
        run = arguments.open()
        translator = Translator(run.task, run.load(device).model, arguments.search, device)
        for index, batch in iter(inbox.get, None):
            outbox.put((index, translator.run(batch)))
    except UserError as error:
        outbox.put((-1, error))
    except Exception:
        outbox.put((-1, traceback.format_exc()))

"""Joins the process group, sets the device and threads, and opens this rank's log file."""

from __future__ import annotations

import ipaddress
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from moe_train.config import LaunchConfig
from moe_train.console import check_streams
from moe_train.errors import LaunchError, first_line
from moe_train.launch.job.devices import agree_on_devices, device_of_rank
from moe_train.launch.job.env import (
    agent_holds_store,
    has_our_parent,
    job_folder,
    launched_per_host,
    launched_world,
    local_world,
    requested_threads,
    under_agent,
    under_launcher,
)
from moe_train.launch.job.failures import (
    WorkerError,
    connection_failure,
    failure_of,
    is_secondary_error,
    out_of_memory,
    store_failure,
)
from moe_train.launch.job.hard_exit import run_with_timeout
from moe_train.launch.job.job_channel import JobChannel
from moe_train.launch.job.job_store import MessageSigner
from moe_train.launch.rendezvous import fresh_store
from moe_train.launch.watchdog.status import FLIGHT_RECORDER, set_time_limit
from moe_train.launch.watchdog.watchdog import MARGIN, hang_watchdog
from moe_train.parallel.peer_check import check_peers
from moe_train.safe_text import LogFormatter
from moe_train.training.runtime.world import World

_FAILURE_TIMEOUT = 3.0  # seconds that a rank waits for the failure that caused its own error
_MIN_RENDEZVOUS = 120.0  # seconds, at least, for the rendezvous, however short the time limit is
_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def world_size(config: LaunchConfig) -> int:
    """How many processes will train: the launcher's number, or ``launch.processes``."""
    return launched_world() or config.processes


def ranks_per_node(config: LaunchConfig) -> int:
    """How many of them run on each host."""
    return launched_per_host() or world_size(config)


@contextmanager
def joined_world(config: LaunchConfig, threads: int = 0) -> Iterator[World]:
    """Joins the process group that the environment describes, or yields a world of one process if there is no launcher.

    The group is destroyed at exit, except after an error.

    Args:
        threads: CPU threads of this process. 0 means OMP_NUM_THREADS if the user has set it. Otherwise this host's
            cores are divided by its processes.

    Raises:
        LaunchError: the rendezvous failed.
    """
    device = device_of_rank(config)
    before = torch.get_num_threads()
    share = max(1, len(os.sched_getaffinity(0)) // local_world())
    torch.set_num_threads(threads or requested_threads() or share)
    try:
        if not under_launcher():
            yield World.current(device)
            return
        _join(config, device)
        world = World.current(device)
        channel = JobChannel.of(world)
        limit, silence = config.timeout_minutes * 60, config.silent_minutes * 60
        watchdog = hang_watchdog(world, channel, limit=limit, silence=silence) if world.size > 1 else nullcontext()
        with watchdog, _reporting_failure(world, channel):
            yield world
        # Skipped after an error: destroying the group breaks other ranks' connections, and their errors could be
        # shown first.
        dist.destroy_process_group()
    finally:
        torch.set_num_threads(before)


@contextmanager
def _reporting_failure(world: World, channel: JobChannel) -> Iterator[None]:
    """Reports an error raised inside to the other ranks.

    A secondary error (one caused by another rank's failure) is replaced by that failure.
    """
    try:
        yield
    except Exception as error:
        failure = failure_of(world.rank, error)
        if is_secondary_error(error):
            reported = run_with_timeout(2 * _FAILURE_TIMEOUT, lambda: channel.first_failure(_FAILURE_TIMEOUT))
            failure = reported or connection_failure(world.rank, error)
        else:
            run_with_timeout(_FAILURE_TIMEOUT, lambda: channel.report_failure(failure))
        store_failure(failure if failure.rank == world.rank else failure.without_trace(), world.rank)
        if is_secondary_error(error):
            raise WorkerError(failure, None) from error
        raise


def _join(config: LaunchConfig, device: torch.device) -> None:
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    limit = config.timeout_minutes * 60
    os.environ.setdefault(FLIGHT_RECORDER, "256")  # recorded collectives, so that a hung collective can be named
    try:
        timeout = timedelta(seconds=max(limit, _MIN_RENDEZVOUS))
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        signer = MessageSigner.from_environment()
        store = _rendezvous(rank, size, timeout, signer)
        agree_on_devices(store, rank, size, device, signer, timeout.total_seconds())
        gpu = device if device.type == "cuda" else None
        dist.init_process_group(backend, timeout=timeout, device_id=gpu, store=store, rank=rank, world_size=size)
        check_peers()
    except (dist.DistNetworkError, dist.DistStoreError, OSError) as error:
        raise _peers_not_found(error) from error
    except RuntimeError as error:  # from gloo and NCCL
        if out_of_memory(error):
            raise
        if str(error).startswith("Timeout waiting for key"):  # of a FileStore
            raise _peers_not_found(error) from error
        raise LaunchError(
            f"the processes found each other but cannot connect ({first_line(error)})",
            f"GLOO_SOCKET_IFNAME={os.environ.get('GLOO_SOCKET_IFNAME', '')}",
            "name the interface that reaches the other hosts: GLOO_SOCKET_IFNAME, with GPUs NCCL_SOCKET_IFNAME too",
        ) from error
    set_time_limit(known=set(), limit=timedelta(seconds=limit + MARGIN))


def _peers_not_found(error: Exception) -> LaunchError:
    reason = f"the other processes cannot be reached ({first_line(error)})"
    if has_our_parent():
        return LaunchError(reason, str(job_folder()), "look into logs/rank_N.log of the run folder")
    address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    remedy = "check that rank 0 runs, that the port is free and that no firewall is between the hosts"
    return LaunchError(reason, address, remedy)


def _rendezvous(rank: int, size: int, limit: timedelta, signer: MessageSigner) -> dist.Store:
    """The rendezvous store: a file of our own launcher, the store of torchrun's agent, or one that rank 0 opens."""
    if has_our_parent():
        store: dist.Store = dist.FileStore(str(job_folder() / "rendezvous"), size)
    elif under_agent() and agent_holds_store():
        return fresh_store(rank, size, limit, signer)
    elif rank == 0 and not agent_holds_store() and _is_loopback(os.environ["MASTER_ADDR"]):
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        listener = socket.create_server((address, port), family=family)  # torch itself would listen on all interfaces
        store = dist.TCPStore(address, port, size, True, limit, master_listen_fd=listener.detach())
    else:
        store, *_ = next(dist.rendezvous("env://", timeout=limit))
    store.set_timeout(limit)
    return store


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"


@contextmanager
def logging_to(folder: Path, rank: int) -> Iterator[Path]:
    """While entered, log messages of moe_train and Python's warnings go to ``folder/rank_N.log``."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"rank_{rank}.log"
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(LogFormatter(_FORMAT))
    logger = logging.getLogger("moe_train")
    level, propagate = logger.level, logger.propagate
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.addHandler(handler)
    check_streams()  # now that there is a log that a broken stream can be noted in
    try:
        yield path
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate
        handler.close()

"""Finds the ranks that the others wait for, from the status of all ranks, and words the failure."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence

from moe_train.launch.job.failures import Failure
from moe_train.launch.watchdog.status import RankStatus


def silent_ranks(earlier: Mapping[int, RankStatus], later: Mapping[int, RankStatus]) -> list[int]:
    """The ranks that wrote no new status in between, except those whose status another process has overwritten."""
    return [
        rank
        for rank, now in later.items()
        if now.sequence == earlier[rank].sequence and not (now.tampered or earlier[rank].tampered)
    ]


def blocking_ranks(statuses: Mapping[int, RankStatus], silent: Iterable[int]) -> list[int]:
    """The ranks that hang: those that write no status, else those that others wait for and that wait for no rank.

    Empty where no rank is behind: then all compute, or a collective that all have entered does not end.
    """
    if ranks := sorted(silent):
        return ranks
    waited_for = {b for a in statuses for b in statuses if waits(statuses[a], statuses[b])}
    return sorted(b for b in waited_for if not any(waits(statuses[b], statuses[other]) for other in statuses))


def waits(one: RankStatus, other: RankStatus) -> bool:
    """Whether ``one`` has entered a collective that ``other`` has not entered yet."""
    return any(count > other.collective_counts.get(group, count) for group, count in one.collective_counts.items())


def hang_failure(
    statuses: Mapping[int, RankStatus], blocking: Sequence[int], limit: float, state: str, age: float | None = None
) -> Failure:
    """The failure of a job in which ranks hang.

    Args:
        blocking: :func:`blocking_ranks`, not empty.
        limit: seconds; of ``launch.timeout_minutes``.
        state: :func:`process_state` of the first one's process; empty where it runs on another host.
        age: seconds since the first one's last status, where it writes none any more; None where it does.
    """
    first, others = blocking[0], _others(statuses, blocking)
    where = next((statuses[rank].pending for rank in others if statuses[rank].pending), "")
    have = "has" if len(others) == 1 else "have"
    what = f"it hangs{_also(blocking, 'does', 'do')}: {names(others)} {have} waited for it for {limit:.0f} s" + (
        f", in {where}" if where else ""
    )
    remedy = (
        f"See the stack of rank {first}, and look at its host ({_host(statuses[first])}: disk, network file system, "
        f"GPU). If it is only slow, raise launch.timeout_minutes (now {limit / 60:g})."
    )
    return _failure(statuses, blocking, what, remedy, _describe_blocking(statuses[first], state, age))


def silence_failure(
    statuses: Mapping[int, RankStatus], silent: Sequence[int], limit: float, state: str, age: float
) -> Failure:
    """The failure of a job in which ranks wrote no status for ``limit`` seconds, of ``launch.silent_minutes``."""
    first, others = silent[0], _others(statuses, silent)
    have = "has" if len(others) == 1 else "have"
    what = (
        f"it sends no status{_also(silent, 'does', 'do')}: {names(others)} {have} received nothing from it "
        f"for {limit:.0f} s"
    )
    remedy = (
        f"Check that its host ({_host(statuses[first])}) is up and can be reached. If it was only busy, raise "
        f"launch.silent_minutes (now {limit / 60:g})."
    )
    return _failure(statuses, silent, what, remedy, _describe_blocking(statuses[first], state, age))


def _failure(
    statuses: Mapping[int, RankStatus], blocking: Sequence[int], what: str, remedy: str, lines: Sequence[str]
) -> Failure:
    """The failure of the first blocking rank: its lines, then one line for each rank that waited."""
    lines = [*lines, *(_describe_waiting(statuses[rank]) for rank in _others(statuses, blocking))]
    remedy = f"{remedy} The same command resumes from the last checkpoint."
    return Failure(blocking[0], time.time(), what, remedy=remedy, trace="\n".join(lines), beside=list(blocking[1:]))


def _others(statuses: Mapping[int, RankStatus], blocking: Sequence[int]) -> list[int]:
    return sorted(statuses.keys() - set(blocking))


def _also(blocking: Sequence[int], one: str, many: str) -> str:
    """Such as `` (so do ranks 2 and 3)``: the blocking ranks after the first."""
    return f" (so {many if blocking[2:] else one} {names(blocking[1:])})" if blocking[1:] else ""


def _describe_blocking(status: RankStatus, state: str, age: float | None) -> list[str]:
    if status.sequence < 0:
        return [f"rank {status.rank} has sent no status since its start" + (f" ({state})" if state else "")]
    process = f"process {status.pid} on {status.host}" + (f", {state}" if state else "")
    # The last status of a stopped process is up to one interval old: the process may have stopped at a later place.
    last = "" if age is None else f"last status {age:.0f} s ago: "
    idle = f"no progress for {status.seconds_without_progress:.0f} s"
    place = f"{last}update {status.update}, {status.phase}, {idle}, at"
    return [f"rank {status.rank} hangs ({process}): {place}", *(f"    {line}" for line in status.stack)]


def _host(status: RankStatus) -> str:
    return status.host or "unknown"


def _describe_waiting(status: RankStatus) -> str:
    where = f" in {status.pending}" if status.pending else ""
    own = next((line for line in status.stack if "torch/" not in line), "")
    return f"rank {status.rank} waits{where}: update {status.update}, {status.phase}, at {own}"


def names(ranks: Sequence[int]) -> str:
    """``rank 1``, ``ranks 0 and 2``, ``ranks 0, 1 and 3``; at most 7 of more than 8."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    shown = [str(rank) for rank in ranks]
    if len(shown) > 8:
        shown = [*shown[:7], f"{len(ranks) - 7} more"]
    return f"ranks {', '.join(shown[:-1])} and {shown[-1]}"

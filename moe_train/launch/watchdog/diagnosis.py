"""Who keeps the others waiting, judged from what all ranks say of themselves."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence

from moe_train.launch.job.failures import Failure
from moe_train.launch.watchdog.status import RankStatus


def silent_ranks(earlier: Mapping[int, RankStatus], later: Mapping[int, RankStatus]) -> list[int]:
    """The ranks that have said nothing new in between; not those whose words somebody else has altered."""
    return [
        rank
        for rank, now in later.items()
        if now.number == earlier[rank].number and not (now.altered or earlier[rank].altered)
    ]


def blocking_ranks(statuses: Mapping[int, RankStatus], silent: Iterable[int]) -> list[int]:
    """The ranks that hang: those that have fallen silent, else those that others wait for and that wait for nobody.

    Empty where no rank is behind: then all compute, or a collective that all have entered does not end.
    """
    if fallen := sorted(silent):
        return fallen
    waited_for = {b for a in statuses for b in statuses if waits(statuses[a], statuses[b])}
    return sorted(b for b in waited_for if not any(waits(statuses[b], statuses[other]) for other in statuses))


def waits(one: RankStatus, other: RankStatus) -> bool:
    """Whether ``one`` has entered a collective that ``other`` has not come to."""
    return any(count > other.entered.get(group, count) for group, count in one.entered.items())


def failure(
    statuses: Mapping[int, RankStatus], blocking: Sequence[int], limit: float, condition: str, ago: float | None = None
) -> Failure:
    """What the user reads.

    Args:
        guilty: :func:`blocking_ranks`, not empty.
        limit: seconds; of ``launch.timeout_minutes``.
        condition: of the first one's process, as the kernel of its host tells; empty where nobody could look.
        ago: seconds since the first one's last beat, where it says nothing new; None where it still speaks.
    """
    first, others = blocking[0], _others(statuses, blocking)
    where = next((statuses[rank].pending for rank in others if statuses[rank].pending), "")
    have = "has" if len(others) == 1 else "have"
    what = f"it hangs{_so(blocking, 'does', 'do')}: {names(others)} {have} waited for it for {limit:.0f} s" + (
        f", in {where}" if where else ""
    )
    remedy = (
        f"See where rank {first} stood, and look at its host ({_host(statuses[first])}: disk, network file system, "
        f"GPU). If it is only slow, raise launch.timeout_minutes (now {limit / 60:g})."
    )
    return _told(statuses, blocking, what, remedy, _culprit(statuses[first], condition, ago))


def failure_of_silent(
    statuses: Mapping[int, RankStatus], silent: Sequence[int], limit: float, condition: str, ago: float
) -> Failure:
    """What the user reads where ranks said nothing for ``limit`` seconds, of ``launch.silent_minutes``."""
    first, others = silent[0], _others(statuses, silent)
    what = f"it has fallen silent{_so(silent, 'has', 'have')}: {names(others)} heard nothing of it for {limit:.0f} s"
    remedy = (
        f"Look whether its host ({_host(statuses[first])}) is up and can be reached. If it was only busy, raise "
        f"launch.silent_minutes (now {limit / 60:g})."
    )
    return _told(statuses, silent, what, remedy, _culprit(statuses[first], condition, ago))


def _told(
    statuses: Mapping[int, RankStatus], blocking: Sequence[int], what: str, remedy: str, culprit: Sequence[str]
) -> Failure:
    """The first guilty rank's failure, its lines before those of the ranks that waited."""
    lines = [*culprit, *(line for rank in _others(statuses, blocking) for line in _waiting(statuses[rank]))]
    remedy = f"{remedy} The same command goes on from the last checkpoint."
    return Failure(blocking[0], time.time(), what, remedy=remedy, trace="\n".join(lines), beside=list(blocking[1:]))


def _others(statuses: Mapping[int, RankStatus], blocking: Sequence[int]) -> list[int]:
    return sorted(statuses.keys() - set(blocking))


def _so(blocking: Sequence[int], one: str, many: str) -> str:
    """Such as `` (so do ranks 2 and 3)``: who else it is."""
    return f" (so {many if blocking[2:] else one} {names(blocking[1:])})" if blocking[1:] else ""


def _culprit(rank_status: RankStatus, condition: str, ago: float | None) -> list[str]:
    if _unheard(rank_status):
        return [f"rank {rank_status.rank} was never heard" + (f" ({condition})" if condition else "")]
    process = f"process {rank_status.pid} on {rank_status.host}" + (f", {condition}" if condition else "")
    # A rank that is stopped cannot say where: what it said last is of up to a beat before, and may be another place.
    then = "" if ago is None else f"last heard {ago:.0f} s ago, then at "
    place = f"update {rank_status.update}, {rank_status.phase}, still for {rank_status.still:.0f} s, at"
    return [f"rank {rank_status.rank} hangs ({process}): {then}{place}", *(f"    {line}" for line in rank_status.stack)]


def _unheard(rank_status: RankStatus) -> bool:
    return rank_status.number < 0


def _host(rank_status: RankStatus) -> str:
    return "which it never told" if _unheard(rank_status) else rank_status.host


def _waiting(rank_status: RankStatus) -> list[str]:
    where = f" in {rank_status.pending}" if rank_status.pending else ""
    own = next((line for line in rank_status.stack if "torch/" not in line), "")
    return [f"rank {rank_status.rank} waits{where}: update {rank_status.update}, {rank_status.phase}, at {own}"]


def names(ranks: Sequence[int]) -> str:
    """``rank 1``, ``ranks 0 and 2``, ``ranks 0, 1 and 3``; long lists are cut."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    shown = [str(rank) for rank in ranks]
    if len(shown) > 8:
        shown = [*shown[:7], f"{len(ranks) - 7} more"]
    return f"ranks {', '.join(shown[:-1])} and {shown[-1]}"

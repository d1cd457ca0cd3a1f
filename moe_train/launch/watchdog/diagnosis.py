"""Who keeps the others waiting, judged from what all ranks say of themselves."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence

from moe_train.launch.job.failures import Failure
from moe_train.launch.watchdog.status import Beat


def silent_ranks(earlier: Mapping[int, Beat], later: Mapping[int, Beat]) -> list[int]:
    """The ranks that have said nothing new in between; not those whose words somebody else has altered."""
    return [
        rank
        for rank, now in later.items()
        if now.number == earlier[rank].number and not (now.altered or earlier[rank].altered)
    ]


def culprits(beats: Mapping[int, Beat], silent: Iterable[int]) -> list[int]:
    """The ranks that hang: those that have fallen silent, else those that others wait for and that wait for nobody.

    Empty where no rank is behind: then all compute, or a collective that all have entered does not end.
    """
    if fallen := sorted(silent):
        return fallen
    waited_for = {b for a in beats for b in beats if waits(beats[a], beats[b])}
    return sorted(b for b in waited_for if not any(waits(beats[b], beats[other]) for other in beats))


def waits(one: Beat, other: Beat) -> bool:
    """Whether ``one`` has entered a collective that ``other`` has not come to."""
    return any(count > other.entered.get(group, count) for group, count in one.entered.items())


def failure(
    beats: Mapping[int, Beat], guilty: Sequence[int], limit: float, condition: str, ago: float | None = None
) -> Failure:
    """What the user reads.

    Args:
        guilty: :func:`culprits`, not empty.
        limit: seconds; of ``launch.timeout_minutes``.
        condition: of the first one's process, as the kernel of its host tells; empty where nobody could look.
        ago: seconds since the first one's last beat, where it says nothing new; None where it still speaks.
    """
    first, others = guilty[0], _others(beats, guilty)
    where = next((beats[rank].pending for rank in others if beats[rank].pending), "")
    have = "has" if len(others) == 1 else "have"
    what = f"it hangs{_so(guilty, 'does', 'do')}: {names(others)} {have} waited for it for {limit:.0f} s" + (
        f", in {where}" if where else ""
    )
    remedy = (
        f"See where rank {first} stood, and look at its host ({_host(beats[first])}: disk, network file system, GPU). "
        f"If it is only slow, raise launch.timeout_minutes (now {limit / 60:g})."
    )
    return _told(beats, guilty, what, remedy, _culprit(beats[first], condition, ago))


def failure_of_silent(
    beats: Mapping[int, Beat], silent: Sequence[int], limit: float, condition: str, ago: float
) -> Failure:
    """What the user reads where ranks said nothing for ``limit`` seconds, of ``launch.silent_minutes``."""
    first, others = silent[0], _others(beats, silent)
    what = f"it has fallen silent{_so(silent, 'has', 'have')}: {names(others)} heard nothing of it for {limit:.0f} s"
    remedy = (
        f"Look whether its host ({_host(beats[first])}) is up and can be reached. If it was only busy, raise "
        f"launch.silent_minutes (now {limit / 60:g})."
    )
    return _told(beats, silent, what, remedy, _culprit(beats[first], condition, ago))


def _told(beats: Mapping[int, Beat], guilty: Sequence[int], what: str, remedy: str, culprit: Sequence[str]) -> Failure:
    """The first guilty rank's failure, its lines before those of the ranks that waited."""
    lines = [*culprit, *(line for rank in _others(beats, guilty) for line in _waiting(beats[rank]))]
    remedy = f"{remedy} The same command goes on from the last checkpoint."
    return Failure(guilty[0], time.time(), what, remedy=remedy, trace="\n".join(lines), beside=list(guilty[1:]))


def _others(beats: Mapping[int, Beat], guilty: Sequence[int]) -> list[int]:
    return sorted(beats.keys() - set(guilty))


def _so(guilty: Sequence[int], one: str, many: str) -> str:
    """Such as `` (so do ranks 2 and 3)``: who else it is."""
    return f" (so {many if guilty[2:] else one} {names(guilty[1:])})" if guilty[1:] else ""


def _culprit(beat: Beat, condition: str, ago: float | None) -> list[str]:
    if _unheard(beat):
        return [f"rank {beat.rank} was never heard" + (f" ({condition})" if condition else "")]
    process = f"process {beat.pid} on {beat.host}" + (f", {condition}" if condition else "")
    # A rank that is stopped cannot say where: what it said last is of up to a beat before, and may be another place.
    then = "" if ago is None else f"last heard {ago:.0f} s ago, then at "
    place = f"update {beat.update}, {beat.phase}, still for {beat.still:.0f} s, at"
    return [f"rank {beat.rank} hangs ({process}): {then}{place}", *(f"    {line}" for line in beat.stack)]


def _unheard(beat: Beat) -> bool:
    return beat.number < 0


def _host(beat: Beat) -> str:
    return "which it never told" if _unheard(beat) else beat.host


def _waiting(beat: Beat) -> list[str]:
    where = f" in {beat.pending}" if beat.pending else ""
    own = next((line for line in beat.stack if "torch/" not in line), "")
    return [f"rank {beat.rank} waits{where}: update {beat.update}, {beat.phase}, at {own}"]


def names(ranks: Sequence[int]) -> str:
    """``rank 1``, ``ranks 0 and 2``, ``ranks 0, 1 and 3``; long lists are cut."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    shown = [str(rank) for rank in ranks]
    if len(shown) > 8:
        shown = [*shown[:7], f"{len(ranks) - 7} more"]
    return f"ranks {', '.join(shown[:-1])} and {shown[-1]}"

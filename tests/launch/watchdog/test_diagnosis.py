"""Who keeps the others waiting, for any order of collectives over any groups."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

from hypothesis import given
from hypothesis import strategies as st

from moe_train.launch.watchdog.diagnosis import blocking_ranks, hang_failure, names, silence_failure
from moe_train.launch.watchdog.status import RankStatus, thread_stacks

WORLD = 4
GROUPS = st.sets(st.integers(0, WORLD - 1), min_size=2).map(lambda members: tuple(sorted(members)))


def stand_still(program: list[tuple[int, ...]], hanging: int, at: int) -> tuple[dict[int, RankStatus], set[int]]:
    """Runs a program of collectives, each of a group, until nobody gets on: ``hanging`` stops before number ``at``.

    Returns:
        What each says of itself, and who waits in a collective.
    """
    place = dict.fromkeys(range(WORLD), 0)
    entered: dict[int, dict[str, int]] = {rank: {} for rank in place}

    def standing(rank: int) -> int | None:
        """The collective that a rank stands in or comes to next."""
        numbers = range(place[rank], len(program))
        return next((n for n in numbers if rank in program[n] and (rank != hanging or n < at)), None)

    inside: dict[int, int] = {}
    moved = True
    while moved:
        moved = False
        for rank in place:
            number = standing(rank)
            if number is not None and rank not in inside:
                inside[rank] = number
                group = str(program[number])
                entered[rank][group] = entered[rank].get(group, 0) + 1
                moved = True
        for number in set(inside.values()):
            if all(inside.get(rank) == number for rank in program[number]):
                for rank in program[number]:
                    del inside[rank]
                    place[rank] = number + 1
    groups = {str(group): group for group in program}
    statuses = {}
    for rank, own in entered.items():
        counts = {name: own.get(name, 0) for name, members in groups.items() if rank in members}
        statuses[rank] = RankStatus(rank, 5, 9.0, 1, "computing", counts)
    return statuses, set(inside)


@given(st.lists(GROUPS, min_size=1, max_size=12), st.integers(0, WORLD - 1), st.data())
def test_whoever_others_wait_for_is_found(program: list[tuple[int, ...]], hanging: int, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(program) - 1))
    statuses, waiting = stand_still(program, hanging, at)
    assert blocking_ranks(statuses, []) == ([hanging] if waiting else [])


def test_the_silent_come_first() -> None:
    statuses = {rank: RankStatus(rank, 1, 9.0, 1, "computing", {"0": 3 - (rank == 1)}) for rank in range(3)}
    assert blocking_ranks(statuses, []) == [1]
    assert blocking_ranks(statuses, [2]) == [2]


def test_what_the_user_reads() -> None:
    stack = ["a.py:7 in read", "b.py:1 in main"]
    statuses = {
        0: RankStatus(
            0, 9, 61.0, 7, "computing the update", {"0": 5}, "all_reduce 5 of group 0", ["torch/x.py:1 in wait", *stack]
        ),
        1: RankStatus(1, 9, 61.0, 7, "reading samples", {"0": 4}, stack=stack, host="node7", pid=12),
    }
    found = hang_failure(statuses, [1], 60.0, "stopped by a signal (SIGSTOP)")
    text = found.text()
    assert found.rank == 1 and not found.user
    assert text.startswith(
        "rank 1 failed first: it hangs: rank 0 has waited for it for 60 s, in all_reduce 5 of group 0."
    )
    assert (
        "(process 12 on node7, stopped by a signal (SIGSTOP)): update 7, reading samples, no progress for 61 s" in text
    )
    assert "    a.py:7 in read\n    b.py:1 in main" in text
    assert "rank 0 waits in all_reduce 5 of group 0: update 7, computing the update, at a.py:7 in read" in text
    assert text.splitlines()[-1].startswith("What to do: See the stack of rank 1") and "(now 1)" in text
    silent = hang_failure(statuses, [1], 60.0, "gone", 17.2).text()
    assert "(process 12 on node7, gone): last status 17 s ago: update 7, reading samples, no progress for" in silent
    several = hang_failure({**statuses, 2: statuses[1], 3: statuses[1]}, [1, 2, 3], 60.0, "")
    assert several.beside == [2, 3] and "it hangs (so do ranks 2 and 3): rank 0 has waited" in several.text()


def test_a_rank_that_was_never_heard() -> None:
    statuses = {
        0: RankStatus(0, 9, 61.0, 0, "getting ready", {"0": 1}, "all_reduce 1"),
        1: RankStatus(1, -1, 0.0, 0, "getting ready"),
    }
    text = hang_failure(statuses, [1], 60.0, "silent: it is stuck", 1.8e9).text()
    assert "rank 1 has sent no status since its start (silent: it is stuck)\nrank 0 waits" in text
    assert "process 0" not in text and "host (:" not in text
    assert "its host (unknown) is up" in silence_failure(statuses, [1], 60.0, "", 1.8e9).text()


def test_names_of_ranks() -> None:
    assert [names([3]), names([0, 2]), names([0, 1, 3])] == ["rank 3", "ranks 0 and 2", "ranks 0, 1 and 3"]
    assert names(range(100)) == "ranks 0, 1, 2, 3, 4, 5, 6 and 93 more"


def test_other_threads_are_shown_where_they_do_something() -> None:
    """A rank may wait for a thread of its own that reads samples: the cause stands in that one."""
    entered, leave = threading.Event(), threading.Event()

    def read_samples() -> None:
        entered.set()
        while not leave.is_set():
            time.sleep(0.01)

    idle = ThreadPoolExecutor(1, thread_name_prefix="idle")
    idle.submit(int).result()
    thread = threading.Thread(target=read_samples, name="loader")
    thread.start()
    entered.wait()
    shown = thread_stacks()
    leave.set()
    thread.join()
    idle.shutdown()
    assert any("in test_other_threads" in line for line in shown[:3])
    place = shown.index("in thread loader:")
    assert "in read_samples" in shown[place + 1] and not any("idle" in line for line in shown)

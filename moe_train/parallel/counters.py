"""What crosses between ranks: rows, payload bytes and metadata bytes, by link. An object that is passed in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Literal

Link = Literal["local", "node", "across"]
"""``local``: stays in the process; ``node``: to another rank of the node; ``across``: to another node."""

LINKS: tuple[Link, ...] = ("local", "node", "across")


@dataclass
class Traffic:
    """What one rank has sent over one kind of link.

    Attributes:
        dispatched_rows: token rows on their way to experts, forward.
        returned_rows: mixed rows on their way back, forward.
        payload_bytes: those rows, and their gradients in backward.
        metadata_bytes: counts, row numbers, expert numbers and weights, and the weights' gradients.
    """

    dispatched_rows: int = 0
    returned_rows: int = 0
    payload_bytes: int = 0
    metadata_bytes: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})


@dataclass
class TrafficCounters:
    """Sums of a rank since they were last cleared. Sum them over ranks for the world's traffic."""

    by_link: dict[Link, Traffic] = field(default_factory=lambda: {link: Traffic() for link in LINKS})
    enabled: bool = True

    @classmethod
    def of_numbers(cls, numbers: Sequence[float]) -> TrafficCounters:
        """The inverse of :meth:`numbers`."""
        names = [f.name for f in fields(Traffic)]
        parts = [numbers[i * len(names) : (i + 1) * len(names)] for i in range(len(LINKS))]
        named = [dict(zip(names, map(int, part), strict=True)) for part in parts]
        return cls({link: Traffic(**values) for link, values in zip(LINKS, named, strict=True)})

    def numbers(self) -> list[int]:
        """All counts in a fixed order, for a reduction over ranks."""
        return [value for link in LINKS for value in vars(self.by_link[link]).values()]

    def take(self) -> list[int]:
        """:meth:`numbers`, and back to nothing."""
        numbers = self.numbers()
        self.clear()
        return numbers

    def __add__(self, other: TrafficCounters) -> TrafficCounters:
        return TrafficCounters({link: self.by_link[link] + other.by_link[link] for link in LINKS})

    @property
    def counted(self) -> bool:
        """Whether there is anything."""
        return any(self.numbers())

    def clear(self) -> None:
        """Back to nothing."""
        self.by_link.update({link: Traffic() for link in LINKS})

    def add(self, links: Sequence[Link], **amounts: Sequence[int]) -> None:
        """Adds amounts per member of a group, whose links are given in the same order."""
        if not self.enabled:
            return
        for name, values in amounts.items():
            for link, value in zip(links, values, strict=True):
                setattr(self.by_link[link], name, getattr(self.by_link[link], name) + int(value))

    @property
    def sent(self) -> Traffic:
        """What left the process: in the node and across nodes."""
        return self.by_link["node"] + self.by_link["across"]

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Counts nothing inside (validation, warm-up)."""
        before, self.enabled = self.enabled, False
        try:
            yield
        finally:
            self.enabled = before

    def as_dict(self) -> dict[str, dict[str, int]]:
        """For the log: link → name → number."""
        return {link: dict(vars(traffic)) for link, traffic in self.by_link.items()}

"""Counts what ranks send to each other: rows, payload bytes and metadata bytes, by type of link."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Literal

from torch import Tensor

LinkType = Literal["local", "node", "across"]
"""``local``: stays in the process; ``node``: to another rank of the node; ``across``: to another node."""

LINKS: tuple[LinkType, ...] = ("local", "node", "across")


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
    """Sums of a rank since they were last cleared. Sum them over ranks for the world's traffic.

    Attributes:
        enabled: whether traffic is counted just now.
        host_reads: how often a layer has waited for numbers of the device since the counters were made.
    """

    by_link: dict[LinkType, Traffic] = field(default_factory=lambda: {link: Traffic() for link in LINKS})
    enabled: bool = True
    host_reads: int = 0
    _dropped: Tensor | int = 0

    @classmethod
    def of_numbers(cls, numbers: Sequence[float]) -> TrafficCounters:
        """The inverse of :meth:`numbers`."""
        names = [f.name for f in fields(Traffic)]
        parts = [numbers[i * len(names) : (i + 1) * len(names)] for i in range(len(LINKS))]
        named = [dict(zip(names, map(int, part), strict=True)) for part in parts]
        dropped = numbers[len(names) * len(LINKS) :]
        by_link = {link: Traffic(**values) for link, values in zip(LINKS, named, strict=True)}
        return cls(by_link, _dropped=int(sum(dropped)))

    def numbers(self) -> list[int]:
        """All counts in a fixed order, for a reduction over ranks."""
        return [*(value for link in LINKS for value in vars(self.by_link[link]).values()), self.dropped]

    def take(self) -> list[int]:
        """:meth:`numbers`, and back to nothing."""
        numbers = self.numbers()
        self.clear()
        return numbers

    def __add__(self, other: TrafficCounters) -> TrafficCounters:
        by_link = {link: self.by_link[link] + other.by_link[link] for link in LINKS}
        return TrafficCounters(by_link, _dropped=self.dropped + other.dropped)

    @property
    def counted(self) -> bool:
        """Whether there is anything."""
        return any(self.numbers())

    def clear(self) -> None:
        """Back to nothing."""
        self._dropped = 0
        self.by_link.update({link: Traffic() for link in LINKS})

    def add(self, links: Sequence[LinkType], **amounts: Sequence[int]) -> None:
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

    def read(self, values: Tensor) -> list[int]:
        """Brings a vector to the host: the one place where a layer of experts does."""
        self.host_reads += 1
        return [int(value) for value in values.tolist()]

    def add_dropped(self, pairs: Tensor) -> None:
        """Adds pairs (0-dim, on the device) that an exchange of fixed size had no room for."""
        if self.enabled:
            self._dropped = self._dropped + pairs

    @property
    def dropped(self) -> int:
        """Pairs that exchanges of fixed size had no room for, since the counters were last cleared; asks the device."""
        return int(self._dropped)

    def as_dict(self) -> dict[str, dict[str, int]]:
        """For the log: link → name → number."""
        return {link: dict(vars(traffic)) for link, traffic in self.by_link.items()}

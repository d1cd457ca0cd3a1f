"""Traffic counters: rows, payload bytes and metadata bytes sent, by type of link."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Literal

import torch
from torch import Tensor

LinkType = Literal["local", "node", "across"]
"""``local``: within the process; ``node``: to another rank of the node; ``across``: to another node."""

LINKS: tuple[LinkType, ...] = ("local", "node", "across")


@dataclass
class Traffic:
    """Traffic that one rank has sent over one type of link.

    Attributes:
        dispatched_rows: token rows sent to experts, forward.
        returned_rows: output rows sent back, forward.
        payload_bytes: bytes of those rows, and of their gradients in backward.
        metadata_bytes: bytes of sizes, row ids, expert ids and weights, and of the weights' gradients.
    """

    dispatched_rows: int = 0
    returned_rows: int = 0
    payload_bytes: int = 0
    metadata_bytes: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})


@dataclass
class TrafficCounters:
    """Sums of one rank since the last :meth:`clear`. Their sum over ranks is the traffic of the world.

    Attributes:
        enabled: whether traffic is counted at present.
        host_reads: number of host syncs of the layers since the counters were created.
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
        return [*self._sent(), self.dropped]

    def _sent(self) -> list[int]:
        return [value for link in LINKS for value in vars(self.by_link[link]).values()]

    def take(self, device: torch.device) -> Tensor:
        """Returns :meth:`numbers` as fp64 on ``device``, without waiting for it, and clears the counters."""
        sent = on_device(self._sent(), device)
        dropped = sent.new_zeros(1) + self._dropped
        self.clear()
        return torch.cat((sent, dropped))

    def __add__(self, other: TrafficCounters) -> TrafficCounters:
        by_link = {link: self.by_link[link] + other.by_link[link] for link in LINKS}
        return TrafficCounters(by_link, _dropped=self.dropped + other.dropped)

    @property
    def counted(self) -> bool:
        """Whether any count is not zero."""
        return any(self.numbers())

    def clear(self) -> None:
        """Sets all counts to zero."""
        self._dropped = 0
        self.by_link.update({link: Traffic() for link in LINKS})

    def add(self, links: Sequence[LinkType], **amounts: Sequence[int]) -> None:
        """Adds amounts per member of a group; ``links`` gives the link to each member, in the same order."""
        if not self.enabled:
            return
        for name, values in amounts.items():
            for link, value in zip(links, values, strict=True):
                setattr(self.by_link[link], name, getattr(self.by_link[link], name) + int(value))

    @property
    def sent(self) -> Traffic:
        """Traffic that left the process: ``node`` plus ``across``."""
        return self.by_link["node"] + self.by_link["across"]

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Context in which nothing is counted (validation, warm-up)."""
        before, self.enabled = self.enabled, False
        try:
            yield
        finally:
            self.enabled = before

    def read(self, values: Tensor) -> list[int]:
        """Copies a vector to the host; the only place where an expert layer does."""
        self.host_reads += 1
        return [int(value) for value in values.tolist()]

    def add_dropped(self, pairs: Tensor) -> None:
        """Adds the pairs (0-dim, on the device) that a fixed-size dispatch has dropped."""
        if self.enabled:
            self._dropped = self._dropped + pairs

    @property
    def dropped(self) -> int:
        """Pairs dropped by fixed-size dispatches since the last :meth:`clear`; waits for the device."""
        return int(self._dropped)

    def as_dict(self) -> dict[str, dict[str, int]]:
        """For the log: link → name → count."""
        return {link: dict(vars(traffic)) for link, traffic in self.by_link.items()}


def on_device(numbers: Sequence[float], device: torch.device) -> Tensor:
    """Numbers of the host as fp64 [N] on ``device``, without waiting for it."""
    return torch.frombuffer(array("d", numbers), dtype=torch.float64).to(device, non_blocking=True)

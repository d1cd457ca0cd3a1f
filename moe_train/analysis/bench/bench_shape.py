"""Sizes of the benchmark of a sparse layer."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BenchShape:
    """Sizes of a layer and its batch."""

    tokens: int
    dim: int
    hidden: int
    num_experts: int
    top_k: int

    @classmethod
    def parse(cls, text: str) -> BenchShape:
        """Parses ``tokens,dim,hidden,experts,k``.

        Raises:
            ValueError: not five whole numbers.
        """
        return cls(*(int(part) for part in text.split(",")))

    def __str__(self) -> str:
        return f"{self.tokens} x {self.dim}, {self.num_experts} of {self.hidden}, k={self.top_k}"


SHAPES = (BenchShape(4096, 512, 1024, 64, 2), BenchShape(2048, 256, 1024, 32, 2), BenchShape(4096, 512, 2048, 8, 2))

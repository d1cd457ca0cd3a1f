"""Sentences that an evaluation prints: source, reference and translation."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.text import Text


@dataclass(frozen=True)
class Example:
    """One line of a direction, with its reference and the model's translation."""

    direction: str
    source: str
    reference: str
    translation: str

    def to_json(self) -> dict[str, str]:
        """The fields by name."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Example:
        """The inverse of :meth:`to_json`.

        Raises:
            KeyError, TypeError: a field is missing, or is not a string.
        """
        texts = [content[name] for name in ("direction", "source", "reference", "translation")]
        if not all(isinstance(text, str) for text in texts):
            raise TypeError("an example has a field that is not a string")
        return cls(*texts)


Lines = tuple[Sequence[str], Sequence[str], Sequence[str]]  # sources, references, translations


def draw_examples(lines: Mapping[str, Lines], count: int, seed: int) -> list[Example]:
    """Draws lines at random, never by their scores: from as many directions as possible, each line once.

    Args:
        lines: direction → its lines.
        count: how many; fewer where there are fewer lines.
        seed: the same seed gives the same lines.
    """
    draw = random.Random(seed)
    left = {name: draw.sample(range(len(found[0])), len(found[0])) for name, found in lines.items()}
    drawn: list[Example] = []
    while len(drawn) < count and any(left.values()):
        names = [name for name in left if left[name]]
        for name in draw.sample(names, min(len(names), count - len(drawn))):
            line = left[name].pop()
            drawn.append(Example(name, *(texts[line] for texts in lines[name])))
    return sorted(drawn, key=lambda example: example.direction)


def example_text(examples: Sequence[Example]) -> Text:
    """Four lines an example: direction, source, reference, translation."""
    blocks = [
        f"{example.direction}\n  source       {example.source}\n  reference    {example.reference}\n"
        f"  translation  {example.translation}"
        for example in examples
    ]
    return Text("\n".join(blocks))

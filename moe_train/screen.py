"""The console of all commands: what it prints is text, unless it says itself that it is markup."""

from __future__ import annotations

from collections.abc import Iterable
from typing import IO, Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from moe_train.console import ConsoleStream, StyledStream
from moe_train.safe_text import for_terminal


class Screen(Console):
    """A console of rich's that shows control characters in what is printed, in tables too, and sends them nowhere.

    Strings are no markup (``print(…, markup=True)`` makes them so), and ``:bug:`` is no picture.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"markup": False, "emoji": False, **options})

    @property
    def file(self) -> IO[str]:
        """Where it writes; control characters from here are meant."""
        stream = Console.file.fget(self)  # type: ignore[attr-defined]
        return StyledStream(stream) if isinstance(stream, ConsoleStream) else stream  # type: ignore[return-value]

    @file.setter
    def file(self, stream: IO[str]) -> None:
        Console.file.fset(self, stream)  # type: ignore[attr-defined]

    def render_str(self, text: str, **options: Any) -> Text:
        """Strings, before their width is measured."""
        return super().render_str(for_terminal(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """What rich makes of all else; its own sequences for colours and the cursor are added later."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(for_terminal(segment.text), segment.style)

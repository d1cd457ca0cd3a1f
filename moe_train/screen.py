"""The rich console of all commands; strings are plain text unless printed with ``markup=True``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import IO, Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from moe_train.console import ConsoleStream, StyledStream
from moe_train.safe_text import for_terminal


class Screen(Console):
    """A rich console that shows control characters as symbols instead of sending them to the terminal, in tables too.

    Markup (except with ``print(…, markup=True)``) and emoji codes such as ``:bug:`` are not interpreted.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"markup": False, "emoji": False, **options})

    @property
    def file(self) -> IO[str]:
        """The output stream, on which rich's own control characters are not escaped."""
        stream = Console.file.fget(self)  # type: ignore[attr-defined]
        return StyledStream(stream) if isinstance(stream, ConsoleStream) else stream  # type: ignore[return-value]

    @file.setter
    def file(self, stream: IO[str]) -> None:
        Console.file.fset(self, stream)  # type: ignore[attr-defined]

    def render_str(self, text: str, **options: Any) -> Text:
        """Escapes strings before their width is measured."""
        return super().render_str(for_terminal(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Escapes all other renderables; rich adds its sequences for colours and the cursor later."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(for_terminal(segment.text), segment.style)

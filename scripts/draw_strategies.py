"""Draws the schematics of docs/strategies.md: one per strategy, tokens on the left and experts on the right.

python scripts/draw_strategies.py [FOLDER]        # default: docs/figures
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.patches import Circle, FancyBboxPatch, Rectangle

STYLE = {"svg.hashsalt": "moe_train", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 8}
TOKENS = ("the", "dogs", "bark", ".")
COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44")
GREY = "#888888"


@dataclass(frozen=True)
class Edge:
    """An edge from a token (or slot) to an expert; its line width is the weight."""

    token: int
    expert: int
    weight: float = 1.0
    dashed: bool = False


@dataclass(frozen=True)
class Figure:
    """One picture.

    Attributes:
        edges: from tokens to experts.
        boxes: groups of experts, as (first, last, label).
        left, right: names of the tokens and of the experts.
        note: one line below.
    """

    edges: Sequence[Edge]
    note: str
    boxes: Sequence[tuple[int, int, str]] = ()
    left: Sequence[str] = TOKENS
    right: Sequence[str] = ("E1", "E2", "E3", "E4")


def edges(*pairs: tuple[int, int] | tuple[int, int, float]) -> tuple[Edge, ...]:
    """Edges from (token, expert) or (token, expert, weight)."""
    return tuple(Edge(pair[0], pair[1], *pair[2:]) for pair in pairs)


def all_edges(weights: Iterable[Iterable[float]]) -> tuple[Edge, ...]:
    """An edge from every token to every expert, weights row by row."""
    return tuple(Edge(t, e, w) for t, row in enumerate(weights) for e, w in enumerate(row))


FIGURES = {
    "dense": Figure(edges((0, 0), (1, 0), (2, 0), (3, 0)), "one feed-forward for every token", right=("FFN",)),
    "switch": Figure(
        edges((0, 1, 0.8), (1, 2, 0.6), (2, 2, 0.5), (3, 0, 0.9)), "the expert of highest probability, weighted by it"
    ),
    "top_k": Figure(
        edges((0, 1, 0.7), (0, 0, 0.3), (1, 2, 0.6), (1, 3, 0.4), (2, 2, 0.5), (2, 1, 0.5), (3, 0, 0.8), (3, 3, 0.2)),
        "the k best experts, weights over their sum (k = 2)",
    ),
    "expert_choice": Figure(
        edges((1, 0, 0.5), (2, 0, 0.7), (1, 1, 0.8), (3, 1, 0.3), (1, 2, 0.6), (2, 2, 0.4), (2, 3, 0.6), (3, 3, 0.5)),
        "every expert takes its C best tokens; “the” is taken by none",
    ),
    "hash": Figure(edges((0, 1), (1, 3), (2, 0), (3, 2)), "a fixed table of the vocabulary: “the” always goes to E2"),
    "random": Figure(
        tuple(Edge(t, e, dashed=True) for t, e in ((0, 2), (1, 0), (2, 2), (3, 1))), "a counted draw per token"
    ),
    "thor": Figure(
        tuple(Edge(t, 0) for t in range(4)) + tuple(Edge(t, 2, dashed=True) for t in range(4)),
        "first pass (solid) and second pass (dashed), made to agree",
    ),
    "smoe": Figure(
        (*edges((0, 2), (1, 0), (2, 1), (3, 3)), Edge(1, 3, dashed=True), Edge(2, 2, dashed=True)),
        "first choices; from stratum 1 tokens continue at stratum 2 (dashed)",
        boxes=((0, 1, "stratum 1"), (2, 3, "stratum 2")),
    ),
    "xmoe": Figure(
        edges((0, 1, 0.8), (1, 2, 0.6), (2, 2, 0.5), (3, 0, 0.9)),
        "the nearest expert by angle, in a few dimensions",
        left=tuple(f"W·{token}" for token in TOKENS),
        right=("e1", "e2", "e3", "e4"),
        boxes=((0, 3, "on a unit sphere"),),
    ),
    "sam": Figure(
        edges((0, 0, 0.5), (0, 1, 0.3), (1, 2, 0.4), (1, 3, 0.5), (2, 2, 0.6), (2, 3, 0.3), (3, 0, 0.4), (3, 1, 0.5)),
        "one group by the switch, k experts inside it by the mixture",
        boxes=((0, 1, "group 1"), (2, 3, "group 2")),
    ),
    "soft_moe": Figure(
        all_edges([[0.5, 0.1, 0.2, 0.1], [0.2, 0.7, 0.1, 0.3], [0.2, 0.1, 0.6, 0.2], [0.1, 0.1, 0.1, 0.4]]),
        "every slot is a weighted mean of the sentence's tokens",
        right=("slot 1 → E1", "slot 2 → E2", "slot 3 → E3", "slot 4 → E4"),
    ),
}


def height(index: int, count: int) -> float:
    """The y coordinate of one of ``count`` evenly spaced items, from top to bottom."""
    return 3.0 - 3.0 * (index + 0.5) / count


def draw(axes: Axes, figure: Figure) -> None:
    """Draws tokens, experts, groups of experts, and edges."""
    axes.set(xlim=(-1.0, 5.0), ylim=(-0.55, 3.15), aspect="equal")
    axes.axis("off")
    for first, last, label in figure.boxes:
        top, bottom = height(first, len(figure.right)) + 0.33, height(last, len(figure.right)) - 0.33
        axes.add_patch(Rectangle((3.15, bottom), 1.0, top - bottom, fill=False, ls=":", ec=GREY))
        axes.text(4.22, (top + bottom) / 2, label, rotation=270, va="center", color=GREY)
    for edge in figure.edges:
        ends = height(edge.token, len(figure.left)), height(edge.expert, len(figure.right))
        style = "--" if edge.dashed else "-"
        axes.plot((0.3, 3.25), ends, style, color=COLOURS[edge.token], lw=0.3 + 2.2 * edge.weight, alpha=0.8)
    for index, name in enumerate(figure.left):
        axes.add_patch(Circle((0.2, height(index, len(figure.left))), 0.12, color=COLOURS[index], zorder=3))
        axes.text(-0.05, height(index, len(figure.left)), name, ha="right", va="center")
    wide = max(len(name) for name in figure.right) > 3
    for index, name in enumerate(figure.right):
        y = height(index, len(figure.right))
        shape = FancyBboxPatch((3.3, y - 0.16), 1.5 if wide else 0.7, 0.32, boxstyle="round,pad=0.04", fc="#eeeeee")
        axes.add_patch(shape)
        axes.text(4.05 if wide else 3.65, y, name, ha="center", va="center")
    axes.text(2.0, -0.4, figure.note, ha="center", style="italic")


def main(folder: Path) -> None:
    """Writes FOLDER/<strategy>.svg for all strategies."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in FIGURES.items():
        with matplotlib.rc_context(STYLE):
            canvas = Canvas(figsize=(4.2, 2.6))
            draw(canvas.subplots(), figure)
            canvas.savefig(folder / f"{name}.svg", metadata={"Date": None}, bbox_inches="tight")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1] / "docs" / "figures")

"""Draws curves of a run as SVG with matplotlib (extra ``report``): losses, speed, load per expert."""

from __future__ import annotations

import io
import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from moe_train.errors import MissingDependency
from moe_train.safe_text import for_terminal

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Lines = Sequence[Mapping[str, Any]]
_SIZE = (7.0, 2.8)


def loss_curves(train: Lines, valid: Lines) -> str:
    """Training and validation loss per token over updates; "" without data."""
    figure, axes = _figure()
    drawn = [
        _plot(axes, train, "nll_loss", "training", alpha=0.7),
        _plot(axes, valid, "nll_loss", "validation", marker="o", markersize=3),
    ]
    axes.set_ylabel("nats per token")
    return _svg(figure, "loss", legend=True) if any(drawn) else ""


def auxiliary_curves(train: Lines) -> str:
    """Auxiliary losses of routers over updates."""
    figure, axes = _figure()
    names = sorted({key for line in train for key in line if key.endswith("_loss") and key != "nll_loss"})
    drawn = [_plot(axes, train, name, name) for name in names]
    return _svg(figure, "auxiliary", legend=True) if any(drawn) else ""


def speed_curve(train: Lines) -> str:
    """Words, or images, per second over updates."""
    unit = "images" if any("images_per_second" in line for line in train) else "words"
    figure, axes = _figure()
    drawn = _plot(axes, train, f"{unit}_per_second", "")
    axes.set_ylim(bottom=0)
    axes.set_ylabel(f"{unit}/s")
    return _svg(figure, "speed") if drawn else ""


def load_map(train: Lines, layer: str) -> str:
    """Load of each expert of a sparse layer over updates, as a multiple of the mean: 1 is balanced, 0 is dead."""
    points = [(int(line["update"]), line["load"][layer]) for line in train if layer in line.get("load", {})]
    sizes = {len(load) for _, load in points}
    if not points or len(sizes) != 1:
        return ""
    figure, axes = _figure()
    experts = sizes.pop()
    rows = [[load[expert] * experts for _, load in points] for expert in range(experts)]
    extent = (points[0][0] - 0.5, points[-1][0] + 0.5, -0.5, experts - 0.5)
    image = axes.imshow(rows, aspect="auto", origin="lower", cmap="viridis", vmin=0, extent=extent)
    axes.set_ylabel("expert")
    figure.colorbar(image, ax=axes, label="load / mean")
    return _svg(figure, f"load {layer}")


def _figure() -> tuple[Figure, Axes]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependency(
            "drawing curves needs matplotlib",
            remedy="run scripts/setup.sh, pip install matplotlib, or set html=false",
        ) from error
    logging.getLogger("matplotlib").setLevel(logging.WARNING)
    figure = Figure(figsize=_SIZE, layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel("update")
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _plot(axes: Axes, lines: Lines, key: str, label: str, **style: Any) -> bool:
    points = [
        (line["update"], line[key]) for line in lines if isinstance(line.get(key), (int, float)) and "update" in line
    ]
    if points:
        axes.plot(*zip(*points, strict=True), label=label, linewidth=1.2, **style)
    return bool(points)


def _svg(figure: Figure, name: str, legend: bool = False) -> str:
    """The figure as SVG; ``name`` makes ids unique in a page, and the same in every call."""
    import matplotlib

    if legend:
        for label in figure.axes[0].legend(frameon=False).get_texts():
            label.set_text(for_terminal(label.get_text()))
            label.set_parse_math(False)  # a name between dollars is not a formula
    stream = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(stream, format="svg", metadata={"Date": None})
    text = stream.getvalue()
    return text[text.index("<svg") :]

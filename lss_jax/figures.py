"""Figures of curves, for a file or for a page. Matplotlib is imported here alone, and late: training needs none."""

import io
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK = "#101112"  # of text and axes; on a page the page's own
COLORS = ("#3b82c4", "#c2661c", "#2f9460", "#9467bd", "#d64545", "#7f7f7f")  # at least 3:1 on white and on near-black
STROKES = ("-", "--", ":", "-.")  # curves differ in these too, for eyes and printers without colors
SIZE = (4.6, 2.9)  # inches: at the width of a phone its letters can still be read


class Curve(NamedTuple):
    """Points in the order of `x`; where `y` is not finite the line is broken."""

    label: str
    x: list[float]
    y: list[float]


class Plot(NamedTuple):
    """Curves over one pair of axes, and places on the x axis that are marked."""

    x_label: str
    y_label: str
    curves: list[Curve]
    marks: Iterable[float] = ()
    marked: str = ""  # what the marks are
    log_x: bool = False
    dots: bool = False  # at every point


def png_of(plot: Plot) -> bytes:
    """For a file of its own, on white."""
    return _saved(plot, "png", dpi=200)


def svg_of(plot: Plot, described: str) -> str:
    """To be put into a page: text stays text, ink is the page's, and nothing in it points outside."""
    svg = _saved(plot, "svg", transparent=True).decode()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    opening = f'<svg role="img" aria-label="{described}" viewBox='
    svg = re.sub(r'^.*?<svg [^>]*?viewBox=("[^"]*")[^>]*>', rf"{opening}\1>", svg, count=1, flags=re.DOTALL)
    return svg.replace("xlink:href", "href").replace(INK, "currentColor").strip()


def _saved(plot: Plot, kind: str, **options) -> bytes:
    import matplotlib as mpl

    ink: Any = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK)
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": repr(plot), "font.size": 9, **ink}):
        file = io.BytesIO()
        _drawn(plot).savefig(file, format=kind, **options)
    return file.getvalue()


def _drawn(plot: Plot) -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(SIZE, layout="constrained")
    axes = figure.subplots()
    for number, mark in enumerate(plot.marks):
        axes.axvline(mark, color=COLORS[-1], linewidth=0.8, linestyle=":", label=plot.marked if not number else None)
    for number, curve in enumerate(plot.curves):
        color, stroke = COLORS[number % len(COLORS)], STROKES[number % len(STROKES)]
        marker = "o" if plot.dots or len(curve.x) < 3 else None
        axes.plot(curve.x, curve.y, stroke, color=color, label=curve.label, marker=marker, markersize=3, linewidth=1.4)
    if plot.log_x:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set_xlabel(plot.x_label)
    axes.set_ylabel(plot.y_label)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    if len(plot.curves) > 1 or plot.marked:
        axes.legend(frameon=False)
    return figure

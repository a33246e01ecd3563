"""Figures of curves, for a file or a page. Matplotlib is imported here alone, and late: training works without it."""

import html
import io
import re
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK = "#101112"  # color of text and axes; on a page, the page's own
COLORS = ("#3b82c4", "#c2661c", "#2f9460", "#9467bd", "#d64545", "#7f7f7f")  # at least 3:1 on white and on near-black
STROKES = ("-", "--", "-.", (0, (1, 1)))  # curves differ in these too, for eyes and printers without colors
SIZE = (4.6, 2.9)  # inches: at the width of a phone its letters can still be read


class Curve(NamedTuple):
    """A line through points in the order of `x`, broken where `y` is not finite; `style` numbers color and stroke."""

    label: str
    x: list[float]
    y: list[float]
    style: int
    dots: bool = False  # one at every point


class Plot(NamedTuple):
    """Curves over one pair of axes, and marks: vertical lines, each at an x and in a style."""

    x_label: str
    y_label: str
    curves: list[Curve]
    marks: tuple[tuple[float, int], ...] = ()
    log_x: bool = False
    log_y: bool = False


def png_of(plot: Plot) -> bytes:
    """The plot as a PNG file, on white."""
    return _saved(plot, "png", dpi=200)


def svg_of(plot: Plot, described: str) -> str:
    """The plot as an SVG element of a page: text stays text, ink is the page's, and nothing refers to another file."""
    svg = _saved(plot, "svg", transparent=True).decode()
    svg = re.sub(r"<metadata>.*?</metadata>|(?<=<g) id=\"[^\"]*\"", "", svg, flags=re.DOTALL)
    found = re.fullmatch(r'.*?<svg [^>]*?(viewBox="[^"]*")[^>]*>(.*)', svg, re.DOTALL)
    assert found, "Matplotlib writes one"
    viewed, drawn = found.groups()
    drawn = drawn.replace("xlink:href", "href").replace(INK, "currentColor").strip()
    return f'<svg role="img" aria-label="{html.escape(described)}" {viewed}>{drawn}'


def _saved(plot: Plot, kind: str, **options) -> bytes:
    import matplotlib as mpl

    settings: Any = dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK
    )
    settings |= {"svg.fonttype": "none", "svg.hashsalt": repr(plot), "font.size": 9, "text.parse_math": False}
    with mpl.rc_context(settings):
        file = io.BytesIO()
        _drawn(plot).savefig(file, format=kind, **options)
    return file.getvalue()


def _drawn(plot: Plot) -> "Figure":
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    figure = Figure(SIZE, layout="constrained")
    axes = figure.subplots()
    for x, style in plot.marks:
        axes.axvline(x, color=COLORS[style % len(COLORS)], linewidth=0.9, linestyle=":")
    for curve in plot.curves:
        color, stroke = COLORS[curve.style % len(COLORS)], STROKES[curve.style % len(STROKES)]
        marker = "o" if curve.dots or len(curve.x) < 3 else None
        label = f" {curve.label}"  # Matplotlib leaves out what begins with an underscore
        axes.plot(curve.x, curve.y, color=color, ls=stroke, label=label, marker=marker, markersize=3, linewidth=1.4)
    if plot.log_x:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    if plot.log_y:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel(plot.x_label)
    axes.set_ylabel(plot.y_label)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    if len(plot.curves) > 1:
        axes.legend(frameon=False)
    return figure

"""Figures of curves, for a file or a page. Matplotlib is imported here alone, and late: training works without it."""

import html
import io
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lss_jax.data.packing import IGNORED_LABEL

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK = "#101112"  # color of text and axes; on a page, the page's own
COLORS = ("#3b82c4", "#c2661c", "#2f9460", "#9467bd", "#d64545", "#7f7f7f")  # at least 3:1 on white and on near-black
STROKES = ("-", "--", "-.", (0, (1, 1)))  # curves differ in these too, for eyes and printers without colors
CLASS_COLORS = ("#000000", *COLORS, "#e0c020", "#17a8bd", "#e377c2", "#8c564b")  # cycled, if there are more classes
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


class Picture(NamedTuple):
    """An image beside the classes of its pixels and those that were predicted, all `[H, W]`, uint8."""

    name: str
    pixels: np.ndarray  # grey levels
    labels: np.ndarray  # IGNORED_LABEL where there is none
    predicted: np.ndarray


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


def png_of_pictures(pictures: Sequence[Picture], classes: Sequence[str], title: str) -> bytes:
    """A row per picture as a PNG file: its grey levels, its labels and the predictions, with the classes' colors."""
    from matplotlib.colors import to_rgb
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    height, width = pictures[0].pixels.shape
    side = 2.4
    figure = Figure((3 * side, len(pictures) * side * height / width + 0.9), layout="constrained")
    palette = np.full((IGNORED_LABEL + 1, 3), to_rgb("white"))  # white: no label
    colors = [CLASS_COLORS[number % len(CLASS_COLORS)] for number in range(len(classes))]
    palette[: len(classes)] = [to_rgb(color) for color in colors]
    all_axes = figure.subplots(len(pictures), 3, squeeze=False)
    for axes in all_axes.flat:
        axes.set(xticks=[], yticks=[])
    for (left, middle, right), picture in zip(all_axes, pictures, strict=True):
        left.imshow(picture.pixels, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        left.set_ylabel(picture.name)
        middle.imshow(palette[picture.labels], interpolation="nearest")
        right.imshow(palette[picture.predicted], interpolation="nearest")
    for axes, what in zip(all_axes[0], ("image", "labels", "prediction"), strict=True):
        axes.set_title(what)
    figure.suptitle(title)
    keys = [Patch(color=color, label=f" {name}") for color, name in zip(colors, classes, strict=True)]
    figure.legend(handles=keys, loc="outside lower center", ncols=6, frameon=False)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=100)
    return file.getvalue()

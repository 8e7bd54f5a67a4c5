"""Figures of a report, with matplotlib: maps of depth, matrices of similarity, agreement over keep rate."""

import io
import math
import re
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

# Text and lines in this colour take the page's own: it is that of no other element.
INK = "#010203"
MAP = "viridis"
_STYLE = {
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.titlecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "font.size": 9,
    "axes.titlesize": 9,
    "svg.hashsalt": "tokred",
}
_INCH = 0.42  # a cell of a matrix
_PAGE_DPI = 104  # text of 9 points is then as large as that of the page's tables
_PAGE_WIDTH = 1170  # pixels of a figure at most


@matplotlib.rc_context(_STYLE)
def depth_maps(maps: Mapping[float, Mapping[str, np.ndarray]], methods: Sequence[str], depth: int) -> Figure:
    """A heat map for each keep rate (down) and method (across): how many blocks each patch passes alone."""
    figure = _figure(1.25 * len(methods) + 1, 1.3 * len(maps) + 0.4)
    size = 8 * max(1, figure.get_figwidth() * _PAGE_DPI / _PAGE_WIDTH)  # wider figures are shrunk, with their names
    axes = figure.subplots(len(maps), len(methods), squeeze=False)
    for row, (rate, found) in zip(axes, maps.items(), strict=True):
        for axis, method in zip(row, methods, strict=True):
            axis.set(xticks=[], yticks=[])
            if method in found:
                shown = axis.imshow(found[method], cmap=MAP, vmin=0, vmax=depth, interpolation="none")
            else:
                axis.axis("off")
        row[0].set_ylabel(f"keep {rate:g}", size=size)
        row[0].axis("on")
    for axis, method in zip(axes[0], methods, strict=True):
        axis.set_title(method, size=size)
    bar = figure.colorbar(shown, ax=axes, shrink=min(1, 1.8 / len(maps)))
    bar.set_label("blocks as a token of its own", size=size)
    bar.ax.tick_params(labelsize=size)
    bar.outline.set_visible(False)
    return figure


@matplotlib.rc_context(_STYLE)
def matrices(found: Mapping[float, tuple[Sequence[str], np.ndarray]], low: float, high: float) -> Figure:
    """A matrix of similarity for each keep rate, with its values in the cells; NaN is left empty."""
    columns = min(2, len(found))
    rows = math.ceil(len(found) / columns)
    widest = max(len(names) for names, _ in found.values())
    side = max(_INCH * widest + 1.1, 2.6)
    figure = _figure(side * columns, side * rows)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes[len(found) :]:
        axis.axis("off")
    for axis, (rate, (names, values)) in zip(axes, found.items(), strict=False):
        _matrix(axis, values, names, names, low, high)
        axis.set_title(f"keep {rate:g}")
    return figure


@matplotlib.rc_context(_STYLE)
def table(values: np.ndarray, rows: Sequence[str], columns: Sequence[str], low: float, high: float) -> Figure:
    """One matrix of rows and columns of different things."""
    figure = _figure(0.62 * len(columns) + 1.6, 0.34 * len(rows) + 1)
    _matrix(figure.subplots(), values, rows, columns, low, high, aspect="auto")
    return figure


@matplotlib.rc_context(_STYLE)
def lines(found: Mapping[str, Sequence[tuple[float, float]]], label: str) -> Figure:
    """A line for each method over the keep rate."""
    figure = _figure(7, 3.6)
    axis = figure.subplots()
    axis.set_prop_cycle(color=colormaps["tab20"].colors)
    for number, (method, points) in enumerate(found.items()):
        axis.plot(*zip(*sorted(points), strict=True), marker="osD^v<>Pphd8X"[number % 13], ms=4, lw=1, label=method)
    axis.set(xlabel="keep rate", ylabel=label, ylim=(-0.02, 1.02))
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    return figure


def svg(figure: Figure, page: bool = False) -> str:
    """The figure as SVG; for a page its text is the page's, in the page's font and colour, and ids are its own."""
    text = io.StringIO()
    with matplotlib.rc_context({**_STYLE, "svg.fonttype": "none" if page else "path"}):
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    if not page:
        return text.getvalue()
    found = text.getvalue()[text.getvalue().index("<svg") :].replace(INK, "currentColor")
    found = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", found)
    width, height = figure.get_size_inches() * _PAGE_DPI
    return re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', f'width="{width:.0f}" height="{height:.0f}"', found, count=1)


def png(figure: Figure) -> bytes:
    """The figure as PNG on white."""
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=200, facecolor="white", metadata={"Software": None})
    return data.getvalue()


def number(value: float, decimals: int) -> str:
    """The number, rounded; never -0.00."""
    return f"{round(value, decimals) + 0.0:.{decimals}f}"


def _figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), layout="constrained")


def _matrix(axis, values: np.ndarray, rows, columns, low: float, high: float, aspect: str = "equal") -> None:
    axis.imshow(np.ma.masked_invalid(values), cmap=MAP, vmin=low, vmax=high, interpolation="none", aspect=aspect)
    axis.set_xticks(range(len(columns)), columns, rotation=45, ha="right", rotation_mode="anchor")
    axis.set_yticks(range(len(rows)), rows)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    for (i, j), value in np.ndenumerate(values):
        if np.isfinite(value):
            dark = (value - low) < 0.6 * (high - low)
            axis.text(j, i, number(value, 2), ha="center", va="center", size=7, color="white" if dark else "black")

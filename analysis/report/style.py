"""One plot style: figures without pyplot, colours that colour-blind readers can tell apart, SVG that follows the page.

Text and lines are drawn in INK, grids in GRID; `to_svg` turns both into the page's own colours, so that a figure is
readable on a light and on a dark page.
"""

import base64
import io
import re
import warnings
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from markupsafe import escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

INK, GRID = "#1b1d21", "#c9ccd2"
# Okabe and Ito, "Color Universal Design" (2008), without black (INK is there) and with yellow last (weak on white).
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")
LINES = ("-", "--", ":", "-.")  # where there are more lines than colours
SEQUENTIAL, DIVERGING = "viridis", "RdBu_r"
HEAVY = 400_000  # bytes of SVG above which a page is better served by a PNG

RC = {
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.labelsize": 9,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.prop_cycle": matplotlib.cycler(color=PALETTE),
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "font.size": 9,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "image.cmap": SEQUENTIAL,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.6,
    "lines.markersize": 4,
    "patch.edgecolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "svg.fonttype": "none",  # text stays text: searchable, and the reader's browser has fonts for every script
    "svg.hashsalt": "jaxmodels",  # the same figure gives the same bytes
}


def new_figure(width: float = 7.0, height: float = 3.2, rows: int = 1, columns: int = 1, **options: Any) -> tuple:
    """(Figure, axes) in the house style; size in inches at 96 px, axes as in `Figure.subplots`.

    Sets matplotlib's rcParams for the process: artists added later read them too.
    """
    matplotlib.rcParams.update(RC)
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, **options)


def line(number: int) -> dict[str, str]:
    """Colour and kind of the number-th line: those beyond the colours are dashed, dotted or both."""
    turn, place = divmod(number, len(PALETTE))
    return {"color": PALETTE[place], "linestyle": LINES[turn % len(LINES)]}


def heat_map(
    axes: Axes,
    values: np.ndarray,
    rows: Sequence[str] | None = None,
    columns: Sequence[str] | None = None,
    label: str = "",
    centred: bool = False,
    **options: Any,
) -> AxesImage:
    """Draw values [rows, columns] with names and a colour bar; centred: diverging colours, white at zero."""
    if centred:
        limit = float(np.nanmax(np.abs(values), initial=0.0)) or 1.0
        options = {"cmap": DIVERGING, "vmin": -limit, "vmax": limit} | options
    image = axes.imshow(values, aspect="auto", interpolation="nearest", **options)
    axes.grid(False)
    for names, axis in ((rows, axes.yaxis), (columns, axes.xaxis)):
        if names is not None:
            # Names are text as it is: a code such as $0-$50 would be set as a formula, or end in an error.
            axis.set_ticks(range(len(names)), labels=list(names), fontsize=8 if len(names) <= 40 else 6,
                           parse_math=False)
            axis.set_tick_params(length=0)
    if columns is not None and max(map(len, columns), default=0) > 2:
        axes.tick_params(axis="x", rotation=90)
    bar = axes.figure.colorbar(image, ax=axes, label=label, pad=0.01, fraction=0.04)
    bar.outline.set_visible(False)
    return image


def to_svg(figure: Figure, prefix: str, label: str = "") -> str:
    """The figure as an inline <svg>: ids made unique by `prefix`, no XML preamble, no links, the page's colours."""
    buffer = io.StringIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # the browser draws it, not matplotlib
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg).replace("xlink:href=", "href=")
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}-\1"', svg)
    svg = svg.replace('href="#', f'href="#{prefix}-').replace("url(#", f"url(#{prefix}-")
    svg = svg.replace(INK, "currentColor").replace(GRID, "var(--line)")
    svg = svg.replace(PALETTE[0].lower(), "var(--blue)")  # too dark for a dark page; the others do on both
    view = re.search(r'viewBox="[^"]*"', svg)[0]
    width = round(96 * figure.get_figwidth())
    opening = f'<svg role="img" aria-label="{escape(label)}" style="--width:{width}px" {view}>'
    return opening + svg[svg.index(">") + 1 :].strip()


def to_png(figure: Figure) -> tuple[str, int]:
    """(data: URI, width in CSS pixels) at twice the resolution of the page, on white."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=192, facecolor="white")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode(), round(96 * figure.get_figwidth())

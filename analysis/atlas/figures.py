"""Figures of the atlas: plain arrays and names in, a matplotlib Figure out.

Colour never stands alone: families are also named, schemes also differ by marker. Layers count from 0 (nearest to the
text) to L - 1 (nearest to the prediction).
"""

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Float, Int
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, MaxNLocator, NullLocator
from scipy.cluster.hierarchy import dendrogram as draw_dendrogram

from analysis.atlas.classes import CLASSES
from analysis.atlas.families import Curve, Dendrogram
from analysis.atlas.intervals import Interval
from analysis.report.style import GRID, INK, PALETTE, heat_map, new_figure

Names = Sequence[str]
Labels = Sequence[str | None]
MARKERS = "osD^vPX*"
LOG_TICKS = (-1, -0.3, -0.1, 0, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20)
LAYER = "layer (0: nearest to the text)"
CLASS_NAMES = dict(zip(CLASSES, ("every language", "one whole family, nobody else", "exactly one language",
                                 "several, not a family", "no language"), strict=True))
CLASS_COLOURS = (PALETTE[0], PALETTE[2], PALETTE[1], PALETTE[5], GRID)


def family_colours(families: Labels) -> list[str]:
    """A colour for each language: families of two or more share one, the largest first; single languages get INK."""
    sizes = Counter(x for x in families if x is not None)
    shared = sorted((x for x in sizes if sizes[x] > 1), key=lambda x: (-sizes[x], x))  # the same in every figure
    # Without yellow, which is too weak for text on white. Colours come round again; names are written beside them.
    return [PALETTE[shared.index(x) % 6] if x in shared else INK for x in families]


def _height(languages: int) -> float:
    return 1.3 + 0.16 * languages


def _colour_names(axis, families: Labels) -> None:
    for tick, colour in zip(axis.get_ticklabels(), family_colours(families), strict=True):
        tick.set_color(colour)


def language_map(profiles: Float[np.ndarray, "A E"], languages: Names, order: Sequence[int] | None = None,
                 layer: int | None = None, by: str = "index", centred: bool = False,
                 families: Labels | None = None) -> Figure:
    """Heat map languages x experts of one layer.

    Args:
      profiles: normalised frequency f (1: chance), or with ``centred`` its difference from the mean language.
      order: rows from top to bottom (a dendrogram's leaves). by: columns by expert ``index``, or by mean
        ``frequency``, highest first. families: names in their colours.
    """
    order = np.arange(len(profiles)) if order is None else np.asarray(order)
    columns = np.arange(profiles.shape[1])
    if by == "frequency":  # centred profiles have a mean of 0: there, by size
        columns = np.argsort(-(np.abs(profiles) if centred else profiles).mean(0), kind="stable")
    figure, axes = new_figure(8, _height(len(profiles)))
    label = "frequency above or below the mean language" if centred else "frequency (1: as by chance)"
    heat_map(axes, profiles[order][:, columns], [languages[i] for i in order], None, label, centred)
    if families is not None:
        _colour_names(axes.yaxis, [families[i] for i in order])
    where = "" if layer is None else f"Layer {layer}: "
    axes.set_title(f"{where}{'what sets each language apart' if centred else 'which experts each language uses'}")
    what = "index" if by == "index" else "most unequal first" if centred else "most frequent first"
    axes.set(xlabel=f"expert ({what})")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if by == "frequency":
        axes.set_xticks([])
    return figure


def family_tree(tree: Dendrogram, languages: Names, families: Labels, label: str = "1 - r") -> Figure:
    """Dendrogram, languages downwards, each in the colour of its family, whose name stands on the right."""
    figure, axes = new_figure(7, _height(len(languages)))
    drawn = draw_dendrogram(tree.linkage, no_plot=True)
    for heights, places in zip(drawn["dcoord"], drawn["icoord"], strict=True):
        axes.plot(heights, (np.array(places) - 5) / 10, color=INK, linewidth=0.9)  # scipy's leaves stand at 5, 15, …
    axes.invert_xaxis()
    axes.set_ylim(len(languages) - 0.5, -0.5)
    axes.yaxis.tick_right()
    axes.spines["left"].set_visible(False)
    axes.grid(False, axis="y")
    names = [f"{languages[i]}  ·  {families[i]}" if families[i] else languages[i] for i in drawn["leaves"]]
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.tick_params(axis="y", length=0)
    _colour_names(axes.yaxis, [families[i] for i in drawn["leaves"]])
    axes.set_title("Languages grouped by the experts they use; colours: known families")
    axes.set_xlabel(f"distance at which groups join ({label}; cophenetic correlation {tree.cophenetic:.2f})")
    return figure


def similarity_map(similarity: Float[np.ndarray, "A A"], order: Sequence[int], languages: Names, families: Labels,
                   label: str = "r of centred profiles") -> Figure:
    """Similarity of all pairs, languages in the dendrogram's order; blocks on the diagonal are groups."""
    order = np.asarray(order)
    size = _height(len(order))
    figure, axes = new_figure(max(5.0, size + 0.6), max(4.0, size))
    values = similarity[np.ix_(order, order)].astype(float)
    np.fill_diagonal(values, np.nan)  # r = 1 with itself would take up the colours
    names = [languages[i] for i in order]
    heat_map(axes, values, names, names, label, centred=True)
    axes.tick_params(axis="x", rotation=90)
    for axis in (axes.xaxis, axes.yaxis):
        _colour_names(axis, [families[i] for i in order])
    axes.set_title("How alike languages use the experts; colours of names: families")
    return figure


def depth_curve(curve: Curve, label: str = "mean r within families less between") -> Figure:
    """Within minus between by layer, above the band where 95 % of shuffled family labels fall."""
    figure, axes = new_figure(7, 3)
    layers = np.arange(len(curve.difference))
    axes.fill_between(layers, curve.low, curve.high, color=GRID, label="shuffled labels, middle 95 %")
    axes.plot(layers, curve.difference, color=PALETTE[0], marker="o", label="true families")
    axes.axhline(0, color=INK, linewidth=0.8)
    above = int((curve.difference > curve.high).sum())
    axes.set_title("Too few families to compare" if np.isnan(curve.difference).all() else
                   f"Related languages are more alike than shuffled labels allow in {above} of {len(layers)} layers")
    axes.set(xlabel=LAYER, ylabel=label)
    axes.set_ylim(top=1.25 * max(0.02, np.nan_to_num([curve.difference, curve.high]).max()))  # room for the legend
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(loc="upper right", ncols=2)
    return figure


def class_counts(counts: Int[np.ndarray, "L 5"], percentile: float = 95.0) -> Figure:
    """Stacked bars by layer: who uses each expert often (`Classes.counts`)."""
    figure, axes = new_figure(7.5, 3.6)
    base = np.zeros(len(counts))
    for number, (name, colour) in enumerate(zip(CLASS_NAMES.values(), CLASS_COLOURS, strict=True)):
        axes.bar(range(len(counts)), counts[:, number], 0.85, bottom=base, color=colour, linewidth=0.3,
                 label=f"{name} ({counts[:, number].sum()})")
        base += counts[:, number]
    axes.set_title("Experts by who uses them often")
    axes.set(xlabel=LAYER, ylabel="experts", xlim=(-0.6, len(counts) - 0.4))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(False, axis="x")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3,
                  title=f"often: above the {percentile:g}th percentile of all frequencies; experts in brackets",
                  title_fontsize=8.5)
    return figure


def language_neurons(language: Bool[np.ndarray, "A L F"], languages: Names) -> Figure:
    """LAPE neurons: how many each language has, and in which layers; most first. One may have several languages."""
    by_layer = language.sum(2)
    totals = by_layer.sum(1)
    order = np.argsort(-totals, kind="stable")
    figure, (bars, grid) = new_figure(8.5, _height(len(order)), 1, 2, width_ratios=(1, 2), sharey=True)
    bars.barh(range(len(order)), totals[order], color=PALETTE[0], linewidth=0)
    heat_map(grid, by_layer[order], [languages[i] for i in order], None, "neurons in this layer")
    grid.tick_params(axis="y", labelleft=False)
    bars.tick_params(axis="y", labelleft=True)
    bars.grid(False, axis="y")
    figure.suptitle(f"{language.any(0).sum()} neurons fire in few languages: how many each has, and in which layers",
                    x=0, ha="left", size=10, weight="bold")
    bars.set(xlabel="neurons")
    grid.set(xlabel=LAYER)
    for axes in (bars, grid):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5 if axes is bars else 10))
    return figure


def quality_curves(x: Sequence[float], schemes: Mapping[str, Sequence[Interval]],
                   x_label: str = "kept share of the feed-forward layers (%)", unit: str = "nats a token",
                   title: str = "What keeping fewer experts costs, by how they are chosen",
                   log: bool = False) -> Figure:
    """Excess loss over dense with 95 % intervals for several schemes, over kept share or over speed-up.

    ``log`` draws losses on a scale that is linear near 0 and logarithmic above 0.1, where schemes differ by factors.
    """
    figure, axes = new_figure(7, 4.2)
    x = np.asarray(x, float)
    step = np.ptp(x) / 160 if len(x) > 1 else 0.01
    for number, (name, intervals) in enumerate(schemes.items()):
        value, low, high = np.array([tuple(i) for i in intervals]).T
        # Of few resamplings the interval may not hold the value, and no error bar is negative. Moved sideways a little,
        # so that intervals of equal share do not hide each other.
        ends = np.maximum([value - low, high - value], 0)
        axes.errorbar(x + step * (number - (len(schemes) - 1) / 2), value, ends, label=name,
                      color=PALETTE[number % len(PALETTE)], marker=MARKERS[number % len(MARKERS)], capsize=2,
                      linestyle="-" if number < len(PALETTE) else "--", elinewidth=1)
    axes.axhline(0, color=INK, linewidth=0.8)
    if log:
        bottom, top = axes.dataLim.intervaly
        axes.set_yscale("symlog", linthresh=0.1)
        axes.set_yticks([t for t in LOG_TICKS if t <= 1.2 * top or t <= 0.1], minor=False)
        axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.set_ylim(min(-0.02, 1.2 * bottom), max(0.12, 1.2 * top))
    if len(x) <= 8:
        axes.set_xticks(x, [f"{v:.3g}" for v in x])
    axes.set_title(title)
    axes.set(xlabel=x_label, ylabel=f"excess loss over dense\n({unit})")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def change_matrix(change: Float[np.ndarray, "A B"], neurons_of: Names, read_in: Names) -> Figure:
    """Change of log-perplexity of each language (columns) without another's neurons (rows); nan: not measured."""
    figure, axes = new_figure(2.6 + 0.5 * len(read_in), 1.6 + 0.3 * len(neurons_of))
    heat_map(axes, change, neurons_of, read_in, "change of loss (nats a token)", centred=True)
    axes.set_facecolor(GRID)  # not white, which is a change of 0
    limit = np.nanmax(np.abs(change), initial=0.0)
    if len(neurons_of) <= 20:
        for (row, column), value in np.ndenumerate(change):
            if np.isfinite(value):
                axes.text(column, row, f"{round(value, 2) + 0.0:.2f}", ha="center", va="center", fontsize=7,
                          color="white" if abs(value) > 0.6 * limit else "black")
    axes.set_title("Loss when a language's neurons are switched off")
    missing = " (grey: not measured)" if np.isnan(change).any() else ""
    axes.set(xlabel=f"language that is read{missing}", ylabel="neurons of")
    return figure


def speed_bars(names: Names, measured: Sequence[float], ceiling: Sequence[float]) -> Figure:
    """Measured speed-up over dense as bars, what Amdahl's law allows as a mark, and the share reached in figures."""
    figure, axes = new_figure(7, 1.3 + 0.42 * len(names))
    places = np.arange(len(names))
    axes.barh(places, measured, 0.6, color=PALETTE[0], linewidth=0, label="measured")
    axes.scatter(ceiling, places, marker="|", s=220, linewidths=2.5, color=PALETTE[1], zorder=3,
                 label="ceiling: everything but the feed-forward layers takes as long as before")
    axes.axvline(1, color=INK, linewidth=0.8)
    right = max(*measured, *ceiling)
    for place, got, most in zip(places, measured, ceiling, strict=True):
        axes.text(max(got, most) + 0.02 * right, place, f"{got:.2f}x, {100 * got / most:.0f} % of the ceiling",
                  va="center", fontsize=8)
    axes.set_yticks(places, names)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.45 * right)
    axes.grid(False, axis="y")
    axes.set_title("How much faster pruned models run")
    axes.set(xlabel="speed relative to the dense model (dense = 1)")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower left", ncols=2)
    return figure

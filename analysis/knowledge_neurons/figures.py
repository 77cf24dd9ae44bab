"""Figures of the study: rows of its tables in, a matplotlib Figure out."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from analysis.attribution import SITES
from analysis.knowledge_neurons.methods import DRAWN
from analysis.report.html import percent
from analysis.report.style import GRID, INK, PALETTE, heat_map, new_figure

MARKERS = "osD^vPX*<>"
CONTROLS = (*DRAWN, "bottom")


def keeping(rows: Sequence[Mapping[str, Any]], direction: str, full: float, floor: float) -> Figure:
    """macro-F1 over the share that is kept or lost, one panel an ablation, 95 % intervals as bands; log axis."""
    mine = [row for row in rows if row["direction"] == direction]
    ablations, methods = (list(dict.fromkeys(row[key] for row in mine)) for key in ("ablation", "method"))
    figure, axes = new_figure(4.2 * len(ablations), 4.0, 1, len(ablations), squeeze=False, sharey=True)
    for panel, ablation in zip(axes[0], ablations, strict=True):
        for number, method in enumerate(methods):
            points = [row for row in mine if row["ablation"] == ablation and row["method"] == method]
            x, y, low, high = (np.array([row[key] for row in points], float)
                               for key in ("share", "macro_f1", "low", "high"))
            colour = INK if method in CONTROLS else PALETTE[number % len(PALETTE)]
            panel.plot(100 * x, y, label=method, color=colour, marker=MARKERS[number % len(MARKERS)],
                       linestyle=":" if method in CONTROLS else "-" if number < len(PALETTE) else "--")
            panel.fill_between(100 * x, low, high, color=colour, alpha=0.1, linewidth=0)
        panel.axhline(full, color=INK, linewidth=0.8)
        panel.axhline(floor, color=GRID, linewidth=1.2)
        panel.set_xscale("log")
        _share_ticks(panel, mine)
        what = "kept" if direction == "keep" else "lost"
        panel.set(title=f"{ablation} ablation", xlabel=f"neurons {what} (%)")
    axes[0, 0].set_ylabel("macro-F1, test")
    handles = axes[0, 0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=4)
    return figure


def beside_controls(rows: Sequence[Mapping[str, Any]], direction: str) -> Figure:
    """Difference of macro-F1 to each control over the share, a row of panels an ablation, a column a method."""
    ablations, methods = (list(dict.fromkeys(row[key] for row in rows)) for key in ("ablation", "method"))
    figure, axes = new_figure(4.2 * len(methods), 1.0 + 2.2 * len(ablations), len(ablations), len(methods),
                              squeeze=False, sharex=True, sharey=True)
    for line, ablation in zip(axes, ablations, strict=True):
        for panel, method in zip(line, methods, strict=True):
            mine = [row for row in rows if (row["ablation"], row["method"]) == (ablation, method)]
            for number, control in enumerate(dict.fromkeys(row["control"] for row in mine)):
                points = [row for row in mine if row["control"] == control]
                x, y, low, high = (np.array([row[key] for row in points], float)
                                   for key in ("share", "difference", "low", "high"))
                label = "random" if control == "random" else "random, matched by site and layer"
                panel.plot(100 * x, y, label=label, color=PALETTE[number], marker=MARKERS[number])
                panel.fill_between(100 * x, low, high, color=PALETTE[number], alpha=0.15, linewidth=0)
            panel.axhline(0, color=INK, linewidth=0.8)
            panel.set(xscale="log", title=f"{method}, {ablation} ablation")
            _share_ticks(panel, rows)
    for panel in axes[-1]:
        panel.set_xlabel(f"neurons {'kept' if direction == 'keep' else 'lost'} (%)")
    figure.supylabel("macro-F1 less the control's", fontsize=9)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def site_budgets(rows: Sequence[Mapping[str, Any]], full: float) -> Figure:
    """macro-F1 over the kept share of one site, a panel a site; line styles are ablations."""
    ablations, methods, sites = (list(dict.fromkeys(row[key] for row in rows))
                                 for key in ("ablation", "method", "site"))
    figure, axes = new_figure(7.2, 4.6, 2, 3, sharex=True, sharey=True)
    for panel, site in zip(axes.flat, sites, strict=True):
        for ablation, style in zip(ablations, ("-", "--"), strict=False):
            for number, method in enumerate(methods):
                points = [row for row in rows if (row["site"], row["ablation"], row["method"])
                          == (site, ablation, method)]
                panel.plot([100 * row["share"] for row in points], [row["macro_f1"] for row in points],
                           label=f"{method}, {ablation}", marker=MARKERS[number], linestyle=style,
                           color=INK if method in CONTROLS else PALETTE[number % len(PALETTE)])
        panel.axhline(full, color=INK, linewidth=0.8)
        panel.set(title=site, xscale="log")
        _share_ticks(panel, rows)
    axes[1, 1].set_xlabel("neurons of the site that are kept (%)")  # a label of the figure would meet the legend
    figure.supylabel("macro-F1, test", fontsize=9)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def _share_ticks(panel: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    """A tick at every share; those that would touch the next one have no number."""
    shares = sorted({100 * row["share"] for row in rows})
    ends = [*shares[1:], np.inf]
    panel.set_xticks(shares, [f"{share:g}" if after / share > 1.25 else "" for share, after in zip(
        shares, ends, strict=True)])
    panel.xaxis.set_minor_locator(NullLocator())


def places(rows: Sequence[Mapping[str, Any]], ranking: str, share: float) -> Figure:
    """Enrichment of every site and layer, as log2; a dot where it leaves the interval of shuffled labels in
    every fine-tuning."""
    mine = [row for row in rows if row["kind"] == "cell" and row["ranking"] == ranking and row["share"] == share]
    layers = 1 + max(row["layer"] for row in mine)
    value, marked = np.zeros((len(SITES), layers)), []
    names = list(SITES)
    for row in mine:
        at = names.index(row["site"]), row["layer"]
        value[at] = np.log2(max(row["enrichment"], 1 / 16))  # nothing kept: as far down as the scale goes
        if row["least"] > row["high"] or row["most"] < row["low"]:
            marked.append(at)
    figure, axes = new_figure(2.6 + 0.35 * layers, 2.8)
    heat_map(axes, value, names, [str(layer) for layer in range(layers)], "log2 enrichment", centred=True)
    if marked:
        y, x = zip(*marked, strict=True)
        axes.plot(x, y, linestyle="none", marker="o", color=INK, markeredgecolor="white", markersize=4)
    axes.set(title=f"{ranking}, {percent(share)} kept", xlabel="layer")
    return figure


def recall_change(change: Sequence[Sequence[float]], names: Sequence[str]) -> Figure:
    """Change of recall; rows: the class whose neurons are lost."""
    figure, axes = new_figure(5.5, 3.6)
    # cells of classes without scores or members come as None from JSON
    heat_map(axes, np.array(change, float), [f"without {name}" for name in names], names, "change of recall",
             centred=True)
    axes.set(xlabel="class")
    return figure

"""The report of one classifier of texts: how it does for rare and frequent codes, beside TF-IDF on the same texts; how
far its scores can be trusted; what training made of the states of its labels."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from analysis.report import style
from analysis.report.generic import flat_rows, is_number, read_run
from analysis.report.html import Report
from jaxmodels.text2tree.tree import LabelTree
from train import text_metrics
from train.runtime.files import load_npz, read_json
from train.text_labels import SHARES, tree_from

Arrays = dict[str, np.ndarray]
THIRDS = ("tail", "middle", "head")
NAMES = {"model": "this model", "tfidf": "TF-IDF"}
ENDS = {"macro-F1": "", "low": "_low", "high": "_high"}
MAPPED = 150  # codes of a heat map, beyond which no square can be told
NEAREST = 10, 5  # codes, and labels next to each


def build(run_dir: str | Path) -> Path:
    """Writes report.html into a run's folder; returns its path."""
    folder = Path(run_dir)
    config, results, lines = read_run(folder)
    report = Report(str(config.get("name") or folder.name), f"Status: {results.get('status', 'nothing written yet')}.")
    prefix = "tuned_" if "test.model.tuned_macro_f1" in results else ""
    report.section("Results", "On the test part, which is read once. " + (
        "A label is given above the threshold that is best for macro-F1 on the development part, for both alike."
        if prefix else "The class of the highest score."))
    cards = [(f"{label}, {name}", results.get(f"test.{method}.{prefix}{key}"))
             for key, label in (("macro_f1", "macro-F1"), ("micro_f1", "micro-F1"), ("macro_f1_tail", "tail macro-F1"))
             for method, name in NAMES.items()]
    report.number_cards([card for card in cards if is_number(card[1])])
    saved, classes, states = (load_npz(folder / f"{name}.npz") for name in ("predictions", "classes", "labels"))
    if cards[0][1] is not None:
        _buckets(report, results, prefix)
    if saved is not None and classes is not None:
        tree = tree_from(classes)
        _codes(report, folder, saved, tree)
        _calibration(report, saved)
        if states is not None:
            _labels(report, states, tree, saved["counts"])
    _learning(report, lines)
    report.section("What was run")
    report.table(flat_rows(results), {"key": "number", "value": "value"}, "All results.", "results")
    report.table(flat_rows(config), {"key": "setting", "value": "value"}, "The resolved config.", "config")
    return report.save(folder / "report.html")


def _buckets(report: Report, results: dict[str, Any], prefix: str) -> None:
    report.section("Rare and frequent codes", "Thirds of the codes by their number of training texts: tail, middle, "
                   "head; and bins of that number. Lines are 95 % intervals: the test texts drawn again and again.")
    start = f"test.model.{prefix}macro_f1_"
    keys = [key.removeprefix(start) for key, value in results.items()  # None: a bin that no code is in
            if key.startswith(start) and not key.endswith(("_low", "_high", "_all")) and value is not None]
    rows = [{"method": NAMES[method], "codes": bucket, **{name: results.get(
        f"test.{method}.{prefix}macro_f1_{bucket}{end}") for name, end in ENDS.items()}}
            for method in NAMES for bucket in keys]
    for title, chosen in (("thirds", [key for key in keys if key in THIRDS]),
                          ("bins of training texts", [key for key in keys if key not in THIRDS])):
        shown = [row for row in rows if row["codes"] in chosen]
        report.figure(_bars(shown), f"Macro-F1, {title}.", shown, title, f"Macro-F1 of {title} with intervals")
    keys = sorted({key.split(".", 2)[2] for key in results if key.startswith("test.model.")})
    table = [{"metric": key, **{name: results.get(f"test.{method}.{key}") for method, name in NAMES.items()}}
             for key in keys]
    table = [row for row in table if any(row[name] is not None for name in NAMES.values())]
    report.table(table, caption="Every metric.", name="metrics")


def _bars(rows: list[dict[str, Any]]) -> Figure:
    """Groups of bars from rows with method, codes (the group), macro-F1, low and high."""
    methods, groups = (list(dict.fromkeys(row[key] for row in rows)) for key in ("method", "codes"))
    figure, axes = style.new_figure(6, 2.8)
    width = 0.8 / max(len(methods), 1)
    for i, method in enumerate(methods):
        own = [row for row in rows if row["method"] == method and is_number(row["macro-F1"])]
        places = np.array([groups.index(row["codes"]) for row in own]) + (i - (len(methods) - 1) / 2) * width
        heights = np.array([row["macro-F1"] for row in own], float)
        ends = np.array([[row["low"], row["high"]] for row in own], float).reshape(-1, 2).T
        axes.bar(places, heights, width, color=style.PALETTE[i % len(style.PALETTE)], label=method)
        # a resampled mean may leave the value outside its interval where classes are few
        axes.errorbar(places, heights, np.maximum([heights - ends[0], ends[1] - heights], 0), fmt="none",
                      ecolor=style.INK, linewidth=1)
    axes.set_xticks(range(len(groups)), [spelled(group) for group in groups])
    axes.set(ylabel="macro-F1", ylim=(0, None))
    figure.legend(loc="outside lower center", ncols=3)
    return figure


def spelled(bucket: str) -> str:
    """``11_50`` as "11 to 50"."""
    return bucket.replace("_up", " and more").replace("_", " to ")


def _codes(report: Report, folder: Path, saved: Arrays, tree: LabelTree) -> None:
    """The worst codes, each with a text."""
    truth, said = decisions(saved, "model")
    counted = text_metrics.counts(truth, said)
    each, found = text_metrics.class_f1(counted), read_json(folder / "examples.json") or []
    shown = {example["code"]: example for example in found}
    order = text_metrics.worst(counted)
    report.section("The codes it does worst on", f"The {len(order)} of the lowest F1 among those that the test part "
                   "has, each with a text that has the code and was not given it, if there is any.")
    rows = []
    for k in order:
        code, example = tree.classes[k], shown.get(tree.classes[k], {})
        rows.append({"code": code, "name": tree.name_of(int(tree.leaf_index[k])), "F1": float(each[k]),
                     "training texts": int(saved["counts"][k]), "test texts": int(counted[2, k]),
                     "given": int(counted[1, k]), "right": int(counted[0, k]), "a text": example.get("text", ""),
                     "its codes": listed(example.get("codes", ())), "it was given": listed(example.get("given", ()))})
    report.table(rows, caption="Worst codes.", name="worst")


def listed(codes: Sequence[str], most: int = 10) -> str:
    return ", ".join(codes[:most]) + (f" and {len(codes) - most} more" if len(codes) > most else "")


def decisions(saved: Arrays, method: str) -> tuple[np.ndarray, np.ndarray]:
    """(what is true, what a method said) of predictions.npz, bool[n, K]."""
    truth, said = saved["labels"], saved[f"{method}_said"]
    if truth.ndim == 1:
        return tuple(text_metrics.one_hot(one, len(saved["counts"])) for one in (truth, said))
    return truth.astype(bool), said


def _calibration(report: Report, saved: Arrays) -> None:
    several = saved["labels"].ndim > 1
    found = {}
    for method in NAMES if several else ("model",):  # the nearest text's class is all that TF-IDF tells of one
        right = saved["labels"] if several else saved["labels"] == saved[f"{method}_said"]
        found[method] = text_metrics.calibration(right, saved[f"{method}_scores"])
    report.section("Calibration", "Of the decisions with a score of about 0.7, are 70 % right? " + (
        "A decision is whether a text has a code." if several else "A decision is the likeliest code of a text.") +
        " ECE, the expected calibration error, is the mean distance from the diagonal over all decisions.")
    report.number_cards((f"ECE, {NAMES[method]}", bins["ece"]) for method, bins in found.items())
    figure, axes = style.new_figure(4.2, 3.6)
    axes.plot([0, 1], [0, 1], color=style.INK, linewidth=0.8, linestyle=":")
    for i, (method, bins) in enumerate(found.items()):
        axes.plot(bins["score"], bins["share"], marker="o", color=style.PALETTE[i], label=NAMES[method])
    axes.set(xlabel="mean score", ylabel="share that is true", xlim=(0, 1), ylim=(0, 1))
    axes.legend()
    rows = [{"method": NAMES[method], "mean score": score, "share that is true": share, "decisions": int(count)}
            for method, bins in found.items()
            for score, share, count in zip(bins["score"], bins["share"], bins["count"], strict=True)]
    report.figure(figure, "Reliability in ten bins of the score.", rows, "calibration",
                  "Share of decisions that are right over their mean score")


# The states of the labels


def _labels(report: Report, states: Arrays, tree: LabelTree, train_counts: np.ndarray) -> None:
    order = np.lexsort(tree.paths.T[::-1])  # depth first; a code before those below it
    shown = order[:MAPPED]
    report.section("Labels", "What the attention down the tree makes of each code: the cosine of the states of two of "
                   "them says how alike the losses take their texts to be." + (
                       f" The first {MAPPED} of {len(order)} codes in the order of the tree." if len(order) > MAPPED
                       else ""))
    figure, axes = style.new_figure(8.4, 3.8, columns=2)
    names = [tree.classes[k] for k in shown] if len(shown) <= 40 else None
    for one, when in zip(axes, ("before", "after"), strict=True):
        like = cosines(states[when][shown], states[when][shown])
        style.heat_map(one, like, names, names, centred=True, vmin=-1, vmax=1)
        one.set(title=f"{when} training")
    named = np.array(tree.classes)[shown]
    report.figure(figure, "Cosines of the states of codes, in the order of the tree.",
                  {"code": named, **dict(zip(named, like, strict=True))}, "similarity",
                  "Two heat maps of label similarity, before and after training")
    rows = [{"level": level, "training": when, **dict(zip(SHARES, map(float, row), strict=True))}
            for when, key in (("before", "attention_before"), ("after", "attention"))
            for level, row in enumerate(states[key], 1)]
    if rows:
        report.table(rows, caption="What part of its attention a node gives to its parent, itself and its siblings "
                     "together; the mean over a level (1: just below the root).", name="attention")
    _nearest(report, states, tree, train_counts)


def cosines(some: np.ndarray, states: np.ndarray) -> np.ndarray:
    """float[m, D], float[n, D] -> float32[m, n]."""
    some, states = (one / np.maximum(np.linalg.norm(one, axis=1, keepdims=True), 1e-12)
                    for one in (some.astype(np.float32), states.astype(np.float32)))
    return some @ states.T


def _nearest(report: Report, states: Arrays, tree: LabelTree, train_counts: np.ndarray) -> None:
    rare = np.argsort(train_counts, kind="stable")[:NEAREST[0]]
    rows = []
    for k, like in zip(rare, cosines(states["after"][rare], states["after"]), strict=True):
        near = [n for n in np.argsort(-like, kind="stable")[:NEAREST[1] + 1] if n != k][:NEAREST[1]]
        rows.append({"code": called(tree, k), "training texts": int(train_counts[k]),
                     "nearest": "; ".join(f"{called(tree, n)} ({like[n]:.2f})" for n in near)})
    report.table(rows, caption="The labels nearest to the codes with the fewest training texts, by the states after "
                 "training.", name="nearest")


def called(tree: LabelTree, k: int) -> str:
    """A class by its code and what it means."""
    code, name = tree.classes[k], tree.name_of(int(tree.leaf_index[k]))
    return code if name == code else f"{code} {name}"


def _learning(report: Report, lines: list[dict[str, Any]]) -> None:
    if len(lines) < 2:
        return
    report.section("Learning")
    figure, (left, right) = style.new_figure(7, 2.8, columns=2)
    left.plot([line["step"] for line in lines], [line.get("loss", np.nan) for line in lines], linewidth=1)
    left.set(xlabel="step", title="loss")
    points = [(line["step"], line["dev_macro_f1"]) for line in lines if "dev_macro_f1" in line]
    if points:
        right.plot(*zip(*points, strict=True), marker="o")
    right.set(xlabel="step", title="macro-F1, development part")
    report.figure(figure, "Loss of every step; macro-F1 after every epoch.",
                  [{key: line.get(key) for key in ("step", "loss", "dml", "ssl", "classification", "dev_macro_f1")}
                   for line in lines], "learning", "Loss and macro-F1 over steps")

"""The report of one classifier of texts: how it does for rare and frequent codes, beside TF-IDF on the same texts."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from analysis.report import style
from analysis.report.generic import flat_rows, is_number, read_run
from analysis.report.html import Report
from train import text_metrics
from train.runtime.files import load_npz

THIRDS = ("tail", "middle", "head")
NAMES = {"model": "this model", "tfidf": "TF-IDF"}
WORST = 20


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
    if cards[0][1] is not None:
        _buckets(report, results, prefix)
        _codes(report, folder)
    _learning(report, lines)
    report.section("What was run")
    report.table(flat_rows(results), {"key": "number", "value": "value"}, "All results.", "results")
    report.table(flat_rows(config), {"key": "setting", "value": "value"}, "The resolved config.", "config")
    return report.save(folder / "report.html")


def _buckets(report: Report, results: dict[str, Any], prefix: str) -> None:
    report.section("Rare and frequent codes", "Thirds of the codes by their number of training texts: tail, middle, "
                   "head; and bins of that number.")
    rows = [{"method": NAMES[method], **{third: results.get(f"test.{method}.{prefix}macro_f1_{third}")
                                         for third in THIRDS}} for method in NAMES]
    report.figure(_bars(rows), "Macro-F1 of each third.", rows, "thirds", "Macro-F1 of tail, middle and head")
    keys = sorted({key.split(".", 2)[2] for key in results if key.startswith("test.model.")})
    table = [{"metric": key, **{name: results.get(f"test.{method}.{key}") for method, name in NAMES.items()}}
             for key in keys]
    report.table(table, caption="Every metric.", name="metrics")


def _bars(rows: list[dict[str, Any]]) -> Figure:
    figure, axes = style.new_figure(6, 2.8)
    width = 0.8 / len(rows)
    for i, row in enumerate(rows):
        axes.bar(np.arange(len(THIRDS)) + (i - (len(rows) - 1) / 2) * width, [row[third] or 0 for third in THIRDS],
                 width, color=style.PALETTE[i], label=row["method"])
    axes.set_xticks(range(len(THIRDS)), THIRDS)
    axes.set(ylabel="macro-F1", ylim=(0, None))
    axes.legend()
    return figure


def _codes(report: Report, folder: Path) -> None:
    saved, names = load_npz(folder / "predictions.npz"), load_npz(folder / "classes.npz")
    if saved is None or names is None:
        return
    truth, said = saved["labels"], saved["model_said"]
    if truth.ndim == 1:
        truth, said = (text_metrics.one_hot(a, len(names["codes"])) for a in (truth, said))
    counted = text_metrics.counts(truth, said)
    each = text_metrics.class_f1(counted)
    order = [c for c in np.argsort(each, kind="stable") if counted[2, c]][:WORST]
    report.section("The codes it does worst on", f"The {WORST} of the lowest F1 among those that the test part has.")
    report.table([{"code": str(names["codes"][c]), "name": str(names["names"][c]), "F1": float(each[c]),
                   "training texts": int(saved["counts"][c]), "test texts": int(counted[2, c]),
                   "given": int(counted[1, c]), "right": int(counted[0, c])} for c in order],
                 caption="Worst codes.", name="worst")


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

"""The report of a sweep over classifiers of texts: every method beside plain fine-tuning, for rare and frequent codes.

Of the settings that were tried of one method the best on the development part stands for it. Differences are between
the means over seeds; their intervals and p come from drawing the test texts anew, the same for both methods.
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from analysis import sweep_report
from analysis.report import style
from analysis.report.generic import read_run
from analysis.report.html import Report
from analysis.text2tree_report import THIRDS, Arrays, decisions, spelled
from jaxmodels.errors import UserError
from jaxmodels.text2tree.tree import LabelTree
from train import text_metrics
from train.runtime.files import load_npz
from train.text2tree_config import OURS
from train.text_labels import tree_from

PLAIN, TFIDF = "plain", "TF-IDF"
NUMBERS = {"micro-F1": "micro_f1", "macro-F1": "macro_f1", "tail macro-F1": "macro_f1_tail"}
DRAWS = 1000


@dataclasses.dataclass(frozen=True)
class Method:
    """One row. variant: the chosen of as many as were tried; results, and what was said bool[n, K], by seed; truth is
    the same for all methods that are compared."""

    name: str
    tried: int
    variant: str
    results: dict[str, dict[str, Any]]
    said: dict[str, np.ndarray]
    truth: np.ndarray
    own: str = "model"  # under which name its numbers stand in the results

    def values(self, key: str) -> np.ndarray:
        """Of one metric, at the threshold that was tuned if there is one: a value a seed."""
        return np.array([results.get(f"test.{self.own}.{prefix(results)}{key}", np.nan)
                         for results in self.results.values()])

    def class_f1(self) -> np.ndarray:
        """float[K], the mean over seeds."""
        return np.mean([text_metrics.class_f1(text_metrics.counts(self.truth, said)) for said in self.said.values()], 0)


def prefix(results: dict[str, Any]) -> str:
    return "tuned_" if "test.model.tuned_macro_f1" in results else ""


def build(sweep_dir: str | Path) -> Path:
    """Writes report.html into a sweep's folder; returns its path."""
    folder = Path(sweep_dir)
    config, results, _ = read_run(folder)
    trials, unfinished = sweep_report.read_trials(folder)
    about = config.get("config") or {}
    report = Report(f"{about.get('experiment')}: {about.get('grid')}", sweep_report.status(results, trials, unfinished))
    if not trials:
        report.text("No trial is complete yet.")
        return report.save(folder / "report.html")
    found, classes, train_counts = read_methods(folder, trials)
    plain = found.get(PLAIN)
    rows = [row(method, plain, text_metrics.buckets(train_counts)) for method in found.values()]
    report.section("Methods", "On the test part; ± is the standard deviation over seeds (n - 1). Of several settings "
                   "of one method the one of the best macro-F1 on the development part stands here. " + (
                       "Differences are from plain fine-tuning: 95 % intervals and p, the share of draws of the test "
                       "texts in which the method is not better." if plain else "Without a trial of method.name=plain "
                       "there is nothing to take differences from."))
    report.table(rows, caption="One row a method.", name="methods")
    if plain and "text2tree" in found:
        report.text(verdict(*(next(row for row in rows if row["method"] == name) for name in ("text2tree", PLAIN))))
    _buckets(report, list(found.values()), train_counts)
    ours = next((found[name] for name in OURS if name in found), None)
    if plain and ours:
        _tree(report, ours, plain, classes)
    report.section("Every trial", "Each has its own report in its folder.")
    report.table([{"variant": variant, "seed": seed, **{name: results.get(f"test.model.{prefix(results)}{key}")
                                                        for name, key in NUMBERS.items()},
                   "epochs": results.get("epochs"), "minutes": results.get("seconds", 0) / 60}
                  for variant, seeds in trials.items() for seed, (results, _) in seeds.items()], name="trials")
    return report.save(folder / "report.html")


def read_methods(folder: Path, trials: sweep_report.Trials) -> tuple[dict[str, Method], LabelTree, np.ndarray]:
    """(methods by name, plain first and TF-IDF last; the tree; training texts of each class).

    Trials on other test texts than the first trial's are left out: nothing about them can be compared.
    """
    variants: dict[str, dict[str, dict[str, Path]]] = {}
    for variant, seeds in trials.items():
        for seed in seeds:
            place = folder / variant / f"seed-{seed}"
            name = read_run(place)[0]["config"]["method"]["name"]
            variants.setdefault(name, {}).setdefault(variant, {})[seed] = place
    first = next(place for seeds in variants.values() for places in seeds.values() for place in places.values())
    base, classes = (load_npz(first / f"{name}.npz") for name in ("predictions", "classes"))
    if base is None or classes is None:
        raise UserError(f"{first}: predictions.npz or classes.npz is missing or damaged; remove the trial and run the "
                        "sweep again")
    truth, tfidf = decisions(base, "tfidf")
    found = {}
    for name in sorted(variants, key=lambda name: name != PLAIN):
        chosen = max(variants[name], key=lambda variant: np.mean([dev_score(lines) for _, lines in
                                                                  trials[variant].values()]))
        said = {seed: saved for seed, place in variants[name][chosen].items()
                if (saved := _said(place, truth)) is not None}
        if said:
            found[name] = Method(name, len(variants[name]), chosen, {seed: trials[chosen][seed][0] for seed in said},
                                 said, truth)
    one = next(iter(next(iter(found.values())).results.items()))
    found[TFIDF] = Method(TFIDF, 1, "", dict([one]), {one[0]: tfidf}, truth, "tfidf")
    return found, tree_from(classes), base["counts"]


def dev_score(lines: list[dict[str, Any]]) -> float:
    """The best macro-F1 on the development part, which is what a trial chose its model by."""
    return max((line["dev_macro_f1"] for line in lines if "dev_macro_f1" in line), default=0.0)


def _said(place: Path, truth: np.ndarray) -> np.ndarray | None:
    saved: Arrays | None = load_npz(place / "predictions.npz")
    if saved is None:
        return None
    own, said = decisions(saved, "model")
    return said if np.array_equal(own, truth) else None


def row(method: Method, plain: Method | None, masks: dict[str, np.ndarray]) -> dict[str, Any]:
    """What the table says of a method."""
    out: dict[str, Any] = {"method": method.name, "settings tried": method.tried, "setting": method.variant,
                           "seeds": len(method.said)}
    for name, key in NUMBERS.items():
        values = method.values(key)
        out |= {name: float(values.mean()), f"± {name}": float(values.std(ddof=1)) if len(values) > 1 else None}
    for name, mask in (("macro-F1", None), ("tail macro-F1", masks["tail"])):
        tested = compared(method, plain, mask) if plain and method is not plain else {}
        out |= {f"{name} - plain": tested.get("difference"), f"{name}, low": tested.get("low"),
                f"{name}, high": tested.get("high"), f"{name}, p": tested.get("p")}
    return out


def compared(method: Method, plain: Method, classes: np.ndarray | None) -> dict[str, float]:
    """`paired_bootstrap` of the means over seeds: seeds that both have, or all of the one with more where one has but
    one (TF-IDF has no chance in it). Seeds lie side by side as further classes, so a text is drawn for all at once."""
    common = [seed for seed in method.said if seed in plain.said]
    if min(len(method.said), len(plain.said)) == 1:
        pairs = [(a, b) for a in method.said.values() for b in plain.said.values()]
    else:
        pairs = [(method.said[seed], plain.said[seed]) for seed in common]
    if not pairs:
        return {}
    return text_metrics.paired_bootstrap(
        np.tile(plain.truth, len(pairs)), *(np.hstack(side) for side in zip(*pairs, strict=True)), draws=DRAWS,
        classes=None if classes is None else np.tile(classes, len(pairs)))


def verdict(ours: dict[str, Any], plain: dict[str, Any]) -> str:
    """What was to be shown (text2tree.md section 13), and whether it was."""
    whole, tail = (ours[key] - plain[key] for key in ("macro-F1", "tail macro-F1"))
    met = whole >= 0 and tail > 0
    return (f"**Text2Tree against plain fine-tuning: {'' if met else 'not '}as expected.** Its mean macro-F1 is "
            f"{'not below' if whole >= 0 else 'below'} that of plain ({whole:+.4f}), that of the tail third is "
            f"{'above' if tail > 0 else 'not above'} it ({tail:+.4f})" + (
                "." if ours["seeds"] >= 3 else f"; with {ours['seeds']} seed{'s' if ours['seeds'] > 1 else ''} this "
                "says little: take 3."))


def _buckets(report: Report, found: list[Method], train_counts: np.ndarray) -> None:
    masks, rows = text_metrics.buckets(train_counts), []
    for method in found:
        seeds = len(method.said)
        ends = text_metrics.bootstrap_f1(np.tile(method.truth, seeds), np.hstack(list(method.said.values())),
                                         {name: np.tile(mask, seeds) for name, mask in masks.items()}, draws=DRAWS)
        for bucket in masks:
            low, high = ends[f"macro_f1_{bucket}"]
            if not np.isnan(low):
                rows.append({"method": method.name, "codes": bucket, "macro-F1": float(np.mean(
                    method.values(f"macro_f1_{bucket}"))), "low": low, "high": high})
    report.section("Rare and frequent codes", "Macro-F1, the mean over seeds, of thirds of the codes by their number "
                   "of training texts, and of bins of that number. Lines are 95 % intervals over the test texts.")
    for title, thirds in (("thirds", True), ("bins of training texts", False)):
        shown = [row for row in rows if (row["codes"] in THIRDS) == thirds]
        report.figure(_points(shown), f"Macro-F1, {title}.", shown, title, f"Macro-F1 of {title}, every method")


def _points(rows: list[dict[str, Any]]) -> Figure:
    """A line a method, a panel a bucket: there are more methods than colours that can be told apart."""
    methods, groups = (list(dict.fromkeys(row[key] for row in rows)) for key in ("method", "codes"))
    figure, panels = style.new_figure(1.6 + 2 * len(groups), 0.8 + 0.22 * len(methods), columns=len(groups),
                                      sharey=True, squeeze=False)
    for axes, group in zip(panels[0], groups, strict=True):
        for row in (row for row in rows if row["codes"] == group):
            place = methods.index(row["method"])
            colour = style.PALETTE[1 if row["method"] in (PLAIN, TFIDF) else 0]
            axes.plot([row["low"], row["high"]], [place, place], color=colour, linewidth=1)
            axes.plot(row["macro-F1"], place, "o", color=colour)
        axes.set(title=spelled(group))
    panels[0][0].set_yticks(range(len(methods)), methods)
    panels[0][0].invert_yaxis()
    return figure


def _tree(report: Report, ours: Method, plain: Method, tree: LabelTree) -> None:
    """Every node as a stripe over the codes below it, coloured by their mean gain."""
    there = ours.truth.any(0)
    gain = np.where(there, ours.class_f1() - plain.class_f1(), np.nan)
    order = np.lexsort(tree.paths.T[::-1])  # depth first: the codes below a node lie side by side
    paths = tree.paths[order, 1:].T  # [D, K]
    values, rows = np.full(paths.shape, np.nan), []
    for node in np.unique(paths[paths >= 0]):
        level, below = int(tree.depth[node]), (paths == node).any(0)
        inside = gain[order][below]
        mean = float(np.nanmean(inside)) if not np.isnan(inside).all() else None
        values[level - 1, below] = np.nan if mean is None else mean
        rows.append({"level": level, "code": tree.names[node], "name": tree.name_of(int(node)),
                     "codes": int(below.sum()), "gain": mean})
    figure, axes = style.new_figure(8, 0.9 + 0.4 * len(values))
    style.heat_map(axes, values, [f"level {level}" for level in range(1, len(values) + 1)], label="gain", centred=True)
    axes.set(xlabel="codes, in the order of the tree")
    report.section("Where in the tree", f"The F1 of each code with {ours.name} less that with plain fine-tuning, means "
                   "over seeds; of a node above codes, the mean of theirs.")
    report.figure(figure, "Gain over plain fine-tuning, from the top of the tree to the codes.", rows, "gain",
                  "The label tree, each node coloured by its gain")
    rows = sorted((row for row in rows if row["gain"] is not None), key=lambda row: -row["gain"])
    report.table(rows, caption="Every node of which the test part has a code.", name="nodes")

"""The report of a sweep over classifiers of texts: every method beside plain fine-tuning, for rare and frequent codes.

Of the settings that were tried of one method the best on the development part stands for it. Differences are between
the means over seeds; their intervals and p come from drawing the test texts anew, the same for both methods.
"""

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from analysis import sweep_report
from analysis.report import style
from analysis.report.generic import read_run
from analysis.report.html import Report
from analysis.text2tree_report import THIRDS, decisions, spelled
from jaxmodels.errors import UserError
from jaxmodels.text2tree.tree import LabelTree
from train import text_metrics
from train.runtime.files import load_npz
from train.text2tree_config import OURS
from train.text_labels import tree_from

PLAIN, TFIDF = "plain", "TF-IDF"
NUMBERS = {"macro-F1": "macro_f1", "micro-F1": "micro_f1", "tail macro-F1": "macro_f1_tail", "P@5": "p_at_5"}
TESTED = ("macro-F1", "tail macro-F1", "micro-F1")
RANKINGS = ("p_at_5",)  # which no threshold changes
DRAWS = 1000


@dataclasses.dataclass(frozen=True)
class Method:
    """One row: a variant of a method, the chosen of as many as were tried where it stands for the method.

    By seed: results; drawn, its F1s on resampled texts (`text_metrics.resampled_f1`), the same ones for all that are
    compared; each float[K], F1 of the classes; dev, the macro-F1 on the development part by which its model was chosen.
    """

    name: str
    variant: str
    results: dict[str, dict[str, Any]]
    drawn: dict[str, dict[str, np.ndarray]]
    each: dict[str, np.ndarray]
    dev: dict[str, float]
    tried: int = 1
    own: str = "model"  # under which name its numbers stand in the results

    def values(self, key: str, tuned: bool = True, seeds: Iterable[str] | None = None) -> np.ndarray:
        """Of one metric, a value a seed; tuned: at the threshold that was tuned, if there is one, else at 0.5."""
        chosen = self.results.values() if seeds is None else [self.results[seed] for seed in seeds]
        return np.array([results.get(f"test.{self.own}.{prefix(results) if tuned and key not in RANKINGS else ''}{key}",
                                     np.nan) for results in chosen])

    def class_f1(self) -> np.ndarray:
        """float[K], the mean over seeds."""
        return np.mean(list(self.each.values()), 0)


@dataclasses.dataclass(frozen=True)
class Found:
    """methods: by name, plain first and TF-IDF last. variants: every one of every method. there bool[K]: the classes
    that the test part has."""

    methods: dict[str, Method]
    variants: tuple[Method, ...]
    tree: LabelTree
    train_counts: np.ndarray
    there: np.ndarray


def prefix(results: dict[str, Any]) -> str:
    return "tuned_" if "test.model.tuned_macro_f1" in results else ""


def build(sweep_dir: str | Path) -> Path:
    """Writes report.html into a sweep's folder; returns its path."""
    folder = Path(sweep_dir)
    config, results, _ = read_run(folder)
    trials, unfinished = sweep_report.read_trials(folder)
    report = Report(sweep_report.title(config, results), sweep_report.status(results, trials, unfinished))
    if not trials:
        report.text("No trial is complete yet.")
        return report.save(folder / "report.html")
    found = read_methods(folder, trials)
    methods, plain = list(found.methods.values()), found.methods.get(PLAIN)
    several = any(prefix(results) for seeds in trials.values() for results, _ in seeds.values())
    rows = [row(method) for method in methods]
    report.section("Methods", "On the test part; ± is the standard deviation over seeds (n - 1). Of several settings "
                   "of one method the one of the best macro-F1 on the development part stands here." + (
                       " A code is given above one threshold, the best of 19 for macro-F1 on the development part, "
                       "TF-IDF's too: micro-F1 is told where it was not tuned for. P@5 has no threshold."
                       if several else "") + what_is_read(folder, trials))
    report.table(rows, caption="One row a method.", name="methods")
    if plain and "text2tree" in found.methods:
        report.text(verdict(*(next(row for row in rows if row["method"] == name) for name in ("text2tree", PLAIN))))
    _differences(report, methods, plain, found.methods[TFIDF])
    if len(found.variants) > len(methods) - 1:
        _variants(report, found.variants, plain)
    if several:
        report.section("At a threshold of 0.5", "The same models, without a threshold that was tuned.")
        report.table([{"method": method.name} | spread(method, TESTED, tuned=False) for method in methods],
                     caption="One row a method.", name="untuned")
    _buckets(report, methods, found.train_counts)
    ours = next((found.methods[name] for name in OURS if name in found.methods), None)
    if plain and ours:
        _tree(report, ours, plain, found)
    report.section("Every trial", "Each has its own report in its folder.")
    report.table([_trial(variant, seed, *trial) for variant, seeds in trials.items() for seed, trial in seeds.items()],
                 name="trials")
    return report.save(folder / "report.html")


def read_methods(folder: Path, trials: sweep_report.Trials) -> Found:
    """Trials on other test texts than the first trial's are left out: nothing about them can be compared."""
    places = {(variant, seed): folder / variant / f"seed-{seed}" for variant, seeds in trials.items() for seed in seeds}
    first = next(iter(places.values()))
    base, classes = (load_npz(first / f"{name}.npz") for name in ("predictions", "classes"))
    if base is None or classes is None:
        raise UserError(f"{first}: predictions.npz or classes.npz is missing or damaged; remove the trial and run the "
                        "sweep again")
    truth, tfidf = decisions(base, "tfidf")
    masks = text_metrics.buckets(base["counts"])

    def measured(said: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
        return (text_metrics.resampled_f1(truth, said, masks, draws=DRAWS),
                text_metrics.class_f1(text_metrics.counts(truth, said)))

    variants: dict[str, list[Method]] = {}
    for variant, seeds in trials.items():
        here: dict[str, tuple] = {}
        for seed in seeds:
            saved = load_npz(places[variant, seed] / "predictions.npz")
            own, said = (None, None) if saved is None else decisions(saved, "model")
            if np.array_equal(own, truth):
                results, lines = seeds[seed]
                here[seed] = results, *measured(said), dev_score(results, lines)
        if here:
            name = read_run(places[variant, next(iter(here))])[0]["config"]["method"]["name"]
            fields = [dict(zip(here, values, strict=True)) for values in zip(*here.values(), strict=True)]
            variants.setdefault(name, []).append(Method(name, variant, *fields))
    found = {}
    for name in sorted(variants, key=lambda name: name != PLAIN):
        best = max(variants[name], key=lambda method: np.mean(list(method.dev.values())))
        found[name] = dataclasses.replace(best, tried=len(variants[name]))
    seed, results = next(iter(next(iter(found.values())).results.items()))
    drawn, each = measured(tfidf)
    found[TFIDF] = Method(TFIDF, "", {seed: results}, {seed: drawn}, {seed: each}, {}, own="tfidf")
    every = tuple(method for methods in variants.values() for method in methods)
    return Found(found, every, tree_from(classes), base["counts"], truth.any(0))


def dev_score(results: dict[str, Any], lines: list[dict[str, Any]]) -> float:
    """The macro-F1 on the development part of the model that was kept."""
    return next((line["dev_macro_f1"] for line in lines if line["step"] == results.get("chosen_step")
                 and "dev_macro_f1" in line), 0.0)


def what_is_read(folder: Path, trials: sweep_report.Trials) -> str:
    """Of a text, by the models and by TF-IDF."""
    data = [read_run(folder / variant / f"seed-{seed}")[0]["config"].get("data", {})
            for variant, seeds in trials.items() for seed in seeds]
    lengths = sorted({one["length"] for one in data if one.get("chunks") == 1})
    if not lengths:
        return ""
    return (f" TF-IDF reads whole texts, a model with data.chunks=1 their first {' or '.join(map(str, lengths))} "
            "tokens (data.length): where texts are longer, part of a difference from TF-IDF is that.")


def row(method: Method) -> dict[str, Any]:
    """What the table says of a method."""
    return {"method": method.name, **spread(method), "seeds": len(method.results), "settings tried": method.tried,
            "setting": method.variant}


def spread(method: Method, names: Iterable[str] = tuple(NUMBERS), tuned: bool = True) -> dict[str, Any]:
    """Means and standard deviations over seeds of the numbers that there are."""
    out: dict[str, Any] = {}
    for name in names:
        values = method.values(NUMBERS[name], tuned)
        if not np.isnan(values).all():
            out |= {name: float(values.mean()), f"± {name}": float(values.std(ddof=1)) if len(values) > 1 else None}
    return out


def compared(method: Method, base: Method, name: str) -> dict[str, float] | None:
    """`paired_bootstrap` of the means over the seeds that both have; TF-IDF, in which there is no chance, against all
    seeds of the other. None where they share no seed, and of a number that there is not."""
    seeds: list[Iterable[str]] = [method.results, base.results]
    if TFIDF not in (method.name, base.name):
        common = [seed for seed in method.results if seed in base.results]
        seeds = [common, common]
    if not seeds[0]:
        return None
    sides = list(zip((method, base), seeds, strict=True))
    means = [one.values(NUMBERS[name], seeds=some).mean() for one, some in sides]
    if np.isnan(means).any():
        return None
    drawn = [np.mean([one.drawn[seed][NUMBERS[name]] for seed in some], 0) for one, some in sides]
    return text_metrics.paired_bootstrap(means[0] - means[1], *drawn)


def _differences(report: Report, methods: list[Method], *bases: Method | None) -> None:
    report.section("Differences", "Between means over the seeds that both have; from TF-IDF, in which there is no "
                   "chance, over all. Intervals of 95 % and p, the share of draws in which the method is not better, "
                   "come from drawing the test texts anew, the same for both. They do not hold the spread over seeds: "
                   "what is smaller than the ± above may be the seeds' doing, however small its p, and one seed "
                   "does not show it. Each p is by itself: of many comparisons one in twenty is below 0.05 by "
                   "chance." + (
                       "" if bases[0] else " Without a trial of method.name=plain there are none from plain "
                       "fine-tuning."))
    for base in filter(None, bases):
        rows = [{"method": method.name, "number": name, **tested} for method in methods for name in TESTED
                if method is not base and (tested := compared(method, base, name))]
        what = "plain fine-tuning" if base.name == PLAIN else base.name
        report.table(rows, caption=f"From {what}.", name=f"from-{base.name}")


def _variants(report: Report, variants: tuple[Method, ...], plain: Method | None) -> None:
    base = plain or variants[0]
    report.section("Every variant", "Also those that were not chosen, in the order of their methods; differences are "
                   f"from the variant `{base.variant}`, as above.")
    rows = [{"variant": one.variant, "method": one.name, "seeds": len(one.results),
             "development macro-F1": float(np.mean(list(one.dev.values()))), **spread(one)} for one in variants]
    report.table(rows, caption="Means over seeds and their spread.", name="variants")
    rows = [{"variant": one.variant, "number": name, **tested} for one in variants for name in TESTED
            if one.variant != base.variant and (tested := compared(one, base, name))]
    report.table(rows, caption=f"Differences from {base.variant}.", name="variants-differences")


def _trial(variant: str, seed: str, results: dict[str, Any], lines: list[dict[str, Any]]) -> dict[str, Any]:
    """What the last table says of a trial."""
    numbers = {name: results.get(f"test.model.{'' if key in RANKINGS else prefix(results)}{key}")
               for name, key in NUMBERS.items()}
    return {"variant": variant, "seed": seed, **{name: value for name, value in numbers.items() if value is not None},
            "development macro-F1": dev_score(results, lines),
            **({"threshold": results.get("test.model.threshold")} if prefix(results) else {}),
            "epochs": results.get("epochs"), "minutes": results.get("seconds", 0) / 60}


def verdict(ours: dict[str, Any], plain: dict[str, Any]) -> str:
    """What was to be shown (text2tree.md section 13), and whether it was."""
    if "tail macro-F1" not in ours:
        return "The test part has no code of the tail third, for which Text2Tree is meant: take more texts to test on."
    whole, tail = (ours[key] - plain[key] for key in ("macro-F1", "tail macro-F1"))
    seeds = min(ours["seeds"], plain["seeds"])
    met = whole >= 0 and tail > 0
    return (f"**Text2Tree against plain fine-tuning: {'' if met else 'not '}as expected.** Its mean macro-F1 is "
            f"{'not below' if whole >= 0 else 'below'} that of plain ({whole:+.4f}), that of the tail third is "
            f"{'above' if tail > 0 else 'not above'} it ({tail:+.4f})" + (
                "." if seeds >= 3 else f"; with {seeds} seed{'s' if seeds > 1 else ''} this says little: take 3."))


def _buckets(report: Report, found: list[Method], train_counts: np.ndarray) -> None:
    rows = []
    for method in found:
        for bucket in text_metrics.buckets(train_counts):
            key = f"macro_f1_{bucket}"
            low, high = text_metrics.interval(np.mean([drawn[key] for drawn in method.drawn.values()], 0))
            if not np.isnan(low):
                rows.append({"method": method.name, "codes": bucket, "macro-F1": float(np.mean(method.values(key))),
                             "low": low, "high": high})
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


def _tree(report: Report, ours: Method, plain: Method, found: Found) -> None:
    """Every node as a stripe over the codes below it, coloured by their mean gain."""
    tree = found.tree
    gain = np.where(found.there, ours.class_f1() - plain.class_f1(), np.nan)
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

"""The report of an enzyme classification: the model beside its floors on every set, recall by class, training."""

from pathlib import Path
from typing import Any

from analysis.report import style
from analysis.report.generic import curves, flat_rows, is_number, read_run
from analysis.report.html import Report
from train.enzyme_floors import NAMES

METHODS = {"model": "encoder", "majority": "commonest class", "logistic": "composition, logistic regression",
           "neighbour": "most similar known sequence"}
LEVELS, TERMS = ("level_4", "level_3", "level_2", "level_1"), ("fmax", "aupr")  # metrics of `train.enzyme_transfer`
EC = ("oxidoreductases", "transferases", "hydrolases", "lyases", "isomerases", "ligases", "translocases")


def build(run_dir: str | Path) -> Path:
    """Writes report.html into the run's folder; returns its path."""
    folder = Path(run_dir)
    config, results, lines = read_run(folder)
    report = Report(str(config.get("name") or folder.name), f"Status: {results.get('status', 'nothing written yet')}.")
    rows = score_rows(results)
    if rows:
        start = results.get("pretrained", "none")
        report.section("The encoder beside its floors", f"Pre-trained: {start}. Macro-F1, not accuracy, is the number "
                       "to watch: the classes are of very unequal size. Intervals: 95 %, bootstrap over proteins.")
        differences = difference_rows(results)
        if differences:
            report.text(verdict(rows, results))
        score_table(report, rows, "Every set and method.", "scores")
        if differences:
            report.table(differences, {"setting": "setting", "set": "set", "floor": "floor",
                                       "difference": "encoder less floor", "interval": "95 %"},
                         "Macro-F1 less that of each floor, the same proteins drawn for both.", "differences")
        _figure(report, rows)
        report.section("Recall by class", "On the test part.")
        recalls = recall_rows(results)
        report.table(recalls, {"setting": "setting", "ec": "EC", "name": "class",
                               **{m: METHODS[m] for m in METHODS}, "interval": "95 % (encoder)"},
                     "Share of each class that is found.", "recall")
    _whole_numbers(report, transfer_rows(results))
    if lines:
        report.section("Training", f"{len(lines)} steps; the model of step {results.get('chosen_step', '?')} was kept, "
                       "by macro-F1 on the validation part.")
        curves(report, {"": lines})
    report.section("What was run", "All of it is in `config.json` and `results.json`.")
    report.table(flat_rows(results), {"key": "number", "value": "value"}, "All results.", "results")
    report.table(flat_rows(config), {"key": "setting", "value": "value"}, "The resolved config.", "config")
    return report.save(folder / "report.html")


def score_rows(results: dict[str, Any]) -> list[dict[str, Any]]:
    """One row for each setting, set and method that results.json holds."""
    rows = []
    for key, n in results.items():
        setting, _, rest = key.partition(".")
        name, _, last = rest.rpartition(".")
        if last != "n" or not is_number(n) or "." in name:
            continue
        for method, label in METHODS.items():
            at = f"{setting}.{name}.{method}."
            if f"{at}macro_f1" not in results:
                continue
            row = {"setting": setting, "set": name, "n": n, "method": label, "kind": method}
            for metric in ("macro_f1", "accuracy"):
                low, high = results[f"{at}{metric}_low"], results[f"{at}{metric}_high"]
                row |= {metric: results[at + metric], f"{metric}_interval": f"{low:.3f} to {high:.3f}",
                        f"{metric}_low": low, f"{metric}_high": high}
            rows.append(row)
    return rows


def score_table(report: Report, rows: list[dict[str, Any]], caption: str, name: str) -> None:
    """Rows of `score_rows` as a table."""
    report.table(rows, {"setting": "setting", "set": "set", "n": "proteins", "method": "method",
                        "macro_f1": "macro-F1", "macro_f1_interval": "95 %", "accuracy": "accuracy",
                        "accuracy_interval": "95 % (accuracy)"}, caption, name)


def verdict(rows: list[dict[str, Any]], results: dict[str, Any]) -> str:
    """Where the encoder's macro-F1 beats every floor, where it is below one, and where that cannot be told: by the
    differences, the same proteins drawn for both."""
    told: dict[str, list[str]] = {"above every floor": [], "below a floor": [], "not to be told from a floor": []}
    for setting, name in dict.fromkeys((row["setting"], row["set"]) for row in rows):
        ends = [[results[f"{at}_low"], results[f"{at}_high"]] for floor in NAMES
                if f"{(at := f'{setting}.{name}.model_less_{floor}.macro_f1')}_low" in results]
        if ends:
            where = ("above every floor" if all(low > 0 for low, _ in ends) else
                     "below a floor" if any(high < 0 for _, high in ends) else "not to be told from a floor")
            told[where].append(f"{name} ({setting})")
    return "The encoder's macro-F1, by 95 % intervals of the differences: " + "; ".join(
        f"**{where}** on {', '.join(sets)}" for where, sets in told.items() if sets) + "."


def difference_rows(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The encoder's macro-F1 less that of each floor, of every setting and set."""
    rows = []
    for key, value in results.items():
        at, _, last = key.rpartition(".")
        setting, _, rest = at.partition(".")
        name, _, floor = rest.rpartition(".model_less_")
        if name and last == "macro_f1":
            rows.append({"setting": setting, "set": name, "floor": METHODS[floor], "difference": value,
                         "interval": f"{results[key + '_low']:+.3f} to {results[key + '_high']:+.3f}"})
    return rows


def transfer_rows(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Whole EC numbers from the nearest known protein: a row for each setting, set and likeness (`enzyme_transfer`)."""
    rows: dict[tuple[str, str, str], dict[str, Any]] = {}
    for key, value in results.items():
        match key.split("."):
            case [setting, name, ("neighbour" | "embedding") as kind, metric] if metric in (*LEVELS, *TERMS):
                row = rows.setdefault((setting, name, kind), {"setting": setting, "set": name, "nearest by":
                                                              "words" if kind == "neighbour" else "encoder"})
                row[metric] = value
    return list(rows.values())


def _whole_numbers(report: Report, rows: list[dict[str, Any]]) -> None:
    if not rows:
        return
    report.section("Whole EC numbers", "Those of the known protein that is most alike, by four-letter words in common "
                   "or by the encoder's mean hidden state. No intervals.")
    for metrics, caption, name in ((LEVELS, "CARE: the share of proteins whose number agrees that far.", "care"),
                                   (TERMS, "DeepFRI's chains, all of them and by their identity to its "
                                    "training part: protein-centric Fmax, macro AUPR.", "terms")):
        if mine := [row for row in rows if metrics[0] in row]:
            report.table(mine, ("setting", "set", "nearest by", *metrics), caption, name)


def recall_rows(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Recall of each class on the test part, a row for each setting and class."""
    rows = []
    for setting in ("strict", "easy"):
        for c, name in enumerate(EC, 1):
            values = {m: results.get(f"{setting}.test.{m}.recall_{c}") for m in METHODS}
            if values["model"] is not None:
                at = f"{setting}.test.model.recall_{c}"
                rows.append({"setting": setting, "ec": c, "name": name, **values,
                             "interval": f"{results[at + '_low']:.3f} to {results[at + '_high']:.3f}"})
    return rows


def _figure(report: Report, rows: list[dict[str, Any]]) -> None:
    groups = list(dict.fromkeys((row["setting"], row["set"]) for row in rows))
    figure, axes = style.new_figure(7, 1.2 + 0.42 * len(groups))
    for i, (method, label) in enumerate(METHODS.items()):
        mine = {(row["setting"], row["set"]): row for row in rows if row["kind"] == method}
        at = [y + 0.18 * (i - 1.5) for y, group in enumerate(groups) if group in mine]
        known = [mine[group] for group in groups if group in mine]
        spread = [[row["macro_f1"] - row["macro_f1_low"] for row in known],
                  [row["macro_f1_high"] - row["macro_f1"] for row in known]]
        spread = [[max(value, 0) for value in side] for side in spread]
        axes.errorbar([row["macro_f1"] for row in known], at, xerr=spread, fmt="o", markersize=4,
                      color=style.PALETTE[i % len(style.PALETTE)], label=label)
    axes.set(yticks=range(len(groups)), yticklabels=[f"{name}, {setting}" for setting, name in groups],
             xlabel="macro-F1", xlim=(0, None))
    axes.invert_yaxis()
    figure.legend(ncols=2, loc="outside lower center")
    report.figure(figure, "Macro-F1 with 95 % intervals.", rows, "macro-f1")

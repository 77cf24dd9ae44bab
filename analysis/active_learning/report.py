"""The study's report, from its run folder alone, finished or not."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from analysis import ner_report
from analysis.active_learning import curves
from analysis.active_learning.claims import statements
from analysis.active_learning.config import FULL, STRATEGIES, StudyConfig
from analysis.active_learning.study import Records, read_records
from analysis.report import style
from analysis.report.generic import flat_rows, is_number, read_run
from analysis.report.html import Report
from train.runtime.config import from_dict

PROTOCOL = """
The labels of a corpus are uncovered sentence by sentence; the cost is words. The first set is drawn, and is the same
for every strategy of a seed. In each round a strategy chooses sentences of the pool with the tagger of the round
before, and training goes on with all that is labelled: as many gradient steps for every strategy, whatever the length
of the sentences that it picks. Words and characters of the tables are those of the text of the whole pool, and the tags
those of its labels. No development part is used, neither to stop nor to calibrate; the test part is scored after every
round, and nothing is chosen by it.
"""


def build(run_dir: str | Path) -> Path:
    """Writes report.html; returns its path."""
    folder = Path(run_dir)
    about, results, _ = read_run(folder)
    cfg = from_dict(StudyConfig, about["config"])
    records, full = read_records(cfg, folder)
    reference = float(np.mean([one.f1 for one in full.values()])) if full else None
    report = Report(str(about.get("name") or folder.name), f"Status: {results.get('status', 'nothing yet')}.")
    if records:
        _claims(report, records, reference, results)
        _curves(report, records, reference, cfg)
        _picks(report, records)
        _types(report, records, full)
    _taggers(report, folder, cfg, records)
    report.section("How it was done", PROTOCOL + "\n\n" + "\n".join(
        f"- `{name}`: {STRATEGIES[name]}." for name in cfg.strategies))
    report.section("What was run")
    report.table(flat_rows(results), {"key": "number", "value": "value"}, "All results.", "results")
    report.table(flat_rows(about), {"key": "setting", "value": "value"}, "The resolved config.", "config")
    return report.save(folder / "report.html")


def _claims(report: Report, records: Records, reference: float | None, results: Mapping[str, Any]) -> None:
    report.section("What can be said", "Supported: in every seed, of at least three. Not supported: the opposite in "
                   "every seed. Everything else is not decidable by this run.")
    cards = [("F1 on all labels", reference, "the same model, mean over seeds")] if reference else []
    cards += [(f"F1, {name}", results[f"{name}.f1"], f"at {100 * results[f'{name}.share']:.0f} % of the words")
              for name in records if is_number(results.get(f"{name}.f1")) and is_number(results.get(f"{name}.share"))]
    report.number_cards(cards)
    rows = statements(records, reference)
    report.table(rows, {"name": "claim", "verdict": "verdict"}, "Each claim, by a short name.", "claims")
    report.text("\n".join(f"- `{row['name']}`, **{row['verdict']}**: {row['claim']} *Why:* {row['why']}."
                          for row in rows))


def _curves(report: Report, records: Records, reference: float | None, cfg: StudyConfig) -> None:
    report.section("Learning curves")
    points = [{"strategy": name, "seed": seed, "round": one.round, "words": one.words, "share": one.share, "f1": one.f1,
               "precision": one.precision, "recall": one.recall}
              for name, seeds in records.items() for seed, rounds in seeds.items() for one in rounds]
    report.figure(curve_figure(records, reference), "F1 on the test part over the share of the pool's words that is "
                  "labelled; lines: mean over seeds, bands: lowest to highest seed. Grey lines: 95 % and 99 % of the "
                  "F1 on all labels.", points, "curves", "F1 over labelled words by strategy")
    each, by_strategy = curves.summaries(records, reference, cfg.known_f1)
    heads = {"to_95": "words to 95 %", "to_99": "words to 99 %", "to_95_known": "words to 95 % of the best known",
             "to_99_known": "words to 99 % of the best known"}
    told = [{"strategy": row["strategy"], "seeds": row["seeds"], **{
        head: _reached(row, key) for key, head in heads.items() if f"{key}_seeds" in row},
        "area": _spread(row, "area"), "area above random": _spread(row, "gain_area"),
        "F1 at the end": _spread(row, "f1"), "above random": _spread(row, "gain")} for row in by_strategy]
    report.table(told, caption="Mean ± standard deviation over seeds. Words: share of the pool's, on the line between "
                 "two rounds, and where the first set is enough at most its share; area: mean F1 over the shares "
                 "that all have; above random: of the same seed, at the last common share.", name="summaries")
    others = [row for row in by_strategy if row["strategy"] != "random" and row.get("gain") is not None]
    for name, rows, told in (("f1", by_strategy, "F1 at a share of the words"), ("gain", others, "F1 above random "
                             "choice of the same seed at a share of the words")):
        shares = [share for share in curves.SHARES if any(curves.at_share(name, share) in row for row in rows)]
        if shares:
            report.table([{"strategy": row["strategy"], **{
                f"{100 * share:.0f} %": _spread(row, curves.at_share(name, share)) for share in shares}}
                for row in rows], caption=f"{told}, mean ± standard deviation over seeds, where every seed has come so "
                "far.", name=f"{name}-at-shares")
    names = {"share": "share at the end", "f1": "F1 at the end", "gain": "above random at the end", **heads,
             "gain_area": "area above random", **{
                 curves.at_share(key, share): f"{head} {100 * share:.0f} %" for share in curves.SHARES
                 for key, head in (("f1", "F1 at"), ("gain", "above random at"))}}
    report.table(each, {key: names.get(key, key) for key in dict.fromkeys(key for row in each for key in row)},
                 "Every seed.", "seeds")


def curve_figure(records: Records, reference: float | None) -> Figure:
    figure, axes = style.new_figure(ner_report.PHONE, 3.6)
    for i, (name, seeds) in enumerate(records.items()):
        rounds = min(len(one) for one in seeds.values())
        share = np.array([[one.share for one in rounds_[:rounds]] for rounds_ in seeds.values()]).mean(0)
        f1 = np.array([[one.f1 for one in rounds_[:rounds]] for rounds_ in seeds.values()])
        line = style.line(i)
        axes.plot(100 * share, f1.mean(0), marker="o", markersize=3, label=name, **line)
        axes.fill_between(100 * share, f1.min(0), f1.max(0), color=line["color"], alpha=0.15, linewidth=0)
    for target in curves.TARGETS if reference else ():
        axes.axhline(target * reference, color=style.INK, linewidth=0.8, alpha=0.5)
        axes.text(0.01, target * reference, f"{100 * target:.0f} %", fontsize=8, transform=axes.get_yaxis_transform(),
                  va="bottom" if target == max(curves.TARGETS) else "top")
    axes.set(xlabel="labelled words, % of the pool's", ylabel="F1")
    figure.legend(loc="outside lower center", ncols=3)
    return figure


def _picks(report: Report, records: Records) -> None:
    report.section("What each strategy picks", "Of each round after the first set, which is the same for all.")
    rows = curves.picks(records)
    figure, axes = style.new_figure(ner_report.PHONE, 8.4, rows=4)
    panels = (("length", "words in a sentence"), ("density", "entities in 100 words"),
              ("empty", "share of sentences without entities"), ("entities", "entities labelled so far"))
    for panel, (key, title) in zip(axes.flat, panels, strict=True):
        for i, name in enumerate(records):
            mine = [row for row in rows if row["strategy"] == name and (row["round"] or key == "entities")]
            panel.plot([row["round"] for row in mine], [row[key] for row in mine], marker="o", label=name,
                       **style.line(i))
        panel.set(title=title, xlabel="round")
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    report.figure(figure, "Means over seeds.", rows, "picks", "Length, entity density and empty sentences by round")
    heads = {"strategy": "strategy", "round": "round", "share": "share of the words", **dict(panels),
             "selection_seconds": "seconds of choosing", "training_seconds": "seconds of training"}
    report.table(rows, heads, "Means over seeds. A strategy's first choice compiles its programs.", "rounds")
    shared = curves.overlap(records)
    if shared:
        last = max(row["round"] for row in shared)
        names = list(records)
        table = np.eye(len(names))
        for row in shared:
            if row["round"] == last:
                i, j = names.index(row["first"]), names.index(row["second"])
                table[i, j] = table[j, i] = row["jaccard"]
        figure, axes = style.new_figure(1.7 + 0.5 * len(names), 1.2 + 0.4 * len(names))
        style.heat_map(axes, table, names, names, "Jaccard", vmin=0, vmax=1)
        report.figure(figure, f"How far two strategies have chosen the same sentences by round {last}: common ones "
                      "over all, without the first set. The download has every round.", shared, "overlap",
                      "Overlap of the chosen sentences")


def _types(report: Report, records: Records, full: Mapping[int, Any]) -> None:
    ends = {name: [rounds[-1] for rounds in seeds.values()] for name, seeds in records.items()}
    ends |= {FULL: list(full.values())} if full else {}
    kinds = sorted({kind for rounds in ends.values() for one in rounds for kind in one.types})
    report.section("By type")
    report.table([{"strategy": name, **{kind: _plus_minus([one.types.get(kind, 0.0) for one in rounds])
                                        for kind in kinds}} for name, rounds in ends.items()],
                 caption="F1 of each type after the last round, mean ± standard deviation over seeds.", name="types")


def _taggers(report: Report, folder: Path, cfg: StudyConfig, records: Records) -> None:
    """Errors, confidences and sentences, of the first seed's taggers after the last round."""
    found = {name: ner_report.read_predictions(folder / name / "seed0" / "predictions.jsonl")
             for name in (*cfg.strategies, FULL)}
    found = {name: predictions for name, predictions in found.items() if predictions}
    if not found:
        return
    counts = {name: ner_report.error_counts(predictions)[0] for name, predictions in found.items()}
    best = max(records, key=lambda name: np.mean([rounds[-1].f1 for rounds in records[name].values()]), default=FULL)
    best = best if best in found else next(iter(found))
    ner_report.errors_section(report, found[best], f"{best}, first seed")
    report.table([{"strategy": name, **{told: counts[name][kind] for kind, told in ner_report.ERRORS.items()}}
                  for name in found], caption="Errors of every strategy after its last round, first seed.",
                 name="errors-by-strategy")
    sure = {name: ner_report.events(predictions) for name, predictions in found.items()}
    ner_report.reliability_section(report, sure, "Confidences as the models give them: nothing was fitted, for that "
                                   "needs labels.")
    ner_report.examples_section(report, found[best], f"{best}, first seed")


def _spread(row: Mapping[str, Any], key: str) -> str | None:
    value, sd = row.get(key), row.get(f"{key}_sd")
    return None if value is None else f"{value:.3f}" + ("" if sd is None else f" ± {sd:.3f}")


def _reached(row: Mapping[str, Any], key: str) -> str:
    value, sd = row.get(key), row.get(f"{key}_sd")
    if value is None:
        return f"reached by {row[f'{key}_seeds']} of {row['seeds']} seeds" if row[f"{key}_seeds"] else "not reached"
    return f"{100 * value:.1f}" + ("" if sd is None else f" ± {100 * sd:.1f}") + " %"


def _plus_minus(values: list[float]) -> str:
    return f"{np.mean(values):.3f}" + (f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else "")

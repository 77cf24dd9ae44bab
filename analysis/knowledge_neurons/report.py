"""The study's report, from its run folder alone."""

from pathlib import Path
from typing import Any

from analysis.enzyme_report import score_rows, score_table
from analysis.knowledge_neurons import figures
from analysis.report.generic import flat_rows, read_run
from analysis.report.html import Report, percent
from train.enzyme import CLASSES
from train.runtime.files import read_json

PROTOCOL = """
The protocol is ours. Of the study that asked these questions first (Nori et al. 2023, arXiv 2312.10770) only the claims
of the abstract are known here: nothing below reproduces its numbers or contradicts them.

- Scores come from training proteins alone; the curves are of test proteins. A neuron that is not kept has one value at
  all tokens, 0 or its mean over the training part; the classifier is untouched and, but for one table, nothing is
  retrained.
- `random_matched` draws as many neurons from every site and layer as `ig_gate` takes, `random_matched_activation` as
  many as `activation` does; `bottom` takes the lowest scores of `ig_gate`.
- One pre-training, several fine-tunings of it that differ by their seed. Numbers are means over the fine-tunings, ±
  the standard deviation between them; a random method draws masks of its own for each. Intervals are 95 % bootstrap
  intervals of the mean when test proteins, and random masks, are drawn anew; a claim is supported only where every
  fine-tuning agrees too. Another pre-training may differ by more.
- Pre-training reads the sequences, without labels, of the whole corpus: homologs of test proteins are among them
  (docs/proteins.md has the counts). The labels of the strict training part share no cluster with a test protein; the
  easy one (`enzyme.settings=easy`) adds homologs of test proteins.
- What `bottom` and the methods that no statement reads lose when they are dropped is not asked.
- Keeping random neurons with the others at 0 fails quickly, for the norms' statistics shift; mean ablation is the
  fairer comparison.
"""
KEYS = """
**Queries and keys have equal totals under the zero baseline.** With all queries, or all keys, of a layer at 0, its
attention is uniform: the target is the same number, so by completeness the contributions of q and those of k of a layer
add up to the same. A finding that keys are special can then come only from how the total is spread over the neurons.

**Ranking by quantiles within a site and layer keeps the same share of every site and layer**, so that its enrichment is
1 (but for rounding) whatever the scores are: it cannot speak for any site. `activation_scaled`, the activation over the
mean of its site and layer, also takes the scale of a site away and can; the statement about keys is judged by it.

Rotary positions turn the two coordinates of a pair of q or k into each other: `ig_gate_pairs` gives each of the two
half of their sum.
"""
COST = """
Compilation is in the times of the first fine-tuning, not in those of the last, whose programs are there. Peak memory is
that of the whole process up to the end of the path, training included: it can only rise down the table. Errors are
relative to the change of the target along a path (or to a hundredth of the target, where that is more): the mean over
all fine-tunings, and the worst path of all. Of single sites some paths change the target by almost nothing, and their
errors are large in this measure. Conductance has none: it is complete for no site by itself. captum's time and memory
on the same model, side by side with ours in one run:
`jaxmodels bench attribution`.
"""
FIRST = "seed0"  # whose costs are shown in full, and whose sets from outside were tested


def build(run_dir: str | Path) -> Path:
    """Writes report.html of a finished or interrupted study; returns its path."""
    folder = Path(run_dir)
    config, results, _ = read_run(folder)
    tables = read_json(folder / "tables.json")
    report = Report(str(config.get("name") or folder.name), f"Status: {results.get('status', 'nothing yet')}.")
    if tables:
        _claims(report, tables)
    report.section("How it was done", PROTOCOL)
    _training(report, folder, config)
    if tables:
        _curves(report, tables)
        _sites(report, tables)
        _retrained(report, tables)
        _where(report, tables)
        _reliability(report, tables)
        _specificity(report, tables)
        _motifs(report, tables)
        _sequences(report, tables)
    _cost(report, results, int(results.get("fine_tunings", 1)))
    report.section("What was run")
    report.table(flat_rows(results), {"key": "number", "value": "value"}, "All results.", "results")
    report.table(flat_rows(config), {"key": "setting", "value": "value"}, "The resolved config.", "config")
    return report.save(folder / "report.html")


def _claims(report: Report, tables: dict[str, Any]) -> None:
    full = tables["full"]
    report.section("What can be said", "Supported: everything that the claim needs holds, every interval and every "
                   "fine-tuning. Not supported: one thing that it needs is refuted, the interval wholly on the other "
                   "side and every fine-tuning agreeing in that. Everything else is not decidable, and so is all "
                   "behaviour of a single fine-tuning, or of a classifier that is not better than naming the commonest "
                   "class, or than itself without neurons.")
    report.number_cards([("macro-F1 of the whole model", full["macro_f1"],
                          f"{full['macro_f1_low']:.3f} to {full['macro_f1_high']:.3f}"),
                         ("of the commonest class", full["commonest_macro_f1"]),
                         *((f"of none of the neurons, {name} ablation", full[f"none_{name}_macro_f1"])
                           for name in ("zero", "mean") if f"none_{name}_macro_f1" in full)])
    # The reasons are prose: in a third column they would be cut off on a phone, as verdicts are in the second.
    report.table(tables["claims"], {"verdict": "verdict", "claim": "claim"}, "Each claim.", "claims")
    report.text("\n".join(f"- **{row['verdict']}**: {row['claim']} *Why:* {row['why']}." for row in tables["claims"]))
    if tables.get("both"):
        report.table(tables["both"], {"method": "method", "control": "beside", "enough": "enough (keeps more)",
                                      "needed": "needed (costs more)", "together": "together"},
                     "Enough and needed are two things.", "both")


def _training(report: Report, folder: Path, config: dict[str, Any]) -> None:
    found = [read_json(place / "results.json") or {} for place in tuned_folders(folder, config.get("config") or config)]
    rows = score_rows(found[0]) if found else []
    if not rows:
        return
    report.section("The classifier beside its floors", "The whole of every set, proteins up to 1,022 residues, by the "
                   "first fine-tuning. The curves below read fewer and shorter ones (`keep.proteins`, `score.length`).")
    score_table(report, rows, "EC classification.", "classification")
    others = [{"fine-tuning": number, "macro-F1": row["macro_f1"], "95 %": row["macro_f1_interval"],
               "accuracy": row["accuracy"], "validation macro-F1": one.get("validation_macro_f1")}
              for number, one in enumerate(found) for row in score_rows(one)
              if row["kind"] == "model" and row["set"] == "test"]
    if len(others) > 1:
        report.table(others, caption="The encoder on the test part, every fine-tuning.", name="fine-tunings")


def tuned_folders(folder: Path, config: dict[str, Any]) -> list[Path]:
    """Where the results of the fine-tunings are: stages, or the runs that `tuned` names."""
    tuned = str(config.get("tuned", "here"))
    if tuned != "here":
        return [Path(one.strip()).expanduser() for one in tuned.split(",") if one.strip()]
    return [folder / f"seed{number}" / "enzyme" for number in range(int(config.get("seeds", 1)))]


def _curves(report: Report, tables: dict[str, Any]) -> None:
    full, floor = tables["full"]["macro_f1"], tables["full"]["commonest_macro_f1"]
    for direction, title in (("keep", "Enough: only these neurons are kept"),
                             ("drop", "Needed: these neurons are lost")):
        report.section(title)
        rows = [row for row in tables["curves"] if row["direction"] == direction]
        report.figure(figures.keeping(rows, direction, full, floor), "Macro-F1 on test proteins; bands: 95 %. Black "
                      "line: the whole model; grey: the commonest class. Dotted: controls.", rows,
                      name=f"curves-{direction}", alt=f"Macro-F1 over the share of neurons, {direction}")
        shares = list(dict.fromkeys(row["share"] for row in rows))
        by = {(r["ablation"], r["method"], r["share"]): r for r in rows}
        areas = [row for row in tables["areas"] if row["direction"] == direction]
        report.table([{"ablation": a["ablation"], "method": a["method"],
                       **{percent(share): _spread(by[a["ablation"], a["method"], share]) for share in shares},
                       "area": a["area"], "area 95 %": f"{a['low']:.3f} to {a['high']:.3f}",
                       **({"enough": a["enough"]} if direction == "keep" else {})} for a in areas],
                     caption="Accuracy (± standard deviation over fine-tunings) by share; area under macro-F1 on the "
                             "logarithmic axis" + ("; enough: the smallest share from which on at least 95 % of the "
                                                   "whole model's macro-F1 is kept." if direction == "keep" else "."),
                     name=f"shares-{direction}")
        report.table([_each(row) for row in tables["differences"] if row["direction"] == direction],
                     ("ablation", "method", "control", "difference", "low", "high", "each"),
                     caption="Area less that of a control, the same proteins drawn for both.",
                     name=f"differences-{direction}")
        if shares := [row for row in tables.get("by_share", ()) if row["direction"] == direction]:
            report.figure(figures.beside_controls(shares, direction), "Macro-F1 less that of a control with as many "
                          "neurons; bands: 95 %, the same proteins drawn for both.", shares,
                          f"by-share-{direction}", f"Difference to controls over the share of neurons, {direction}")


def _spread(row: dict[str, Any]) -> str:
    return f"{row['accuracy']:.3f}" + (f" ± {row['accuracy_sd']:.3f}" if row["accuracy_sd"] is not None else "")


def _sites(report: Report, tables: dict[str, Any]) -> None:
    rows = tables["sites"]
    if not rows:
        return
    report.section("A share of one site", "Of one site a share of the neurons is kept, over all layers; every other "
                   "site is whole.")
    report.figure(figures.site_budgets(rows, tables["full"]["macro_f1"]), "Macro-F1 on test proteins, a panel a site. "
                  "Line at the top: the whole model.", rows, "sites", "Macro-F1 over the kept share of each site")
    report.table(rows, caption="By site; low and high: 95 %; sd: between fine-tunings.", name="sites")


def _retrained(report: Report, tables: dict[str, Any]) -> None:
    rows = tables["retrained"]
    if rows:
        report.section("After an epoch of retraining", "Only these neurons are kept, the others are 0, and the first "
                       "fine-tuning goes on for one epoch with the mask in place: the mask stays, all parameters move.")
        report.table([{**row, **{f"{name}_range": _range(row, name) for name in ("before", "after", "gain")}}
                      for row in rows],
                     {"method": "method", "share": "kept", "before": "macro-F1 before", "before_range": "95 %",
                      "after": "after", "after_range": "95 % (after)", "gain": "gain", "gain_range": "95 % (gain)",
                      "accuracy_after": "accuracy after"},
                     f"Whole model: {tables['full']['each'][0]:.3f}.", "retrained")


def _range(row: dict[str, Any], name: str) -> str:
    return f"{row[f'{name}_low']:.3f} to {row[f'{name}_high']:.3f}"


def _motifs(report: Report, tables: dict[str, Any]) -> None:
    report.section("Motifs", "The summed contribution of the neurons of the highest integrated gradients, residue by "
                   "residue, inside the matches of a motif and at as many drawn positions of the same residue types in "
                   "the same proteins. A match of so short a pattern is often no motif: chance matches weaken the "
                   "effect. Serine hydrolases are looked for in EC 3 alone. A match lies in one piece and the drawn "
                   "positions do not: as far as neighbours contribute alike, p is too small. Each p is by itself: of "
                   "several motifs and fine-tunings one in twenty is below 0.05 by chance.")
    report.table(tables["motifs"], {"motif": "motif", "pattern": "pattern", "fine_tuning": "fine-tuning",
                                    "proteins": "proteins", "matches": "residues", "inside": "inside",
                                    "elsewhere": "elsewhere", "effect": "effect (sd)", "p": "p", "verdict": "verdict"},
                 "Contributions over the mean absolute one of the protein; p: one-sided, by permutation.", "motifs")


def _sequences(report: Report, tables: dict[str, Any]) -> None:
    rows = tables["sequences"]
    if not rows:
        return
    report.section("Proteins, residue by residue", "What the same neurons contribute to the right class at each "
                   "residue, in the first fine-tuning: one correctly classified test protein a class. Orange: for the "
                   "class, blue: against it; full colour at the protein's largest. Underlined: a match of one of the "
                   "motifs.")
    for row in rows:
        report.coloured(row["residues"], row["values"], f"{row['name']}, EC {row['ec']}", set(row["marked"]))


def _each(row: dict[str, Any]) -> dict[str, Any]:
    return row | {"each": " / ".join("–" if value is None else f"{value:+.3f}" for value in row["each"])}


def _where(report: Report, tables: dict[str, Any]) -> None:
    rows = tables["where"]
    report.section("Where the best neurons are", KEYS)
    shares = list(dict.fromkeys(row["share"] for row in rows))
    share = shares[len(shares) // 2]
    for ranking in ("ig_gate", "ig_site", "activation", "activation_scaled"):
        if any(row["ranking"] == ranking for row in rows):
            shown = [row for row in rows if (row["kind"], row["ranking"], row["share"]) == ("cell", ranking, share)]
            report.figure(figures.places(rows, ranking, share), "Density over the kept share; a dot: in every "
                          "fine-tuning outside of where 95 % of shuffled labels fall.", shown,
                          name=f"enrichment-{ranking}", alt=f"Enrichment by site and layer, {ranking}")
    for kind in ("site", "layer"):
        report.table([row for row in rows if row["kind"] == kind],
                     ("ranking", "share", kind, "density", "enrichment", "least", "most", "low", "high"),
                     caption=f"Enrichment by {kind}, the mean over fine-tunings, the least and the most; low and high: "
                     "95 % of shuffled labels.", name=f"where-{kind}")
    if tables["totals"]:
        report.table(tables["totals"], caption="Sum of the contributions of each site in each layer (mean over "
                     "proteins). Baseline zero: q and k are equal. Baseline mean: fc1 and fc2 are, fc2 being linear in "
                     "fc1.", name="totals")


def _reliability(report: Report, tables: dict[str, Any]) -> None:
    report.section("Would another look choose the same?", "Below a rank correlation of 0.5 between halves, a list of "
                   "neurons is not worth publishing.")
    report.table([_each(row) for row in tables["reliability"]],
                 {"ranking": "ranking", "spearman": "halves, Spearman", "jaccard": "halves, Jaccard",
                  "each": "halves, Spearman in each fine-tuning", "between_spearman": "fine-tunings, Spearman",
                  "between_jaccard": "fine-tunings, Jaccard"},
                 "Between two halves of the training proteins of every class, and between any two fine-tunings: "
                 "Spearman of the scores, Jaccard of the top 1 %. Sites and layers differ in scale, which raises the "
                 "Spearman of all rankings but the scaled ones; halves share families of proteins, which raises all.",
                 "reliability")
    report.table(tables["overlap"], caption="Between rankings of one fine-tuning.", name="overlap")


def _specificity(report: Report, tables: dict[str, Any]) -> None:
    report.section("Neurons of one class")
    names = [f"EC {c + 1}" for c in range(CLASSES)]
    for ablation, one in tables["specificity"].items():
        report.figure(figures.recall_change(one["change"], names), f"Change of recall when the highest neurons of one "
                      f"class are lost ({ablation} ablation). Blank: no scores, or no such protein.",
                      [{"without": a, **dict(zip(names, row, strict=True))}
                       for a, row in zip(names, one["change"], strict=True)], name=f"specificity-{ablation}")


def _cost(report: Report, results: dict[str, Any], fine_tunings: int) -> None:
    rows = []
    for name in (key.removeprefix(f"{FIRST}.seconds_a_protein.") for key in results
                 if key.startswith(f"{FIRST}.seconds_a_protein.")):
        mode, _, baseline = name.partition("-")
        last = f"seed{fine_tunings - 1}"
        mean, worst = ([results[key] for number in range(fine_tunings)
                        if (key := f"seed{number}.completeness_error_{which}.{name}") in results]
                       for which in ("mean", "worst"))
        rows.append({"path": mode, "baseline": baseline or None, "first": results[f"{FIRST}.seconds_a_protein.{name}"],
                     "last": results.get(f"{last}.seconds_a_protein.{name}") if last != FIRST else None,
                     "peak": results.get(f"{FIRST}.peak_mib.{name}"),
                     "mean": sum(mean) / len(mean) if mean else None, "worst": max(worst, default=None)})
    if rows:
        report.section("Cost", COST)
        report.table(rows, {"path": "path", "baseline": "baseline", "first": "seconds a protein, first fine-tuning",
                            "last": "last fine-tuning", "peak": "peak memory so far (MiB)",
                            "mean": "mean completeness error", "worst": "worst"},
                     f"All neurons of all six sites, on {results.get('device')}.", "cost")

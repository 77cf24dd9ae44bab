"""The atlas's report: what a linguist reads. Built from the run folder alone."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from analysis.atlas import figures
from analysis.atlas.classes import CLASSES
from analysis.atlas.families import Curve, Dendrogram
from analysis.atlas.intervals import Interval
from analysis.atlas.rules import BEST, MAIN
from analysis.report.html import Report, percent
from train.runtime.files import load_npz, read_json

NEURONS = "neuron contribution uniform"

LIMITS = """
- Genealogy, script and shared tokens are hard to tell apart; the partial Mantel test says how much is left of genealogy
  when the others are accounted for.
- An expert here is a group of {expert_size} neurons that was cut out afterwards; the model was trained without experts.
- Contribution |h|·‖down‖ is an upper bound of what a neuron adds, not a causal effect; the switching-off tables are.
- Times are of this machine and this run; they are ratios to the dense model timed in turn.
"""
OF_MODEL = {"smollm2-135m-instruct": """
- SmolLM2 is an English-centred model of 135 million parameters; of many languages here it has seen little, and the
  weights are the 4-bit (Q4_1) ones, de-quantised. Nothing here says that larger or other models behave alike.
"""}
OF_TEXT = {"gettext": """
- The texts are messages of a web framework: short, technical, similar in content.
"""}


def build(directory: str | Path) -> Path:
    """Writes report.html of a finished (or interrupted) atlas and returns its path."""
    directory = Path(directory)
    results = read_json(directory / "results.json") or {}
    about = read_json(directory / "config.json") or {}
    stages = ("profiles", "lape", "pruning", "pruning_means", "recovery", "speed")
    data = {name: load_npz(directory / f"{name}.npz") for name in stages}
    listed = read_json(directory / "languages.json") or {"languages": [], "left_out": []}
    languages = listed["languages"]
    config = about.get("config", {})
    report = Report("Language atlas", f"Which experts of {config.get('model')} serve which language")
    _summary(report, results, languages, config)
    if data["profiles"] is not None:
        _maps(report, data["profiles"], languages, config, results)
        _families(report, data["profiles"], languages, results)
        _classes(report, data["profiles"], results)
    if data["lape"] is not None:
        _lape(report, data["lape"], languages, config, results)
    if data["pruning"] is not None and data["pruning_means"] is not None:
        _pruning(report, *(_rows(data[name] or {}) for name in ("pruning", "pruning_means", "speed")), results)
    if data["recovery"] is not None:
        _recovery(report, _rows(data["recovery"]), config, results)
    if data["speed"] is not None:
        _speed(report, _rows(data["speed"]))
    report.section("Honest limits")
    limits = (OF_MODEL.get(config.get("model"), ""), OF_TEXT.get(config.get("text", {}).get("source"), ""),
              LIMITS.format(expert_size=config.get("split", {}).get("expert_size")))
    report.text("".join(part.strip() + "\n" for part in limits if part))
    _method(report, results, about, listed)
    return report.save(directory / "report.html")


def names_of(languages: list[dict[str, Any]]) -> list[str]:
    """A name for each; with the code where several share one, as variants do: a column of a download is told by it."""
    known = Counter(x["name"] for x in languages)
    return [x["name"] if known[x["name"]] == 1 else f"{x['name']} ({x['code']})" for x in languages]


def _rows(columns: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    names = list(columns)
    return [dict(zip(names, values, strict=True)) for values in zip(*(columns[n].tolist() for n in names), strict=True)]


def _summary(report: Report, results: dict[str, Any], languages: list[dict[str, Any]], config: dict[str, Any]
             ) -> None:
    cards = [(f"{results.get('languages', len(languages))}", "languages", "with enough text to be profiled")]
    share = config.get("profile", {}).get("main_share", 0.2)
    if (r := results.get(f"split_half_centred_{share:g}")) is not None:
        cards.append((f"{r:.3f}", "split-half r", "of profiles centred over languages, mean"))
    if (d := results.get("family_difference")) is not None:
        cards.append((f"{d:+.2f}", "within − between families", f"mean r; p = {results['family_p']:.4f}"))
    if (n := results.get("nearest_neighbour_in_family")) is not None:
        cards.append((f"{n:.0%}", "nearest neighbour in family", "of languages whose family has another member"))
    if (n := results.get("lape_neurons")) is not None:
        cards.append((f"{n}", "language neurons", "picked by LAPE"))
    report.number_cards([(label, value, note) for value, label, note in cards])
    if results.get("status") not in (None, "complete", "running"):
        report.text(f"**This run is {results['status']}.** The same command finishes it.")


def _maps(report, data, languages, config, results) -> None:
    share = config.get("profile", {}).get("main_share", 0.2)
    f = data[f"frequency_{share:g}"]
    names, families = names_of(languages), [x["family"] or None for x in languages]
    report.section("Which experts each language uses",
                   f"An expert is used by a token if it is among the {percent(share)} that contribute most. 1 is "
                   "chance; rows that look alike are languages that use the same experts.")
    for layer in dict.fromkeys((0, f.shape[1] // 2, f.shape[1] - 1)):
        report.figure(figures.language_map(f[:, layer], names, data["order"], layer, families=families),
                      f"Layer {layer}: how often each language uses each expert, relative to chance.",
                      data=[{"language": n, **{f"expert_{e}": float(v) for e, v in enumerate(row)}}
                            for n, row in zip(names, f[:, layer], strict=True)],
                      name=f"frequency-layer-{layer}", alt=f"Heat map of languages by experts in layer {layer}")
    tag = f"_{share:g}"
    report.text(
        f"Reliability: profiles of two halves of the text agree with r = {results[f'split_half_centred{tag}']:.3f} "
        f"(mean over languages; lowest {results[f'split_half_centred_lowest{tag}']:.3f}) once the mean profile is "
        f"subtracted. Uncentred it is {results[f'split_half_raw{tag}']:.3f}, which says little: all languages "
        f"share most of their profile. Shuffled expert labels stay below {results[f'split_half_floor{tag}']:.3f} in "
        "95 % of shuffles (mean over languages).")


def _families(report, data, languages, results) -> None:
    names, families = names_of(languages), [x["family"] or None for x in languages]
    report.section("Which languages group together",
                   "Similarity is the correlation of profiles centred over languages, all layers together.")
    tree = Dendrogram(data["linkage"], results["cophenetic"], data["order"])
    report.figure(figures.family_tree(tree, names, families), "Average linkage on 1 − r; colours are known families.",
                  name="dendrogram", alt="Dendrogram of languages beside their families")
    report.figure(figures.similarity_map(data["similarity"], data["order"], names, families),
                  "All pairs, in the order of the tree.", name="similarity", alt="Similarity of all pairs of languages",
                  data=[{"language": n, **dict(zip(names, map(float, row), strict=True))}
                        for n, row in zip(names, data["similarity"], strict=True)])
    if "curve" not in data:
        report.text("Fewer than three languages here have a known family: nothing to compare with.")
        return
    curve = Curve(*data["curve"])
    report.figure(figures.depth_curve(curve), "Within-family minus between-family similarity over depth; the band is "
                  "where 95 % of shuffled labels fall.", name="depth", alt="Within minus between over layers",
                  data=[{"layer": i, "difference": float(d), "low": float(lo), "high": float(hi)} for i, (d, lo, hi)
                        in enumerate(zip(curve.difference, curve.low, curve.high, strict=True))])
    rows = [{"family": k.removeprefix("family_").removesuffix("_within"), "r within": v,
             "p": results.get(k.replace("_within", "_p"))}
            for k, v in results.items() if k.startswith("family_") and k.endswith("_within") and k != "family_within"]
    report.table(sorted(rows, key=lambda r: -(r["r within"] or 0)),
                 caption="Mean similarity within each family; p from shuffled labels.", name="families")
    report.table([{"control": k.removeprefix("mantel_r_").replace("_", " "), "r": v,
                   "p": results[k.replace("mantel_r_", "mantel_p_")]}
                  for k, v in results.items() if k.startswith("mantel_r_")],
                 caption="Does family explain similarity when script and shared tokens are accounted for? "
                         "(partial Mantel test)", name="mantel")


def _classes(report, data, results) -> None:
    report.section("Shared and special experts", "An expert counts for a language when it is used more often than "
                   "95 % of all (language, layer, expert) combinations.")
    report.figure(figures.class_counts(data["class_counts"]), "Experts of each layer by who uses them often.",
                  name="classes", alt="Stacked bars of expert classes by layer",
                  data=[{"layer": i, **dict(zip(CLASSES, map(int, row), strict=True))}
                        for i, row in enumerate(data["class_counts"])])
    report.table([{"class": name, **{f"τ = {p} %": int(row[i]) for p, row in
                                     zip((90, 95, 97.5), data["class_sensitivity"], strict=True)}}
                  for i, name in enumerate(CLASSES)], caption="The same at other thresholds.", name="class-sensitivity")


def _lape(report, data, languages, config, results) -> None:
    names = names_of(languages)
    panel = config["prune"]["panel"]
    report.section("Neurons of one language", "Language activation probability entropy picks the "
                   f"{100 * config['profile']['lape_rate']:g} % of neurons whose gates open for few languages "
                   "only. Each row of the matrix switches one language's neurons off.")
    report.figure(figures.language_neurons(data["language"], names), "How many such neurons each language has, by "
                  "layer.", name="lape", alt="Language neurons by language and layer",
                  data=[{"language": n, "neurons": int(v)} for n, v in
                        zip(names, data["language"].sum((1, 2)), strict=True)])
    report.figure(figures.change_matrix(data["change"][0], panel, panel), "Rise of the loss (nats a token) of the "
                  "language in the column when the row's neurons are zero.", name="lape-matrix",
                  alt="Perplexity-change matrix",
                  data=[{"neurons of": a, **dict(zip(panel, map(float, row), strict=True))}
                        for a, row in zip(panel, data["change"][0], strict=True)])
    random = results.get("lape_random_diagonal")
    modes = config["prune"]["interventions"]
    if len(modes) > 1:
        diagonal = np.eye(len(panel), dtype=bool)
        report.table([{"neurons set to": mode, "own language": float(c[diagonal].mean()),
                       "other languages": float(c[~diagonal].mean())} for mode, c in
                      zip(modes, data["change"], strict=True)],
                     caption="Mean rise of the loss, nats a token, by what the neurons are set to.",
                     name="interventions")
    report.text(f"Own language {results['lape_diagonal']:+.3f}, others {results['lape_off_diagonal']:+.3f}; in "
                f"{results['lape_rows_largest_on_diagonal']} of {len(panel)} rows the language itself suffers most."
                + (f" As many random neurons in each layer: {random:+.3f}." if random is not None else ""))


def _pruning(report, rows, means, speed, results) -> None:
    report.section("Keeping only a language's experts", "Excess loss over the whole model on held-out text, mean over "
                   "the panel. Intervals are 95 % bootstrap intervals over texts.")
    shares = sorted({r["share"] for r in rows}, reverse=True)
    found = {(r["scheme"], r["share"], r["own"]): Interval(r["excess"], r["low"], r["high"]) for r in means}
    schemes = list(dict.fromkeys(r["scheme"] for r in means if r["own"]))
    drawn = [s for s in (MAIN, BEST, NEURONS, "random", "lowest frequency") if s in schemes]
    report.figure(figures.quality_curves([100 * s for s in shares],
                                         {s: [found[s, share, True] for share in shares] for s in drawn}, log=True),
                  "Loss against the kept share of the feed-forward layers.", name="quality",
                  alt="Excess loss by kept share and rule",
                  data=[{"scheme": s, "share": share, **found[s, share, True]._asdict()} for s in schemes
                        for share in shares])
    timed = sorted({r["share"] for r in speed} & set(shares), reverse=True)
    if timed and NEURONS in schemes:
        faster = {(r["phase"], r["share"]): r["speedup"] for r in speed}
        for phase in dict.fromkeys(r["phase"] for r in speed):
            report.figure(figures.quality_curves(
                [faster[phase, share] for share in timed], {NEURONS: [found[NEURONS, share, True] for share in timed]},
                x_label=f"speed relative to the dense model ({phase})", title=f"Quality against speed, {phase}"),
                "The models that were timed: single neurons by contribution, not repaired.", name=f"quality-{phase}",
                alt=f"Excess loss against speed-up, {phase}",
                data=[{"share": share, "speedup": faster[phase, share], **found[NEURONS, share, True]._asdict()}
                      for share in timed])
    report.table([{"rule": s, **{f"{percent(share)} kept": found[s, share, True].value for share in shares}}
                  for s in schemes], caption="Excess loss, nats a token, in the language whose list it is.",
                 name="pruning-own")
    report.table([{"rule": s, **{f"{percent(share)} kept": found[s, share, False].value for share in shares}}
                  for s in dict.fromkeys(r["scheme"] for r in means if not r["own"])],
                 caption="The same lists read in other languages: what is lost there.", name="pruning-other")
    panel = len({r["language"] for r in rows})
    report.text("Frequency pruning is clearly better than random pruning (intervals that do not overlap, every seed) "
                "in " + ", ".join(f"{results[f'frequency_beats_random_clearly_{s:g}']} of {panel} languages at "
                                  f"{percent(s)}" for s in shares) + ".")
    report.table(rows, caption="Every measurement.", name="pruning-all")


def _recovery(report, rows, config, results) -> None:
    own = config.get("prune", {}).get("own_tokens")
    distilled = sorted({r["language"] for r in rows if r["step"] == "distilled"})
    report.section("Repairing a pruned model", "Neurons that the others can replace least are kept; the down "
                   "projections are then refitted in closed form, layer by layer, without training. Calibrated on the "
                   f"main texts{' and on what the model writes itself' if own else ''}; tested on: "
                   f"{results.get('recovery_tested_on')}." + (" Distilled: trained further to predict what the whole "
                   f"model predicts ({', '.join(distilled)} only)." if distilled else ""))
    table = []
    for lang in dict.fromkeys(r["language"] for r in rows):
        row: dict[str, Any] = {"language": lang}
        for r in rows:
            if r["language"] == lang:
                row["dense loss"] = r["dense"]
                row[f"{percent(r['share'])} {r['step']}"] = r["excess"]
        table.append(row)
    columns = dict.fromkeys((r["share"], r["step"]) for r in rows)
    table.append({"language": "mean", **{f"{percent(share)} {step}": results[f"recovery_{step}_{share:g}"]
                                         for share, step in columns}})
    report.table(table, caption="Excess loss, nats a token. Means are over the languages that have the column.",
                 name="recovery")


def _speed(report, rows) -> None:
    report.section("Speed", "A statically pruned model is a smaller dense model: no router, no sparse kernel. The "
                   "ceiling is what Amdahl's law allows, from the feed-forward layers' share of the time, measured in "
                   "the same run.")
    drawn = [r for r in rows if r["share"] < 1]
    if drawn:  # speed.shares=1 times the whole model alone
        report.figure(figures.speed_bars([f"{r['phase']}, {percent(r['share'])} kept" for r in drawn],
                                         [r["speedup"] for r in drawn], [r["ceiling"] for r in drawn]),
                      "Speed-up over the dense model, and the most it could be.", name="speed", alt="Speed-up bars",
                      data=rows)
    report.table(rows, caption="Times of this run.", name="speed-table")


def _method(report, results, about, listed) -> None:
    report.section("What was run, and on what")
    report.table(listed["languages"], caption="Languages read. tokens_per_byte: how finely the tokenizer cuts it; "
                 "replaced: invalid UTF-8 sequences.", name="languages")
    if listed["left_out"]:
        report.text("Left out for too little text: " + ", ".join(f"{c} ({n} tokens)" for c, n in listed["left_out"]))
    report.table([{"name": k, "value": v} for k, v in results.items()], caption="Every number of results.json.",
                 name="results")
    plain = {k: v for k, v in about.items() if k != "config"} | {f"config.{k}": v for k, v in
                                                                 about.get("config", {}).items()}
    report.table([{"name": k, "value": v if isinstance(v, (str, int, float)) else json.dumps(v)}
                  for k, v in plain.items()], caption="Configuration, versions and device.", name="run")

"""What can be said of each claim, from the tables of the report.

A claim is *supported* where everything that it needs holds: every interval lies on its side, and every fine-tuning
agrees. It is *not supported* where one thing that it needs is refuted: an interval lies wholly on the other side, and
every fine-tuning agrees in that. Everything else is *not decidable*, and so is all behaviour of a classifier that is
itself too weak for a curve to mean anything, or of which there is only one.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from analysis.knowledge_neurons import where
from analysis.knowledge_neurons.config import StudyConfig
from analysis.knowledge_neurons.methods import JUDGED, PRIMARY, controls
from analysis.knowledge_neurons.tables import Rows
from analysis.report.html import percent

YES, NO, OPEN = "supported", "not supported", "not decidable"
# Rankings of section 5.1 that can speak for or against a site. `activation_scaled` stands in for the ranking by
# quantiles, which keeps the same share of every site and layer by construction.
MASKS = 5  # random ones of all fine-tunings together, below which nothing is said of them
WORDS = {"activation": "high activation", "ig_gate": "high integrated gradients"}
JUDGES = ("activation", "activation_scaled", "ig_site", "ig_site_mean", "ig_gate", "ig_gate_mean")


def statements(cfg: StudyConfig, found: Mapping[str, Any]) -> Rows:
    """One row a claim: name, claim, verdict, why."""
    weak = weakness(found["full"])
    if cfg.fine_tunings < 2:
        weak = weak or "one fine-tuning has no other to agree with"
    rows = []

    def state(name: str, claim: str, judged: tuple[str, str], behaviour: bool = True) -> None:
        verdict, why = (OPEN, f"{weak} ({judged[1]})") if behaviour and weak else judged
        rows.append({"name": name, "claim": claim, "verdict": verdict, "why": why})

    for method in JUDGED:
        for control in controls(method):
            more = "" if control == "random" else (" with the same number in every site and layer: the neurons matter, "
                                                   "not the sites alone")
            state(f"keep.{method}.{control}", f"Neurons of {WORDS[method]} keep more of the classification than random "
                  f"ones{more}.", judged_areas(cfg, found, "keep", method, control))
            state(f"drop.{method}.{control}", f"Losing neurons of {WORDS[method]} costs more than losing random "
                  f"ones{more}.", judged_areas(cfg, found, "drop", method, control))
    state("keys", "Knowledge neurons are dense in the networks that produce the keys of self-attention.",
          judged_site(cfg, found, "k"))
    state("specific", "Losing the neurons of one class costs this class more recall than the others.",
          judged_specificity(cfg, found))
    state("reliable", "The list of neurons does not depend on which half of the training proteins scored it (rank "
          "correlation of at least 0.5, of the scores and of the scores over the mean of their site and layer).",
          judged_reliability(found), behaviour=False)
    return rows


def both(rows: Rows) -> Rows:
    """Of each method and control: are its neurons enough, needed, both? From the rows of `statements`."""
    verdicts, out = {row["name"]: row["verdict"] for row in rows}, []
    for method in JUDGED:
        for control in controls(method):
            enough, needed = (verdicts[f"{direction}.{method}.{control}"] for direction in ("keep", "drop"))
            told = {(YES, YES): "enough and needed", (YES, NO): "enough, not needed", (NO, YES): "needed, not enough",
                    (NO, NO): "neither"}.get((enough, needed), "not decidable in at least one")
            out.append({"method": method, "control": control, "enough": enough, "needed": needed, "together": told})
    return out


def weakness(full: Mapping[str, float]) -> str:
    """Why no behaviour of this classifier can be read; empty if it can. `none_*`: with no neuron, the classifier's head
    reads what is left; a whole model that is no better has nothing for a curve to keep or to lose."""
    floors = {"naming the commonest class": full["commonest_macro_f1"],
              "the same model without its neurons": max(value for name, value in full.items()
                                                        if name.startswith("none_"))}
    worst, floor = max(floors.items(), key=lambda one: one[1])
    low = full["macro_f1_low"]
    return "" if low > floor else (f"the classifier is not better than {worst}: macro-F1 {full['macro_f1']:.3f}, lower "
                                   f"end {low:.3f}, against {floor:.3f}")


def judged_areas(cfg: StudyConfig, found: Mapping[str, Any], direction: str, method: str, control: str
                 ) -> tuple[str, str]:
    """By the difference of areas, under every ablation; of neurons that are lost less area is more loss."""
    rows = [row for row in found["differences"] if (row["direction"], row["method"], row["control"])
            == (direction, method, control)]
    if not rows:
        return OPEN, f"{control} was not run"
    text = "difference of the areas under macro-F1, 95 %: " + "; ".join(
        f"{row['ablation']} ablation {row['difference']:+.3f} ({row['low']:+.3f} to {row['high']:+.3f}; "
        f"{each_of(row)})" for row in rows)
    if len(cfg.keep.ablations) < 2:
        return OPEN, f"{text}; only one of the two ablations was run"
    if (masks := cfg.fine_tunings * cfg.keep.seeds) < MASKS:
        return OPEN, f"{text}; {masks} random masks in all, fewer than {MASKS}"
    return judged(rows, text, 1 if direction == "keep" else -1)


def judged(rows: Sequence[Mapping[str, Any]], text: str, sign: int = 1) -> tuple[str, str]:
    """By intervals (low, high) and the values of each fine-tuning; sign: -1 where a fall is what the claim says."""
    ends = [sorted((sign * row["low"], sign * row["high"])) for row in rows]
    each = [[sign * value for value in row["each"]] for row in rows]
    if all(low > 0 for low, _ in ends):
        if all(value > 0 for values in each for value in values):
            return YES, text
        return OPEN, f"{text}; the fine-tunings disagree in sign"
    if any(high < 0 and max(values) < 0 for (_, high), values in zip(ends, each, strict=True)):
        return NO, f"{text}; the opposite under one ablation at least"
    return OPEN, f"{text}; an interval holds 0, or the fine-tunings disagree"


def each_of(row: Mapping[str, Any]) -> str:
    return "fine-tunings " + ", ".join(f"{value:+.3f}" for value in row["each"])


def judged_site(cfg: StudyConfig, found: Mapping[str, Any], site: str) -> tuple[str, str]:
    """By the rankings of 5.1 at every share: enriched beyond what shuffled labels give, or not."""
    rows = [row for row in found["where"] if row["kind"] == "site" and row["site"] == site]
    told, passed, refuted = [], {}, False
    for ranking in JUDGES:
        mine = [row for row in rows if row["ranking"] == ranking]
        if mine:
            passed[ranking] = all(row["least"] > row["high"] for row in mine)
            never = any(row["most"] <= row["high"] for row in mine)
            refuted |= never
            how = "above" if passed[ranking] else "not above" if never else "in some fine-tunings above"
            told.append(f"{ranking} {' / '.join(format(row['enrichment'], '.2f') for row in mine)} ({how} chance)")
    text = (f"enrichment of {site} at {' / '.join(map(percent, cfg.where.shares))} (mean of the "
            f"fine-tunings; above chance: in each of them at every share; not above: in none at one share): "
            f"{'; '.join(told)}. The ranking by quantiles, which 5.1 "
            "asks for, has an enrichment of 1 in every site by construction and cannot tell; activation_scaled judges "
            "in its place")
    if refuted:
        return NO, f"{text}. The claim must survive every ranking and both baselines"
    if not all(passed.values()):
        return OPEN, f"{text}. The fine-tunings disagree"
    if missing := [ranking for ranking in JUDGES if ranking not in passed]:
        return OPEN, f"{text}. Not run: {', '.join(missing)}"
    return YES, f"{text}. Every ranking agrees"


def judged_specificity(cfg: StudyConfig, found: Mapping[str, Any]) -> tuple[str, str]:
    rows = found["specificity"]
    text = "; ".join(f"{name} ablation: own recall falls by {one['gap']:+.3f} more ({one['low']:+.3f} to "
                     f"{one['high']:+.3f}; {each_of(one)}; among {min(one['classes'])} to {max(one['classes'])} "
                     "classes)" for name, one in rows.items())
    if len(rows) < 2:
        return OPEN, text + "; both ablations are needed" if text else "no two classes have scores and test proteins"
    if any(len(one["each"]) < cfg.fine_tunings for one in rows.values()):
        return OPEN, f"{text}; in other fine-tunings no two classes have scores and test proteins"
    return judged(list(rows.values()), text)


def judged_reliability(found: Mapping[str, Any]) -> tuple[str, str]:
    """By the halves of every fine-tuning. Sites and layers differ in scale, which alone makes all neurons' scores go
    together: the scores over the mean of their cell have to as well."""
    text = "Spearman between halves, and Jaccard of the top 1 %: " + ", ".join(
        f"{row['ranking']} {row['spearman']:.2f}, {row['jaccard']:.2f}" for row in found["reliability"]
        if row["ranking"].startswith("ig_")) + ". Halves share families of proteins, which makes them agree more"
    by = {row["ranking"]: row["each"] for row in found["reliability"]}
    each = np.minimum(*(np.array(by[name], float) for name in (PRIMARY, f"{PRIMARY}_scaled")))
    if np.isnan(each).any():
        return OPEN, "the scores are constant"
    if (each >= where.RELIABLE).all():
        return YES, text
    return (NO, text) if (each < where.RELIABLE).all() else (OPEN, f"{text}; not in every fine-tuning")

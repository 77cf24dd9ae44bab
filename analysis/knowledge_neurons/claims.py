"""What can be said of each claim, from the tables of the report.

A claim is *supported* or *not supported* where every interval that it needs lies on one side and every fine-tuning
agrees, and *not decidable* otherwise, or where the classifier itself is too weak for a curve to mean anything.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from analysis.knowledge_neurons import where
from analysis.knowledge_neurons.config import StudyConfig
from analysis.knowledge_neurons.methods import DRAWN, PRIMARY
from analysis.knowledge_neurons.tables import Rows

YES, NO, OPEN = "supported", "not supported", "not decidable"
# Rankings of section 5.1 that can speak for or against a site. `activation_scaled` stands in for the ranking by
# quantiles, which keeps the same share of every site and layer by construction.
JUDGES = ("activation", "activation_scaled", "ig_site", "ig_site_mean", "ig_gate", "ig_gate_mean")


def statements(cfg: StudyConfig, found: Mapping[str, Any]) -> Rows:
    """One row a claim: name, claim, verdict, why."""
    weak = weakness(found["full"])
    rows = []

    def state(name: str, claim: str, judged: tuple[str, str], behaviour: bool = True) -> None:
        verdict, why = (OPEN, f"{weak} ({judged[1]})") if behaviour and weak else judged
        rows.append({"name": name, "claim": claim, "verdict": verdict, "why": why})

    pairs = [("activation", "random", "Neurons of high activation keep more of the classification than random ones."),
             ("ig_gate", "random", "Neurons of high integrated gradients keep more of it than random ones."),
             ("ig_gate", "random_matched", "They keep more than random ones with the same number in every site and "
              "layer: the neurons matter, not the sites alone.")]
    for method, control, claim in pairs:
        state(f"keep.{method}.{control}", claim, judged_areas(cfg, found, "keep", method, control))
    for control in DRAWN:
        more = " with the same number in every site and layer" if control == "random_matched" else ""
        state(f"drop.ig_gate.{control}", f"Losing neurons of high integrated gradients costs more than losing random "
              f"ones{more}: they are needed, not only enough.", judged_areas(cfg, found, "drop", "ig_gate", control))
    state("keys", "Knowledge neurons are dense in the networks that produce the keys of self-attention.",
          judged_site(cfg, found, "k"))
    state("specific", "Losing the neurons of one class costs this class more recall than the others.",
          judged_specificity(cfg, found))
    state("reliable", "The list of neurons does not depend on which half of the training proteins scored it (rank "
          "correlation of at least 0.5).", judged_reliability(found), behaviour=False)
    return rows


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
    told, passed = [], {}
    for ranking in JUDGES:
        mine = [row for row in rows if row["ranking"] == ranking]
        if mine:
            passed[ranking] = all(row["least"] > row["high"] for row in mine)
            told.append(f"{ranking} {' / '.join(format(row['enrichment'], '.2f') for row in mine)} "
                        f"({'above' if passed[ranking] else 'not above'} chance)")
    text = (f"enrichment of {site} at {' / '.join(f'{share:.0%}' for share in cfg.where.shares)} (mean of the "
            f"fine-tunings; above chance: in each of them): {'; '.join(told)}. The ranking by quantiles, which 5.1 "
            "asks for, has an enrichment of 1 in every site by construction and cannot tell; activation_scaled judges "
            "in its place")
    if not all(passed.values()):
        return NO, f"{text}. The claim must survive every ranking and both baselines"
    if missing := [ranking for ranking in JUDGES if ranking not in passed]:
        return OPEN, f"{text}. Not run: {', '.join(missing)}"
    return YES, f"{text}. Every ranking agrees"


def judged_specificity(cfg: StudyConfig, found: Mapping[str, Any]) -> tuple[str, str]:
    rows = found["specificity"]
    text = "; ".join(f"{name} ablation: own recall falls by {one['gap']:+.3f} more ({one['low']:+.3f} to "
                     f"{one['high']:+.3f}; {each_of(one)})" for name, one in rows.items())
    if len(rows) < 2:
        return OPEN, text + "; both ablations are needed" if text else "no class has scores and test proteins"
    return judged(list(rows.values()), text)


def judged_reliability(found: Mapping[str, Any]) -> tuple[str, str]:
    """By the halves of every fine-tuning."""
    text = "Spearman between halves: " + ", ".join(
        f"{row['ranking']} {row['spearman']:.2f}" for row in found["reliability"] if row["ranking"].startswith("ig_"))
    each = np.array(next(row["each"] for row in found["reliability"] if row["ranking"] == PRIMARY), float)
    if np.isnan(each).any():
        return OPEN, "the scores are constant"
    if (each >= where.RELIABLE).all():
        return YES, text
    return (NO, text) if (each < where.RELIABLE).all() else (OPEN, f"{text}; not in every fine-tuning")

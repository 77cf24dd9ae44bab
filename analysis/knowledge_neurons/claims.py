"""From answers and scores to the tables of the report, and what can be said of each claim.

A claim is *supported* or *not supported* where every interval that it needs lies on one side, and *not decidable*
otherwise, or where the classifier itself is too weak for a curve to mean anything.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from analysis.attribution import SITES
from analysis.knowledge_neurons import selection, where
from analysis.knowledge_neurons.config import StudyConfig
from analysis.knowledge_neurons.keep import (
    DIRECTIONS,
    bootstrap_f1,
    bootstrap_recall,
    interval,
    log_area,
    scores_of,
    smallest_enough,
)
from analysis.knowledge_neurons.methods import DRAWN, PRIMARY
from analysis.knowledge_neurons.neurons import Layout
from analysis.knowledge_neurons.ranking import Found, rankings
from train.enzyme import CLASSES

YES, NO, OPEN = "supported", "not supported", "not decidable"
Rows = list[dict[str, Any]]
Answers = Mapping[tuple[str, str, str], np.ndarray]
# Rankings of section 5.1 that can speak for or against a site. `activation_scaled` stands in for the ranking by
# quantiles, which keeps the same share of every site and layer by construction.
JUDGES = ("activation", "activation_scaled", "ig_site", "ig_site_mean", "ig_gate", "ig_gate_mean")


def tables(cfg: StudyConfig, layout: Layout, found: Found, test: Mapping[str, np.ndarray], answers: Answers,
           special: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Everything that the report shows, as JSON values.

    test: labels [N], full [N] and what `keep` none gives; answers: see `study.load_curves`; special: of each ablation
    [C, N], -1 where a class was not knocked out.
    """
    truth = test["labels"]
    drawn = {key: bootstrap_f1(truth, a, CLASSES, cfg.keep.bootstrap, cfg.seed) for key, a in answers.items()}
    full = bootstrap_f1(truth, test["full"][None, None], CLASSES, cfg.keep.bootstrap, cfg.seed)[:, 0, 0]
    ranked = rankings(found, layout)
    out = {"full": full_model(truth, test, full), "curves": curve_rows(cfg, truth, answers, drawn),
           "areas": area_rows(cfg, drawn, full), "differences": difference_rows(cfg, drawn),
           "where": where_rows(cfg, layout, ranked), "reliability": reliability_rows(found, layout),
           "overlap": where.overlaps(ranked), "totals": total_rows(found, layout),
           "specificity": specificity(cfg, truth, test["full"], special)}
    return out | {"claims": statements(cfg, out)}


def numbers(found: Mapping[str, Any]) -> dict[str, Any]:
    """The flat keys of results.json."""
    out = {f"full.{key}": value for key, value in found["full"].items()}
    for row in found["areas"]:
        at = f"{row['ablation']}.{row['direction']}.{row['method']}"
        out |= {f"area.{at}": row["area"], f"area_sd.{at}": row["sd"]}
        if row["direction"] == "keep":
            out[f"enough.{at}"] = row["enough"]
    out |= {f"reliability.{row['ranking']}": row["spearman"] for row in found["reliability"]}
    out |= {f"enrichment.{row['ranking']}.{row['share']:g}.{row['site']}": row["enrichment"] for row in found["where"]
            if row["kind"] == "site"}
    return out | {f"claim.{row['name']}": row["verdict"] for row in found["claims"]}


# Tables


def full_model(truth: np.ndarray, test: Mapping[str, np.ndarray], drawn: np.ndarray) -> dict[str, float]:
    """macro-F1 of the whole model, of none of its neurons and of the commonest class, on these test proteins."""
    commonest = np.full(len(truth), np.bincount(truth).argmax())
    value, low, high = interval(drawn)
    out = {"macro_f1": value, "macro_f1_low": low, "macro_f1_high": high,
           "accuracy": float((test["full"] == truth).mean()),
           "commonest_macro_f1": float(scores_of(truth, commonest, CLASSES)["macro_f1"])}
    return out | {f"{name}_macro_f1": float(scores_of(truth, a, CLASSES)["macro_f1"]) for name, a in test.items()
                  if name.startswith("none_")}


def curve_rows(cfg: StudyConfig, truth: np.ndarray, answers: Answers, drawn: Mapping[Any, np.ndarray]) -> Rows:
    rows = []
    for (ablation, direction, method), a in answers.items():
        accuracy = scores_of(truth, a, CLASSES)["accuracy"]
        f1 = drawn[ablation, direction, method]
        for i, share in enumerate(cfg.keep.shares):
            value, low, high = interval(f1[:, :, i].mean(1))
            rows.append({"ablation": ablation, "direction": direction, "method": method, "share": share,
                         "macro_f1": value, "low": low, "high": high, "sd": _sd(f1[0, :, i]),
                         "accuracy": float(accuracy[:, i].mean()), "accuracy_sd": _sd(accuracy[:, i]),
                         "seeds": len(a)})
    return rows


def area_rows(cfg: StudyConfig, drawn: Mapping[Any, np.ndarray], full: np.ndarray) -> Rows:
    """Areas under macro-F1 on the logarithmic axis, and the smallest share that is enough (by the seeds' mean)."""
    rows = []
    for (ablation, direction, method), f1 in drawn.items():
        areas = log_area(cfg.keep.shares, f1)
        value, low, high = interval(areas.mean(1))
        enough = smallest_enough(cfg.keep.shares, f1[0].mean(0), full[0]) if direction == "keep" else None
        rows.append({"ablation": ablation, "direction": direction, "method": method, "area": value, "low": low,
                     "high": high, "sd": _sd(areas[0]), "enough": enough})
    return rows


def difference_rows(cfg: StudyConfig, drawn: Mapping[Any, np.ndarray]) -> Rows:
    """Every method's area less that of `random` and `random_matched`, the same proteins drawn for both."""
    rows = []
    for ablation in cfg.keep.ablations:
        for direction in DIRECTIONS:
            areas = {m: log_area(cfg.keep.shares, drawn[ablation, direction, m]).mean(1) for m in cfg.keep.methods}
            for control in DRAWN:
                for method in cfg.keep.methods:
                    if control in areas and method not in DRAWN:
                        value, low, high = interval(areas[method] - areas[control])
                        rows.append({"ablation": ablation, "direction": direction, "method": method,
                                     "control": control, "difference": value, "low": low, "high": high})
    return rows


def where_rows(cfg: StudyConfig, layout: Layout, ranked: Mapping[str, np.ndarray]) -> Rows:
    """Density and enrichment of every ranking and share: by cell, site and layer."""
    rows, names = [], list(SITES)
    for ranking, scores in ranked.items():
        for share in cfg.where.shares:
            kept = selection.top(scores, share, cfg.seed)
            for kind, one in where.enrichment(kept, layout, cfg.where.draws, cfg.seed).items():
                for at in np.ndindex(one.value.shape):
                    site = names[at[0]] if kind != "layer" else None
                    layer = None if kind == "site" else at[-1]
                    rows.append({"ranking": ranking, "share": share, "kind": kind, "site": site, "layer": layer,
                                 "density": float(one.density[at]), "enrichment": float(one.value[at]),
                                 "low": float(one.low[at]), "high": float(one.high[at])})
    return rows


def reliability_rows(found: Found, layout: Layout) -> Rows:
    """Agreement of the scores from the two halves of the training part."""
    halves = [rankings(found, layout, [half]) for half in (0, 1)]
    rows = []
    for name, first in halves[0].items():
        rho, shared = where.agreement(first, halves[1][name])
        rows.append({"ranking": name, "spearman": rho, "jaccard": shared})
    return rows


def total_rows(found: Found, layout: Layout) -> Rows:
    """Mean contribution of each site in each layer to the probability of the class, of paths of single sites."""
    rows = []
    for name, sums in found.paths.items():
        if name.startswith("site-"):
            mean = sums.signed.sum(0) / sums.count.sum()
            totals = np.bincount(layout.cell, weights=mean, minlength=layout.sizes.size).reshape(layout.sizes.shape)
            rows += [{"baseline": name.removeprefix("site-"), "layer": layer,
                      **dict(zip(SITES, totals[:, layer].tolist(), strict=True))} for layer in range(layout.layers)]
    return rows


def specificity(cfg: StudyConfig, truth: np.ndarray, full: np.ndarray, special: Mapping[str, np.ndarray]
                ) -> dict[str, Any]:
    """Of each ablation: change of recall [C, C] (rows: the class whose neurons are lost), and how much more the own
    class loses than the others, with its interval."""
    out = {}
    for ablation, answers in special.items():
        both = np.concatenate([full[None], answers])
        drawn = bootstrap_recall(truth, both, CLASSES, cfg.keep.bootstrap, cfg.seed)
        change = drawn[:, 1:] - drawn[:, :1]
        change[:, answers[:, 0] < 0] = np.nan
        own = np.eye(CLASSES, dtype=bool)
        told = ~np.isnan(change[0]) & own
        mine = told.any(1)
        if not mine.any():
            continue
        others = np.where(own, np.nan, change)[:, mine]
        gap = np.nanmean(others, (1, 2)) - np.nanmean(np.where(own, change, np.nan)[:, mine], (1, 2))
        value, low, high = interval(gap)
        out[ablation] = {"change": change[0].tolist(), "gap": value, "low": low, "high": high}
    return out


def _sd(values: np.ndarray) -> float | None:
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


# Statements


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
    """Why no behaviour of this classifier can be read; empty if it can."""
    low, floor = full["macro_f1_low"], full["commonest_macro_f1"]
    return "" if low > floor else (f"the classifier is not better than naming the commonest class: macro-F1 "
                                   f"{full['macro_f1']:.3f}, lower end {low:.3f}, against {floor:.3f}")


def judged_areas(cfg: StudyConfig, found: Mapping[str, Any], direction: str, method: str, control: str
                 ) -> tuple[str, str]:
    """By the difference of areas, under every ablation; of neurons that are lost less area is more loss."""
    rows = [row for row in found["differences"] if (row["direction"], row["method"], row["control"])
            == (direction, method, control)]
    if not rows:
        return OPEN, f"{control} was not run"
    sign = 1 if direction == "keep" else -1
    ends = [sorted((sign * row["low"], sign * row["high"])) for row in rows]
    text = "difference of the areas under macro-F1, 95 %: " + "; ".join(
        f"{row['ablation']} ablation {row['difference']:+.3f} ({row['low']:+.3f} to {row['high']:+.3f})"
        for row in rows)
    if len(cfg.keep.ablations) < 2:
        return OPEN, f"{text}; only one of the two ablations was run"
    if all(low > 0 for low, _ in ends):
        return YES, text
    if any(high < 0 for _, high in ends):
        return NO, f"{text}; the opposite under one ablation at least"
    return OPEN, f"{text}; an interval holds 0"


def judged_site(cfg: StudyConfig, found: Mapping[str, Any], site: str) -> tuple[str, str]:
    """By the rankings of 5.1 at every share: enriched beyond what shuffled labels give, or not."""
    rows = [row for row in found["where"] if row["kind"] == "site" and row["site"] == site]
    told, passed = [], {}
    for ranking in JUDGES:
        mine = [row for row in rows if row["ranking"] == ranking]
        if mine:
            passed[ranking] = all(row["enrichment"] > row["high"] for row in mine)
            told.append(f"{ranking} {' / '.join(format(row['enrichment'], '.2f') for row in mine)} "
                        f"({'above' if passed[ranking] else 'not above'} chance)")
    quantile = "the ranking by quantiles, which 5.1 asks for, has an enrichment of 1 in every site by construction"
    text = f"enrichment of {site} at {' / '.join(f'{share:.0%}' for share in cfg.where.shares)}: {'; '.join(told)}"
    if not all(passed.values()):
        return NO, f"{text}. A claim must survive every ranking and both baselines"
    if missing := [ranking for ranking in JUDGES if ranking not in passed]:
        return OPEN, f"{text}. Not run: {', '.join(missing)}"
    return OPEN, f"{text}. Every ranking that can tell agrees, but {quantile}, so the claim cannot pass it"


def judged_specificity(cfg: StudyConfig, found: Mapping[str, Any]) -> tuple[str, str]:
    rows = found["specificity"]
    text = "; ".join(f"{name} ablation: own recall falls by {one['gap']:+.3f} more ({one['low']:+.3f} to "
                     f"{one['high']:+.3f})" for name, one in rows.items())
    if len(rows) < 2:
        return OPEN, text + "; both ablations are needed" if text else "no class has scores and test proteins"
    if all(one["low"] > 0 for one in rows.values()):
        return YES, text
    return (NO, text) if any(one["high"] < 0 for one in rows.values()) else (OPEN, f"{text}; an interval holds 0")


def judged_reliability(found: Mapping[str, Any]) -> tuple[str, str]:
    rho = {row["ranking"]: row["spearman"] for row in found["reliability"]}
    text = ", ".join(f"{name} {value:.2f}" for name, value in rho.items() if name.startswith("ig_"))
    value = rho[PRIMARY]
    if np.isnan(value):
        return OPEN, "the scores are constant"
    return (YES if value >= where.RELIABLE else NO), f"Spearman between halves: {text}"

"""From answers and scores to the tables of the report, over all fine-tunings together.

Every number is the mean over the fine-tunings. Intervals are those of this mean when test proteins are drawn anew, the
same for every fine-tuning and method; ``each`` holds the value of every fine-tuning.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

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
from analysis.knowledge_neurons.methods import DRAWN, JUDGED, controls
from analysis.knowledge_neurons.motifs import rows_of as motif_rows
from analysis.knowledge_neurons.neurons import Layout
from analysis.knowledge_neurons.ranking import Found, rankings
from train.enzyme import CLASSES

Rows = list[dict[str, Any]]
Answers = Mapping[tuple[str, str, str], np.ndarray]


class Seen(NamedTuple):
    """Of one fine-tuning. test: labels [N], full [N] and what `keep` none gives; answers: see `tuned.load_curves`;
    special: of each ablation [C, N], -1 where a class was not knocked out; sites, motifs, retrained, sequences: see
    `tuned.site_curves`, `motifs.check`, `retrain.retrained`, `sequences.rows_of`."""

    found: Found
    test: Mapping[str, np.ndarray]
    answers: Answers
    special: Mapping[str, np.ndarray]
    sites: Mapping[tuple[str, str], np.ndarray]
    motifs: Mapping[str, np.ndarray]
    retrained: Mapping[tuple[str, float], Mapping[str, np.ndarray]]
    sequences: Rows


def tables(cfg: StudyConfig, layout: Layout, seen: Sequence[Seen]) -> dict[str, Any]:
    """Everything that the report shows, as JSON values, but the claims."""
    truth = seen[0].test["labels"]
    answers = {key: np.stack([one.answers[key] for one in seen]) for key in seen[0].answers}
    full = np.stack([one.test["full"] for one in seen])
    drawn = {key: resampled(cfg, truth, a) for key, a in answers.items()}
    whole = resampled(cfg, truth, full[:, None, None])[..., 0]
    ranked = [rankings(one.found, layout) for one in seen]
    special = {name: np.stack([one.special[name] for one in seen]) for name in seen[0].special}
    sites = {key: np.stack([one.sites[key] for one in seen]) for key in seen[0].sites}
    return {"full": full_model(truth, [one.test for one in seen], whole),
            "curves": curve_rows(cfg, truth, answers, drawn), "areas": area_rows(cfg, drawn, whole),
            "differences": difference_rows(cfg, drawn), "by_share": share_rows(cfg, drawn),
            "where": where_rows(cfg, layout, ranked), "reliability": reliability_rows(layout, seen, ranked),
            "overlap": overlap_rows(ranked), "totals": total_rows(layout, seen),
            "specificity": specificity(cfg, truth, full, special), "sites": site_rows(cfg, truth, sites),
            "motifs": [row for number, one in enumerate(seen) for row in motif_rows(one.motifs, number)],
            "retrained": retrained_rows(cfg, truth, seen[0].retrained), "sequences": seen[0].sequences}


def numbers(found: Mapping[str, Any]) -> dict[str, Any]:
    """The flat keys of results.json."""
    out = {f"full.{key}": value for key, value in found["full"].items() if key != "each"}
    for row in found["areas"]:
        at = f"{row['ablation']}.{row['direction']}.{row['method']}"
        out |= {f"area.{at}": row["area"], f"area_sd.{at}": row["sd"]}
        if row["direction"] == "keep":
            out[f"enough.{at}"] = row["enough"]
    out |= {f"reliability.{row['ranking']}": row["spearman"] for row in found["reliability"]}
    out |= {f"enrichment.{row['ranking']}.{row['share']:g}.{row['site']}": row["enrichment"] for row in found["where"]
            if row["kind"] == "site"}
    return out | {f"claim.{row['name']}": row["verdict"] for row in found["claims"]}


def resampled(cfg: StudyConfig, truth: np.ndarray, answers: np.ndarray) -> np.ndarray:
    """macro-F1 [1 + draws, S, P] of answers int8[S, R, P, N], the mean over the R masks of every fine-tuning.

    A draw draws the masks anew too. (Of few masks that understates how much other masks would differ.)
    """
    seeds, masks = answers.shape[:2]
    drawn = bootstrap_f1(truth, answers.reshape(seeds * masks, *answers.shape[2:]), CLASSES, cfg.keep.bootstrap,
                         cfg.seed)
    drawn = drawn.reshape(len(drawn), seeds, masks, -1)
    which = np.random.default_rng([cfg.seed, masks]).integers(masks, size=drawn.shape[:3])
    which[0] = np.arange(masks)
    return np.take_along_axis(drawn, which[..., None], 2).mean(2)


def full_model(truth: np.ndarray, tests: Sequence[Mapping[str, np.ndarray]], drawn: np.ndarray) -> dict[str, Any]:
    """macro-F1 of the whole model, of none of its neurons and of the commonest class, on these test proteins."""
    commonest = np.full(len(truth), np.bincount(truth).argmax())
    value, low, high = interval(drawn.mean(1))
    accuracy = [float((test["full"] == truth).mean()) for test in tests]
    out = {"macro_f1": value, "macro_f1_low": low, "macro_f1_high": high, "macro_f1_sd": _sd(drawn[0]),
           "each": drawn[0].tolist(), "accuracy": float(np.mean(accuracy)), "accuracy_sd": _sd(accuracy),
           "commonest_macro_f1": float(scores_of(truth, commonest, CLASSES)["macro_f1"])}
    return out | {f"{name}_macro_f1": float(np.mean([scores_of(truth, test[name], CLASSES)["macro_f1"]
                                                     for test in tests]))
                  for name in tests[0] if name.startswith("none_")}


def curve_rows(cfg: StudyConfig, truth: np.ndarray, answers: Answers, drawn: Mapping[Any, np.ndarray]) -> Rows:
    rows = []
    for (ablation, direction, method), a in answers.items():
        accuracy = scores_of(truth, a, CLASSES)["accuracy"].mean(1)
        f1 = drawn[ablation, direction, method]
        for i, share in enumerate(cfg.keep.shares):
            value, low, high = interval(f1[:, :, i].mean(1))
            rows.append({"ablation": ablation, "direction": direction, "method": method, "share": share,
                         "macro_f1": value, "low": low, "high": high, "sd": _sd(f1[0, :, i]),
                         "accuracy": float(accuracy[:, i].mean()), "accuracy_sd": _sd(accuracy[:, i]),
                         "masks": a.shape[0] * a.shape[1]})
    return rows


def area_rows(cfg: StudyConfig, drawn: Mapping[Any, np.ndarray], full: np.ndarray) -> Rows:
    """Areas under macro-F1 on the logarithmic axis, and the smallest share that is enough (by the mean curve)."""
    rows = []
    for (ablation, direction, method), f1 in drawn.items():
        areas = log_area(cfg.keep.shares, f1)
        value, low, high = interval(areas.mean(1))
        enough = smallest_enough(cfg.keep.shares, f1[0].mean(0), full[0].mean()) if direction == "keep" else None
        rows.append({"ablation": ablation, "direction": direction, "method": method, "area": value, "low": low,
                     "high": high, "sd": _sd(areas[0]), "enough": enough})
    return rows


def difference_rows(cfg: StudyConfig, drawn: Mapping[Any, np.ndarray]) -> Rows:
    """Every method's area less those of its controls, the same proteins drawn for both."""
    areas = {key: log_area(cfg.keep.shares, f1) for key, f1 in drawn.items()}
    return [head | _difference(one - other) for head, one, other in _beside_controls(cfg, areas, cfg.keep.methods)]


def share_rows(cfg: StudyConfig, drawn: Mapping[Any, np.ndarray]) -> Rows:
    """macro-F1 of the two methods that the claims are about less those of their controls, at every share."""
    return [head | {"share": share} | _difference(one[..., i] - other[..., i])
            for head, one, other in _beside_controls(cfg, drawn, JUDGED)
            for i, share in enumerate(cfg.keep.shares[:-1])]


def _beside_controls(cfg: StudyConfig, values: Mapping[Any, np.ndarray], methods: Sequence[str]
                     ) -> Iterator[tuple[dict[str, Any], np.ndarray, np.ndarray]]:
    for ablation, direction, method in itertools.product(cfg.keep.ablations, DIRECTIONS, methods):
        for control in controls(method) if method not in DRAWN else ():
            one, other = (values.get((ablation, direction, name)) for name in (method, control))
            if one is not None and other is not None:
                yield ({"ablation": ablation, "direction": direction, "method": method, "control": control}, one, other)


def _difference(drawn: np.ndarray) -> dict[str, Any]:
    """Of differences [1 + draws, S]."""
    value, low, high = interval(drawn.mean(1))
    return {"difference": value, "low": low, "high": high, "each": drawn[0].tolist()}


def where_rows(cfg: StudyConfig, layout: Layout, ranked: Sequence[Mapping[str, np.ndarray]]) -> Rows:
    """Density and enrichment of every ranking and share: by cell, site and layer.

    least, most: over the fine-tunings; low, high: what shuffled labels give, which is the same for all of them.
    """
    rows, names = [], list(SITES)
    for ranking in ranked[0]:
        for share in cfg.where.shares:
            every = [where.enrichment(selection.top(one[ranking], share, cfg.seed), layout, cfg.where.draws, cfg.seed)
                     for one in ranked]
            for kind, first in every[0].items():
                value, density = (np.stack([getattr(one[kind], key) for one in every]) for key in ("value", "density"))
                for at in np.ndindex(first.value.shape):
                    here = (slice(None), *at)
                    site = names[at[0]] if kind != "layer" else None
                    layer = None if kind == "site" else at[-1]
                    rows.append({"ranking": ranking, "share": share, "kind": kind, "site": site, "layer": layer,
                                 "density": float(density[here].mean()), "enrichment": float(value[here].mean()),
                                 "least": float(value[here].min()), "most": float(value[here].max()),
                                 "low": float(first.low[at]), "high": float(first.high[at])})
    return rows


def reliability_rows(layout: Layout, seen: Sequence[Seen], ranked: Sequence[Mapping[str, np.ndarray]]) -> Rows:
    """Agreement of the scores from the two halves of the training part, and from any two fine-tunings.

    spearman, jaccard: of halves, in the mean; each: Spearman of the halves in every fine-tuning; between_*: of pairs of
    fine-tunings, in the mean, None where there is one.
    """
    halves = [[rankings(one.found, layout, [half]) for half in (0, 1)] for one in seen]
    rows = []
    for name in halves[0][0]:
        own = np.array([where.agreement(first[name], second[name]) for first, second in halves])
        pairs = [where.agreement(a[name], b[name]) for a, b in itertools.combinations(ranked, 2)]
        between = np.mean(pairs, 0).tolist() if pairs else (None, None)
        rows.append({"ranking": name, "spearman": float(own[:, 0].mean()), "jaccard": float(own[:, 1].mean()),
                     "each": own[:, 0].tolist(), "between_spearman": between[0], "between_jaccard": between[1]})
    return rows


def overlap_rows(ranked: Sequence[Mapping[str, np.ndarray]]) -> Rows:
    """Spearman and Jaccard of every two rankings, in the mean over fine-tunings."""
    every = [where.overlaps(one) for one in ranked]
    return [{"first": rows[0]["first"], "second": rows[0]["second"],
             **{key: float(np.mean([row[key] for row in rows])) for key in ("spearman", "jaccard")}}
            for rows in zip(*every, strict=True)]


def total_rows(layout: Layout, seen: Sequence[Seen]) -> Rows:
    """Mean contribution of each site in each layer to the probability of the class, of paths of single sites."""
    rows = []
    for name in seen[0].found.paths:
        if name.startswith("site-"):
            sums = [one.found.paths[name] for one in seen]
            mean = np.mean([one.signed.sum(0) / one.count.sum() for one in sums], 0)
            totals = np.bincount(layout.cell, weights=mean, minlength=layout.sizes.size).reshape(layout.sizes.shape)
            rows += [{"baseline": name.removeprefix("site-"), "layer": layer,
                      **dict(zip(SITES, totals[:, layer].tolist(), strict=True))} for layer in range(layout.layers)]
    return rows


def specificity(cfg: StudyConfig, truth: np.ndarray, full: np.ndarray, special: Mapping[str, np.ndarray]
                ) -> dict[str, Any]:
    """Of each ablation: change of recall [C, C] (rows: the class whose neurons are lost), and how much more the own
    class loses than the others, with its interval. full int8[S, N], special int8[S, C, N]."""
    out = {}
    for ablation, answers in special.items():
        changes = []
        for whole, without in zip(full, answers, strict=True):
            drawn = bootstrap_recall(truth, np.concatenate([whole[None], without]), CLASSES, cfg.keep.bootstrap,
                                     cfg.seed)
            change = drawn[:, 1:] - drawn[:, :1]
            change[:, without[:, 0] < 0] = np.nan
            changes.append(change)
        gaps = [gap for change in changes if (gap := _gap(change)) is not None]
        if gaps:
            value, low, high = interval(np.mean(gaps, 0))
            out[ablation] = {"change": _mean([change[0] for change in changes]).tolist(), "gap": value, "low": low,
                             "high": high, "each": [float(gap[0]) for gap in gaps],
                             "classes": [int((answers[:, 0] >= 0).sum()) for answers in special[ablation]]}
    return out


def site_rows(cfg: StudyConfig, truth: np.ndarray, sites: Mapping[tuple[str, str], np.ndarray]) -> Rows:
    """Of shares of one site, every other site being whole; answers int8[S, sites, shares, N]."""
    rows = []
    for (ablation, method), answers in sites.items():
        drawn = resampled(cfg, truth, answers.reshape(len(answers), 1, -1, len(truth)))
        drawn = drawn.reshape(*drawn.shape[:2], *answers.shape[1:3])
        for i, site in enumerate(SITES):
            for j, share in enumerate(cfg.keep.site_shares):
                value, low, high = interval(drawn[:, :, i, j].mean(1))
                rows.append({"ablation": ablation, "site": site, "method": method, "share": share, "macro_f1": value,
                             "low": low, "high": high, "sd": _sd(drawn[0, :, i, j])})
    return rows


def retrained_rows(cfg: StudyConfig, truth: np.ndarray, found: Mapping[tuple[str, float], Mapping[str, np.ndarray]]
                   ) -> Rows:
    """macro-F1 with a mask before and after the epoch, and the gain, each with its interval."""
    rows = []
    for (method, share), one in found.items():
        before, after = resampled(cfg, truth, np.stack([one["before"], one["after"]])[:, None, None])[..., 0].T
        row = {"method": method, "share": share, "accuracy_after": float((one["after"] == truth).mean())}
        for name, drawn in (("before", before), ("after", after), ("gain", after - before)):
            value, low, high = interval(drawn)
            row |= {name: value, f"{name}_low": low, f"{name}_high": high}
        rows.append(row)
    return rows


def _gap(change: np.ndarray) -> np.ndarray | None:
    """How much more recall [D] the own class loses than the others, from changes [D, C, C]; None: of less than two.

    Among the classes whose neurons were lost: the others are those that the model hardly ever names, whose recall of
    about 0 cannot fall, so that beside them any loss would look like one of the own class.
    """
    mine = np.flatnonzero(~np.isnan(np.diagonal(change[0])))
    if len(mine) < 2:
        return None
    change, own = change[:, mine][:, :, mine], np.eye(len(mine), dtype=bool)
    return np.nanmean(change[:, ~own], 1) - np.nanmean(change[:, own], 1)


def _mean(values: Sequence[np.ndarray]) -> np.ndarray:
    """Over what is not nan; nan where nothing is."""
    a = np.stack(values)
    there = ~np.isnan(a)
    return np.divide(np.where(there, a, 0).sum(0), there.sum(0), out=np.full(a.shape[1:], np.nan),
                     where=there.any(0))


def _sd(values: Sequence[float] | np.ndarray) -> float | None:
    return float(np.std(values, ddof=1)) if len(values) > 1 else None

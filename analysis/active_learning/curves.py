"""What a learning curve amounts to: words to a share of the full F1, area, F1 at given shares (spec section 6).

A curve is (shares of the pool's words float[R], F1 float[R]), in the order of the rounds.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from analysis.active_learning.learner import RoundRecord

Curve = tuple[np.ndarray, np.ndarray]
Rows = list[dict[str, Any]]
JUDGED = 0.22  # of the words: where gains over random choice are judged (spec section 9, acceptance 3)
SHARES = (0.05, 0.1, 0.2, JUDGED, 0.3, 0.5)  # where F1 is told
TARGETS = (0.95, 0.99)  # of the reference


def curve_of(records: Sequence[RoundRecord]) -> Curve:
    return np.array([one.share for one in records]), np.array([one.f1 for one in records])


def share_to(curve: Curve, target: float) -> float | None:
    """Share of the words at which F1 first reaches `target`, on the line between two rounds; None: not reached."""
    share, f1 = curve
    reached = np.flatnonzero(f1 >= target)
    if not len(reached):
        return None
    i = int(reached[0])
    if i == 0:
        return float(share[0])
    return float(share[i - 1] + (share[i] - share[i - 1]) * (target - f1[i - 1]) / (f1[i] - f1[i - 1]))


def f1_at(curve: Curve, share: float) -> float | None:
    """F1 at a share of the words, on the line between two rounds; None outside of what was labelled."""
    return float(np.interp(share, *curve)) if curve[0][0] <= share <= curve[0][-1] else None


def area(curve: Curve, low: float | None = None, high: float | None = None) -> float:
    """Mean F1 between two shares (default: the first and the last round): area over span, by trapezoids."""
    low, high = curve[0][0] if low is None else low, curve[0][-1] if high is None else high
    if not high > low:
        return float(np.interp(high, *curve))
    x = np.unique(np.concatenate([[low, high], curve[0][(curve[0] > low) & (curve[0] < high)]]))
    return float(np.trapezoid(np.interp(x, *curve), x) / (high - low))


def at_share(name: str, share: float) -> str:
    """The key of a number at a share of the words: ``f1_at_22``, ``gain_at_22``."""
    return f"{name}_at_{share:.0%}".rstrip("%")


def summaries(records: Mapping[str, Mapping[int, Sequence[RoundRecord]]], reference: float | None,
              known: float | None = None) -> tuple[Rows, Rows]:
    """(one row a strategy and seed, one row a strategy), from records[strategy][seed].

    reference: F1 of the same model on all labels, the mean over seeds; known: of the best known system. Areas are over
    the shares that every learner has; differences are to `random` of the same seed.
    """
    curves = {(name, seed): curve_of(one) for name, seeds in records.items() for seed, one in seeds.items() if one}
    if not curves:
        return [], []
    low, high = max(c[0][0] for c in curves.values()), min(c[0][-1] for c in curves.values())
    goals = [(f"to_{target:.0%}".rstrip("%"), target * reference) for target in TARGETS if reference]
    goals += [(f"to_{target:.0%}".rstrip("%") + "_known", target * known) for target in TARGETS if known]
    shares = [share for share in SHARES if any(f1_at(c, share) is not None for c in curves.values())]
    each: Rows = []
    for (name, seed), curve in curves.items():
        row = {"strategy": name, "seed": seed, "share": float(curve[0][-1]), "f1": float(curve[1][-1]),
               "area": area(curve, low, high)}
        row |= {goal: share_to(curve, value) for goal, value in goals}
        row |= {at_share("f1", share): f1_at(curve, share) for share in shares}
        base = curves.get(("random", seed))
        if base is not None and name != "random":
            end = min(curve[0][-1], base[0][-1])
            row["gain"] = f1_at(curve, end) - f1_at(base, end)
            row["gain_area"] = row["area"] - area(base, low, high)
            for share in shares:
                mine, other = f1_at(curve, share), f1_at(base, share)
                row[at_share("gain", share)] = None if mine is None or other is None else mine - other
        each.append(row)
    keys = list(dict.fromkeys(key for row in each for key in row if key not in ("strategy", "seed")))
    return each, [{"strategy": name, "seeds": len(rows), **_spread(rows, keys)}
                  for name in records if (rows := [row for row in each if row["strategy"] == name])]


def _spread(rows: Rows, keys: Sequence[str]) -> dict[str, Any]:
    """Mean and standard deviation over seeds; None where a seed has no value, and then how many have (``_seeds``)."""
    out: dict[str, Any] = {}
    for key in keys:
        values = [row[key] for row in rows if row.get(key) is not None]
        whole = len(values) == len(rows)
        out[key] = float(np.mean(values)) if whole else None
        out[f"{key}_sd"] = float(np.std(values, ddof=1)) if whole and len(values) > 1 else None
        if key.startswith("to_"):
            out[f"{key}_seeds"] = len(values)
    return out


def overlap(records: Mapping[str, Mapping[int, Sequence[RoundRecord]]]) -> Rows:
    """Of every two strategies after each round: Jaccard of the sets they have chosen beside the first, mean of seeds.
    """
    rows: Rows = []
    names = list(records)
    for i, a in enumerate(names):
        for b in names[i + 1:]:
            seeds = sorted(set(records[a]) & set(records[b]))
            rounds = min((min(len(records[a][s]), len(records[b][s])) for s in seeds), default=0)
            for number in range(1, rounds):
                values = []
                for seed in seeds:
                    x, y = ({p for one in records[n][seed][1:number + 1] for p in one.chosen} for n in (a, b))
                    values.append(len(x & y) / max(len(x | y), 1))
                rows.append({"first": a, "second": b, "round": number, "jaccard": float(np.mean(values))})
    return rows


def picks(records: Mapping[str, Mapping[int, Sequence[RoundRecord]]]) -> Rows:
    """What each strategy picks in each round, the mean over seeds: length, entities in 100 words, empty sentences."""
    rows: Rows = []
    for name, seeds in records.items():
        for number in range(max((len(one) for one in seeds.values()), default=0)):
            here = [one[number] for one in seeds.values() if len(one) > number]
            rows.append({
                "strategy": name, "round": number, "share": _mean([one.share for one in here]),
                "length": _mean([one.picked_words / max(one.picked_sentences, 1) for one in here]),
                "density": _mean([100 * one.picked_entities / max(one.picked_words, 1) for one in here]),
                "empty": _mean([one.picked_empty / max(one.picked_sentences, 1) for one in here]),
                "entities": _mean([one.entities for one in here]),
                "selection_seconds": _mean([one.selection_seconds for one in here]),
                "training_seconds": _mean([one.training_seconds for one in here])})
    return rows


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))

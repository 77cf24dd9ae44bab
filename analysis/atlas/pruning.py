"""Which experts or neurons a language keeps: every rule of moe_split.md section 4.6 as a mask over neurons."""

import dataclasses
from typing import Any

import numpy as np

from analysis.atlas.rules import BEST, MAIN, SCHEMES
from jaxmodels.experts.prune import adaptive_counts, select_experts, union_scores


@dataclasses.dataclass(frozen=True)
class Scores:
    """What one language's text says about each part. expert arrays [L, E] in expert order, neuron arrays [L, F]."""

    frequency: np.ndarray
    contribution: np.ndarray
    deviation: np.ndarray
    neuron_frequency: np.ndarray | None
    neuron_contribution: np.ndarray

    @classmethod
    def of(cls, activity: dict[str, np.ndarray], perm: np.ndarray, num_experts: int, k: int) -> "Scores":
        """From ``collect.activity`` of a language's selection part; ``k``: which top-k count is the frequency."""
        tokens = max(int(activity["tokens"].sum()), 1)
        mean = activity["sum"].sum(0) / tokens
        square = activity["square"].sum(0) / tokens
        deviation = np.sqrt(np.maximum(square - mean * mean, 0))
        top = activity.get("neuron_top")
        return cls(activity[f"expert_top_{k}"].sum(0) / tokens, by_expert(mean, perm, num_experts),
                   by_expert(deviation, perm, num_experts), None if top is None else top.sum(0) / tokens, mean)


def by_expert(neurons: np.ndarray, perm: np.ndarray, num_experts: int) -> np.ndarray:
    """float[L, F] -> float[L, E]: sums over each expert's neurons."""
    return np.take_along_axis(neurons, perm, 1).reshape(len(perm), num_experts, -1).sum(-1)


def to_neurons(keep: np.ndarray, perm: np.ndarray) -> np.ndarray:
    """bool[L, E] -> bool[L, F]: the neurons of the experts that are kept."""
    wide = np.repeat(keep, perm.shape[1] // keep.shape[1], axis=1)
    out = np.zeros(perm.shape, bool)
    np.put_along_axis(out, perm, wide, 1)
    return out


def mask_of(scheme: str, scores: Scores, share: float, perm: np.ndarray, *, panel: list[Scores] | None = None,
            norms: np.ndarray | None = None, seed: int = 0) -> np.ndarray | None:
    """bool[L, F] of a scheme, a control or ``random``; None if the scheme's statistic was not collected.

    Random and lowest keep as many experts in each layer as the main scheme does, so that only the choice differs.
    """
    if scheme in SCHEMES:
        name, rule = SCHEMES[scheme]
        values = getattr(scores, name)
        if values is None:
            return None
        keep = select_experts(values, share, rule=rule)
        return keep if name.startswith("neuron") else to_neurons(keep, perm)
    counts = adaptive_counts(scores.frequency, share)
    if scheme == "random":
        keep = select_experts(scores.frequency, share, rule="random", counts=counts, seed=seed)
    elif scheme == "lowest frequency":
        keep = select_experts(scores.frequency, share, rule="lowest", counts=counts)
    elif scheme == "weight norm":
        keep = select_experts(by_expert(norms, perm, scores.frequency.shape[1]), share, rule="uniform")
    elif scheme == "union of the panel":
        keep = select_experts(union_scores(np.stack([s.frequency for s in panel])), share, rule="adaptive")
    else:
        raise ValueError(f"unknown scheme {scheme!r}")
    return to_neurons(keep, perm)


def plan(cfg: Any, language: str, panel: tuple[str, ...]) -> list[tuple[str, float, int, str]]:
    """(scheme, share, seed, test language) of every evaluation of one language's lists.

    All schemes are scored on the language itself; the paper's rule and the default also on ``others`` neighbours in
    the panel, so that keeping one language's experts can be seen to harm another.
    """
    at = panel.index(language)
    others = [panel[(at + i) % len(panel)] for i in range(1, len(panel))][:cfg.others]
    jobs = []
    for share in cfg.shares:
        jobs += [(scheme, share, 0, language) for scheme in cfg.rules]
        jobs += [("random", share, seed, language) for seed in range(cfg.random_seeds)]
        jobs += [(scheme, share, 0, other) for scheme in (MAIN, BEST) for other in others]
    return jobs

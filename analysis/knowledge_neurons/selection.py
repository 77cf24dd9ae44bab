"""Which neurons are kept: methods, budgets, masks (esm_knowledge_neurons.md section 5)."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Bool, Float

from analysis.knowledge_neurons.methods import MATCHED, METHODS, PRIMARY, SCORED
from analysis.knowledge_neurons.neurons import Layout
from jaxmodels.errors import UserError


def count_of(share: float, size: int) -> int:
    """Neurons that a share is: rounded, at least one. Raises UserError for a share that is not in (0, 1]."""
    if not 0 < share <= 1:
        raise UserError(f"share {share} must be above 0 and at most 1")
    return max(int(round(share * size)), 1)


def top(scores: Float[np.ndarray, "n"], share: float, seed: int = 0) -> Bool[np.ndarray, "n"]:
    """The highest scores. Ties are broken at random: in order they would all go to the first site and layer.

    Raises UserError for a score that is not a number.
    """
    if np.isnan(scores).any():
        raise UserError(f"{int(np.isnan(scores).sum())} of {len(scores)} scores are not numbers; score again")
    order = np.lexsort((np.random.default_rng(seed).random(len(scores)), -scores))
    kept = np.zeros(len(scores), bool)
    kept[order[:count_of(share, len(scores))]] = True
    return kept


def matched(like: Bool[np.ndarray, "n"], layout: Layout, seed: int) -> Bool[np.ndarray, "n"]:
    """A random choice with as many neurons of every site and layer as `like`; of one seed, larger ones hold smaller."""
    draw, counts = np.random.default_rng(seed).random(layout.size), layout.counts(like).reshape(-1)
    order = np.lexsort((draw, layout.cell))
    starts = np.cumsum([0, *layout.sizes.reshape(-1)])[:-1]
    place = np.arange(layout.size) - starts[layout.cell[order]]
    kept = np.zeros(layout.size, bool)
    kept[order] = place < counts[layout.cell[order]]
    return kept


def select(method: str, share: float, scores: Mapping[str, Float[np.ndarray, "n"]], layout: Layout, seed: int = 0
           ) -> Bool[np.ndarray, "n"]:
    """The neurons that a method keeps; scores: by the names of SCORED; seed: of the methods in DRAWN.

    Raises UserError for an unknown method, or one whose scores are not there.
    """
    if method == "random":
        return top(np.random.default_rng([seed, 1]).random(layout.size), share)
    needed = method if method in SCORED else MATCHED.get(method, PRIMARY)
    if method not in METHODS or needed not in scores:
        raise UserError(f"method {method!r} needs the scores {needed!r}; there are {', '.join(scores) or 'none'}"
                        if method in METHODS else f"method {method!r} is not one of {', '.join(METHODS)}")
    if method in MATCHED:
        return matched(top(scores[needed], share), layout, seed)
    return top(-scores[needed] if method == "bottom" else scores[needed], share)


def within(method: str, share: float, site: int, scores: Mapping[str, Float[np.ndarray, "n"]], layout: Layout,
           seed: int = 0) -> Bool[np.ndarray, "n"]:
    """Every neuron of the other sites, and a share of the neurons of one, over all layers; site: its place in SITES."""
    inside = layout.cell // layout.layers == site
    ranked = np.random.default_rng([seed, 1]).random(layout.size) if method == "random" else scores[method]
    kept = ~inside
    kept[inside] = top(ranked[inside], share, seed)
    return kept

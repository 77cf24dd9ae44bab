"""Where the chosen neurons are, and whether another look would choose the same (esm_knowledge_neurons.md 5.1, 5.2)."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from analysis.knowledge_neurons.neurons import Layout
from analysis.knowledge_neurons.selection import top
from jaxmodels.errors import UserError

TOP = 0.01  # whose Jaccard index is reported
RELIABLE = 0.5  # split-half reliability below which a list of neurons is not worth publishing


class Enrichment(NamedTuple):
    """density = kept / size of a cell, value = density / kept share; low, high: where 95 % of shuffled labels fall.

    Arrays [S, L] for cells, [S] for sites over all layers, [L] for layers over all sites.
    """

    density: np.ndarray
    value: np.ndarray
    low: np.ndarray
    high: np.ndarray


def enrichment(kept: Bool[np.ndarray, "n"], layout: Layout, draws: int = 100, seed: int = 0
               ) -> dict[str, Enrichment]:
    """``cell``, ``site`` and ``layer``; 1 is what a choice blind to site and layer gives.

    Shuffling the labels of site and layer among neurons deals them out without replacement, which is drawn directly
    (multivariate hypergeometric). The interval says what neurons that are chosen independently would give; scores of
    one site go together, so another training may differ by more.
    Raises UserError if no neuron is kept, or for less than 1 draw.
    """
    total = int(kept.sum())
    if not total:
        raise UserError("no neuron is kept; raise the share")
    if draws < 1:
        raise UserError(f"draws {draws} must be at least 1")
    sizes, counts = layout.sizes, layout.counts(kept)
    rng = np.random.default_rng(seed)
    drawn = rng.multivariate_hypergeometric(sizes.reshape(-1), total, size=draws).reshape(draws, *sizes.shape)
    share, out = total / layout.size, {}
    for name, axes in (("cell", ()), ("site", (1,)), ("layer", (0,))):
        size = sizes.sum(axes) if axes else sizes
        here = counts.sum(axes) if axes else counts
        there = drawn.sum(tuple(axis + 1 for axis in axes)) if axes else drawn
        low, high = np.quantile(there / size / share, (0.025, 0.975), axis=0)
        out[name] = Enrichment(here / size, here / size / share, low, high)
    return out


def jaccard(first: Bool[np.ndarray, "n"], second: Bool[np.ndarray, "n"]) -> float:
    """Shared over joined; of two empty choices nan."""
    union = int((first | second).sum())
    return float((first & second).sum() / union) if union else float("nan")


def spearman(first: Float[np.ndarray, "n"], second: Float[np.ndarray, "n"]) -> float:
    """Rank correlation; nan where one of them is constant."""
    from scipy.stats import rankdata

    a, b = rankdata(first), rankdata(second)
    return float(np.corrcoef(a, b)[0, 1]) if a.std() and b.std() else float("nan")


def agreement(first: Float[np.ndarray, "n"], second: Float[np.ndarray, "n"], share: float = TOP) -> tuple[float, float]:
    """(Spearman of the scores, Jaccard of the highest share)."""
    return spearman(first, second), jaccard(top(first, share), top(second, share))


def overlaps(scores: Mapping[str, Float[np.ndarray, "n"]], share: float = TOP) -> list[dict[str, float | str]]:
    """One row for every pair of methods: spearman and jaccard."""
    names, rows = list(scores), []
    for i, first in enumerate(names):
        for second in names[i + 1:]:
            rho, shared = agreement(scores[first], scores[second], share)
            rows.append({"first": first, "second": second, "spearman": rho, "jaccard": shared})
    return rows

"""Do languages that are related use the same experts? Families against similarity (moe_split.md 4.4).

All p-values count the observed arrangement as one of the permutations: p = (1 + as extreme) / (1 + permutations).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.cluster.hierarchy import cophenet, fcluster, leaves_list, linkage
from scipy.spatial.distance import squareform

from analysis.atlas.similarity import divergence

Square = Float[np.ndarray, "A A"]
Labels = Sequence[str | None]
ROUND_OFF = 1e-12  # sums of the same numbers in another order are not less extreme


class Family(NamedTuple):
    """One family: mean similarity of its pairs, how many, and p against as many languages drawn at random."""

    within: float
    pairs: int
    p: float


class WithinBetween(NamedTuple):
    """Mean similarity of pairs within a family, of pairs across families, their difference, and its p (one-sided).

    Without two families of two languages each there is nothing to compare: means are nan, p is 1.
    """

    within: float
    between: float
    difference: float
    p: float
    per_family: dict[str, Family]


class Curve(NamedTuple):
    """Within minus between by layer, the middle 95 % of its permutations, and p; each float[L]."""

    difference: np.ndarray
    low: np.ndarray
    high: np.ndarray
    p: np.ndarray


class Dendrogram(NamedTuple):
    """Average linkage on 1 - r: scipy's linkage float[A - 1, 4], its cophenetic correlation, leaves top to bottom."""

    linkage: np.ndarray
    cophenetic: float
    order: np.ndarray


class Mantel(NamedTuple):
    """Partial correlation of two distances and its one-sided p (related languages nearer than the controls say)."""

    r: float
    p: float


class _Design:
    """Languages in families of two or more, sorted by family, so that a family is a fixed range of positions.

    A permutation of the languages over the positions then needs only the within-family pairs: their number and the
    sum over all pairs never change.
    """

    def __init__(self, labels: Labels, permutations: int, seed: int):
        names, sizes = np.unique([x for x in labels if x is not None], return_counts=True)
        self.names = [str(n) for n, s in zip(names, sizes, strict=True) if s > 1]
        members = [[a for a, x in enumerate(labels) if x == n] for n in self.names]
        self.languages = np.array(sum(members, []), int)
        stops = np.cumsum([0] + [len(m) for m in members])
        blocks = [np.add(np.triu_indices(len(m), 1), start) for m, start in zip(members, stops, strict=False)]
        self.i, self.j = np.concatenate(blocks, 1) if blocks else np.zeros((2, 0), int)
        self.pairs = np.array([b.shape[1] for b in blocks], int)
        self.starts = np.cumsum(self.pairs) - self.pairs
        count = len(self.languages)
        self.others = count * (count - 1) // 2 - len(self.i)
        order = np.broadcast_to(np.arange(count), (permutations, count))
        # Row 0 is the arrangement that was observed.
        self.order = np.concatenate([np.arange(count)[None], np.random.default_rng(seed).permuted(order, axis=1)])

    @property
    def comparable(self) -> bool:
        return len(self.names) > 1

    def statistics(self, similarity: np.ndarray):
        """(sum within each family float[1 + P, families], within float[1 + P], between float[1 + P])."""
        chosen = similarity[np.ix_(self.languages, self.languages)]
        values = chosen.ravel()[self.order[:, self.i] * len(chosen) + self.order[:, self.j]]
        sums = np.add.reduceat(values, self.starts, axis=1)
        total = chosen[np.triu_indices(len(chosen), 1)].sum()
        within = sums.sum(1)
        return sums, within / len(self.i), (total - within) / self.others


def _p(values: np.ndarray) -> np.ndarray:
    """Share of rows at least as large as the first, which is the observed one (and counts as one of them)."""
    return (values >= values[0] - ROUND_OFF).mean(0)


def within_between(similarity: Square, labels: Labels, permutations: int = 10_000, seed: int = 0) -> WithinBetween:
    """Are languages of one family more alike than languages of different ones?

    Only families of two or more languages take part; None is no family. The permutations shuffle the labels over
    the languages that take part, so that family sizes stay.
    """
    design = _Design(labels, permutations, seed)
    if not design.comparable:
        return WithinBetween(np.nan, np.nan, np.nan, 1.0, {})
    sums, within, between = design.statistics(np.asarray(similarity, np.float64))
    families = {name: Family(float(s), int(n), float(p)) for name, s, n, p in
                zip(design.names, sums[0] / design.pairs, design.pairs, _p(sums / design.pairs), strict=True)}
    difference = within - between
    return WithinBetween(float(within[0]), float(between[0]), float(difference[0]), float(_p(difference)), families)


def within_between_curve(by_layer: Float[np.ndarray, "L A A"], labels: Labels, permutations: int = 10_000,
                         seed: int = 0) -> Curve:
    """`within_between` over depth, all layers under the same permutations."""
    design = _Design(labels, permutations, seed)
    if not design.comparable:
        empty = np.full(len(by_layer), np.nan)
        return Curve(empty, empty, empty, np.ones(len(by_layer)))
    # One layer after another: [L, P, pairs] at once would be gigabytes.
    means = (design.statistics(np.asarray(layer, np.float64))[1:] for layer in by_layer)
    difference = np.stack([within - between for within, between in means], 1)
    low, high = np.percentile(difference[1:], [2.5, 97.5], axis=0)
    return Curve(difference[0], low, high, _p(difference))


def dendrogram(similarity: Square) -> Dendrogram:
    """Average-linkage tree of the distances 1 - r, leaves ordered so that neighbours are alike."""
    distance = np.maximum(0, 1 - _pairs(similarity))
    tree = linkage(distance, "average", optimal_ordering=True)
    in_tree = cophenet(tree)
    exact = np.allclose(in_tree, distance)  # also covers equal distances, where a correlation is undefined
    constant = np.ptp(in_tree) == 0 or np.ptp(distance) == 0
    fit = 1.0 if exact else 0.0 if constant else float(np.corrcoef(in_tree, distance)[0, 1])
    return Dendrogram(tree, fit, leaves_list(tree))


def adjusted_rand(tree: Dendrogram, labels: Labels) -> float:
    """Adjusted Rand index of the tree, cut into as many groups as there are families, against the families.

    1: the same groups; 0: as by chance. Families of one language count; languages labelled None are not compared.
    """
    known = np.array([x is not None for x in labels])
    families = np.unique([x for x in labels if x is not None], return_inverse=True)[1]
    groups = fcluster(tree.linkage, families.max() + 1, "maxclust")[known] - 1
    table = np.zeros((groups.max() + 1, families.max() + 1))
    np.add.at(table, (groups, families), 1)

    def together(sizes):
        return (sizes * (sizes - 1) / 2).sum()

    both, rows, columns = together(table), together(table.sum(1)), together(table.sum(0))
    chance = rows * columns / together(table.sum())
    most = (rows + columns) / 2
    return 1.0 if most == chance else float((both - chance) / (most - chance))


def nearest_neighbours(similarity: Square, count: int = 1) -> Int[np.ndarray, "A count"]:
    """The `count` most similar other languages of each, most similar first."""
    others = np.array(similarity, np.float64)
    np.fill_diagonal(others, -np.inf)
    return np.argsort(-others, 1, kind="stable")[:, :count]


def family_distance(labels: Labels) -> Square:
    """0 within a family, 1 across; a language labelled None is a family of its own."""
    return 1.0 - same([f"={i}" if x is None else f"+{x}" for i, x in enumerate(labels)])


def same(labels: Sequence[str]) -> Float[np.ndarray, "A A"]:
    """1 where two languages have the same label (a script, say), else 0: a control of `partial_mantel`."""
    _, codes = np.unique(list(labels), return_inverse=True)
    return (codes[:, None] == codes).astype(np.float64)


def histogram_distance(token_counts: Int[np.ndarray, "A V"]) -> Square:
    """Jensen-Shannon distance (root of the divergence in bits, 0 to 1) of the languages' token-id histograms."""
    return np.sqrt(divergence(np.asarray(token_counts, np.float64)))


def partial_mantel(distance: Square, related: Square, controls: Sequence[Square] = (), permutations: int = 10_000,
                   seed: int = 0) -> Mantel:
    """Is `distance` tied to `related` beyond what the controls explain? Without controls: the plain Mantel test.

    Both are regressed on the controls over all pairs; r is the correlation of the residuals (Smouse, Long and Sokal
    1986). Permutations move languages in the residuals of `distance` and regress again (Legendre 2000, permutation
    of residuals under the null model), so that the confound itself stays in place. A `related` that the controls
    explain wholly gives r = 0, p = 1.
    """
    x, y = _pairs(related), _pairs(distance)
    basis = _basis(np.stack([np.ones_like(x), *map(_pairs, controls)], 1))
    rest_x, rest_y = x - basis @ (basis.T @ x), y - basis @ (basis.T @ y)
    if np.linalg.norm(rest_x) <= 1e-9 * np.linalg.norm(x) or np.linalg.norm(rest_y) <= 1e-9 * np.linalg.norm(y):
        return Mantel(0.0, 1.0)
    rest_x /= np.linalg.norm(rest_x)
    residual = squareform(rest_y, checks=False)
    size = len(residual)
    i, j = np.triu_indices(size, 1)
    rng = np.random.default_rng(seed)
    r = [rest_x @ rest_y / np.linalg.norm(rest_y)]
    for start in range(0, permutations, 500):  # in parts: [permutations, pairs] at once would be 250 MB
        rows = min(500, permutations - start)
        order = rng.permuted(np.broadcast_to(np.arange(size), (rows, size)), axis=1)
        moved = residual.ravel()[order[:, i] * size + order[:, j]]
        explained = np.square(moved @ basis).sum(1)
        r.extend(moved @ rest_x / np.sqrt(np.maximum(rest_y @ rest_y - explained, 1e-30)))
    r = np.array(r)
    return Mantel(float(r[0]), float(_p(r)))


def _basis(columns: Float[np.ndarray, "P C"]) -> Float[np.ndarray, "P R"]:
    """Orthonormal basis of the columns; collinear ones (one script only) add nothing."""
    u, s, _ = np.linalg.svd(columns / np.maximum(np.linalg.norm(columns, axis=0), 1e-30), full_matrices=False)
    return u[:, s > 1e-9]


def _pairs(square: Square | Bool[np.ndarray, "A A"]) -> np.ndarray:
    """The upper triangle in a row, float64[A (A - 1) / 2]."""
    return np.asarray(square, np.float64)[np.triu_indices(len(square), 1)]

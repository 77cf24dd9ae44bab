"""From scores or vectors of sentences to those that are labelled next, within a budget of words.

The cost of a sentence is its words; a sentence is labelled whole. All functions give places in the pool, in the order
of the choice; the same seed gives the same. overshoot: the last sentence may exceed the budget; without it, a sentence
that does not fit is passed over, and the next that does is taken.
"""

import heapq
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from jaxmodels.errors import UserError

SOME = 256  # labelled sentences whose distances to the whole pool are in memory at once


def by_score(scores: np.ndarray, lengths: Sequence[int] | np.ndarray, budget: int, *, seed: int = 0,
             overshoot: bool = True, available: np.ndarray | None = None) -> np.ndarray:
    """Highest first, equals in a random order; int[k]. available bool[N]: what is still in the pool.

    Raises UserError for a pool without sentences, and for a budget that not even its shortest fits.
    """
    scores = np.asarray(scores, float)
    if np.isnan(scores).any():
        raise ValueError(f"{np.isnan(scores).sum()} of {len(scores)} scores are NaN")
    tie = np.random.default_rng(seed).permutation(len(scores))
    return take(np.lexsort((tie, -scores)), lengths, budget, overshoot=overshoot, available=available)


def take(order: Iterable[int], lengths: Sequence[int] | np.ndarray, budget: int, *, overshoot: bool = True,
         available: np.ndarray | None = None, taken: Callable[[int], None] = lambda i: None) -> np.ndarray:
    """The first sentences of an order (places, may be made while it is read) that spend the budget; int[k].

    taken: called with each that is chosen, before the next is asked for.
    """
    lengths = np.asarray(lengths)
    usable = _usable(lengths, budget, overshoot, available)
    chosen, spent = [], 0
    for i in order:
        if spent >= budget:
            break
        if usable[i] and (overshoot or spent + lengths[i] <= budget):
            chosen.append(int(i))
            taken(int(i))
            spent += int(lengths[i])
    return np.array(chosen, int)


def facility_location(vectors: np.ndarray, lengths: Sequence[int] | np.ndarray, budget: int, *, candidates:
                      np.ndarray | None = None, overshoot: bool = True) -> np.ndarray:
    """Greedy by gain a word in F(S) = Σ_{i in U} max_{j in S} w_ij, w_ij = d_max - |x_i - x_j| (Wei et al. 2015).

    vectors float[N, D]: the whole pool U, which S is to represent. candidates: places that S may take (SUBMOD: the most
    uncertain, four times the budget); default: all. The marginal gains only shrink, so a candidate whose old gain is
    below another's new one need not be computed again (Minoux 1978). Memory: N times the candidates, float32.
    """
    lengths = np.asarray(lengths)
    places = np.arange(len(vectors)) if candidates is None else np.asarray(candidates, int)
    w = _distances(vectors, vectors[places])
    w = w.max(initial=0) - w
    covered = np.zeros(len(vectors), np.float32)

    def gain(k: int) -> float:
        return float(np.maximum(w[:, k] - covered, 0).sum(dtype=float)) / max(int(lengths[places[k]]), 1)

    def order() -> Iterable[int]:
        heap = [(-gain(k), k) for k in range(len(places))]
        heapq.heapify(heap)
        while heap:
            _, k = heapq.heappop(heap)
            now = -gain(k)
            if heap and now > heap[0][0]:
                heapq.heappush(heap, (now, k))
                continue
            yield int(places[k])

    def cover(i: int) -> None:
        np.maximum(covered, w[:, column[i]], out=covered)

    column = {int(place): k for k, place in enumerate(places)}
    among = np.zeros(len(vectors), bool)
    among[places] = True
    return take(order(), lengths, budget, overshoot=overshoot, available=among, taken=cover)


def k_means_pp(vectors: np.ndarray, lengths: Sequence[int] | np.ndarray, budget: int, *, seed: int = 0,
               available: np.ndarray | None = None, overshoot: bool = True) -> np.ndarray:
    """Seeds of k-means++ (Arthur & Vassilvitskii 2007), as BADGE picks (Ash et al. 2020): each next sentence with a
    chance as its squared distance to the nearest that is chosen."""
    r = np.random.default_rng(seed)
    free = _usable(np.asarray(lengths), budget, overshoot, available)

    near, left = np.full(len(vectors), np.inf), free.copy()

    def order() -> Iterable[int]:
        while left.any():
            weights = np.where(left, near, 0)
            if not np.isfinite(weights).all() or weights.sum() == 0:  # the first, and copies of what is chosen
                weights = left.astype(float)
            i = int(r.choice(len(weights), p=weights / weights.sum()))
            left[i] = False
            yield i

    def close(i: int) -> None:
        np.minimum(near, ((vectors - vectors[i]) ** 2).sum(1, dtype=float), out=near)

    return take(order(), lengths, budget, overshoot=overshoot, available=available, taken=close)


def core_set(vectors: np.ndarray, lengths: Sequence[int] | np.ndarray, budget: int, *, labelled: np.ndarray | None =
             None, seed: int = 0, available: np.ndarray | None = None, overshoot: bool = True) -> np.ndarray:
    """Farthest first from what is labelled and chosen (k-center greedy, Sener & Savarese 2018).

    labelled float[m, D]: vectors of what is labelled; without any, the first is drawn.
    """
    free = _usable(np.asarray(lengths), budget, overshoot, available)
    tie = np.random.default_rng(seed).permutation(len(vectors))

    near, left = np.full(len(vectors), np.inf), free.copy()
    for at in range(0, 0 if labelled is None else len(labelled), SOME):
        np.minimum(near, _distances(vectors, labelled[at:at + SOME]).min(1), out=near)

    def order() -> Iterable[int]:
        while left.any():
            i = int(np.lexsort((tie, np.where(left, -near, np.inf)))[0])
            left[i] = False
            yield i

    def close(i: int) -> None:
        np.minimum(near, np.sqrt(((vectors - vectors[i]) ** 2).sum(1, dtype=float)), out=near)

    return take(order(), lengths, budget, overshoot=overshoot, available=available, taken=close)


def _usable(lengths: np.ndarray, budget: int, overshoot: bool, available: np.ndarray | None) -> np.ndarray:
    """What may be chosen: in the pool and not empty."""
    if budget < 1:
        raise UserError(f"a budget of {budget} words buys nothing; set it to 1 or more")
    usable = lengths > 0 if available is None else np.asarray(available, bool) & (lengths > 0)
    if not usable.any():
        raise UserError("no unlabelled sentence is left in the pool; add sentences or stop")
    shortest = int(lengths[usable].min())
    if shortest > budget and not overshoot:
        raise UserError(f"a budget of {budget} words is below the shortest sentence of the pool, {shortest} words; "
                        "raise it, or allow the last sentence to overshoot")
    return usable


def _distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Euclidean, float32[len(a), len(b)]."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    squared = (a ** 2).sum(1)[:, None] + (b ** 2).sum(1) - 2 * a @ b.T
    return np.sqrt(np.maximum(squared, 0)).astype(np.float32)

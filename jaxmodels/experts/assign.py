"""Balanced assignment and balanced k-means: the size constraint behind every way of splitting a layer.

NumPy only and free of jax, so that worker processes start in a fraction of a second.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from jaxmodels.errors import UserError


def unit_rows(rows: Float[np.ndarray, "F D"]) -> Float[np.ndarray, "F D"]:
    """Rows scaled to L2 norm 1, in float64; a zero row stays zero."""
    rows = np.asarray(rows, np.float64)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(norms > 0, norms, 1.0)


def assign_exact(cost: Float[np.ndarray, "F E"], capacity: int) -> Int[np.ndarray, "F"]:
    """Minimum-cost labels with at most `capacity` members per expert (F <= E * capacity).

    Successive shortest paths on the graph of experts: start from the unconstrained optimum, then move one unit
    of excess at a time along the cheapest chain of single-neuron moves. Same optimum as Jonker-Volgenant on the
    cost with every column repeated `capacity` times, but F x E memory instead of F x F, and fast when the
    unconstrained solution is nearly balanced, as it is after the first round of k-means.
    """
    cost = np.asarray(cost, np.float64)
    count, experts = cost.shape
    _check_room(count, experts, capacity)
    labels = cost.argmin(1)
    sizes = np.bincount(labels, minlength=experts)
    # Residual edge e -> f: the cheapest member of e to move to f. Differences below `slack` are round-off; acting
    # on them could make the parent pointers cyclic.
    slack = 1e-12 * max(1.0, float(np.abs(cost).max(initial=0.0)))
    edge = np.full((experts, experts), np.inf)
    mover = np.zeros((experts, experts), np.int64)
    columns = np.arange(experts)

    def refresh(expert: int) -> None:
        members = np.flatnonzero(labels == expert)
        if members.size == 0:
            edge[expert] = np.inf
            return
        moves = cost[members] - cost[members, expert, None]
        best = moves.argmin(0)
        edge[expert], mover[expert] = moves[best, columns], members[best]
        edge[expert, expert] = np.inf

    for expert in range(experts):
        refresh(expert)
    while (sizes > capacity).any():
        distance = np.where(sizes > capacity, 0.0, np.inf)
        parent = np.full(experts, -1)
        for _ in range(experts):  # Bellman-Ford; a shortest path has fewer edges than there are experts
            through = distance[:, None] + edge
            via = through.argmin(0)
            reached = through[via, columns]
            better = reached < distance - slack
            if not better.any():
                break
            distance[better], parent[better] = reached[better], via[better]
        target = int(np.where(sizes < capacity, distance, np.inf).argmin())
        sizes[target] += 1
        touched = [target]
        while parent[target] >= 0:
            source = int(parent[target])
            labels[mover[source, target]] = target
            touched.append(source)
            target = source
        sizes[target] -= 1
        for expert in touched:
            refresh(expert)
    return labels.astype(np.int32)


def assign_greedy(cost: Float[np.ndarray, "F E"], capacity: int) -> Int[np.ndarray, "F"]:
    """Labels by margin: neurons with the largest gap between their two nearest experts choose first.

    Equal to the one-by-one loop, but everything up to the first neuron that finds its expert full is accepted at
    once, so at most E vectorised rounds are needed. About 0.2 % above the exact objective.
    """
    cost = np.asarray(cost, np.float64)
    count, experts = cost.shape
    _check_room(count, experts, capacity)
    if experts == 1:
        return np.zeros(count, np.int32)
    two = np.partition(cost, 1, axis=1)
    waiting = np.argsort(two[:, 0] - two[:, 1], kind="stable")
    labels = np.zeros(count, np.int32)
    room = np.full(experts, capacity)
    choice = cost[waiting].argmin(1)
    while waiting.size:
        # turn[i]: how many earlier neurons in the queue want the same expert
        order = np.argsort(choice, kind="stable")
        wanted = choice[order]
        turn = np.empty(waiting.size, np.int64)
        turn[order] = np.arange(waiting.size) - np.searchsorted(wanted, wanted)
        refused = np.flatnonzero(turn >= room[choice])
        accepted = refused[0] if refused.size else waiting.size
        labels[waiting[:accepted]] = choice[:accepted]
        room -= np.bincount(choice[:accepted], minlength=experts)
        waiting, choice = waiting[accepted:], choice[accepted:]
        again = room[choice] == 0
        choice[again] = np.where(room > 0, cost[waiting[again]], np.inf).argmin(1)
    return labels


class Clusters(NamedTuple):
    labels: Int[np.ndarray, "F"]
    centres: Float[np.ndarray, "E D"]  # means of the members of exactly these labels
    objective: float  # sum of squared distances to them
    history: tuple[float, ...]  # objective after each round of the restart that won


def balanced_kmeans(
    rows: Float[np.ndarray, "F D"],
    num_experts: int,
    *,
    seed: int = 0,
    restarts: int = 3,
    max_iterations: int = 100,
    exact_limit: int = 4096,
    init_centres: Float[np.ndarray, "E D"] | None = None,
    normalise: bool = True,
) -> Clusters:
    """k-means with exactly F / E members per cluster, on unit rows (MoEfication, arXiv 2110.01786).

    Rounds of assignment and plain means until labels repeat. Up to `exact_limit` rows every assignment is exact,
    so the objective never rises; above, rounds are greedy until they stop improving, then one is exact.
    `init_centres` replaces k-means++ and makes restarts pointless: there is one.
    """
    rows = np.asarray(rows)
    if not np.isfinite(rows).all():
        raise UserError("the vectors to cluster contain NaN or infinity; check the weights or activations")
    if num_experts < 1 or rows.shape[0] % num_experts:
        raise UserError(f"{rows.shape[0]} rows cannot form {num_experts} equal clusters; choose a divisor")
    points = unit_rows(rows) if normalise else np.asarray(rows, np.float64)
    generator = np.random.default_rng(seed)
    exact = points.shape[0] <= exact_limit
    if init_centres is not None:
        return _lloyd(points, np.asarray(init_centres, np.float64), max_iterations, exact)
    starts = (_plus_plus(points, num_experts, generator) for _ in range(max(1, restarts)))
    return min((_lloyd(points, start, max_iterations, exact) for start in starts), key=lambda c: c.objective)


def members_mean(points: Float[np.ndarray, "F D"], labels: Int[np.ndarray, "F"], num_experts: int) -> np.ndarray:
    """Centres f64[E, D] of balanced clusters."""
    return points[np.argsort(labels, kind="stable")].reshape(num_experts, -1, points.shape[1]).mean(1)


def objective(
    points: Float[np.ndarray, "F D"], labels: Int[np.ndarray, "F"], centres: Float[np.ndarray, "E D"]
) -> float:
    """Sum of squared distances of the points to the centres of their labels."""
    return float(((points - centres[labels]) ** 2).sum())


def _lloyd(points: np.ndarray, centres: np.ndarray, max_iterations: int, exact: bool) -> Clusters:
    experts = centres.shape[0]
    capacity = points.shape[0] // experts

    def step(centres: np.ndarray, assign) -> Clusters:
        labels = assign((centres**2).sum(1) - 2 * points @ centres.T, capacity)
        centres = members_mean(points, labels, experts)
        return Clusters(labels, centres, objective(points, labels, centres), ())

    best, history, seen = None, [], set()
    for _ in range(max(1, max_iterations)):
        current = step(centres, assign_exact if exact else assign_greedy)
        history.append(current.objective)
        if best is None or current.objective < best.objective:
            best = current
        # Greedy rounds may rise or cycle; exact ones can only repeat once they have converged.
        key = current.labels.tobytes()
        if key in seen:
            break
        seen.add(key)
        centres = current.centres
    if not exact:
        last = step(best.centres, assign_exact)
        if last.objective < best.objective:
            best = last
            history.append(last.objective)
    return best._replace(history=tuple(history))


def _plus_plus(points: np.ndarray, experts: int, generator: np.random.Generator) -> np.ndarray:
    """k-means++ (Arthur and Vassilvitskii 2007): each centre drawn in proportion to the squared distance so far."""
    squares = (points**2).sum(1)
    chosen = [int(generator.integers(len(points)))]
    nearest = np.full(len(points), np.inf)
    while len(chosen) < experts:
        last = points[chosen[-1]]
        nearest = np.minimum(nearest, np.maximum(squares - 2 * points @ last + last @ last, 0.0))
        nearest[chosen[-1]] = 0.0
        total = nearest.sum()
        # Fewer distinct points than clusters: any row will do, the capacity sorts it out.
        chosen.append(int(generator.choice(len(points), p=nearest / total if total > 0 else None)))
    return points[chosen]


def _check_room(count: int, experts: int, capacity: int) -> None:
    if count > experts * capacity:
        raise UserError(f"{count} neurons do not fit {experts} experts of {capacity}; raise one of the two")

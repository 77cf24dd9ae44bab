"""Static pruning: keep some experts of each layer, the same for every token, as a smaller dense layer.

The selection rules (moe_split.md 4.6) take one score per expert, float[L, E]: activation frequency, mean contribution
or anything else where more means keep. With E = F they select single neurons.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from jaxmodels.errors import UserError
from jaxmodels.experts.split import Split

RULES = ("adaptive", "uniform", "global", "random", "lowest")
FLOOR = 0.05  # no layer keeps fewer than this share of its experts, nor fewer than one


def select_experts(
    scores: Float[Any, "L E"], share: float, *, rule: str = "adaptive", seed: int = 0,
    counts: Int[Any, "L"] | None = None,
) -> Bool[np.ndarray, "L E"]:
    """Which experts stay when `share` of all do.

    - uniform: the best ceil(share E) of every layer.
    - adaptive: one coverage for all layers; each keeps the fewest experts whose scores reach it.
    - global: the best share L E over all layers, with the floor of `FLOOR`.
    - random, lowest: controls with `counts` experts a layer (default: those of the adaptive rule).

    The number kept is share L E, give or take L, unless the floor alone is more.
    """
    scores = np.asarray(scores, np.float64)
    if rule not in RULES:
        raise UserError(f"rule = {rule!r} is unknown; choose from {', '.join(RULES)}")
    if scores.ndim != 2 or not np.isfinite(scores).all() or (scores < 0).any():
        raise UserError(f"scores of shape {scores.shape} must be [layers, experts], finite and not negative")
    if not 0 < share <= 1:
        raise UserError(f"share = {share} must lie in (0, 1]")
    if rule == "global":
        return _global(scores, share)
    if rule == "uniform":
        counts = np.full(len(scores), np.ceil(share * scores.shape[1] - 1e-9), int)
    elif counts is None or rule == "adaptive":
        counts = adaptive_counts(scores, share)
    if rule == "random":
        scores = np.random.default_rng(seed).random(scores.shape)
    return _best(-scores if rule == "lowest" else scores, np.asarray(counts))


def adaptive_counts(scores: Float[Any, "L E"], share: float) -> Int[np.ndarray, "L"]:
    """How many experts each layer keeps under one coverage c, found so that their sum is nearest to share L E.

    Layer l needs its (r+1)-th expert once c exceeds what its best r cover, so the counts change only at those
    values and a bisection over them is exact. Layers with equal scores get equal counts.
    """
    layers, experts = scores.shape
    descending = -np.sort(-np.asarray(scores, np.float64), axis=1)
    total = descending.sum(1, keepdims=True)
    covered = np.cumsum(descending, 1) / np.where(total > 0, total, 1.0)
    # Experts beyond full coverage (score 0) have their order from the second term; it splits nothing else.
    needed_from = np.concatenate([np.zeros((layers, 1)), covered[:, :-1]], 1) + 1e-12 * np.arange(experts)
    floor = _floor(experts)
    levels = np.unique(needed_from)

    def counts(level: float) -> np.ndarray:
        return np.maximum((needed_from <= level).sum(1), floor)

    low, high = 0, len(levels) - 1
    while low < high:
        middle = (low + high) // 2
        if counts(levels[middle]).sum() >= share * layers * experts:
            high = middle
        else:
            low = middle + 1
    nearest = [counts(level) for level in levels[max(0, low - 1) : low + 1]]
    return min(nearest, key=lambda c: abs(c.sum() - share * layers * experts))


def union_scores(scores: Float[Any, "A L E"], how: str = "max") -> Float[np.ndarray, "L E"]:
    """One score for a set of languages, max or mean, each language first scaled to sum 1 a layer."""
    scores = np.asarray(scores, np.float64)
    if how not in ("max", "mean"):
        raise UserError(f"how = {how!r} is unknown; choose max or mean")
    total = scores.sum(-1, keepdims=True)
    scores = scores / np.where(total > 0, total, 1.0)
    return scores.max(0) if how == "max" else scores.mean(0)


def prune_experts(experts: Mapping[str, Any], keep: Bool[Any, "E"]) -> dict[str, Any]:
    """A dense FFN of width (kept experts) * s from the kept experts; no router, no sparse product."""
    keep = np.asarray(keep)
    if keep.dtype != bool or keep.shape != experts["up"].shape[:1]:
        raise UserError(f"keep is {keep.dtype}{list(keep.shape)}; bool[{experts['up'].shape[0]}] is needed")
    if not keep.any():
        raise UserError("keep selects no expert; a layer needs at least one")
    index = np.flatnonzero(keep)

    def take(name: str, weight: Any) -> Any:
        if name == "down_bias":
            return weight
        weight = weight[index]
        if name in ("gate", "up"):
            return weight.transpose(1, 0, 2).reshape(weight.shape[1], -1)
        return weight.reshape(-1, *weight.shape[2:])

    return {name: take(name, weight) for name, weight in experts.items()}


def neuron_order(split: Split, keep: Bool[Any, "E"]) -> Int[np.ndarray, "R"]:
    """The dense layer's indices of the neurons of `prune_experts`, in its order; padding has indices >= F."""
    return split.perm[np.repeat(np.asarray(keep, bool), split.expert_size)]


def _floor(experts: int) -> int:
    return max(1, int(np.ceil(FLOOR * experts - 1e-9)))


def _best(scores: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The counts[l] highest of each row; ties go to the lower index."""
    layers, experts = scores.shape
    if counts.shape != (layers,) or (counts < 1).any() or (counts > experts).any():
        raise UserError(f"counts must hold {layers} numbers in 1..{experts}, one a layer")
    rank = np.argsort(np.argsort(-scores, 1, kind="stable"), 1, kind="stable")
    return rank < counts[:, None]


def _global(scores: np.ndarray, share: float) -> np.ndarray:
    layers, experts = scores.shape
    keep = _best(scores, np.full(layers, _floor(experts)))
    missing = round(share * scores.size) - int(keep.sum())
    order = np.argsort(-np.where(keep, -1.0, scores), axis=None, kind="stable")
    keep.flat[order[: max(0, missing)]] = True
    return keep

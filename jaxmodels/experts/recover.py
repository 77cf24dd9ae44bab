"""Repair a statically pruned layer in closed form (moe_split.md 4.6): bias compensation and ridge refit.

Accumulate `moments` over calibration text, then solve on the host in float64. Two uses:
- from the dense model alone: moments of its h; `bias_compensation` or `refit_down` for any choice of neurons;
- layer by layer: moments of the pruned model's kept h with a target y of one's choice, such as the dense residual
  stream minus the pruned one before this layer; then `refit`, which also repairs the error of the layers before.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from jaxtyping import Array, Bool, Float, Int

from jaxmodels.errors import UserError

RIDGE = 1e-2  # of the mean variance of a kept neuron


class Moments(NamedTuple):
    """Sums over tokens; adding two Moments' fields adds their tokens. A target-free one has y of width 0."""

    count: Float[Array, ""]
    x: Float[Array, "F"]
    xx: Float[Array, "F F"]
    y: Float[Array, "D"]
    xy: Float[Array, "F D"]
    yy: Float[Array, ""]  # squares of y over tokens and columns


def zero_moments(width: int, target: int = 0) -> Moments:
    """No tokens yet, for x of `width` and y of `target` columns."""
    zeros = functools.partial(jnp.zeros, dtype=jnp.float32)
    return Moments(zeros(()), zeros(width), zeros((width, width)), zeros(target), zeros((width, target)), zeros(()))


def moments(
    x: Float[Array, "*B F"],
    mask: Bool[Array, "*B"] | None = None,
    y: Float[Array, "*B D"] | None = None,
    weight: Float[Array, "*B"] | None = None,
) -> Moments:
    """Sums of one batch, for jit or a `reduce` tap. Tokens outside the mask do not count, NaN there included.

    `weight` makes the later fit a weighted least squares. A few tokens (the first of a text, some separators) have
    activations a thousand times larger than all others; unweighted, they alone decide the fit.
    """
    x = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    y = jnp.zeros((x.shape[0], 0)) if y is None else y.reshape(-1, y.shape[-1]).astype(jnp.float32)
    live = jnp.ones(x.shape[0], bool) if mask is None else mask.reshape(-1)
    x, y = jnp.where(live[:, None], x, 0), jnp.where(live[:, None], y, 0)
    w = live.astype(jnp.float32) if weight is None else jnp.where(live, weight.reshape(-1), 0).astype(jnp.float32)
    wx = x * w[:, None]
    product = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    return Moments(
        w.sum(), wx.sum(0), product("tf,tg->fg", wx, x), w @ y, product("tf,td->fd", wx, y),
        (w[:, None] * y**2).sum(),
    )  # fmt: skip


def add_moments(a: Moments, b: Moments) -> Moments:
    """Moments of both sets of tokens. In NumPy float64 on the host the sums of long calibration texts stay exact."""
    return Moments(*(p + q for p, q in zip(a, b, strict=True)))


class Refit(NamedTuple):
    down: Float[np.ndarray, "R D"]
    bias: Float[np.ndarray, "D"]
    residual: float  # share of the target's variance that is left; 1 is a layer that explains nothing


def bias_compensation(
    stats: Moments,
    down: Float[Any, "F D"],
    down_bias: Float[Any, "D"] | float,
    keep: np.ndarray,
) -> Refit:
    """The dropped neurons' mean output becomes a bias; kept rows stay. `keep`: bool[F], or indices in the new order."""
    problem = _dense_problem(stats, down, keep)
    return _finish(problem, np.asarray(down, np.float64)[problem.index], down_bias)


def refit_down(
    stats: Moments,
    down: Float[Any, "F D"],
    down_bias: Float[Any, "D"] | float,
    keep: np.ndarray,
    *,
    ridge: float = RIDGE,
) -> Refit:
    """Kept rows that reproduce the whole dense output from the kept activations, by ridge regression.

    From the moments of the dense model's h alone. The penalty pulls towards the old rows, so that with everything
    kept nothing changes: W + (S_kk + lambda)^-1 S_kd W_d, with centred sums S.
    """
    problem = _dense_problem(stats, down, keep)
    return _finish(problem, _ridge(problem, np.asarray(down, np.float64)[problem.index], ridge), down_bias)


def refit(stats: Moments, prior: Float[Any, "R D"], *, ridge: float = RIDGE) -> Refit:
    """Rows and bias that map x to the target y, pulled towards `prior`. `stats` from `moments(x, mask, y)`.

    The bias is complete: y must be what the down projection *with* its bias should give.
    """
    if stats.xy.shape != np.shape(prior):
        raise UserError(f"moments are for a product {tuple(stats.xy.shape)}, the prior is {np.shape(prior)}")
    n, x, xx, y, xy, yy = _float64(stats)
    mean_x, mean_y = x / n, y / n
    problem = _Problem(
        np.arange(len(x)), mean_x, mean_y, xx - n * np.outer(mean_x, mean_x), xy - n * np.outer(mean_x, mean_y),
        yy - n * mean_y @ mean_y,
    )  # fmt: skip
    return _finish(problem, _ridge(problem, np.asarray(prior, np.float64), ridge), 0.0)


def removal_order(stats: Moments, down: Float[Any, "F D"], *, ridge: float = RIDGE, chunk: int = 48,
                  until: int = 0) -> Int[np.ndarray, "F"]:
    """In which order neurons can go when the others are refitted to replace them: the first to go comes first.

    Dropping neuron j raises the mean squared error of the best refit by ||w_j||^2 / [S^-1]_jj (optimal brain surgeon,
    Hassibi & Stork 1993, eq. 5, for D outputs at once), with w the rows refitted so far and S the centred second
    moments of the dense model's h. A neuron that others predict is cheap to drop however large it is. `chunk` neurons
    go at a time; 1 is the exact greedy order. The last `until` neurons are not ordered, which saves time.
    """
    n, x, xx, *_ = _float64(stats)
    mean = x / n
    system = xx / n - np.outer(mean, mean)
    system[np.diag_indices_from(system)] += ridge * max(np.trace(system) / len(x), np.finfo(float).tiny)
    inverse = scipy.linalg.inv(system, overwrite_a=True, check_finite=False)
    rows = np.array(down, np.float64)
    alive, order = np.ones(len(x), bool), []
    while alive.sum() > until:
        left = np.flatnonzero(alive)
        cost = (rows[left] ** 2).sum(1) / np.diagonal(inverse)[left]
        drop = left[np.argsort(cost, kind="stable")[:chunk]]
        order.append(drop)
        columns = inverse[:, drop]
        moved = scipy.linalg.solve(columns[drop], columns.T, assume_a="pos").T
        # In place and without taking the dropped neurons out (they become zero): copies would cost more than products.
        rows -= moved @ rows[drop]
        inverse -= moved @ columns.T
        alive[drop] = False
    return np.concatenate([*order, np.flatnonzero(alive)]).astype(np.int32)


def keep_last(order: Int[Any, "L F"], share: float) -> Bool[np.ndarray, "L F"]:
    """Keeps `share` of all neurons: those that `removal_order` lets go last.

    The first layer of a deep model stays whole and the others share what is left: cutting it costs several times what
    any other layer does (docs/log.md). In a shallow one, where that would take more than a fifth of the budget, all
    layers keep the same number.
    """
    order = np.asarray(order)
    layers, width = order.shape
    budget = share * layers
    counts = np.full(layers, share * width)
    if budget >= 5:
        counts[0], counts[1:] = width, (budget - 1) / (layers - 1) * width
    counts = np.minimum(counts.round().astype(int), width)
    if not 0 < share <= 1 or counts.min() < 1:
        raise UserError(f"share {share} of {width} neurons a layer keeps none; choose {1 / width:.2g} to 1")
    keep = np.zeros((layers, width), bool)
    np.put_along_axis(keep, order, np.arange(width) >= width - counts[:, None], 1)
    return keep


class _Problem(NamedTuple):
    """Centred least squares: sums over tokens around the means."""

    index: np.ndarray
    mean_x: np.ndarray
    mean_y: np.ndarray
    xx: np.ndarray
    xy: np.ndarray
    yy: float


def _float64(stats: Moments) -> list[np.ndarray]:
    values = [np.asarray(value, np.float64) for value in stats]
    if not values[0] > 0:
        raise UserError("moments of no tokens cannot be refitted; give calibration text")
    if not all(np.isfinite(v).all() for v in values):
        raise UserError("the moments contain NaN or infinity; mask such tokens out")
    return values


def _dense_problem(stats: Moments, down: np.ndarray, keep: np.ndarray) -> _Problem:
    n, x, xx, *_ = _float64(stats)
    down, keep = np.asarray(down, np.float64), np.asarray(keep)
    if down.shape[0] != len(x):
        raise UserError(f"moments are for {len(x)} neurons, the down projection has {down.shape[0]} rows")
    if keep.dtype == bool and keep.shape != x.shape:
        raise UserError(f"keep has shape {keep.shape}; bool[{len(x)}] is needed")
    index = np.flatnonzero(keep) if keep.dtype == bool else keep
    if index.size == 0:
        raise UserError("keep selects no neuron; a layer needs at least one")
    mean = x / n
    centred = xx - n * np.outer(mean, mean)
    with_output = centred @ down
    return _Problem(
        index, mean[index], mean @ down, centred[np.ix_(index, index)], with_output[index],
        float((down * with_output).sum()),
    )  # fmt: skip


def _ridge(problem: _Problem, prior: np.ndarray, ridge: float) -> np.ndarray:
    if not ridge > 0:
        raise UserError(f"ridge = {ridge} must be above 0, or rarely active neurons make the system singular")
    penalty = ridge * max(np.trace(problem.xx) / len(prior), np.finfo(float).tiny)
    system = problem.xx + penalty * np.eye(len(prior))
    try:
        factor = scipy.linalg.cho_factor(system)
    except np.linalg.LinAlgError:
        # float32 sums leave eigenvalues of about -1e-7 of the largest.
        raise UserError(f"ridge = {ridge} is too small for these moments; raise it, {RIDGE} is usual") from None
    # Solved for the change: with a perfect prior the right side is zero and the rows come back bit for bit.
    return prior + scipy.linalg.cho_solve(factor, problem.xy - problem.xx @ prior)


def _finish(problem: _Problem, down: np.ndarray, old_bias: np.ndarray | float) -> Refit:
    left = problem.yy - 2 * (down * problem.xy).sum() + (down * (problem.xx @ down)).sum()
    bias = np.asarray(old_bias, np.float64) + problem.mean_y - problem.mean_x @ down
    residual = float(max(left, 0.0) / problem.yy) if problem.yy > 0 else 0.0
    return Refit(down.astype(np.float32), bias.astype(np.float32), residual)

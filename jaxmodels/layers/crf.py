"""A linear-chain conditional random field over tags (Lafferty et al. 2001).

    score(y | x) = start_{y_1} + Σ_i e_{i, y_i} + Σ_i A_{y_{i-1}, y_i} + stop_{y_n}

``real`` bool[B, T] says where there are words: every run of True in a row is a sequence of its own. All in float32.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmodels.kernels.varying import vary, varying_axes
from jaxmodels.layers.param import param
from jaxmodels.shapes import Array, Bool, Float, Int


class CrfWeights(NamedTuple):
    """start, stop float[V]; between float[V, V], from row to column."""

    start: jax.Array
    between: jax.Array
    stop: jax.Array


class Crf(nnx.Module):
    """Parameters of a CRF over V tags."""

    def __init__(self, tags: int, *, rngs: nnx.Rngs):
        self.start = param(rngs, (tags,), (None,), std=0.1)
        self.between = param(rngs, (tags, tags), (None, None), std=0.1)
        self.stop = param(rngs, (tags,), (None,), std=0.1)

    @property
    def weights(self) -> CrfWeights:
        return CrfWeights(self.start[...], self.between[...], self.stop[...])


def ends(real: Bool[Any, "B T"]) -> tuple[Bool[Array, "B T"], Bool[Array, "B T"]]:
    """(first, last) word of every sequence in a row."""
    before = jnp.pad(real, ((0, 0), (1, 0)))[:, :-1]
    after = jnp.pad(real, ((0, 0), (0, 1)))[:, 1:]
    return real & ~before, real & ~after


def log_partition(w: CrfWeights, emissions: Float[Any, "B T V"], real: Bool[Any, "B T"]) -> Float[Array, "B"]:
    """log Σ_y exp score(y), summed over the sequences of a row: the forward algorithm, O(T V²)."""
    first, last = ends(real)

    def step(carry, sliced):
        alpha, total = carry
        e, real, first, last = (a[:, None] if a.ndim == 1 else a for a in sliced)
        moved = jax.nn.logsumexp(alpha[:, :, None] + w.between, axis=1)
        alpha = jnp.where(real, jnp.where(first, w.start, moved) + e, 0.0)
        total += jnp.where(last[:, 0], jax.nn.logsumexp(alpha + w.stop, axis=-1), 0.0)
        return (alpha, total), None

    axes = varying_axes(emissions, *w)
    zero = vary(jnp.zeros_like(emissions[:, 0]), axes), vary(jnp.zeros(len(emissions), emissions.dtype), axes)
    return jax.lax.scan(step, zero, _time_first(emissions, real, first, last))[0][1]


def score(w: CrfWeights, emissions: Float[Any, "B T V"], tags: Int[Any, "B T"], real: Bool[Any, "B T"]
          ) -> Float[Array, "B"]:
    """The score of given tags, summed over the sequences of a row. Tags where nothing is real do not matter."""
    first, last = ends(real)
    tags = jnp.where(real, tags, 0)
    picked = jnp.take_along_axis(emissions, tags[..., None], axis=-1)[..., 0]
    before = jnp.pad(tags, ((0, 0), (1, 0)))[:, :-1]
    moves = jnp.where(first, w.start[tags], w.between[before, tags])
    return (jnp.where(real, picked + moves, 0) + jnp.where(last, w.stop[tags], 0)).sum(1)


def marginals(w: CrfWeights, emissions: Float[Any, "B T V"], real: Bool[Any, "B T"]) -> Float[Array, "B T V"]:
    """P(y_i = v | x), 0 where nothing is real: the gradient of the log partition in the emissions."""
    return jax.grad(lambda e: log_partition(w, e, real).sum())(emissions)


def viterbi(w: CrfWeights, emissions: Float[Any, "B T V"], real: Bool[Any, "B T"]) -> Int[Array, "B T"]:
    """The tags of the largest score; 0 where nothing is real."""
    first, last = ends(real)

    def forward(alpha, sliced):
        e, real, first = (a[:, None] if a.ndim == 1 else a for a in sliced)
        moved = alpha[:, :, None] + w.between
        alpha = jnp.where(real, jnp.where(first, w.start, moved.max(1)) + e, 0.0)
        return alpha, (moved.argmax(1), (alpha + w.stop).argmax(-1))  # the first of equals, in every backend

    times = _time_first(emissions, real, first)
    _, (pointers, best) = jax.lax.scan(forward, jnp.zeros_like(emissions[:, 0]), times)

    def backward(tag_after, sliced):
        pointers_after, best, last = sliced
        followed = jnp.take_along_axis(pointers_after, tag_after[:, None], axis=1)[:, 0]
        tag = jnp.where(last, best, followed)
        return tag, tag

    after = jnp.concatenate([pointers[1:], jnp.zeros_like(pointers[:1])])
    start = jnp.zeros(len(emissions), pointers.dtype)
    _, tags = jax.lax.scan(backward, start, (after, best, jnp.swapaxes(last, 0, 1)), reverse=True)
    return jnp.where(real, jnp.swapaxes(tags, 0, 1), 0).astype(jnp.int32)


def _time_first(*arrays: Any) -> tuple[jax.Array, ...]:
    return tuple(jnp.swapaxes(a, 0, 1) for a in arrays)

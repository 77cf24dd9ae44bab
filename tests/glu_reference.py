"""A gate and an up product with their activation in float64 NumPy: what the kernels' tests compare with."""

import math

import jax.numpy as jnp
import numpy as np

ACTS = {
    "silu": lambda g: g / (1 + np.exp(-g)),
    "relu": lambda g: np.maximum(g, 0),
    "gelu": lambda g: 0.5 * g * (1 + np.vectorize(math.erf, otypes=[float])(g / np.sqrt(2))),
    "gelu_tanh": lambda g: 0.5 * g * (1 + np.tanh(np.sqrt(2 / np.pi) * (g + 0.044715 * g**3))),
}


def draw_glu(rng, rows, k, n, groups, dtype=jnp.float32):
    """x [rows, k], gate and up [groups, k, n], of products of order one."""
    x, gate, up = rng.normal(size=(rows, k)), *(rng.normal(size=(2, groups, k, n)) / np.sqrt(k))
    return [jnp.asarray(a, dtype) for a in (x, gate, up)]


def check_glu(run, x, gate, up, sizes, activation, limit=2e-6):
    """h, or h, g and u, of run(x, gate, up, sizes), in relative Frobenius norm (moe_split.md 7), overall and in each
    group; with NaN in the rows past the last group, whose results are zero."""
    sizes, used = np.array(sizes), sum(sizes)
    x_nan = jnp.where(jnp.arange(len(x))[:, None] < used, x, jnp.nan)
    got = run(x_nan, gate, up, jnp.asarray(sizes, jnp.int32))
    got = got if isinstance(got, tuple) else (got,)
    x, gate, up = (np.asarray(a, np.float64) for a in (x, gate, up))
    expected, parts = np.zeros((3, len(x), gate.shape[2])), [slice(None)]
    for e, stop in enumerate(np.cumsum(sizes)):
        parts.append(slice(stop - sizes[e], stop))
        g, u = (x[parts[-1]] @ w[e] for w in (gate, up))
        expected[:, parts[-1]] = ACTS[activation](g) * u, g, u
    for value, true in zip(got, expected[: len(got)], strict=True):
        assert value.shape == true.shape
        value = np.asarray(value, np.float64)
        for part in parts:
            assert np.linalg.norm(value[part] - true[part]) <= limit * np.linalg.norm(true[part])
        assert not value[used:].any(), "tail rows are zero"
    return got

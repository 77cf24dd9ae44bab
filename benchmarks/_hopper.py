"""The five products that the Hopper kernels compute, as functions of their operands, for what compiles or runs them.

Of x [M, K], w, gate and up [G, K, N], dy [M, N] and group sizes [G]: "forward" x w, "dx" dy w^T, "dw" x^T dy in float32
or as told, "glu" act(x gate) * (x up), and "glu_kept" the same with both products, which its gradient needs.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxmodels.kernels.activations import ACTIVATIONS
from jaxmodels.kernels.grouped_matmul import hopper, xla

PRODUCTS = ("forward", "dx", "dw", "glu", "glu_kept")


def operand_shapes(product: str, shape: tuple[int, int, int, int]) -> list[tuple[int, ...]]:
    """Of the arrays before the group sizes; shape: M, K, N, G."""
    m, k, n, groups = shape
    x, w, dy = (m, k), (groups, k, n), (m, n)
    return {"forward": [x, w], "dx": [dy, w], "dw": [x, dy], "glu": [x, w, w], "glu_kept": [x, w, w]}[product]


def flop(product: str, shape: tuple[int, int, int, int]) -> float:
    """2 x rows x inner x columns, each row once; twice that where there are two products."""
    m, k, n, _ = shape
    return 2.0 * m * k * n * (2 if product.startswith("glu") else 1)


def default_config(product: str, shape: tuple[int, int, int, int]) -> hopper.Config:
    """With which the kernel cuts the work on an H100."""
    _, k, n, _ = shape
    weights = 2 if product.startswith("glu") else 1
    return hopper.default_config(k if product == "dx" else n, blocks=hopper.MULTIPROCESSORS, weights=weights)


def kernel(
    product: str, *, dw_dtype: Any = jnp.float32, activation: str = "silu", **options: Any
) -> Callable[..., Any]:  # fmt: skip
    """Ours. options: `config` and `interpret` of the kernels."""
    match product:
        case "forward" | "dx":
            options |= {"transpose_w": product == "dx"}
            return lambda x, w, sizes: hopper.matmul(x, w, sizes, out_dtype=x.dtype, **options)
        case "dw":
            return functools.partial(hopper.outer, out_dtype=dw_dtype, **options)
        case _:
            return functools.partial(hopper.glu, activation=activation, keep=product == "glu_kept", **options)


def ragged_dot(product: str, *, activation: str = "silu") -> Callable[..., Any]:
    """The same through `jax.lax.ragged_dot`; gate and up are two of them, and the activation is XLA's."""
    if product == "dw":
        return functools.partial(xla.outer, out_dtype=jnp.float32)
    if product in ("forward", "dx"):
        return lambda x, w, sizes: xla.matmul(x, w, sizes, transpose_w=product == "dx", out_dtype=x.dtype)

    def glu(x: jax.Array, gate: jax.Array, up: jax.Array, sizes: jax.Array) -> Any:
        g, u = (xla.matmul(x, w, sizes, transpose_w=False, out_dtype=x.dtype) for w in (gate, up))
        h = ACTIVATIONS[activation](g) * u
        return (h, g, u) if product == "glu_kept" else h

    return glu


def dense(product: str, *, activation: str = "silu") -> Callable[..., Any]:
    """As many FLOPs with one matrix for all rows (of two dimensions here), or, for dw, one product of all rows."""
    # Written in the operands' type at once: XLA would round a float32 result in a pass of its own.
    if product == "dw":
        return lambda x, dy, sizes: _dot(x, dy, (0, 0))
    if product in ("forward", "dx"):
        return lambda x, w, sizes: _dot(x, w, (1, 1 if product == "dx" else 0), x.dtype)

    def glu(x: jax.Array, gate: jax.Array, up: jax.Array, sizes: jax.Array) -> Any:
        g, u = (_dot(x, w, (1, 0), x.dtype) for w in (gate, up))
        h = ACTIVATIONS[activation](g) * u
        return (h, g, u) if product == "glu_kept" else h

    return glu


def loop(product: str, *, activation: str = "silu") -> Callable[..., Any]:
    """What the kernels must give, in float32: a loop over the groups, each time a dense product of all rows, of which
    the group's own are kept. Selected, not multiplied: a foreign row may be NaN."""

    def owner(x: jax.Array, sizes: jax.Array) -> Callable[[jax.Array], jax.Array]:
        ends, row = jnp.cumsum(sizes), jnp.arange(x.shape[0])
        return lambda group: ((row >= ends[group] - sizes[group]) & (row < ends[group]))[:, None]

    def rows(x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
        own, transposed = owner(x, sizes), product == "dx"
        step = lambda group, y: jnp.where(own(group), _dot(x, w[group], (1, 1 if transposed else 0)), y)  # noqa: E731
        return jax.lax.fori_loop(0, len(w), step, jnp.zeros((len(x), w.shape[1 if transposed else 2]), jnp.float32))

    if product == "dw":

        def outer(x: jax.Array, dy: jax.Array, sizes: jax.Array) -> jax.Array:
            own, zero = owner(x, sizes), jnp.zeros((), x.dtype)
            # Both: a zero in one operand would not stop a NaN in the other.
            one = lambda group: _dot(*(jnp.where(own(group), a, zero) for a in (x, dy)), (0, 0))  # noqa: E731
            return jax.lax.map(one, jnp.arange(len(sizes)))

        return outer
    if product in ("forward", "dx"):
        return rows

    def glu(x: jax.Array, gate: jax.Array, up: jax.Array, sizes: jax.Array) -> Any:
        g, u = rows(x, gate, sizes), rows(x, up, sizes)
        h = ACTIVATIONS[activation](g) * u
        return (h, g, u) if product == "glu_kept" else h

    return glu


def _dot(left: jax.Array, right: jax.Array, axes: tuple[int, int], out_dtype: Any = jnp.float32) -> jax.Array:
    contract = ((axes[0],), (axes[1],))
    return jax.lax.dot_general(left, right, (contract, ((), ())), preferred_element_type=out_dtype)

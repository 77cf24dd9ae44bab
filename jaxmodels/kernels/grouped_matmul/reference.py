"""The grouped products in plain jax.numpy, and a host loop over the groups: the two that others are checked against.

Group e owns rows [sum(n[:e]), sum(n[:e+1])). Rows past sum(n) are zero in every output and reach nothing.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int


def membership(group_sizes: Int[Array, "G"], rows: int) -> Bool[Array, "M G"]:
    """Whether row m belongs to group g: the one-hot of the expert of each row, all False for tail rows."""
    ends = jnp.cumsum(group_sizes)
    row = jnp.arange(rows)[:, None]
    return (row >= ends - group_sizes) & (row < ends)


def matmul(
    x: Float[Array, "M K"], w: Float[Array, "G ..."], group_sizes: Int[Array, "G"], *, transpose_w: bool, out_dtype
) -> Float[Array, "M N"]:
    """Every row with every matrix, then a selection: M G N memory, for small sizes.

    Selected, not multiplied by the one-hot: 0 * NaN is NaN, and one expert's NaN must not reach another's rows.
    """
    equation = "mk,gnk->mgn" if transpose_w else "mk,gkn->mgn"
    every = jnp.einsum(equation, x, w, preferred_element_type=jnp.float32, precision=jax.lax.Precision.HIGHEST)
    return jnp.where(membership(group_sizes, x.shape[0])[..., None], every, 0).sum(1).astype(out_dtype)


def outer(
    x: Float[Array, "M K"], dy: Float[Array, "M N"], group_sizes: Int[Array, "G"], *, out_dtype
) -> Float[Array, "G K N"]:
    """x_e^T dy_e for each group e; exactly zero for an empty one."""
    member = membership(group_sizes, x.shape[0]).T[..., None]
    # Both operands are masked: a NaN in either would survive the other's zero.
    return jnp.einsum(
        "gmk,gmn->gkn",
        jnp.where(member, x, 0),
        jnp.where(member, dy, 0),
        preferred_element_type=jnp.float32,
        precision=jax.lax.Precision.HIGHEST,
    ).astype(out_dtype)


def loop_matmul(x, w, group_sizes, *, transpose_w: bool, out_dtype):
    """`matmul` as a float64 NumPy loop on the host; for tests."""

    def host(x, w, sizes):
        w = np.swapaxes(w, 1, 2) if transpose_w else w
        out = np.zeros((x.shape[0], w.shape[2]), np.float64)
        for group, (start, stop) in enumerate(_bounds(sizes)):
            out[start:stop] = x[start:stop].astype(np.float64) @ w[group].astype(np.float64)
        return out.astype(out_dtype)

    shape = (x.shape[0], w.shape[1 if transpose_w else 2])
    return jax.pure_callback(
        lambda *a: host(*map(np.asarray, a)),
        jax.ShapeDtypeStruct(shape, out_dtype), x, w, group_sizes, vmap_method="sequential",
    )  # fmt: skip


def loop_outer(x, dy, group_sizes, *, out_dtype):
    """`outer` as a float64 NumPy loop on the host; for tests."""

    def host(x, dy, sizes):
        out = np.zeros((sizes.size, x.shape[1], dy.shape[1]), np.float64)
        for group, (start, stop) in enumerate(_bounds(sizes)):
            out[group] = x[start:stop].astype(np.float64).T @ dy[start:stop].astype(np.float64)
        return out.astype(out_dtype)

    shape = (group_sizes.shape[0], x.shape[1], dy.shape[1])
    return jax.pure_callback(
        lambda *a: host(*map(np.asarray, a)),
        jax.ShapeDtypeStruct(shape, out_dtype), x, dy, group_sizes, vmap_method="sequential",
    )  # fmt: skip


def _bounds(sizes: np.ndarray) -> list[tuple[int, int]]:
    ends = np.cumsum(sizes)
    return list(zip((ends - sizes).tolist(), ends.tolist(), strict=True))

"""The grouped products block by block: a row meets the one matrix it belongs to, where XLA on CPU tries every group's.

A block is a run of rows of one group, so that each is one plain product with a slice of the rows and one matrix. How
many blocks there are is data: a loop over as many as are used, in a program of static shapes. Rows past the last group
are in no block and cost nothing. Not differentiable by itself (a loop of unknown length); api.py gives the gradients.

Measured on two cores (jax 0.10.2, float32, random group sizes), forward + backward in ms, against what was chosen
before and one dense product of the same rows; the forward pass alone in brackets:

    M, K, N, G              this          before        dense
    4096, 256, 384, 8       26  (9)       171  (80)     17
    2048, 576, 32, 48       8   (3)       201  (36)     2
    2048, 32, 576, 48       6   (2)       352  (47)     4
    4096, 256, 384, 8 bfloat16  49        178
    8, 576, 32, 48 (decoding)   (0.13)    (0.9)         (0.1)

The loop loses on the smallest sizes (8, 64, 128, 8: 0.16 against 0.09) and in the gradient of w with few rows a group
(8, 576, 32, 48: 0.65 against 0.49), where api.py keeps the others.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxmodels.kernels.grouped_matmul.tilemap import Blocks, make_blocks
from jaxmodels.kernels.varying import vary, varying_axes


def unfit(shape, groups, dtype) -> str | None:
    here = jax.default_backend()
    return None if here == "cpu" else f"only on the CPU backend, this is {here}"


def matmul(
    x: Float[Array, "M K"], w: Float[Array, "G _ _"], group_sizes: Int[Array, "G"], *, transpose_w: bool, out_dtype,
    size: int | None = None,
) -> Float[Array, "M N"]:  # fmt: skip
    """Rows of each group times its matrix, `size` rows at a time (None: `block_rows`)."""
    rows, columns = x.shape[0], w.shape[1 if transpose_w else 2]
    if rows == 0 or columns == 0:
        return jnp.zeros((rows, columns), out_dtype)
    size = min(size or block_rows(rows, w.shape[0]), rows)
    accumulate = jnp.promote_types(x.dtype, jnp.float32)
    contract = (((1,), (1 if transpose_w else 0,)), ((), ()))

    # Under vmap one after the other: a batched loop would run every row's blocks as often as the longest needs.
    @jax.custom_batching.sequential_vmap
    def product(x, w, group_sizes):
        blocks = make_blocks(group_sizes, rows, size)

        def body(i, out):
            start = jnp.minimum(blocks.start[i], rows - size)  # the slice has `size` rows, also at the end of x
            tile = jax.lax.dynamic_slice_in_dim(x, start, size)
            matrix = jax.lax.dynamic_index_in_dim(w, blocks.group[i], keepdims=False)
            y = jax.lax.dot_general(tile, matrix, contract, preferred_element_type=accumulate).astype(out_dtype)
            # Neighbours' rows in the tile are computed and not written: rows of a product do not mix, NaN stays away.
            mine = _mine(blocks, i, start, size)
            old = jax.lax.dynamic_slice_in_dim(out, start, size)
            return jax.lax.dynamic_update_slice_in_dim(out, jnp.where(mine, y, old), start, 0)

        zeros = vary(jnp.zeros((rows, columns), out_dtype), varying_axes(x, w, group_sizes))
        return jax.lax.fori_loop(0, blocks.count, body, zeros)

    return product(x, w, group_sizes)


def outer(
    x: Float[Array, "M K"], dy: Float[Array, "M N"], group_sizes: Int[Array, "G"], *, out_dtype,
    size: int | None = None,
) -> Float[Array, "G K N"]:  # fmt: skip
    """x_e^T dy_e for each group e, the sum over its blocks; exactly zero for an empty one."""
    rows, shape = x.shape[0], (group_sizes.shape[0], x.shape[1], dy.shape[1])
    if rows == 0:
        return jnp.zeros(shape, out_dtype)
    size = min(size or block_rows(rows, shape[0]), rows)
    accumulate = jnp.promote_types(x.dtype, jnp.float32)

    @jax.custom_batching.sequential_vmap
    def product(x, dy, group_sizes):
        blocks = make_blocks(group_sizes, rows, size)

        def body(i, out):
            start = jnp.minimum(blocks.start[i], rows - size)
            # Both operands are masked: a NaN in either would survive the other's zero.
            mine = _mine(blocks, i, start, size)
            left, right = (jnp.where(mine, jax.lax.dynamic_slice_in_dim(a, start, size), 0) for a in (x, dy))
            part = jax.lax.dot_general(left, right, (((0,), (0,)), ((), ())), preferred_element_type=accumulate)
            old = jax.lax.dynamic_index_in_dim(out, blocks.group[i], keepdims=False)
            return jax.lax.dynamic_update_index_in_dim(out, old + part, blocks.group[i], 0)

        zeros = vary(jnp.zeros(shape, accumulate), varying_axes(x, dy, group_sizes))
        return jax.lax.fori_loop(0, blocks.count, body, zeros).astype(out_dtype)

    return product(x, dy, group_sizes)


def block_rows(rows: int, groups: int) -> int:
    """Half of a mean group, a power of two in 16..128: of those measured (16 to 256), near the best for each shape."""
    half = max(rows // (2 * groups), 1)
    return min(max(1 << (half - 1).bit_length(), 16), 128)


def _mine(blocks: Blocks, i, start, size: int):
    """[size, 1]: whether the rows from `start` on belong to block i."""
    row = start + jnp.arange(size)[:, None]
    return (row >= blocks.start[i]) & (row < blocks.stop[i])

"""The grouped products on CPU: as much as every group has in one batched product, the rest block by block.

XLA on CPU expands `ragged_dot` to all groups. Its batched product reads every matrix where it lies and keeps both cores
busy, but wants as many rows of each group: so each group gets `room` places, a little more than its even share, and the
rows that find none follow in a loop over blocks of rows of one group, as many as there are. The loop alone costs a copy
of a matrix a block, which is nothing where a group has hundreds of rows, and is all there is for groups of a few.

Not differentiable by itself (a loop of unknown length); api.py gives the gradients. What was measured, and what else
was tried, is in docs/log.md.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxmodels.errors import UserError
from jaxmodels.kernels.grouped_matmul.tilemap import Blocks, make_blocks
from jaxmodels.kernels.varying import vary, varying_axes

_FEWEST, _MOST = 8, 512  # mean rows a group between which the batched product wins over the loop alone


@dataclass(frozen=True)
class Config:
    """room: places of each group in the batched product, 0 for the loop alone (None: `batch_room`); block: rows of one
    turn of the loop (None: `block_rows`)."""

    room: int | None = None
    block: int | None = None

    def __post_init__(self):
        if (self.room or 0) < 0 or (self.block is not None and self.block < 1):
            raise UserError(f"{self}: room must not be negative, and block at least 1")


def unfit(shape, groups, dtype) -> str | None:
    here = jax.default_backend()
    return None if here == "cpu" else f"only on the CPU backend, this is {here}"


def matmul(
    x: Float[Array, "M K"], w: Float[Array, "G _ _"], group_sizes: Int[Array, "G"], *, transpose_w: bool, out_dtype,
    config: Config | None = None,
) -> Float[Array, "M N"]:  # fmt: skip
    """Rows of each group times its matrix."""
    rows, groups, columns = x.shape[0], w.shape[0], w.shape[1 if transpose_w else 2]
    if rows == 0 or columns == 0:
        return jnp.zeros((rows, columns), out_dtype)
    room, block = _cut(config, rows, groups)
    accumulate = jnp.promote_types(x.dtype, jnp.float32)
    inner = 2 if transpose_w else 1  # the axis of w that is summed over

    # Under vmap one after the other: a batched loop would run every row's blocks as often as the longest needs.
    @jax.custom_batching.sequential_vmap
    def product(x, w, group_sizes):
        if room:
            places = _Places(group_sizes, rows, room)
            every = jax.lax.dot_general(places.read(x), w, (((2,), (inner,)), ((0,), (0,))),
                                        preferred_element_type=accumulate).astype(out_dtype)  # fmt: skip
            out = places.write(every)
        else:
            out = vary(jnp.zeros((rows, columns), out_dtype), varying_axes(x, w, group_sizes))
        blocks = make_blocks(group_sizes, rows, block, skip=room)

        def body(i, out):
            start = jnp.minimum(blocks.start[i], rows - block)  # the slice has `block` rows, also at the end of x
            tile = jax.lax.dynamic_slice_in_dim(x, start, block)
            matrix = jax.lax.dynamic_index_in_dim(w, blocks.group[i], keepdims=False)
            y = jax.lax.dot_general(tile, matrix, (((1,), (inner - 1,)), ((), ())),
                                    preferred_element_type=accumulate).astype(out_dtype)  # fmt: skip
            # Neighbours' rows in the tile are computed and not written: rows of a product do not mix, NaN stays away.
            mine = _mine(blocks, i, start, block)
            old = jax.lax.dynamic_slice_in_dim(out, start, block)
            return jax.lax.dynamic_update_slice_in_dim(out, jnp.where(mine, y, old), start, 0)

        return jax.lax.fori_loop(0, blocks.count, body, out)

    return product(x, w, group_sizes)


def outer(
    x: Float[Array, "M K"], dy: Float[Array, "M N"], group_sizes: Int[Array, "G"], *, out_dtype,
    config: Config | None = None,
) -> Float[Array, "G K N"]:  # fmt: skip
    """x_e^T dy_e for each group e, the sum over its places and blocks; exactly zero for an empty one."""
    rows, shape = x.shape[0], (group_sizes.shape[0], x.shape[1], dy.shape[1])
    if rows == 0:
        return jnp.zeros(shape, out_dtype)
    room, block = _cut(config, rows, shape[0])
    accumulate = jnp.promote_types(x.dtype, jnp.float32)

    @jax.custom_batching.sequential_vmap
    def product(x, dy, group_sizes):
        if room:
            places = _Places(group_sizes, rows, room)
            out = jax.lax.dot_general(places.read(x, masked=True), places.read(dy, masked=True),
                                      (((1,), (1,)), ((0,), (0,))), preferred_element_type=accumulate)  # fmt: skip
        else:
            out = vary(jnp.zeros(shape, accumulate), varying_axes(x, dy, group_sizes))
        blocks = make_blocks(group_sizes, rows, block, skip=room)

        def body(i, out):
            start = jnp.minimum(blocks.start[i], rows - block)
            # Both operands are masked: a NaN in either would survive the other's zero.
            mine = _mine(blocks, i, start, block)
            left, right = (jnp.where(mine, jax.lax.dynamic_slice_in_dim(a, start, block), 0) for a in (x, dy))
            part = jax.lax.dot_general(left, right, (((0,), (0,)), ((), ())), preferred_element_type=accumulate)
            old = jax.lax.dynamic_index_in_dim(out, blocks.group[i], keepdims=False)
            return jax.lax.dynamic_update_index_in_dim(out, old + part, blocks.group[i], 0)

        return jax.lax.fori_loop(0, blocks.count, body, out).astype(out_dtype)

    return product(x, dy, group_sizes)


def _cut(config: Any, rows: int, groups: int) -> tuple[int, int]:
    """(room, block) with the defaults filled in."""
    config = config or Config()
    if not isinstance(config, Config):
        raise UserError(f"config is a {type(config).__module__}.{type(config).__name__}; 'cpu' takes its own Config")
    room = batch_room(rows, groups) if config.room is None else config.room
    return room, min(config.block or block_rows(rows, groups), rows)


def batch_room(rows: int, groups: int) -> int:
    """Places a group in the batched product: its even share and the spread of a random draw; 0 for none of it."""
    mean = rows / groups
    return -(-int(mean + math.sqrt(mean)) // 8) * 8 if _FEWEST <= mean <= _MOST else 0


def block_rows(rows: int, groups: int) -> int:
    """Half of a mean group, a power of two in 16..128: of those measured (16 to 256), near the best for each shape."""
    half = max(rows // (2 * groups), 1)
    return min(max(1 << (half - 1).bit_length(), 16), 128)


class _Places:
    """The first `room` rows of every group, as [G, room, ...], and back.

    taken bool[G, room]: whether a row is there; source int[G, room]: which. placed bool[M]: whether a row has a place;
    target int[M]: which.
    """

    def __init__(self, group_sizes: Int[Array, "G"], rows: int, room: int):
        ends = jnp.cumsum(group_sizes)
        starts, row = ends - group_sizes, jnp.arange(rows)
        place = jnp.arange(room)
        self.taken = place < group_sizes[:, None]
        self.source = jnp.minimum(starts[:, None] + place, rows - 1)
        group = jnp.minimum(jnp.searchsorted(ends, row, side="right"), len(ends) - 1)
        inside = row - starts[group]
        self.placed = (inside < room) & (row < ends[-1])
        self.target = group * room + jnp.minimum(inside, room - 1)

    def read(self, rows: Float[Array, "M K"], masked: bool = False) -> Float[Array, "G C K"]:
        """Places that no row takes hold a neighbour's; masked: zeros."""
        every = rows[self.source]
        return jnp.where(self.taken[..., None], every, 0) if masked else every

    def write(self, every: Float[Array, "G C N"]) -> Float[Array, "M N"]:
        """Zero for rows without a place."""
        return jnp.where(self.placed[:, None], every.reshape(-1, every.shape[-1])[self.target], 0)


def _mine(blocks: Blocks, i, start, size: int):
    """[size, 1]: whether the rows from `start` on belong to block i."""
    row = start + jnp.arange(size)[:, None]
    return (row >= blocks.start[i]) & (row < blocks.stop[i])

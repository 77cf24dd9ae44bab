"""Which rows a kernel visits, and with which matrix: computed on the device from the group sizes, in a static bound of
slots, so that one program serves every routing (moe_split.md 6.3).
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int


class Blocks(NamedTuple):
    """Rows start..stop-1 of one group, at most `size`. V = ceil(M / size) + G slots, the first `count` in use."""

    count: Int[Array, ""]
    group: Int[Array, "V"]
    start: Int[Array, "V"]
    stop: Int[Array, "V"]


def make_blocks(group_sizes: Int[Array, "G"], rows: int, size: int, skip: int = 0) -> Blocks:
    """The blocks of all groups in order, without the first `skip` rows of each. Each group starts a block of its own:
    fewer than blocks on a fixed grid."""
    groups = group_sizes.shape[0]
    ends = jnp.cumsum(group_sizes)
    per_group = -(-jnp.maximum(group_sizes - skip, 0) // size)
    last = jnp.cumsum(per_group)  # blocks up to and with each group
    slot = jnp.arange(-(-rows // size) + groups)
    group = jnp.minimum(jnp.searchsorted(last, slot, side="right"), groups - 1).astype(jnp.int32)
    start = (ends - group_sizes)[group] + skip + size * (slot - (last - per_group)[group])
    return Blocks(last[-1], group, start, jnp.minimum(start + size, ends[group]))


class Visits(NamedTuple):
    """Rows first..stop-1 of one group inside one tile of a fixed grid. V = ceil(M / size) + G - 1 slots.

    The first `count` are in use, sorted by group and by tile. A visit without rows (first == stop) has a tile all the
    same: a kernel reads nothing for it and may only write zeros.
    """

    count: Int[Array, ""]
    group: Int[Array, "V"]
    tile: Int[Array, "V"]
    first: Int[Array, "V"]
    stop: Int[Array, "V"]


def make_visits(
    group_sizes: Int[Array, "G"], rows: int, size: int, *, every_tile: bool = False, every_group: bool = False
) -> Visits:
    """The visits of all groups to tiles of `size` rows that are pinned to multiples of `size` (moe_split.md 6.3).

    `every_group`: a group without rows gets one visit without rows. `every_tile`: after the groups, each tile beyond
    the last group's rows gets one, at the end of those rows; its group is the last visited one, so that a kernel that
    goes by it fetches no other matrix. Neither needs more slots: with any rows at all, an empty group gives up one of
    its slots for its own visit; without, one tile bounds what the groups may visit.
    """
    if every_tile and every_group:
        raise ValueError("every_tile and every_group together may need more visits than there are slots")
    groups, tiles = group_sizes.shape[0], -(-rows // size)
    sizes = group_sizes.astype(jnp.int32)
    ends = jnp.cumsum(sizes, dtype=jnp.int32)
    starts = ends - sizes
    per_group = jnp.where(sizes > 0, -(-ends // size) - starts // size, int(every_group))
    last = jnp.cumsum(per_group, dtype=jnp.int32)  # visits up to and with each group
    used = last[-1]
    slot = jnp.arange(tiles + groups - 1, dtype=jnp.int32)
    # Slots beyond `used` repeat the last visit's group: nothing new to fetch.
    group = jnp.searchsorted(last, jnp.minimum(slot, jnp.maximum(used - 1, 0)), side="right").astype(jnp.int32)
    group = jnp.minimum(group, groups - 1)
    tile = starts[group] // size + slot - (last - per_group)[group]
    first = jnp.maximum(starts[group], tile * size)
    stop = jnp.minimum(ends[group], (tile + 1) * size)
    covered = -(-ends[-1] // size)  # tiles that hold rows of a group
    inside = slot < used
    tile = jnp.where(inside, tile, covered + slot - used if every_tile else covered - 1)
    first, stop = jnp.where(inside, first, ends[-1]), jnp.where(inside, stop, ends[-1])
    count = used + (tiles - covered if every_tile else 0)
    return Visits(count.astype(jnp.int32), group, jnp.clip(tile, 0, tiles - 1), first, stop)

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


def make_blocks(group_sizes: Int[Array, "G"], rows: int, size: int) -> Blocks:
    """The blocks of all groups in order. Each group starts a block of its own: fewer than blocks on a fixed grid."""
    groups = group_sizes.shape[0]
    ends = jnp.cumsum(group_sizes)
    per_group = -(-group_sizes // size)
    last = jnp.cumsum(per_group)  # blocks up to and with each group
    slot = jnp.arange(-(-rows // size) + groups)
    group = jnp.minimum(jnp.searchsorted(last, slot, side="right"), groups - 1).astype(jnp.int32)
    start = (ends - group_sizes)[group] + size * (slot - (last - per_group)[group])
    return Blocks(last[-1], group, start, jnp.minimum(start + size, ends[group]))

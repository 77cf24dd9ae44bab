"""Fingerprints of arrays: sums that change if any bit does, taken where the array lies (training_runtime.md section 5).

Per leaf two sums modulo 2^32 of its bit pattern, each word weighted by an odd hash of its position. Positions are flat
indices in the global array, so the same values give the same fingerprint on every mesh and process count; each device
sums its own part, and only the sums travel.

Why one flipped bit always shows: it changes a word by 2^b, b < 32, so a sum by w * 2^b, which is not 0 modulo 2^32
because w is odd. Bit 31 would be lost in pairs (w * 2^31 is 2^31 for every odd w: two flipped signs cancel), therefore
the second sum reads each word with its halves swapped, and every bit has 17 bits of weight or more in one of the two.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from train.runtime.state import path_text

_UNSIGNED = {2: jnp.uint2, 4: jnp.uint4, 8: jnp.uint8, 16: jnp.uint16, 32: jnp.uint32, 64: jnp.uint32}
_EXACT = 2**32  # elements that positions count exactly
_GOLDEN = 0x9E3779B1  # 2^32 / golden ratio, odd: a bijection modulo 2^32


def fingerprints(state: Any) -> dict[str, str]:
    """``path/of/leaf`` -> ``"<both sums in hex> <dtype>[<shape>]"`` for every leaf of a tree of jax arrays.

    One compiled call for the tree and one transfer. Any dtype, typed PRNG keys, scalars and empty arrays included.
    Collective: with several processes all of them call it. Raises TypeError for a leaf that is not a jax array.
    """
    leaves = by_path(state)
    for path, leaf in leaves.items():
        if not isinstance(leaf, jax.Array):
            raise TypeError(f"{path} is of type {type(leaf).__name__}, not a jax array; jnp.asarray makes it one")
    if not leaves:
        return {}
    meshes = (leaf.sharding.mesh for leaf in leaves.values() if isinstance(leaf.sharding, NamedSharding))
    mesh = next(meshes, None)
    sums = jax.device_get(_compiled(mesh)(list(leaves.values())))  # explicit: allowed under a transfer guard
    shown = layout(state)
    return {path: f"{a:08x}{b:08x} {shown[path]}" for path, (a, b) in zip(leaves, sums.tolist(), strict=True)}


def layout(tree: Any) -> dict[str, str]:
    """``path/of/leaf`` -> ``"float32[8,16]"``, of arrays or of jax.ShapeDtypeStruct."""
    return {path: f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]" for path, leaf in by_path(tree).items()}


def by_path(tree: Any) -> dict[str, Any]:
    """The leaves by path. Raises ValueError if two share one (a key that contains a slash)."""
    pairs = [(path_text(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("two leaves have the same path; keep slashes out of keys")
    return found


@functools.cache
def _compiled(mesh: Any) -> Any:
    """The jitted call; its result is replicated over `mesh`, or a process could not read it."""
    whole = None if mesh is None else NamedSharding(mesh, PartitionSpec())
    return jax.jit(lambda leaves: jnp.stack([_sums(leaf) for leaf in leaves]), out_shardings=whole)


def _sums(leaf: jax.Array) -> jax.Array:
    """uint32[2] of one leaf."""
    words = _words(leaf)
    position = _positions(words.shape) * jnp.uint32(0x85EBCA6B)  # constants of MurmurHash3's finalizer
    position = (position ^ (position >> 13)) * jnp.uint32(0xC2B2AE35)
    first = position ^ (position >> 16)
    second = first * jnp.uint32(_GOLDEN)
    second = second ^ (second >> 15)
    swapped = (words << 16) | (words >> 16)
    terms, zero = ((first | 1) * words, (second | 1) * swapped), jnp.uint32(0)
    # One reduction of a pair: 13 GB/s on two CPU cores, where two jnp.sum give 0.6 GB/s.
    return jnp.stack(jax.lax.reduce(terms, (zero, zero), lambda a, b: (a[0] + b[0], a[1] + b[1]), range(words.ndim)))


def _words(leaf: jax.Array) -> jax.Array:
    """The bit pattern as uint32; elements of 64 bits and complex ones take two words in a new last dimension."""
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    if leaf.dtype == jnp.bool_:
        return leaf.astype(jnp.uint32)
    if jnp.issubdtype(leaf.dtype, jnp.complexfloating):  # bitcast_convert_type takes no complex numbers
        leaf = jnp.stack([leaf.real, leaf.imag], axis=-1)
    unsigned = _UNSIGNED[jax.dtypes.itemsize_bits(leaf.dtype)]
    return jax.lax.bitcast_convert_type(leaf, unsigned).astype(jnp.uint32)


def _positions(shape: tuple[int, ...]) -> jax.Array:
    """uint32 of `shape`: the flat index, folded to 32 bits beyond 2^32 elements.

    Made of broadcasted_iota and multiplications only, which the partitioner splits like the array itself; jnp.arange
    with a reshape would exist whole on every device. Trailing dimensions of up to 2^32 elements count exactly; the
    index over the leading ones is spread over 32 bits and added.
    """
    position = jnp.zeros(shape, jnp.uint32)
    split = next((d for d in range(len(shape)) if math.prod(shape[d:]) <= _EXACT), len(shape))
    for dims, spread in ((range(split, len(shape)), 1), (range(split), _GOLDEN)):
        stride = 1
        for d in reversed(dims):
            step = jnp.uint32(stride * spread % 2**32)
            position = position + jax.lax.broadcasted_iota(jnp.uint32, shape, d) * step
            stride *= shape[d]
    return position

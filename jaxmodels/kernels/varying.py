"""Arrays inside `jax.shard_map`: along which mesh axes one may differ from device to device.

Loops need a carry of constant type and custom_vjp functions cotangents of their operands' type; a fresh array of zeros
or ones varies along no axis, and must be declared to.
"""

from collections.abc import Iterable

import jax


def varying_axes(*arrays: jax.Array) -> frozenset[str]:
    """The mesh axes along which any of these varies; none outside shard_map."""
    found: frozenset[str] = frozenset()
    for array in arrays:
        kind = jax.typeof(array)
        # jax 0.10 and later: manual_axis_type.varying; before and in some releases between: vma.
        manual = getattr(kind, "manual_axis_type", None)
        found |= manual.varying if manual is not None else getattr(kind, "vma", frozenset())
    return found


def vary(array: jax.Array, axes: Iterable[str]) -> jax.Array:
    """The same values as an array that varies along `axes` too; its gradient is summed over them."""
    missing = tuple(sorted(set(axes) - varying_axes(array)))
    return jax.lax.pcast(array, missing, to="varying") if missing else array

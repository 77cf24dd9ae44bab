"""Parameters with logical axis names."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx


def param(rngs: nnx.Rngs, shape: Sequence[int], names: Sequence[str | None], *, dtype=jnp.float32,
          std: float | None = None, value: float | None = None) -> nnx.Param:
    """A parameter drawn from N(0, std²), or filled with ``value``.

    ``names`` are logical axes (embed, mlp, heads, expert, vocab): a rules object maps them to mesh axes when the
    training runtime places the state, so nothing is placed here (``eager_sharding=False``).
    """
    if value is not None:
        array = jnp.full(shape, value, dtype)
    else:
        array = (std * jax.random.normal(rngs.params(), shape)).astype(dtype)
    return nnx.Param(array, out_sharding=tuple(names), eager_sharding=False)

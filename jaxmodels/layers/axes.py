"""Logical axes of activations. Models name them; the training runtime says what the names mean on its mesh."""

import contextlib
import contextvars
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from jax.sharding import AxisType, PartitionSpec

_rules: contextvars.ContextVar[Mapping[str, Any] | None] = contextvars.ContextVar("axis_rules", default=None)


@contextlib.contextmanager
def axis_rules(rules: Mapping[str, Any]) -> Iterator[None]:
    """Inside, `constrain` places activations by these rules (logical name -> mesh axes) on the mesh of jax.set_mesh."""
    token = _rules.set(rules)
    try:
        yield
    finally:
        _rules.reset(token)


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """`x`, laid out by the logical names of its axes; as it is where no rules or no mesh are set.

    Left to itself, XLA may gather a whole batch to spare the gathering of a parameter that is cut along the same axis.
    """
    rules, mesh = _rules.get(), jax.sharding.get_abstract_mesh()
    if rules is None or mesh.empty or any(kind != AxisType.Auto for kind in mesh.axis_types):
        return x  # Manual axes: inside shard_map every array is already a device's own part
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*(rules.get(name) if name else None for name in names)))

"""Products of row groups with their own matrix each: the core of every sparse-expert layer (moe_split.md 6.2)."""

from jaxmodels.kernels.grouped_matmul.api import (
    Implementation,
    grouped_glu,
    grouped_matmul,
    grouped_outer,
    lowering_for,
    register,
)

__all__ = ["Implementation", "grouped_glu", "grouped_matmul", "grouped_outer", "lowering_for", "register"]

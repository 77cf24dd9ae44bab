"""Configurations that were fastest on a device: measured when asked to, kept in tables, looked up by `grouped_matmul`.

`tune` times and `record` writes to the user's cache; both run only when somebody calls them (``jaxmodels bench
tune_grouped_matmul``). `grouped_matmul` with config=None calls `lookup`, which reads the user's table, then one shipped
beside this file, and never measures. $JAXMODELS_TUNING=0 leaves the tables out, and every implementation its default.

Products are named as in moe_split.md 6.2, sides as the product is called: "fwd" and "dX" take rows of `inner` numbers
to rows of `columns`, by matrices [inner, columns] and [columns, inner]; "dW" makes matrices [inner, columns].
"""

import functools
import os
from typing import Any

import jax
import jax.numpy as jnp

from jaxmodels.kernels.grouped_matmul.tuning.tables import device_kind, find, record

__all__ = ["device_kind", "for_call", "lookup", "record", "tune"]

_PLATFORM = {"cpu": "cpu", "tpu": "tpu", "hopper": "gpu"}


def lookup(
    implementation: str, product: str, rows: int, inner: int, columns: int, groups: int, dtype: Any, kind: str
) -> Any:
    """The Config that was fastest on a device of this kind; None if there is none.

    Sides, groups and dtype are those of the call, rows have the same nearest power of two.
    """
    if os.environ.get("JAXMODELS_TUNING") == "0":
        return None
    return find(kind, (implementation, product, inner, columns, groups, jnp.dtype(dtype).name), rows)


def for_call(implementation: str, product: str, left: Any, right: Any, group_sizes: Any, transpose_w: bool) -> Any:
    """`lookup` for a call of `grouped_matmul` ("matmul") or `grouped_outer` ("outer") on the device that is here."""
    kind = _kind(_PLATFORM.get(implementation))
    if kind is None:
        return None
    columns = right.shape[1 if transpose_w else -1]
    name = "dW" if product == "outer" else "dX" if transpose_w else "fwd"
    return lookup(implementation, name, *left.shape, columns, group_sizes.shape[0], left.dtype, kind)


@functools.cache
def _kind(platform: str | None) -> str | None:
    """None where the implementation's platform is not here: programs for it are compiled ahead of time."""
    here = jax.default_backend()
    return device_kind(platform or here) if platform in ("cpu", here, None) else None


def tune(*arguments: Any, **keywords: Any) -> Any:
    """See `jaxmodels.kernels.grouped_matmul.tuning.tuner.tune`, which is imported when it is called."""
    from jaxmodels.kernels.grouped_matmul.tuning import tuner

    return tuner.tune(*arguments, **keywords)

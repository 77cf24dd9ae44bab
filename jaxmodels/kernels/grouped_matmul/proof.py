"""Whether a kernel computes the right thing on the device that is here, asked once before it becomes the default.

Kernels are developed where their hardware is not: interpreters and compilers prove much, not that the device agrees.
A small case with everything that goes wrong in kernels (groups that are empty, of one row, cut by a tile; rows that
belong to none, and hold NaN) costs a few compilations, which the compilation cache keeps.
"""

import functools
import threading
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.kernels.activations import ACTIVATIONS
from jaxmodels.kernels.grouped_matmul import reference

SIZES = (130, 0, 1, 64, 0, 77, 127)  # rows of the groups; 13 more belong to none
ROWS, K, N = sum(SIZES) + 13, 256, 192
LIMIT = {"float32": 1e-3, "bfloat16": 1e-2, "float16": 3e-3}  # relative Frobenius error; float32 may run as tf32


def wrong(matmul: Callable[..., Any], outer: Callable[..., Any], dtype: Any) -> str | None:
    """What the products get wrong on this device, or None. May be called while something is traced."""
    return _asked(lambda: _check(matmul, outer, jnp.dtype(dtype)))


def wrong_glu(glu: Callable[..., Any], activation: str, dtype: Any) -> str | None:
    """The same of a fused gate and up."""
    return _asked(lambda: _check_glu(glu, activation, jnp.dtype(dtype)))


def _asked(check: Callable[[], str | None]) -> str | None:
    found: list[str | None] = []

    def work() -> None:
        try:
            found.append(check())
        except Exception as error:
            found.append(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")

    thread = threading.Thread(target=work)  # a thread of its own has no trace and no mesh around it
    thread.start()
    thread.join()
    return found[0]


def _check(matmul: Callable[..., Any], outer: Callable[..., Any], dtype: Any) -> str | None:
    x, dy, w, _ = _operands(dtype)
    sizes = jnp.asarray(SIZES, jnp.int32)
    cases = {
        "forward": (matmul, reference.matmul, (x, w, sizes), {"transpose_w": False, "out_dtype": dtype}),
        "dX": (matmul, reference.matmul, (dy, w, sizes), {"transpose_w": True, "out_dtype": dtype}),
        "dW": (outer, reference.outer, (x, dy, sizes), {"out_dtype": jnp.dtype(jnp.float32)}),
    }
    for name, (function, truth, operands, keywords) in cases.items():
        got, wanted = (jax.jit(functools.partial(f, **keywords))(*operands) for f in (function, truth))
        if reason := _differs(name, got, wanted, LIMIT[dtype.name]):
            return reason
    return None


def _check_glu(glu: Callable[..., Any], activation: str, dtype: Any) -> str | None:
    x, _, gate, up = _operands(dtype)
    sizes = jnp.asarray(SIZES, jnp.int32)
    product = functools.partial(reference.matmul, transpose_w=False, out_dtype=jnp.float32)
    g, u = (jax.jit(product)(x, w, sizes) for w in (gate, up))
    wanted = {"h": ACTIVATIONS[activation](g) * u, "gate": g, "up": u}
    got = jax.jit(functools.partial(glu, activation=activation, keep=True, config=None))(x, gate, up, sizes)
    alone = jax.jit(functools.partial(glu, activation=activation, keep=False, config=None))(x, gate, up, sizes)
    for (name, truth), value in zip([*wanted.items(), ("h", wanted["h"])], [*got, alone], strict=True):
        # h multiplies two sums: its error is theirs together.
        if reason := _differs(f"{name} of glu", value, truth, 2 * LIMIT[dtype.name]):
            return reason
    return None


def _operands(dtype: Any) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    rng = np.random.default_rng(0)
    tail = np.arange(ROWS)[:, None] >= sum(SIZES)
    draw = lambda *shape: rng.standard_normal(shape, np.float32)  # noqa: E731
    x, dy, w = np.where(tail, np.nan, draw(ROWS, K)), np.where(tail, np.nan, draw(ROWS, N)), draw(len(SIZES), K, N)
    return tuple(jnp.asarray(a, dtype) for a in (x, dy, w / K**0.5, draw(len(SIZES), K, N) / K**0.5))


def _differs(name: str, got: Any, wanted: Any, limit: float) -> str | None:
    got, wanted = np.asarray(got, np.float64), np.asarray(wanted, np.float64)
    distance = np.linalg.norm(got - wanted) / np.linalg.norm(wanted)
    if not distance <= limit:
        return f"{name} is off by {distance:.1e} (limit {limit:g}) on this device"
    return f"{name} is not zero where it should be on this device" if got[wanted == 0].any() else None

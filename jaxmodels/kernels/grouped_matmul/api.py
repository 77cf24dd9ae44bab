"""`grouped_matmul` and `grouped_outer`: one signature, several implementations, gradients from each other."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxmodels.errors import UserError
from jaxmodels.kernels.grouped_matmul import cpu, reference, xla


@dataclass(frozen=True)
class Implementation:
    """A way to compute both products. `unfit` says why it cannot run the given shapes here, or None.

    `matmul(x, w, group_sizes, *, transpose_w, out_dtype)`, `outer(x, dy, group_sizes, *, out_dtype)`; with
    `takes_config` both also get `config=`. `unfit(x_shape, group_count, dtype)` must not touch device memory.
    """

    matmul: Callable[..., Any]
    outer: Callable[..., Any]
    unfit: Callable[[tuple[int, ...], int, Any], str | None] = lambda shape, groups, dtype: None
    takes_config: bool = False


_IMPLEMENTATIONS: dict[str, Implementation] = {}


def register(name: str, implementation: Implementation) -> None:
    """Add an implementation under the name that `implementation=` takes."""
    _IMPLEMENTATIONS[name] = implementation


register("reference", Implementation(reference.matmul, reference.outer))
register("loop", Implementation(reference.loop_matmul, reference.loop_outer))
register("xla", Implementation(xla.matmul, xla.outer))
register("cpu", Implementation(cpu.matmul, cpu.outer, cpu.unfit))


def grouped_matmul(
    x: Float[Array, "M K"],
    w: Float[Array, "_ _ _"],  # G K N, or G N K with transpose_w
    group_sizes: Int[Array, "G"],
    *,
    transpose_w: bool = False,
    out_dtype: Any = None,
    implementation: str | Sequence[str] | None = None,
    config: Any = None,
) -> Float[Array, "M N"]:
    """Rows of group e times w[e]: [M, K] x [G, K, N] -> [M, N]; with `transpose_w`, w is [G, N, K].

    The first group_sizes[0] rows belong to group 0, the next to group 1 and so on. Rows past the last group give
    zero and reach nothing; their sum may not exceed M (checked when jax_enable_checks is on). A NaN in one group
    stays in it. Accumulates in float32; `out_dtype` defaults to that of x. Differentiable in x and w.
    `implementation`: None chooses; a name must run or raises with the reason; of a sequence, the first that runs.
    """
    _check(x, w, group_sizes, x.shape[1], w.shape[2 if transpose_w else 1])
    chosen = _names(implementation)
    return _matmul(bool(transpose_w), jnp.dtype(out_dtype or x.dtype), chosen, config, x, w, group_sizes)


def grouped_outer(
    x: Float[Array, "M K"],
    dy: Float[Array, "M N"],
    group_sizes: Int[Array, "G"],
    *,
    out_dtype: Any = jnp.float32,
    implementation: str | Sequence[str] | None = None,
    config: Any = None,
) -> Float[Array, "G K N"]:
    """x_e^T dy_e over the rows of each group: the gradient of `grouped_matmul` in w. Empty groups give exact zeros."""
    _check(x, dy, group_sizes, x.shape[0], dy.shape[0])
    return _outer(jnp.dtype(out_dtype), _names(implementation), config, x, dy, group_sizes)


# The choice is made for each product on its own: the gradient in x of a product that narrows is one that widens.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _matmul(transpose_w, out_dtype, names, config, x, w, group_sizes):
    here = _on_cpu(x.shape, w.shape[1 if transpose_w else 2], group_sizes.shape[0], outer=False)
    return _run("matmul", names, here, config, x, w, group_sizes, transpose_w=transpose_w, out_dtype=out_dtype)


def _matmul_forward(transpose_w, out_dtype, names, config, x, w, group_sizes):
    return _matmul(transpose_w, out_dtype, names, config, x, w, group_sizes), (x, w, group_sizes)


def _matmul_backward(transpose_w, out_dtype, names, config, saved, dy):
    x, w, group_sizes = saved
    dy = dy.astype(x.dtype)
    dx = _matmul(not transpose_w, x.dtype, names, config, dy, w, group_sizes)
    dw = _outer(w.dtype, names, config, *((dy, x) if transpose_w else (x, dy)), group_sizes)
    return dx, dw, None


_matmul.defvjp(_matmul_forward, _matmul_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _outer(out_dtype, names, config, x, dy, group_sizes):
    here = _on_cpu(x.shape, dy.shape[1], group_sizes.shape[0], outer=True)
    return _run("outer", names, here, config, x, dy, group_sizes, out_dtype=out_dtype)


def _outer_forward(out_dtype, names, config, x, dy, group_sizes):
    return _outer(out_dtype, names, config, x, dy, group_sizes), (x, dy, group_sizes)


def _outer_backward(out_dtype, names, config, saved, dw):
    x, dy, group_sizes = saved
    dw = dw.astype(x.dtype)
    dx = _matmul(True, x.dtype, names, config, dy, dw, group_sizes)
    return dx, _matmul(False, dy.dtype, names, config, x, dw, group_sizes), None


_outer.defvjp(_outer_forward, _outer_backward)


def _names(implementation: str | Sequence[str] | None) -> tuple[str, ...] | None:
    if implementation is None:
        return None
    names = (implementation,) if isinstance(implementation, str) else tuple(implementation)
    for name in names:
        if name not in _IMPLEMENTATIONS:
            raise UserError(f"implementation {name!r} is unknown; choose from {', '.join(_IMPLEMENTATIONS)}")
    return names


def _run(product, names, here, config, left, right, group_sizes, **keywords):
    """The product by the first of the names that can run. Without names: `here` on CPU, XLA elsewhere; decided when the
    program is lowered, since a CPU may compile it for a TPU that is not there."""

    def by(name: str) -> Callable[..., Array]:
        function = getattr(_IMPLEMENTATIONS[name], product)
        return functools.partial(function, **keywords, **_keywords(name, config))

    if names is not None:
        return by(_choose(names, left, group_sizes))(left, right, group_sizes)
    return jax.lax.platform_dependent(left, right, group_sizes, cpu=by(here), default=by("xla"))


_SMALL = 1_000_000  # multiplications of all rows with all groups: below, a loop costs more than it saves
_FEW = 8  # rows a group: below, `outer` mostly writes zeros, which the others do faster


def _on_cpu(x_shape: tuple[int, ...], columns: int, groups: int, *, outer: bool) -> str:
    """The implementation that was fastest on CPU; numbers in cpu.py.

    For the smallest sizes, the two that expand to all groups: the reference works on M x G x columns of the output,
    XLA on M x G x columns of x, and the narrower wins.
    """
    rows, width = x_shape
    if rows * groups * width * columns >= _SMALL and not (outer and rows < _FEW * groups):
        return "cpu"
    return "reference" if (width <= columns if outer else columns <= width) else "xla"


def _choose(names: tuple[str, ...], x: Any, group_sizes: Any) -> str:
    reasons = []
    for name in names:
        reason = _IMPLEMENTATIONS[name].unfit(x.shape, group_sizes.shape[0], x.dtype)
        if reason is None:
            return name
        reasons.append(f"{name}: {reason}")
    raise UserError(f"no grouped_matmul implementation can run ({'; '.join(reasons) or 'none was named'})")


def _keywords(name: str, config: Any) -> dict[str, Any]:
    if _IMPLEMENTATIONS[name].takes_config:
        return {"config": config}
    if config is not None:
        raise UserError(f"implementation {name!r} takes no config; leave config=None")
    return {}


def _check(x: Any, other: Any, group_sizes: Any, left: int, right: int) -> None:
    if left != right:
        raise UserError(f"grouped product of shapes {x.shape} and {other.shape}: {left} and {right} should be equal")
    if other.ndim == 3 and other.shape[0] != group_sizes.shape[0]:
        raise UserError(f"{group_sizes.shape[0]} group sizes for {other.shape[0]} matrices; give one size a matrix")
    if not jnp.issubdtype(group_sizes.dtype, jnp.integer):
        raise UserError(f"group_sizes has dtype {group_sizes.dtype}; int32 is needed")
    if jax.config.jax_enable_checks and not isinstance(group_sizes, jax.core.Tracer):
        rows = int(np.sum(np.asarray(group_sizes)))
        if rows > x.shape[0]:
            raise UserError(f"group_sizes add up to {rows} rows, x has {x.shape[0]}")

"""`grouped_matmul`, `grouped_outer`, `grouped_glu`: one signature, several implementations, their own gradients."""

import contextlib
import functools
import importlib
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import checkify
from jaxtyping import Array, Float, Int

from jaxmodels.errors import UserError
from jaxmodels.kernels.activations import ACTIVATIONS
from jaxmodels.kernels.grouped_matmul import cpu, native, proof, reference, tuning, xla


@dataclass(frozen=True)
class Implementation:
    """A way to compute the products. `unfit` says why it cannot run the given shapes here, or None.

    `matmul(x, w, group_sizes, *, transpose_w, out_dtype)`, `outer(x, dy, group_sizes, *, out_dtype)`,
    `glu(x, gate, up, group_sizes, *, activation, keep)`; with `takes_config` all also get `config=`. Without a `glu`,
    or where `glu_unsupported(activation)` gives a reason, two products and XLA's activation stand in for it.
    `unfit(x_shape, group_count, dtype)` must not touch device memory; `unsupported` is what of it does not depend on
    the device that is here.
    """

    matmul: Callable[..., Any]
    outer: Callable[..., Any]
    unfit: Callable[[tuple[int, ...], int, Any], str | None] = lambda shape, groups, dtype: None
    takes_config: bool = False
    unsupported: Callable[[tuple[int, ...], int, Any], str | None] = lambda shape, groups, dtype: None
    glu: Callable[..., Any] | None = None
    glu_unsupported: Callable[[str], str | None] = lambda activation: None


_IMPLEMENTATIONS: dict[str, Implementation] = {}


def register(name: str, implementation: Implementation) -> None:
    """Add an implementation under the name that `implementation=` takes."""
    _IMPLEMENTATIONS[name] = implementation


register("reference", Implementation(reference.matmul, reference.outer))
register("loop", Implementation(reference.loop_matmul, reference.loop_outer))
register("xla", Implementation(xla.matmul, xla.outer))
register("cpu", Implementation(cpu.matmul, cpu.outer, cpu.unfit, takes_config=True))
register("native", Implementation(native.matmul, native.outer, native.unfit, glu=native.glu,
                                  glu_unsupported=native.glu_unsupported))


def _pallas(name: str) -> Implementation:
    """A module of Pallas kernels, imported when somebody asks for it: Pallas takes a second to import."""

    def of(function: str) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            return getattr(importlib.import_module(f"jaxmodels.kernels.grouped_matmul.{name}"), function)(
                *arguments, **keywords)

        return call

    return Implementation(of("matmul"), of("outer"), of("unfit"), takes_config=True, unsupported=of("unsupported"),
                          glu=of("glu"), glu_unsupported=of("glu_unsupported"))


register("tpu", _pallas("tpu"))
register("hopper", _pallas("hopper"))

_log = logging.getLogger("jaxmodels.kernels")
_targets: set[str] = set()  # platforms that programs are compiled for and that are not here


@contextlib.contextmanager
def lowering_for(platform: str) -> Iterator[None]:
    """Inside, programs also carry what they would run on `platform` ("tpu"): for compiling ahead of time."""
    if platform != "tpu":
        raise UserError(f"programs are compiled ahead of time for 'tpu', not for {platform!r}")
    _targets.add(platform)
    try:
        yield
    finally:
        _targets.discard(platform)


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
    zero and reach nothing; their sum may not exceed M (checked under checkify, and with jax_enable_checks outside of
    jit). A NaN in one group stays in it. Accumulates in float32; `out_dtype` defaults to that of x. Differentiable in
    x and w. `implementation`: None chooses; a name must run or raises with the reason; of a sequence, the first that
    runs. Raises UserError (a ValueError) for shapes and dtypes that do not fit together.
    """
    _check(x, w, group_sizes, 2, 3, "w")
    _check_equal(x, w, x.shape[1], w.shape[2 if transpose_w else 1])
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
    _check(x, dy, group_sizes, 2, 2, "dy")
    _check_equal(x, dy, x.shape[0], dy.shape[0])
    return _outer(jnp.dtype(out_dtype), _names(implementation), config, x, dy, group_sizes)


def grouped_glu(
    x: Float[Array, "M K"],
    gate: Float[Array, "G K N"],
    up: Float[Array, "G K N"],
    group_sizes: Int[Array, "G"],
    *,
    activation: str = "silu",
    implementation: str | Sequence[str] | None = None,
    config: Any = None,
) -> Float[Array, "M N"]:
    """a(x_e gate[e]) * (x_e up[e]) for the rows of each group e: the first half of a gated expert layer.

    One kernel where the implementation has one: the activation runs on sums that have not left the chip (moe_split.md
    6.7). For the gradient it keeps both products, [M, N] each. Otherwise as `grouped_matmul`.
    """
    _check(x, gate, group_sizes, 2, 3, "gate")
    _check(x, up, group_sizes, 2, 3, "up")
    _check_equal(x, gate, x.shape[1], gate.shape[1])
    if gate.shape != up.shape:
        raise UserError(f"gate {gate.shape} and up {up.shape} should have the same shape")
    check_activation(activation)
    return _glu(activation, _names(implementation), config, x, gate, up, group_sizes)


def check_activation(activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise UserError(f"activation {activation!r} is unknown; choose from {', '.join(ACTIVATIONS)}")


# The choice is made for each product on its own: the gradient in x of a product that narrows is one that widens.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _matmul(transpose_w, out_dtype, names, config, x, w, group_sizes):
    here = functools.partial(_on_cpu, x, w.shape[1 if transpose_w else 2], group_sizes.shape[0], outer=False)
    return _run("matmul", names, here, config, (x, w, group_sizes), transpose_w=transpose_w, out_dtype=out_dtype)


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
    here = functools.partial(_on_cpu, x, dy.shape[1], group_sizes.shape[0], outer=True)
    return _run("outer", names, here, config, (x, dy, group_sizes), out_dtype=out_dtype)


def _outer_forward(out_dtype, names, config, x, dy, group_sizes):
    return _outer(out_dtype, names, config, x, dy, group_sizes), (x, dy, group_sizes)


def _outer_backward(out_dtype, names, config, saved, dw):
    x, dy, group_sizes = saved
    dw = dw.astype(x.dtype)
    dx = _matmul(True, x.dtype, names, config, dy, dw, group_sizes)
    return dx, _matmul(False, dy.dtype, names, config, x, dw, group_sizes), None


_outer.defvjp(_outer_forward, _outer_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _glu(activation, names, config, x, gate, up, group_sizes):
    return _run_glu(activation, names, config, x, gate, up, group_sizes, keep=False)


def _run_glu(activation, names, config, x, gate, up, group_sizes, *, keep):
    here = functools.partial(_on_cpu, x, gate.shape[2], group_sizes.shape[0], outer=False)
    return _run("glu", names, here, config, (x, gate, up, group_sizes), activation=activation, keep=keep)


def _glu_forward(activation, names, config, x, gate, up, group_sizes):
    h, g, u = _run_glu(activation, names, config, x, gate, up, group_sizes, keep=True)
    return h, (x, gate, up, group_sizes, g, u)


def _glu_backward(activation, names, config, saved, dh):
    x, gate, up, group_sizes, g, u = saved
    dg, du = jax.vjp(functools.partial(_gated, activation), g, u)[1](dh.astype(x.dtype))
    dx = sum(_matmul(True, x.dtype, names, config, d, w, group_sizes) for d, w in ((dg, gate), (du, up)))
    return dx, *(_outer(w.dtype, names, config, x, d, group_sizes) for d, w in ((dg, gate), (du, up))), None


_glu.defvjp(_glu_forward, _glu_backward)


def _gated(activation: str, g: Array, u: Array) -> Array:
    """In float32, rounded once."""
    wide = ACTIVATIONS[activation](g.astype(jnp.float32)) * u.astype(jnp.float32)
    return wide.astype(g.dtype)


def _two_products(matmul, x, gate, up, group_sizes, *, activation, keep, **keywords):
    """`glu` of an implementation that has none."""
    g, u = (matmul(x, w, group_sizes, transpose_w=False, out_dtype=x.dtype, **keywords) for w in (gate, up))
    h = _gated(activation, g, u)
    return (h, g, u) if keep else h


def _names(implementation: str | Sequence[str] | None) -> tuple[str, ...] | None:
    if implementation is None:
        return None
    names = (implementation,) if isinstance(implementation, str) else tuple(implementation)
    for name in names:
        if name not in _IMPLEMENTATIONS:
            raise UserError(f"implementation {name!r} is unknown; choose from {', '.join(_IMPLEMENTATIONS)}")
    return names


def _run(product, names, here, config, operands, **keywords):
    """The product by the first of the names that can run; without names, by what is best for each platform.

    Which platform that is gets decided when the program is lowered: a machine with an accelerator also compiles for its
    CPU, and a CPU for an accelerator that is not there (`lowering_for`).
    """

    left, right, group_sizes = operands[0], operands[1], operands[-1]

    def by(name: str) -> Callable[..., Array]:
        function, chosen = _function(name, product, keywords.get("activation"), left.dtype), config
        if config is None and _IMPLEMENTATIONS[name].takes_config:  # from a table; nothing is timed here
            chosen = tuning.for_call(name, product, left, right, group_sizes, keywords.get("transpose_w", False))
        return functools.partial(function, **keywords, **_keywords(name, chosen))

    if names is not None:
        return by(_choose(names, left, group_sizes))(*operands)
    here = here()  # not before: it may compile `native`, which who names another implementation does not want
    platform = jax.default_backend()
    elsewhere = {kind: by(_on_accelerator(kind, left, group_sizes)) for kind in {platform, *_targets} - {"cpu"}}
    if not elsewhere:
        _tell("cpu", here)
        return by(here)(*operands)
    branches = {"cuda" if kind == "gpu" else kind: function for kind, function in elsewhere.items()}
    return jax.lax.platform_dependent(*operands, cpu=by(here), default=by("xla"), **branches)


def _function(name: str, product: str, activation: str | None, dtype: Any) -> Callable[..., Any]:
    chosen = _IMPLEMENTATIONS[name]
    if product != "glu":
        return getattr(chosen, product)
    if chosen.glu is None or chosen.glu_unsupported(activation) or _wrong_glu(name, activation, dtype):
        return functools.partial(_two_products, chosen.matmul)
    return chosen.glu


def _on_accelerator(platform: str, x: Any, group_sizes: Any) -> str:
    name = {"tpu": "tpu", "gpu": "hopper"}.get(platform, "xla")
    chosen, about = _IMPLEMENTATIONS[name], (x.shape, group_sizes.shape[0], x.dtype)
    if platform in _targets:
        reason = chosen.unsupported(*about)
    else:
        reason = chosen.unfit(*about) or (_wrong(name, x.dtype) if name != "xla" else None)
    if reason is not None:
        _fall_back(name, reason)
        name = "xla"
    _tell(platform, name)
    return name


@functools.cache
def _wrong(name: str, dtype: Any) -> str | None:
    return proof.wrong(_IMPLEMENTATIONS[name].matmul, _IMPLEMENTATIONS[name].outer, dtype)


@functools.cache
def _wrong_glu(name: str, activation: str, dtype: Any) -> str | None:
    """Of a kernel for an accelerator that is here."""
    if name not in ("tpu", "hopper") or jax.default_backend() == "cpu":
        return None
    reason = proof.wrong_glu(_IMPLEMENTATIONS[name].glu, activation, dtype)
    if reason is not None:
        _fall_back(f"glu of {name}", reason)
    return reason


@functools.cache
def _tell(platform: str, name: str) -> None:
    """Once for each choice."""
    _log.info("grouped products on %s: implementation %r", platform, name)


@functools.cache
def _fall_back(name: str, reason: str) -> None:
    warnings.warn(f"grouped products run by XLA, slowly, because {name!r} cannot: {reason}", stacklevel=2)


_SMALL = 1_000_000  # multiplications of all rows with all groups: below, a loop costs more than it saves
_FEW = 8  # rows a group: below, `outer` mostly writes zeros, which the others do faster


def _on_cpu(x: Any, columns: int, groups: int, *, outer: bool) -> str:
    """The implementation that was fastest on CPU (docs/log.md); `native` where it can be compiled.

    For the smallest sizes, the two that expand to all groups: the reference works on M x G x columns of the output,
    XLA on M x G x columns of x, and the narrower wins.
    """
    if jax.default_backend() == "cpu" and x.dtype.itemsize <= 4 and native.unavailable() is None:
        return "native"
    rows, width = x.shape
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


def _check(x: Any, other: Any, group_sizes: Any, x_rank: int, other_rank: int, name: str) -> None:
    for what, array, rank in (("x", x, x_rank), (name, other, other_rank), ("group_sizes", group_sizes, 1)):
        if array.ndim != rank:
            raise UserError(f"{what} has shape {array.shape}; {rank} dimensions are needed")
    for what, array in (("x", x), (name, other)):
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise UserError(f"{what} has dtype {array.dtype}; float32, bfloat16 or float16 are needed")
    if not jnp.issubdtype(group_sizes.dtype, jnp.integer):
        raise UserError(f"group_sizes has dtype {group_sizes.dtype}; int32 is needed")
    if other.ndim == 3 and other.shape[0] != group_sizes.shape[0]:
        raise UserError(f"{group_sizes.shape[0]} group sizes for {other.shape[0]} matrices; give one size a matrix")
    rows = x.shape[0]
    if jax.config.jax_enable_checks and not isinstance(group_sizes, jax.core.Tracer):
        sizes = np.asarray(group_sizes)
        if (sizes < 0).any() or int(sizes.sum()) > rows:
            raise UserError(f"group_sizes {sizes.tolist()} must not be negative, and add up to {int(sizes.sum())} rows "
                            f"where x has {rows}")
    checkify.debug_check((group_sizes >= 0).all(), "a group size is negative: {sizes}", sizes=group_sizes)
    checkify.debug_check(group_sizes.sum() <= rows, f"group_sizes {{sizes}} add up to more than the {rows} rows of x",
                         sizes=group_sizes)


def _check_equal(x: Any, other: Any, left: int, right: int) -> None:
    if left != right:
        raise UserError(f"grouped product of shapes {x.shape} and {other.shape}: {left} and {right} should be equal")

"""A sparse expert layer: sort, gather, gate and up, activation, down, weighted sum (moe_split.md 6.1 and 6.7).

Weights are plain dicts: `gate`/`up` [E, D, s], `down` [E, s, D], optional `gate_bias`/`up_bias` [E, s]; a plain
(ungated) layer has no `gate`. Every step is a gather whose gradient is a gather: no scatter, so runs repeat bit for
bit.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxmodels.errors import UserError
from jaxmodels.kernels.activations import ACTIVATIONS
from jaxmodels.kernels.grouped_matmul import grouped_glu, grouped_matmul
from jaxmodels.kernels.grouped_matmul.api import check_activation
from jaxmodels.kernels.varying import vary, varying_axes


def expert_ffn(
    experts: Mapping[str, Array],
    x: Float[Array, "T D"],
    active: Int[Array, "_ k"],
    weights: Float[Array, "_ k"] | None = None,
    *,
    activation: str = "silu",
    block: int = 1,
    recompute: bool = False,
    implementation: str | None = None,
) -> Float[Array, "T D"]:
    """sum over c of weights[t, c] FFN_active[t, c](x[t]); no capacity, no token is ever dropped.

    active: [T, k], the distinct experts of each token; E marks an empty place. weights: ones if None. With `block` > 1
    they are [T / block, k]: neighbouring tokens share their experts and travel together, which sorts and gathers
    `block` times fewer, longer rows. recompute: keep only the sorted rows for the gradient and compute gate, up and
    hidden again (2 more of the 9 products of a gated layer's step, and 3 M s numbers less). `implementation` goes to
    `grouped_matmul`. Raises UserError for sizes that do not fit.
    """
    (T, D), count = x.shape, experts["up"].shape[0]
    if block < 1 or T % block or active.shape[0] != T // block:
        raise UserError(f"block={block} and active {active.shape} do not fit {T} tokens; active must be "
                        f"[{T} / block, k], and block divide {T}")
    plan = dispatch(active, count)
    rows = gather_rows(x.reshape(T // block, block * D), plan).reshape(-1, D)

    def through(experts: Mapping[str, Array], rows: Array) -> Array:
        return expert_rows(experts, rows, plan.group_sizes * block, activation, implementation)[0]

    through = jax.checkpoint(through) if recompute else through
    out = through({name: w for name, w in experts.items() if name != "down_bias"}, rows)
    if weights is None:
        weights = vary(jnp.ones(active.shape, x.dtype), varying_axes(out))
    return combine_rows(out.reshape(-1, block * D), weights, plan).reshape(T, D)


class Dispatch(NamedTuple):
    """How token copies are ordered by expert. Rows of empty places come last and belong to no group."""

    order: Int[Array, "M"]  # sorted row -> flat place t * k + c
    inverse: Int[Array, "M"]  # flat place -> sorted row
    token: Int[Array, "M"]  # sorted row -> token
    group_sizes: Int[Array, "E"]


def dispatch(active: Int[Array, "T k"], num_experts: int) -> Dispatch:
    """Sort token copies by expert (moe_split.md 6.1). Stable, so that gradients repeat bit for bit."""
    flat = active.reshape(-1)
    order = jnp.argsort(flat, stable=True)
    inverse = jnp.argsort(order, stable=True)
    edges = jnp.searchsorted(flat[order], jnp.arange(num_experts + 1))
    return Dispatch(order, inverse, order // active.shape[1], jnp.diff(edges).astype(jnp.int32))


@jax.custom_vjp
def gather_rows(x: Float[Array, "T D"], plan: Dispatch) -> Float[Array, "M D"]:
    """The input row of every token copy in expert order. Its gradient is a gather and a sum, not a scatter."""
    return x[plan.token]


def _gather_forward(x, plan):
    return x[plan.token], (plan, x.shape[0])


def _gather_backward(saved, dy):
    plan, tokens = saved
    copies = dy[plan.inverse].reshape(tokens, -1, dy.shape[-1])
    return copies.astype(jnp.float32).sum(1).astype(dy.dtype), None


gather_rows.defvjp(_gather_forward, _gather_backward)


@jax.custom_vjp
def combine_rows(rows: Float[Array, "M D"], weights: Float[Array, "T k"], plan: Dispatch) -> Float[Array, "T D"]:
    """The weighted sum of each token's copies, in float32; deterministic, forward and backward."""
    copies = rows[plan.inverse].reshape(*weights.shape, -1).astype(jnp.float32)
    return jnp.einsum("tk,tkd->td", weights.astype(jnp.float32), copies).astype(rows.dtype)


def _combine_forward(rows, weights, plan):
    return combine_rows(rows, weights, plan), (rows, weights, plan)


def _combine_backward(saved, dy):
    rows, weights, plan = saved
    wide = dy.astype(jnp.float32)
    d_rows = weights.reshape(-1)[plan.order][:, None].astype(jnp.float32) * wide[plan.token]
    copies = rows[plan.inverse].reshape(*weights.shape, -1).astype(jnp.float32)
    d_weights = jnp.einsum("tkd,td->tk", copies, wide)
    return d_rows.astype(rows.dtype), d_weights.astype(weights.dtype), None


combine_rows.defvjp(_combine_forward, _combine_backward)


def expert_rows(
    experts: Mapping[str, Array],
    rows: Float[Array, "M D"],
    group_sizes: Int[Array, "E"],
    activation: str,
    implementation: str | None,
) -> tuple[Float[Array, "M D"], Float[Array, "M s"]]:
    """Outputs (without `down_bias`) and h of rows in expert order; zero for rows past the last group."""
    product = lambda rows, w: grouped_matmul(rows, w, group_sizes, implementation=implementation)  # noqa: E731
    # Inside shard_map the ones must vary over devices as the rows do: their cotangent does.
    ones = vary(jnp.ones((rows.shape[0], 1), rows.dtype), varying_axes(rows))

    def project(name):
        out = product(rows, experts[name])
        # A bias is a product with a column of ones: zero for empty places, and its gradient needs no scatter.
        bias = experts.get(f"{name}_bias")
        return out if bias is None else out + product(ones, bias[:, None, :])

    if "gate" in experts and not {"gate_bias", "up_bias"} & set(experts):
        h = grouped_glu(rows, experts["gate"], experts["up"], group_sizes, activation=activation,
                        implementation=implementation)
    else:
        h = hidden({name: project(name) for name in ("gate", "up") if name in experts}, activation)
    return product(h, experts["down"]), h


def hidden(products: Mapping[str, Array], activation: str) -> Array:
    check_activation(activation)
    act = ACTIVATIONS[activation]
    return act(products["gate"]) * products["up"] if "gate" in products else act(products["up"])

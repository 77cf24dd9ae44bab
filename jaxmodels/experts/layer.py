"""The expert feed-forward layer: all experts (exactly the dense layer), or some of them for each token.

Weights are plain dicts: dense `gate`/`up` [D, F], `down` [F, D], optional `gate_bias`/`up_bias` [F]; experts
`gate`/`up` [E, D, s], `down` [E, s, D], biases [E, s]; `down_bias` [D] in both. A plain (ungated) layer has no `gate`.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxmodels.errors import UserError
from jaxmodels.kernels import grouped_matmul
from jaxmodels.kernels.varying import vary, varying_axes

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}


def dense_ffn(
    ffn: Mapping[str, Array], x: Float[Array, "*B D"], *, activation: str
) -> tuple[Float[Array, "*B D"], Float[Array, "*B F"]]:
    """y and h of a dense layer: h = a(x gate) * (x up), or a(x up) without a gate; y = h down."""
    names = [name for name in ("gate", "up") if name in ffn]
    h = _hidden({name: x @ ffn[name] + ffn.get(f"{name}_bias", 0) for name in names}, activation)
    return h @ ffn["down"] + ffn.get("down_bias", 0), h


def apply_experts(
    experts: Mapping[str, Array],
    x: Float[Array, "*B D"],
    *,
    activation: str,
    active: Int[Array, "*B k"] | None = None,
    weights: Float[Array, "*B k"] | None = None,
    num_shared: int = 0,
    implementation: str | None = None,
    return_hidden: bool = False,
) -> tuple[Float[Array, "*B D"], Float[Array, "*B E s"] | None]:
    """y, and h where asked for. Without `active` all experts run: the dense layer, exactly.

    `active` names the distinct experts each token uses; E marks an empty place. `weights` multiply their outputs:
    leave None (ones) for a split model, whose experts are summed. The first `num_shared` experts always run and
    do not belong into `active`. `down_bias` is added once. h is zero where an expert did not run.
    `implementation` goes to `grouped_matmul`. No capacity: no token is ever dropped.
    """
    if active is None:
        if weights is not None:
            raise UserError("weights need active: without it every expert runs with weight 1")
        y, h = _all_experts(experts, x, activation)
    else:
        lead, experts_total = x.shape[:-1], experts["up"].shape[0]
        flat = x.reshape(-1, x.shape[-1])
        plan = dispatch(active.reshape(-1, active.shape[-1]), experts_total)
        w = None if weights is None else weights.reshape(-1, weights.shape[-1])
        y, h = _some_experts(experts, flat, plan, w, activation, implementation, return_hidden)
        if num_shared:
            first = {name: w[:num_shared] for name, w in experts.items() if name != "down_bias"}
            always, shared_h = _all_experts(first, flat, activation)
            y = y + always
            h = h.at[:, :num_shared].set(shared_h) if return_hidden else None
        y = y.reshape(*lead, -1)
        h = h.reshape(*lead, *h.shape[1:]) if return_hidden else None
    return y + experts.get("down_bias", 0), h if return_hidden else None


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


def _hidden(products: Mapping[str, Array], activation: str) -> Array:
    if activation not in ACTIVATIONS:
        raise UserError(f"activation {activation!r} is unknown; choose from {', '.join(ACTIVATIONS)}")
    act = ACTIVATIONS[activation]
    return act(products["gate"]) * products["up"] if "gate" in products else act(products["up"])


def _all_experts(experts, x, activation):
    products = {
        name: jnp.einsum("...d,eds->...es", x, experts[name]) + experts.get(f"{name}_bias", 0)
        for name in ("gate", "up")
        if name in experts
    }
    h = _hidden(products, activation)
    return jnp.einsum("...es,esd->...d", h, experts["down"]), h


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

    h = _hidden({name: project(name) for name in ("gate", "up") if name in experts}, activation)
    return product(h, experts["down"]), h


def _some_experts(experts, x, plan, weights, activation, implementation, return_hidden):
    rows = gather_rows(x, plan)
    out, h = expert_rows(experts, rows, plan.group_sizes, activation, implementation)
    if weights is None:
        weights = vary(jnp.ones((x.shape[0], rows.shape[0] // x.shape[0]), x.dtype), varying_axes(out))
    y = combine_rows(out, weights, plan)
    if not return_hidden:
        return y, None
    num_experts = experts["up"].shape[0]
    ends = jnp.cumsum(plan.group_sizes)
    owner = jnp.searchsorted(ends, jnp.arange(rows.shape[0]), side="right")
    full = jnp.zeros((x.shape[0], num_experts, h.shape[-1]), h.dtype)
    return y, full.at[plan.token, owner].set(h, mode="drop")  # owner E, an empty place, is dropped

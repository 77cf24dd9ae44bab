"""The expert feed-forward layer: all experts (exactly the dense layer), or some of them for each token.

Weights are plain dicts: dense `gate`/`up` [D, F], `down` [F, D], optional `gate_bias`/`up_bias` [F]; experts
`gate`/`up` [E, D, s], `down` [E, s, D], biases [E, s]; `down_bias` [D] in both. A plain (ungated) layer has no `gate`.
"""

from collections.abc import Mapping

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxmodels.errors import UserError
from jaxmodels.kernels.expert_ffn import (
    Dispatch,
    combine_rows,
    dispatch,
    expert_ffn,
    expert_rows,
    gather_rows,
    hidden,
)


def dense_ffn(
    ffn: Mapping[str, Array], x: Float[Array, "*B D"], *, activation: str
) -> tuple[Float[Array, "*B D"], Float[Array, "*B F"]]:
    """y and h of a dense layer: h = a(x gate) * (x up), or a(x up) without a gate; y = h down."""
    names = [name for name in ("gate", "up") if name in ffn]
    h = hidden({name: x @ ffn[name] + ffn.get(f"{name}_bias", 0) for name in names}, activation)
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
        places = active.reshape(-1, active.shape[-1])
        w = None if weights is None else weights.reshape(-1, weights.shape[-1])
        if return_hidden:
            plan = dispatch(places, experts_total)
            out, h = expert_rows(experts, gather_rows(flat, plan), plan.group_sizes, activation, implementation)
            y = combine_rows(out, jnp.ones(places.shape, x.dtype) if w is None else w, plan)
            h = _hidden_of_all(h, plan, len(flat), experts_total)
        else:
            y = expert_ffn(experts, flat, places, w, activation=activation, implementation=implementation)
        if num_shared:
            first = {name: w[:num_shared] for name, w in experts.items() if name != "down_bias"}
            always, shared_h = _all_experts(first, flat, activation)
            y = y + always
            h = h.at[:, :num_shared].set(shared_h) if return_hidden else None
        y = y.reshape(*lead, -1)
        h = h.reshape(*lead, *h.shape[1:]) if return_hidden else None
    return y + experts.get("down_bias", 0), h if return_hidden else None


def _all_experts(experts, x, activation):
    products = {
        name: jnp.einsum("...d,eds->...es", x, experts[name]) + experts.get(f"{name}_bias", 0)
        for name in ("gate", "up")
        if name in experts
    }
    h = hidden(products, activation)
    return jnp.einsum("...es,esd->...d", h, experts["down"]), h


def _hidden_of_all(h: Float[Array, "M s"], plan: Dispatch, tokens: int, num_experts: int) -> Float[Array, "T E s"]:
    """h of every token and expert, zero where an expert did not run."""
    owner = jnp.searchsorted(jnp.cumsum(plan.group_sizes), jnp.arange(len(h)), side="right")
    full = jnp.zeros((tokens, num_experts, h.shape[-1]), h.dtype)
    return full.at[plan.token, owner].set(h, mode="drop")  # owner E, an empty place, is dropped

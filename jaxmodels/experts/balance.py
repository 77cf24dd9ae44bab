"""How evenly a trained router loads its experts: statistics, two losses, and the bias that needs no loss.

`router_statistics` is a `reduce` tap of `router.logits`: it returns sums, so that micro-batches, devices and hosts
add. The leaves of `bias` are sliced by layer, and every result has a leading layer axis:

    statistics = jax.tree_util.Partial(functools.partial(router_statistics, top_k=2), bias)         # bias [L, E]
    logits, aux = model(tokens, taps=Taps(reduce={"router.logits": statistics}))
    stats = aux["router.logits"]
    loss = loss + 0.01 * load_balancing_loss(stats, top_k=2).mean() + 1e-3 * router_z_loss(stats).mean()
    bias = bias_update(bias, stats["load"])  # or this, instead of the balancing loss: once a step, outside the gradient
"""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Num

DEAD = 0.01  # an expert is dead below this share of the mean load


def router_statistics(
    bias: Float[Array, "E"], logits: Float[Array, "B T E"], token_mask: Bool[Array, "B T"], *, top_k: int
) -> dict[str, Array]:
    """Sums over the real tokens of one layer. Gradients flow through `probability` and `z`; the rest is counted.

    tokens int32[]: how many. load int32[E]: how often each expert is among the top k of softmax + bias.
    probability float32[E]: softmax. z float32[]: logsumexp squared.
    """
    # Before anything else: 0 * NaN is NaN, so padding must not reach the sums or their gradients even as a factor of 0.
    real = token_mask[..., None]
    logits = jnp.where(real, logits, 0).astype(jnp.float32)
    scores = jax.nn.softmax(logits)
    chosen = jax.lax.top_k(jax.lax.stop_gradient(scores) + bias, top_k)[1]
    # Compared and summed in one fused loop; a scatter would be slow on accelerators and gather a sharded batch.
    hits = (chosen[..., None] == jnp.arange(logits.shape[-1])) & real[..., None]
    z = jax.nn.logsumexp(logits, -1)
    return {
        "tokens": token_mask.sum(dtype=jnp.int32), "load": hits.sum((0, 1, 2), dtype=jnp.int32),
        "probability": jnp.where(real, scores, 0).sum((0, 1)), "z": jnp.where(token_mask, z * z, 0).sum(),
    }  # fmt: skip


def load_balancing_loss(stats: Mapping[str, Array], top_k: int) -> Float[Array, "*L"]:
    """E sum_e f_e P_e per layer, f_e = load_e / (k tokens), P_e = mean softmax of e: 1 in perfect balance, at most E.

    Switch Transformer (Fedus et al. 2021, arXiv 2101.03961, eq. 4 to 6), which has k = 1; for more experts a token
    f is divided by k as well, so that it sums to 1 (Mixtral's code in transformers does not: k in perfect balance).
    Not linear in the sums: on summed statistics it is the loss of the whole batch, not the mean over its parts.
    """
    tokens = jnp.maximum(stats["tokens"], 1).astype(jnp.float32)[..., None]
    share = stats["load"].astype(jnp.float32) / (top_k * tokens)
    return stats["load"].shape[-1] * (share * (stats["probability"] / tokens)).sum(-1)


def router_z_loss(stats: Mapping[str, Array]) -> Float[Array, "*L"]:
    """The mean over tokens of logsumexp(logits)^2, per layer (ST-MoE, Zoph et al. 2022, arXiv 2202.08906, eq. 5)."""
    return stats["z"] / jnp.maximum(stats["tokens"], 1)


def bias_update(
    bias: Float[Array, "*L E"], load: Num[Array, "*L E"], rate: float = 1e-3
) -> Float[Array, "*L E"]:
    """bias + rate sign(mean load - load): auxiliary-loss-free balancing (Wang et al. 2024, arXiv 2408.15664, alg. 1).

    Once a step, with the load of the whole batch, outside the gradient. The rate is the paper's.
    """
    load = load.astype(jnp.float32)
    return bias + rate * jnp.sign(load.mean(-1, keepdims=True) - load)


def load_metrics(load: Num[Array, "*L E"]) -> dict[str, Float[Array, "*L"]]:
    """max_ratio: max / mean (1 + MaxVio of arXiv 2408.15664); variation: standard deviation / mean; dead: experts
    below 1 % of the mean; entropy: of the shares, 1 for equal load and 0 for a single expert.

    All 0 where nothing was counted (dense layers among expert layers); leave those out of a mean over layers.
    """
    load = load.astype(jnp.float32)
    mean = load.mean(-1)
    some = mean > 0
    ratio = load / jnp.where(some, mean, 1)[..., None]
    share = ratio / load.shape[-1]
    entropy = -jnp.where(share > 0, share * jnp.log(jnp.where(share > 0, share, 1)), 0).sum(-1)
    return {
        "max_ratio": ratio.max(-1), "variation": ratio.std(-1),
        "dead": jnp.where(some, (ratio < DEAD).sum(-1), 0).astype(jnp.float32),
        "entropy": entropy / max(math.log(load.shape[-1]), 1e-9),
    }  # fmt: skip

"""The expert feed-forward layer of a model: trained experts, or a dense layer that was split."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmodels.layers.mlp import ACTIVATIONS
from jaxmodels.layers.param import param
from jaxmodels.taps import Probe

_INSIDE = ("ffn.gate", "ffn.up", "ffn.hidden")


class Experts(nnx.Module):
    """E small FFNs of s neurons. gate, up: [E, D, s]; down: [E, s, D]; the output bias is added once.

    Tap points: router.logits [B, T, E]; ffn.gate, ffn.up, ffn.hidden [B, T, E, s], zero where an expert did not run;
    ffn.output [B, T, D]. Tapping the inside computes every expert and masks (analysis); otherwise only the chosen
    experts run, through ``kernels.grouped_matmul``.
    """

    def __init__(self, cfg, d_model: int, size: int, *, activation: str = "silu", gated: bool = True,
                 bias: bool = False, down_bias: bool = False, dtype=jnp.float32, rngs: nnx.Rngs):
        self.cfg, self.activation = cfg, activation
        E = cfg.num_experts
        w = functools.partial(param, rngs, dtype=dtype)
        self.gate = w((E, d_model, size), ("expert", "embed", "mlp"), std=d_model ** -0.5) if gated else None
        self.up = w((E, d_model, size), ("expert", "embed", "mlp"), std=d_model ** -0.5)
        self.down = w((E, size, d_model), ("expert", "mlp", "embed"), std=size ** -0.5)
        self.gate_bias = w((E, size), ("expert", "mlp"), value=0.0) if bias and gated else None
        self.up_bias = w((E, size), ("expert", "mlp"), value=0.0) if bias else None
        self.down_bias = w((d_model,), (None,), value=0.0) if down_bias else None
        self.router = param(rngs, (d_model, E), ("embed", None), std=d_model ** -0.5) if cfg.router == "softmax" \
            else None

    def weights(self) -> dict[str, jax.Array]:
        """The layer as a plain dict, as jaxmodels.experts takes it."""
        names = ("gate", "up", "down", "gate_bias", "up_bias", "down_bias")
        return {n: getattr(self, n)[...] for n in names if getattr(self, n) is not None}

    def __call__(self, x: jax.Array, probe: Probe) -> jax.Array:
        """x [B, T, D] -> [B, T, D]."""
        inside = any(probe.wants(point) for point in _INSIDE)
        if self.cfg.router == "all":
            return probe("ffn.output", self._every_expert(x, probe, None))
        chosen, weights = self._route(x, probe)
        if inside:
            amount = (jax.nn.one_hot(chosen, self.cfg.num_experts) * weights[..., None]).sum(-2)  # [B, T, E]
            return probe("ffn.output", self._every_expert(x, probe, amount))
        from jaxmodels.experts.layer import apply_experts

        flat, k = x.reshape(-1, x.shape[-1]), chosen.shape[-1]
        y, _ = apply_experts(self.weights(), flat, activation=self.activation, active=chosen.reshape(-1, k),
                             weights=weights.reshape(-1, k))
        return probe("ffn.output", y.reshape(x.shape))

    def _route(self, x, probe):
        """(experts int32[B, T, k], weights float32[B, T, k])."""
        logits = probe("router.logits", (x.astype(jnp.float32) @ self.router[...].astype(jnp.float32)))
        weights, chosen = jax.lax.top_k(jax.nn.softmax(logits, axis=-1), self.cfg.top_k)
        if self.cfg.renormalise:
            weights = weights / weights.sum(-1, keepdims=True)
        return chosen, weights

    def _every_expert(self, x, probe, amount):
        """Sum over all experts, each output times ``amount`` [B, T, E] (None: 1, the exact decomposition)."""
        def into(weight, bias):
            y = jnp.einsum("btd,eds->btes", x, weight[...].astype(x.dtype))
            return y if bias is None else y + bias[...].astype(x.dtype)

        on = 1.0 if amount is None else (amount > 0)[..., None].astype(x.dtype)
        activation = ACTIVATIONS[self.activation]
        up = probe("ffn.up", into(self.up, self.up_bias) * on)
        hidden = activation(up) if self.gate is None else \
            activation(probe("ffn.gate", into(self.gate, self.gate_bias) * on)) * up
        hidden = probe("ffn.hidden", hidden * on)
        if amount is not None:
            hidden = hidden * amount[..., None].astype(x.dtype)
        y = jnp.einsum("btes,esd->btd", hidden, self.down[...].astype(x.dtype))
        return y if self.down_bias is None else y + self.down_bias[...].astype(x.dtype)

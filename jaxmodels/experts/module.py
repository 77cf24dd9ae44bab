"""The expert feed-forward layer of a model: trained experts, or a dense layer that was split."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmodels.experts import routers
from jaxmodels.experts.parallel import run_experts
from jaxmodels.kernels.activations import ACTIVATIONS
from jaxmodels.layers.param import param
from jaxmodels.taps import Probe

_INSIDE = ("ffn.gate", "ffn.up", "ffn.hidden")


def router_shapes(kind: str, d_model: int, num_experts: int, num_shared: int, *, bias: bool = False
                  ) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a router's parameters in one layer; ``all``, ``oracle`` and ``random`` have none. `bias`:
    the layer's neurons have one, and so have those that ``markers`` chooses by."""
    D, E, R = d_model, num_experts, num_experts - num_shared
    markers = {"gate": (D, R), "up": (D, R)} | ({"gate_bias": (R,), "up_bias": (R,)} if bias else {})
    return {"softmax": {"weight": (D, E)}, "similarity": {"centres": (E, D)}, "linear": {"weight": (D, E)},
            "mlp": {"first": (D, E), "second": (E, E)}, "markers": markers}.get(kind, {})


class RouterBias(nnx.Variable):
    """What a balanced router adds to its scores before it chooses. No nnx.Param: it follows a rule of its own
    (``balance.bias_update``), and optimizers must not touch it."""


class Experts(nnx.Module):
    """E small FFNs of s neurons. gate, up: [E, D, s]; down: [E, s, D]; the output bias is added once.

    A trained router (``softmax``) weighs its experts; a split layer sums them, or it would be another function. With
    ``cfg.balance_bias`` the choice reads ``router.bias`` [E] as well, the weights do not (Wang et al. 2024, eq. 3).
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
        shapes = router_shapes(cfg.router, d_model, E, cfg.shared, bias=bias)
        self.router = nnx.Dict({name: w(shape, (None,) * len(shape), std=d_model ** -0.5)
                                for name, shape in shapes.items()})
        if cfg.balance_bias:  # float32 whatever the parameters are: its steps of 1e-3 would drown in bfloat16
            self.router["bias"] = RouterBias(jnp.zeros((E,), jnp.float32), out_sharding=(None,), eager_sharding=False)

    def weights(self) -> dict[str, jax.Array]:
        """The layer as a plain dict, as the functions of jaxmodels.experts take it."""
        names = ("gate", "up", "down", "gate_bias", "up_bias", "down_bias")
        return {n: getattr(self, n)[...] for n in names if getattr(self, n) is not None}

    def __call__(self, x: jax.Array, probe: Probe) -> jax.Array:
        """x [B, T, D] -> [B, T, D]."""
        if self.cfg.router == "all":
            return probe("ffn.output", self._every_expert(x, probe, None))
        chosen, weights = self._route(x, probe)
        if any(probe.wants(point) for point in _INSIDE):
            on = jax.nn.one_hot(chosen, self.cfg.num_experts)  # [B, T, k, E]
            amount = on.sum(-2) if weights is None else (on * weights[..., None]).sum(-2)
            amount = amount.at[..., :self.cfg.shared].set(1.0)
            return probe("ffn.output", self._every_expert(x, probe, amount))
        experts = {name: w.astype(x.dtype) for name, w in self.weights().items()}
        y = run_experts(experts, x, activation=self.activation, active=chosen, weights=weights,
                        num_shared=self.cfg.shared)
        return probe("ffn.output", y)

    def _route(self, x, probe):
        """(experts int32[B, T, k], weights float32[B, T, k] or None for ones). Scores are float32."""
        cfg, p = self.cfg, {name: w[...].astype(jnp.float32) for name, w in self.router.items()
                       if isinstance(w, nnx.Variable)}  # qwix leaves marks of its own in every module
        x32 = x.astype(jnp.float32)
        if cfg.router == "softmax":
            scores = jax.nn.softmax(probe("router.logits", x32 @ p["weight"]))
            if cfg.balance_bias:
                chosen = jax.lax.top_k(jax.lax.stop_gradient(scores) + p["bias"], cfg.top_k)[1]
                weights = jnp.take_along_axis(scores, chosen, -1)
            else:
                weights, chosen = jax.lax.top_k(scores, cfg.top_k)
            return chosen, weights / weights.sum(-1, keepdims=True) if cfg.renormalise else weights
        kinds = {"similarity": routers.SimilarityRouter, "linear": routers.LinearRouter, "mlp": routers.MLPRouter}
        if cfg.router in kinds:
            router = kinds[cfg.router](**p)
        elif cfg.router == "markers":
            router = routers.AnalyticRouter(p["gate"], p["up"], p.get("gate_bias"), p.get("up_bias"),
                                            self.activation, cfg.shared)
        elif cfg.router == "oracle":
            router = routers.OracleRouter({n: w.astype(jnp.float32) for n, w in self.weights().items()},
                                          self.activation)
        else:
            router = routers.RandomRouter(jax.random.key(0), cfg.num_experts)
        scores = probe("router.logits", router.scores(x32))
        if cfg.block > 1:  # a block is chosen by its real tokens
            scores = jnp.where(probe.token_mask[..., None], scores, 0)
        return routers.select_blocks(scores, cfg.top_k, cfg.block, num_shared=cfg.shared), None

    def _every_expert(self, x, probe, amount):
        """Sum over all experts, each output times ``amount`` [B, T, E] (None: 1, the exact decomposition)."""
        def into(weight, bias):
            y = jnp.einsum("btd,eds->btes", x, weight[...].astype(x.dtype))
            y = y if bias is None else y + bias[...].astype(x.dtype)
            return y if amount is None else jnp.where((amount > 0)[..., None], y, 0)

        activation = ACTIVATIONS[self.activation]
        up = probe("ffn.up", into(self.up, self.up_bias))
        hidden = activation(up) if self.gate is None else \
            activation(probe("ffn.gate", into(self.gate, self.gate_bias))) * up
        hidden = probe("ffn.hidden", hidden)
        if amount is not None:
            hidden = hidden * amount[..., None].astype(x.dtype)
        y = jnp.einsum("btes,esd->btd", hidden, self.down[...].astype(x.dtype))
        return y if self.down_bias is None else y + self.down_bias[...].astype(x.dtype)

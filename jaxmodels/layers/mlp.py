"""The dense feed-forward layer, gated (Shazeer 2020) or plain."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmodels.kernels.activations import ACTIVATIONS
from jaxmodels.layers.linear import linear
from jaxmodels.layers.param import param
from jaxmodels.taps import Probe


class MLP(nnx.Module):
    """y = h·down, h = a(x·gate) ⊙ (x·up), or h = a(x·up) without a gate. Neuron j is column j, column j, row j.

    Tap points: ffn.gate (before the activation), ffn.up, ffn.hidden (h), ffn.output.
    """

    def __init__(self, d_model: int, width: int, *, activation: str = "silu", gated: bool = True, bias: bool = False,
                 down_bias: bool | None = None, dtype=jnp.float32, rngs: nnx.Rngs):
        self.activation = activation
        w = functools.partial(param, rngs, dtype=dtype)
        self.gate = w((d_model, width), ("embed", "mlp"), std=d_model ** -0.5) if gated else None
        self.up = w((d_model, width), ("embed", "mlp"), std=d_model ** -0.5)
        self.down = w((width, d_model), ("mlp", "embed"), std=width ** -0.5)
        self.gate_bias = w((width,), ("mlp",), value=0.0) if bias and gated else None
        self.up_bias = w((width,), ("mlp",), value=0.0) if bias else None
        self.down_bias = w((d_model,), (None,), value=0.0) if (bias if down_bias is None else down_bias) else None

    def __call__(self, x: jax.Array, probe: Probe) -> jax.Array:
        """x [B, T, D] -> [B, T, D]."""
        activation = ACTIVATIONS[self.activation]
        up = probe("ffn.up", self._linear(x, "up"))
        if self.gate is None:
            hidden = activation(up)
        else:
            hidden = activation(probe("ffn.gate", self._linear(x, "gate"))) * up
        hidden = probe("ffn.hidden", hidden)
        return probe("ffn.output", self._linear(hidden, "down"))

    def _linear(self, x, name):
        bias = getattr(self, f"{name}_bias")
        return linear(x, getattr(self, name)[...], None if bias is None else bias[...])

"""An LSTM cell (Hochreiter & Schmidhuber 1997) with its input products taken out of the scan over time.

    z = x · W_in + b                      one product for all steps, outside
    i, f, g, o = split(z_t + h · W_h)     one small product a step, inside
    c' = σ(f) c + σ(i) tanh(g),  h' = σ(o) tanh(c')

Several sequences may share a row: where ``first`` is True the step before is forgotten.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmodels.kernels.varying import vary, varying_axes
from jaxmodels.layers.linear import linear
from jaxmodels.layers.param import param
from jaxmodels.shapes import Array, Bool, Float


class LstmState(NamedTuple):
    """h and c, float32[..., H]."""

    h: jax.Array
    c: jax.Array


class Lstm(nnx.Module):
    """Weights of one layer. Gates in the order i, f, g, o; Glorot, forget bias 1 (Jozefowicz et al. 2015)."""

    def __init__(self, d_in: int, d_hidden: int, *, rngs: nnx.Rngs):
        self.d_hidden = d_hidden
        self.input = param(rngs, (d_in, 4 * d_hidden), (None, "mlp"), std=(2 / (d_in + d_hidden)) ** 0.5)
        self.hidden = param(rngs, (d_hidden, 4 * d_hidden), (None, "mlp"), std=d_hidden ** -0.5)
        self.bias = param(rngs, (4 * d_hidden,), ("mlp",), value=0.0)
        self.bias[...] = self.bias[...].at[d_hidden:2 * d_hidden].set(1.0)

    def project(self, x: jax.Array, rows: slice = slice(None), bias: bool = True) -> jax.Array:
        """What the inputs add to the gates: [..., D] -> float32[..., 4H]. rows: those of W_in that x meets."""
        return linear(x, self.input[...][rows], self.bias[...] if bias else None).astype(jnp.float32)

    def start(self, *lead: int) -> LstmState:
        zeros = jnp.zeros((*lead, self.d_hidden), jnp.float32)
        return LstmState(zeros, zeros)

    def step(self, z: jax.Array, state: LstmState, dtype=jnp.float32) -> LstmState:
        """One step, z float32[..., 4H] as `project` gives it; the product in dtype."""
        return _cell(z + _product(state.h, self.hidden[...], dtype), state.c)

    def __call__(self, z: Float[Any, "B T Z"], first: Bool[Any, "B T"], dtype=jnp.float32
                 ) -> Float[Array, "B T H"]:
        """All steps from projected inputs: h, float32."""
        return _run(z, self.hidden[...], first, jnp.dtype(dtype).name)


def _product(h: jax.Array, weight: jax.Array, dtype) -> jax.Array:
    return jnp.matmul(h.astype(dtype), weight.astype(dtype), preferred_element_type=jnp.float32)


def _gates(z: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    i, f, g, o = jnp.split(z, 4, axis=-1)
    return jax.nn.sigmoid(i), jax.nn.sigmoid(f), jnp.tanh(g), jax.nn.sigmoid(o)


def _cell(z: jax.Array, c: jax.Array) -> LstmState:
    i, f, g, o = _gates(z)
    c = f * c + i * g
    return LstmState(o * jnp.tanh(c), c)


@jax.custom_vjp
def _scan(z, weight, first):
    return _forward(z, weight, first)[0]


def _forward(z, weight, first):
    """(h [T, B, H], what the way back needs): time first, all gates before their functions are kept."""
    def step(state, sliced):
        z, first = sliced
        h, c = (jnp.where(first[:, None], 0, s) for s in state)
        gates = z + _product(h, weight, weight.dtype)
        state = _cell(gates, c)
        return state, (state.h, h, c, gates)

    zeros = vary(jnp.zeros((z.shape[1], weight.shape[0]), jnp.float32), varying_axes(z, weight))
    _, (out, h, c, gates) = jax.lax.scan(step, LstmState(zeros, zeros), (z, first))
    return out, (weight, first, h, c, gates)


def _backward(kept, d_out):
    """The gradient of W_h is one product over all steps at the end: scan's own would add [H, 4H] at every step."""
    weight, first, h, c, gates = kept

    def step(carry, sliced):
        d_h, d_c = carry
        d_out, c, gates, first = sliced
        i, f, g, o = _gates(gates)
        tanh_c = jnp.tanh(f * c + i * g)
        d_h = d_h + d_out
        d_c = d_c + d_h * o * (1 - tanh_c ** 2)
        d_z = jnp.concatenate([d_c * g * i * (1 - i), d_c * c * f * (1 - f), d_c * i * (1 - g ** 2),
                               d_h * tanh_c * o * (1 - o)], axis=-1)
        keep = ~first[:, None]
        return (jnp.where(keep, _product(d_z, weight.T, weight.dtype), 0), jnp.where(keep, d_c * f, 0)), d_z

    zeros = vary(jnp.zeros_like(d_out[0]), varying_axes(gates))
    _, d_z = jax.lax.scan(step, (zeros, zeros), (d_out, c, gates, first), reverse=True)
    d_weight = jnp.einsum("tbh,tbz->hz", h.astype(weight.dtype), d_z.astype(weight.dtype),
                          preferred_element_type=jnp.float32)
    return d_z, d_weight.astype(weight.dtype), None


_scan.defvjp(_forward, _backward)


def _run(z: jax.Array, weight: jax.Array, first: Any, dtype: str) -> jax.Array:
    out = _scan(jnp.swapaxes(z, 0, 1), weight.astype(dtype), jnp.swapaxes(first, 0, 1))
    return jnp.swapaxes(out, 0, 1)

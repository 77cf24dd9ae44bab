"""Normalisation layers."""

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmodels.layers.param import param


class RMSNorm(nnx.Module):
    """y = x / sqrt(mean(x²) + eps) · scale over the last axis, in float32 (Zhang & Sennrich 2019, eq. 4)."""

    def __init__(self, width: int, *, eps: float, dtype=jnp.float32, axis_name: str | None = None, rngs: nnx.Rngs):
        self.eps = eps
        self.scale = param(rngs, (width,), (axis_name,), dtype=dtype, value=1.0)

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        return (x32 * self.scale[...].astype(jnp.float32)).astype(x.dtype)


class LayerNorm(nnx.Module):
    """y = (x - mean) / sqrt(variance + eps) · scale + bias over the last axis, in float32 (Ba et al. 2016)."""

    def __init__(self, width: int, *, eps: float, dtype=jnp.float32, axis_name: str | None = None, rngs: nnx.Rngs):
        self.eps = eps
        self.scale = param(rngs, (width,), (axis_name,), dtype=dtype, value=1.0)
        self.bias = param(rngs, (width,), (axis_name,), dtype=dtype, value=0.0)

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        x32 = x32 - jnp.mean(x32, axis=-1, keepdims=True)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        return (x32 * self.scale[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)).astype(x.dtype)

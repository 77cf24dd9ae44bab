"""What reads the hidden states: masked-LM head, sequence classifier, contact map."""

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmodels.layers.linear import linear
from jaxmodels.layers.norms import LayerNorm
from jaxmodels.layers.param import param


class LMHead(nnx.Module):
    """norm(gelu(dense(x)))·Eᵀ + b, E being the embedding (facebookresearch/esm, RobertaLMHead)."""

    def __init__(self, d_model: int, vocab_size: int, *, eps: float, dtype=jnp.float32, rngs: nnx.Rngs):
        self.dense = param(rngs, (d_model, d_model), ("embed", None), std=d_model ** -0.5, dtype=dtype)
        self.dense_bias = param(rngs, (d_model,), (None,), value=0.0, dtype=dtype)
        self.norm = LayerNorm(d_model, eps=eps, dtype=dtype, rngs=rngs)
        self.bias = param(rngs, (vocab_size,), ("vocab",), value=0.0, dtype=dtype)

    def __call__(self, x: jax.Array, embed: jax.Array) -> jax.Array:
        """x [..., D], embed [V, D] -> float32[..., V]."""
        x = self.norm(jax.nn.gelu(linear(x, self.dense[...], self.dense_bias[...]), approximate=False))
        logits = jnp.einsum("...d,vd->...v", x, embed.astype(x.dtype), preferred_element_type=jnp.float32)
        return logits + self.bias[...].astype(jnp.float32)


class Classifier(nnx.Module):
    """dense, tanh, classes (EsmClassificationHead of transformers)."""

    def __init__(self, d_model: int, classes: int, *, dtype=jnp.float32, rngs: nnx.Rngs):
        self.dense = param(rngs, (d_model, d_model), ("embed", None), std=d_model ** -0.5, dtype=dtype)
        self.dense_bias = param(rngs, (d_model,), (None,), value=0.0, dtype=dtype)
        self.out = param(rngs, (d_model, classes), ("embed", None), std=d_model ** -0.5, dtype=dtype)
        self.out_bias = param(rngs, (classes,), (None,), value=0.0, dtype=dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Pooled hidden states [..., D] -> float32[..., C]."""
        x = jnp.tanh(linear(x.astype(jnp.float32), self.dense[...], self.dense_bias[...]))
        return linear(x, self.out[...], self.out_bias[...])


class ContactHead(nnx.Module):
    """Logistic regression on attention maps (Rao et al. 2021, doi.org/10.1101/2020.12.15.422761)."""

    def __init__(self, num_maps: int, *, dtype=jnp.float32, rngs: nnx.Rngs):
        self.weight = param(rngs, (num_maps,), (None,), std=num_maps ** -0.5, dtype=dtype)
        self.bias = param(rngs, (1,), (None,), value=0.0, dtype=dtype)


def corrected_maps(attention: jax.Array, keep: jax.Array) -> jax.Array:
    """Attention maps [B, N, T, T] made symmetric, less what rows and columns explain (the average product correction of
    Dunn et al. 2008): float32[B, N, T-2, T-2]. Every row sums to 0.

    keep: bool[B, T], residues and <cls>; the first and last position of the *batch* are cut off, as the reference does.
    """
    keep = keep[:, None, :, None] & keep[:, None, None, :]
    maps = jnp.where(keep, attention.astype(jnp.float32), 0)[..., 1:-1, 1:-1]
    maps = maps + maps.swapaxes(-1, -2)
    row, column = maps.sum(-1, keepdims=True), maps.sum(-2, keepdims=True)
    total = row.sum(-2, keepdims=True)
    return maps - row * column / jnp.where(total == 0, 1, total)  # 0: a row of padding


def contact_evidence(weight: jax.Array, keep: jax.Array, attention: jax.Array, mask: jax.Array) -> jax.Array:
    """One layer's part of the regression, weight [N]: float32[B, T-2, T-2]; reduces ``attention.probability``."""
    del mask  # of tokens; keep leaves out <eos> too
    return jnp.einsum("bnts,n->bts", corrected_maps(attention, keep), weight.astype(jnp.float32),
                      precision=jax.lax.Precision.HIGHEST)


def pool(hidden: jax.Array, how: str, mask: jax.Array, residues: jax.Array, segments: jax.Array | None = None,
         num_segments: int | None = None) -> jax.Array:
    """One vector a protein: hidden [B, T, D] -> float32[B, D], or [B, S, D] for the segments 1..S of packed rows.

    how: ``mean`` over ``residues`` bool[B, T], or ``cls``, the first token that ``mask`` bool[B, T] leaves. A protein
    without residues, and a segment that a row does not have, give zeros.
    """
    members = mask if how == "cls" else residues
    members = members[:, None] if segments is None else (
        members[:, None] & (segments[:, None] == jnp.arange(1, num_segments + 1)[:, None]))  # [B, S, T]
    if how == "cls":
        members &= jnp.cumsum(members, axis=-1) == 1
    weights = members / jnp.maximum(members.sum(-1, keepdims=True), 1)
    # A padding row may hold anything, infinity too, which a weight of 0 would make NaN.
    hidden = jnp.where(members.any(1)[..., None], hidden.astype(jnp.float32), 0)
    pooled = jnp.einsum("bst,btd->bsd", weights, hidden, precision=jax.lax.Precision.HIGHEST)
    return pooled[:, 0] if segments is None else pooled

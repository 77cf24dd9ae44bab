"""A Llama-family decoder: Llama 2/3, SmolLM2, Mistral, Qwen2/2.5, Qwen3, OLMo-2, Mixtral, Qwen3-MoE, OLMoE.

Reads downwards: block, decoder, forward pass. Equal layers are stacked and scanned; unequal or unrolled ones are
groups of one. Every intermediate that anyone wants goes through the taps.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxmodels.decoder.config import DecoderConfig
from jaxmodels.errors import UserError
from jaxmodels.experts.module import Experts
from jaxmodels.layers import stack
from jaxmodels.layers.attention import Attention, Context
from jaxmodels.layers.axes import constrain
from jaxmodels.layers.mlp import MLP
from jaxmodels.layers.norms import RMSNorm
from jaxmodels.layers.param import param
from jaxmodels.shapes import Array, Bool, Float, Int
from jaxmodels.taps import NO_TAPS, Probe, Taps

POINTS = ("embedding", "residual", "attention.query", "attention.key", "attention.value", "attention.probability",
          "attention.output", "ffn.gate", "ffn.up", "ffn.hidden", "ffn.output", "router.logits")
LOGITS = ("all", "last", "none", "hidden")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of the tokens seen so far.

    keys, values: one array for each group of layers, [n, B·K, S, H], or [B·K, S, H] for a layer alone. (Any axis that
    attention would have to drop or join makes XLA copy the array, up to five times a step, instead of writing one
    slot.) positions int32[B, S] and valid bool[B, S] of
    the slots; index: int32[], the slot that the next token takes.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    positions: jax.Array
    valid: jax.Array
    index: jax.Array

    @classmethod
    def empty(cls, cfg: DecoderConfig, batch: int, length: int) -> "Cache":
        def zeros():
            shape = batch * cfg.num_kv_heads, length, cfg.head_dim
            return tuple(jnp.zeros(shape if stop - start == 1 else (stop - start, *shape), cfg.dtype)
                         for start, stop in cfg.groups)
        return cls(zeros(), zeros(), jnp.zeros((batch, length), jnp.int32), jnp.zeros((batch, length), bool),
                   jnp.zeros((), jnp.int32))


class Block(nnx.Module):
    """One layer: attention, then a feed-forward layer that is dense or made of experts."""

    def __init__(self, cfg: DecoderConfig, layer: int, *, rngs: nnx.Rngs):
        self.placement = cfg.norm_placement
        norm = functools.partial(RMSNorm, cfg.d_model, eps=cfg.norm_eps, dtype=cfg.param_dtype, rngs=rngs)
        self.attention_norm, self.ffn_norm = norm(), norm()
        self.attention = Attention(
            cfg.d_model, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim, qkv_bias=cfg.qkv_bias,
            out_bias=cfg.out_bias, qk_norm=cfg.qk_norm, norm_eps=cfg.norm_eps, clip=cfg.clip_qkv,
            dtype=cfg.param_dtype, rngs=rngs)
        ffn = functools.partial(Experts, cfg.experts) if cfg.has_experts(layer) else MLP
        self.ffn = ffn(cfg.d_model, cfg.ffn_widths[layer], activation=cfg.activation, bias=cfg.mlp_bias,
                       down_bias=cfg.has_down_bias, dtype=cfg.param_dtype, rngs=rngs)

    def __call__(self, x: jax.Array, context: Context, probe: Probe, window=None, cache=None):
        """x [B, T, D] -> (x, cache)."""
        x = probe("residual", constrain(x, "batch", None, None))
        if self.placement == "pre":
            y, cache = self.attention(self.attention_norm(x), context, probe, window, cache)
            x = x + y
            return x + self.ffn(self.ffn_norm(x), probe), cache
        y, cache = self.attention(x, context, probe, window, cache)
        x = x + self.attention_norm(y)
        return x + self.ffn_norm(self.ffn(x, probe)), cache


class Decoder(nnx.Module):
    """``logits, aux = model(tokens)``: int32[B, T] -> float32[B, T, V] and what the taps recorded."""

    def __init__(self, cfg: DecoderConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        self.embed = param(rngs, (cfg.vocab_size, cfg.d_model), ("vocab", "embed"), std=0.02, dtype=cfg.param_dtype)
        self.groups = nnx.List([
            stack.stack(lambda rngs, i=start: Block(cfg, i, rngs=rngs), stop - start, rngs)
            for start, stop in cfg.groups])
        self.norm = RMSNorm(cfg.d_model, eps=cfg.norm_eps, dtype=cfg.param_dtype, rngs=rngs)
        self.head = None if cfg.tied else param(
            rngs, (cfg.d_model, cfg.vocab_size), ("embed", "vocab"), std=cfg.d_model ** -0.5, dtype=cfg.param_dtype)

    def __call__(self, tokens: Int[Any, "B T"], *, mask: Bool[Any, "B T"] | None = None,
                 positions: Int[Any, "B T"] | None = None, segments: Int[Any, "B T"] | None = None,
                 taps: Taps = NO_TAPS, logits: str = "all") -> tuple[Float[Array, "B _ V"] | None, dict[str, Any]]:
        """Runs the model; one compilation for each shape and set of taps.

        Args:
          tokens: int32[B, T].
          mask: bool[B, T], False for padding (on either side); padding is never looked at and never counted.
          positions: int32[B, T]; default: the number of real tokens before each one (of its segment).
          segments: int32[B, T]; tokens see only tokens of their own segment (documents packed into one row, each a run
            of one id; any order of ids).
          taps: what to record and what to change.
          logits: ``all``, ``last`` (only the last position: [B, 1, V]), ``none`` (no head; returns None), or ``hidden``
            (what the head reads, [B, T, D], for ``unembed``).

        Returns:
          (float32[B, T, V], aux), aux: a dict of recordings by point, with a leading layer axis.

        Raises UserError for tokens that are no int[B, T] or none at all, for real tokens in NumPy arrays that are not
        in the vocabulary, and for taps at points the model lacks or that do not fit.
        """
        _check_ids(tokens, mask, self.cfg.vocab_size)
        graphdef, state = nnx.split(self)
        return _run(graphdef, state, tokens, mask, positions, segments, taps, logits)

    def forward(self, tokens, *, mask=None, positions=None, segments=None, taps: Taps = NO_TAPS, logits="all",
                cache: Cache | None = None, start: tuple[jax.Array, jax.Array] | None = None):
        """The pure forward pass, for use inside other transforms. Returns (logits, aux, cache).

        start: (layer, what enters it [B, T, D]), see ``stack.run_from``: layers before it are left out.
        """
        cfg = self.cfg
        _check_taps(taps, cfg)
        if logits not in LOGITS:
            raise UserError(f"logits {logits!r} is not one of {', '.join(LOGITS)}")
        tokens = jnp.asarray(tokens)
        if tokens.ndim != 2 or not tokens.size or not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise UserError(f"tokens are {tokens.dtype}{list(tokens.shape)}; a batch of rows is needed: int32[B, T]")
        mask = jnp.ones(tokens.shape, bool) if mask is None else jnp.asarray(mask, bool)
        context, cache = make_context(cfg, mask, positions, segments, cache)
        if start is not None:
            return self._logits(stack.run_from(self.groups, cfg, *start, context, taps, mask), logits), {}, None
        probe = stack.embedding_probe(taps, mask)
        x = probe("embedding", self.embed[...][tokens].astype(cfg.dtype))
        caches = None if cache is None else list(zip(cache.keys, cache.values, strict=True))
        x, aux, caches = stack.run(self.groups, cfg, x, context, taps, mask, caches)
        aux.update(probe.out)
        if cache is not None:
            keys, values = zip(*caches, strict=True)
            cache = dataclasses.replace(cache, keys=keys, values=values)
        return self._logits(x, logits), aux, cache

    def block(self, layer: int) -> Block:
        """One layer as a module of its own, for callers that walk through the depth (layer by layer repair)."""
        return stack.layer_of(self.groups, self.cfg, layer)

    def _logits(self, x, which):
        if which == "none":
            return None
        x = constrain(x, "batch", None, None)
        x = self.norm(x[:, -1:] if which == "last" else x)
        return x if which == "hidden" else self.unembed(x)

    def unembed(self, x: jax.Array) -> jax.Array:
        """The head: final hidden states [..., D] -> float32[..., V]."""
        if self.head is None:
            return jnp.einsum("...d,vd->...v", x, self.embed[...].astype(x.dtype), preferred_element_type=jnp.float32)
        return jnp.einsum("...d,dv->...v", x, self.head[...].astype(x.dtype), preferred_element_type=jnp.float32)


@functools.partial(jax.jit, static_argnums=(0, 7))
def _run(graphdef, state, tokens, mask, positions, segments, taps, logits):
    model = nnx.merge(graphdef, state)
    out, aux, _ = model.forward(tokens, mask=mask, positions=positions, segments=segments, taps=taps, logits=logits)
    return out, aux


def make_context(cfg: DecoderConfig, mask, positions=None, segments=None, cache=None):
    """Positions, who may look at whom, and the cache with this call's slots entered."""
    if cache is not None and segments is not None:
        raise ValueError("segments cannot be combined with a cache; run the packed rows without one")
    if positions is None:
        positions = jnp.cumsum(mask, axis=1) - mask  # real tokens before each one
        if cache is not None:
            positions += cache.valid.sum(1, keepdims=True)
        if segments is not None:
            starts = jnp.diff(segments, axis=1, prepend=segments[:, :1] - 1) != 0
            first = jax.lax.cummax(jnp.where(starts, jnp.arange(mask.shape[1]), 0), axis=1)
            positions -= jnp.take_along_axis(positions, first, axis=1)
    positions = jnp.broadcast_to(positions, mask.shape).astype(jnp.int32)
    key_positions, valid, write_at = positions, mask, None
    T = mask.shape[1]
    if cache is None:
        causal = jnp.tril(jnp.ones((T, T), bool))[None]
    else:
        write_at = cache.index
        key_positions = jax.lax.dynamic_update_slice(cache.positions, positions, (0, write_at))
        valid = jax.lax.dynamic_update_slice(cache.valid, mask, (0, write_at))
        cache = dataclasses.replace(cache, positions=key_positions, valid=valid, index=write_at + T)
        causal = (jnp.arange(valid.shape[1])[None, :] <= write_at + jnp.arange(T)[:, None])[None]
    allowed = causal & valid[:, None, :]
    if segments is not None:
        allowed &= segments[:, :, None] == segments[:, None, :]
    distance = None
    if cfg.windows is not None and any(w is not None for w in cfg.windows):
        distance = positions[:, :, None] - key_positions[:, None, :]
    return Context(cfg.rope.rotation(positions, cfg.head_dim), allowed, distance, write_at), cache


def _check_ids(tokens, mask, vocab_size: int) -> None:
    """Of what lies in the host's memory: a look-up takes the nearest row for an id beyond the table."""
    if not isinstance(tokens, np.ndarray) or not np.issubdtype(tokens.dtype, np.integer):
        return
    if mask is not None:
        if not isinstance(mask, np.ndarray) or mask.shape != tokens.shape:
            return
        tokens = tokens[mask.astype(bool)]
    if tokens.size and not 0 <= tokens.min() <= tokens.max() < vocab_size:
        wrong = tokens.min() if tokens.min() < 0 else tokens.max()
        raise UserError(f"token id {wrong} is not in the vocabulary; ids are 0 to {vocab_size - 1}: use the model's "
                        "own tokenizer")


def _check_taps(taps: Taps, cfg: DecoderConfig) -> None:
    routed = cfg.experts is not None and cfg.experts.router != "all"
    taps.check(POINTS if routed else POINTS[:-1], cfg.num_layers)
    inside = sorted(taps.points & {"ffn.gate", "ffn.up", "ffn.hidden"})
    if inside and len({cfg.has_experts(i) for i in range(cfg.num_layers)}) > 1:
        raise UserError(f"tap {inside[0]!r} is [B, T, F] in the dense layers of this model and [B, T, E, s] in its "
                        "expert layers, which do not stack; tap 'ffn.output' instead")

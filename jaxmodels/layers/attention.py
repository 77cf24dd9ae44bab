"""Grouped-query attention, causal or not, with rotary positions, QK-norm, sliding windows and a key-value cache."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmodels.layers import flash
from jaxmodels.layers.linear import linear
from jaxmodels.layers.norms import RMSNorm
from jaxmodels.layers.param import param
from jaxmodels.layers.rotary import rotate
from jaxmodels.taps import Probe

NO_WINDOW = 2**30  # "sees everything": larger than any distance between two positions
_MASKED = -1e30    # finite, so that the softmax of a padding row, which may see nothing, is not NaN
_SCORES = 2**19    # at once on CPU where attention is not causal: 2 MiB of them
_BLOCK = 128       # queries at once on CPU: their scores stay in the cache, and keys after the block are never read


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
    """What all layers share: who may look at whom.

    rotation: cos and sin of the queries' positions, float32[B, T, 1, H/2] each, or None where positions do not turn.
    allowed: bool[B, T, S], causality, padding and segments together; [B, 1, S] where all queries see the same keys.
    distance: int32[B, T, S] from key to query, or None if no layer has a window.
    write_at: where this call's keys go in the cache.
    groups: who belongs together, for kernels that are told it by numbers. implementation: ``xla``, or what
    layers/flash.py chooses from ``auto`` or a name; that needs groups.
    """

    rotation: tuple[jax.Array, jax.Array] | None
    allowed: jax.Array
    distance: jax.Array | None = None
    write_at: jax.Array | None = None
    groups: flash.Groups | None = None
    implementation: str = dataclasses.field(default="xla", metadata={"static": True})


class Attention(nnx.Module):
    """Tap points: attention.query, .key, .value (before QK-norm, scaling, rotation), .probability, .output."""

    def __init__(self, d_model: int, num_heads: int, num_kv_heads: int, head_dim: int, *,
                 qkv_bias: bool = False, out_bias: bool = False, qk_norm: str | None = None, norm_eps: float = 1e-6,
                 clip: float | None = None, causal: bool = True, dtype=jnp.float32, rngs: nnx.Rngs):
        self.qk_norm, self.clip, self.causal = qk_norm, clip, causal
        w = functools.partial(param, rngs, dtype=dtype)
        self.query = w((d_model, num_heads, head_dim), ("embed", "heads", None), std=d_model ** -0.5)
        self.key = w((d_model, num_kv_heads, head_dim), ("embed", "heads", None), std=d_model ** -0.5)
        self.value = w((d_model, num_kv_heads, head_dim), ("embed", "heads", None), std=d_model ** -0.5)
        self.out = w((num_heads, head_dim, d_model), ("heads", None, "embed"), std=(num_heads * head_dim) ** -0.5)
        self.query_bias = w((num_heads, head_dim), ("heads", None), value=0.0) if qkv_bias else None
        self.key_bias = w((num_kv_heads, head_dim), ("heads", None), value=0.0) if qkv_bias else None
        self.value_bias = w((num_kv_heads, head_dim), ("heads", None), value=0.0) if qkv_bias else None
        self.out_bias = w((d_model,), (None,), value=0.0) if out_bias else None
        # Qwen3 normalises each head, OLMo-2 all heads of a token together.
        width = {None: None, "head": (head_dim, head_dim),
                 "full": (num_heads * head_dim, num_kv_heads * head_dim)}[qk_norm]
        self.query_norm = RMSNorm(width[0], eps=norm_eps, dtype=dtype, rngs=rngs) if width else None
        self.key_norm = RMSNorm(width[1], eps=norm_eps, dtype=dtype, rngs=rngs) if width else None

    def __call__(self, x: jax.Array, context: Context, probe: Probe, window: jax.Array | None = None,
                 cache: tuple[jax.Array, jax.Array] | None = None):
        """x [B, T, D] -> (y [B, T, D], cache). A cache is (keys, values), each [B·K, S, H], rotated already."""
        q = probe("attention.query", self._project(x, self.query, self.query_bias))
        k = probe("attention.key", self._project(x, self.key, self.key_bias))
        v = probe("attention.value", self._project(x, self.value, self.value_bias))
        if self.qk_norm is not None:
            q, k = self._normalise(q, self.query_norm), self._normalise(k, self.key_norm)
        if self.clip is not None:
            q, k, v = (jnp.clip(a, -self.clip, self.clip) for a in (q, k, v))
        if context.rotation is not None:
            q, k = rotate(q, context.rotation), rotate(k, context.rotation)
        k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
        if cache is not None:
            cache = tuple(_write(old, new, context.write_at) for old, new in zip(cache, (k, v), strict=True))
            k, v = (a.reshape(*k.shape[:2], *a.shape[1:]) for a in cache)
        allowed = context.allowed
        if window is not None:
            allowed &= context.distance < window
        y = attend(q, k, v, allowed, probe, self.causal, context.implementation, context.groups)
        # One contracted axis: with two of them (N and H) XLA transposes both factors in every call.
        bias = None if self.out_bias is None else self.out_bias[...]
        y = linear(y.reshape(*x.shape[:2], -1), self.out[...].reshape(-1, x.shape[-1]), bias)
        return probe("attention.output", y), cache

    def _project(self, x, weight, bias):
        D, *heads = weight.shape
        bias = None if bias is None else bias[...].reshape(-1)
        return linear(x, weight[...].reshape(D, -1), bias).reshape(*x.shape[:2], *heads)

    def _normalise(self, x, norm):
        flat = x.reshape(*x.shape[:2], -1) if self.qk_norm == "full" else x
        flat = norm(flat)
        return flat.reshape(x.shape)


def attend(q: jax.Array, k: jax.Array, v: jax.Array, allowed: jax.Array, probe: Probe,
           causal: bool = True, implementation: str = "xla", groups: flash.Groups | None = None) -> jax.Array:
    """softmax(q·k / √H)·v. q [B, T, N, H], k and v [B, K, S, H], allowed bool[B, T, S] -> [B, T, N, H].

    causal: ``allowed`` lets query slot t see key slots s <= t only, the queries being T neighbours; the others are then
    not even read.
    Otherwise it may be [B, 1, S] as well. Fused unless ``attention.probability`` is tapped. On CPU one (sequence, key
    head, block of queries) at a time: the scores of all heads at once leave the cache and cost several times more.
    """
    if probe.wants("attention.probability") or q.shape[1] == 1:
        return _attend_plain(q, k, v, allowed, probe)
    name = flash.choose(implementation, q, k, allowed)
    if name != "xla":
        return flash.attend(name, q, k.swapaxes(1, 2), v.swapaxes(1, 2), allowed, groups)
    on_cpu = _attend_by_head if causal else _attend_in_blocks
    return jax.lax.platform_dependent(q, k, v, allowed, cpu=on_cpu, default=_attend_fused)


def _write(cache, new, at):
    """new [B, K, T, H] into the slots from ``at`` on of cache [B·K, S, H]."""
    return jax.lax.dynamic_update_slice(cache, new.reshape(-1, *new.shape[2:]).astype(cache.dtype), (0, at, 0))


def _by_key_head(q, k, v):
    """q as [B·K, N/K, T, H], k and v as [B·K, S, H]: each key head beside the queries that share it."""
    B, T, N, H = q.shape
    K = k.shape[1]
    q = q.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4).reshape(B * K, N // K, T, H)
    return q, k.reshape(B * K, -1, H), v.reshape(B * K, -1, H)


def _by_token(y, B):
    """[B·K, N/K, T, H] -> [B, T, N, H]."""
    _, _, T, H = y.shape
    return y.reshape(B, -1, T, H).swapaxes(1, 2)


def _attend_plain(q, k, v, allowed, probe):
    B, T, N, H = q.shape
    K, S = k.shape[1:3]
    q, k, v = _by_key_head(q, k, v)
    scores = jnp.einsum("xgth,xsh->xgts", q, k, preferred_element_type=jnp.float32) * H ** -0.5
    p = jax.nn.softmax(jnp.where(allowed[:, None], scores.reshape(B, N, T, S), _MASKED), axis=-1)
    p = probe("attention.probability", p).reshape(B * K, N // K, T, S)
    return _by_token(jnp.einsum("xgts,xsh->xgth", p.astype(v.dtype), v), B)


def _attend_by_head(q, k, v, allowed):
    B, T, _, H = q.shape
    K, S = k.shape[1:3]
    q, k, v = _by_key_head(q, k, v)

    # Heads are mapped over, not looked up by number: the gradient of a look-up adds an array of all heads for each one.
    def one(head):
        i, q, k, v = head
        parts = []
        for start in range(0, T, _BLOCK):
            stop = min(start + _BLOCK, T)
            seen = S - T + stop  # query t is written at slot S - T + t at the latest, and later keys are not allowed
            parts.append(_block(q[:, start:stop], k[:seen], v[:seen], allowed[i // K, start:stop, :seen]))
        return jnp.concatenate(parts, axis=1)

    return _by_token(jax.lax.map(one, (jnp.arange(B * K), q, k, v)), B)


def _attend_in_blocks(q, k, v, allowed):
    """Both ways: a few key heads and a block of queries at a time, as many scores as stay in the cache."""
    B, T, _, H = q.shape
    K, S = k.shape[1:3]
    q, k, v = _by_key_head(q, k, v)
    G = q.shape[1]
    blocks = -(-T // min(max(_SCORES // S, 32), 2 * _BLOCK))
    size = -(-T // blocks)
    heads = max(n for n in range(1, K + 1) if K % n == 0 and (n == 1 or n * G * size * S <= _SCORES))
    q = jnp.pad(q, ((0, 0), (0, 0), (0, blocks * size - T), (0, 0)))
    q = q.reshape(-1, heads, G, blocks, size, H).transpose(0, 3, 1, 2, 4, 5)  # [groups, blocks, heads, G, size, H]
    k, v = k.reshape(-1, heads, S, H), v.reshape(-1, heads, S, H)
    one_row = allowed.shape[1] == 1
    if not one_row:
        allowed = jnp.pad(allowed, ((0, 0), (0, blocks * size - T), (0, 0)))
    allowed = allowed.reshape(B, -1, 1 if one_row else size, S)  # [B, blocks or 1, size or 1, S]

    def one(group):
        i, q, k, v = group
        rows = jnp.broadcast_to(allowed[i // (K // heads)], (blocks, *allowed.shape[2:]))
        several = jax.vmap(_block, in_axes=(0, 0, 0, None))
        if blocks == 1:
            return several(q[0], k, v, rows[0])[None]
        return jax.lax.map(lambda block: several(block[0], k, v, block[1]), (q, rows))

    y = jax.lax.map(one, (jnp.arange(q.shape[0]), q, k, v))
    y = y.transpose(0, 2, 3, 1, 4, 5).reshape(B * K, G, blocks * size, H)[:, :, :T]
    return _by_token(y, B)


@jax.custom_vjp
def _block(q, k, v, row):
    """One key head: q [G, t, H], k and v [S, H], row bool[t, S] or [1, S] -> [G, t, H].

    With a gradient of its own, from probabilities that are computed again: faster than fetching [B·N, T, S] of them,
    and than what differentiating these steps gives. It has no forward mode; the vjp of a vjp is one.
    """
    return _block_forward(q, k, v, row)[0]


def _block_forward(q, k, v, row):
    # One contracted axis, (g, t) as one: with two of them XLA transposes both factors of a product.
    G, t, H = q.shape
    scores = jnp.einsum("xh,sh->xs", q.reshape(G * t, H), k, preferred_element_type=jnp.float32)
    scores = jnp.where(row, scores.reshape(G, t, -1) * H ** -0.5, _MASKED).reshape(G * t, -1)
    top = scores.max(-1, keepdims=True)
    p = jnp.exp(scores - top)
    total = p.sum(-1, keepdims=True)
    y = jnp.einsum("xs,sh->xh", p.astype(v.dtype), v, preferred_element_type=jnp.float32) / total
    y = y.astype(v.dtype)
    return y.reshape(G, t, H), (q, k, v, row, y, top, total)


def _block_backward(saved, dy):
    # All is [S, G·t]: of the products only that of dq then has a transposed left factor, which is slow on a CPU.
    q, k, v, row, y, top, total = saved
    G, t, H = q.shape
    dy, q = dy.reshape(G * t, H), q.reshape(G * t, H)
    scores = jnp.einsum("sh,xh->sx", k, q, preferred_element_type=jnp.float32) * H ** -0.5
    allowed = jnp.broadcast_to(row.T[:, None], (k.shape[0], G, t)).reshape(-1, G * t)
    p = jnp.exp(jnp.where(allowed, scores, _MASKED) - top.T) * (1 / total.T)
    along = jnp.einsum("sh,xh->sx", v, dy, preferred_element_type=jnp.float32)
    mean = (dy.astype(jnp.float32) * y.astype(jnp.float32)).sum(-1)
    d_scores = jnp.where(allowed, p * (along - mean) * H ** -0.5, 0).astype(k.dtype)
    dq = jnp.einsum("sx,sh->xh", d_scores, k, preferred_element_type=jnp.float32).astype(q.dtype)
    dk = jnp.einsum("sx,xh->sh", d_scores, q, preferred_element_type=jnp.float32).astype(k.dtype)
    dv = jnp.einsum("sx,xh->sh", p.astype(v.dtype), dy, preferred_element_type=jnp.float32).astype(v.dtype)
    return dq.reshape(G, t, H), dk, dv, None


_block.defvjp(_block_forward, _block_backward)


def _attend_fused(q, k, v, allowed):
    k, v = k.swapaxes(1, 2).astype(q.dtype), v.swapaxes(1, 2).astype(q.dtype)
    return jax.nn.dot_product_attention(q, k, v, mask=allowed[:, None])

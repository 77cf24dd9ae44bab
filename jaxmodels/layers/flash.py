"""Attention that never stores its scores, by kernels for NVIDIA GPUs, in half precision and both ways.

``cudnn``         jax.nn.dot_product_attention with cuDNN's kernel, the mask a bias that all heads share.
``cudnn_packed``  the same kernel on the runs of equal numbers alone: no product of two proteins is formed, and there is
                  no mask. jax has no public name for it (jax/_src/cudnn, as of 0.12). At most RUNS runs in a row.
``triton``        the Pallas kernel that comes with jax. Rows of a multiple of 128 tokens, or shorter ones.

Tokens see the tokens of their row with the same number, Groups.ids; padding, with a number of its own, sees padding.
"""

import dataclasses
import importlib

import jax
import jax.numpy as jnp

from jaxmodels.errors import UserError

RUNS = 24  # packed UniProt has at most 18 proteins in a row of 1024 tokens, and padding; each costs empty blocks
_BLOCK = 128
_INTERPRET = False  # of Pallas, for tests on a CPU
# What a layer's forward pass keeps so that these kernels need not run twice (`stack.POLICIES`).
PRIMITIVES = ("dot_product_attention_fwd", "dot_product_attention_fwd_wrapper", "pallas_call")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Groups:
    """Who belongs together: ids int32[B, T]; starts int32[B, RUNS + 1] and lengths int32[B, RUNS] of the runs of equal
    ids, -1 where there is none (cuDNN's convention), and fits, bool[B]: False in a row with more of them."""

    ids: jax.Array
    starts: jax.Array | None = None
    lengths: jax.Array | None = None
    fits: jax.Array | None = None


def groups(ids: jax.Array, with_runs: bool) -> Groups:
    """Of numbers int32[B, T]; every layer shares them."""
    ids = ids.astype(jnp.int32)
    if not with_runs:
        return Groups(ids)
    number = jnp.cumsum(jnp.diff(ids, axis=1) != 0, axis=1)
    number = jnp.pad(number, ((0, 0), (1, 0)))  # of the run that a token is in
    lengths = (number[:, :, None] == jnp.arange(RUNS)).sum(1, dtype=jnp.int32)
    starts = jnp.where(lengths > 0, jnp.cumsum(lengths, axis=1) - lengths, -1)
    return Groups(ids, jnp.pad(starts, ((0, 0), (0, 1)), constant_values=-1), jnp.where(lengths > 0, lengths, -1),
                  number[:, -1] < RUNS)


def choose(wanted: str, q: jax.Array, k: jax.Array, allowed: jax.Array) -> str:
    """The implementation for q [B, T, N, H], k [B, K, S, H] and a mask: ``auto`` takes cuDNN's where it can run.

    Raises UserError where a named one cannot.
    """
    if wanted == "xla":
        return "xla"
    T, H = q.shape[1], q.shape[-1]
    why = None
    if not _on_nvidia():
        why = "needs an NVIDIA GPU"
    elif q.dtype not in (jnp.bfloat16, jnp.float16):
        why = f"computes in bfloat16 or float16, not {q.dtype}"
    elif H % 8 or H > 128:
        why = f"takes heads of a multiple of 8 up to 128, not {H}"
    elif k.shape[1] != q.shape[2] or k.shape[2] != T:
        why = "takes as many keys, and heads of them, as queries"
    elif wanted in ("auto", "cudnn") and T % 2:
        why = f"takes rows of an even number of tokens, not {T}"
    elif wanted == "triton" and (T % _BLOCK if T > _BLOCK else T & (T - 1) or T < 16):
        why = f"takes rows of 16, 32, 64 or a multiple of {_BLOCK} tokens, not {T}"
    elif allowed.ndim != 3:
        why = f"takes a mask [B, T, S], not {list(allowed.shape)}"
    if wanted == "auto":
        return "cudnn" if why is None else "xla"
    if why is not None:
        raise UserError(f"attention {wanted!r} {why}; choose 'auto' or 'xla'")
    return wanted


def attend(name: str, q: jax.Array, k: jax.Array, v: jax.Array, allowed: jax.Array, groups: Groups) -> jax.Array:
    """softmax(q·k / √H)·v: all [B, T, N, H], allowed bool[B, T or 1, S]; of padding the result means nothing."""
    k, v = k.astype(q.dtype), v.astype(q.dtype)
    if name == "cudnn":
        B, T = q.shape[:2]
        mask = jnp.broadcast_to(allowed, (B, T, k.shape[1]))[:, None]
        return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="cudnn")
    return (_packed if name == "cudnn_packed" else _triton)(q, k, v, groups)


def _packed(q, k, v, groups):
    kernels = importlib.import_module("jax._src.cudnn.fused_attention_stablehlo")
    runs = {"q_seqlen": groups.lengths, "kv_seqlen": groups.lengths, "q_offsets": groups.starts,
            "kv_offsets": groups.starts}
    y = kernels.dot_product_attention(q, k, v, **runs, scale=q.shape[-1] ** -0.5)
    # NaN, and not a protein left out, in a row with more of them than there is room for.
    return jnp.where(groups.fits[:, None, None, None], y, jnp.nan)


def _triton(q, k, v, groups):
    kernels = importlib.import_module("jax.experimental.pallas.ops.gpu.attention")
    # jax's own sizes for the way back, 32 each, leave tensor cores waiting; more than 64 spill.
    sizes = kernels.BlockSizes(block_q=_BLOCK, block_k=64, block_q_dkv=64, block_kv_dkv=64, block_q_dq=64,
                               block_kv_dq=64)
    return kernels.mha(q, k, v, groups.ids, sm_scale=q.shape[-1] ** -0.5, block_sizes=sizes,
                       interpret=_INTERPRET)


def _on_nvidia() -> bool:
    return jax.default_backend() == "gpu" and "cuda" in jax.devices()[0].client.platform_version

"""A depth of layers with taps: equal neighbours are stacked and scanned, unequal or unrolled ones are groups of one.

``cfg`` is a model's configuration; ``groups`` (runs of layers), ``ffn_widths``, ``remat`` and ``windows`` are read.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmodels.errors import UserError
from jaxmodels.layers.attention import NO_WINDOW, Context
from jaxmodels.layers.flash import PRIMITIVES
from jaxmodels.taps import KINDS, NO_TAPS, Taps


def stack(block: Callable[[nnx.Rngs], nnx.Module], layers: int, rngs: nnx.Rngs) -> nnx.Module:
    """``layers`` blocks in one module, every parameter with a leading axis ``layers``."""
    @nnx.split_rngs(splits=layers)
    @nnx.vmap(in_axes=(0,), out_axes=0, transform_metadata={nnx.PARTITION_NAME: "layers"})
    def build(rngs):
        return block(rngs)

    return build(rngs)


def run(groups, cfg, x: jax.Array, context: Context, taps: Taps, mask: jax.Array, caches=None, unroll: bool = False):
    """Runs all layers: x [B, T, D] -> (x, aux, caches).

    A block is called as ``block(x, context, probe, window, cache)`` and gives (x, cache). aux: what the taps recorded,
    with a leading layer axis; ``residual`` has L + 1 entries, the last of which, what the final norm reads, is recorded
    and edited here. caches: one for each group, or None. unroll: stacked layers are not scanned but written one after
    another: compiles longer, and spares training the copies of states and weights that a scan makes.
    """
    recorded, kept = [], []
    for i, (start, stop) in enumerate(cfg.groups):
        x, out, cache = _run_group(groups[i], cfg, start, stop, x, context, taps, mask, caches and caches[i],
                                   unroll)
        recorded.append(out)
        kept.append(cache)
    aux = _gather(recorded, cfg)
    final = _last_residual_probe(taps, mask)
    x = final("residual", x)
    if "residual" in final.out:
        aux["residual"] = jax.tree.map(lambda a, b: jnp.concatenate([a, b[None]]), aux["residual"],
                                       final.out["residual"])
    return x, aux, kept if caches is not None else None


def run_from(groups, cfg, start: jax.Array, x: jax.Array, context: Context, taps: Taps, mask: jax.Array) -> jax.Array:
    """Runs layers start..L-1 on x [B, T, D], what enters layer ``start`` (int32[], data: one compilation for all).

    The taps are those of that one layer, with a leading axis of 1, and may edit but not record. For whoever runs the
    end of a model many times over the same beginning. Raises UserError for layers that are not equal and stacked.
    """
    if len(groups) != 1:
        raise UserError("only equal layers, stacked (scan_layers=True), can be started at any of them; this model has "
                        f"{len(groups)} groups of layers")
    graphdef, params = nnx.split(groups[0])
    windows = _windows(cfg, 0, cfg.num_layers) if context.distance is not None else None
    width = cfg.ffn_widths[0]

    def layer(x, params, taps, window):
        return nnx.merge(graphdef, params)(x, context, taps.probe(mask, width, width), window)[0]

    first, window = jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, start, keepdims=False), (params, windows))
    x = layer(x, first, jax.tree.map(lambda a: a[0], taps.layers(0, 1)), window)

    later = _saving(cfg, lambda x, params, window: layer(x, params, NO_TAPS, window), prevent_cse=False)

    def step(x, sliced):
        i, params, window = sliced
        # `start` is one number, also under vmap: what is skipped is not computed.
        return jax.lax.cond(i > start, lambda x: later(x, params, window), lambda x: x, x), None

    return jax.lax.scan(step, x, (jnp.arange(cfg.num_layers), params, windows))[0]


def layer_of(groups, cfg, layer: int) -> nnx.Module:
    """One layer as a module of its own."""
    group = next(g for g, (start, stop) in enumerate(cfg.groups) if start <= layer < stop)
    graphdef, params = nnx.split(groups[group])
    return nnx.merge(graphdef, jax.tree.map(lambda a: a[layer - cfg.groups[group][0]], params))


def select(taps: Taps, keep: Callable[[str], bool]) -> Taps:
    """The taps at the points that ``keep`` says."""
    return Taps(record=tuple(n for n in taps.record if keep(n)),
                **{kind: {n: e for n, e in getattr(taps, kind).items() if keep(n)}
                   for kind in KINDS})


def embedding_probe(taps: Taps, mask: jax.Array):
    """The probe of the point ``embedding``, which no layer has."""
    return select(taps, lambda name: name == "embedding").probe(mask)


def _run_group(group, cfg, start, stop, x, context, taps, mask, cache, unroll):
    """Runs layers start..stop-1: a scan over the stacked parameters, or one layer."""
    graphdef, params = nnx.split(group)
    windows = _windows(cfg, start, stop) if context.distance is not None else None
    taps = select(taps, lambda name: name != "embedding").layers(start, stop)
    width, widest = cfg.ffn_widths[start], max(cfg.ffn_widths)

    def layer(x, sliced):
        (params, taps, window), cache = sliced
        probe = taps.probe(mask, width, widest)
        x, cache = nnx.merge(graphdef, params)(x, context, probe, window, cache)
        return x, (probe.out, cache)

    # prevent_cse: inside a scan nothing can undo the recomputation, and the barriers would only cost
    layer = _saving(cfg, layer, prevent_cse=unroll or stop - start == 1)
    stacked = (params, taps, windows)
    if stop - start == 1:
        x, (out, cache) = layer(x, (jax.tree.map(lambda a: a[0], stacked), cache))
        out = jax.tree.map(lambda a: a[None], out)
    else:
        x, (out, cache) = jax.lax.scan(layer, x, (stacked, cache), unroll=unroll)
    return x, out, cache


def _saving(cfg, layer, prevent_cse):
    """The layer, of which the way back computes again what ``cfg.remat`` does not keep."""
    if cfg.remat == "none":
        return layer
    policy = products_saveable if cfg.remat == "products_saveable" else getattr(jax.checkpoint_policies, cfg.remat)
    return jax.checkpoint(layer, policy=policy, prevent_cse=prevent_cse)


def products_saveable(primitive, *arguments, **parameters):
    """Keeps the products with weight matrices and what fused attention gives; the rest costs little to do again."""
    return primitive.name in PRIMITIVES or jax.checkpoint_policies.dots_with_no_batch_dims_saveable(
        primitive, *arguments, **parameters)


def _windows(cfg, start, stop):
    return jnp.asarray([NO_WINDOW if w is None else w for w in cfg.windows[start:stop]], jnp.int32)


def _last_residual_probe(taps: Taps, mask):
    """The residual point has L + 1 entries: the input of every layer, then what the final norm reads."""
    last = select(taps, lambda name: name == "residual")
    last = jax.tree.map(lambda a: a[-1] if jnp.ndim(a) else a, last)
    return last.probe(mask)


def _gather(recorded: list[dict[str, Any]], cfg) -> dict[str, Any]:
    """Joins the groups' recordings along the layer axis, zero-padded to the widest, with ``ffn.width`` beside.

    Zero in layers that lack a point: ``router.logits`` of the dense layers among expert layers.
    """
    def join(*parts):
        widest = [max(sizes) for sizes in zip(*(p.shape[1:] for p in parts), strict=True)]
        return jnp.concatenate([jnp.pad(p, [(0, 0), *((0, w - n) for w, n in zip(widest, p.shape[1:], strict=True))])
                                for p in parts])

    aux = {}
    for name in dict.fromkeys(n for out in recorded for n in out):
        some = next(out[name] for out in recorded if name in out)
        parts = [out[name] if name in out else
                 jax.tree.map(lambda a, n=stop - start: jnp.zeros((n, *a.shape[1:]), a.dtype), some)
                 for out, (start, stop) in zip(recorded, cfg.groups, strict=True)]
        aux[name] = jax.tree.map(join, *parts)
    if len(set(cfg.ffn_widths)) > 1 and any(name.startswith("ffn.") for name in aux):
        aux["ffn.width"] = jnp.asarray(cfg.ffn_widths, jnp.int32)
    return aux

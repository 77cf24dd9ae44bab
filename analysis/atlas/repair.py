"""Repairing a pruned model without training: layer by layer, towards the dense model's residual stream.

moe_split.md section 4.6. Every layer's down projection is refitted in closed form (jaxmodels/experts/recover.py) on
calibration text that runs through the *pruned and already repaired* layers below it. Its target is the dense layer's
output plus ``pull`` times what the residual stream has strayed from the dense model's so far: 0 is the layer's own
output, 1 puts the stream back onto the dense one as far as the kept neurons can.
"""

import functools
from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Bool, Float, Int

from jaxmodels.decoder.model import Decoder, make_context
from jaxmodels.errors import UserError
from jaxmodels.experts import recover
from jaxmodels.experts.models import ffn_layers
from jaxmodels.taps import Taps


PULL = 0.5


class Repair(NamedTuple):
    """keep: bool[L, F]; down: float32[L, F, D], rows of dropped neurons are 0; bias: float32[L, D], the output bias to add;
    residual: float[L], the share of the target's variance that each layer's fit leaves."""

    keep: np.ndarray
    down: np.ndarray
    bias: np.ndarray
    residual: np.ndarray


def sequential_refit(model: Decoder, tokens: Int[np.ndarray, "R T"], mask: Bool[np.ndarray, "R T"],
                     counts: Int[np.ndarray, "L"], *, keep: Bool[np.ndarray, "L F"] | None = None,
                     ridge: float = recover.RIDGE, pull: float = PULL, batch: int = 8,
                     advance: Callable[[], None] = lambda: None) -> Repair:
    """Chooses ``counts[l]`` neurons in each layer and refits its down projection to them.

    tokens, mask: calibration rows. keep: the neurons, if they are chosen already; default: those that the others can
    replace least (``recover.select_neurons``). Memory: two residual streams and one hidden layer of the text.
    Raises UserError for post-norm models, whose FFN output is normalised before it reaches the stream.
    """
    if model.cfg.norm_placement != "pre":
        raise UserError("sequential refit needs a pre-norm model; use recover.refit_down for this one")
    rows = [slice(i, i + batch) for i in range(0, len(tokens), batch)]
    short = -len(tokens) % batch
    tokens, mask = np.pad(tokens, ((0, short), (0, 0))), np.pad(mask, ((0, short), (0, 0)))
    masks = [jnp.asarray(mask[r]) for r in rows]
    dense = [model.embed[...][tokens[r]].astype(model.cfg.dtype) for r in rows]
    pruned = list(dense)
    # One width for all layers, so that they share their compilations; places beyond a layer's own count are zero.
    width = int(max(counts))
    out = []
    for layer, ffn in enumerate(ffn_layers(model)):
        graphdef, params = nnx.split(model.block(layer))
        block = functools.partial(_run_block, graphdef, model.cfg, params)
        down = np.asarray(ffn["down"], np.float32)
        dense_parts = [block(x, m) for x, m in zip(dense, masks, strict=True)]
        if keep is None:
            stats = _sum(_own_moments(part, m) for part, m in zip(dense_parts, masks, strict=True))
            index = np.flatnonzero(recover.select_neurons(stats, down, int(counts[layer]), ridge=ridge))
        else:
            index = np.flatnonzero(keep[layer])
        padded = jnp.asarray(np.concatenate([index, np.zeros(width - len(index), int)]))
        parts = [_keep(block(x, m), padded, len(index)) for x, m in zip(pruned, masks, strict=True)]
        stats = _sum(_moments(part, dense_part, m, pull)
                     for part, dense_part, m in zip(parts, dense_parts, masks, strict=True))
        used = len(index)
        stats = stats._replace(x=stats.x[:used], xx=stats.xx[:used, :used], xy=stats.xy[:used])
        fit = recover.refit(stats, down[index], ridge=ridge)
        rows_down = jnp.zeros((width, down.shape[1])).at[:used].set(fit.down)
        pruned = [_apply(part, rows_down, jnp.asarray(fit.bias)) for part in parts]
        dense = [part.out for part in dense_parts]
        full = np.zeros_like(down)
        full[index] = fit.down
        kept = np.zeros(len(down), bool)
        kept[index] = True
        out.append((kept, full, fit.bias, fit.residual))
        advance()
    return Repair(*(np.stack(values) for values in zip(*out, strict=True)))


class _Part(NamedTuple):
    """One batch in one layer: the layer's output, the stream before the FFN adds to it, the hidden activations."""

    out: jax.Array
    base: jax.Array
    hidden: jax.Array


@functools.partial(jax.jit, static_argnums=(0, 1))
def _run_block(graphdef, cfg, params, x, mask) -> _Part:
    probe = Taps(record=("ffn.hidden", "ffn.output")).probe(mask)
    context, _ = make_context(cfg, mask)
    out, _ = nnx.merge(graphdef, params)(x, context, probe)
    return _Part(out, out - probe.out["ffn.output"], probe.out["ffn.hidden"])


@jax.jit
def _keep(part: _Part, index, used) -> _Part:
    hidden = jnp.where(jnp.arange(len(index)) < used, part.hidden[..., index], 0)
    return part._replace(hidden=hidden)


def _weight(base):
    # The next norm divides a token by the size of its residual stream, so an error counts relative to that size.
    return 1 / (jnp.mean(base * base, axis=-1) + 1e-6)


@jax.jit
def _own_moments(dense: _Part, mask) -> recover.Moments:
    return recover.moments(dense.hidden, mask, None, _weight(dense.base))


@jax.jit
def _moments(part: _Part, dense: _Part, mask, pull) -> recover.Moments:
    target = dense.out - dense.base + pull * (dense.base - part.base)
    return recover.moments(part.hidden, mask, target, _weight(part.base))


def _sum(found: Iterable[recover.Moments]) -> recover.Moments:
    """float64 on the host; the sum stays on the device until it is complete."""
    return recover.Moments(*(np.asarray(v, np.float64) for v in functools.reduce(_add, found)))


@jax.jit
def _apply(part: _Part, down, bias):
    return part.base + part.hidden @ down + bias


_add = jax.jit(recover.add_moments)

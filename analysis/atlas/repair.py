"""Repairing a pruned model without training: layer by layer, towards the dense model's residual stream.

moe_split.md section 4.6. Every layer's down projection is refitted in closed form (jaxmodels/experts/recover.py) on
calibration text that runs through the *pruned and already repaired* layers below it. Its target is the dense layer's
output plus ``pull`` times what the residual stream has strayed from the dense model's so far: 0 is the layer's own
output, 1 puts the stream back onto the dense one as far as the kept neurons can.
"""

import functools
from collections.abc import Callable
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
    """down: float32[L, F, D], rows of dropped neurons are 0; bias: float32[L, D], the output bias to add;
    residual: float[L], the share of the target's variance that each layer's fit leaves."""

    down: np.ndarray
    bias: np.ndarray
    residual: np.ndarray


def sequential_refit(model: Decoder, tokens: Int[np.ndarray, "R T"], mask: Bool[np.ndarray, "R T"],
                     keep: Bool[np.ndarray, "L F"], *, ridge: float = recover.RIDGE,
                     pull: float = PULL, batch: int = 8, advance: Callable[[], None] = lambda: None) -> Repair:
    """Refits every down projection for the neurons that ``keep`` leaves.

    tokens, mask: calibration rows. Memory: two residual streams of the calibration text, R·T·D floats each.
    Raises UserError for post-norm models, whose FFN output is normalised before it reaches the stream.
    """
    if model.cfg.norm_placement != "pre":
        raise UserError("sequential refit needs a pre-norm model; use refit_down for this one")
    rows = [slice(i, i + batch) for i in range(0, len(tokens), batch)]
    short = -len(tokens) % batch
    tokens, mask = np.pad(tokens, ((0, short), (0, 0))), np.pad(mask, ((0, short), (0, 0)))
    masks = [jnp.asarray(mask[r]) for r in rows]
    dense = [model.embed[...][tokens[r]].astype(model.cfg.dtype) for r in rows]
    pruned = list(dense)
    out_down, out_bias, left = [], [], []
    for layer, ffn in enumerate(ffn_layers(model)):
        graphdef, params = nnx.split(model.block(layer))
        kept = jnp.asarray(keep[layer])
        stats = None
        bases, hiddens = [], []
        for i, m in enumerate(masks):
            dense[i], dense_base, _ = _run_block(graphdef, model.cfg, params, dense[i], m, jnp.ones_like(kept))
            _, base, hidden = _run_block(graphdef, model.cfg, params, pruned[i], m, kept)
            bases.append(base)
            hiddens.append(hidden)
            found = _moments(hidden, m, dense[i], dense_base, base, pull)
            stats = found if stats is None else _add(stats, found)
        stats = recover.Moments(*(np.asarray(v, np.float64) for v in stats))
        fit = _fit(stats, np.asarray(ffn["down"]), keep[layer], ridge)
        out_down.append(fit.down)
        out_bias.append(fit.bias)
        left.append(fit.residual)
        for i in range(len(rows)):
            pruned[i] = _apply(bases[i], hiddens[i], jnp.asarray(fit.down), jnp.asarray(fit.bias))
        advance()
    return Repair(np.stack(out_down), np.stack(out_bias), np.asarray(left))


def _fit(stats: recover.Moments, down: np.ndarray, keep: np.ndarray, ridge: float) -> recover.Refit:
    """The fit on the kept neurons, in the full layout."""
    index = np.flatnonzero(keep)
    small = stats._replace(x=stats.x[index], xx=stats.xx[np.ix_(index, index)], xy=stats.xy[index])
    fit = recover.refit(small, down[index], ridge=ridge)
    full = np.zeros_like(down, dtype=np.float32)
    full[index] = fit.down
    return fit._replace(down=full)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _run_block(graphdef, cfg, params, x, mask, keep):
    """(output, residual stream before the FFN's output is added, hidden with dropped neurons at 0)."""
    taps = Taps(record=("ffn.hidden", "ffn.output"), mask={"ffn.hidden": keep})
    probe = taps.probe(mask)
    context, _ = make_context(cfg, mask)
    window = None
    out, _ = nnx.merge(graphdef, params)(x, context, probe, window)
    return out, out - probe.out["ffn.output"], probe.out["ffn.hidden"]


@jax.jit
def _moments(hidden, mask, dense_out, dense_base, base, pull):
    target = dense_out - dense_base + pull * (dense_base - base)
    # The next norm divides a token by the size of its residual stream, so an error counts relative to that size.
    return recover.moments(hidden, mask, target, 1 / (jnp.mean(base * base, axis=-1) + 1e-6))


_add = jax.jit(recover.add_moments, donate_argnums=0)


@jax.jit
def _apply(base, hidden, down, bias):
    return base + hidden @ down + bias

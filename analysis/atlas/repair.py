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
from jaxtyping import Bool, Int

from jaxmodels.decoder.generate import Sampling, generate
from jaxmodels.decoder.model import Decoder, make_context
from jaxmodels.errors import UserError
from jaxmodels.experts import recover
from jaxmodels.experts.models import ffn_layers
from jaxmodels.layers.attention import NO_WINDOW
from jaxmodels.taps import Taps

PULL = 0.5  # measured on French and German, see docs/log.md
OPENING = 8  # tokens of a real text that the model goes on from
RIDGE = 0.1  # of the mean variance: calibration texts are short and of another domain than what follows


class Repair(NamedTuple):
    """down: float32[L, F, D], rows of dropped neurons are 0; bias: float32[L, D], the output bias to add;
    residual: float[L], the share of the target's variance that each layer's fit leaves."""

    down: np.ndarray
    bias: np.ndarray
    residual: np.ndarray


class Calibration:
    """Calibration text on its way through the layers: rows in batches of one shape."""

    def __init__(self, model: Decoder, tokens: Int[np.ndarray, "R T"], mask: Bool[np.ndarray, "R T"], batch: int = 8):
        if model.cfg.norm_placement != "pre":
            raise UserError("repair needs a pre-norm model: a post-norm one normalises the FFN's output once more")
        batch = min(batch, len(tokens))
        short = -len(tokens) % batch
        tokens, mask = np.pad(tokens, ((0, short), (0, 0))), np.pad(mask, ((0, short), (0, 0)))
        starts = range(0, len(tokens), batch)
        self.model, self.masks = model, [jnp.asarray(mask[i:i + batch]) for i in starts]
        self.streams = [model.embed[...][tokens[i:i + batch]].astype(model.cfg.dtype) for i in starts]

    def run(self, layer: int, streams: list[jax.Array]) -> list["_Part"]:
        """Every batch through one layer."""
        graphdef, params = nnx.split(self.model.block(layer))
        windows = self.model.cfg.windows
        window = None if windows is None else jnp.int32(windows[layer] or NO_WINDOW)
        return [_run_block(graphdef, self.model.cfg, params, x, m, window)
                for x, m in zip(streams, self.masks, strict=True)]


def rank_neurons(text: Calibration, share: float, *, ridge: float = RIDGE,
                 advance: Callable[[], None] = lambda: None) -> Int[np.ndarray, "L F"]:
    """``recover.removal_order`` in every layer of the dense model, for ``keep_last`` with ``share`` or more."""
    streams, out = list(text.streams), []
    for layer, ffn in enumerate(ffn_layers(text.model)):
        parts = text.run(layer, streams)
        stats = _sum(_own_moments(part, m) for part, m in zip(parts, text.masks, strict=True))
        out.append(recover.removal_order(stats, np.asarray(ffn["down"], np.float32), ridge=ridge,
                                         until=int(0.8 * share * len(stats.x))))  # keep_last may cut deeper than share
        streams = [part.out for part in parts]
        advance()
    return np.stack(out)


def sequential_refit(text: Calibration, keep: Bool[np.ndarray, "L F"], *, ridge: float = RIDGE, pull: float = PULL,
                     advance: Callable[[], None] = lambda: None) -> Repair:
    """Refits every down projection to the neurons that ``keep`` leaves.

    Memory: two residual streams and two hidden layers of the calibration text.
    """
    dense, pruned = list(text.streams), list(text.streams)
    # One width for all layers, so that they share their compilations; places beyond a layer's own count are zero.
    width = int(keep.sum(1).max())
    out = []
    for layer, ffn in enumerate(ffn_layers(text.model)):
        down, index = np.asarray(ffn["down"], np.float32), np.flatnonzero(keep[layer])
        used = len(index)
        padded = jnp.asarray(np.pad(index, (0, width - used)))
        dense_parts = text.run(layer, dense)
        parts = [_keep(part, padded, used) for part in text.run(layer, pruned)]
        stats = _sum(_moments(part, dense_part, m, pull)
                     for part, dense_part, m in zip(parts, dense_parts, text.masks, strict=True))
        stats = stats._replace(x=stats.x[:used], xx=stats.xx[:used, :used], xy=stats.xy[:used])
        fit = recover.refit(stats, down[index], ridge=ridge)
        rows = jnp.zeros((width, down.shape[1])).at[:used].set(fit.down)
        pruned = [_apply(part, rows, jnp.asarray(fit.bias)) for part in parts]
        dense = [part.out for part in dense_parts]
        full = np.zeros_like(down)
        full[index] = fit.down
        out.append((full, fit.bias, fit.residual))
        advance()
    return Repair(*(np.stack(values) for values in zip(*out, strict=True)))


def own_words(model: Decoder, tokens: Int[np.ndarray, "R T"], mask: Bool[np.ndarray, "R T"], count: int, *,
              batch: int = 64, seed: int = 0) -> Int[np.ndarray, "count T"]:
    """Text that the model writes itself (temperature 1) after the first words of ``tokens``: calibration text where
    there is little.

    It covers what the model knows of a language rather than one kind of document. Returns ``count`` rows of T tokens,
    the opening included. Unroll the model first: it decodes faster.
    """
    opening = min(OPENING, tokens.shape[1] // 2)
    starts = tokens[mask.all(1), :opening]
    if not len(starts):
        raise UserError(f"the text does not fill one window of {tokens.shape[1]} tokens; give more text")
    openings, out = np.resize(starts, (count, opening)).tolist(), []
    for first in range(0, count, batch):
        part = openings[first:first + batch]
        rows = generate(model, part, tokens.shape[1] - opening, sampling=Sampling(temperature=1.0), seed=seed + first,
                        stop_ids=())
        out += [start + row for start, row in zip(part, rows, strict=True)]
    return np.asarray(out, np.int32)


class _Part(NamedTuple):
    """One batch in one layer: the layer's output, the stream before the FFN adds to it, the hidden activations."""

    out: jax.Array
    base: jax.Array
    hidden: jax.Array


@functools.partial(jax.jit, static_argnums=(0, 1))
def _run_block(graphdef, cfg, params, x, mask, window) -> _Part:
    probe = Taps(record=("ffn.hidden", "ffn.output")).probe(mask)
    context, _ = make_context(cfg, mask)
    out, _ = nnx.merge(graphdef, params)(x, context, probe, window)
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

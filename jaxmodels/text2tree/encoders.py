"""Text encoders behind one interface: ``h, aux = encoder(tokens, mask, taps, key)``, int32[B, T] -> float32[B, D].

A transformer (from scratch or out of a BERT checkpoint), its upper layers alone over the stored states of the lower
ones, and a CNN. ``width`` is D, ``points`` what can be tapped.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxmodels.errors import UserError
from jaxmodels.esm.config import EsmConfig
from jaxmodels.esm.model import POINTS, Esm
from jaxmodels.layers import stack
from jaxmodels.layers.attention import Context
from jaxmodels.layers.linear import linear
from jaxmodels.layers.param import param
from jaxmodels.taps import NO_TAPS, Taps
from jaxmodels.text2tree._dropout import dropout

POOLS = ("cls", "mean")


class TransformerEncoder(nnx.Module):
    """h is the last state of the first token (``cls``), or the mean over all tokens (``mean``, sentence encoders)."""

    points = POINTS

    def __init__(self, bert: Esm, pool: str = "cls"):
        """bert: a Bert, or another encoder of ESM's kind."""
        self.bert, self.pool = bert, _checked(pool)

    @property
    def width(self) -> int:
        return self.bert.cfg.d_model

    def __call__(self, tokens: jax.Array, mask: jax.Array, taps: Taps = NO_TAPS, key: jax.Array | None = None):
        """tokens int32[B, T], mask bool[B, T] -> (float32[B, D], aux). key: no dropout inside, so it is not used."""
        states, aux = self.states(tokens, mask, taps)
        return pooled(states, mask, self.pool), aux

    def states(self, tokens: jax.Array, mask: jax.Array, taps: Taps = NO_TAPS):
        """(the last states float32[B, T, D], aux)."""
        return self.bert.forward(tokens, mask, taps=taps, output="hidden")

    def split(self, layers: int) -> tuple[Esm, "UpperEncoder"]:
        """(the lower ``layers`` with the embedding, an encoder of the others over what those give).

        ``lower.forward(tokens, mask, output="hidden")[0]`` is what the second takes in place of tokens: computed once
        and stored, it spares a training that freezes the lower layers most of its time.
        """
        cfg = self.bert.cfg
        if (cfg.norm_placement, cfg.position) != ("post", "learned"):
            raise UserError("only encoders of BERT's and RoBERTa's kind can be cut, not ESM's, whose last norm and "
                            "positions all layers need; train it whole (encoder.frozen=0)")
        if not 0 < layers < cfg.num_layers or len(self.bert.groups) != 1:
            raise UserError(f"{layers} lower layers cannot be cut off {cfg.num_layers}; give 1 to {cfg.num_layers - 1},"
                            " and load with scan_layers=True")
        graphdef, params = nnx.split(self.bert.groups[0])
        below, above = (nnx.merge(graphdef, jax.tree.map(lambda a, part=part: a[part], params))
                        for part in (slice(layers), slice(layers, None)))
        widths = cfg.ffn_widths[:layers], cfg.ffn_widths[layers:]
        bare = dataclasses.replace(cfg, ffn_widths=widths[0], lm_head=False, contact_head=False, classes=0)
        lower = nnx.eval_shape(lambda: type(self.bert)(bare, rngs=nnx.Rngs(0)))
        lower.embed, lower.positions, lower.embed_norm = self.bert.embed, self.bert.positions, self.bert.embed_norm
        lower.groups = nnx.List([below])
        return lower, UpperEncoder(above, dataclasses.replace(cfg, ffn_widths=widths[1]), self.pool)


class UpperEncoder(nnx.Module):
    """The upper layers of a `TransformerEncoder`: states float[B, T, D] of the lower ones in place of tokens."""

    points = tuple(point for point in POINTS if point != "embedding")

    def __init__(self, layers: nnx.Module, cfg: EsmConfig, pool: str = "cls"):
        self.groups, self.cfg, self.pool = nnx.List([layers]), cfg, _checked(pool)

    @property
    def width(self) -> int:
        return self.cfg.d_model

    def __call__(self, states: jax.Array, mask: jax.Array, taps: Taps = NO_TAPS, key: jax.Array | None = None):
        taps.check(self.points, self.cfg.num_layers)
        context = Context(None, mask[:, None, :])
        # Few layers, and a training that does little else: measured, a step with two of them takes a seventh less.
        x, aux, _ = stack.run(self.groups, self.cfg, states.astype(self.cfg.dtype), context, taps, mask, unroll=True)
        return pooled(x, mask, self.pool), aux


@dataclasses.dataclass(frozen=True)
class CnnConfig:
    """filters: of each width; d_embed: width of a token's embedding. Defaults: Kim 2014, section 3.1."""

    vocab_size: int
    d_embed: int = 300
    filters: int = 100
    widths: tuple[int, ...] = (3, 4, 5)
    dropout: float = 0.0
    pad_id: int = 0


class CnnEncoder(nnx.Module):
    """Convolutions of several widths, the largest value of each filter over the text: D = widths · filters (Kim 2014).

    Tap points: ``embedding``; ``word.conv`` [widths, B, T, filters], after the ReLU, position t reading from token t.
    """

    points = ("embedding", "word.conv")

    def __init__(self, cfg: CnnConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        self.embed = param(rngs, (cfg.vocab_size, cfg.d_embed), ("vocab", "embed"), std=0.1)
        self.filters = nnx.List([param(rngs, (w, cfg.d_embed, cfg.filters), (None, "embed", None),
                                       std=(2 / (w * cfg.d_embed)) ** 0.5) for w in cfg.widths])
        self.biases = nnx.List([param(rngs, (cfg.filters,), (None,), value=0.0) for _ in cfg.widths])

    @property
    def width(self) -> int:
        return self.cfg.filters * len(self.cfg.widths)

    def __call__(self, tokens: jax.Array, mask: jax.Array, taps: Taps = NO_TAPS, key: jax.Array | None = None):
        """tokens int32[B, T], mask bool[B, T] -> (float32[B, D], aux); 0 for a text without tokens."""
        taps.check(self.points, len(self.cfg.widths))
        probe = stack.embedding_probe(taps, mask)
        x = probe("embedding", jnp.where(mask[..., None], self.embed[...].at[tokens].get(mode="fill"), 0))
        x = dropout(x, self.cfg.dropout, key)
        inner, largest, recorded = stack.select(taps, lambda name: name != "embedding"), [], []
        for i, width in enumerate(self.cfg.widths):
            layer = jax.tree.map(lambda a: a[0], inner.layers(i, i + 1)).probe(mask)
            # Windows reach over the end into zeros, as they do into padding.
            windows = jnp.concatenate([jnp.pad(x, ((0, 0), (0, width - 1), (0, 0)))[:, k:k + x.shape[1]]
                                       for k in range(width)], axis=-1)
            kernel = self.filters[i][...].reshape(-1, self.cfg.filters)
            y = layer("word.conv", jax.nn.relu(linear(windows, kernel, self.biases[i][...])))
            largest.append(jnp.where(mask[..., None], y, 0).max(1))  # after a ReLU nothing is below 0
            recorded.append(layer.out)
        aux = jax.tree.map(lambda *parts: jnp.stack(parts), *recorded)
        return jnp.concatenate(largest, axis=-1), probe.out | aux


def pretrained(name: str, pool: str = "cls", seed: int = 0) -> tuple[TransformerEncoder, tuple[jax.Array, jax.Array]]:
    """(an encoder, its pooler: weight [D, D] and bias [D]) from a BERT or RoBERTa folder or a known name such as
    ``all-minilm-l6-v2``; the pooler is fresh where the checkpoint has none."""
    import jaxmodels

    bert = jaxmodels.load(name, lm_head=False, seed=seed)
    if bert.classifier is None:
        bert = jaxmodels.load(name, lm_head=False, classes=1, seed=seed)
    pooler = bert.classifier.dense[...], bert.classifier.dense_bias[...]
    bert.classifier, bert.cfg = None, dataclasses.replace(bert.cfg, classes=0)
    return TransformerEncoder(bert, pool), pooler


def pooled(states: jax.Array, mask: jax.Array, pool: str) -> jax.Array:
    """One vector a text, float32[B, D]: of its first token, or the mean over its tokens (0 where there is none)."""
    states = states.astype(jnp.float32)
    if pool == "cls":
        return states[:, 0]
    total = jnp.where(mask[..., None], states, 0).sum(1)
    return total / jnp.maximum(mask.sum(1, keepdims=True), 1)


def batch_of(rows: list[list[int]], length: int | None = None, pad_id: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Rows of token ids, cut and padded on the right: (tokens int32[n, T], mask bool[n, T]).

    length: T; default: the longest row. A longer row keeps its last token, which ends a text ([SEP]).
    """
    length = length or max(map(len, rows), default=0)
    tokens, mask = np.full((len(rows), length), pad_id, np.int32), np.zeros((len(rows), length), bool)
    for i, row in enumerate(rows):
        row = row if len(row) <= length else [*row[:length - 1], row[-1]]
        tokens[i, :len(row)], mask[i, :len(row)] = row, True
    return tokens, mask


def chunks_of(rows: list[list[int]], length: int, most: int, pad_id: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Long rows ([CLS] words [SEP]) in pieces that each begin and end so: (tokens int32[n, C, T], mask bool[n, C, T]).

    most: C, pieces a text at the most; the rest of a longer text is left out. Pieces that a text lacks are all padding.
    """
    if length < 3:
        raise UserError(f"a chunk of {length} tokens has no room for words between [CLS] and [SEP]; give 3 or more")
    tokens, mask = np.full((len(rows), most, length), pad_id, np.int32), np.zeros((len(rows), most, length), bool)
    for i, row in enumerate(rows):
        words, step = row[1:-1], length - 2
        pieces = [[row[0], *words[at:at + step], row[-1]] for at in range(0, max(len(words), 1), step)]
        cut = pieces[:most]
        tokens[i, :len(cut)], mask[i, :len(cut)] = batch_of(cut, length, pad_id)
    return tokens, mask


def _checked(pool: Any) -> str:
    if pool not in POOLS:
        raise UserError(f"pool {pool!r} is not one of {', '.join(POOLS)}")
    return pool

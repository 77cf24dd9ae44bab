"""CNN-CNN-LSTM (Shen et al. 2018, arXiv 1707.05928): characters, words, and a tagger that reads its own last tag.

    model = CnnCnnLstm(CnnCnnLstmConfig.tiny(), rngs=nnx.Rngs(0))
    loss, sums = model.loss(batch, key)          # training: gold history
    decoded = model.decode(words, chars)         # its own history, greedy or beam
    logits, aux = model(words, chars, tags)      # one compilation for each shape

Rows: words int[B, T], chars int[B, T, M]. A sentence stands between START and END; 0 is padding. Several may share a
row with `cfg.reach` empty positions between them. Padding reads zeros in every layer, so it changes nothing.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxmodels.cnn_cnn_lstm.config import CnnCnnLstmConfig
from jaxmodels.errors import UserError
from jaxmodels.layers import crf, stack
from jaxmodels.layers.linear import linear
from jaxmodels.layers.param import param
from jaxmodels.layers.recurrent import Lstm
from jaxmodels.shapes import Array, Bool, Float, Int
from jaxmodels.taps import NO_TAPS, Taps

PAD, UNK, START, END = range(4)  # the first rows of the tables of words and of characters


class Decoded(NamedTuple):
    """Tags of rows and how sure they are. All are 0 where there is no word.

    tags int32[B, T]; log_prob: log P(tag | tags before), of a CRF the log of the marginal; entropy: of the same
    distribution, nats; total float32[B]: log P of all tags of a row; log_probs float32[B, T, V], if asked for.
    """

    tags: jax.Array
    log_prob: jax.Array
    entropy: jax.Array
    total: jax.Array
    log_probs: jax.Array | None = None


class CharCnn(nnx.Module):
    """Section 3.1: embedding, convolutions with ReLU, dropout and residual, the largest value over a word's characters.

    Tap point: ``char.conv`` [layers, B, T, M, filters], after the ReLU.
    """

    def __init__(self, cfg: CnnCnnLstmConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        self.embed = _embedding(rngs, cfg.chars, cfg.d_char)
        widths = [cfg.d_char, *[cfg.char_filters] * cfg.char_layers]
        self.convs = nnx.List([Conv(cfg.char_width, a, b, None, rngs=rngs)
                               for a, b in zip(widths, widths[1:], strict=False)])
        self.shortcuts = nnx.List([param(rngs, (a, b), (None, None), std=a ** -0.5)
                                   if cfg.residual == "project" and a != b else None
                                   for a, b in zip(widths, widths[1:], strict=False)])

    def __call__(self, chars: Int[Any, "... M"], taps: Taps = NO_TAPS, key: jax.Array | None = None
                 ) -> tuple[Float[Array, "... W"], dict[str, Any]]:
        """Words' characters -> (one vector a word, aux); 0 for a word without characters."""
        cfg, lead, there = self.cfg, chars.shape[:-1], chars > PAD
        taps, recorded = stack.select(taps, lambda name: name == "char.conv"), []
        x = self.embed[...][chars].astype(cfg.dtype) * there[..., None]
        for i, conv in enumerate(self.convs):
            if i:
                x = _dropout(x, cfg.dropout, _fold(key, i))
            probe = _layer(taps, i).probe(there.any(-1))
            y = jax.nn.relu(conv(x.reshape(-1, *x.shape[-2:])))
            y = probe("char.conv", y.reshape(*lead, *y.shape[-2:]))
            recorded.append(probe.out)
            if self.shortcuts[i] is not None:
                x = linear(x, self.shortcuts[i][...])
            if cfg.residual != "none" and x.shape == y.shape:
                y = y + x
            x = y * there[..., None]
        lowest = jnp.finfo(x.dtype).min
        x = jnp.where(there[..., None], x, lowest).max(-2)  # with a residual, values may lie below 0
        return jnp.where(there.any(-1)[..., None], x, 0), _stacked(recorded)


class WordCnn(nnx.Module):
    """Section 3.2: convolutions over words with ReLU and dropout; what they read goes past them to the decoder too.

    Tap points: ``embedding`` [B, T, d_word]; ``word.conv`` [layers, B, T, filters], after the ReLU.
    """

    def __init__(self, cfg: CnnCnnLstmConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        self.embed = _embedding(rngs, cfg.words, cfg.d_word)
        widths = [cfg.d_full, *[cfg.word_filters] * cfg.word_layers]
        self.convs = nnx.List([Conv(cfg.word_width, a, b, "mlp", rngs=rngs)
                               for a, b in zip(widths, widths[1:], strict=False)])

    def __call__(self, words: Int[Any, "B T"], w_char: Float[Any, "B T W"], taps: Taps = NO_TAPS,
                 key: jax.Array | None = None) -> tuple[Float[Array, "B T E"], dict[str, Any]]:
        """(h_enc, aux)."""
        cfg, there = self.cfg, (words > PAD)[..., None]
        probe = stack.embedding_probe(taps, words > PAD)
        w_emb = probe("embedding", self.embed[...][words].astype(cfg.dtype))
        w_full = _dropout(jnp.concatenate([w_char.astype(cfg.dtype), w_emb], -1) * there, cfg.dropout, _fold(key, 0))
        taps, recorded, x = stack.select(taps, lambda name: name == "word.conv"), [], w_full
        for i, conv in enumerate(self.convs):
            layer = _layer(taps, i).probe(words > PAD)
            y = layer("word.conv", jax.nn.relu(conv(x)))
            recorded.append(layer.out)
            x = _dropout(y * there, cfg.dropout, _fold(key, i + 1))
        return jnp.concatenate([x, w_full], -1), probe.out | _stacked(recorded)


class TagLstm(nnx.Module):
    """Section 3.3: an LSTM over positions that reads h_enc and the tag before; locally normalised.

    Tap point: ``decoder.state`` [1, B, T, H], what the softmax reads; an edit does not reach the next step's state.
    """

    def __init__(self, cfg: CnnCnnLstmConfig, *, rngs: nnx.Rngs):
        self.cfg, self.go = cfg, cfg.tags  # the last row stands before the first word
        d_tag = cfg.d_tag or cfg.tags + 1
        self.embed = _embedding(rngs, cfg.tags + 1, d_tag, pad=False) if cfg.d_tag else None
        self.lstm = Lstm(cfg.d_enc + d_tag, cfg.d_hidden, rngs=rngs)
        self.out = param(rngs, (cfg.d_hidden, cfg.tags), (None, None), std=cfg.d_hidden ** -0.5)
        self.out_bias = param(rngs, (cfg.tags,), (None,), value=0.0)

    def inputs(self, h_enc: jax.Array) -> jax.Array:
        """What words add to the gates, for all positions at once: float32[B, T, 4H]."""
        return self.lstm.project(h_enc, slice(self.cfg.d_enc))

    def tag_inputs(self) -> jax.Array:
        """What each previous tag adds to the gates, float32[V + 1, 4H]."""
        rows = slice(self.cfg.d_enc, None)
        if self.embed is None:
            return self.lstm.input[...][rows]
        return self.lstm.project(self.embed[...].astype(self.cfg.dtype), rows, bias=False)

    def logits(self, h: jax.Array) -> jax.Array:
        return linear(h.astype(self.cfg.dtype), self.out[...], self.out_bias[...]).astype(jnp.float32)

    def forced(self, h_enc: jax.Array, tags: Any, real: Any, taps: Taps = NO_TAPS,
               key: jax.Array | None = None) -> tuple[jax.Array, dict[str, Any]]:
        """(logits float32[B, T, V] where the history is that of `tags`, aux)."""
        first, _ = crf.ends(real)
        before = jnp.where(first, self.go, jnp.pad(jnp.maximum(tags, 0), ((0, 0), (1, 0)))[:, :-1])
        h = self.lstm(self.inputs(h_enc) + self.tag_inputs()[before], first, self.cfg.dtype)
        probe = _layer(stack.select(taps, lambda name: name == "decoder.state"), 0).probe(jnp.asarray(real))
        h = _dropout(probe("decoder.state", h), self.cfg.dropout, key)
        return self.logits(h), _stacked([probe.out])

    def greedy(self, z: jax.Array, real: Any, key: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        """(tags int32[B, T], the logits at every step float32[B, T, V]) of the likeliest tag at each step.

        z: `inputs`, so that many passes share them. key: dropout with a mask of its own at every step.
        """
        cfg, (B, T) = self.cfg, real.shape
        first, _ = crf.ends(real)
        table = self.tag_inputs()
        # Masks are drawn outside the scan: with one key inside it every step would have the same.
        keep = _kept(key, cfg.dropout, (T, B, cfg.d_hidden)) if key is not None and cfg.dropout else None

        def step(carry, sliced):
            state, tag = carry
            z, first, keep = sliced
            state = jax.tree.map(lambda s: jnp.where(first[:, None], 0, s), state)
            state = self.lstm.step(z + table[jnp.where(first, self.go, tag)], state, cfg.dtype)
            h = state.h if keep is None else jnp.where(keep, state.h / _share(cfg.dropout), 0)
            logits = self.logits(h)
            tag = logits.argmax(-1).astype(jnp.int32)
            return (state, tag), (tag, logits)

        start = self.lstm.start(B), jnp.zeros(B, jnp.int32)
        times = jnp.swapaxes(z, 0, 1), jnp.swapaxes(first, 0, 1), keep
        tags, logits = jax.lax.scan(step, start, times)[1]
        return jnp.swapaxes(tags, 0, 1), jnp.swapaxes(logits, 0, 1)

    def beam(self, h_enc: jax.Array, real: Any, width: int) -> jax.Array:
        """The tags that a beam search finds, int32[B, T]; rows of one sentence each."""
        cfg, B = self.cfg, len(real)
        table, z = self.tag_inputs(), self.inputs(h_enc)

        def step(carry, sliced):
            state, tag, score = carry
            z, real = sliced
            new = self.lstm.step(z[:, None] + table[tag], state, cfg.dtype)
            found = score[..., None] + jax.nn.log_softmax(self.logits(new.h))
            top, place = jax.lax.top_k(found.reshape(B, -1), width)
            parent = jnp.where(real[:, None], place // cfg.tags, jnp.arange(width))
            new = jax.tree.map(lambda s: jnp.take_along_axis(s, parent[..., None], 1), new)
            here = real[:, None]
            state = jax.tree.map(lambda a, b: jnp.where(here[..., None], a, b), new, state)
            tag = jnp.where(here, place % cfg.tags, tag)
            return (state, tag, jnp.where(here, top, score)), (parent, tag)

        start = (self.lstm.start(B, width), jnp.full((B, width), self.go),
                 jnp.where(jnp.arange(width) == 0, 0.0, -jnp.inf) * jnp.ones((B, 1)))
        (_, _, score), (parents, tags) = jax.lax.scan(step, start, (jnp.swapaxes(z, 0, 1), jnp.swapaxes(real, 0, 1)))

        def back(place, sliced):
            parent, tag = (jnp.take_along_axis(a, place[:, None], 1)[:, 0] for a in sliced)
            return parent, tag

        _, path = jax.lax.scan(back, score.argmax(-1), (parents, tags), reverse=True)
        return jnp.where(real, jnp.swapaxes(path, 0, 1), 0).astype(jnp.int32)


class TagCrf(nnx.Module):
    """The baseline of section 3.3: emissions from h_enc, a transition matrix, exact inference."""

    def __init__(self, cfg: CnnCnnLstmConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        self.out = param(rngs, (cfg.d_enc, cfg.tags), (None, None), std=cfg.d_enc ** -0.5)
        self.out_bias = param(rngs, (cfg.tags,), (None,), value=0.0)
        self.chain = crf.Crf(cfg.tags, rngs=rngs)

    def emissions(self, h_enc: jax.Array) -> jax.Array:
        return linear(h_enc, self.out[...], self.out_bias[...]).astype(jnp.float32)


class CnnCnnLstm(nnx.Module):
    """The whole tagger; ``cfg.head`` says which decoder."""

    def __init__(self, cfg: CnnCnnLstmConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        self.chars, self.words = CharCnn(cfg, rngs=rngs), WordCnn(cfg, rngs=rngs)
        self.tags = (TagLstm if cfg.head == "lstm" else TagCrf)(cfg, rngs=rngs)

    def __call__(self, words: Any, chars: Any, tags: Any = None, taps: Taps = NO_TAPS
                 ) -> tuple[jax.Array, dict[str, Any]]:
        """`forward`, compiled once for each shape."""
        graphdef, state = nnx.split(self)
        return _run(graphdef, state, words, chars, tags, taps)

    def forward(self, words: Int[Any, "B T"], chars: Int[Any, "B T M"], tags: Int[Any, "B T"] | None = None,
                taps: Taps = NO_TAPS, key: jax.Array | None = None) -> tuple[jax.Array, dict[str, Any]]:
        """(logits float32[B, T, V], aux); of a CRF, emissions. tags: the history; default: its own, greedy.

        key: dropout. `decoder.state` can be edited only where the history is given.
        """
        for point, layers in self.points.items():
            stack.select(taps, lambda name: name == point or name not in self.points).check(self.points, layers)
        h_enc, aux = self.encode(words, chars, taps, _fold(key, 0))
        if self.cfg.head == "crf":
            return self.tags.emissions(h_enc), aux
        real = is_word(words)
        if tags is None:
            if stack.select(taps, lambda name: name == "decoder.state").points - set(taps.record) - set(taps.reduce):
                raise UserError("an edited decoder.state would choose other tags to read; pass tags, int[B, T]")
            tags = self.tags.greedy(self.tags.inputs(h_enc), real)[0]
        logits, more = self.tags.forced(h_enc, tags, real, taps, _fold(key, 1))
        return logits, aux | more

    @property
    def points(self) -> dict[str, int]:
        """What can be tapped, and the layers of each."""
        points = {"embedding": 1, "char.conv": self.cfg.char_layers, "word.conv": self.cfg.word_layers}
        return points | ({"decoder.state": 1} if self.cfg.head == "lstm" else {})

    def encode(self, words: Int[Any, "B T"], chars: Int[Any, "B T M"], taps: Taps = NO_TAPS,
               key: jax.Array | None = None) -> tuple[jax.Array, dict[str, Any]]:
        """(h_enc [B, T, d_enc], aux)."""
        w_char, seen = self.chars(jnp.asarray(chars), taps, _fold(key, 0))
        h_enc, more = self.words(jnp.asarray(words), w_char, taps, _fold(key, 1))
        return h_enc, seen | more

    def loss(self, batch: dict[str, Any], key: jax.Array | None) -> tuple[jax.Array, dict[str, jax.Array]]:
        """(-log P(gold tags), summed over words, sums): section 4. key: of dropout and [UNK]; None: neither.

        batch: words, chars as above; tags int[B, T], anything where there is no word. sums: weight (words), correct
        (tags that are the likeliest given the gold tags before; of a CRF, by its emissions alone).
        """
        words, tags = jnp.asarray(batch["words"]), batch["tags"]
        real, inner = is_word(words), _fold(key, 0)
        if key is not None and self.cfg.word_drop:
            dropped = jax.random.bernoulli(_fold(key, 1), self.cfg.word_drop, words.shape)
            words = jnp.where(dropped & real, UNK, words)
        if self.cfg.head == "crf":
            logits = self.tags.emissions(self.encode(words, batch["chars"], key=_fold(inner, 0))[0])
            weights = self.tags.chain.weights
            nll = (crf.log_partition(weights, logits, real) - crf.score(weights, logits, tags, real)).sum()
        else:
            logits, _ = self.forward(words, batch["chars"], tags, key=inner)
            nll = -jnp.where(real, _picked(jax.nn.log_softmax(logits), tags), 0).sum()
        correct = real & (logits.argmax(-1) == tags)
        return nll, {"weight": real.sum(), "nll": nll, "correct": correct.sum()}

    def decode(self, words: Int[Any, "B T"], chars: Int[Any, "B T M"], *, key: jax.Array | None = None,
               beam: int = 1, probabilities: bool = False) -> Decoded:
        """Tags from its own history; of a CRF, the best sequence. key: dropout is on (BALD)."""
        encoder, decoder = (None, None) if key is None else jax.random.split(key)
        return self.decode_encoded(self.encode(words, chars, key=encoder)[0], is_word(words), key=decoder, beam=beam,
                                   probabilities=probabilities)

    def decode_encoded(self, h_enc: Float[Any, "B T E"], real: Bool[Any, "B T"], *, key: jax.Array | None = None,
                       beam: int = 1, probabilities: bool = False) -> Decoded:
        """`decode` from what the encoder gave: several decodings of one encoding. key: dropout in the decoder alone."""
        if self.cfg.head == "crf":
            emissions, weights = self.tags.emissions(h_enc), self.tags.chain.weights
            tags = crf.viterbi(weights, emissions, real)
            total = crf.score(weights, emissions, tags, real) - crf.log_partition(weights, emissions, real)
            # A marginal of 0 in float32 stands for a small one, not for none.
            log_probs = jnp.log(jnp.clip(crf.marginals(weights, emissions, real), 1e-30, 1.0))
            return _decoded(tags, log_probs, real, total, probabilities)
        tags, logits = self.tags.greedy(self.tags.inputs(h_enc), real, key)
        found = _decoded(tags, jax.nn.log_softmax(logits), real, None, probabilities)
        if beam == 1:
            return found
        if key is not None or beam < 1:
            raise UserError(f"beam={beam} with dropout is not offered; take beam=1, or no key" if key is not None else
                            f"beam={beam} must be at least 1")
        wide = self.score_encoded(h_enc, real, self.tags.beam(h_enc, real, beam), probabilities)
        # A beam may lose the greedy path on its way and end below it.
        better = wide.total >= found.total
        return jax.tree.map(lambda a, b: jnp.where(better.reshape(-1, *[1] * (a.ndim - 1)), a, b), wide, found)

    def score(self, words: Int[Any, "B T"], chars: Int[Any, "B T M"], tags: Int[Any, "B T"]) -> Decoded:
        """How likely given tags are."""
        return self.score_encoded(self.encode(words, chars)[0], is_word(words), tags)

    def score_encoded(self, h_enc: Float[Any, "B T E"], real: Bool[Any, "B T"], tags: Int[Any, "B T"],
                      probabilities: bool = False) -> Decoded:
        if self.cfg.head == "crf":
            emissions, weights = self.tags.emissions(h_enc), self.tags.chain.weights
            total = crf.score(weights, emissions, tags, real) - crf.log_partition(weights, emissions, real)
            log_probs = jnp.log(jnp.clip(crf.marginals(weights, emissions, real), 1e-30, 1.0))
            return _decoded(tags, log_probs, real, total, probabilities)
        logits, _ = self.tags.forced(h_enc, tags, real)
        return _decoded(tags, jax.nn.log_softmax(logits), real, None, probabilities)


class Conv(nnx.Module):
    """A convolution over the last axis but one that keeps its length and reads zeros over the ends; He et al. 2015.

    name: of the axis d_out, along which devices may share it.
    """

    def __init__(self, width: int, d_in: int, d_out: int, name: str | None, *, rngs: nnx.Rngs):
        self.width = width
        self.kernel = param(rngs, (width, d_in, d_out), (None, None, name), std=(2 / (width * d_in)) ** 0.5)
        self.bias = param(rngs, (d_out,), (name,), value=0.0)

    def __call__(self, x: Float[Any, "B T D"]) -> Float[Array, "B T F"]:
        T, half = x.shape[1], self.width // 2
        x = jnp.pad(x, ((0, 0), (half, half), (0, 0)))
        # One product over joined windows: a third faster with its gradient than XLA's convolution on CPU.
        windows = jnp.concatenate([x[:, k:k + T] for k in range(self.width)], axis=-1)
        return linear(windows, self.kernel[...].reshape(-1, self.kernel.shape[-1]), self.bias[...])


def is_word(words: Any) -> Any:
    """Whether a position holds a word: neither padding nor START nor END."""
    return (words == UNK) | (words > END)


def _embedding(rngs: nnx.Rngs, rows: int, width: int, pad: bool = True) -> nnx.Param:
    """Uniform in ±sqrt(3 / width) (section 3.5), the row of padding 0. No axis names: a vocabulary has any size."""
    limit = (3 / width) ** 0.5
    table = jax.random.uniform(rngs.params(), (rows, width), minval=-limit, maxval=limit)
    return nnx.Param(table.at[PAD].set(0) if pad else table, out_sharding=(None, None), eager_sharding=False)


def _decoded(tags: Any, log_probs: jax.Array, real: Any, total: jax.Array | None, keep: bool) -> Decoded:
    log_prob = jnp.where(real, _picked(log_probs, tags), 0)
    entropy = jnp.where(real, -(jnp.exp(log_probs) * log_probs).sum(-1), 0)
    return Decoded(jnp.where(real, tags, 0), log_prob, entropy, log_prob.sum(-1) if total is None else total,
                   jnp.where(real[..., None], log_probs, 0) if keep else None)


def _picked(values: jax.Array, tags: Any) -> jax.Array:
    # A sum over V rather than a gather, whose gradient scatters.
    return jnp.where(jnp.arange(values.shape[-1]) == tags[..., None], values, 0).sum(-1)


def _dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    if key is None or rate == 0:
        return x
    keep = _kept(key, rate, x.shape)
    return jnp.where(keep, x / _share(rate), jnp.zeros((), x.dtype))


def _share(rate: float) -> float:
    """What is kept, in 256ths: a mask takes a byte an entry."""
    return max(round(256 * (1 - rate)), 1) / 256


def _kept(key: jax.Array, rate: float, shape: tuple[int, ...]) -> jax.Array:
    """Drawn four entries at a time: jax draws 32 bits for an entry of any type, which was a third of a BALD pass."""
    size = math.prod(shape)
    drawn = jax.lax.bitcast_convert_type(jax.random.bits(key, (-(-size // 4),)), jnp.uint8)
    return drawn.reshape(-1)[:size].reshape(shape) <= np.uint8(256 * _share(rate) - 1)


def _fold(key: jax.Array | None, number: int) -> jax.Array | None:
    return None if key is None else jax.random.fold_in(key, number)


def _layer(taps: Taps, i: int) -> Taps:
    return jax.tree.map(lambda a: a[0], taps.layers(i, i + 1))


def _stacked(recorded: list[dict[str, Any]]) -> dict[str, Any]:
    return jax.tree.map(lambda *parts: jnp.stack(parts), *recorded)


@functools.partial(jax.jit, static_argnums=0)
def _run(graphdef, state, words, chars, tags, taps):
    return nnx.merge(graphdef, state).forward(words, chars, tags, taps)

"""Many decodings with dropout on (Gal & Ghahramani 2016): what BALD asks a tagger for.

    for one in dropout_passes(tagger, sentences, passes=20): one.tags, one.information

Passes run as one vmap over keys, some at a time, and only tag ids leave the device.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxmodels.cnn_cnn_lstm.network import is_word
from jaxmodels.cnn_cnn_lstm.tagger import Tagger
from jaxmodels.errors import UserError

Where = Literal["all", "decoder"]
POSITIONS = 1024  # of a batch: every pass of a chunk has its own windows in memory
CHUNK = 10  # passes at once, at most


class Passes(NamedTuple):
    """Of one sentence of n words. tags int8[M, n] (int16 for more than 127 tags): ids of every pass.

    information float32[n]: H[mean_m p_m] - mean_m H[p_m] of each word's distribution over tags, nats (BALD-MI).
    """

    tags: np.ndarray
    information: np.ndarray


def dropout_passes(tagger: Tagger, sentences: Sequence[Sequence[str]], passes: int = 100, *, seed: int = 0,
                   where: Where = "all", check: Callable[[], None] = lambda: None) -> list[Passes]:
    """Passes over every sentence, each with masks and a history of its own; the same seed gives the same.

    where: dropout in all layers, or in the decoder alone, for which the encoder runs once. check: called before every
    batch. Raises UserError for a decoder alone of a CRF, which has no dropout.
    """
    cfg = tagger.model.cfg
    if passes < 1:
        raise UserError(f"passes={passes} must be at least 1")
    if where == "decoder" and cfg.head == "crf":
        raise UserError("where='decoder' needs a decoder with dropout, which a CRF has not; take where='all'")
    chunk = max(n for n in range(1, CHUNK + 1) if passes % n == 0)
    split = nnx.split(tagger.model)
    kind = np.int8 if cfg.tags <= 127 else np.int16
    found = [Passes(np.zeros((passes, len(words)), kind), np.zeros(len(words), np.float32)) for words in sentences]
    for number, batch in enumerate(tagger.batches(sentences, positions=POSITIONS)):
        check()
        keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), number), passes).reshape(-1, chunk)
        # Below two layers the character encoder has no dropout: the vectors of words are the same in every pass.
        chars = batch.vectors if cfg.char_layers == 1 or where == "decoder" else batch.table[batch.forms]
        tags, information = map(np.asarray, _passes(*split, batch.words, chars, keys, where))
        for row, (i, start, stop) in enumerate(batch.parts):
            inside = slice(1, 1 + stop - start)
            found[i].tags[:, start:stop] = tags[:, row, inside]
            found[i].information[start:stop] = information[row, inside]
    return found


@functools.partial(jax.jit, static_argnums=(0, 5))
def _passes(graphdef, state, words, chars, keys, where):
    """(tags int16[M, B, T], information float32[B, T]) under keys [M / chunk, chunk]."""
    model, real = nnx.merge(graphdef, state), is_word(words)
    if where == "decoder":
        z = model.tags.inputs(model.words(words, chars)[0])

    def one(key):
        encoder, inner, decoder = jax.random.split(key, 3)
        if where == "decoder":
            tags, logits = model.tags.greedy(z, real, decoder)
            log_probs = jax.nn.log_softmax(logits)
        else:
            vectors = chars if chars.dtype == jnp.float32 else model.chars(chars, key=inner)[0]
            h_enc, _ = model.words(words, vectors, key=encoder)
            decoded = model.decode_encoded(h_enc, real, key=decoder, probabilities=True)
            tags, log_probs = decoded.tags, decoded.log_probs
        return tags.astype(jnp.int16), jnp.exp(log_probs), -(jnp.exp(log_probs) * log_probs).sum(-1)

    def some(carry, keys):
        tags, p, entropy = jax.vmap(one)(keys)
        return jax.tree.map(lambda total, new: total + new.sum(0), carry, (p, entropy)), tags

    zeros = jnp.zeros((*words.shape, model.cfg.tags)), jnp.zeros(words.shape)
    (p, entropy), tags = jax.lax.scan(some, zeros, keys)
    count = keys.size
    p = jnp.clip(p / count, 1e-30, 1.0)
    information = jnp.where(real, -(p * jnp.log(p)).sum(-1) - entropy / count, 0)
    return tags.reshape(count, *words.shape), jnp.maximum(information, 0)  # below 0 by rounding alone

"""Many decodings with dropout on (Gal & Ghahramani 2016): what BALD asks a tagger for, and votes for its entities.

    for one in dropout_passes(tagger, sentences, passes=20): one.tags, one.information
    shares = entity_votes(tagger, sentences, [entities(one.tags) for one in tagger.tag(sentences)])

Passes run as one vmap over keys, some at a time, and only tag ids leave the device.
"""

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxmodels.cnn_cnn_lstm import schemes
from jaxmodels.cnn_cnn_lstm.network import is_word
from jaxmodels.cnn_cnn_lstm.tagger import Tagger
from jaxmodels.errors import UserError

Where = Literal["all", "decoder"]
POSITIONS, CHUNK = 256, 5  # of a batch; passes at once, at most: what all of them read together fits the caches


class Passes(NamedTuple):
    """Of one sentence of n words. tags int8[M, n] (int16 for more than 127 tags): ids of every pass.

    information float32[n]: H[mean_m p_m] - mean_m H[p_m] of each word's distribution over tags, nats (BALD-MI); None if
    it was not asked for.
    """

    tags: np.ndarray
    information: np.ndarray | None


def dropout_passes(tagger: Tagger, sentences: Sequence[Sequence[str]], passes: int = 100, *, seed: int = 0,
                   where: Where = "all", information: bool = True, check: Callable[[], None] = lambda: None
                   ) -> list[Passes]:
    """Passes over every sentence, each with masks and a history of its own; the same seed gives the same.

    where: dropout in all layers, or in the decoder alone, for which the encoder runs once. information: votes alone are
    a little cheaper. check: called before every batch.
    Raises UserError for a decoder alone of a CRF, which has no dropout.
    """
    cfg = tagger.model.cfg
    if passes < 1:
        raise UserError(f"passes={passes} must be at least 1")
    if where == "decoder" and cfg.head == "crf":
        raise UserError("where='decoder' needs a decoder with dropout, which a CRF has not; take where='all'")
    chunk = max(n for n in range(1, CHUNK + 1) if passes % n == 0)
    graphdef, state = nnx.split(tagger.model)
    kind = np.int8 if cfg.tags <= 127 else np.int16
    found = [Passes(np.zeros((passes, len(words)), kind), np.zeros(len(words), np.float32) if information else None)
             for words in sentences]
    for number, batch in enumerate(tagger.batches(sentences, positions=POSITIONS)):
        check()
        keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), number), passes).reshape(-1, chunk)
        # Below two layers the character encoder has no dropout: the vectors of words are the same in every pass.
        chars = batch.vectors if cfg.char_layers == 1 or where == "decoder" else batch.table[batch.forms]
        tags, gained = map(np.asarray, _passes(graphdef, state, batch.words, chars, keys, where, information))
        for row, (i, start, stop) in enumerate(batch.parts):
            inside = slice(1, 1 + stop - start)
            found[i].tags[:, start:stop] = tags[:, row, inside]
            if information:
                found[i].information[start:stop] = gained[row, inside]
    return found


def entity_votes(tagger: Tagger, sentences: Sequence[Sequence[str]], said: Sequence[Sequence[schemes.Entity]],
                 passes: int = 10, *, seed: int = 0, check: Callable[[], None] = lambda: None) -> list[list[float]]:
    """Of every entity that is said, the share of passes with dropout that find it too: its type and both its ends.

    said: entities by sentence, as decoding without dropout finds them. Sentences without any cost nothing.
    """
    names, shares = tagger.vocabulary.tags, [[0.0] * len(one) for one in said]
    asked = [i for i, one in enumerate(said) if one]
    found = dropout_passes(tagger, [sentences[i] for i in asked], passes, seed=seed, information=False, check=check)
    for i, one in zip(asked, found, strict=True):
        votes = Counter(entity for ids in one.tags.tolist() for entity in schemes.entities([names[k] for k in ids]))
        shares[i] = [votes[entity] / passes for entity in said[i]]
    return shares


@functools.partial(jax.jit, static_argnums=(0, 5, 6))
def _passes(graphdef, state, words, chars, keys, where, information):
    """(tags int16[M, B, T], information float32[B, T], 0 if not asked for) under keys [M / chunk, chunk]."""
    model, real = nnx.merge(graphdef, state), is_word(words)
    if where == "decoder":
        z = model.tags.inputs(model.words(words, chars)[0])

    def one(key):
        encoder, inner, decoder = jax.random.split(key, 3)
        if where == "decoder":
            tags, logits = model.tags.greedy(z, real, decoder)
            log_probs = jax.nn.log_softmax(logits) if information else None
        else:
            vectors = chars if chars.dtype == jnp.float32 else model.chars(chars, key=inner)[0]
            h_enc, _ = model.words(words, vectors, key=encoder)
            decoded = model.decode_encoded(h_enc, real, key=decoder, probabilities=information)
            tags, log_probs = decoded.tags, decoded.log_probs
        sums = (jnp.exp(log_probs), -(jnp.exp(log_probs) * log_probs).sum(-1)) if information else ()
        return tags.astype(jnp.int16), sums

    def some(carry, keys):
        tags, sums = jax.vmap(one)(keys)
        return jax.tree.map(lambda total, new: total + new.sum(0), carry, sums), tags

    zeros = (jnp.zeros((*words.shape, model.cfg.tags)), jnp.zeros(words.shape)) if information else ()
    sums, tags = jax.lax.scan(some, zeros, keys)
    count = keys.size
    if not information:
        return tags.reshape(count, *words.shape), jnp.zeros(words.shape)
    p, entropy = sums
    p = jnp.clip(p / count, 1e-30, 1.0)
    gained = jnp.where(real, -(p * jnp.log(p)).sum(-1) - entropy / count, 0)
    return tags.reshape(count, *words.shape), jnp.maximum(gained, 0)  # below 0 by rounding alone

"""How well a model predicts a language, with parts of it switched off: masks through taps, one compiled program."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from analysis.atlas.collect import batches
from analysis.atlas.text import Rows
from jaxmodels.decoder.model import Decoder
from jaxmodels.taps import NO_TAPS, Taps

BATCH = 8


class Scorer:
    """``scorer(rows, keep=…)`` -> negative log-likelihood of each text. One compilation serves every mask."""

    def __init__(self, model: Decoder):
        self.graphdef, self.state = nnx.split(model)
        self.layers, self.width = model.cfg.num_layers, max(model.cfg.ffn_widths)

    def __call__(self, rows: Rows, keep: np.ndarray | None = None, add: np.ndarray | None = None) -> "Texts":
        """Scores every text of ``rows``.

        Args:
          keep: bool[L, F]; neurons that keep their activation, the others give 0. None: all.
          add: float[L, F], added to the activations before the mask's zeros are final, so that a neuron can be set to
            a constant: keep it False and give the constant here.
        """
        keep = np.ones((self.layers, self.width), bool) if keep is None else keep
        add = np.zeros((self.layers, self.width), np.float32) if add is None else add
        # h·keep + add: one form for pruning (add = 0) and for setting neurons to constants.
        taps = Taps(scale={"ffn.hidden": jnp.asarray(keep, jnp.float32)[:, None, None]},
                    add={"ffn.hidden": jnp.asarray(add, jnp.float32)[:, None, None]})
        nll = [np.asarray(_nll(self.graphdef, self.state, jnp.asarray(tokens), jnp.asarray(mask), taps))
               for tokens, mask, _ in batches(rows, min(BATCH, len(rows.tokens)))]
        nll = np.concatenate(nll)[:len(rows.tokens)]
        return by_text(nll, rows)


class Texts:
    """Sums over the texts of a test part. nll float64[U], tokens int64[U] (predicted ones), bytes int64[U]."""

    def __init__(self, nll: np.ndarray, tokens: np.ndarray, bytes_: np.ndarray):
        self.nll, self.tokens, self.bytes = nll, tokens, bytes_

    @property
    def per_token(self) -> float:
        return float(self.nll.sum() / self.tokens.sum())


def by_text(nll: np.ndarray, rows: Rows) -> Texts:
    """float[R, T] of predicted tokens (the first of each row is not predicted) -> sums by text."""
    predicted = rows.mask.copy()
    predicted[:, 0] = False
    unit = rows.unit[predicted]
    count = len(rows.bytes)
    tokens = np.bincount(unit, minlength=count)
    # Bytes of a text count as far as its tokens are predicted: the first token of a row is given, not predicted.
    share = tokens / np.maximum(np.bincount(rows.unit[rows.mask], minlength=count), 1)
    return Texts(np.bincount(unit, nll[predicted].astype(np.float64), count), tokens,
                 np.maximum(np.round(rows.bytes * share), 0).astype(np.int64))


@functools.partial(jax.jit, static_argnums=0)
def _nll(graphdef: Any, state: Any, tokens: jax.Array, mask: jax.Array, taps: Taps = NO_TAPS) -> jax.Array:
    model = nnx.merge(graphdef, state)
    hidden, _, _ = model.forward(tokens, mask=mask, taps=taps, logits="hidden")

    def row(part: tuple[jax.Array, jax.Array]) -> jax.Array:
        x, following = part
        logits = model.unembed(x)
        return jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(logits, following[:, None], axis=-1)[:, 0]

    # Row by row: the logits of all rows at once leave the cache, and their softmax then costs as much as the product.
    nll = jax.lax.map(row, (hidden[:, :-1], tokens[:, 1:]))
    return jnp.pad(jnp.where(mask[:, 1:], nll, 0), ((0, 0), (1, 0)))

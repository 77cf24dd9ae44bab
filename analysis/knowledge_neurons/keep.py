"""What a model still does when only some neurons are kept, or when some are lost (esm_knowledge_neurons.md section 5).

A neuron that is not kept has one value at all tokens, 0 or its mean over the training part; all sites at once, the
classifier untouched, nothing retrained.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.tree_util import Partial
from jaxtyping import Bool, Float, Int

from analysis.knowledge_neurons.neurons import Layout
from jaxmodels.errors import UserError
from jaxmodels.esm.model import Esm
from jaxmodels.taps import Taps
from train import metrics
from train.data.buckets import Bucketed

DIRECTIONS = ("keep", "drop")  # sufficiency, necessity
ENOUGH = 0.95  # of the full model's score


class Keeper:
    """Predicts with any subset of the neurons: masks are arguments, so one program for each length serves them all."""

    def __init__(self, model: Esm, layout: Layout, batches: Sequence[Bucketed]):
        self.graphdef, self.state = nnx.split(model)
        self.layout, self.batches = layout, batches
        self.size = sum(len(batch.index) for batch in batches)

    def logits(self, kept: Bool[np.ndarray, "n"], value: Float[np.ndarray, "n"] | None = None,
               check: Callable[[], None] = lambda: None) -> Float[np.ndarray, "N C"]:
        """Logits of all examples; value: of the neurons that are not kept, None for 0."""
        masks = self.layout.arrays(np.asarray(kept, bool))
        fill = self.layout.arrays(np.zeros(self.layout.size, np.float32) if value is None
                                  else np.asarray(value, np.float32))
        out = None
        for batch in self.batches:
            found = np.asarray(_logits(self.graphdef, self.state, batch.tokens, masks, fill))
            out = np.zeros((self.size, found.shape[1]), np.float32) if out is None else out
            out[batch.index] = found[:len(batch.index)]
            check()
        if out is None:
            raise UserError("there is no protein to predict; give some")
        return out

    def classes(self, kept: Bool[np.ndarray, "n"], value: Float[np.ndarray, "n"] | None = None,
                check: Callable[[], None] = lambda: None) -> Int[np.ndarray, "N"]:
        """The likeliest class of every example, as int8."""
        return self.logits(kept, value, check).argmax(-1).astype(np.int8)


@functools.partial(jax.jit, static_argnums=0)
def _logits(graphdef, state, tokens, masks, fill):
    taps = Taps(edit={point: Partial(_kept, mask, fill[point]) for point, mask in masks.items()})
    return nnx.merge(graphdef, state).forward(tokens, output="class", taps=taps)[0]


def _kept(mask, fill, value, token_mask):
    # Not scale and add, which make -0 of a kept neuron 0: a full mask is the model bit for bit.
    return jnp.where(mask, value, fill)


def scores_of(truth: Int[np.ndarray, "N"], predicted: Int[np.ndarray, "*M N"], classes: int
              ) -> dict[str, np.ndarray]:
    """accuracy and macro_f1 [*M] and recall [*M, C], see `train.metrics.class_scores`."""
    flat = np.asarray(predicted).reshape(-1, len(truth))
    counts = np.stack([metrics.confusion(truth, one.astype(int), classes) for one in flat])
    return metrics.class_scores(counts.reshape(*np.shape(predicted)[:-1], classes, classes))


def log_area(shares: Sequence[float], values: Float[np.ndarray, "*M P"]) -> np.ndarray:
    """Mean height [*M] of curves over the logarithm of the share, by trapezoids; shares rise."""
    x = np.log(np.asarray(shares, float))
    if len(x) < 2 or (np.diff(x) <= 0).any():
        raise UserError(f"shares {list(shares)} must be two or more, and rise")
    return np.trapezoid(values, x, axis=-1) / (x[-1] - x[0])


def smallest_enough(shares: Sequence[float], values: Sequence[float], full: float) -> float | None:
    """The smallest tested share from which on every tested share keeps at least 95 % of the full score; None: none.

    (Curves are not monotone; a small share that is enough by luck, with larger ones that are not, does not count.)
    """
    found = None
    for share, value in sorted(zip(shares, values, strict=True), reverse=True):
        if value < ENOUGH * full:
            break
        found = share
    return found


def bootstrap_f1(truth: Int[np.ndarray, "N"], predicted: Int[np.ndarray, "M P N"], classes: int, draws: int,
                 seed: int = 0) -> Float[np.ndarray, "D M P"]:
    """macro-F1 of answers, on all proteins first and then on `draws` resamplings of them; D = 1 + draws.

    The same seed draws the same proteins, so that answers of several methods can be compared draw by draw: they go
    together.
    """
    r, count = np.random.default_rng(seed), len(truth)
    weights = np.concatenate([np.ones((1, count)), r.multinomial(count, np.full(count, 1 / count), size=draws)])
    weights = weights.astype(np.float32)
    counts = np.zeros((len(weights), *predicted.shape[:-1], classes, classes), np.float32)
    for true in range(classes):
        mine = truth == true
        for said in range(classes):
            answer = (predicted[..., mine] == said).astype(np.float32)
            counts[..., true, said] = np.tensordot(weights[:, mine], answer, (1, -1))
    return metrics.class_scores(counts)["macro_f1"]


def bootstrap_recall(truth: Int[np.ndarray, "N"], predicted: Int[np.ndarray, "M N"], classes: int, draws: int,
                     seed: int = 0) -> Float[np.ndarray, "D M C"]:
    """Recall of every class, as `bootstrap_f1`; nan where a draw has no member of a class."""
    r, count = np.random.default_rng(seed), len(truth)
    weights = np.concatenate([np.ones((1, count)), r.multinomial(count, np.full(count, 1 / count), size=draws)])
    found = np.full((len(weights), len(predicted), classes), np.nan)
    for c in range(classes):
        mine = truth == c
        there = weights[:, mine].sum(1)[:, None]
        hits = weights[:, mine] @ (predicted[:, mine] == c).T
        found[..., c] = np.divide(hits, there, out=np.full(hits.shape, np.nan), where=there > 0)
    return found


def interval(draws: Float[np.ndarray, "D"]) -> tuple[float, float, float]:
    """(value, low, high) of draws of which the first is the value: 95 %, percentiles of the others."""
    low, high = np.nanquantile(draws[1:], (0.025, 0.975)) if len(draws) > 1 else (np.nan, np.nan)
    return float(draws[0]), float(low), float(high)

"""Scores of neurons: what their activations are like, and what they contribute to the probability of the true class.

Definitions: esm_knowledge_neurons.md sections 4, 4.1 and 4.2. Examples belong to groups (a class in one half of the
training part): every statistic is kept by group and joined afterwards, so that classes, the whole and split halves
come from one pass.
"""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.tree_util import Partial
from jaxtyping import Bool, Float, Int

from analysis.attribution import class_probability, integrated_gradients
from analysis.knowledge_neurons.neurons import POINTS, Layout
from jaxmodels.errors import UserError
from jaxmodels.esm.alphabet import encode
from jaxmodels.esm.model import Esm
from jaxmodels.taps import Taps
from train.data.buckets import LENGTHS, Bucketed, bucketed

Nothing = Callable[[], None]


def batches_of(sequences: Sequence[str], length: int, tokens: int) -> list[Bucketed]:
    """All proteins in batches of like length; of those longer than `length` - 2 residues, the beginning."""
    rows = [encode(sequence[:length - 2])[0] for sequence in sequences]
    lengths = sorted({min(one, length) for one in LENGTHS} | {length})
    return bucketed(rows, tokens, lengths)


# Activations


class Moments(NamedTuple):
    """Of the activations at the tokens (not padding) of each group. count float64[G]; the others [G, n]: mean,
    variance (over count) and mean absolute value of every neuron."""

    count: np.ndarray
    mean: np.ndarray
    variance: np.ndarray
    absolute: np.ndarray

    def join(self, groups: Sequence[int]) -> "Moments":
        """Several groups as one: count [], the others [n]. Of no token: zeros."""
        groups = list(groups)
        count = self.count[groups]
        share = (count / max(count.sum(), 1))[:, None]
        mean = (share * self.mean[groups]).sum(0)
        variance = (share * (self.variance[groups] + (self.mean[groups] - mean) ** 2)).sum(0)
        return Moments(count.sum(), mean, variance, (share * self.absolute[groups]).sum(0))


def activation_moments(model: Esm, layout: Layout, batches: Sequence[Bucketed], group: Int[np.ndarray, "N"],
                       groups: int, check: Nothing = lambda: None) -> Moments:
    """Moments of every neuron in each of `groups` groups; group: that of every example.

    Sums over tokens are taken inside the taps, so that [L, B, T, F] never exists, and batches are merged in float32 by
    Chan, Golub and LeVeque's update (1979). It is in terms of means, not of sums, so nothing grows with the data.
    """
    graphdef, state = nnx.split(model)
    count = np.zeros(groups)
    shapes = dict(zip(POINTS, layout.shapes, strict=True))
    running = {p: jnp.zeros((layout.layers, 3, groups, *shape)) for p, shape in shapes.items()}
    for batch in batches:
        mine = batch.fill(group, -1)
        member = (mine[None] == np.arange(groups)[:, None]).astype(np.float32)  # [G, B]
        new = member.astype(float) @ (batch.tokens != model.cfg.pad_id).sum(1)
        share = np.divide(new, count + new, out=np.zeros(groups), where=new > 0)
        running = _merge(graphdef, state, batch.tokens, member, share.astype(np.float32), running)
        count += new
        check()
    found = layout.flat({p: np.asarray(a, np.float64) for p, a in running.items()}, lead=2)
    return Moments(count, *found)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=5)
def _merge(graphdef, state, tokens, member, share, running):
    taps = Taps(reduce={p: Partial(_fold, member[None]) for p in running})
    aux = nnx.merge(graphdef, state).forward(tokens, output="none", taps=taps)[1]
    out = {}
    for p, old in running.items():
        new = aux[p]
        w = share.reshape(-1, *(1,) * (old.ndim - 3))
        change = new - old
        merged = old + w * change
        out[p] = merged.at[:, 1].add(w * (1 - w) * change[:, 0] ** 2)
    return out


def _fold(member, value, mask):
    """One layer: [3, G, *site], mean, variance and mean absolute value over the tokens of each group."""
    site = value.shape[2:]
    live = mask.reshape(-1)
    value = jnp.where(live[:, None], value.astype(jnp.float32).reshape(len(live), -1), 0)
    weight = (member[:, :, None] * mask).reshape(len(member), -1)
    weight = weight / jnp.maximum(weight.sum(1, keepdims=True), 1)
    dot = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    mean = dot(weight, value)
    # Two passes: a variance as E[x²] - E[x]² would lose a small one beside a large mean.
    own = dot((member[:, :, None] * mask).reshape(len(member), -1).T, mean)
    found = mean, dot(weight, (value - own) ** 2), dot(weight, jnp.abs(value))
    return jnp.stack(found).reshape(3, len(member), *site)


def activation_scores(moments: Moments, classes: int, halves: Sequence[int] = (0, 1)) -> dict[str, np.ndarray]:
    """``raw`` (mean |a|), ``rms`` and ``contrast``, float64[n] each; groups are half · classes + class.

    contrast: |mean in the class - mean outside| over the pooled standard deviation (of the tokens inside and outside
    about their own means), averaged over the classes that have tokens. The spec leaves the average open.
    """
    every = [half * classes + c for half in halves for c in range(classes)]
    whole = moments.join(every)
    contrasts = []
    for c in range(classes):
        inside = moments.join([g for g in every if g % classes == c])
        outside = moments.join([g for g in every if g % classes != c])
        if inside.count and outside.count:
            pooled = np.sqrt((inside.count * inside.variance + outside.count * outside.variance) / whole.count)
            difference = np.abs(inside.mean - outside.mean)
            contrasts.append(np.divide(difference, pooled, out=np.zeros_like(pooled), where=pooled > 0))
    contrast = np.mean(contrasts, axis=0) if contrasts else np.zeros_like(whole.mean)
    return {"raw": whole.absolute, "rms": np.sqrt(whole.variance + whole.mean ** 2), "contrast": contrast}


# Contributions


class Attributed(NamedTuple):
    """Sums over examples. count float64[G]; signed, absolute float64[G, n]: of an example's score and of its absolute
    value, an example's score being the sum over its tokens. error: worst and summed completeness error, relative to
    the change of the target; done: batches; seconds: spent on them, compilation included."""

    count: np.ndarray
    signed: np.ndarray
    absolute: np.ndarray
    error: np.ndarray
    done: np.ndarray
    seconds: np.ndarray

    @classmethod
    def empty(cls, groups: int, size: int) -> "Attributed":
        return cls(np.zeros(groups), np.zeros((groups, size)), np.zeros((groups, size)), np.zeros(2), np.array(0),
                   np.array(0.0))

    def of_classes(self, classes: int, halves: Sequence[int] = (0, 1), signed: bool = True) -> np.ndarray:
        """Mean score of the examples of each class, float64[C, n]; nan for a class without examples, and of one half,
        for a class that the other half has none of: two halves would else differ by their classes."""
        total = (self.signed if signed else self.absolute).reshape(2, classes, -1)[list(halves)].sum(0)
        by_half = self.count.reshape(2, classes)
        count = np.where((by_half > 0).all(0) | (len(halves) > 1), by_half[list(halves)].sum(0), 0)[:, None]
        return np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)


def task_score(by_class: Float[np.ndarray, "C n"]) -> Float[np.ndarray, "n"]:
    """Mean over classes of the absolute class score; classes without examples are left out.

    Raises UserError if no class has any: nothing was classified correctly.
    """
    known = ~np.isnan(by_class).any(1)
    if not known.any():
        raise UserError("no training protein is classified correctly, so that no class has a score; train for longer")
    return np.abs(by_class[known]).mean(0)


def attribute(model: Esm, layout: Layout, batches: Sequence[Bucketed], labels: Int[np.ndarray, "N"],
              group: Int[np.ndarray, "N"], groups: int, *, mode: Literal["site", "gate", "conductance"] = "gate",
              rule: str = "gauss", steps: int = 20, max_steps: int = 80, mean: Float[np.ndarray, "n"] | None = None,
              counted: Literal["all", "residues"] = "all",
              before: Attributed | None = None, after: Callable[[Attributed], None] = lambda found: None) -> Attributed:
    """Contribution of every neuron to the probability of the true class, summed by group.

    Args:
      labels, group: of every example; those whose label the model misses are left out by the caller.
      mode, rule, steps, max_steps: of `integrated_gradients`; rule="end" with mode="gate" is gradient times activation.
      mean: the baseline, one value a neuron; None: zero.
      counted: tokens that the sums are over: all but padding, or residues, without <cls> and <eos> too.
      before: what earlier batches gave, to go on from; after: called with the sums after every batch.
    """
    total = before or Attributed.empty(groups, layout.size)
    # Zeros as an array too, of the mean's shape: both baselines are then one compiled program.
    baseline = layout.arrays(np.zeros(layout.size, np.float32) if mean is None else np.asarray(mean, np.float32))
    if mode == "conductance":  # from the embedding 0, and complete for no site by itself: it has no error
        baseline = {"embedding": np.zeros((1, 1, 1), np.float32)}
    for batch in batches[int(total.done):]:
        start = time.monotonic()
        found = integrated_gradients(
            model, batch.tokens, point=POINTS, target=class_probability(batch.fill(labels)), steps=steps, rule=rule,
            mode=mode, baseline=baseline, tokens="sum", options={"output": "class"}, max_steps=max_steps,
            counted=residues(model, batch.tokens) if counted == "residues" else None)
        rows = len(batch.index)
        values = layout.flat(found.values, lead=1)[:rows].astype(np.float64)
        mine = group[batch.index]
        np.add.at(total.signed, mine, values)
        np.add.at(total.absolute, mine, np.abs(values))
        error = np.zeros(rows) if mode == "conductance" else _relative(found, rows)
        total = total._replace(
            count=total.count + np.bincount(mine, minlength=groups), done=total.done + 1,
            error=np.array([max(total.error[0], error.max(initial=0)), total.error[1] + error.mean() * rows]),
            seconds=total.seconds + time.monotonic() - start)
        after(total)
    return total


def residues(model: Esm, tokens: Int[np.ndarray, "B T"]) -> Bool[np.ndarray, "B T"]:
    """Neither <cls> nor <eos> nor padding."""
    return ~np.isin(tokens, (model.cfg.cls_id, model.cfg.eos_id, model.cfg.pad_id))


def _relative(found: Any, rows: int) -> np.ndarray:
    """Of every path, its error over the change of the target (over a hundredth of the target where that is more)."""
    out = []
    for key in found.error if isinstance(found.error, Mapping) else (None,):
        error, begin = (np.asarray(a if key is None else a[key]) for a in (found.error, found.start))
        change = np.abs(np.asarray(found.end) - begin)
        out.append((error / np.maximum(change, 1e-2 * np.abs(np.asarray(found.end))))[..., :rows])
    return np.stack(out)

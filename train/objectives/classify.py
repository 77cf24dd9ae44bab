"""Classes of whole sequences, several to a row: one class each (softmax), or any number of terms (sigmoid)."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from train.runtime.step import Sums


@dataclasses.dataclass(frozen=True)
class Classify:
    """Softmax cross-entropy of each sequence's class, times the weight of the class (default: 1 each).

    Batch: tokens, segments int32[B, T] (0: padding), targets int32[B, S], the class of segments 1..S; -1: none.
    """

    weights: tuple[float, ...] | None = None  # one a class

    def loss(self, model: Any, batch: dict[str, jax.Array], key: jax.Array) -> tuple[jax.Array, Sums]:
        """(summed weighted loss, sums): weight (sequences, whatever their class weighs), nll (weighted), correct."""
        targets = batch["targets"]
        logits = _logits(model, batch, targets.shape[1])
        counts = targets >= 0
        classes = jnp.arange(logits.shape[-1])
        picked = jnp.where(classes == targets[..., None], logits, 0).sum(-1)
        nll = jax.nn.logsumexp(logits, -1) - picked
        if self.weights is not None:
            nll *= jnp.where(classes == targets[..., None], jnp.asarray(self.weights, jnp.float32), 0).sum(-1)
        nll = jnp.where(counts, nll, 0).sum()
        return nll, {"weight": counts.sum(), "nll": nll, "correct": jnp.sum(counts & (picked >= logits.max(-1)))}

    def metrics(self, loss: jax.Array, sums: Sums) -> dict[str, jax.Array]:
        """loss (weighted nats a sequence), accuracy."""
        weight = jnp.maximum(sums["weight"], 1)
        return {"loss": sums["nll"] / weight, "accuracy": sums["correct"] / weight}

    def update(self, rest: Any, sums: Sums) -> Any:
        return rest


@dataclasses.dataclass(frozen=True)
class ClassifyTerms:
    """Sigmoid cross-entropy of every term of every sequence, summed over terms; positives times their term's weight.

    Batch: tokens, segments as above; targets float32[B, S, C], 1 for the terms that segment has; present bool[B, S].
    """

    weights: tuple[float, ...] | None = None  # of the positives of each term

    def loss(self, model: Any, batch: dict[str, jax.Array], key: jax.Array) -> tuple[jax.Array, Sums]:
        """(summed loss, sums): weight (sequences), nll, correct (terms on the right side of one half)."""
        targets, present = batch["targets"], batch["present"]
        logits = _logits(model, batch, targets.shape[1])
        positive = jax.nn.softplus(-logits) * targets
        if self.weights is not None:
            positive *= jnp.asarray(self.weights, jnp.float32)
        nll = positive + jax.nn.softplus(logits) * (1 - targets)
        nll = jnp.where(present[..., None], nll, 0).sum()
        correct = present[..., None] & ((logits > 0) == (targets > 0.5))
        return nll, {"weight": present.sum(), "nll": nll, "correct": correct.sum() / logits.shape[-1]}

    metrics, update = Classify.metrics, Classify.update


def class_weights(labels: np.ndarray, classes: int) -> tuple[float, ...]:
    """Inverse square root of each class's frequency, so scaled that the mean over `labels` int[n] is 1.

    A class that `labels` do not have weighs as if it had one member.
    """
    counts = np.bincount(labels, minlength=classes)
    weights = 1 / np.sqrt(np.maximum(counts, 1))
    return tuple((weights * counts.sum() / (weights * counts).sum()).tolist())


def term_weights(targets: Sequence[Sequence[int]] | np.ndarray) -> tuple[float, ...]:
    """The same for the positives of each term, from targets [n, C] of 0 and 1: 1 for the mean positive."""
    counts = np.asarray(targets).sum(0)
    weights = 1 / np.sqrt(np.maximum(counts, 1))
    return tuple((weights * counts.sum() / max((weights * counts).sum(), 1e-9)).tolist())


def _logits(model: Any, batch: dict[str, jax.Array], segments: int) -> jax.Array:
    """float32[B, S, C]."""
    inside = batch["segments"] > 0
    return model.forward(batch["tokens"], mask=inside, segments=batch["segments"], output="class",
                         num_segments=segments)[0].astype(jnp.float32)

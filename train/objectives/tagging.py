"""Tags of words: the negative log-likelihood of the gold tags, summed over words (ner_active_learning.md section 4)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from train.runtime.step import Sums


@dataclasses.dataclass(frozen=True)
class Tagging:
    """Batch: words int32[B, T], chars int32[B, T, M], tags int32[B, T]; several sentences may share a row.

    A sum over words, so that a long sentence weighs as many words as it has.
    """

    def loss(self, model: Any, batch: dict[str, jax.Array], key: jax.Array) -> tuple[jax.Array, Sums]:
        """(summed loss, sums): weight (words), nll, correct (words whose likeliest tag is right)."""
        return model.loss(batch, key)

    def metrics(self, loss: jax.Array, sums: Sums) -> dict[str, jax.Array]:
        """loss (nats a word), accuracy (of words; most are O)."""
        weight = jnp.maximum(sums["weight"], 1)
        return {"loss": sums["nll"] / weight, "accuracy": sums["correct"] / weight}

    def update(self, rest: Any, sums: Sums) -> Any:
        return rest

"""Masked-token prediction over packed rows (Devlin et al. 2019; Lin et al. 2023 for proteins)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from train.runtime.step import Sums


@dataclasses.dataclass(frozen=True)
class MaskedLanguageModel:
    """Cross-entropy of the residues that are asked for. Batch: tokens (as the model sees them), segments (0: padding)
    and targets (-1: not asked), int32[B, T]. mask_id: the token that hides a residue, ``<mask>``.
    """

    mask_id: int

    def loss(self, model: Any, batch: dict[str, jax.Array], key: jax.Array) -> tuple[jax.Array, Sums]:
        """(summed loss, sums): weight (residues asked for), nll in nats and correct, the same of those that are hidden
        behind ``<mask>`` (hidden_*), and tokens that are no padding.
        """
        tokens, segments, targets = batch["tokens"], batch["segments"], batch["targets"]
        logits = model.forward(tokens, mask=segments > 0, segments=segments)[0].astype(jnp.float32)
        asked = targets >= 0
        # Picked by comparing, as in language_model: a look-up costs a scatter in the gradient.
        picked = jnp.where(jnp.arange(logits.shape[-1]) == targets[..., None], logits, 0).sum(-1)
        nll = jnp.where(asked, jax.nn.logsumexp(logits, -1) - picked, 0)
        correct = asked & (picked >= logits.max(-1))
        hidden = asked & (tokens == self.mask_id)
        sums = {
            "weight": asked.sum(), "nll": nll.sum(), "correct": correct.sum(), "hidden_weight": hidden.sum(),
            "hidden_nll": jnp.where(hidden, nll, 0).sum(), "hidden_correct": (hidden & correct).sum(),
            "tokens": (segments > 0).sum(),
        }
        return sums["nll"], sums

    def metrics(self, loss: jax.Array, sums: Sums) -> dict[str, jax.Array]:
        """loss (nats a residue that is asked for), perplexity, accuracy; of hidden residues alone: hidden_*."""
        weight, hidden = (jnp.maximum(sums[name], 1) for name in ("weight", "hidden_weight"))
        return {
            "loss": sums["nll"] / weight, "perplexity": jnp.exp(sums["nll"] / weight),
            "accuracy": sums["correct"] / weight, "hidden_loss": sums["hidden_nll"] / hidden, "tokens": sums["tokens"],
        }

    def update(self, rest: Any, sums: Sums) -> Any:
        return rest

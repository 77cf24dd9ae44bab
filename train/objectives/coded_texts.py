"""Texts and their codes: Text2Tree and what it is compared with, each a loss over one forward pass.

Text2Tree's losses compare the texts of a batch with each other, so the mean over the batch is what is minimised, times
the number of texts as the training step expects sums.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.text2tree import baselines
from jaxmodels.text2tree.losses import LossConfig, masked_mean
from jaxmodels.text2tree.tree import LabelTree
from train.runtime.step import Sums
from train.text2tree_config import OURS, MethodConfig

OVER_NODES = ("htc", "recursive", "hiagm")  # methods whose head has an output for every node but the root


@dataclasses.dataclass(frozen=True)
class CodedTextsObjective:
    """Batch: tokens (or stored states), mask bool[B, T], labels int32[B] or float32[B, K].

    counts: training texts of each class, of ``texts``. tree: its classes are theirs. steps: of the whole training,
    which ldam_drw asks for; a model that is trained so counts its steps in ``taken``.
    """

    method: MethodConfig
    counts: tuple[int, ...]
    texts: int
    tree: LabelTree
    steps: int = 1

    def loss(self, model: Any, batch: dict[str, jax.Array], key: jax.Array) -> tuple[jax.Array, Sums]:
        """(mean loss times texts, sums): weight (texts), nll, and each part of Text2Tree's loss."""
        if self.method.name in OURS:
            loss, parts = model.loss(batch, key)
        else:
            loss, parts = self._baseline(model, batch, key), {}
        weight = len(batch["mask"])
        return loss * weight, {"weight": jnp.asarray(weight), "nll": loss * weight,
                               **{name: part * weight for name, part in parts.items()}}

    def metrics(self, loss: jax.Array, sums: Sums) -> dict[str, jax.Array]:
        """loss and its parts, means over texts."""
        parts = {name: value / sums["weight"] for name, value in sums.items() if name not in ("weight", "nll")}
        return {"loss": sums["nll"] / sums["weight"], **parts}

    def update(self, rest: Any, sums: Sums) -> Any:
        return rest | {"taken": rest["taken"] + 1} if "taken" in rest else rest

    def _baseline(self, model: Any, batch: dict[str, jax.Array], key: jax.Array) -> jax.Array:
        """Section 10: a loss of a few lines each."""
        method, name, labels, counts = self.method, self.method.name, batch["labels"], np.asarray(self.counts)
        inside, outside, extra = jax.random.split(key, 3)
        features, vector, _ = model.features(batch["tokens"], batch["mask"], key=inside)
        if name == "mixup":
            head = lambda x: model.head(x, outside)  # noqa: E731
            return baselines.mixup(extra, features, labels, head, method.mixup_alpha).mean()
        logits = model.head(features, outside)
        if name in OVER_NODES:
            every = baselines.hierarchical_targets(labels, self.tree)
            last = getattr(model.head, "pooled", model.head).out[...]  # of a head over chunks, or over one vector
            apart = baselines.recursive_regulariser(last, self.tree, method.strength) \
                if name != "htc" else 0.0
            return masked_mean(baselines.plain(logits, every), None) + apart
        weights = {"reweight": baselines.reweight, "reweight_official": baselines.reweight_official,
                   "class_balanced": lambda counts: baselines.class_balanced(counts, method.beta)}
        if name in weights:
            return baselines.plain(logits, labels, jnp.asarray(weights[name](counts))).mean()
        if name == "focal":
            return baselines.focal(logits, labels, method.focal_gamma, method.focal_alpha).mean()
        if name == "db":
            return baselines.distribution_balanced(logits, labels, counts, self.texts).mean()
        if name == "ldam_drw":
            weights = baselines.deferred(model.taken[...], self.steps, counts)
            return baselines.margin(logits, labels, counts, 1.0, weights=weights).mean()  # no cosines: scale 1
        if name == "logit_adjustment":
            return baselines.logit_adjusted(logits, labels, counts, self.texts).mean()
        plain = baselines.plain(logits, labels).mean()
        if name in ("supcon", "selfcon"):
            contrast = baselines.supervised_contrastive(vector, labels, method.tau) if name == "supcon" else \
                baselines.self_contrastive(vector, method.tau)
            return (1 - method.gamma) * plain + method.gamma * contrast
        return plain  # plain; oversampling is in the data


def loss_config(method: MethodConfig) -> LossConfig:
    """What the model's own loss is told."""
    return LossConfig(OURS.get(method.name, "plain"), method.gamma, method.tau, method.sim_temperature,
                      method.include_self, method.diag_weight)

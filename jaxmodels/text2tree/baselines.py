"""What Text2Tree is compared with (text2tree.md section 10): losses, weightings and samplers of a few lines each.

Losses take logits float[B, K] and labels, int[B] (multi-class, softmax) or {0, 1}[B, K] (multi-label, sigmoid), and
give one number a text, float32[B]; ``masked_mean`` in losses.py takes their mean. counts [K]: training texts of each
class, of ``texts`` in all.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.errors import UserError
from jaxmodels.text2tree.losses import classification, contrastive
from jaxmodels.text2tree.tree import LabelTree

_LEAST = 1e-6  # the slope of x^γ at 0 is infinite for γ < 1

def plain(logits: jax.Array, labels: jax.Array, weights: jax.Array | None = None) -> jax.Array:
    """Cross-entropy, softmax or mean of sigmoids; weights [K] of the classes (multi-label: of both outcomes)."""
    if weights is None:
        return classification(logits, labels)
    if labels.ndim == 1:
        return jnp.asarray(weights)[labels] * classification(logits, labels)
    return (jnp.asarray(weights) * _binary(logits, labels)).mean(-1)


# Weights of classes, float32[K]


def reweight(counts: np.ndarray) -> np.ndarray:
    """Inverse frequency, 1 / n_c, of mean 1."""
    weights = 1 / _counted(counts)
    return np.float32(weights / weights.mean())


def reweight_official(counts: np.ndarray) -> np.ndarray:
    """1 - n_c / Σ n, of the released code: nearly uniform."""
    counts = np.asarray(counts, float)
    return np.float32(1 - counts / counts.sum())


def class_balanced(counts: np.ndarray, beta: float = 0.999) -> np.ndarray:
    """(1 - β) / (1 - β^n_c), of sum K (Cui et al. 2019)."""
    weights = (1 - beta) / (1 - beta ** _counted(counts))
    return np.float32(weights * len(weights) / weights.sum())


# Losses


def focal(logits: jax.Array, labels: jax.Array, gamma: float = 2.0, alpha: float = 0.25) -> jax.Array:
    """Lin et al. 2017: (1 - p)^γ times the cross-entropy; multi-label: α of the positives, 1 - α of the negatives."""
    if labels.ndim == 1:
        nll = classification(logits, labels)
        return jnp.maximum(1 - jnp.exp(-nll), _LEAST) ** gamma * nll
    p = jax.nn.sigmoid(logits)
    missed = jnp.maximum(jnp.where(labels > 0, 1 - p, p), _LEAST)
    return (jnp.where(labels > 0, alpha, 1 - alpha) * missed**gamma * _binary(logits, labels)).mean(-1)


def distribution_balanced(logits: jax.Array, labels: jax.Array, counts: np.ndarray, texts: int) -> jax.Array:
    """DB loss (Wu et al. 2020; constants of the released code of Text2Tree), multi-label."""
    y, counts = labels.astype(jnp.float32), jnp.asarray(_counted(counts), jnp.float32)
    rebalanced = 1 / counts / jnp.maximum((y / counts).sum(-1, keepdims=True), 1 / texts)  # a text may have no label
    weight = 0.1 + jax.nn.sigmoid(10 * (rebalanced - 0.05))
    biased = logits - 0.05 * jnp.log(jnp.maximum(texts / counts - 1, 1e-6))
    biased = jnp.where(y > 0, biased, 2 * biased)
    weight = jnp.where(y > 0, weight, weight / 2)
    nll = _binary(biased, y)
    return (0.5 * (1 - jnp.exp(-nll)) ** 2 * weight * nll).mean(-1)


def margin(logits: jax.Array, labels: jax.Array, counts: np.ndarray, scale: float = 30.0, largest: float = 0.5,
           weights: jax.Array | None = None) -> jax.Array:
    """LDAM (Cao et al. 2019): ``largest`` (n_min / n_c)^¼ is taken off the logits of what is true.

    scale: 30 is for logits that are cosines; with a plain linear head take 1. weights: of DRW, see `deferred`.
    """
    counts = _counted(counts)
    margins = jnp.asarray(largest * (counts.min() / counts) ** 0.25, jnp.float32)
    true = jax.nn.one_hot(labels, logits.shape[-1]) if labels.ndim == 1 else labels
    return plain(scale * (logits - margins * true), labels, weights)


def deferred(step: jax.Array, steps: int, counts: np.ndarray, beta: float = 0.9999) -> jax.Array:
    """Weights of deferred re-weighting: 1, then for the last fifth of training the class-balanced ones. step: how many
    are taken."""
    return jnp.where(step >= deferred_from(steps), jnp.asarray(class_balanced(counts, beta)), 1.0)


def deferred_from(steps: int) -> int:
    """How many steps are taken before the first that is re-weighted: four fifths, and never all."""
    return min(-(-4 * steps // 5), steps - 1)


def logit_adjusted(logits: jax.Array, labels: jax.Array, counts: np.ndarray, texts: int, tau: float = 1.0) -> jax.Array:
    """Menon et al. 2021, eq. 10: log prior is added to the logits in training; multi-label: log(p / (1 - p))."""
    prior = jnp.asarray(_counted(counts) / texts, jnp.float32)
    shift = jnp.log(prior) if labels.ndim == 1 else jnp.log(prior / jnp.maximum(1 - prior, 1e-6))
    return plain(logits + tau * shift, labels)


def mixup(key: jax.Array, h: jax.Array, labels: jax.Array, head: Callable[[jax.Array], jax.Array], alpha: float = 0.5
          ) -> jax.Array:
    """Zhang et al. 2018 on features h [B, ...]: one Beta(α, α) draw a batch, partners by a random order."""
    draw, order = jax.random.split(key)
    lam = jax.random.beta(draw, alpha, alpha)
    partner = jax.random.permutation(order, len(h))
    logits = head(lam * h + (1 - lam) * h[partner])
    return lam * classification(logits, labels) + (1 - lam) * classification(logits, labels[partner])


def supervised_contrastive(h: jax.Array, labels: jax.Array, tau: float, valid: jax.Array | None = None) -> jax.Array:
    """SupCon (Khosla et al. 2020), one number a batch; multi-label: the mean of K binary ones."""
    B = len(labels)
    others = ~jnp.eye(B, dtype=bool) if valid is None else ~jnp.eye(B, dtype=bool) & valid & valid[:, None]
    if labels.ndim == 1:
        same = (labels[:, None] == labels) & others
        return contrastive(h, same / jnp.maximum(same.sum(1, keepdims=True), 1), tau, valid)
    w = jnp.zeros((B, B))
    for side in (labels.astype(jnp.float32), 1 - labels.astype(jnp.float32)):
        there = side if valid is None else side * valid[:, None]
        partners = there.sum(0) - there  # [B, K]: how many others are alike in label k
        w += jnp.where(others, (side / jnp.maximum(partners, 1)) @ side.T, 0) / labels.shape[1]
    return contrastive(h, w, tau, valid)


def self_contrastive(h: jax.Array, tau: float, valid: jax.Array | None = None) -> jax.Array:
    """SelfCon: each text its own one positive."""
    return contrastive(h, jnp.eye(len(h)), tau, valid)


# The tree in the head


def recursive_regulariser(weight: jax.Array, tree: LabelTree, strength: float = 1e-6) -> jax.Array:
    """strength · Σ over edges |W_parent - W_child|² / 2 (Gopal and Yang 2013); weight [D, N - 1], a column a node but
    the root."""
    child = np.flatnonzero(tree.parent > 0)
    apart = weight[:, tree.parent[child] - 1] - weight[:, child - 1]
    return strength * (apart * apart).sum() / 2


def hierarchical_targets(labels: jax.Array | np.ndarray, tree: LabelTree) -> jax.Array:
    """{0, 1}[n, K] or int[n] -> float32[n, N - 1]: all nodes but the root, the ancestors of a class set with it.

    The head then has N - 1 outputs, of which ``logits[:, tree.leaf_index - 1]`` are the classes.
    """
    closure = jnp.asarray(tree.ancestors().toarray()[:, 1:], jnp.float32)
    labels = jnp.asarray(labels)
    return closure[labels] if labels.ndim == 1 else jnp.minimum(labels.astype(jnp.float32) @ closure, 1)


# Sampling


def oversample(labels: np.ndarray, seed: int = 0) -> np.ndarray:
    """Indices of an epoch in which every class of int[n] is as frequent as the largest, its texts in turn; shuffled."""
    labels = np.asarray(labels)
    if labels.ndim != 1:
        raise UserError(f"oversampling needs one class a text, the labels have shape {labels.shape}; use a weighting")
    size = np.bincount(labels).max()
    rng = np.random.default_rng(seed)
    chosen = [np.resize(rng.permutation(np.flatnonzero(labels == c)), size) for c in np.unique(labels)]
    return rng.permutation(np.concatenate(chosen))


def _binary(logits, labels):
    """Sigmoid cross-entropy of each label, float32[B, K]."""
    logits = logits.astype(jnp.float32)
    return jax.nn.softplus(logits) - logits * labels


def _counted(counts: np.ndarray) -> np.ndarray:
    """Counts as float64[K]; a class without a text counts as one that has one."""
    return np.maximum(np.asarray(counts, float), 1)

"""Acquisition functions: arrays of a model's doubts about sentences -> one score each; higher: label first.

N sentences, T words at most, V tags, M passes with dropout. mask bool[N, T] says which positions are words; n is their
number. Everything at other positions is ignored, whatever it is. Scores are float64[N], -inf for a sentence without
words.
"""

import numpy as np


def random(count: int, seed: int) -> np.ndarray:
    """RAND: uniform."""
    return np.random.default_rng(seed).random(count)


def least_confidence(log_prob: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """LC as -log P(ŷ), from log P(ŷ_i | ŷ_<i, x) [N, T]: it orders as 1 - P(ŷ) = -expm1(-score) does, which is 1.0 in
    floating point for all long sentences."""
    return _checked(-np.where(mask, log_prob, 0).sum(1, dtype=float), mask)


def mnlp(log_prob: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """MNLP with its sign turned (Shen et al. 2018, section 4, pick the smallest): -(1/n) Σ log P(ŷ_i | ŷ_<i, x)."""
    return _mean(-np.asarray(log_prob, float), mask)


def bald_vote(tags: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """BALD in the paper's form, from tags int[M, N, T]: (1/n) Σ_i 1 - (passes that agree on the commonest tag) / M."""
    most = np.zeros(tags.shape[1:], int)
    for tag in np.unique(tags):
        np.maximum(most, (tags == tag).sum(0), out=most)
    return _mean(1 - most / len(tags), mask)


def whole_sequence(tags: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Minus the share of passes with the commonest whole tag sequence (asiddhant/Active-NLP); ties are many, and that
    port breaks them by MNLP."""
    agree = np.stack([((tags == tags[m]) | ~mask).all(-1).sum(0) for m in range(len(tags))]).max(0)
    return _checked(-agree / len(tags), mask)


def token_entropy(entropy: np.ndarray, mask: np.ndarray, mean: bool = True) -> np.ndarray:
    """(1/n) Σ_i H[p_i] from entropies [N, T]; mean=False: the sum."""
    return _mean(entropy, mask) if mean else _checked(np.where(mask, entropy, 0).sum(1, dtype=float), mask)


def mean_score(values: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The mean over the words of a sentence of anything [N, T]: entropies, or the information of passes."""
    return _mean(np.asarray(values, float), mask)


def _mean(values: np.ndarray, mask: np.ndarray) -> np.ndarray:
    total = np.where(mask, values, 0).sum(1, dtype=float)
    return _checked(total / np.maximum(mask.sum(1), 1), mask)


def _checked(scores: np.ndarray, mask: np.ndarray) -> np.ndarray:
    if np.isnan(scores).any():
        raise ValueError(f"{np.isnan(scores).sum()} of {len(scores)} scores are NaN: the model has diverged")
    return np.where(mask.any(1), scores, -np.inf)

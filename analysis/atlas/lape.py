"""Neurons of one language: language activation probability entropy (Tang et al. 2024, arXiv 2402.16438).

Exactly as in the authors' identify.py (moe_split.md 5.1). A neuron *fires* where its gate is positive; that says
nothing about how much it contributes (see analysis/activations.py).
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.special import entr


class Lape(NamedTuple):
    """picked: neurons of lowest entropy. language: those that fire in a language above the bar (several may be).

    entropy: natural log; inf where no language reaches the filter's bar. bar: firing probability to exceed.
    """

    picked: Bool[np.ndarray, "L F"]
    language: Bool[np.ndarray, "A L F"]
    entropy: Float[np.ndarray, "L F"]
    bar: float


def lape(positive: Int[np.ndarray, "A L F"], tokens: Int[np.ndarray, "A"], filter_rate: float = 0.95,
         activation_bar_ratio: float = 0.95, top_rate: float = 0.01) -> Lape:
    """Picks the top_rate of all neurons whose firing is most concentrated in few languages.

    Args:
      positive: tokens on which the gate is positive. tokens: tokens counted, by language.
      filter_rate: neurons without any firing probability above this quantile of all are not considered.
      activation_bar_ratio: a picked neuron belongs to each language that exceeds this quantile of all.

    A language without tokens takes no part and gets no neurons. The number picked is round(top_rate L F), half to
    even as in Python; ties in entropy go to the lower index. Where fewer have a finite entropy, the surplus has no
    language.
    """
    tokens = np.asarray(tokens, np.int64)
    here = tokens > 0
    if not here.any():
        raise ValueError("no language has any tokens; there is nothing to pick from")
    # To float64 before any sum: counts over neurons or languages overflow 32 bits.
    p = np.asarray(positive)[here] / tokens[here].astype(np.float64)[:, None, None]
    total = p.sum(0)
    entropy = entr(p / np.where(total > 0, total, 1)).sum(0)
    entropy[~(p > _quantile(p, filter_rate)).any(0)] = np.inf
    picked = np.zeros(entropy.shape, bool)
    picked.flat[np.argsort(entropy, axis=None, kind="stable")[:round(top_rate * entropy.size)]] = True
    bar = _quantile(p, activation_bar_ratio)
    language = np.zeros(np.shape(positive), bool)
    language[here] = picked & (p > bar)
    return Lape(picked, language, entropy, bar)


def _quantile(values: np.ndarray, rate: float) -> float:
    """The round(rate * size)-th smallest value (torch.kthvalue of the reference): no interpolation."""
    index = max(round(rate * values.size), 1) - 1
    return float(np.partition(values, index, axis=None)[index])


def random_like(neurons: Bool[np.ndarray, "L F"], seed: int) -> Bool[np.ndarray, "L F"]:
    """As many neurons in every layer, drawn at random: the control of an intervention."""
    rank = np.random.default_rng(seed).random(neurons.shape).argsort(1).argsort(1)
    return rank < neurons.sum(1, keepdims=True)


class Change(NamedTuple):
    """A perplexity-change matrix in four numbers (moe_split.md 5.3); ratio is inf where others change by 0 or gain."""

    diagonal: float
    off_diagonal: float
    ratio: float
    largest_on_diagonal: int


def change_summary(change: Float[np.ndarray, "A A"]) -> Change:
    """change[a, b]: log-perplexity of b without a's neurons less that of b; nan: not measured.

    Says how much a language depends on its own neurons, how much the others do, and in how many rows the language
    itself suffers most.
    """
    change = np.asarray(change, np.float64)
    own = np.diagonal(change)
    others = change[~np.eye(len(change), dtype=bool)]
    diagonal = float(np.nanmean(own)) if np.isfinite(own).any() else 0.0
    rest = float(np.nanmean(others)) if np.isfinite(others).any() else 0.0
    most = np.nanmax(np.where(np.isnan(change), -np.inf, change), axis=1)
    return Change(diagonal, rest, diagonal / rest if rest > 0 else np.inf, int((own >= most).sum()))

"""How sure a loss is: paired bootstrap over texts (moe_split.md 4.6).

Losses are negative log-likelihoods in nats, summed over each text (one unit: a sentence, a message); the estimate is
a ratio of sums, so a long text weighs as much as its tokens or bytes. Texts are resampled, not tokens: tokens of one
text are not independent. With equal seeds all schemes see the same resamples, so their intervals are paired.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Num

from jaxmodels.errors import UserError

Units = Num[np.ndarray, "units"]


class Interval(NamedTuple):
    """An estimate with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


def excess(dense: Units, pruned: Units, denominator: Units, samples: int = 1000, seed: int = 0) -> Interval:
    """Mean loss of `pruned` above `dense` in nats per unit of the denominator (tokens or bytes of each text).

    Texts with denominator 0 (nothing of them was counted) are left out.
    """
    return panel_excess([(dense, pruned, denominator)], samples, seed)


def panel_excess(cases: Iterable[tuple[Units, Units, Units]], samples: int = 1000, seed: int = 0) -> Interval:
    """Mean of `excess` over languages, each weighing the same; cases: (dense, pruned, denominator) by language."""
    values, resampled = zip(*(_resample(*case, samples, seed, i) for i, case in enumerate(cases)), strict=True)
    low, high = np.percentile(np.mean(resampled, 0), [2.5, 97.5])
    return Interval(float(np.mean(values)), float(low), float(high))


def _resample(dense, pruned, denominator, samples, seed, stream) -> tuple[float, Float[np.ndarray, "samples"]]:
    dense, pruned, denominator = (np.asarray(x, np.float64) for x in (dense, pruned, denominator))
    if not dense.shape == pruned.shape == denominator.shape or dense.ndim != 1:
        raise ValueError(f"dense {dense.shape}, pruned {pruned.shape} and denominator {denominator.shape} "
                         "must have one number for each text")
    counted = denominator > 0
    gain, size = (pruned - dense)[counted], denominator[counted]
    if len(size) < 2:
        raise UserError(f"an interval needs at least 2 test texts, there are {len(size)}; "
                        "use a source with more and shorter texts")
    # How often each text is drawn, [samples, texts]: drawing with replacement without ever copying a loss.
    drawn = np.random.default_rng((seed, stream)).multinomial(len(size), np.full(len(size), 1 / len(size)), samples)
    return float(gain.sum() / size.sum()), drawn @ gain / (drawn @ size)

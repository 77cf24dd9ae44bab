"""Paired bootstrap over texts: the estimate, its coverage, and what makes it paired."""

import numpy as np
import pytest

from analysis.atlas import intervals as iv
from jaxmodels.errors import UserError


def losses(seed, units=60, effect=0.2, spread=0.3):
    """Summed losses of texts of unequal length: dense, pruned and tokens; the dense loss varies far more."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(3, 60, units)
    dense = tokens * (3 + rng.normal(size=units))
    return dense, dense + tokens * (effect + spread * rng.normal(size=units)), tokens


def test_excess_is_a_ratio_of_sums():
    dense, pruned, tokens = losses(0)
    found = iv.excess(dense, pruned, tokens)
    assert found.value == pytest.approx((pruned.sum() - dense.sum()) / tokens.sum())
    assert found.low < found.value < found.high
    size = 4 * tokens
    assert iv.excess(dense, pruned, size).value == pytest.approx(found.value / 4), "per byte"


def test_interval_equals_a_plain_bootstrap():
    dense, pruned, tokens = losses(1)
    rng = np.random.default_rng(9)
    plain = []
    for _ in range(4000):
        i = rng.integers(0, len(tokens), len(tokens))
        plain.append((pruned[i].sum() - dense[i].sum()) / tokens[i].sum())
    found = iv.excess(dense, pruned, tokens, samples=4000)
    assert np.allclose([found.low, found.high], np.percentile(plain, [2.5, 97.5]), atol=0.01)


def test_interval_covers_the_truth_about_95_times_in_100():
    """300 trials: the share has a standard error of 0.013; percentile intervals of 60 texts are a little short."""
    effect = 0.2
    hits = sum(f.low <= effect <= f.high for f in (iv.excess(*losses(s, effect=effect), 300) for s in range(300)))
    assert 0.885 < hits / 300 < 0.99


def test_pairing_ignores_what_both_models_find_hard():
    dense, pruned, tokens = losses(2)
    harder = 1000 * np.random.default_rng(3).random(len(tokens))
    a, b = iv.excess(dense, pruned, tokens), iv.excess(dense + harder, pruned + harder, tokens)
    assert np.allclose(a, b)


def test_schemes_of_one_seed_are_drawn_alike():
    dense, first, tokens = losses(4, effect=0.1)
    both = [iv.excess(dense, x, tokens) for x in (first, first + 0.05 * tokens)]
    # The same texts are drawn for both, so the intervals shift by the same constant.
    assert np.allclose(np.array(both[1]) - both[0], 0.05)
    none = iv.excess(*losses(5, effect=0))
    assert none.low < 0 < none.high


def test_panel_mean_weighs_languages_alike():
    cases = [losses(seed, units=20 + 30 * seed) for seed in range(4)]
    found = iv.panel_excess(cases)
    single = [iv.excess(*case) for case in cases]
    assert found.value == pytest.approx(np.mean([x.value for x in single]))
    assert found.high - found.low < np.mean([x.high - x.low for x in single])
    # Languages are drawn independently: the same texts twice are as sure as one mean of two samples.
    twice = iv.panel_excess([cases[0], cases[0]], 4000)
    width = single[0].high - single[0].low
    assert twice.high - twice.low == pytest.approx(width / np.sqrt(2), rel=0.15)


def test_texts_without_counted_tokens_are_left_out():
    dense, pruned, tokens = losses(6)
    padded = [np.append(x, 0) for x in (dense, pruned, tokens)]
    assert iv.excess(*padded) == iv.excess(dense, pruned, tokens)


def test_repeats_and_seeds():
    case = losses(7)
    assert iv.excess(*case) == iv.excess(*case)
    other = iv.excess(*case, seed=1)
    assert other.value == iv.excess(*case).value and other.low != iv.excess(*case).low


def test_too_few_or_unequal_texts_are_refused():
    with pytest.raises(UserError, match="there are 1"):
        iv.excess(np.ones(2), np.ones(2), np.array([5, 0]))
    with pytest.raises(ValueError, match="one number for each text"):
        iv.excess(np.ones(3), np.ones(3), np.ones(2))

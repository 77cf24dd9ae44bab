"""LAPE: the golden toy of moe_split.md 5.2, both of its traps, and absent languages (test 12)."""

import numpy as np
import pytest

from analysis.atlas.lape import change_summary, lape, random_like


def toy():
    """p[2 languages, 2 layers, 10 neurons]."""
    layer, j = np.meshgrid(np.arange(2), np.arange(10), indexing="ij")
    p = np.stack([0.10 + 0.01 * j + 0.005 * layer, 0.10 + 0.01 * j + 0.002 * layer])
    p[:, 0, 3] = 0.90, 0.02
    p[:, 1, 7] = 0.03, 0.60
    p[:, 1, 2] = 0.80, 0.75
    return p


TOKENS = np.array([1000, 2000])


def counts(p, tokens=TOKENS):
    return np.rint(p * tokens[:, None, None]).astype(np.int64)


def test_golden_toy():
    found = lape(counts(toy()), TOKENS, top_rate=0.10)
    assert found.bar == 0.75
    assert found.entropy[0, 3] == pytest.approx(0.104732, abs=5e-7)
    assert found.entropy[1, 2] == pytest.approx(0.692627, abs=5e-7)
    assert np.argwhere(found.picked).tolist() == [[0, 3], [1, 2]]
    assert np.argwhere(found.language).tolist() == [[0, 0, 3], [0, 1, 2]]  # 0.75 is not strictly above 0.75
    assert np.isinf(found.entropy).sum() == 18 and np.isinf(found.entropy[1, 7])


def test_golden_entropy_of_the_neuron_under_the_bar():
    """(1, 7) is left out by the filter only; without it the entropy is the golden one."""
    found = lape(counts(toy()), TOKENS, filter_rate=0.5, top_rate=0.10)
    assert found.entropy[1, 7] == pytest.approx(0.191444, abs=5e-7)
    assert np.argwhere(found.picked).tolist() == [[0, 3], [1, 7]]
    assert np.argwhere(found.language).tolist() == [[0, 0, 3]]  # 0.60 is under the activation bar


def test_trap_large_counts_do_not_overflow():
    """100 million tokens fit 32 bits; sums over languages and neurons do not."""
    tokens = np.array([10**8, 2 * 10**9])
    small = lape(counts(toy()), TOKENS, top_rate=0.10)
    large = lape(counts(toy(), tokens).astype(np.int32), tokens.astype(np.int32), top_rate=0.10)
    assert np.array_equal(large.language, small.language)
    many = np.full((80, 1, 100), 10**8, np.int32)
    many[:, 0, ::10] = 0
    many[0, 0, ::10] = 9 * 10**7
    found = lape(many, np.full(80, 10**8), filter_rate=0.05, activation_bar_ratio=0.05, top_rate=0.1)
    assert found.picked[0, ::10].all() and found.picked.sum() == 10
    assert found.entropy[0, ::10] == pytest.approx(0) and found.entropy[0, 1] == pytest.approx(np.log(80))


@pytest.mark.parametrize(("layers", "neurons", "picked"),
                         [(1, 250, 2), (5, 70, 4), (3, 50, 2), (1, 350, 4), (30, 1536, 461)])
def test_trap_the_union_is_rounded_half_to_even(layers, neurons, picked):
    p = np.random.default_rng(0).random((3, layers, neurons))
    found = lape(counts(p, np.full(3, 10**6)), np.full(3, 10**6), top_rate=0.01)
    assert found.picked.sum() == picked == round(0.01 * layers * neurons)
    assert (found.language.any(0) == found.picked).all(), "every picked neuron has a language"
    assert not (found.language & ~found.picked).any()


@pytest.mark.parametrize(("size", "m"), [(70, 66), (10, 10), (50, 48)])  # 66.5, 9.5, 47.5
def test_trap_the_bar_is_a_value_rounded_half_to_even(size, m):
    values = np.random.default_rng(1).permutation(size) + 1
    found = lape(values.reshape(1, 1, size), np.array([1000]))
    assert found.bar == m / 1000
    assert np.isinf(found.entropy).sum() == m, "what only reaches the bar is filtered out as well"


def test_languages_are_those_above_the_bar():
    rng = np.random.default_rng(2)
    p = rng.beta(0.3, 2, (6, 4, 100))
    tokens = rng.integers(5000, 9000, 6)
    positive = counts(p, tokens)
    found = lape(positive, tokens, top_rate=0.05)
    p = positive / tokens[:, None, None]
    for layer, j in np.ndindex(4, 100):
        q = p[:, layer, j] / p[:, layer, j].sum()
        h = -sum(x * np.log(x) for x in q if x > 0) if (p[:, layer, j] > found.bar).any() else np.inf
        assert found.entropy[layer, j] == pytest.approx(h)
        for a in range(6):
            assert found.language[a, layer, j] == (found.picked[layer, j] and p[a, layer, j] > found.bar)
    assert found.entropy[found.picked].max() <= found.entropy[~found.picked].min()


def test_an_absent_language_and_dead_neurons_give_no_nan_and_change_nothing():
    rng = np.random.default_rng(3)
    p = rng.beta(0.3, 2, (4, 3, 60))
    p[:, 1, :20] = 0  # neurons that never fire
    tokens = np.full(4, 10_000)
    alone = lape(counts(p, tokens), tokens, top_rate=0.05)
    padded = np.insert(counts(p, tokens), 2, 0, axis=0)
    with np.errstate(all="raise"):
        found = lape(padded, np.insert(tokens, 2, 0), top_rate=0.05)
    assert not np.isnan(found.entropy).any() and np.isinf(found.entropy[1, :20]).all()
    assert np.array_equal(found.picked, alone.picked) and found.bar == alone.bar
    assert not found.language[2].any()
    assert np.array_equal(np.delete(found.language, 2, 0), alone.language)
    with pytest.raises(ValueError, match="no language"):
        lape(padded, np.zeros(5, int))


def test_random_control_has_as_many_in_every_layer():
    neurons = np.random.default_rng(0).random((6, 50)) < np.linspace(0, 1, 6)[:, None]
    drawn = [random_like(neurons, seed) for seed in range(3)]
    for control in drawn:
        assert np.array_equal(control.sum(1), neurons.sum(1))
    assert not np.array_equal(drawn[0], drawn[1]) and np.array_equal(drawn[2], random_like(neurons, 2))


def test_summary_of_a_change_matrix():
    nan = np.nan
    found = change_summary(np.array([[0.5, 0.1, nan], [0.2, 0.1, 0.1], [nan, 0.2, 0.6]]))
    assert found.diagonal == pytest.approx(0.4) and found.off_diagonal == pytest.approx(0.15)
    assert found.ratio == pytest.approx(0.4 / 0.15) and found.largest_on_diagonal == 2
    assert change_summary(np.array([[0.5, -0.1], [0.0, 0.3]])).ratio == np.inf
    assert change_summary(np.array([[0.5]])).off_diagonal == 0

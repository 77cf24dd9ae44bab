"""Families against similarity: found where they are, not found where they are not (tests 10 and 12)."""

from itertools import permutations
from math import comb

import numpy as np
import pytest
from sklearn.metrics import adjusted_rand_score

from analysis.atlas import families as fam
from analysis.atlas import similarity as sim

L, E, K = 4, 24, 5
SIZES = {"Romance": 5, "Germanic": 4, "Slavic": 6, "Turkic": 2, "Basque": 1}
LABELS = [name for name, size in SIZES.items() for _ in range(size)]
A = len(LABELS)


def family_profiles(seed=0, own=0.15, tokens=2000, labels=LABELS):
    """Profiles of languages that share a Dirichlet base by family and add something of their own."""
    rng = np.random.default_rng(seed)
    base = {name: rng.dirichlet(np.full(E, 1.0), L) for name in dict.fromkeys(labels)}
    shares = np.stack([(1 - own) * base[name] + own * rng.dirichlet(np.full(E, 1.0), L) for name in labels])
    counts = np.stack([[rng.multinomial(K * tokens, p) for p in language] for language in shares])
    return sim.frequencies(counts, np.full(len(labels), tokens), K)


@pytest.fixture(scope="module")
def similarity():
    return sim.correlation(sim.centre(family_profiles()))


def noise(seed, size=A):
    x = np.random.default_rng(seed).normal(size=(size, size))
    return (x + x.T) / 4


@pytest.mark.parametrize("seed", range(3))
def test_synthetic_families_are_recovered(seed):
    r = sim.correlation(sim.centre(family_profiles(seed)))
    tree = fam.dendrogram(r)
    assert fam.adjusted_rand(tree, LABELS) == 1
    assert tree.cophenetic > 0.9
    ordered = [LABELS[i] for i in tree.order]
    assert sum(a != b for a, b in zip(ordered, ordered[1:], strict=False)) == len(SIZES) - 1, "a family is one run"
    found = fam.within_between(r, LABELS, 999)
    assert found.p == 1 / 1000 and found.difference > 0.5
    nearest = fam.nearest_neighbours(r)[:, 0]
    assert all(LABELS[a] == LABELS[b] for a, b in enumerate(nearest) if SIZES[LABELS[a]] > 1)


def test_within_and_between_equal_loops(similarity):
    found = fam.within_between(similarity, LABELS, 99)
    within, between = {}, []
    for a in range(A):
        for b in range(a):
            if "Basque" not in (LABELS[a], LABELS[b]):
                target = within.setdefault(LABELS[a], []) if LABELS[a] == LABELS[b] else between
                target.append(similarity[a, b])
    assert found.within == pytest.approx(np.mean(sum(within.values(), [])))
    assert found.between == pytest.approx(np.mean(between))
    assert found.difference == pytest.approx(found.within - found.between)
    assert set(found.per_family) == set(SIZES) - {"Basque"}
    for name, family in found.per_family.items():
        assert family.within == pytest.approx(np.mean(within[name]))
        assert family.pairs == comb(SIZES[name], 2)


def test_p_equals_the_share_of_all_arrangements():
    """Six languages in families of 3, 2 and 1: the 10 splits of five languages can be listed."""
    r = noise(3, 6)
    labels = ["x", None, "y", "x", "y", "x"]
    live = [0, 2, 3, 4, 5]
    values = {}
    for i in range(5):
        for j in range(i):
            pair = {live[i], live[j]}
            triple = [x for x in live if x not in pair]
            inside = [r[tuple(pair)]] + [r[a, b] for a in triple for b in triple if a < b]
            total = sum(r[a, b] for a in live for b in live if a < b)
            values[tuple(sorted(pair))] = np.mean(inside) - (total - sum(inside)) / 6
    share = np.mean([v >= values[2, 4] - 1e-12 for v in values.values()])
    found = fam.within_between(r, labels, 20_000)
    assert found.difference == pytest.approx(values[2, 4])
    assert found.p == pytest.approx(share, abs=0.02)
    pairs = [r[a, b] for a in live for b in live if a < b]
    assert found.per_family["y"].p == pytest.approx(np.mean(np.array(pairs) >= r[2, 4] - 1e-12), abs=0.02)


def test_shuffled_labels_mean_nothing(similarity):
    rng = np.random.default_rng(0)
    p = [fam.within_between(similarity, list(rng.permutation(LABELS)), 199, seed).p for seed in range(40)]
    assert 0.35 < np.mean(p) < 0.65
    assert np.mean(np.array(p) <= 0.05) < 0.2
    rand = [fam.adjusted_rand(fam.dendrogram(similarity), list(rng.permutation(LABELS))) for _ in range(40)]
    assert abs(np.mean(rand)) < 0.1


def test_curve_is_the_single_test_layer_by_layer():
    f = sim.centre(family_profiles())
    f[1] = f[2]  # any two languages
    f[:, 2] = np.random.default_rng(1).normal(size=(A, E))  # a layer without families
    by_layer = sim.correlation_by_layer(f)
    curve = fam.within_between_curve(by_layer, LABELS, 500)
    for layer in range(L):
        alone = fam.within_between(by_layer[layer], LABELS, 500)
        assert curve.difference[layer] == pytest.approx(alone.difference)
        assert curve.p[layer] == pytest.approx(alone.p)
    assert curve.low[2] < curve.difference[2] < curve.high[2] and curve.p[2] > 0.05
    for layer in (0, 1, 3):
        assert curve.difference[layer] > curve.high[layer] and curve.p[layer] < 0.01
    assert (curve.low < 0).all() and (curve.high > 0).all()


def test_too_few_families_is_no_error():
    r = noise(0, 4)
    for labels in (["a", "a", "b", "c"], ["a"] * 4, [None] * 4, ["a", "b", "c", "d"]):
        found = fam.within_between(r, labels, 50)
        assert np.isnan(found.difference) and found.p == 1 and found.per_family == {}
        curve = fam.within_between_curve(np.stack([r, r]), labels, 50)
        assert np.isnan(curve.difference).all() and (curve.p == 1).all()


def test_an_absent_language_gives_no_nan():
    f = family_profiles()
    f[3] = 0
    r = sim.correlation(sim.centre(f))
    found = fam.within_between(r, LABELS, 99)
    assert np.isfinite([found.within, found.between, found.p]).all()
    tree = fam.dendrogram(r)
    assert np.isfinite(tree.linkage).all() and np.isfinite(tree.cophenetic)
    assert np.isfinite(fam.partial_mantel(1 - r, fam.family_distance(LABELS), [], 99)).all()


def test_adjusted_rand_equals_scikit_learn():
    from scipy.cluster.hierarchy import fcluster

    rng = np.random.default_rng(2)
    for seed in range(10):
        tree = fam.dendrogram(noise(seed))
        labels = list(rng.choice(["p", "q", "r"], A))
        groups = fcluster(tree.linkage, len(set(labels)), "maxclust")
        assert fam.adjusted_rand(tree, labels) == pytest.approx(adjusted_rand_score(labels, groups))
        labels[:3] = [None] * 3
        groups = fcluster(tree.linkage, len(set(labels[3:])), "maxclust")
        assert fam.adjusted_rand(tree, labels) == pytest.approx(adjusted_rand_score(labels[3:], groups[3:]))


def test_small_and_equal_trees():
    assert fam.dendrogram(np.ones((2, 2))).cophenetic == 1
    tree = fam.dendrogram(np.eye(5))
    assert tree.cophenetic == 1 and sorted(tree.order) == list(range(5))
    assert fam.dendrogram(np.full((3, 3), 1 + 1e-15)).linkage[:, 2].min() >= 0


def test_nearest_neighbours_leave_oneself_out():
    r = np.array([[1, 0.2, 0.9], [0.2, 1, 0.3], [0.9, 0.3, 1]])
    assert fam.nearest_neighbours(r, 2).tolist() == [[2, 1], [2, 0], [0, 1]]


# The partial Mantel test.

SCRIPTS = ["Latn"] * 9 + ["Cyrl"] * 6 + ["Latn"] * 3  # all of Slavic, only Slavic: half of the family pattern


def test_a_confound_explains_the_raw_association_away():
    """Distances that know only the script: plainly tied to families, not beyond the script."""
    script = 1 - fam.same(SCRIPTS)
    related = fam.family_distance(LABELS)
    partial = []
    for seed in range(12):
        distance = script + noise(seed)
        assert fam.partial_mantel(distance, related, [], 499).p < 0.01
        partial.append(fam.partial_mantel(distance, related, [script], 499))
    p = np.array([x.p for x in partial])
    assert p.mean() > 0.3 and np.mean(p <= 0.05) <= 0.25
    assert abs(np.mean([x.r for x in partial])) < 0.05


def test_a_real_association_survives_the_controls():
    script = 1 - fam.same(SCRIPTS)
    related = fam.family_distance(LABELS)
    histogram = np.abs(noise(50))
    distance = script + related + histogram + noise(1)
    found = fam.partial_mantel(distance, related, [script, histogram], 999)
    assert found.p == 1 / 1000 and found.r > 0.5


def test_partial_r_equals_the_textbook_formula():
    x, y, z = noise(1), noise(2), noise(3)
    y = y + x + z
    upper = np.triu_indices(A, 1)
    c = np.corrcoef([x[upper], y[upper], z[upper]])
    expected = (c[0, 1] - c[0, 2] * c[1, 2]) / np.sqrt((1 - c[0, 2] ** 2) * (1 - c[1, 2] ** 2))
    assert fam.partial_mantel(y, x, [z], 9).r == pytest.approx(expected)
    assert fam.partial_mantel(y, x, [], 9).r == pytest.approx(c[0, 1])
    # A control given twice, or one that is the same everywhere, changes nothing.
    again = fam.partial_mantel(y, x, [z, z, np.ones((A, A))], 9)
    assert again.r == pytest.approx(expected) and again.p == fam.partial_mantel(y, x, [z], 9).p


def test_partial_p_equals_the_share_of_all_permutations():
    """Five languages: the 120 orders of the residuals, each regressed again by least squares."""
    x, z = noise(5, 5), noise(105, 5)
    y = noise(205, 5) + 2 * z + 0.7 * x
    i, j = np.triu_indices(5, 1)
    design = np.stack([np.ones(10), z[i, j]], 1)

    def rest(v):
        return v - design @ np.linalg.lstsq(design, v, rcond=None)[0]

    residual = np.zeros((5, 5))
    residual[i, j] = residual[j, i] = rest(y[i, j])
    r = [np.corrcoef(rest(x[i, j]), rest(residual[np.ix_(order, order)][i, j]))[0, 1]
         for order in map(list, permutations(range(5)))]
    found = fam.partial_mantel(y, x, [z], 20_000)
    assert found.r == pytest.approx(r[0])
    assert found.p == pytest.approx(np.mean(np.array(r) >= r[0] - 1e-9), abs=0.01)


def test_what_the_controls_explain_wholly_is_not_found():
    related = fam.family_distance(LABELS)
    assert fam.partial_mantel(related + noise(0), related, [related], 99) == (0, 1)
    assert fam.partial_mantel(np.ones((A, A)), related, [], 99) == (0, 1)


def test_mantel_p_is_fair_without_an_association():
    related = fam.family_distance(LABELS)
    p = [fam.partial_mantel(noise(seed), related, [1 - fam.same(SCRIPTS)], 199, seed).p for seed in range(40)]
    assert 0.35 < np.mean(p) < 0.65


def test_distances_for_the_controls():
    assert fam.family_distance(["a", None, "a", None]).tolist() == [[0, 1, 0, 1], [1, 0, 1, 1], [0, 1, 0, 1],
                                                                   [1, 1, 1, 0]]
    assert fam.same(["x", "y", "x"]).tolist() == [[1, 0, 1], [0, 1, 0], [1, 0, 1]]
    counts = np.array([[5, 5, 0, 0], [0, 0, 9, 1], [50, 50, 0, 0], [0, 0, 0, 0]])
    distance = fam.histogram_distance(counts)
    assert distance[0, 1] == pytest.approx(1) and distance[0, 2] == pytest.approx(0, abs=1e-6)
    assert (distance[3, :3] == 1).all() and not np.diagonal(distance).any()


def test_ten_thousand_permutations_of_eighty_languages():
    """The largest size that the atlas meets; p is the smallest that so many permutations can give."""
    labels = [f"f{a % 12}" for a in range(80)]
    related = fam.family_distance(labels)
    r = noise(0, 80) - 0.5 * related
    assert fam.within_between(r, labels).p == pytest.approx(1e-4, rel=0.01)
    assert fam.partial_mantel(-r, related, [np.abs(noise(1, 80))]).p == pytest.approx(1e-4, rel=0.01)

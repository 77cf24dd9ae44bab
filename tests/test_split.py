"""Splitting: balance, exactness, invariances, planted structure (moe_split.md section 7, tests 1-6 and 8)."""

import json
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import adjusted_rand_score

from jaxmodels.errors import UserError
from jaxmodels.experts import _coactivation
from jaxmodels.experts.assign import assign_exact, assign_greedy, balanced_kmeans, unit_rows
from jaxmodels.experts.layer import apply_experts, dense_ffn
from jaxmodels.experts.split import METHODS, Split, apply_split, merge_experts, split_ffn, split_many
from jaxmodels.kernels.activations import ACTIVATIONS

D, F, E = 16, 48, 6


def make_ffn(rng, gated=True, biases=False, neurons=F, width=D):
    names = ("gate", "up") if gated else ("up",)
    ffn = {n: rng.normal(size=(width, neurons)) / np.sqrt(width) for n in names}
    ffn["down"] = rng.normal(size=(neurons, width)) / np.sqrt(neurons)
    if biases:
        ffn |= {f"{n}_bias": rng.normal(size=neurons) for n in names}
        ffn["down_bias"] = rng.normal(size=width)
    return {name: w.astype(np.float32) for name, w in ffn.items()}


def statistics(rng, method, neurons=F, clusters=3):
    if method in ("coactivation", "markers"):
        return {"activations": rng.normal(size=(200, D)).astype(np.float32), "markers": 6}
    return {"importance": rng.random((clusters, neurons))} if method == "importance" else {}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["relu", "gelu", "gelu_tanh", "glu_silu", "glu_gelu"])
@pytest.mark.parametrize("biases", [False, True])
def test_all_experts_are_the_dense_layer(method, kind, biases):
    rng = np.random.default_rng(0)
    gated, activation = kind.startswith("glu_"), kind.removeprefix("glu_")
    ffn = make_ffn(rng, gated, biases)
    experts, split = split_ffn(ffn, num_experts=E, method=method, activation=activation, **statistics(rng, method))
    x = jnp.asarray(rng.normal(size=(2, 5, D)), jnp.float32)
    dense, _ = dense_ffn({k: jnp.asarray(v) for k, v in ffn.items()}, x, activation=activation)
    y, h = apply_experts({k: jnp.asarray(v) for k, v in experts.items()}, x, activation=activation)
    assert h is None
    assert np.linalg.norm(y - dense) <= 1e-6 * np.linalg.norm(dense)


@pytest.mark.parametrize("method", METHODS)
def test_balance_and_bitwise_inverse(method):
    rng = np.random.default_rng(1)
    ffn = make_ffn(rng, biases=True)
    experts, split = split_ffn(ffn, expert_size=F // E, method=method, **statistics(rng, method))
    assert (np.bincount(split.labels, minlength=E) == F // E).all()
    assert np.array_equal(np.sort(split.perm), np.arange(F))
    assert np.array_equal(split.labels[split.perm], np.repeat(np.arange(E), F // E))
    assert (np.diff(split.perm.reshape(E, -1)) > 0).all(), "perm ascends inside an expert"
    merged = merge_experts(experts, split)
    assert set(merged) == set(ffn) and all(np.array_equal(merged[k], ffn[k]) for k in ffn)
    points = unit_rows(ffn["gate"].T)
    for e in range(E):
        assert np.allclose(split.centres[e], points[split.labels == e].mean(0), atol=1e-6)
    assert split.objective == pytest.approx(((points - split.centres[split.labels]) ** 2).sum(), rel=1e-5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("as_jax", [False, True])
def test_padding_appends_silent_neurons(method, as_jax):
    rng = np.random.default_rng(2)
    ffn = make_ffn(rng, biases=True, neurons=44)
    if as_jax:
        ffn = {k: jnp.asarray(v) for k, v in ffn.items()}
    experts, split = split_ffn(ffn, num_experts=E, method=method, pad=True, **statistics(rng, method, neurons=44))
    assert split.padded == 4 and split.labels.size == 48
    x = jnp.asarray(rng.normal(size=(7, D)), jnp.float32)
    dense, _ = dense_ffn({k: jnp.asarray(v) for k, v in ffn.items()}, x, activation="silu")
    y, _ = apply_experts({k: jnp.asarray(v) for k, v in experts.items()}, x, activation="silu")
    assert np.linalg.norm(y - dense) <= 1e-6 * np.linalg.norm(dense)
    merged = merge_experts(experts, split)
    assert all(np.array_equal(merged[k], ffn[k]) for k in ffn)


def test_objective_never_rises_with_exact_assignment():
    rows = np.random.default_rng(3).normal(size=(240, 10))
    history = balanced_kmeans(rows, 12, restarts=1).history
    assert len(history) > 3
    assert (np.diff(history) <= 1e-9).all()


@pytest.mark.parametrize("shape", [(12, 3), (60, 60), (128, 8), (90, 1)])
def test_exact_assignment_is_optimal_and_greedy_is_close(shape):
    rng = np.random.default_rng(4)
    count, experts = shape
    for scale in (1.0, 1e-6):
        cost = scale * rng.normal(size=shape)
        cost[:, 0] -= scale  # one expert that most neurons want
        columns = linear_sum_assignment(np.repeat(cost, count // experts, 1))[1]
        best = cost[np.arange(count), columns // (count // experts)]
        for assign in (assign_exact, assign_greedy):
            labels = assign(cost, count // experts)
            assert (np.bincount(labels, minlength=experts) == count // experts).all()
            total = cost[np.arange(count), labels].sum()
            assert total >= best.sum() - 1e-9 * scale
            if assign is assign_exact:
                assert total == pytest.approx(best.sum(), rel=1e-9)


def test_greedy_equals_the_one_by_one_loop():
    cost = np.random.default_rng(5).normal(size=(96, 8))
    two = np.sort(cost, 1)
    room, expected = np.full(8, 12), np.zeros(96, int)
    for neuron in np.argsort(two[:, 0] - two[:, 1], kind="stable"):
        expected[neuron] = np.where(room > 0, cost[neuron], np.inf).argmin()
        room[expected[neuron]] -= 1
    assert np.array_equal(assign_greedy(cost, 12), expected)


def test_greedy_rounds_then_one_exact_round():
    rows = np.random.default_rng(6).normal(size=(240, 10))
    greedy = balanced_kmeans(rows, 12, exact_limit=100)
    exact = balanced_kmeans(rows, 12)
    assert (np.bincount(greedy.labels) == 20).all()
    assert greedy.objective <= 1.03 * exact.objective


def planted(seed, noise):
    rng = np.random.default_rng(seed)
    centres = unit_rows(rng.normal(size=(8, 64)))
    labels = np.repeat(np.arange(8), 32)
    order = rng.permutation(256)
    rows = centres[labels] + noise * rng.normal(size=(256, 64))
    return (rows * rng.uniform(0.2, 5, (256, 1)))[order], labels[order]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("noise", [0.05, 0.2])
def test_planted_clusters_are_found(seed, noise):
    rows, labels = planted(seed, noise)
    assert adjusted_rand_score(labels, balanced_kmeans(rows, 8, seed=seed).labels) == 1.0


def test_row_scale_does_not_matter():
    rows = np.random.default_rng(7).normal(size=(96, 12))
    scaled = rows * 2.0 ** np.random.default_rng(8).integers(-3, 4, (96, 1))
    assert np.array_equal(balanced_kmeans(rows, 8).labels, balanced_kmeans(scaled, 8).labels)


def test_permuting_neurons_permutes_labels():
    rng = np.random.default_rng(9)
    rows, order = rng.normal(size=(96, 12)), rng.permutation(96)
    start = unit_rows(rows[:8])
    labels = balanced_kmeans(rows, 8, init_centres=start).labels
    assert np.array_equal(balanced_kmeans(rows[order], 8, init_centres=start).labels, labels[order])


def test_zero_rows_and_bad_rows():
    rows = np.random.default_rng(10).normal(size=(24, 5))
    rows[:5] = 0
    clusters = balanced_kmeans(rows, 4)
    assert np.isfinite(clusters.centres).all() and (np.bincount(clusters.labels) == 6).all()
    assert (np.bincount(balanced_kmeans(np.zeros((24, 5)), 4).labels) == 6).all()
    rows[3, 2] = np.nan
    with pytest.raises(UserError, match="NaN"):
        balanced_kmeans(rows, 4)


def test_coactivation_finds_neurons_that_fire_together():
    rng = np.random.default_rng(11)
    blocks, size, tokens = 4, 12, 600
    # Token t lies along direction t % 4; neurons of block b read direction b.
    directions = np.linalg.qr(rng.normal(size=(D, blocks)))[0].T
    x = directions[rng.integers(blocks, size=tokens)] + 0.05 * rng.normal(size=(tokens, D))
    truth = rng.permutation(np.repeat(np.arange(blocks), size))
    ffn = make_ffn(rng, gated=False)
    ffn["up"] = (directions[truth] + 0.05 * rng.normal(size=(F, D))).T.astype(np.float32)
    for activation in ("relu", "silu"):
        options = {"num_experts": blocks, "activations": x.astype(np.float32), "activation": activation}
        _, split = split_ffn(ffn, method="coactivation", **options)
        _, chance = split_ffn(ffn, method="random", num_experts=blocks)
        graph = _coactivation.adjacency(_coactivation.firing(ffn, x, activation, 10))
        edges = graph.toarray()
        # Weight of the edges within experts.
        within, by_chance, planted = (edges[labels[:, None] == labels].sum()
                                      for labels in (split.labels, chance.labels, truth))
        assert within > 1.5 * by_chance and within == planted, "as good a cut as the planted one"


def test_adjacency_matches_the_definition():
    rng = np.random.default_rng(12)
    fires = np.maximum(rng.normal(size=(40, 9)) - 1, 0).astype(np.float32)
    total = sum(np.minimum(fires[i : i + 8].T @ fires[i : i + 8], 1) for i in range(0, 40, 8))
    np.fill_diagonal(total, 0)
    deciles = np.percentile(total, np.arange(10, 101, 10), method="inverted_cdf")
    expected = np.floor(total / (0.99 * deciles[deciles > 0][0]))
    assert np.array_equal(_coactivation.adjacency(fires).toarray(), expected)


def test_markers_put_the_busiest_neurons_into_shared_experts():
    rng = np.random.default_rng(13)
    ffn, x = make_ffn(rng), rng.normal(size=(300, D)).astype(np.float32)
    _, split = split_ffn(ffn, num_experts=E, method="markers", activations=x, num_shared=2, markers=6)
    rate = _coactivation.marker_matrix(ffn, x, "silu", 6).mean(0)
    assert rate.sum() == pytest.approx(6)
    assert rate[split.labels < 2].min() >= rate[split.labels >= 2].max()
    assert np.array_equal(split.labels[split.representatives], np.arange(2, E))


def test_importance_gives_each_cluster_its_neurons():
    rng = np.random.default_rng(14)
    importance = 0.01 * rng.random((4, F))
    owner = rng.permutation(np.repeat(np.arange(6), 8))  # 4 and 5: important to every cluster
    for cluster in range(4):
        importance[cluster, (owner == cluster) | (owner >= 4)] += 1
    _, split = split_ffn(make_ffn(rng), num_experts=6, method="importance", importance=importance, num_shared=2)
    assert ((split.labels < 2) == (owner >= 4)).all()
    for cluster in range(4):
        assert (split.labels[owner == cluster] == 2 + cluster).all()
    _, halves = split_ffn(make_ffn(rng), num_experts=8, method="importance", importance=importance)
    first, second = (importance[0][halves.labels == e] for e in (0, 1))
    assert first.min() >= second.max(), "the most important neurons of a cluster share an expert"


def test_errors_name_the_remedy():
    ffn = make_ffn(np.random.default_rng(15))
    for options, message in [
        ({"num_experts": 7}, "divisors|1, 2, 3, 4, 6, 8, 12"),
        ({"expert_size": 5}, "1, 2, 3, 4, 6, 8, 12, 16, 24, 48"),
        ({"num_experts": 0}, "1..48"),
        ({}, "one of the two"),
        ({"num_experts": 6, "expert_size": 8}, "one of the two"),
        ({"num_experts": 6, "method": "kmean"}, "choose from kmeans"),
        ({"num_experts": 6, "method": "markers"}, "needs activations"),
        ({"num_experts": 6, "method": "importance"}, "needs importance"),
        ({"num_experts": 6, "num_shared": 1}, "markers or importance"),
        ({"num_experts": 6, "vector": "down"}, "gate, up, concat"),
    ]:
        with pytest.raises(UserError, match=message):
            split_ffn(ffn, **options)
    with pytest.raises(UserError, match="NaN"):
        split_ffn(ffn | {"gate": np.full((D, F), np.nan, np.float32)}, num_experts=6)


@pytest.mark.parametrize("vector", ["gate", "up", "concat"])
def test_vector_choice(vector):
    rng = np.random.default_rng(16)
    rows, labels = planted(0, 0.05)
    other = rng.normal(size=rows.shape)
    gate, up = {"gate": (rows, other), "up": (other, rows), "concat": (rows, rows)}[vector]
    ffn = {"gate": gate.T, "up": up.T, "down": other}
    split = split_ffn(ffn, num_experts=8, vector=vector)[1]
    assert adjusted_rand_score(labels, split.labels) == 1.0
    assert split.centres.shape == (8, 128 if vector == "concat" else 64)


def test_split_many_is_the_same_in_processes():
    rng = np.random.default_rng(17)
    ffns = [make_ffn(rng) for _ in range(3)]
    seen = []
    here = split_many(ffns, num_experts=E, processes=1, seed=5)
    there = split_many(ffns, num_experts=E, processes=2, seed=5, progress=lambda *a: seen.append(a))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    for layer, ((a, split_a), (b, split_b)) in enumerate(zip(here, there, strict=True)):
        assert split_a.seed == 5 + layer
        assert np.array_equal(split_a.labels, split_b.labels)
        assert all(np.array_equal(a[name], b[name]) for name in a)


def test_workers_do_not_import_jax():
    code = "import sys, jaxmodels.experts.split; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_split_travels_without_the_model():
    rng = np.random.default_rng(18)
    ffn = make_ffn(rng)
    experts, split = split_ffn(ffn, num_experts=E, method="markers", num_shared=1, **statistics(rng, "markers"))
    arrays, meta = split.to_arrays()
    again = Split.from_arrays(arrays, json.loads(json.dumps(meta)))
    assert np.array_equal(again.representatives, split.representatives)
    assert (again.method, again.num_shared, again.objective) == (split.method, 1, split.objective)
    assert all(np.array_equal(w, experts[k]) for k, w in apply_split(ffn, again).items())
    damaged = arrays | {"labels": np.roll(arrays["labels"], 1)}
    with pytest.raises(UserError, match="disagree"):
        Split.from_arrays(damaged, meta)
    with pytest.raises(UserError, match="format"):
        Split.from_arrays(arrays, meta | {"format": "other"})


def test_numpy_and_jax_activations_agree():
    x = np.linspace(-4, 4, 41, dtype=np.float32)
    assert set(ACTIVATIONS) == set(_coactivation.ACTIVATIONS)
    for name in ACTIVATIONS:
        assert np.allclose(ACTIVATIONS[name](x), _coactivation.ACTIVATIONS[name](x), atol=1e-6)

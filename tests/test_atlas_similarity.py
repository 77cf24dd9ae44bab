"""Frequencies and their comparison against loops, and the reductions that count while the model runs (test 9)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.spatial.distance import jensenshannon

from analysis import activations
from analysis.atlas import similarity as sim
from jaxmodels.decoder.config import DecoderConfig
from jaxmodels.decoder.model import Decoder
from jaxmodels.taps import Taps

A, L, E, K = 6, 3, 20, 4


def sampled_counts(seed=0, tokens=(50, 80, 11, 1, 200, 33), bases=None):
    """counts[A, L, E] of tokens that each have K different experts in every layer, and tokens[A]."""
    rng = np.random.default_rng(seed)
    if bases is None:
        bases = rng.normal(size=(len(tokens), L, E))
    counts = np.zeros((len(tokens), L, E), np.int64)
    for a, n in enumerate(tokens):
        scores = bases[a] + rng.gumbel(size=(n, L, E))
        np.add.at(counts[a], (np.arange(L)[None, :, None], np.argsort(-scores, -1)[..., :K]), 1)
    return counts, np.array(tokens)


def test_frequencies_equal_a_loop_and_sum_to_the_number_of_experts():
    counts, tokens = sampled_counts()
    f = sim.frequencies(counts, tokens, K)
    for a in range(A):
        for layer in range(L):
            assert f[a, layer].sum() == pytest.approx(E, rel=1e-12)
            for e in range(E):
                assert f[a, layer, e] == pytest.approx(counts[a, layer, e] / tokens[a] * E / K, rel=1e-12)
    even = np.full((1, 1, E), K * 5)
    assert np.allclose(sim.frequencies(even, np.array([5 * E]), K), 1), "1 is chance"


def test_damaged_counts_are_refused():
    counts, tokens = sampled_counts()
    counts[2, 1, 0] += 1
    with pytest.raises(ValueError, match="language 2, layer 1"):
        sim.frequencies(counts, tokens, K)
    with pytest.raises(ValueError, match="language 0"):
        sim.frequencies(sampled_counts()[0], tokens, K + 1)


def test_ties_are_allowed_only_on_request():
    counts, tokens = np.full((2, 1, 10), 40), np.array([100, 100])  # k = 4
    counts[0, 0, 3] += 2
    with pytest.raises(ValueError, match="language 0, layer 0: counts add up to 402"):
        sim.frequencies(counts, tokens, 4)
    f = sim.frequencies(counts, tokens, 4, ties=0.01)
    assert np.allclose(f.sum(-1), 10) and f[0, 0, 3] == pytest.approx(42 / 40.2)
    with pytest.raises(ValueError):
        sim.frequencies(counts, tokens, 4, ties=0.001)
    with pytest.raises(ValueError):
        sim.frequencies(counts - 1, tokens, 4, ties=0.01)


def test_similarities_equal_loops():
    counts, tokens = sampled_counts()
    f = sim.frequencies(counts, tokens, K)
    centred = sim.centre(f)
    assert np.allclose(centred, f - sum(f) / A)
    by_layer = sim.correlation_by_layer(centred)
    top = [set(np.argsort(-x.ravel(), kind="stable")[:6]) for x in f]
    for a in range(A):
        for b in range(A):
            assert sim.correlation(f)[a, b] == pytest.approx(np.corrcoef(f[a].ravel(), f[b].ravel())[0, 1])
            js = np.mean([jensenshannon(f[a, layer], f[b, layer], base=2) ** 2 for layer in range(L)])
            assert sim.jensen_shannon(f)[a, b] == pytest.approx(js, abs=1e-12)
            assert sim.jaccard_top(f)[a, b] == pytest.approx(len(top[a] & top[b]) / len(top[a] | top[b]))
            for layer in range(L):
                assert by_layer[layer, a, b] == pytest.approx(np.corrcoef(centred[a, layer], centred[b, layer])[0, 1])


def test_a_language_twice_is_as_similar_as_can_be():
    counts, tokens = sampled_counts()
    counts, tokens = np.concatenate([counts, 7 * counts[:1]]), np.append(tokens, 7 * tokens[0])
    f = sim.frequencies(counts, tokens, K)
    for r in (sim.correlation(f), sim.correlation(sim.centre(f)), *sim.correlation_by_layer(sim.centre(f)),
              sim.jaccard_top(f), 1 - sim.jensen_shannon(f)):
        assert r[0, -1] == pytest.approx(1, abs=1e-12)
        assert r[0, 1:-1].max() < 0.9


def test_an_absent_language_gives_no_nan_and_changes_no_other():
    counts, tokens = sampled_counts()
    f = sim.frequencies(counts, tokens, K)
    counts[2], tokens[2] = 0, 0
    without = sim.frequencies(counts, tokens, K)
    rest = [0, 1, 3, 4, 5]
    for measure in (sim.centre, sim.correlation, sim.jensen_shannon, sim.jaccard_top):
        value = measure(without)
        assert np.isfinite(value).all()
        assert np.allclose(value[rest] if measure is sim.centre else value[np.ix_(rest, rest)], measure(f[rest]))
    assert not sim.centre(without)[2].any() and not sim.correlation(sim.centre(without))[2].any()
    assert (sim.jensen_shannon(without)[2, rest] == 1).all()
    assert np.isfinite(sim.correlation_by_layer(without)).all()
    half = sim.split_half(without, without, permutations=5)
    assert np.isfinite(np.stack(half)).all()
    assert half.centred[2] == 0 and half.centred[0] == pytest.approx(1)


def test_split_half_needs_centring():
    """The trap of moe_split.md 4.3: languages without any character of their own have a high raw r."""
    shared = np.broadcast_to(2 * np.random.default_rng(1).normal(size=(L, E)), (A, L, E))
    halves = [sim.frequencies(*sampled_counts(seed, (900,) * A, shared), K) for seed in (2, 3)]
    same = sim.split_half(*halves)
    assert same.raw.min() > 0.97 and same.others_raw.min() > 0.97
    assert np.abs(same.centred).mean() < 0.5 and np.abs(same.others_centred).max() < 0.2

    own = shared + np.random.default_rng(4).normal(size=(A, L, E))
    halves = [sim.frequencies(*sampled_counts(seed, (900,) * A, own), K) for seed in (2, 3)]
    real = sim.split_half(*halves)
    assert real.centred.min() > 0.96 and real.others_centred.max() < 0.2
    assert (real.floor > 0).all() and (real.floor < 0.5).all(), "95th percentile of labels that mean nothing"
    first, second = sim.centre(halves[0]), sim.centre(halves[1])
    expected = [np.corrcoef(x.ravel(), y.ravel())[0, 1] for x, y in zip(first, second, strict=True)]
    assert np.allclose(real.centred, expected)
    cross = [[np.corrcoef(x.ravel(), y.ravel())[0, 1] for y in halves[1]] for x in halves[0]]
    assert np.allclose(real.raw, np.diagonal(cross))
    assert np.allclose(real.others_raw, (np.sum(cross, 1) - np.diagonal(cross)) / (A - 1))


# The reductions of analysis/activations.py, which fill the counts.


@pytest.mark.parametrize("k", [1, 3, 7, 10])
def test_kth_largest_is_exact_with_ties_zeros_and_tiny_numbers(k):
    rng = np.random.default_rng(k)
    values = rng.gamma(0.3, size=(5, 4, 10)).astype(np.float32)
    values[0] = rng.integers(0, 3, (4, 10))  # ties, many zeros
    values[1] = 0
    values[2] *= 1e-30
    values[3, :, ::2] = 2.5
    values[4, 0] = 3e38
    expected = -np.sort(-values, -1)[..., k - 1:k]
    assert np.array_equal(activations.kth_largest(jnp.asarray(values), k), expected)


@pytest.mark.parametrize("k", [1, 4, 20])
def test_top_count_sums_to_k_times_tokens(k):
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(3, 9, E)).astype(np.float32)
    scores[1] = np.round(scores[1])  # ties: the lower index first
    scores[2] = 0
    counted = rng.random((3, 9)) < 0.7
    count = np.asarray(activations.top_counts(jnp.asarray(scores), jnp.asarray(counted), (1, k))[k])
    assert np.array_equal(count.sum(-1), k * counted.sum(1))
    expected = np.zeros((3, E), int)
    for b, t in np.argwhere(counted):
        for e in sorted(range(E), key=lambda e: (-scores[b, t, e], e))[:k]:
            expected[b, e] += 1
    assert np.array_equal(count, expected)


@pytest.fixture(scope="module")
def model():
    return Decoder(DecoderConfig.tiny(), rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def batch(model):
    """tokens, mask and counted [6, 9]: padding on the right, the first 2 positions not counted; split order."""
    rng = np.random.default_rng(5)
    tokens = rng.integers(0, model.cfg.vocab_size, (6, 9))
    mask = np.arange(9) < np.array([9, 9, 5, 9, 3, 1])[:, None]
    counted = np.broadcast_to(np.arange(9) >= 2, mask.shape)
    order = np.stack([rng.permutation(48) for _ in range(3)])
    return tokens, mask, counted, order


def activity(model, batch, rows=slice(None)):
    tokens, mask, counted, order = (x[rows] if i < 3 else x for i, x in enumerate(batch))
    taps = activations.activity_taps(activations.down_norms(model), jnp.asarray(order), jnp.asarray(counted),
                                     num_experts=6, expert_ks=(1, 3), neuron_k=10)
    _, aux = model(jnp.asarray(tokens), mask=jnp.asarray(mask), taps=taps)
    return jax.tree.map(np.asarray, activations.flatten_activity(aux))


def test_activity_equals_a_loop_over_recordings(model, batch):
    tokens, mask, counted, order = batch
    got = activity(model, batch)
    _, aux = model(jnp.asarray(tokens), mask=jnp.asarray(mask), taps=Taps(record=("ffn.hidden", "ffn.gate")))
    hidden, gate = np.asarray(aux["ffn.hidden"]), np.asarray(aux["ffn.gate"])
    norms = np.asarray(activations.down_norms(model))
    want = {name: np.zeros_like(value) for name, value in got.items()}
    for layer, b, t in np.ndindex(*hidden.shape[:3]):
        if not (mask[b, t] and counted[b, t]):
            continue
        contribution = np.abs(hidden[layer, b, t]) * norms[layer]
        want["sum"][layer, b] += contribution
        want["square"][layer, b] += contribution**2
        want["positive_gate"][layer, b] += gate[layer, b, t] > 0
        want["neuron_top"][layer, b, np.argsort(-contribution)[:10]] += 1
        experts = [contribution[order[layer, 8 * e:8 * e + 8]].sum() for e in range(6)]
        for k in (1, 3):
            want[f"expert_top_{k}"][layer, b, np.argsort(experts)[-k:]] += 1
    assert set(got) == {"sum", "square", "positive_gate", "neuron_top", "expert_top_1", "expert_top_3"}
    for name, value in got.items():
        if np.issubdtype(value.dtype, np.integer):
            assert np.array_equal(value, want[name]), name
        else:
            assert np.allclose(value, want[name], rtol=1e-5), name
    live = (mask & counted).sum(1)
    assert live.min() == 0 and (got["expert_top_3"].sum(-1) == 3 * live).all()
    assert (got["neuron_top"].sum(-1) == 10 * live).all()
    # Rows are languages: what comes out is what `frequencies` takes.
    sim.frequencies(got["expert_top_3"].swapaxes(0, 1), live, 3)


def test_batch_size_does_not_matter(model, batch):
    whole = activity(model, batch)
    for size in (1, 4):
        parts = [activity(model, batch, slice(start, start + size)) for start in range(0, 6, size)]
        for name, value in whole.items():
            joined = np.concatenate([p[name] for p in parts], 1)
            if np.issubdtype(value.dtype, np.integer):
                assert np.array_equal(joined, value), name
            else:
                assert np.allclose(joined, value, rtol=1e-4, atol=1e-6), name

"""Static pruning: equal to a mask on the dense layer, and selection rules that keep what they say (test 11)."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodels.errors import UserError
from jaxmodels.experts import prune
from jaxmodels.experts.layer import dense_ffn
from jaxmodels.experts.split import split_ffn

L, E = 5, 40


def frequencies(seed=0, layers=L, experts=E):
    """Like measured ones: every layer sums to k, layers differ in how concentrated they are."""
    rng = np.random.default_rng(seed)
    f = np.stack([rng.dirichlet(np.full(experts, a)) for a in np.geomspace(0.05, 20, layers)])
    return 0.2 * experts * f


@pytest.mark.parametrize("gated", [True, False])
def test_pruned_layer_is_the_masked_dense_layer(gated):
    rng = np.random.default_rng(0)
    names = ("gate", "up") if gated else ("up",)
    ffn = {n: rng.normal(size=(16, 48)) / 4 for n in names} | {f"{n}_bias": rng.normal(size=48) for n in names}
    ffn |= {"down": rng.normal(size=(48, 16)) / 7, "down_bias": rng.normal(size=16)}
    ffn = {k: jnp.asarray(v, jnp.float32) for k, v in ffn.items()}
    experts, split = split_ffn(ffn, num_experts=12)
    keep = rng.random(12) < 0.4
    small = prune.prune_experts(experts, keep)
    assert small["down"].shape == (keep.sum() * 4, 16)
    x = jnp.asarray(rng.normal(size=(9, 16)), jnp.float32)
    y, small_h = dense_ffn(small, x, activation="silu")
    _, h = dense_ffn(ffn, x, activation="silu")
    expected = (h * keep[split.labels]) @ ffn["down"] + ffn["down_bias"]
    assert np.linalg.norm(y - expected) <= 1e-6 * np.linalg.norm(expected)
    assert np.allclose(small_h, h[:, prune.neuron_order(split, keep)], atol=1e-6)


@pytest.mark.parametrize("share", [0.05, 0.1, 0.25, 0.5, 0.77, 0.9, 1.0])
@pytest.mark.parametrize("rule", prune.RULES)
@pytest.mark.parametrize("experts", [40, 7])
def test_kept_number_is_as_asked(rule, share, experts):
    f = frequencies(experts=experts)
    keep = prune.select_experts(f, share, rule=rule)
    floor = max(1, int(np.ceil(prune.FLOOR * experts - 1e-9)))
    assert keep.shape == f.shape and keep.dtype == bool
    assert abs(keep.sum() - max(share * f.size, floor * L)) <= L
    assert (keep.sum(1) >= floor).all()


def test_adaptive_uses_one_coverage():
    f = frequencies()
    for share in (0.2, 0.5, 0.8):
        keep = prune.select_experts(f, share)
        counts = keep.sum(1)
        descending = -np.sort(-f, 1) / f.sum(1, keepdims=True)
        covered = np.array([descending[layer, :r].sum() for layer, r in enumerate(counts)])
        before = np.array([descending[layer, : r - 1].sum() for layer, r in enumerate(counts)])
        floored = counts == 2
        # One coverage c separates them: what is covered reaches it, one expert fewer would not.
        assert before[~floored].max() < covered.min() + 1e-9 and not floored.all()
        assert len(set(counts)) > 1, "layers that differ get different widths"
        for layer in range(L):
            assert f[layer][keep[layer]].min() >= f[layer][~keep[layer]].max(initial=0)


def test_adaptive_treats_equal_layers_equally():
    row = frequencies()[2]
    rng = np.random.default_rng(1)
    f = np.stack([rng.permutation(row) for _ in range(6)])
    for share in np.linspace(0.05, 1, 20):
        assert len(set(prune.adaptive_counts(f, share))) == 1
    assert (prune.adaptive_counts(np.ones((4, 10)), 0.5) == 5).all()
    f[:, 10:] = 0  # too few experts with any frequency
    assert len(set(prune.adaptive_counts(f, 0.5))) == 1 and prune.adaptive_counts(f, 0.5)[0] == 20


def test_uniform_global_and_controls():
    f = frequencies()
    uniform = prune.select_experts(f, 0.26, rule="uniform")
    assert (uniform.sum(1) == 11).all()
    everywhere = prune.select_experts(f, 0.3, rule="global")
    assert everywhere.sum() == 60
    free = everywhere.sum(1) > 2
    assert f[free][everywhere[free]].min() >= f[~everywhere].max()
    adaptive = prune.select_experts(f, 0.3)
    seeds = [prune.select_experts(f, 0.3, rule="random", seed=s) for s in range(3)]
    for control in [*seeds, prune.select_experts(f, 0.3, rule="lowest")]:
        assert np.array_equal(control.sum(1), adaptive.sum(1)), "controls have the widths of the adaptive rule"
    assert not np.array_equal(seeds[0], seeds[1])
    lowest = prune.select_experts(f, 0.3, rule="lowest", counts=uniform.sum(1))
    for layer in range(L):
        assert lowest[layer].sum() == 11 and f[layer][lowest[layer]].max() <= f[layer][~lowest[layer]].min()


def test_union_of_languages():
    a, b = frequencies(0), 100 * frequencies(1)
    both = prune.union_scores(np.stack([a, b]))
    assert np.allclose(both, np.maximum(a / a.sum(-1, keepdims=True), b / b.sum(-1, keepdims=True)))
    assert np.allclose(prune.union_scores(np.stack([a, a]), "mean"), a / a.sum(-1, keepdims=True))


def test_errors():
    f = frequencies()
    for arguments, message in [
        ({"share": 0.0}, r"\(0, 1\]"),
        ({"share": 0.5, "rule": "best"}, "choose from adaptive"),
        ({"share": 0.5, "rule": "lowest", "counts": np.zeros(L, int)}, "1..40"),
    ]:
        with pytest.raises(UserError, match=message):
            prune.select_experts(f, **arguments)
    with pytest.raises(UserError, match="finite"):
        prune.select_experts(f * np.nan, 0.5)
    experts = {"up": np.ones((4, 3, 2)), "down": np.ones((4, 2, 3))}
    with pytest.raises(UserError, match="at least one"):
        prune.prune_experts(experts, np.zeros(4, bool))
    with pytest.raises(UserError, match=r"bool\[4\]"):
        prune.prune_experts(experts, np.ones(5, bool))

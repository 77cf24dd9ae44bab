"""SSL, DML and the losses that Text2Tree is compared with, against loops in NumPy and their limit cases."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmodels import UserError
from jaxmodels.text2tree import baselines, losses
from jaxmodels.text2tree.hlr import HlrConfig, LabelEmbeddings
from jaxmodels.text2tree.losses import LossConfig
from jaxmodels.text2tree.tree import LabelTree

B, D, K = 6, 5, 4
TREE = LabelTree.from_codes(["A1.1", "A1.2", "B2.1", "B2.2"])
RNG = np.random.default_rng(0)
H = jnp.asarray(RNG.normal(size=(B, D)), jnp.float32)
STATES = jnp.asarray(RNG.normal(size=(K, D)), jnp.float32)
ONE = jnp.array([0, 1, 2, 3, 1, 2])
MANY = jnp.asarray(np.array([[1, 0, 0, 1], [0, 1, 0, 0], [0, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]),
                   jnp.float32)  # texts 2 and 5 have no label
W = jnp.asarray(RNG.normal(size=(D, K)), jnp.float32)
KEY = jax.random.key(0)


def head(x):
    return jnp.tanh(x) @ W


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def test_similarity_weights_and_coefficients():
    s = losses.similarity(STATES, ONE)
    r = np.asarray(STATES)[np.asarray(ONE)]
    r /= np.linalg.norm(r, axis=1, keepdims=True)
    assert np.allclose(s, r @ r.T, atol=1e-6)
    w, lam = losses.pair_weights(s), losses.coefficients(s)
    assert np.allclose(w.sum(1), 1, atol=1e-6) and np.allclose(w, softmax(r @ r.T), atol=1e-6)
    assert np.allclose(np.diag(lam), 1, atol=1e-6)
    assert lam.max() <= 1 + 1e-6 and lam.min() >= np.exp(-2) - 1e-6 and np.allclose(lam, w / w.max(1, keepdims=True))
    alone = losses.pair_weights(s, include_self=False)
    assert np.allclose(alone.sum(1), 1, atol=1e-6) and not np.diag(alone).any()
    assert float(losses.pair_weights(s, 0.1).max()) > float(w.max())


def test_texts_without_labels():
    """Nobody's positive, no NaN, mixed with nobody; in the mode of the released code they are their own positive."""
    s = losses.similarity(STATES, MANY)
    w, lam = losses.pair_weights(s), losses.coefficients(s)
    some = np.asarray(MANY).any(1)
    assert not np.asarray(w)[some][:, ~some].any() and np.allclose(np.asarray(w)[~some], np.eye(B)[~some])
    assert not np.asarray(lam)[some][:, ~some].any() and np.allclose(np.diag(lam), 1)
    alone = losses.pair_weights(s, include_self=False)
    assert not np.asarray(alone)[~some].any()
    for labels in (MANY, jnp.zeros_like(MANY)):
        for include_self in (True, False):
            cfg = LossConfig(include_self=include_self)
            value, gradient = jax.jit(jax.value_and_grad(lambda h, states, labels: losses.total(
                cfg, h, labels, head, states, KEY)[0], argnums=(0, 1)))(H, STATES, labels)
            assert np.isfinite(value) and all(np.isfinite(g).all() for g in gradient)


@pytest.mark.parametrize("include_self", [True, False])
def test_ssl_by_hand(include_self):
    tau = 0.5
    s = losses.similarity(STATES, ONE)
    z = np.asarray(H) / np.linalg.norm(H, axis=1, keepdims=True)
    logits, expected = z @ z.T / tau, 0.0
    for i in range(B):
        others = [k for k in range(B) if k != i]
        positives = list(range(B)) if include_self else others
        w = softmax(np.asarray(s)[i, positives])
        total = np.log(np.exp(logits[i, others]).sum())
        expected -= tau / 0.07 / B * sum(a * (logits[i, j] - total) for a, j in zip(w, positives, strict=True))
    found = losses.contrastive(H, losses.pair_weights(s, include_self=include_self), tau)
    assert np.allclose(found, expected, rtol=1e-5)


def test_limits_of_ssl():
    """Similarities of ±∞: supervised contrastive learning; w = identity: SelfCon; one text: 0."""
    same = ONE[:, None] == ONE
    w = losses.pair_weights(jnp.where(same, 1e3, -1e3), include_self=False)
    # Texts 0 and 3 are alone in their class: the softmax would spread over the others.
    w = jnp.where(same, w, 0)
    assert np.allclose(losses.contrastive(H, w, 0.3), baselines.supervised_contrastive(H, ONE, 0.3), rtol=1e-6)
    z = np.asarray(H) / np.linalg.norm(H, axis=1, keepdims=True)
    logits = z @ z.T / 0.3
    rows = [np.mean([logits[i, j] - np.log(np.exp(np.delete(logits[i], i)).sum()) for j in range(B)
                     if j != i and ONE[i] == ONE[j]]) for i in (1, 2, 4, 5)]
    assert np.allclose(baselines.supervised_contrastive(H, ONE, 0.3), -0.3 / 0.07 * np.mean(rows), rtol=1e-5)
    selves = [logits[i, i] - np.log(np.exp(np.delete(logits[i], i)).sum()) for i in range(B)]
    assert np.allclose(baselines.self_contrastive(H, 0.3), -0.3 / 0.07 * np.mean(selves), rtol=1e-5)
    assert float(losses.contrastive(H[:1], jnp.ones((1, 1)), 0.3)) == 0
    binary = [baselines.supervised_contrastive(H, MANY[:, k].astype(int), 0.3) for k in (0, 1)]
    both = baselines.supervised_contrastive(H, MANY[:, :2], 0.3)
    assert np.allclose(both, np.mean(binary), rtol=1e-5)


def mixed_by_loops(labels, lam, weights=None):
    total, h, count = 0.0, np.asarray(H, np.float64), 0.0
    for i in range(B):
        for j in range(B):
            o = np.tanh(lam[i, j] * h[i] + (1 - lam[i, j]) * h[j]) @ np.asarray(W, np.float64)
            if labels.ndim == 1:
                loss = [-np.log(softmax(o))[int(labels[k])] for k in (i, j)]
            else:
                loss = [np.mean(np.log1p(np.exp(o)) - np.asarray(labels)[k] * o) for k in (i, j)]
            a = 1.0 if weights is None else weights[i, j]
            total, count = total + a * (lam[i, j] * loss[0] + (1 - lam[i, j]) * loss[1]), count + a
    return total / count


@pytest.mark.parametrize("labels", [ONE, MANY], ids=["multi_class", "multi_label"])
def test_dml_by_loops(labels):
    lam = np.asarray(losses.coefficients(losses.similarity(STATES, labels)), np.float64)
    found = losses.mixup(H, jnp.asarray(lam, jnp.float32), labels, head)
    assert np.allclose(found, mixed_by_loops(labels, lam), rtol=1e-5)
    heavy = losses.mixup(H, jnp.asarray(lam, jnp.float32), labels, head, diag_weight=5.0)
    assert np.allclose(heavy, mixed_by_loops(labels, lam, 1 + 4 * np.eye(B)), rtol=1e-5)


def test_equal_labels_mix_nothing():
    for labels in (jnp.full(B, 2), jnp.tile(MANY[:1], (B, 1))):
        lam = losses.coefficients(losses.similarity(STATES, labels))
        assert np.allclose(lam, 1, atol=1e-6)
        assert np.allclose(losses.mixup(H, lam, labels, head), losses.classification(head(H), labels).mean(), rtol=1e-6)


@pytest.mark.parametrize("labels", [ONE, MANY], ids=["multi_class", "multi_label"])
def test_order_of_the_batch(labels):
    order = np.array([3, 0, 5, 1, 4, 2])
    s = losses.similarity(STATES, labels)
    moved = losses.similarity(STATES, labels[order])
    for of in (losses.pair_weights, losses.coefficients):
        assert np.allclose(of(s)[np.ix_(order, order)], of(moved), atol=1e-6)
    a, b = (losses.total(LossConfig(gamma=0.3), h, y, head, STATES, KEY)[1] for h, y in (
        (H, labels), (H[order], labels[order])))
    assert a.keys() == {"dml", "ssl"} and all(np.allclose(a[name], b[name], rtol=1e-5) for name in a)


@pytest.mark.parametrize("labels", [ONE, MANY], ids=["multi_class", "multi_label"])
@pytest.mark.parametrize("method", ["full", *(pytest.param(m, marks=pytest.mark.long) for m in losses.METHODS[1:])])
def test_partial_batches(labels, method):
    """Texts that are not there change nothing, whatever stands in their place."""
    cfg = LossConfig(method=method, gamma=0.3)
    alone = losses.total(cfg, H[:4], labels[:4], head, STATES, KEY)[0]
    valid = jnp.arange(B) < 4
    for junk in (1.0, 1e3):
        padded = losses.total(cfg, jnp.where(valid[:, None], H, junk), labels, head, STATES, KEY, valid)[0]
        assert np.allclose(alone, padded, rtol=1e-5)


def test_sampled_partners():
    """A text with itself and some others; over all draws the mean is that of all pairs."""
    lam = losses.coefficients(losses.similarity(STATES, ONE))
    whole = losses.mixup(H, lam, ONE, head)
    assert np.allclose(losses.mixup(H, lam, ONE, head, offsets=losses.sample_offsets(KEY, B, 99)), whole, rtol=1e-5)
    each = [losses.mixup(H, lam, ONE, head, offsets=jnp.array([0, k])) for k in range(1, B)]
    assert np.std(each) > 0 and np.allclose(np.mean(each), whole, rtol=1e-5)
    offsets = np.asarray(losses.sample_offsets(KEY, 300, 16))
    assert len(set(offsets.tolist())) == 17 and offsets[0] == 0 and offsets.max() < 300
    cfg = LossConfig(max_batch=4, partners=2)
    assert np.isfinite(losses.total(cfg, H, ONE, head, STATES, KEY)[0])


def test_where_the_gradient_goes():
    """To the label states by SSL only; gDML lets it pass through the coefficients as well."""
    labels = LabelEmbeddings(TREE, HlrConfig(D), rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(labels)

    def largest(part, method, gamma=0.3):
        cfg = LossConfig(method=method, gamma=gamma)
        gradient = jax.jit(jax.grad(lambda state: losses.total(
            cfg, H, ONE, head, nnx.merge(graphdef, state)()[0], KEY)[1][part]))(state)
        return max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradient))

    assert largest("dml", "full") == 0 and largest("dml", "gdml") > 0
    assert largest("ssl", "full") > 0 and largest("ssl", "ssl") > 0


def test_the_total():
    cfg = LossConfig(gamma=0.25, tau=0.5)
    loss, parts = losses.total(cfg, H, MANY, head, STATES, KEY)
    assert np.allclose(loss, 0.75 * parts["dml"] + 0.25 * parts["ssl"])
    plain = losses.total(LossConfig(method="plain"), H, MANY, head, None, KEY)[0]
    assert np.allclose(plain, baselines.plain(head(H), MANY).mean())
    assert losses.total(LossConfig(method="dml"), H, MANY, head, STATES, KEY)[0] == parts["dml"]
    loss, parts = losses.total(LossConfig(method="ssl", gamma=0.25), H, MANY, head, STATES, KEY)
    assert np.allclose(loss, 0.75 * plain + 0.25 * parts["ssl"])
    with pytest.raises(UserError, match="method full needs the states of labels"):
        losses.total(cfg, H, MANY, head, None, KEY)
    for wrong, words in (({"method": "both"}, "'both' is not one of"), ({"gamma": 2.0}, "gamma 2.0 must be from 0"),
                         ({"tau": 0.0}, "tau 0.0 must be more than 0"), ({"partners": 0}, "partners 0 must be at")):
        with pytest.raises(UserError, match=words):
            LossConfig(**wrong)


# What Text2Tree is compared with

LOGITS = jnp.asarray(RNG.normal(size=(B, K)) * 3, jnp.float32)
COUNTS = np.array([50, 20, 5, 1])


def test_focal_by_loops():
    p = softmax(np.asarray(LOGITS, np.float64))
    expected = [-(1 - p[i, y]) ** 2 * np.log(p[i, y]) for i, y in enumerate(np.asarray(ONE))]
    assert np.allclose(baselines.focal(LOGITS, ONE), expected, rtol=1e-4)
    p, y = sigmoid(np.asarray(LOGITS, np.float64)), np.asarray(MANY)
    for gamma, alpha in ((0.5, 0.75), (3.0, 0.25)):
        each = [[-alpha * (1 - p[i, c]) ** gamma * np.log(p[i, c]) if y[i, c] else
                 -(1 - alpha) * p[i, c] ** gamma * np.log(1 - p[i, c]) for c in range(K)] for i in range(B)]
        assert np.allclose(baselines.focal(LOGITS, MANY, gamma, alpha), np.mean(each, 1), rtol=1e-4)
    sure = jnp.where(MANY > 0, 100.0, -100.0)
    assert np.isfinite(jax.grad(lambda x: baselines.focal(x, MANY, 0.5).sum())(sure)).all()


def test_distribution_balanced_by_loops():
    texts, x, y = 100, np.asarray(LOGITS, np.float64), np.asarray(MANY)
    expected = np.zeros((B, K))
    for i in range(B):
        total = sum(1 / COUNTS[c] for c in range(K) if y[i, c])
        for c in range(K):
            r = 1 / COUNTS[c] / total if total else np.inf
            weight = 0.1 + sigmoid(10 * (r - 0.05))
            z = x[i, c] - 0.05 * np.log(texts / COUNTS[c] - 1)
            z, weight = (z, weight) if y[i, c] else (2 * z, weight / 2)
            p = sigmoid(z) if y[i, c] else 1 - sigmoid(z)
            expected[i, c] = 0.5 * (1 - p) ** 2 * weight * -np.log(p)
    found = baselines.distribution_balanced(LOGITS, MANY, COUNTS, texts)
    assert np.allclose(found, expected.mean(1), rtol=1e-3, atol=1e-6) and np.isfinite(found).all()


def test_weights_of_classes():
    assert np.allclose(baselines.reweight(COUNTS).mean(), 1)
    assert np.allclose(baselines.reweight(COUNTS) * COUNTS, (baselines.reweight(COUNTS) * COUNTS)[0])
    assert np.allclose(baselines.reweight_official(COUNTS), 1 - COUNTS / 76)
    weights = baselines.class_balanced(COUNTS, 0.9)
    assert np.allclose(weights.sum(), K) and np.allclose(weights[3] / weights[2], (1 - 0.9**5) / (1 - 0.9))
    assert np.isfinite(baselines.reweight(np.array([3, 0]))).all()
    nll = losses.classification(LOGITS, ONE)
    assert np.allclose(baselines.plain(LOGITS, ONE, jnp.asarray(weights)), weights[np.asarray(ONE)] * nll)
    assert np.allclose(baselines.plain(LOGITS, MANY, jnp.ones(K)), baselines.plain(LOGITS, MANY), rtol=1e-6)
    early, late = (np.asarray(baselines.deferred(jnp.int32(step), 100, COUNTS)) for step in (79, 80))
    assert (early == 1).all() and np.allclose(late, baselines.class_balanced(COUNTS, 0.9999))
    assert [baselines.deferred_from(steps) for steps in (1, 2, 6, 10, 101)] == [0, 1, 5, 8, 81]  # the last step always


def test_margins_and_adjusted_logits():
    margins = 0.5 * (1 / COUNTS) ** 0.25
    true = np.eye(K)[np.asarray(ONE)]
    shifted = jnp.asarray(2 * (np.asarray(LOGITS) - margins * true), jnp.float32)
    assert np.allclose(baselines.margin(LOGITS, ONE, COUNTS, scale=2.0), losses.classification(shifted, ONE), rtol=1e-5)
    assert baselines.margin(LOGITS, MANY, COUNTS).shape == (B,)
    prior = jnp.asarray(np.log(COUNTS / 76), jnp.float32)
    assert np.allclose(baselines.logit_adjusted(LOGITS, ONE, COUNTS, 76), losses.classification(LOGITS + prior, ONE))
    odds = jnp.asarray(np.log(COUNTS / (100 - COUNTS)), jnp.float32)
    assert np.allclose(baselines.logit_adjusted(LOGITS, MANY, COUNTS, 100), losses.classification(LOGITS + odds, MANY))


def test_mixup_of_one_draw():
    found = baselines.mixup(KEY, H, ONE, head, 0.5)
    draw, order = jax.random.split(KEY)
    lam, partner = jax.random.beta(draw, 0.5, 0.5), jax.random.permutation(order, B)
    o = head(lam * H + (1 - lam) * H[partner])
    assert np.allclose(found, lam * losses.classification(o, ONE) + (1 - lam) * losses.classification(o, ONE[partner]))
    same = baselines.mixup(KEY, H[:1], ONE[:1], head)
    assert np.allclose(same, losses.classification(head(H[:1]), ONE[:1]), rtol=1e-6)


def test_heads_over_the_tree():
    targets = baselines.hierarchical_targets(np.asarray(MANY), TREE)
    assert targets.shape == (B, 8) and targets[2].sum() == 0
    assert [TREE.names[1 + c] for c in np.flatnonzero(targets[0])] == ["A", "B", "A1", "B2", "A1.1", "B2.2"]
    assert np.array_equal(targets[:, TREE.leaf_index - 1], MANY)
    assert np.array_equal(baselines.hierarchical_targets(np.array([1]), TREE)[0], targets[1])
    weight = jnp.asarray(RNG.normal(size=(D, 8)), jnp.float32)
    edges = [(1, 3), (2, 4), (3, 5), (3, 6), (4, 7), (4, 8)]
    expected = sum(((np.asarray(weight)[:, a - 1] - np.asarray(weight)[:, b - 1]) ** 2).sum() for a, b in edges) / 2
    assert np.allclose(baselines.recursive_regulariser(weight, TREE, 1.0), expected, rtol=1e-5)


def test_oversampling():
    labels = np.array([0] * 7 + [1] * 2 + [3])
    chosen = baselines.oversample(labels, seed=1)
    assert np.bincount(labels[chosen]).tolist() == [7, 7, 0, 7] and set(chosen) == set(range(10))
    assert np.array_equal(chosen, baselines.oversample(labels, seed=1))
    assert not np.array_equal(chosen, baselines.oversample(labels, seed=2))
    with pytest.raises(UserError, match="oversampling needs one class a text"):
        baselines.oversample(np.zeros((3, 2)))

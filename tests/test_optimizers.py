"""Optimizers of a run: what Muon and AdamW each take, and what decays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train.optimizers import make_optimizer
from train.settings import OptimizerConfig

RATE, DECAY = 0.1, 0.5


def params(rng):
    """Two layers stacked, as models have them, with attention in and out, experts, a router, biases; an embedding."""
    shapes = {"attention": {"query": (2, 12, 2, 3), "out": (2, 2, 3, 12)}, "experts": {"up": (2, 4, 12, 8)},
              "router": {"weight": (2, 12, 4)}, "norm": {"scale": (2, 12)}, "up_bias": (2, 4, 8)}
    groups = jax.tree.map(lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32), {"0": shapes},
                          is_leaf=lambda x: isinstance(x, tuple))
    return {"groups": groups, "embed": jnp.asarray(rng.normal(size=(20, 12)), jnp.float32),
            "final_norm": jnp.ones(12), "labels": {"nodes": jnp.ones((5, 12))}}


def first_step(name, tree, grads, decay=0.0):
    cfg = OptimizerConfig(name=name, learning_rate=RATE, schedule="constant", warmup=0, weight_decay=decay, clip=0.0)
    optimizer = make_optimizer(cfg, 10, spared="labels")
    return optimizer.update(grads, optimizer.init(tree), tree)[0]


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_only_matrices_decay(name):
    """Without a gradient nothing but the decay moves a parameter, by rate x decay of itself."""
    tree = params(np.random.default_rng(0))
    moved = first_step(name, tree, jax.tree.map(jnp.zeros_like, tree), DECAY)
    still = lambda part, like: not np.asarray(part).any() and np.asarray(like).any()  # noqa: E731
    layers, like = moved["groups"]["0"], tree["groups"]["0"]
    assert still(moved["final_norm"], tree["final_norm"]) and still(moved["labels"]["nodes"], tree["labels"]["nodes"])
    assert still(layers["norm"]["scale"], like["norm"]["scale"])
    for got, weight in ((moved["embed"], tree["embed"]), (layers["attention"]["out"], like["attention"]["out"]),
                        (layers["experts"]["up"], like["experts"]["up"]),
                        (layers["router"]["weight"], like["router"]["weight"])):
        np.testing.assert_allclose(got, -RATE * DECAY * weight, rtol=1e-6)


def test_muon_orthogonalises_each_matrix_of_a_stack():
    """Jordan et al. 2024: five Newton-Schulz steps bring all singular values near one; times 0.2 √max(m, n) they are as
    large as AdamW's (Liu et al. 2025, eq. 4)."""
    rng = np.random.default_rng(1)
    tree, grads = params(rng), params(rng)
    layers = first_step("muon", tree, grads)["groups"]["0"]
    matrices = {
        "query": (layers["attention"]["query"].reshape(2, 12, 6), grads["groups"]["0"]["attention"]["query"]),
        "out": (layers["attention"]["out"].reshape(2, 6, 12), grads["groups"]["0"]["attention"]["out"]),
        "up": (layers["experts"]["up"], grads["groups"]["0"]["experts"]["up"])}
    for name, (moved, gradient) in matrices.items():
        moved = np.asarray(moved, np.float64).reshape(-1, *moved.shape[-2:])
        gradient = np.asarray(gradient, np.float64).reshape(moved.shape)
        for step, slope in zip(moved, gradient, strict=True):
            u, _, v = np.linalg.svd(slope, full_matrices=False)
            size = RATE * 0.2 * np.sqrt(max(step.shape))
            inside = u.T @ step @ v.T / -size  # in the gradient's own axes: a diagonal of about ones
            assert (np.abs(np.diag(inside) - 1) < 0.35).all(), name
            assert np.abs(inside - np.diag(np.diag(inside))).max() < 0.05, name


def test_muon_leaves_the_rest_to_adam():
    """Embeddings, norms, routers and biases, in stacks too. Its first step is the sign of the gradient; with Nesterov's
    momentum (Dozat 2016) 1 + b / (1 + b) times that."""
    rng = np.random.default_rng(2)
    tree, grads = params(rng), params(rng)
    moved, first = first_step("muon", tree, grads), 1 + 0.9 / 1.9
    layers, slopes = moved["groups"]["0"], grads["groups"]["0"]
    for got, slope in ((moved["embed"], grads["embed"]), (layers["norm"]["scale"], slopes["norm"]["scale"]),
                       (layers["router"]["weight"], slopes["router"]["weight"]),
                       (layers["up_bias"], slopes["up_bias"])):
        np.testing.assert_allclose(got, -RATE * first * np.sign(slope), rtol=1e-3)


def test_the_rate_of_muon_follows_its_schedule():
    tree = {"groups": {"0": {"up": {"weight": jnp.ones((1, 4, 4))}}}}
    cfg = OptimizerConfig("muon", RATE, schedule="constant", warmup=0.4, weight_decay=DECAY, clip=0.0)
    optimizer = make_optimizer(cfg, 10)
    state, zero, moved = optimizer.init(tree), jax.tree.map(jnp.zeros_like, tree), []
    for _ in range(6):
        updates, state = optimizer.update(zero, state, tree)
        moved.append(-float(updates["groups"]["0"]["up"]["weight"][0, 0, 0]) / (RATE * DECAY))
    assert moved[0] < moved[1] < moved[2] and moved[4] == moved[5] == pytest.approx(1)

"""Routers: the oracle is a ceiling, training helps, shared experts are left alone (moe_split.md section 7, test 7)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodels.errors import UserError
from jaxmodels.experts import routers
from jaxmodels.experts.layer import apply_experts, dense_ffn
from jaxmodels.experts.split import split_ffn

D, F, E, T = 16, 96, 8, 400


@pytest.fixture(scope="module", params=["relu", "glu"])
def case(request):
    rng = np.random.default_rng(0)
    directions = rng.normal(size=(E, D))
    rows = directions[rng.permutation(np.repeat(np.arange(E), F // E))] + 0.5 * rng.normal(size=(F, D))
    ffn = {"up": rows.T / np.sqrt(D), "down": rng.normal(size=(F, D)) / np.sqrt(F)}
    activation = "relu"
    if request.param == "glu":
        ffn, activation = ffn | {"gate": ffn["up"], "up": rng.normal(size=(D, F)) / np.sqrt(D)}, "silu"
    ffn = {k: jnp.asarray(v, jnp.float32) for k, v in ffn.items()}
    experts, split = split_ffn(ffn, num_experts=E)
    x = jnp.asarray(rng.normal(size=(T, D)), jnp.float32)
    oracle = routers.OracleRouter(experts, activation)
    everyone = {
        "oracle": oracle,
        "similarity": routers.SimilarityRouter(jnp.asarray(split.centres)),
        "linear": routers.LinearRouter.create(split),
        "mlp": routers.MLPRouter.create(split),
        "random": routers.RandomRouter(jax.random.key(0), E),
        "mlp trained": routers.train_router(routers.MLPRouter.create(split), x, oracle.scores(x), epochs=10)[0],
    }
    return ffn, experts, split, activation, x, everyone


def test_scores_under_jit(case):
    *_, x, everyone = case
    for router in everyone.values():
        scores = jax.jit(lambda router, x: router.scores(x))(router, x)
        assert scores.shape == (T, E) and scores.dtype == jnp.float32
        assert np.allclose(scores, router.scores(x), atol=1e-4)


def test_oracle_mass_is_a_ceiling(case):
    *_, x, everyone = case
    truth = everyone["oracle"].scores(x)
    assert (truth >= 0).all()
    masses = [float(routers.captured_mass(truth, routers.select(truth, k))) for k in range(1, E + 1)]
    assert (np.diff(masses) > 0).all() and masses[-1] == pytest.approx(1, abs=1e-6)
    for router in everyone.values():
        scores = router.scores(x)
        for k in range(1, E):
            assert float(routers.captured_mass(truth, routers.select(scores, k))) <= masses[k - 1] + 1e-6


def test_oracle_error_is_not_above_random(case):
    ffn, experts, _, activation, x, everyone = case
    dense, _ = dense_ffn(ffn, x, activation=activation)
    run = jax.jit(lambda w, x, active: apply_experts(w, x, activation=activation, active=active)[0])
    for k in (1, 3, 6):
        error = {}
        for name in ("oracle", "random"):
            y = run(experts, x, routers.select(everyone[name].scores(x), k))
            error[name] = float(routers.relative_error(y, dense))
        assert error["oracle"] <= error["random"]
    y = run(experts, x, routers.select(everyone["random"].scores(x), E))
    assert float(routers.relative_error(y, dense)) < 1e-6


def test_oracle_scores_follow_their_definition(case):
    ffn, _, split, activation, x, everyone = case
    _, h = dense_ffn(ffn, x, activation=activation)
    amount = np.asarray(h) if activation == "relu" else np.abs(h) * np.linalg.norm(ffn["down"], axis=1)
    expected = np.stack([amount[:, split.labels == e].sum(1) for e in range(E)], 1)
    assert np.allclose(everyone["oracle"].scores(x), expected, rtol=1e-4, atol=1e-5)


def test_untrained_routers_follow_their_definition(case):
    _, _, split, _, x, everyone = case
    unit = np.asarray(x) / np.linalg.norm(x, axis=1, keepdims=True)
    distance = np.linalg.norm(unit[:, None] - split.centres, axis=2)
    assert np.allclose(everyone["similarity"].scores(x), -distance, atol=1e-5)
    assert np.allclose(everyone["linear"].scores(x), unit @ split.centres.T, atol=1e-5)
    assert np.allclose(everyone["mlp"].scores(x), np.tanh(unit @ split.centres.T), atol=1e-5)


@pytest.mark.parametrize("kind", [routers.LinearRouter, routers.MLPRouter])
def test_training_captures_more_on_unseen_tokens(case, kind):
    # From noise: the centres, where training really starts, are hard to beat on clusters as clear as these.
    _, _, split, _, _, everyone = case
    rng = np.random.default_rng(3)
    oracle = everyone["oracle"]
    before = jax.tree.map(lambda w: jnp.asarray(rng.normal(size=w.shape) / 4, jnp.float32), kind.create(split))
    many = jnp.asarray(np.random.default_rng(2).normal(size=(10 * T, D)), jnp.float32)
    after, history = routers.train_router(before, many, oracle.scores(many), epochs=15, batch_size=256)
    assert len(history) == 16 and min(history) < history[0]
    unseen = jnp.asarray(np.random.default_rng(1).normal(size=(T, D)), jnp.float32)
    truth = oracle.scores(unseen)
    mass = [float(routers.captured_mass(truth, routers.select(r.scores(unseen), 2))) for r in (before, after)]
    hits = [float(routers.recall(truth, routers.select(r.scores(unseen), 2))) for r in (before, after)]
    assert mass[1] > mass[0] + 0.05 and hits[1] > hits[0] + 0.1


def test_training_keeps_the_best_epoch(case):
    _, _, split, _, x, everyone = case
    start = routers.LinearRouter.create(split)
    kept, history = routers.train_router(start, x, everyone["oracle"].scores(x), epochs=3, learning_rate=1e3)
    assert min(history) == history[0], "a learning rate that ruins the router"
    assert kept is start


def test_recall_counts_hits():
    truth = jnp.array([[4.0, 3.0, 2.0, 1.0], [1.0, 2.0, 3.0, 4.0]])
    assert float(routers.recall(truth, jnp.array([[1, 0], [0, 3]]))) == pytest.approx(0.75)
    assert float(routers.captured_mass(truth, jnp.array([[1, 0], [0, 3]]))) == pytest.approx((0.7 + 0.5) / 2)
    assert float(routers.captured_mass(jnp.zeros((2, 4)), jnp.array([[0], [1]]))) == 1.0


def test_block_routing_shares_a_choice_inside_a_block():
    scores = jnp.asarray(np.random.default_rng(2).random((2, 10, E)), jnp.float32)
    chosen = routers.select_blocks(scores, 3, 4)
    assert chosen.shape == (2, 10, 3)
    for b in range(2):
        for start in (0, 4, 8):
            block = np.asarray(chosen[b, start : start + 4])
            best = np.argsort(-np.asarray(scores[b, start : start + 4]).sum(0))[:3]
            assert (block == block[0]).all() and set(block[0]) == set(best)
    assert np.array_equal(routers.select_blocks(scores, 3, 1), routers.select(scores, 3))


def test_analytic_router_and_shared_experts():
    rng = np.random.default_rng(3)
    names = ("gate", "up")
    ffn = {n: jnp.asarray(rng.normal(size=(D, F)), jnp.float32) for n in names}
    ffn |= {f"{n}_bias": jnp.asarray(rng.normal(size=F), jnp.float32) for n in names}
    ffn["down"] = jnp.asarray(rng.normal(size=(F, D)), jnp.float32)
    x = jnp.asarray(rng.normal(size=(T, D)), jnp.float32)
    _, split = split_ffn(ffn, num_experts=E, method="markers", activations=np.asarray(x), num_shared=2)
    router = routers.AnalyticRouter.create(ffn, split, "silu")
    scores = jax.jit(lambda r, x: r.scores(x))(router, x)
    _, h = dense_ffn(ffn, x, activation="silu")
    assert np.allclose(scores[:, 2:], np.abs(h)[:, split.representatives], rtol=1e-4, atol=1e-5)
    chosen = np.asarray(routers.select(scores, 3, num_shared=2))
    assert chosen.min() >= 2 and all(len(set(row)) == 3 for row in chosen)
    with pytest.raises(UserError, match="by markers"):
        routers.AnalyticRouter.create(ffn, split_ffn(ffn, num_experts=E)[1], "silu")


def test_select_refuses_impossible_k():
    for k in (0, E + 1):
        with pytest.raises(UserError, match="must lie in"):
            routers.select(jnp.ones((2, E)), k)
    with pytest.raises(UserError, match="must lie in 1..6"):
        routers.select(jnp.ones((2, E)), 7, num_shared=2)

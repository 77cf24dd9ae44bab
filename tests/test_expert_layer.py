"""The expert layer: dispatch against a loop over experts, gradients, empty places, shared experts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodels.errors import UserError
from jaxmodels.experts.layer import apply_experts as eager_apply_experts
from jaxmodels.experts.layer import dense_ffn
from jaxmodels.kernels import expert_ffn
from jaxmodels.kernels.activations import ACTIVATIONS
from jaxmodels.kernels.expert_ffn import dispatch

D, E, S = 8, 6, 4
apply_experts = jax.jit(
    eager_apply_experts, static_argnames=("activation", "num_shared", "implementation", "return_hidden")
)


def make_experts(rng, gated=True, biases=True):
    names = ("gate", "up") if gated else ("up",)
    experts = {n: rng.normal(size=(E, D, S)) / np.sqrt(D) for n in names}
    experts["down"] = rng.normal(size=(E, S, D)) / np.sqrt(S)
    if biases:
        experts |= {f"{n}_bias": rng.normal(size=(E, S)) for n in names}
        experts["down_bias"] = rng.normal(size=D)
    return {k: jnp.asarray(v, jnp.float32) for k, v in experts.items()}


def expert_loop(experts, x, active, weights, activation):
    """The definition: every expert on every token, weighted by what the token gives it."""
    y = jnp.broadcast_to(experts.get("down_bias", jnp.zeros(D)), x.shape)
    for e in range(E):
        one = {k: w[e] for k, w in experts.items() if k != "down_bias"}
        amount = jnp.where(active == e, weights, 0).sum(1, keepdims=True)
        y = y + amount * dense_ffn(one, x, activation=activation)[0]
    return y


def choices(rng, tokens, k):
    return jnp.asarray(np.stack([rng.permutation(E)[:k] for _ in range(tokens)]), jnp.int32)


@pytest.mark.parametrize(
    "gated, activation, implementation",
    [(True, "silu", "reference"), (True, "silu", "xla"), *((False, a, None) for a in sorted(ACTIVATIONS))],
)
def test_values_and_gradients_match_a_loop(gated, activation, implementation):
    rng = np.random.default_rng(0)
    experts = make_experts(rng, gated)
    x, weights = jnp.asarray(rng.normal(size=(9, D)), jnp.float32), jnp.asarray(rng.random((9, 3)), jnp.float32)
    active = choices(rng, 9, 3).at[2, 1].set(E).at[5].set(E)  # empty places; token 5 uses no expert
    target = jnp.asarray(rng.normal(size=(9, D)), jnp.float32)

    def layer(experts, x, weights):
        y, _ = apply_experts(
            experts, x, activation=activation, active=active, weights=weights, implementation=implementation
        )
        return (y * target).sum(), y

    def loop(experts, x, weights):
        y = expert_loop(experts, x, active, weights, activation)
        return (y * target).sum(), y

    gradient, y = jax.jit(jax.grad(layer, (0, 1, 2), has_aux=True))(experts, x, weights)
    expected_gradient, expected = jax.jit(jax.grad(loop, (0, 1, 2), has_aux=True))(experts, x, weights)
    assert np.allclose(y, expected, atol=2e-6)
    assert np.allclose(y[5], experts["down_bias"])
    for got, wanted in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected_gradient), strict=True):
        assert np.linalg.norm(got - wanted) <= 3e-6 * np.linalg.norm(wanted)


def test_every_expert_active_is_the_exact_decomposition():
    rng = np.random.default_rng(1)
    experts = make_experts(rng)
    x = jnp.asarray(rng.normal(size=(2, 5, D)), jnp.float32)
    active = jnp.broadcast_to(jnp.arange(E), (2, 5, E))
    y, h = apply_experts(experts, x, activation="silu", return_hidden=True)
    routed, routed_h = apply_experts(experts, x, activation="silu", active=active, return_hidden=True)
    assert np.linalg.norm(routed - y) <= 1e-6 * np.linalg.norm(y)
    assert routed_h.shape == (2, 5, E, S) and np.allclose(routed_h, h, atol=1e-6)


def test_hidden_is_masked_where_an_expert_did_not_run():
    rng = np.random.default_rng(2)
    experts = make_experts(rng)
    x, active = jnp.asarray(rng.normal(size=(7, D)), jnp.float32), choices(rng, 7, 2).at[3, 0].set(E)
    _, everything = apply_experts(experts, x, activation="silu", return_hidden=True)
    _, h = apply_experts(experts, x, activation="silu", active=active, return_hidden=True)
    ran = (active[:, :, None] == jnp.arange(E)).any(1)
    assert np.allclose(h, everything * ran[..., None], atol=1e-6)
    assert (np.asarray(h)[~np.asarray(ran)] == 0).all()
    assert apply_experts(experts, x, activation="silu", active=active)[1] is None


def test_shared_experts_always_run():
    rng = np.random.default_rng(3)
    experts = make_experts(rng)
    x = jnp.asarray(rng.normal(size=(7, D)), jnp.float32)
    active = jnp.asarray(np.stack([2 + rng.permutation(E - 2)[:2] for _ in range(7)]), jnp.int32)
    both = jnp.concatenate([jnp.broadcast_to(jnp.arange(2), (7, 2)), active], 1).astype(jnp.int32)
    y, h = apply_experts(experts, x, activation="silu", active=active, num_shared=2, return_hidden=True)
    expected, expected_h = apply_experts(experts, x, activation="silu", active=both, return_hidden=True)
    assert np.allclose(y, expected, atol=2e-6) and np.allclose(h, expected_h, atol=1e-6)


def test_permuting_experts_with_their_indices_changes_nothing():
    rng = np.random.default_rng(4)
    experts, order = make_experts(rng), rng.permutation(E)
    x, active = jnp.asarray(rng.normal(size=(9, D)), jnp.float32), choices(rng, 9, 3)
    moved = {k: w if k == "down_bias" else w[order] for k, w in experts.items()}
    y, _ = apply_experts(experts, x, activation="silu", active=active)
    y2, _ = apply_experts(moved, x, activation="silu", active=jnp.asarray(np.argsort(order), jnp.int32)[active])
    assert np.allclose(y, y2, atol=2e-6)


@pytest.mark.parametrize("recompute", [False, True])
def test_blocks_of_tokens_travel_together(recompute):
    """Per-block routing is per-token routing with repeated choices; recomputing changes no gradient."""
    rng = np.random.default_rng(8)
    experts = make_experts(rng)
    del experts["down_bias"]
    x, weights = jnp.asarray(rng.normal(size=(12, D)), jnp.float32), jnp.asarray(rng.random((4, 2)), jnp.float32)
    active = choices(rng, 4, 2).at[1, 0].set(E)

    def loss(experts, x, weights, block):
        spread = (active, weights) if block > 1 else (a.repeat(3, 0) for a in (active, weights))
        return (expert_ffn(experts, x, *spread, block=block, recompute=recompute and block > 1) ** 2).sum()

    got = jax.jit(jax.grad(loss, (0, 1, 2)), static_argnums=3)(experts, x, weights, 3)
    wanted = jax.jit(jax.grad(loss, (0, 1, 2)), static_argnums=3)(experts, x, weights, 1)
    for one, two in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert np.linalg.norm(one - two) <= 2e-6 * np.linalg.norm(two)
    with pytest.raises(UserError, match="block=5"):
        expert_ffn(experts, x, active, weights, block=5)


def test_recomputing_keeps_less():
    rng = np.random.default_rng(9)
    wide = {name: jnp.asarray(rng.normal(size=shape), jnp.float32)
            for name, shape in (("gate", (4, 8, 64)), ("up", (4, 8, 64)), ("down", (4, 64, 8)))}
    x, active = jnp.ones((96, 8)), jnp.asarray(rng.integers(4, size=(96, 1)), jnp.int32)

    def kept(recompute):
        _, residuals = jax.vjp(lambda w, x: expert_ffn(w, x, active, recompute=recompute), wide, x)
        return sum(leaf.size for leaf in jax.tree.leaves(residuals))

    assert kept(True) <= kept(False) - 2 * 96 * 64


def test_dispatch_is_a_stable_sort():
    active = jnp.array([[2, 0], [0, 2], [3, 2], [E, 0]], jnp.int32)
    plan = dispatch(active, E)
    assert plan.group_sizes.tolist() == [3, 0, 3, 1, 0, 0]
    assert plan.order.tolist() == [1, 2, 7, 0, 3, 5, 4, 6]
    assert plan.token.tolist() == [0, 1, 3, 0, 1, 2, 2, 3]
    assert np.array_equal(plan.order[plan.inverse], np.arange(8))


def test_nan_token_spoils_only_itself():
    rng = np.random.default_rng(5)
    experts, active = make_experts(rng), choices(rng, 9, 3)
    x = jnp.asarray(rng.normal(size=(9, D)), jnp.float32)
    clean, _ = apply_experts(experts, x, activation="silu", active=active)
    y, _ = apply_experts(experts, x.at[4].set(jnp.nan), activation="silu", active=active)
    others = np.delete(np.arange(9), 4)
    assert np.array_equal(y[others], clean[others]) and np.isnan(y[4]).all()


def test_bfloat16_combines_in_float32():
    rng = np.random.default_rng(6)
    experts = make_experts(rng)
    x, active = jnp.asarray(rng.normal(size=(50, D)), jnp.float32), choices(rng, 50, 4)
    half = {k: w.astype(jnp.bfloat16) for k, w in experts.items()}
    y, _ = apply_experts(half, x.astype(jnp.bfloat16), activation="silu", active=active)
    exact, _ = apply_experts(
        {k: w.astype(jnp.float32) for k, w in half.items()}, x.astype(jnp.bfloat16).astype(jnp.float32),
        activation="silu", active=active,
    )  # fmt: skip
    assert y.dtype == jnp.bfloat16
    assert np.linalg.norm(y.astype(jnp.float32) - exact) <= 5e-3 * np.linalg.norm(exact)


def test_errors():
    experts, x = make_experts(np.random.default_rng(7)), jnp.ones((3, D))
    with pytest.raises(UserError, match="silu"):
        apply_experts(experts, x, activation="swish")
    with pytest.raises(UserError, match="weights need active"):
        apply_experts(experts, x, activation="silu", weights=jnp.ones((3, 2)))

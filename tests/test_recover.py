"""Closed-form recovery against ordinary least squares, and that it does repair."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodels.errors import UserError
from jaxmodels.experts import recover

T, F, D = 600, 20, 6


def activations(seed=0):
    """Correlated, with means: what makes both repairs worth doing."""
    rng = np.random.default_rng(seed)
    h = rng.normal(size=(T, 8)) @ rng.normal(size=(8, F)) + 0.3 * rng.normal(size=(T, F)) + rng.normal(size=F)
    return h.astype(np.float32), rng.normal(size=(F, D)).astype(np.float32), rng.normal(size=D).astype(np.float32)


KEEP = np.arange(F) % 3 != 0


def error(y, target):
    return np.linalg.norm(y - target) / np.linalg.norm(target - target.mean(0))


def test_moments_stream_and_mask():
    h, w, _ = activations()
    y = h @ w
    mask = np.random.default_rng(1).random(T) < 0.7
    spoiled = np.where(mask[:, None], h, np.nan)
    whole = recover.moments(jnp.asarray(h[mask]), y=jnp.asarray(y[mask]))
    parts = recover.zero_moments(F, D)
    step = jax.jit(lambda total, x, m, y: recover.add_moments(total, recover.moments(x, m, y)))
    for start in range(0, T, 150):
        part = slice(start, start + 150)
        shape = (3, 50)
        parts = step(
            parts, jnp.asarray(spoiled[part]).reshape(*shape, F), jnp.asarray(mask[part]).reshape(shape),
            jnp.asarray(y[part]).reshape(*shape, D),
        )  # fmt: skip
    assert float(parts.count) == mask.sum()
    for a, b in zip(parts, whole, strict=True):
        assert np.allclose(a, b, rtol=1e-4, atol=1e-2)
    assert np.allclose(whole.xx, h[mask].T @ h[mask], rtol=1e-4, atol=1e-2)


def test_bias_compensation_adds_the_mean_of_the_dropped():
    h, w, b = activations()
    fit = recover.bias_compensation(recover.moments(jnp.asarray(h)), w, b, KEEP)
    assert np.array_equal(fit.down, w[KEEP])
    assert np.allclose(fit.bias, b + h[:, ~KEEP].mean(0) @ w[~KEEP], atol=1e-4)
    y = h @ w + b
    pruned = h[:, KEEP] @ w[KEEP] + b
    repaired = h[:, KEEP] @ fit.down + fit.bias
    assert error(repaired, y) < error(pruned, y)
    assert fit.residual == pytest.approx(error(repaired, y) ** 2, rel=1e-3)


def test_refit_is_the_ridge_solution():
    h, w, b = activations()
    ridge = 1e-2
    fit = recover.refit_down(recover.moments(jnp.asarray(h)), w, b, KEEP, ridge=ridge)
    x = (h - h.mean(0)).astype(np.float64)[:, KEEP]
    dropped = (h - h.mean(0)).astype(np.float64)[:, ~KEEP] @ w[~KEEP]
    system = x.T @ x
    change = np.linalg.solve(system + ridge * np.trace(system) / len(system) * np.eye(len(system)), x.T @ dropped)
    assert np.allclose(fit.down, w[KEEP] + change, atol=1e-3)
    assert np.allclose(fit.bias, b + h.mean(0) @ w - h[:, KEEP].mean(0) @ fit.down, atol=1e-3)


def test_refit_beats_bias_beats_masking_on_new_tokens():
    h, w, b = activations()
    stats = recover.moments(jnp.asarray(h[:400]))
    new, y = h[400:], h[400:] @ w + b
    fits = [recover.bias_compensation(stats, w, b, KEEP), recover.refit_down(stats, w, b, KEEP)]
    masked, bias, refit = (
        error(new[:, KEEP] @ down + beta, y) for down, beta, *_ in [(w[KEEP], b), *fits]
    )
    assert refit < 0.5 * bias < 0.5 * masked
    assert fits[1].residual < fits[0].residual


def test_everything_kept_changes_nothing():
    h, w, b = activations()
    fit = recover.refit_down(recover.moments(jnp.asarray(h)), w, b, np.ones(F, bool))
    assert np.array_equal(fit.down, w)
    assert np.allclose(fit.bias, b, atol=1e-5) and fit.residual < 1e-10


def test_indices_give_the_new_order():
    h, w, b = activations()
    stats, order = recover.moments(jnp.asarray(h)), np.random.default_rng(2).permutation(np.flatnonzero(KEEP))
    by_mask, by_index = recover.refit_down(stats, w, b, KEEP), recover.refit_down(stats, w, b, order)
    assert np.allclose(by_index.down, by_mask.down[np.searchsorted(np.flatnonzero(KEEP), order)], atol=1e-5)
    assert np.allclose(by_index.bias, by_mask.bias, atol=1e-5)


def test_general_refit_agrees_with_the_dense_one():
    h, w, b = activations()
    dense = recover.refit_down(recover.moments(jnp.asarray(h)), w, b, KEEP)
    general = recover.refit(recover.moments(jnp.asarray(h[:, KEEP]), y=jnp.asarray(h @ w + b)), w[KEEP])
    assert np.allclose(general.down, dense.down, atol=2e-3)
    assert np.allclose(general.bias, dense.bias, atol=2e-3)
    assert general.residual == pytest.approx(dense.residual, rel=1e-2)


def test_a_target_that_repairs_earlier_layers():
    # Two residual layers. The second is fitted to what the dense stream is after it, given the pruned stream.
    rng = np.random.default_rng(3)
    u = [rng.normal(size=(D, F)) / 2 for _ in range(2)]
    w = [rng.normal(size=(F, D)) / 5 for _ in range(2)]
    x = rng.normal(size=(T, D))
    act = lambda z: np.maximum(z, 0)  # noqa: E731
    dense1 = x + act(x @ u[0]) @ w[0]
    dense2 = dense1 + act(dense1 @ u[1]) @ w[1]
    pruned1 = x + act(x @ u[0])[:, KEEP] @ w[0][KEEP]
    kept = act(pruned1 @ u[1])[:, KEEP]
    fit_of = lambda y: recover.refit(recover.moments(jnp.asarray(kept), y=jnp.asarray(y)), w[1][KEEP])  # noqa: E731
    stream, own = fit_of(dense2 - pruned1), fit_of(act(dense1 @ u[1]) @ w[1])
    assert error(pruned1 + kept @ stream.down + stream.bias, dense2) < error(
        pruned1 + kept @ own.down + own.bias, dense2
    )


def test_dead_neurons_do_not_break_the_solve():
    h, w, b = activations()
    h[:, 1] = 0
    fit = recover.refit_down(recover.moments(jnp.asarray(h)), w, b, KEEP)
    assert np.isfinite(fit.down).all() and np.isfinite(fit.bias).all()
    silent = recover.refit_down(recover.moments(jnp.zeros((10, F))), w, b, KEEP)
    assert np.array_equal(silent.down, w[KEEP]) and np.allclose(silent.bias, b) and silent.residual == 0


def test_errors():
    h, w, b = activations()
    stats = recover.moments(jnp.asarray(h))
    with pytest.raises(UserError, match="no tokens"):
        recover.refit_down(recover.zero_moments(F), w, b, KEEP)
    with pytest.raises(UserError, match="above 0"):
        recover.refit_down(stats, w, b, KEEP, ridge=0.0)
    twin = jnp.asarray(np.tile(1000 * h[:, :1], (1, F)) * (1 + 1e-4 * np.arange(F)))
    with pytest.raises(UserError, match="too small"):
        recover.refit_down(recover.moments(twin), w, b, KEEP, ridge=1e-14)
    with pytest.raises(UserError, match="at least one"):
        recover.refit_down(stats, w, b, np.zeros(F, bool))
    with pytest.raises(UserError, match="NaN"):
        recover.refit_down(recover.moments(jnp.asarray(h).at[0, 0].set(jnp.nan)), w, b, KEEP)
    with pytest.raises(UserError, match="20 neurons"):
        recover.refit_down(stats, w[:5], b, KEEP)
    with pytest.raises(UserError, match="prior"):
        recover.refit(stats, w)


def test_weights_count_tokens_several_times():
    h, _, _ = activations()
    times = np.arange(len(h)) % 3
    weighted = recover.moments(jnp.asarray(h), weight=jnp.asarray(times, jnp.float32))
    repeated = recover.moments(jnp.asarray(np.repeat(h, times, axis=0)))
    for a, b in zip(weighted, repeated, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3)


def test_removal_order_is_backward_elimination():
    """Against brute force: at every step the neuron goes whose loss the best refit of the others repairs most."""
    rng = np.random.default_rng(3)
    h = rng.normal(size=(400, 8)) @ rng.normal(size=(8, 8))
    w = rng.normal(size=(8, 5))
    order = recover.removal_order(recover.moments(jnp.asarray(h)), w, ridge=1e-9, chunk=1)
    target, alive, expected = (h - h.mean(0)) @ w, list(range(8)), []

    def left(kept):
        x = h[:, kept] - h[:, kept].mean(0)
        return ((target - x @ np.linalg.lstsq(x, target, rcond=None)[0]) ** 2).sum() if kept else (target**2).sum()

    while alive:
        errors = [left([k for k in alive if k != j]) for j in alive]
        expected.append(alive.pop(int(np.argmin(errors))))
    assert order.tolist() == expected
    short = recover.removal_order(recover.moments(jnp.asarray(h)), w, ridge=1e-9, chunk=1, until=3)
    assert short[:5].tolist() == expected[:5] and sorted(short[5:]) == sorted(expected[5:])


def test_a_copied_neuron_is_free_to_drop():
    rng = np.random.default_rng(0)
    h = rng.normal(size=(300, 6))
    h[:, 4] = 2 * h[:, 1]
    w = 10 * rng.normal(size=(6, 3))
    order = recover.removal_order(recover.moments(jnp.asarray(h)), w, ridge=1e-6, chunk=1)
    assert order[0] in (1, 4)


def test_keep_last_keeps_the_first_layer_of_a_deep_model_whole():
    deep = np.tile(np.arange(40), (21, 1))
    keep = recover.keep_last(deep, 0.5)
    assert keep[0].all() and (keep[1:].sum(1) == 19).all() and keep[1:, 21:].all()
    assert abs(keep.mean() - 0.5) < 1 / 40
    shallow = recover.keep_last(deep[:2], 0.5)
    assert (shallow.sum(1) == 20).all() and shallow[:, 20:].all()
    assert recover.keep_last(deep, 1.0).all()
    for share in (0.001, 0.0, 1.5):
        with pytest.raises(UserError, match=f"share {share}"):
            recover.keep_last(deep, share)

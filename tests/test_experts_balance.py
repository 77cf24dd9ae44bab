"""The balancing bias of a trained router, its statistics and losses, against NumPy and against what they are for."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.test_util import check_grads
from safetensors.numpy import load_file

import jaxmodels
from jaxmodels import Decoder, DecoderConfig, Taps, UserError
from jaxmodels.decoder.config import ExpertConfig
from jaxmodels.decoder.convert import config_from_hf, config_to_hf
from jaxmodels.experts import balance
from jaxmodels.experts.models import unroll
from jaxmodels.experts.module import Experts, RouterBias
from jaxmodels.hub.models import build, leaves
from tests.tiny_models import random_model

E, K = 5, 2
BALANCED = DecoderConfig.tiny(ffn_widths=(12,) * 2, family="mixtral",
                              experts=ExpertConfig(num_experts=E, top_k=K, balance_bias=True))  # fmt: skip
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 97, (2, 6)), jnp.int32)


def statistics(logits, mask, bias=None, top_k=K):
    bias = jnp.zeros(logits.shape[-1]) if bias is None else jnp.asarray(bias, jnp.float32)
    return balance.router_statistics(bias, jnp.asarray(logits, jnp.float32), jnp.asarray(mask), top_k=top_k)


def draw(rng, batch=3, tokens=4):
    mask = rng.random((batch, tokens)) < 0.7
    mask[0, 0] = True
    return rng.normal(size=(batch, tokens, E)), mask


def brute_force(logits, mask, bias=0.0):
    """Token by token, in float64."""
    load, probability, z = np.zeros(E), np.zeros(E), 0.0
    for row in logits[mask]:
        scores = np.exp(row) / np.exp(row).sum()
        load[np.argsort(-(scores + bias))[:K]] += 1
        probability += scores
        z += np.log(np.exp(row).sum()) ** 2
    n = mask.sum()
    return load, probability, z, E * (load / (n * K) * probability / n).sum(), z / n


def test_statistics_and_losses_match_numpy():
    rng = np.random.default_rng(1)
    logits, mask = draw(rng)
    bias = rng.normal(size=E) * 0.2
    load, probability, z, balancing, z_loss = brute_force(logits, mask, bias)
    # Padding does not count, whatever stands there.
    stats = statistics(np.where(mask[..., None], logits, np.nan), mask, bias)
    assert stats["tokens"] == mask.sum() and stats["load"].tolist() == load.tolist()
    assert np.allclose(stats["probability"], probability, rtol=1e-6) and np.allclose(stats["z"], z, rtol=1e-6)
    assert np.allclose(balance.load_balancing_loss(stats, K), balancing, rtol=1e-6)
    assert np.allclose(balance.router_z_loss(stats), z_loss, rtol=1e-6)


def test_sums_add_over_micro_batches():
    logits, mask = draw(np.random.default_rng(2), batch=4)
    halves = [statistics(logits[i : i + 2], mask[i : i + 2]) for i in (0, 2)]
    whole = statistics(logits, mask)
    for name, value in whole.items():
        assert np.allclose(halves[0][name] + halves[1][name], value, rtol=1e-6), name


def test_balance_is_the_optimum():
    one = statistics(np.eye(E)[None] * 50, np.ones((1, E), bool), top_k=1)  # each token sure of an expert of its own
    assert np.isclose(balance.load_balancing_loss(one, 1), 1, rtol=1e-5)
    collapsed = statistics(np.tile(50 * np.eye(E)[0], (1, 7, 1)), np.ones((1, 7), bool), top_k=1)
    assert np.isclose(balance.load_balancing_loss(collapsed, 1), E, rtol=1e-5)
    nobody = statistics(np.zeros((1, 2, E)), np.zeros((1, 2), bool))
    assert balance.load_balancing_loss(nobody, K) == 0 and balance.router_z_loss(nobody) == 0


def test_gradients_match_finite_differences_and_skip_padding():
    logits, mask = draw(np.random.default_rng(3))
    logits = jnp.asarray(logits, jnp.float32)
    for loss in (lambda stats: balance.load_balancing_loss(stats, K), balance.router_z_loss):
        # A small step: no token changes its choice, so the counts are the constants that the gradient takes them for.
        fn = jax.jit(lambda logits: loss(statistics(logits, mask)))  # noqa: B023
        check_grads(fn, (logits,), 1, ["rev"], eps=1e-3, rtol=2e-2, atol=2e-3)
        gradient = jax.grad(fn)(jnp.where(mask[..., None], logits, jnp.nan))
        assert (np.asarray(gradient)[~mask] == 0).all() and np.isfinite(gradient).all()
        assert np.abs(np.asarray(gradient)[mask]).max() > 0


def test_load_metrics():
    even = balance.load_metrics(jnp.full((2, E), 7))
    assert np.allclose(even["max_ratio"], 1) and np.allclose(even["variation"], 0)
    assert np.allclose(even["dead"], 0) and np.allclose(even["entropy"], 1)
    loads = np.array([1000, 1, 500, 0, 499])
    got = balance.load_metrics(jnp.asarray(loads))
    share = loads[loads > 0] / loads.sum()
    assert np.isclose(got["max_ratio"], 1000 / 400) and got["dead"] == 2
    assert np.isclose(got["variation"], loads.std() / loads.mean(), rtol=1e-5)
    assert np.isclose(got["entropy"], -(share * np.log(share)).sum() / np.log(E), rtol=1e-5)
    nothing = balance.load_metrics(jnp.zeros(E))
    assert all(value == 0 for value in nothing.values())


def test_the_bias_balances_skewed_logits():
    """Logits that prefer the same experts for every token: repeated updates even the load out."""
    rng = np.random.default_rng(4)
    logits = rng.normal(size=(4, 64, E)) + np.array([2.0, 1.0, 0, -1, -2])
    mask = np.ones((4, 64), bool)

    def update(bias, _):
        load = statistics(logits, mask, bias)["load"]
        return balance.bias_update(bias, load), balance.load_metrics(load)["max_ratio"]

    bias, ratios = jax.jit(lambda: jax.lax.scan(update, jnp.zeros(E), length=600))()
    # The sign keeps stepping to and fro around balance: near it, not at it.
    assert ratios[0] > 2 and max(ratios[-20:]) < 1.15
    assert (np.diff(bias) > 0).all(), "the more an expert is preferred, the lower its bias"
    assert balance.bias_update(jnp.zeros((2, 3)), jnp.array([[3, 3, 3], [0, 1, 2]])).tolist() == [
        [0, 0, 0], [pytest.approx(1e-3), 0, pytest.approx(-1e-3)]]  # fmt: skip


@pytest.fixture(scope="module")
def models():
    """A model with zero biases, the same without biases, and the same with random ones."""
    biased = random_model(BALANCED)
    arrays = leaves(biased)
    plain = {path: leaf for path, leaf in arrays.items() if path[-2:] != ("router", "bias")}
    zero = plain | {path: jnp.zeros_like(leaf) for path, leaf in arrays.items() if path not in plain}
    without = dataclasses.replace(BALANCED, experts=dataclasses.replace(BALANCED.experts, balance_bias=False))
    return build(BALANCED, zero), build(without, plain), biased


def test_zero_bias_changes_nothing(models):
    zero, plain, biased = models
    expected, _ = plain(TOKENS)
    assert np.array_equal(zero(TOKENS)[0], expected)
    assert not np.allclose(biased(TOKENS)[0], expected, atol=1e-3)
    assert np.allclose(unroll(biased)(TOKENS)[0], biased(TOKENS)[0], atol=1e-5)


def test_bias_chooses_but_does_not_weigh(models):
    """A bias that forces the choice gives the output of a router whose other experts are out of reach."""
    zero, plain, _ = models
    forced = jnp.array([9.0, 0, 0, 9, 0])
    set_bias = {path: jnp.broadcast_to(forced, leaf.shape) if path[-2:] == ("router", "bias") else leaf
                for path, leaf in leaves(zero).items()}  # fmt: skip
    masked = Taps(add={"router.logits": jnp.where(forced > 0, 0, -1e9)[None, None, None]})
    assert np.allclose(build(BALANCED, set_bias)(TOKENS)[0], plain(TOKENS, taps=masked)[0], atol=1e-5)


def test_statistics_as_a_tap_have_a_layer_axis(models):
    _, _, biased = models
    bias = biased.groups[0].ffn.router["bias"][...]
    fn = jax.tree_util.Partial(functools.partial(balance.router_statistics, top_k=K), bias)
    mask = jnp.ones(TOKENS.shape, bool).at[1, 4:].set(False)
    stats = biased(TOKENS, mask=mask, taps=Taps(reduce={"router.logits": fn}))[1]["router.logits"]
    logits = biased(TOKENS, mask=mask, taps=Taps(record=("router.logits",)))[1]["router.logits"]
    assert stats["load"].shape == (2, E) and stats["tokens"].tolist() == [10] * 2
    assert (stats["load"].sum(-1) == 10 * K).all()
    for layer in range(2):
        assert np.array_equal(stats["load"][layer], statistics(logits[layer], mask, bias[layer])["load"])


def test_optimizers_do_not_see_the_bias(models):
    _, _, biased = models
    _, params, rest = nnx.split(biased, nnx.Param, ...)
    paths = [path for path, _ in nnx.to_flat_state(rest)]
    assert paths == [("groups", 0, "ffn", "router", "bias")]
    variable = biased.groups[0].ffn.router["bias"]
    assert isinstance(variable, RouterBias) and not isinstance(variable, nnx.Param)
    narrow = dataclasses.replace(BALANCED, param_dtype="bfloat16")
    abstract = nnx.eval_shape(lambda: Decoder(narrow, rngs=nnx.Rngs(0))).groups[0].ffn.router["bias"]
    assert abstract.get_metadata()["out_sharding"] == ("layers", None)
    assert abstract.shape == (2, E) and abstract.dtype == jnp.float32
    assert (Experts(narrow.experts, 4, 3, rngs=nnx.Rngs(0)).router["bias"][...] == 0).all()


@pytest.mark.parametrize("family, qk_norm", [("olmoe", "full"), ("mixtral", None), ("qwen3_moe", "head")])
def test_files_round_trip(tmp_path, family, qk_norm):
    model = random_model(dataclasses.replace(BALANCED, family=family, qk_norm=qk_norm))
    folder = jaxmodels.save(model, tmp_path / "biased")
    assert json.loads((folder / "config.json").read_text())["jaxmodels"] == {"balance_bias": True}
    tensors = load_file(folder / "model.safetensors")
    extra = [name for name in tensors if name.endswith(".router.bias")]
    assert len(extra) == 2 and tensors[extra[0]].shape == (E,)
    back = jaxmodels.load(folder)
    assert back.cfg.experts == BALANCED.experts
    for path, leaf in leaves(model).items():
        assert np.array_equal(leaves(back)[path], leaf), path
    narrow = jaxmodels.load(folder, "bfloat16")
    for one in (narrow, unroll(narrow)):
        router = one.groups[0].ffn.router
        assert router["weight"].dtype == jnp.bfloat16 and router["bias"].dtype == jnp.float32
        assert np.array_equal(router["bias"][0], back.groups[0].ffn.router["bias"][0])
    # Without the bias the files are as before: nothing of ours in them.
    config = dataclasses.replace(model.cfg, experts=dataclasses.replace(BALANCED.experts, balance_bias=False))
    kept = {path: leaf for path, leaf in leaves(model).items() if path[-1] != "bias"}
    without = jaxmodels.save(build(config, kept), tmp_path / "plain")
    assert set(load_file(without / "model.safetensors")) == set(tensors) - set(extra)
    assert "jaxmodels" not in json.loads((without / "config.json").read_text())


def test_wrong_settings_say_so():
    with pytest.raises(UserError, match="balance_bias needs the trained router softmax, not all"):
        ExpertConfig(num_experts=4, top_k=2, router="all", balance_bias=True)
    for wrong in ({"shared": 1}, {"block": 2}):  # a shared expert among the chosen ones would count twice
        with pytest.raises(UserError, match="a trained router, softmax, takes shared 0 and block 1"):
            ExpertConfig(num_experts=4, top_k=2, **wrong)
    good = config_to_hf(BALANCED)
    for bad in (1, "yes", None, []):
        with pytest.raises(UserError, match="true or false is needed"):
            config_from_hf(good | {"jaxmodels": {"balance_bias": bad}})
    with pytest.raises(UserError, match="model with trained experts"):
        config_from_hf(config_to_hf(DecoderConfig.tiny()) | {"jaxmodels": {"balance_bias": True}})

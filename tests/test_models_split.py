"""Whole decoders into experts and into smaller decoders: exactness, files, and what is refused."""

import dataclasses
import json

import numpy as np
import pytest
from safetensors.numpy import load_file

import jaxmodels
from jaxmodels import DecoderConfig, Taps, UserError
from jaxmodels.experts.models import ffn_layers, unroll, with_down
from jaxmodels.hub.models import leaves
from tests.tiny_models import EXPERT, close, random_model

L, D, F, E, S = 2, 32, 24, 4, 6
CONFIG = DecoderConfig.tiny(ffn_widths=(F,) * L, mlp_bias=True, tied=True)
STATISTICS = {
    "kmeans": {}, "random": {},
    "coactivation": {"activations": np.random.default_rng(1).normal(size=(L, 64, D)).astype(np.float32)},
    "markers": {"activations": np.random.default_rng(1).normal(size=(L, 64, D)).astype(np.float32)},
    "importance": {"importance": np.random.default_rng(1).random((L, E, F))},
}  # fmt: skip
ROUTERS = {"oracle": "kmeans", "similarity": "kmeans", "linear": "kmeans", "mlp": "kmeans", "random": "kmeans",
           "markers": "markers"}


@pytest.fixture(scope="module")
def dense():
    return random_model(CONFIG)


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(0, 97, (2, 9)).astype(np.int32)


@pytest.fixture(scope="module")
def logits(dense, tokens):
    return np.asarray(dense(tokens)[0])


def same(a, b):
    """Equal parameters, to the bit, and equal configuration."""
    a_leaves, b_leaves = leaves(a), leaves(b)
    assert a_leaves.keys() == b_leaves.keys()
    assert all(np.array_equal(a_leaves[path], b_leaves[path]) for path in a_leaves)


@pytest.mark.parametrize("method", STATISTICS)
def test_all_experts_on_is_the_dense_model(dense, tokens, logits, method):
    experts, split = jaxmodels.split(dense, expert_size=S, method=method, **STATISTICS[method])
    close(experts(tokens)[0], logits, 1e-5)
    assert split.labels.shape == split.perm.shape == (L, F) and split.centres.shape == (L, E, D)
    for layer, weights, whole in zip(split.layers, ffn_layers(experts), ffn_layers(dense), strict=True):
        assert (np.bincount(layer.labels) == S).all()
        assert np.array_equal(np.asarray(weights["down"]).reshape(F, D), np.asarray(whole["down"])[layer.perm])
    again, _ = jaxmodels.split(dense, expert_size=S, method=method, **STATISTICS[method])
    same(experts, again)


def test_the_router_by_markers_asks_neurons_with_their_biases(dense, tokens):
    every, split = jaxmodels.split(dense, expert_size=S, method="markers", router="markers", top_k=E,
                                   **STATISTICS["markers"])
    scores = every(tokens, taps=Taps(record=("router.logits",)))[1]["router.logits"]
    h = dense(tokens, taps=Taps(record=("ffn.hidden",)))[1]["ffn.hidden"]
    for layer, ours, theirs in zip(split.layers, scores, h, strict=True):
        close(ours, np.abs(theirs[..., layer.representatives]), 1e-5)


@pytest.mark.long
@pytest.mark.parametrize("router", ROUTERS)
def test_routers(dense, tokens, logits, tmp_path, router):
    """All experts chosen: the dense model. Some: what masking the others gives; saved and loaded to the bit."""
    options = {"expert_size": S, "method": ROUTERS[router], "router": router, **STATISTICS[ROUTERS[router]]}
    every, _ = jaxmodels.split(dense, top_k=E, **options)
    close(every(tokens)[0], logits, 1e-5)
    some, _ = jaxmodels.split(dense, top_k=2, block=3, **options)
    out = np.asarray(some(tokens)[0])
    tapped, aux = some(tokens, taps=Taps(record=("ffn.hidden",)))
    close(tapped, out)  # every expert computed and masked equals the chosen ones through the grouped product
    on = np.asarray(aux["ffn.hidden"] != 0).any(-1)
    assert (on.sum(-1) == 2).all() and np.abs(out - logits).max() > 0.01 * logits.std()
    assert (on[:, :, 0:9:3] == on[:, :, 1:9:3]).all() and (on[:, :, 0:9:3] == on[:, :, 2:9:3]).all()
    loaded = jaxmodels.load(jaxmodels.save(some, tmp_path / "model"))
    same(loaded, some)
    assert loaded.cfg == some.cfg and np.array_equal(loaded(tokens)[0], out)


@pytest.mark.long
def test_shared_experts(dense, tokens, logits, tmp_path):
    options = {"num_experts": E, "method": "markers", "router": "markers", "num_shared": 1, **STATISTICS["markers"]}
    close(jaxmodels.split(dense, **options)[0](tokens)[0], logits, 1e-5)
    model, split = jaxmodels.split(dense, top_k=1, **options)
    out, aux = model(tokens, taps=Taps(record=("ffn.hidden",)))
    on = np.asarray(aux["ffn.hidden"] != 0).any(-1)
    assert on[..., 0].all() and (on.sum(-1) == 2).all() and all(s.num_shared == 1 for s in split.layers)
    close(model(tokens)[0], out)
    assert np.array_equal(jaxmodels.load(jaxmodels.save(model, tmp_path / "m"))(tokens)[0], model(tokens)[0])


def test_sizes_that_do_not_divide(dense, tokens, logits, tmp_path):
    with pytest.raises(UserError, match="expert_size = 7 does not divide 24 .* choose from 1, 2, 3, 4, 6, 8, 12, 24"):
        jaxmodels.split(dense, expert_size=7)
    padded, split = jaxmodels.split(dense, expert_size=7, pad=True)
    assert padded.cfg.ffn_widths == (7, 7) and padded.cfg.experts.num_experts == 4 and split.labels.shape == (L, 28)
    close(padded(tokens)[0], logits, 1e-5)
    loaded = jaxmodels.load(jaxmodels.save(padded, tmp_path / "m"))
    same(loaded, padded)
    keep = np.ones((L, 4), bool)
    close(jaxmodels.prune(padded, keep)(tokens)[0], logits, 1e-5)


def test_pruning_is_masking(dense, tokens, tmp_path):
    """Experts of a split model, neurons of a dense one and a mask through the taps: one function."""
    split_model, split = jaxmodels.split(dense, expert_size=S)
    keep = np.array([[True, False, True, False], [False, False, True, False]])
    neurons = np.zeros((L, F), bool)
    for layer in range(L):
        neurons[layer, split.perm[layer][np.repeat(keep[layer], S)]] = True
    expected = dense(tokens, taps=Taps(mask={"ffn.hidden": neurons[:, None, None]}))[0]
    experts_masked = split_model(tokens, taps=Taps(mask={"ffn.hidden": keep[:, None, None, :, None]}))[0]
    by_experts, by_neurons = jaxmodels.prune(split_model, keep), jaxmodels.prune(dense, neurons)
    for model in (by_experts, by_neurons):
        assert model.cfg.ffn_widths == (12, 6) and model.cfg.experts is None
        close(model(tokens)[0], expected, 1e-5)
    close(experts_masked, expected, 1e-5)
    assert np.abs(np.asarray(expected) - np.asarray(dense(tokens)[0])).max() > 0.01
    # Files: smaller tensors, the widths in config.json, the same numbers to the bit.
    folder = jaxmodels.save(by_experts, tmp_path / "pruned")
    assert json.loads((folder / "config.json").read_text())["jaxmodels"] == {"ffn_widths": [12, 6]}
    assert load_file(folder / "model.safetensors")["model.layers.1.mlp.up_proj.weight"].shape == (6, D)
    loaded = jaxmodels.load(folder)
    same(loaded, by_experts)
    assert np.array_equal(loaded(tokens)[0], by_experts(tokens)[0])


def test_equal_widths_after_pruning_load_stacked_or_unrolled(dense, tmp_path):
    small = jaxmodels.prune(dense, np.arange(F)[None].repeat(L, 0) < 10)
    folder = jaxmodels.save(small, tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    assert config["intermediate_size"] == 10 and "jaxmodels" not in config  # just a smaller dense model
    assert jaxmodels.load(folder).cfg.groups == ((0, 2),)
    unrolled = jaxmodels.load(folder, scan_layers=False)
    assert unrolled.cfg.groups == ((0, 1), (1, 2))
    same(unrolled, small)
    same(unroll(jaxmodels.load(folder)), small)


def test_split_layers_of_unequal_width(dense, tokens, tmp_path):
    """A pruned model can be split again, into equally many experts a layer."""
    keep = np.arange(F)[None] < np.array([[24], [12]])
    small = jaxmodels.prune(dense, keep)
    with pytest.raises(UserError, match="num_experts"):
        jaxmodels.split(small, expert_size=S)
    model, split = jaxmodels.split(small, num_experts=E)
    assert model.cfg.ffn_widths == (6, 3) and [s.expert_size for s in split.layers] == [6, 3]
    close(model(tokens)[0], small(tokens)[0], 1e-5)
    same(jaxmodels.load(jaxmodels.save(model, tmp_path / "split")), model)


def test_refitted_down_projections_round_trip(tokens, tmp_path):
    """Recovery gives a layer an output bias that the family does not have; it is saved under the jaxmodels key."""
    plain = random_model(dataclasses.replace(CONFIG, mlp_bias=False))
    rng = np.random.default_rng(2)
    down, bias = rng.normal(size=(L, F, D)).astype(np.float32), rng.normal(size=(L, D)).astype(np.float32)
    model = with_down(plain, down, bias)
    _, aux = model(tokens, taps=Taps(record=("ffn.hidden", "ffn.output")))
    np.testing.assert_allclose(aux["ffn.output"], np.einsum("lbtf,lfd->lbtd", aux["ffn.hidden"], down)
                               + bias[:, None, None], rtol=1e-3, atol=1e-4)
    loaded = jaxmodels.load(jaxmodels.save(model, tmp_path / "m"))
    assert loaded.cfg.down_bias
    same(loaded, model)


@pytest.mark.parametrize("options, words", [
    ({}, "num_experts or expert_size"),
    ({"expert_size": 6, "num_experts": 4}, "one of the two"),
    ({"num_experts": 0}, "num_experts = 0 must lie in 1..24"),
    ({"expert_size": -1}, "must lie in 1..24"),
    ({"expert_size": 6, "method": "kmean"}, "kmean"),
    ({"expert_size": 6, "method": "coactivation"}, "needs activations"),
    ({"expert_size": 6, "method": "importance"}, "needs importance"),
    ({"expert_size": 6, "method": "markers", "activations": np.ones((1, 5, D))}, "1 layers, the model has 2"),
    ({"expert_size": 6, "router": "best"}, "'best' is not one of all, oracle"),
    ({"expert_size": 6, "router": "softmax"}, "'softmax' is not one of all, oracle"),
    ({"expert_size": 6, "router": "markers"}, "needs method markers"),
    ({"expert_size": 6, "router": "linear", "top_k": 5}, "top_k 5 must lie in 1..4"),
    ({"expert_size": 6, "router": "linear", "top_k": 0}, "top_k 0"),
    ({"expert_size": 6, "router": "linear", "block": 0}, "block 0"),
    ({"expert_size": 6, "num_shared": 1}, "num_shared = 1 needs method"),
    ({"expert_size": 6, "seed": -1}, "seed = -1 must be at least 0"),
])  # fmt: skip
def test_bad_splits(dense, options, words):
    searched = []
    with pytest.raises(UserError, match=words) as caught:
        jaxmodels.split(dense, **options, progress=lambda done, layers: searched.append(done))
    assert not searched
    assert "\n" not in str(caught.value)


def test_models_with_experts_are_not_split_again(dense):
    model, _ = jaxmodels.split(dense, expert_size=S, method="random")
    for has_experts in (model, random_model(EXPERT)):
        with pytest.raises(UserError, match="experts already"):
            jaxmodels.split(has_experts, expert_size=2)
    with pytest.raises(UserError, match="trained router"):
        jaxmodels.prune(random_model(EXPERT), np.ones((3, 5), bool))


@pytest.mark.parametrize("keep, words", [
    (np.ones((L, E + 1), bool), r"bool\[2, 5\]; bool\[2, 4\] is needed"),
    (np.ones((L + 1, E), bool), r"bool\[3, 4\]"),
    (np.ones(E, bool), r"bool\[4\]"),
    (np.ones((L, E)), r"float64\[2, 4\]"),
    (np.zeros((L, E), bool), "at least one"),
])  # fmt: skip
def test_bad_keep(dense, keep, words):
    model, _ = jaxmodels.split(dense, expert_size=S, method="random")
    with pytest.raises(UserError, match=words) as caught:
        jaxmodels.prune(model, keep)
    assert "\n" not in str(caught.value)
    if not keep.any():
        with pytest.raises(UserError, match="no neuron"):
            jaxmodels.prune(dense, np.zeros((L, F), bool))

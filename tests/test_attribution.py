"""Integrated gradients: reference arrays, completeness, closed forms, invariances, bad input."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax.tree_util import Partial

import jaxmodels
from analysis.attribution import (
    RULES,
    SITES,
    class_logit,
    class_probability,
    integrated_gradients,
    nodes,
    record,
    token_probability,
)
from jaxmodels import Decoder, DecoderConfig, UserError
from jaxmodels.cnn_cnn_lstm.config import CnnCnnLstmConfig
from jaxmodels.cnn_cnn_lstm.network import END, START, CnnCnnLstm, is_word
from jaxmodels.esm.config import EsmConfig
from jaxmodels.esm.model import Esm

POINTS = tuple(SITES.values())
SOME = ("ffn.hidden", "attention.key")  # where all six would prove no more: each is a program to compile
CLASS = {"output": "class"}


@pytest.fixture
def golden(data_folder):
    folder = data_folder / "golden_esm_tiny"
    if not folder.exists():
        pytest.skip("golden_esm_tiny is not in JAXMODELS_DATA")
    arrays = np.load(folder / "attributions.npz")
    tokens = arrays["input_ids"].reshape(1, -1)
    return jaxmodels.load(folder, pool="cls"), jnp.asarray(tokens, jnp.int32), arrays


def tiny(**overrides):
    return Esm(EsmConfig.tiny(classes=4, **overrides), rngs=nnx.Rngs(0))


def proteins(*lengths):
    rng = np.random.default_rng(0)
    rows = np.ones((len(lengths), max(lengths) + 2), np.int32)
    for row, length in zip(rows, lengths, strict=True):
        row[:length + 2] = [0, *rng.integers(4, 24, length), 2]
    return jnp.asarray(rows)


def flat(a):
    return np.asarray(a).reshape(*a.shape[:3], -1)


@pytest.mark.long
def test_the_reference_arrays_of_single_sites(golden):
    model, tokens, arrays = golden
    # Probability or logit: data, so that both are one program a site.
    target = lambda share: Partial(_mixed, jnp.float32(share), class_probability(arrays["target"].reshape(1)),  # noqa: E731
                                   class_logit(arrays["target"].reshape(1)))
    for name, share in (("prob", 1), ("logit", 0)):
        found = integrated_gradients(model, tokens, point=POINTS, target=target(share), steps=64, options=CLASS,
                                     max_steps=64)
        for site, point in SITES.items():
            values = flat(found.values[point])[:, 0]
            for layer in range(3):
                wanted = arrays[f"{name}/{layer}.{site}"]
                change = float(np.subtract(*arrays[f"{name}/{layer}.{site}/f1_f0"]))
                assert np.linalg.norm(values[layer] - wanted) <= 1e-4 * np.linalg.norm(wanted) + 1e-6, (site, layer)
                assert abs(float(found.end[0] - found.start[point][layer, 0]) - change) < 1e-5
                assert float(found.error[point][layer, 0]) <= 1e-5, "completeness at 64 nodes"
        # no query or no key: uniform attention
        totals = [flat(found.values[SITES[site]]).sum((1, 2, 3)) for site in ("q", "k")]
        np.testing.assert_allclose(*totals, atol=1e-5)
        if name == "prob":
            masked = jnp.where((tokens == 0) | (tokens == 2), tokens, 32)
            found = integrated_gradients(model, tokens, point=POINTS, target=target(1), steps=64, options=CLASS,
                                         baseline=record(model, masked, POINTS, CLASS), max_steps=64)
            for site, point in SITES.items():
                for layer in range(3):
                    wanted = arrays[f"captum_mask_baseline/{layer}.{site}"]
                    np.testing.assert_allclose(flat(found.values[point])[layer, 0], wanted, atol=1e-5)


def _mixed(share, probability, logit, output):
    return share * probability(output) + (1 - share) * logit(output)


@pytest.mark.long
def test_the_rule_of_the_original_program(golden):
    model, tokens, arrays = golden
    target = class_probability(arrays["target"].reshape(1))
    found = integrated_gradients(model, tokens, point="ffn.hidden", target=target, rule="left", options=CLASS,
                                 tolerance=9)
    for layer in range(3):
        np.testing.assert_allclose(flat(found.values)[layer, 0], arrays[f"prob/{layer}.fc1/left20"], atol=2e-6)


def test_the_joint_path(golden):
    model, tokens, arrays = golden
    target = class_probability(arrays["target"].reshape(1))
    found = integrated_gradients(model, tokens, point=POINTS, target=target, mode="gate", steps=64, options=CLASS)
    for site, point in SITES.items():
        for layer in range(3):
            wanted = arrays[f"gate/{layer}.{site}"]
            assert np.linalg.norm(flat(found.values[point])[layer, 0] - wanted) <= 1e-4 * np.linalg.norm(wanted) + 1e-6
    assert float(found.error[0]) <= 1e-5
    assert abs(float(found.end[0] - found.start[0]) - float(np.subtract(*arrays["gate/f1_f0"]))) < 1e-5


@pytest.mark.parametrize("rule", ["gauss", *(pytest.param(r, marks=pytest.mark.long) for r in RULES[1:])])
def test_one_node_is_exact_where_the_target_is_linear(rule):
    """The last residual stream, read by a linear target without a norm between: attribution is slope times change."""
    model = tiny(norm_placement="post")
    slope = jax.random.normal(jax.random.key(0), (32,))
    target = Partial(lambda slope, hidden: (hidden @ slope).sum(1), slope)
    tokens = proteins(5, 5)
    found = integrated_gradients(model, tokens, point="residual", target=target, rule=rule,
                                 options={"output": "hidden"}, steps=2 if rule == "trapezoid" else 1, max_steps=1)
    last = model.forward(tokens, output="hidden")[0]
    np.testing.assert_allclose(found.values[-1], last * slope, rtol=1e-5, atol=1e-6)


def test_rules_integrate_polynomials():
    for rule, degree in (("gauss", 9), ("midpoint", 1), ("trapezoid", 1), ("left", 0)):
        x, w = nodes(rule, 5)
        assert np.isclose(w.sum(), 1) and np.isclose((w * x**degree).sum(), 1 / (degree + 1))


def test_targets_of_other_examples_are_the_same_program():
    for first, second in ((class_probability([0]), class_probability([1])), (class_logit([0]), class_logit([1])),
                          (token_probability([0], [5]), token_probability([1], [6]))):
        assert jax.tree.structure(first) == jax.tree.structure(second), "what differs compiles again in every call"
    logits = jnp.array([[1.0, 3.0]])
    assert class_logit([1])(logits) == 3 and class_probability([1])(logits) == pytest.approx(1 / (1 + np.exp(-2)))


@pytest.mark.long
@pytest.mark.parametrize("mode", ["site", "gate", "conductance"])
def test_chunks_batches_padding_and_token_sums_change_nothing(mode):
    model, tokens = tiny(), proteins(9, 4, 7)
    call = lambda ids, labels, **more: integrated_gradients(  # noqa: E731
        model, ids, point=SOME, target=class_probability(labels), mode=mode, options=CLASS, steps=6, max_steps=6,
        **more)
    whole = call(tokens, [0, 1, 2])
    for chunk in (1, 4):
        for a, b in zip(*map(jax.tree.leaves, (whole, call(tokens, [0, 1, 2], chunk=chunk))), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-6)
    alone = call(tokens[1:2, :6], [1])
    summed = call(tokens, [0, 1, 2], tokens="sum")
    residues = (tokens > 3) & (tokens != 1)
    counted = call(tokens, [0, 1, 2], tokens="sum", counted=residues)
    for point in SOME:
        values = np.asarray(whole.values[point])
        np.testing.assert_allclose(alone.values[point][:, 0], values[:, 1, :6], atol=1e-6)
        assert not values[:, 1, 6:].any(), "padding gets nothing"
        np.testing.assert_allclose(summed.values[point], values.sum(2), atol=1e-6)
        some = np.where(np.asarray(residues).reshape(1, 3, -1, *(1,) * (values.ndim - 3)), values, 0).sum(2)
        np.testing.assert_allclose(counted.values[point], some, atol=1e-6)
    for a, b in zip(*map(jax.tree.leaves, (whole.error, counted.error)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.long
def test_a_permuted_layer_permutes_its_scores_and_a_dead_neuron_gets_nothing():
    model, tokens = tiny(), proteins(8)
    order = np.random.default_rng(1).permutation(48)
    state = nnx.to_pure_dict(nnx.state(model))
    ffn = state["groups"][0]["ffn"]
    ffn["down"] = ffn["down"].at[:, 5].set(0)
    nnx.update(model, nnx.State(state))
    before = integrated_gradients(model, tokens, point="ffn.hidden", target=class_logit([1]), options=CLASS)
    ffn |= {"up": ffn["up"][..., order], "up_bias": ffn["up_bias"][:, order], "down": ffn["down"][:, order]}
    nnx.update(model, nnx.State(state))
    after = integrated_gradients(model, tokens, point="ffn.hidden", target=class_logit([1]), options=CLASS)
    np.testing.assert_allclose(after.values, before.values[..., order], atol=1e-6)
    assert not np.asarray(before.values)[..., 5].any() and np.asarray(before.values)[..., 6].all((0, 1)).any()


def test_poor_examples_get_more_nodes_and_the_others_keep_theirs():
    model, tokens = tiny(), proteins(6, 9)
    # The first example's target turns many times on the way, the second's hardly bends.
    target = Partial(lambda k, logits: jnp.sin(k * logits.sum(1)), jnp.array([2.0, 0.01]))
    found = integrated_gradients(model, tokens, point="attention.value", target=target, mode="gate", options=CLASS,
                                 steps=2, tolerance=1e-2, max_steps=64)
    few = integrated_gradients(model, tokens, point="attention.value", target=target, mode="gate", options=CLASS,
                               steps=2, tolerance=1e-2, max_steps=2)
    assert found.steps[0] > 2 and found.error[0] < few.error[0]
    assert found.steps[1] < found.steps[0]
    if found.steps[1] == 2:
        np.testing.assert_array_equal(found.values[:, 1], few.values[:, 1])


@pytest.mark.long
def test_memory_does_not_grow_with_the_number_of_nodes():
    from analysis import attribution

    model, tokens = tiny(), proteins(60)
    graphdef, state = nnx.split(model)
    aux = record(model, tokens, POINTS)
    base = {p: jnp.zeros((1,) * a.ndim) for p, a in aux.items()}
    sizes = [attribution._gate.lower((graphdef, (("output", "class"),)), POINTS, "each", state, {"tokens": tokens},
                                     class_logit([0]), aux, base, None, *attribution._chunks(nodes("gauss", steps), 2)
                                     ).compile().memory_analysis().temp_size_in_bytes for steps in (4, 64)]
    one = sum(a.nbytes for a in aux.values())
    assert sizes[0] == sizes[1] < 100 * one  # the program has room for 256 chunks: none keeps its gradients


@pytest.mark.long
def test_sharded_over_devices_it_is_the_same():
    model, tokens = tiny(), proteins(*range(3, 11))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    cut = jax.device_put(tokens, NamedSharding(mesh, PartitionSpec("data")))
    for mode in ("site", "gate"):
        call = lambda tokens: integrated_gradients(  # noqa: E731
            model, tokens, point=SOME, target=class_logit(np.arange(8) % 4), mode=mode, options=CLASS, tokens="sum",  # noqa: B023
            steps=4, max_steps=4)
        for a, b in zip(*map(jax.tree.leaves, (call(tokens), call(cut))), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.long
def test_the_decoder_and_layers_of_unequal_width():
    cfg = dataclasses.replace(DecoderConfig.tiny(), scan_layers=True)
    tokens = jnp.arange(12, dtype=jnp.int32).reshape(2, 6)
    target = token_probability([5, 5], [7, 8])
    for widths in ((48,) * 3, (48, 16, 48)):
        model = Decoder(dataclasses.replace(cfg, ffn_widths=widths), rngs=nnx.Rngs(0))
        for mode in ("site", "gate"):
            found = integrated_gradients(model, tokens, point=("ffn.hidden", "attention.key"), target=target, mode=mode,
                                         steps=32)
            for error in jax.tree.leaves(found.error):
                assert (np.asarray(error) < 1e-6).all()
        assert not np.asarray(found.values["ffn.hidden"])[1, ..., widths[1]:].any()


@pytest.mark.long
def test_the_tagger():
    model = CnnCnnLstm(CnnCnnLstmConfig.tiny(), rngs=nnx.Rngs(0))
    words = jnp.array([[START, 7, 8, 9, END, 0], [START, 8, 6, END, 0, 0]], jnp.int32)
    inputs = {"words": words, "chars": jnp.where(is_word(words)[..., None], jnp.arange(4, 8), 0),
              "tags": jnp.array([[0, 1, 2, 0, 0, 0], [0, 3, 0, 0, 0, 0]], jnp.int32)}
    for mode in ("site", "gate"):
        found = integrated_gradients(model, inputs, point=("word.conv", "char.conv", "decoder.state"),
                                     target=token_probability([2, 1], [2, 3]), mode=mode, steps=32)
        for error in jax.tree.leaves(found.error):  # ReLU and the maximum over characters bend the path
            assert (np.asarray(error) < 1e-4).all()
        assert max(np.abs(found.end - start).max() for start in jax.tree.leaves(found.start)) > 1e-2


@pytest.mark.long
def test_baselines_of_inputs_that_say_nothing():
    model, tokens = tiny(), proteins(7, 5)
    special = tokens < 3
    call = lambda baseline: integrated_gradients(  # noqa: E731
        model, tokens, point=("ffn.hidden",), target=class_probability([0, 3]), options=CLASS, steps=8, mode="gate",
        baseline=baseline)
    masked = record(model, jnp.where(special, tokens, 32), ("ffn.hidden",))
    for a, b in zip(*map(jax.tree.leaves, (call("mask"), call(masked))), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    padded = record(model, {"tokens": jnp.where(special, tokens, 1), "mask": tokens != 1}, ("ffn.hidden",))
    for a, b in zip(*map(jax.tree.leaves, (call("pad"), call(padded))), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    assert np.abs(call("pad").start - call("mask").start).max() > 1e-5
    decoder = Decoder(DecoderConfig.tiny(), rngs=nnx.Rngs(0))
    with pytest.raises(UserError, match="mask token"):
        integrated_gradients(decoder, tokens, point="ffn.hidden", target=token_probability([5, 5], [7, 8]),
                             baseline="mask")


@pytest.mark.long
def test_the_embedding_and_the_residual_stream():
    model, tokens = tiny(), proteins(7, 5)
    target = class_probability([0, 3])
    residual = integrated_gradients(model, tokens, point=("embedding", "residual"), target=target, options=CLASS,
                                    steps=64)
    np.testing.assert_allclose(residual.values["embedding"][0], residual.values["residual"][0], atol=1e-6)
    # Near zero the norms make the path too steep for any rule; a shrunken embedding is no longer there.
    half = {"embedding": 0.5 * record(model, tokens, ("embedding",))["embedding"]}
    conductance = integrated_gradients(model, tokens, point="residual", target=target, options=CLASS, steps=64,
                                       mode="conductance", baseline=half)
    change = np.asarray(conductance.end - conductance.start)
    for layer in range(4):  # every full cut carries the whole change
        np.testing.assert_allclose(conductance.values[layer].sum((1, 2)), change, atol=1e-5)


def test_on_the_embedding_all_modes_are_one():
    model, tokens = tiny(), proteins(7, 5)
    half = {"embedding": 0.5 * record(model, tokens, ("embedding",))["embedding"]}
    call = functools.partial(integrated_gradients, model, tokens, point="embedding", target=class_probability([0, 3]),
                             options=CLASS, steps=16, max_steps=16, baseline=half)
    site = call()
    assert (np.asarray(site.error) < 1e-5).all()
    for mode in ("gate", "conductance"):
        np.testing.assert_allclose(call(mode=mode).values, site.values, atol=1e-6)
    counted = jnp.arange(tokens.shape[1]) < jnp.array([[3], [4]])
    summed = call(mode="gate", tokens="sum", counted=counted).values
    np.testing.assert_allclose(summed, jnp.where(counted[..., None], site.values, 0).sum(2), atol=1e-6)


@pytest.mark.long
def test_layers_that_are_computed_again_give_the_same():
    tokens, call = proteins(7, 5), functools.partial(integrated_gradients, point="ffn.hidden", steps=4, max_steps=4,
                                                     target=class_probability([0, 3]), options=CLASS)
    for a, b in zip(*map(jax.tree.leaves, (call(tiny(), tokens), call(tiny(remat="nothing_saveable"), tokens))),
                    strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.long
def test_one_number_for_the_whole_batch():
    model, tokens = tiny(), proteins(7, 5)
    found = integrated_gradients(model, tokens, point="ffn.hidden", target=lambda logits: logits[:, 2].sum(),
                                 options=CLASS, steps=32)
    each = integrated_gradients(model, tokens, point="ffn.hidden", target=class_logit([2, 2]), options=CLASS, steps=32)
    np.testing.assert_allclose(found.values, each.values, atol=1e-6)
    assert found.error.shape == (3, 1) and (np.asarray(found.error) < 1e-5).all()


def test_bad_input():
    model, tokens = tiny(), proteins(4)
    call = lambda model=model, **more: integrated_gradients(  # noqa: E731
        model, tokens, **{"point": "ffn.hidden", "target": class_logit([0]), "options": CLASS, **more})
    for more, told in (({"point": "ffn.hiden"}, "did you mean 'ffn.hidden'"),
                       ({"target": class_logit([4])}, "not finite"),
                       ({"target": class_logit([-1])}, "not finite"), ({"mode": "both"}, "site, gate"),
                       ({"rule": "simpson"}, "gauss"), ({"steps": 0}, "at least 1"), ({"chunk": 0}, "at least 1"),
                       ({"baseline": "mean"}, "not zero"), ({"baseline": {}}, "no 'ffn.hidden'"),
                       ({"baseline": {"ffn.hidden": np.full(48, np.nan)}}, "baseline of ffn.hidden is not finite"),
                       ({"target": class_logit([0, 1])}, "2 labels for 1 examples"),
                       ({"tokens": "all"}, "sum"), ({"baseline": {"ffn.hidden": np.zeros(7)}}, "must broadcast"),
                       ({"baseline": {"ffn.hidden": np.zeros((3, 5, 6, 48))}}, "must broadcast"),
                       ({"point": "embedding", "baseline": {"embedding": np.zeros((1, 1, 6, 32))}}, "must broadcast")):
        with pytest.raises(UserError, match=told):
            call(**more)
    with pytest.raises(UserError, match="computes in bfloat16"):
        call(tiny(dtype="bfloat16"))
    inner = tiny()
    inner.part = tiny(dtype="bfloat16")  # an encoder inside a model whose own config says nothing of it
    with pytest.raises(UserError, match="computes in bfloat16"):
        call(inner)
    assert np.isfinite(call(tiny(dtype="bfloat16"), force=True).values).all()
    plain = call()
    side = jnp.sign(plain.end[0] - plain.start[0, 0])  # the square root of a number that is negative at the start
    root = Partial(lambda end, side, logits: jnp.sqrt(1e-6 + side * (logits[:, 0] - end)), plain.end[0], side)
    with pytest.raises(UserError, match="not finite on the way from the baseline"):
        call(target=root)
    broken = tiny()
    state = nnx.to_pure_dict(nnx.state(broken))
    state["groups"][0]["ffn"]["up"] = state["groups"][0]["ffn"]["up"].at[1].set(jnp.nan)
    nnx.update(broken, nnx.State(state))
    with pytest.raises(UserError, match="finite"):
        call(broken)

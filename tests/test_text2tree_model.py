"""Encoders behind one interface, and the whole classifier: training, inference without the tree, chunks, taps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxmodels
from analysis.attribution import class_logit, integrated_gradients
from jaxmodels import Taps, UserError
from jaxmodels.bert.config import BertConfig
from jaxmodels.bert.model import Bert
from jaxmodels.hub import resolve
from jaxmodels.text2tree.classifier import Text2Tree, Text2TreeConfig, predictions
from jaxmodels.text2tree.encoders import (
    CnnConfig,
    CnnEncoder,
    TransformerEncoder,
    batch_of,
    chunks_of,
    pretrained,
)
from jaxmodels.text2tree.losses import LossConfig
from jaxmodels.text2tree.tree import LabelTree
from train.runtime.files import save_npz
from train.settings import OptimizerConfig
from train.text2tree import make_tuner, path_name, restored
from train.text2tree_config import Text2TreeRun, TextEncoderConfig

TREE = LabelTree.from_codes(["A1.1", "A1.2", "B2.1", "B2.2", "B2"])
K, V = 5, 120
ROWS = [[1, *range(10, 25), 2], [1, 30, 31, 2], [1, 40, 41, 42, 43, 2], [1, 2]]
TOKENS, MASK = batch_of(ROWS)
KEY = jax.random.key(0)
LONG = pytest.mark.long


def encoder(kind: str, seed: int = 0):
    if kind == "cnn":
        return CnnEncoder(CnnConfig(V, d_embed=16, filters=8), rngs=nnx.Rngs(seed))
    return TransformerEncoder(Bert(BertConfig.tiny(lm_head=False), rngs=nnx.Rngs(seed)), kind)


def model(kind="cnn", chunks=False, pooler=True, **options) -> Text2Tree:
    cfg = Text2TreeConfig(LossConfig(**{"gamma": 0.3} | options), chunks=chunks, pooler=pooler)
    return Text2Tree(encoder(kind), K, cfg, tree=TREE, rngs=nnx.Rngs(1))


@pytest.mark.parametrize("kind", ["mean", "cnn", pytest.param("cls", marks=pytest.mark.long)])
def test_longer_padding_changes_nothing(kind):
    one = encoder(kind)
    run = jax.jit(lambda tokens, mask: one(tokens, mask)[0])
    h = run(TOKENS, MASK)
    assert h.shape == (4, one.width) and h.dtype == jnp.float32
    assert np.allclose(run(*(np.pad(a, ((0, 0), (0, 9))) for a in (TOKENS, MASK))), h, atol=1e-5)
    nothing = np.asarray(run(np.zeros_like(TOKENS), np.zeros_like(MASK)))
    assert np.isfinite(nothing).all() and (kind == "cls" or not nothing.any())


def test_convolutions_by_hand():
    one = encoder("cnn")
    row = np.asarray(one.embed[...])[ROWS[2]]
    found = np.asarray(one(jnp.asarray(TOKENS), jnp.asarray(MASK))[0])[2].reshape(3, 8)
    for i, width in enumerate((3, 4, 5)):
        padded = np.pad(row, ((0, width - 1), (0, 0)))
        kernel, bias = np.asarray(one.filters[i][...]), np.asarray(one.biases[i][...])
        each = [np.einsum("we,wef->f", padded[t:t + width], kernel) + bias for t in range(len(row))]
        assert np.allclose(found[i], np.maximum(each, 0).max(0), atol=1e-5)
    _, aux = one(jnp.asarray(TOKENS), jnp.asarray(MASK), Taps(record=("word.conv", "embedding")))
    assert aux["word.conv"].shape == (3, *TOKENS.shape, 8) and aux["embedding"].shape == (*TOKENS.shape, 16)


def test_upper_layers_over_stored_states():
    whole = encoder("mean")
    tokens, mask = jnp.asarray(TOKENS), jnp.asarray(MASK)
    lower, upper = whole.split(1)
    states = lower.forward(tokens, mask, output="hidden")[0]
    assert np.allclose(upper(states, mask)[0], whole(tokens, mask)[0], atol=1e-6)
    count = [sum(a.size for a in jax.tree.leaves(nnx.state(one))) for one in (lower, upper, whole)]
    assert count[0] + count[1] == count[2]
    classifier = Text2Tree(upper, K, Text2TreeConfig(), tree=TREE, rngs=nnx.Rngs(0))
    assert classifier(np.asarray(states), MASK)[0].shape == (4, K)
    with pytest.raises(UserError, match="pass mask"):
        classifier(np.asarray(states))
    with pytest.raises(UserError, match="2 lower layers cannot be cut off 2"):
        whole.split(2)
    with pytest.raises(UserError, match="pool 'max' is not one of"):
        TransformerEncoder(whole.bert, "max")


def test_rows_and_chunks():
    tokens, mask = batch_of([[1, 5, 6, 7, 2], [1, 2]], 4)
    assert tokens.tolist() == [[1, 5, 6, 2], [1, 2, 0, 0]] and mask.sum(1).tolist() == [4, 2]
    tokens, mask = chunks_of([[1, 3, 4, 5, 6, 7, 2], [1, 9, 2], [1, 2]], 4, 2)
    assert tokens.tolist() == [[[1, 3, 4, 2], [1, 5, 6, 2]], [[1, 9, 2, 0], [0] * 4], [[1, 2, 0, 0], [0] * 4]]
    assert mask.any(-1).tolist() == [[True, True], [True, False], [True, False]]
    with pytest.raises(UserError, match="a chunk of 2 tokens has no room"):
        chunks_of([[1, 2]], 2, 2)


@pytest.mark.parametrize("labels", [jnp.array([0, 4, 2, 1]), jnp.asarray(np.eye(5, dtype=np.float32)[[0, 4, 2, 1]])],
                         ids=["multi_class", "multi_label"])
@pytest.mark.parametrize("method", ["full", *(pytest.param(m, marks=LONG) for m in ("ssl", "gdml", "plain"))])
def test_training_lowers_the_loss(method, labels):
    one = model(method=method)
    graphdef, state = nnx.split(one)
    batch = {"tokens": jnp.asarray(TOKENS), "labels": labels}
    assert (one.labels is None) == (method == "plain")

    @jax.jit
    @jax.value_and_grad
    def step(state):
        return nnx.merge(graphdef, state).loss(batch, KEY)[0]

    first, gradient = step(state)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradient))
    for _ in range(5):
        _, gradient = step(state)
        state = jax.tree.map(lambda p, g: p - 0.03 * g / (jnp.abs(g).max() + 1e-9), state, gradient)
    assert step(state)[0] < first
    moved = {path[0].key for path, g in jax.tree_util.tree_leaves_with_path(gradient) if np.abs(g).max() > 0}
    assert ("labels" in moved) == (method != "plain") and {"encoder", "head"} <= moved


def test_inference_does_not_touch_the_label_states():
    """The parameters without them load into a model without a tree, and predict the same; a key makes no difference."""
    one = model("cls")
    logits, aux = one(TOKENS)
    assert logits.shape == (4, K) and logits.dtype == jnp.float32 and aux == {}
    bare = one.for_inference()
    kept = nnx.state(bare)
    assert "labels" not in kept and "labels" in nnx.state(one) and one.labels is not None
    other = Text2Tree(encoder("cls", seed=7), K, Text2TreeConfig(LossConfig(method="plain")), rngs=nnx.Rngs(9))
    nnx.update(other, kept)
    assert np.array_equal(other(TOKENS)[0], logits)
    one.labels.nodes[...] = jnp.full_like(one.labels.nodes[...], jnp.nan)
    assert np.array_equal(one(TOKENS)[0], logits)
    assert np.allclose(predictions(logits, False).sum(1), 1, atol=1e-6)
    assert np.allclose(predictions(logits, True), 1 / (1 + np.exp(-np.asarray(logits))), atol=1e-6)


def test_a_head_without_pooler():
    """logits = h W + b, and the mixture of two texts has the mixture of their logits; with a pooler it has not."""
    h = jnp.asarray(np.random.default_rng(0).normal(size=(2, 24)), jnp.float32)
    bare, pooled = model(pooler=False).head, model().head
    assert not {"pooler", "pooler_bias"} & set(nnx.state(bare)) and {"pooler", "pooler_bias"} < set(nnx.state(pooled))
    np.testing.assert_allclose(bare(h), h @ bare.out[...] + bare.out_bias[...], rtol=1e-5, atol=1e-6)
    for head, linear in ((bare, True), (pooled, False)):
        head.out[...] = 10 * head.out[...]  # so that tanh bends
        apart = head(10 * h.mean(0, keepdims=True)) - head(10 * h).mean(0)
        assert (float(jnp.abs(apart).max()) < 1e-4) == linear
    assert TextEncoderConfig().has_pooler is False and TextEncoderConfig(pool="cls").has_pooler
    assert TextEncoderConfig(pooler=True).has_pooler and not TextEncoderConfig(pool="cls", pooler=False).has_pooler


@pytest.mark.parametrize("now", [True, False])
def test_weights_of_another_head_are_refused(now, tmp_path):
    """A pooler that is there and not used, or the other way round, would answer wrongly in silence."""
    for pooler in (now, not now):
        leaves = jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(nnx.state(model(pooler=pooler).for_inference())))
        save_npz(tmp_path / "model.npz", {path_name(path): np.asarray(leaf) for path, leaf in leaves})
        if pooler == now:
            assert np.array_equal(restored(model(pooler=now), tmp_path)(TOKENS)[0], model(pooler=now)(TOKENS)[0])
        else:
            with pytest.raises(UserError, match="is not of this model: head/pooler is in one of them only"):
                restored(model(pooler=now), tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("pooler", [True, False])
def test_chunks_of_long_texts(pooler):
    """Padding chunks count nothing; with one chunk, label attention is a plain head; mixtures are of whole texts."""
    one = model("mean", chunks=True, pooler=pooler)
    long = [[1, *range(10, 40), 2], [1, 50, 51, 2]]
    tokens, mask = chunks_of(long, 12, 3)
    logits, _ = one(tokens, mask)
    wide = [np.pad(a, ((0, 0), (0, 2), (0, 0))) for a in (tokens, mask)]
    assert np.allclose(one(*wide)[0], logits, atol=1e-5) and logits.shape == (2, K)
    plain = model("mean", pooler=pooler)
    plain.encoder, plain.head = one.encoder, one.head.pooled
    assert np.allclose(plain(*(a[1:, 0] for a in (tokens, mask)))[0], logits[1:], atol=1e-5)
    features, vector, _ = one.features(tokens, mask)
    assert features.shape == (2, 2, K) and vector.shape == (2, 32)
    batch = {"tokens": jnp.asarray(tokens), "mask": jnp.asarray(mask), "labels": jnp.array([0, 3])}
    assert np.isfinite(one.loss(batch, KEY)[0])
    nothing = one(np.zeros_like(tokens), np.zeros_like(mask))[0]
    assert np.allclose(nothing, 0, atol=1e-6)


def test_attribution_reaches_inside():
    """Taps of the encoder go through the classifier; integrated gradients of the FFN neurons are complete."""
    one = model("cls").for_inference()
    inputs = {"tokens": TOKENS[:2], "mask": MASK[:2]}
    _, aux = one(**inputs, taps=Taps(record=("ffn.hidden",)))
    assert aux["ffn.hidden"].shape == (2, 2, 17, 48)
    found = integrated_gradients(one, inputs, point="ffn.hidden", target=class_logit(jnp.array([0, 3])), steps=8)
    assert found.values.shape == (2, 2, 17, 48) and float(jnp.abs(found.error).max()) < 1e-4


def test_what_does_not_fit():
    with pytest.raises(UserError, match="the tree has 5 classes, the head 4"):
        Text2Tree(encoder("cnn"), 4, Text2TreeConfig(), tree=TREE, rngs=nnx.Rngs(0))
    with pytest.raises(UserError, match="method full needs a label tree"):
        Text2Tree(encoder("cnn"), 4, Text2TreeConfig(), rngs=nnx.Rngs(0))


def test_each_part_moves_at_its_own_rate():
    """Text2tree.md section 4.5; Adam's first step is the rate. Labels that overtake the encoder are one axis soon."""
    cfg = Text2TreeRun(optimizer=OptimizerConfig(learning_rate=0.1, schedule="constant", warmup=0.0, weight_decay=0.0))
    params = {part: {"weight": jnp.ones((2, 2))} for part in ("labels", "encoder", "head")}
    optimizer, _ = make_tuner(cfg)
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    moved = {part: -float(update["weight"][0, 0]) for part, update in updates.items()}
    assert moved == pytest.approx({"labels": 0.1 * 0.02 * 0.1, "encoder": 0.1 * 0.02, "head": 0.1}, rel=1e-4)


def test_the_states_of_labels_do_not_decay():
    """Text2tree.md section 4.5; without a gradient nothing but the decay moves them."""
    cfg = Text2TreeRun(optimizer=OptimizerConfig(learning_rate=0.1, weight_decay=0.5, clip=0.0))
    params = {part: {"weight": jnp.ones((2, 2))} for part in ("labels", "head")}
    optimizer, _ = make_tuner(cfg)
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    assert not updates["labels"]["weight"].any() and (updates["head"]["weight"] < 0).all()


@pytest.mark.long
def test_the_pretrained_encoder():
    """MiniLM with its own pooler, six layers, frozen lower four."""
    try:
        resolve("all-minilm-l6-v2")
    except UserError as error:
        pytest.skip(str(error))
    one, pooler = pretrained("all-minilm-l6-v2", "mean")
    assert one.width == 384 and pooler[0].shape == (384, 384)
    classifier = Text2Tree(one, K, Text2TreeConfig(), tree=TREE, pooler=pooler, rngs=nnx.Rngs(0))
    assert np.array_equal(classifier.head.pooler[...], pooler[0])
    tokens = jaxmodels.hub.load_tokenizer(jaxmodels.hub.resolve("all-minilm-l6-v2")).encode_batch(
        ["heart attack", "myocardial infarction", "a walk in the park"])
    tokens, mask = batch_of(tokens)
    h = np.array(one(jnp.asarray(tokens), jnp.asarray(mask))[0])
    h /= np.linalg.norm(h, axis=1, keepdims=True)
    assert h[0] @ h[1] > h[0] @ h[2] + 0.3
    lower, upper = one.split(4)
    states = lower(tokens, mask, output="hidden")[0]
    assert np.allclose(upper(states, jnp.asarray(mask))[0], one(jnp.asarray(tokens), jnp.asarray(mask))[0], atol=1e-4)

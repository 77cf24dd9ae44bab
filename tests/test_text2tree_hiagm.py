"""Graph convolutions over the label tree: the head like HiAGM's, and the one that stands in for attention in HLR."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import analysis.text2tree_report
from jaxmodels import Taps, UserError
from jaxmodels.text2tree import hiagm
from jaxmodels.text2tree.classifier import Text2Tree, Text2TreeConfig
from jaxmodels.text2tree.encoders import CnnConfig, CnnEncoder
from jaxmodels.text2tree.hlr import HlrConfig, LabelEmbeddings
from jaxmodels.text2tree.losses import LossConfig
from jaxmodels.text2tree.tree import LabelTree
from tests.tiny_texts import LEARNS, run, write
from train import predict
from train.data.coded_texts import Columns, coded_texts
from train.objectives.coded_texts import CodedTextsObjective
from train.text2tree_config import MethodConfig

# ragged, and an inner node a class; in the order of the tree: r A B C A1 A2 B1 B2 A1x
TREE = LabelTree.from_table([("A", "r"), ("B", "r"), ("A1", "A"), ("A2", "A"), ("B1", "B"), ("B2", "B"), ("C", "r"),
                             ("A1x", "A1")], ["A1x", "A2", "C", "B", "B1", "B2"])
N, D, P = len(TREE) - 1, 6, 3
ONE = np.array([0, 0, 1, 1, 1, 3, 4, 4])
H = jnp.asarray(np.random.default_rng(0).normal(size=(P, D)), jnp.float32)
TOKENS = jnp.asarray(np.random.default_rng(1).integers(1, 50, (4, 8)), jnp.int32)


def head(seed=0) -> hiagm.HiagmHead:
    """With every parameter other than 0, and the prior of ONE."""
    one = hiagm.HiagmHead(D, TREE, 0.1, rngs=nnx.Rngs(seed))
    rng = np.random.default_rng(seed)
    for name in ("pooler", "pooler_bias", "gate", "gate_bias", "bias", "out_bias"):
        getattr(one, name)[...] = jnp.asarray(rng.normal(size=getattr(one, name)[...].shape), jnp.float32)
    one.prior[...] = jnp.asarray(hiagm.prior(ONE, TREE))
    return one


def classifier(seed=0, **options) -> Text2Tree:
    encoder = CnnEncoder(CnnConfig(50, d_embed=8, filters=4), rngs=nnx.Rngs(seed))
    classes = N if options.get("head") == "hiagm" else TREE.num_classes
    return Text2Tree(encoder, classes, Text2TreeConfig(**options), tree=TREE, rngs=nnx.Rngs(seed))


def test_prior_by_hand():
    """Texts of A: 5, of B: 3; of A1 (and A1x): 2, of A2: 3, of B1: 2; none of C and B2."""
    assert dict(zip(TREE.names[1:], hiagm.prior(ONE, TREE), strict=True)) == pytest.approx(
        {"A": 0, "B": 0, "C": 0, "A1": 0.4, "A2": 0.6, "B1": 2 / 3, "B2": 0, "A1x": 1})
    many = np.zeros((4, 6))
    many[0, :2] = many[1, 1] = many[2, 4] = 1  # A1x and A2; A2; B1; nothing
    found = dict(zip(TREE.names[1:], hiagm.prior(many, TREE), strict=True))
    assert found == pytest.approx({"A": 0, "B": 0, "C": 0, "A1": 0.5, "A2": 1, "B1": 1, "B2": 0, "A1x": 1})
    assert np.array_equal(hiagm.prior(np.eye(6)[ONE], TREE), hiagm.prior(ONE, TREE))


def test_head_by_loops():
    """One node at a time, in double precision."""
    one = head()
    p = {name: np.asarray(getattr(one, name)[...], np.float64) for name in (
        "pooler", "pooler_bias", "nodes", "gate", "gate_bias", "bias", "out", "out_bias", "prior")}
    x = np.tanh(np.asarray(H, np.float64) @ p["pooler"] + p["pooler_bias"])
    expected = np.zeros((P, N))
    for i in range(P):
        v = [p["nodes"][k] @ x[i] for k in range(N)]
        for k in range(N):
            above = int(TREE.parent[k + 1]) - 1
            down = p["prior"][k] * v[above] if above >= 0 else np.zeros_like(v[k])
            up = sum((v[j] for j in range(N) if TREE.parent[j + 1] - 1 == k), np.zeros_like(v[k]))
            gates = 1 / (1 + np.exp(-(v[k] @ p["gate"] + p["gate_bias"][k])))
            state = sum(gates[d] * (m + p["bias"][d, k]) for d, m in enumerate((down, up, v[k])))
            expected[i, k] = np.maximum(state, 0) @ p["out"][:, k] + p["out_bias"][k]
    assert np.abs(np.asarray(one(H)) - expected).max() < 1e-4


def test_a_node_hears_its_parent_its_children_and_itself():
    one = head()
    graphdef, state = nnx.split(one)
    jacobian = jax.jit(jax.jacrev(lambda state: nnx.merge(graphdef, state)(H).sum(0)))(state)
    heard = np.abs(np.asarray(jacobian["nodes"][...])).max((2, 3)) > 0
    edges = (TREE.parent[1:, None] == np.arange(1, N + 1)) & (hiagm.prior(ONE, TREE) > 0)[:, None]
    expected = edges | (TREE.parent[1:] == np.arange(1, N + 1)[:, None]) | np.eye(N, dtype=bool)
    assert np.array_equal(heard, expected)


def test_it_trains_and_comes_back_without_the_counts():
    """The objective's loss falls; the head's arrays, the prior among them, make another model give the same logits."""
    one = classifier(head="hiagm", loss=LossConfig("plain"))
    one.head.prior[...] = jnp.asarray(hiagm.prior(ONE, TREE))
    objective = CodedTextsObjective(MethodConfig("hiagm"), (2, 3, 0, 1, 2, 0), 8, TREE)
    batch = {"tokens": TOKENS, "mask": TOKENS > 0, "labels": jnp.array([0, 3, 1, 4])}
    graphdef, params, rest = nnx.split(one, nnx.Param, ...)

    @jax.jit
    @jax.value_and_grad
    def step(params):
        return objective.loss(nnx.merge(graphdef, params, rest), batch, jax.random.key(0))[0]

    first, gradient = step(params)
    moved = {name for name, g in nnx.to_pure_dict(gradient)["head"].items() if np.abs(g).max() > 0}
    assert moved == {"pooler", "pooler_bias", "nodes", "gate", "gate_bias", "bias", "out", "out_bias"}
    for _ in range(5):
        params = jax.tree.map(lambda p, g: p - 0.02 * g / (jnp.abs(g).max() + 1e-9), params, gradient)
        last, gradient = step(params)
    assert last < first
    nnx.update(one, params)
    logits = one(TOKENS)[0]
    assert logits.shape == (4, N) and one.labels is None
    other = classifier(seed=7, head="hiagm", loss=LossConfig("plain"))
    nnx.update(other, nnx.state(one.for_inference()))
    assert np.array_equal(other(TOKENS)[0], logits)
    assert "prior" in nnx.to_pure_dict(nnx.state(one.for_inference()))["head"]


def test_chunks_are_averaged():
    one, there = head(), jnp.array([[True, True], [True, False]])
    h = jnp.stack([H[:2], jnp.stack([H[2], jnp.full(D, jnp.nan)])], axis=1)
    found = one.features(h, there)
    assert np.allclose(found, [(H[0] + H[2]) / 2, H[1]], atol=1e-6) and one.features(H) is H


def test_what_does_not_fit():
    with pytest.raises(UserError, match="head 'hiagn' is not one of linear, hiagm"):
        Text2TreeConfig(head="hiagn")
    encoder = CnnEncoder(CnnConfig(50, d_embed=8, filters=4), rngs=nnx.Rngs(0))
    cfg = Text2TreeConfig(LossConfig("plain"), head="hiagm")
    with pytest.raises(UserError, match="the tree has 8 nodes below its root, the head 6"):
        Text2Tree(encoder, 6, cfg, tree=TREE, rngs=nnx.Rngs(0))
    with pytest.raises(UserError, match="head hiagm needs a label tree"):
        Text2Tree(encoder, 8, cfg, rngs=nnx.Rngs(0))


# In place of attention (text2tree.md section 4.4)


def test_convolutions_by_matrices():
    """Â written out; no attention to look at, and as many layers as the tree has levels."""
    labels = LabelEmbeddings(TREE, HlrConfig(D, attention="gcn"), rngs=nnx.Rngs(0))
    a = np.eye(N + 1)
    for child in range(1, N + 1):
        a[child, TREE.parent[child]] = a[TREE.parent[child], child] = 1
    root = np.diag(a.sum(1) ** -0.5)
    x = np.asarray(labels.nodes[...], np.float64)
    for layer in labels.convolutions:
        x = np.maximum(root @ a @ root @ x @ np.asarray(layer.weight[...]) + np.asarray(layer.bias[...]), 0)
        x = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-5)
    states, aux = labels(taps=Taps(record=("label.embedding",)))
    assert len(labels.convolutions) == 3 and not len(labels.layers)
    assert np.allclose(states, x[TREE.leaf_index], atol=1e-5) and aux["label.embedding"].shape == (4, N + 1, D)
    assert np.abs(np.asarray(labels(jax.random.key(0))[0] - states)).max() > 1e-3  # dropout
    with pytest.raises(UserError, match="'label.attention' is not a point of this model"):
        labels(taps=Taps(record=("label.attention",)))


@pytest.mark.long
def test_convolutions_are_trained_by_ssl():
    one = classifier(attention="gcn", loss=LossConfig(gamma=0.3))
    graphdef, state = nnx.split(one)
    batch = {"tokens": TOKENS, "labels": jnp.array([0, 3, 1, 4])}
    gradient = jax.jit(jax.grad(lambda state: nnx.merge(graphdef, state).loss(batch, jax.random.key(0))[0]))(state)
    largest = [float(jnp.abs(g).max()) for g in jax.tree.leaves(gradient["labels"])]
    assert len(largest) == 1 + 3 * 4 and min(largest) > 0


# In the experiment


@pytest.mark.long
@pytest.mark.parametrize("options", [(), ("data.length=8", "data.chunks=3")])
@pytest.mark.parametrize("multi", [True, False], ids=["multi_label", "multi_class"])
def test_a_run_learns_and_predict_answers_as_it_did(multi, options, tmp_path):
    """The prior is counted, saved and loaded: another one would give other scores."""
    path = write(tmp_path / "notes.csv", multi=multi)
    found = run(tmp_path / "out", path, "method.name=hiagm", *LEARNS, *options)
    assert found["test.model.tuned_macro_f1" if multi else "test.model.macro_f1"] > 0.6
    saved = np.load(tmp_path / "out" / "predictions.npz")
    source = coded_texts(f"path:{path}", columns=Columns(split="split"))
    counted = np.load(tmp_path / "out" / "model.npz")["head/prior"]
    assert np.array_equal(counted, hiagm.prior(source.parts["train"].labels, source.tree)) and 0 < counted.max() < 2
    best = np.zeros(len(saved["labels"]), np.float32)
    for text, (score, *_) in predict.predict(tmp_path / "out", source.parts["test"].texts, top=1).rows:
        best[text] = score
    scores = saved["model_scores"].max(1) if multi else saved["model_scores"]
    np.testing.assert_allclose(best, scores.astype(np.float32), atol=5e-4)


@pytest.mark.long
def test_a_run_with_convolutions_has_a_report(tmp_path):
    found = run(tmp_path / "out", write(tmp_path / "notes.csv"), "method.label_encoder=gcn")
    states = np.load(tmp_path / "out" / "labels.npz")
    assert 0 <= found["test.model.tuned_macro_f1"] <= 1 and states["attention"].shape == (0, 3)
    assert not np.array_equal(states["before"], states["after"])
    assert "Cosines of the states" in analysis.text2tree_report.build(tmp_path / "out").read_text()

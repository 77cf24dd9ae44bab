"""The cascade of attention down the label tree."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmodels import Taps, UserError
from jaxmodels.taps import NO_TAPS
from jaxmodels.text2tree.hlr import HlrConfig, LabelEmbeddings, label_rows
from jaxmodels.text2tree.tree import LabelTree

TREE = LabelTree.from_table([("A", "r"), ("B", "r"), ("A1", "A"), ("A2", "A"), ("B1", "B"), ("B2", "B"), ("C", "r"),
                             ("A1x", "A1")], ["A1x", "A2", "C", "B", "B1", "B2"])  # ragged, an inner node a class
UNEVEN = LabelTree.from_codes(["A1.1", "B1.1", "B1.2", "C1.1", "C2.1", "C2.2", "C2.3", "C2.4"])  # families of 1 to 4
N, D = len(TREE), 6


def labels(attention="dense", seed=0, tree=TREE, **options) -> LabelEmbeddings:
    model = LabelEmbeddings(tree, HlrConfig(D, attention=attention, **options), rngs=nnx.Rngs(seed))
    for layer in model.layers:  # spread, so that links are on and off
        layer.link[...] = layer.link[...] * 4
        layer.query[...] = layer.query[...] * 2
    return model


def by_loops(layer, nodes):
    """Section 4.2, one row at a time, in double precision: E' before the norm, and the links."""
    p = {name: np.asarray(getattr(layer, name)[...], np.float64) for name in (
        "query", "key", "value", "link", "query_bias", "key_bias", "value_bias", "link_bias")}
    q, k, v = (nodes @ p[n] + p[f"{n}_bias"] for n in ("query", "key", "value"))
    out, links = nodes.copy(), np.zeros((N, N))
    for i in range(N):
        if TREE.depth[i] != layer.level and not (i == 0 and layer.level == 1):
            continue
        seen = {i} if i == 0 else {i, int(TREE.parent[i])}
        for j in range(1, N):
            links[i, j] = 1 / (1 + np.exp(-(q[i] @ p["link"] @ k[j] + p["link_bias"]))) > 0.5
            if j != i and i > 0 and TREE.parent[j] == TREE.parent[i] and links[i, j]:
                seen.add(j)
        seen = sorted(seen)
        scores = np.exp([q[i] @ k[j] / np.sqrt(D) for j in seen])
        out[i] = (scores / scores.sum()) @ v[seen]
    return out, links


@pytest.mark.parametrize("attention", ["dense", "sparse"])
@pytest.mark.parametrize("level", [1, 2, pytest.param(3, marks=pytest.mark.long)])
def test_a_layer_by_loops_in_double_precision(attention, level):
    layer = labels(attention).layers[level - 1]
    nodes = np.random.default_rng(level).normal(size=(N, D))
    expected, links = by_loops(layer, nodes)
    with jax.enable_x64(True):
        found = np.asarray(layer.attend(jnp.asarray(nodes), NO_TAPS.probe(jnp.ones(N, bool))))
    assert found.dtype == np.float64 and np.abs(found - expected).max() < 1e-12
    others = (TREE.depth != level) & ~((np.arange(N) == 0) & (level == 1))
    assert np.array_equal(found[others], nodes[others])
    if level == 1:
        assert 0 < links[1:4, 1:4].mean() < 1


@pytest.mark.parametrize("tree", [TREE, UNEVEN])
def test_dense_and_sparse_are_equal(tree):
    a, b = labels("dense", tree=tree), labels("sparse", tree=tree)
    value = {}
    for name, model in (("dense", a), ("sparse", b)):
        graphdef, state = nnx.split(model)

        def loss(state, graphdef=graphdef):
            states = nnx.merge(graphdef, state)()[0]
            return (jnp.sin(3 * states) * jnp.arange(D)).sum(), states

        gradient, states = jax.jit(jax.grad(loss, has_aux=True))(state)
        value[name] = states, gradient
    assert np.abs(np.asarray(value["dense"][0] - value["sparse"][0])).max() < 1e-6
    for x, y in zip(jax.tree.leaves(value["dense"][1]), jax.tree.leaves(value["sparse"][1]), strict=True):
        assert np.allclose(x, y, rtol=1e-4, atol=1e-5 * max(float(jnp.abs(x).max()), 1))


@pytest.mark.parametrize("level", [1, 2, 3])
def test_no_row_is_projected_twice(level):
    """Families are padded to the largest: projecting them would be four times the rows on ICD-10-CM."""
    layer = labels("sparse", tree=UNEVEN).layers[level - 1]
    step = jax.make_jaxpr(lambda nodes: layer.attend(nodes, NO_TAPS.probe(jnp.ones(len(UNEVEN), bool))))
    products = [eqn for eqn in step(jnp.zeros((len(UNEVEN), D))).eqns if eqn.primitive.name == "dot_general"]
    rows = [int(np.prod(eqn.invars[0].aval.shape[:-1])) for eqn in products if eqn.invars[1].aval.shape == (D, D)]
    parents, children = UNEVEN.families(level)
    own = int((children >= 0).sum())
    assert sorted(rows) == sorted([own, own, own + len(parents), own + len(parents)])  # query, link; key, value


def test_links_are_binary_with_a_gradient():
    """Straight-through: 0 or 1 forward, the sigmoid's slope backward."""
    model = labels("dense")
    links = np.asarray(model(taps=Taps(record=("label.link",)))[1]["label.link"])
    assert links.shape == (3, N, N) and set(np.unique(links)) == {0.0, 1.0}
    graphdef, state = nnx.split(model)
    gradient = jax.jit(jax.grad(lambda state: (nnx.merge(graphdef, state)()[0] ** 2 * jnp.arange(D)).sum()))(state)
    for name in ("link", "link_bias"):
        assert max(float(jnp.abs(gradient["layers"][i][name][...]).max()) for i in range(3)) > 0


def test_start_of_the_parameters():
    model = LabelEmbeddings(TREE, HlrConfig(64), rngs=nnx.Rngs(0))
    for p in (model.nodes, model.layers[0].link, model.layers[0].query, model.layers[0].value_bias):
        largest = float(jnp.abs(p[...]).max())
        assert 0.9 / 8 < largest <= 1 / 8  # uniform within 1/√d
    assert float(model.layers[0].link_bias[...]) == np.float32(0.01)
    states, aux = model()
    assert states.shape == (6, 64) and aux == {} and states.dtype == jnp.float32


def test_rows_of_names():
    embedding = np.arange(20, dtype=np.float32).reshape(10, 2)
    tree = LabelTree.from_table([("a", "r"), ("b", "r")])
    rows = label_rows(tree, [[1, 2], [3, 5], []], embedding, root=9)
    assert rows.tolist() == [[18, 19], [8, 9], [18, 19]]  # root and a name without pieces: the piece of the root
    trained = LabelEmbeddings(tree, HlrConfig(2, start="label"), start=rows, rngs=nnx.Rngs(0))
    assert np.array_equal(trained.nodes[...], rows) and isinstance(trained.nodes, nnx.Param) and trained.layers
    frozen = LabelEmbeddings(tree, HlrConfig(2, start="fixed"), start=rows, rngs=nnx.Rngs(0))
    assert np.array_equal(frozen()[0], rows[1:]) and not jax.tree.leaves(nnx.state(frozen, nnx.Param))
    with pytest.raises(UserError, match="start=random takes no rows"):
        LabelEmbeddings(tree, HlrConfig(2), start=rows, rngs=nnx.Rngs(0))
    with pytest.raises(UserError, match="start=label needs rows"):
        LabelEmbeddings(tree, HlrConfig(2, start="label"), rngs=nnx.Rngs(0))
    with pytest.raises(UserError, match=r"shape \(2, 2\); give \(3, 2\)"):
        LabelEmbeddings(tree, HlrConfig(2, start="label"), start=rows[1:], rngs=nnx.Rngs(0))
    with pytest.raises(UserError, match="attention 'full' is not one of"):
        HlrConfig(2, attention="full")


@pytest.mark.parametrize("attention", ["dense", pytest.param("sparse", marks=pytest.mark.long)])
def test_taps(attention):
    model = labels(attention)
    plain = model()[0]
    states, aux = model(taps=Taps(record=("label.embedding", "label.attention")))
    assert np.array_equal(states, plain) and aux["label.embedding"].shape == (4, N, D)
    assert np.array_equal(aux["label.embedding"][0], model.nodes[...])
    assert np.array_equal(aux["label.embedding"][-1][TREE.leaf_index], plain)
    assert all(np.allclose(p.sum(-1), 1, atol=1e-6) for p in aux["label.attention"])
    cut = model(taps=Taps(mask={"label.link": np.zeros((1,) * 3 if attention == "dense" else (1,) * 4, bool)}))[0]
    assert np.abs(np.asarray(cut - plain)).max() > 1e-3  # without siblings
    moved = model(taps=Taps(add={"label.embedding": np.zeros((4, 1, 1)) + np.array([0, 0, 0, 1])[:, None, None]}))[0]
    assert np.allclose(moved, plain + 1)
    with pytest.raises(UserError, match="'label.links' is not a point of this model; did you mean 'label.link'"):
        model(taps=Taps(record=("label.links",)))


def test_dropout_needs_a_key():
    model = labels()
    assert np.array_equal(model()[0], model()[0])
    a, b = (model(jax.random.key(i))[0] for i in (0, 1))
    assert np.abs(np.asarray(a - b)).max() > 1e-3


@pytest.mark.long
def test_the_whole_of_icd10cm_trains(data_folder):
    """47,189 nodes, a step of gradient descent on their states, without an array of N x N."""
    tree = LabelTree.from_tsv(data_folder / "icd10cm_tree" / "icd10cm_2026_tree.tsv.gz")
    model = LabelEmbeddings(tree, HlrConfig(32), rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(model)
    goal = jax.random.normal(jax.random.key(1), (tree.num_classes, 32))

    @jax.jit
    @jax.value_and_grad
    def step(state):
        return ((nnx.merge(graphdef, state)(jax.random.key(0))[0] - goal) ** 2).mean()

    used = step.lower(state).compile().memory_analysis().temp_size_in_bytes
    assert used < 2e9  # N² floats are 8.9e9 bytes
    before, gradient = step(state)
    after, _ = step(jax.tree.map(lambda p, g: p - g / jnp.maximum(jnp.abs(g).max(), 1e-9) * 1e-3, state, gradient))
    assert after < before

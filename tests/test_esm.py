"""What must hold for the ESM encoder: sizes, padding, packing, masked tokens, soft tokens, heads, taps, contacts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxmodels import Esm, EsmConfig, Taps, UserError
from jaxmodels.esm.alphabet import CLS, EOS, MASK, PAD, TOKENS, decode, encode, pad_batch, token_id
from jaxmodels.esm.heads import corrected_maps
from jaxmodels.esm.model import POINTS
from jaxmodels.hub.models import build, leaves
from jaxmodels.layers.attention import attend
from jaxmodels.taps import NO_TAPS
from tests.tiny_esm import PROTEINS, packed, padded, random_esm, rows, tiny

T, L, D, N, H, F, V = 24, 3, 32, 4, 8, 48, 33
CONFIGS = {
    "esm2": tiny(),
    "esm1b": tiny(position="learned", embed_norm=True, max_positions=40),
    "roberta": tiny(norm_placement="post", position="learned", embed_norm=True, token_dropout=False, max_positions=40,
                    contact_head=False, family="roberta"),
}


@pytest.fixture(scope="module")
def esm2():
    return random_esm(CONFIGS["esm2"])


def apart(a, b) -> float:
    """Largest difference, against the standard deviation of b."""
    a, b = np.asarray(a), np.asarray(b)
    assert a.shape == b.shape
    return float(np.abs(a - b).max() / b.std())


SIZES = {"esm2_8m": 7_512_474, "esm2_35m": 33_501_394, "esm2_150m": 148_140_154, "esm2_650m": 651_043_254,
         "esm2_3b": 2_839_005_634, "esm2_15b": 15_129_100_194}


@pytest.mark.parametrize("name", SIZES)
def test_parameters_of_the_released_sizes(name):
    """With masked-LM and contact head, the embedding counted once (PyTorch's count of EsmForMaskedLM)."""
    abstract = nnx.eval_shape(lambda: Esm(getattr(EsmConfig, name)(), rngs=nnx.Rngs(0)))
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(abstract))) == SIZES[name]


def test_the_alphabet():
    assert len(TOKENS) == 33 and (CLS, PAD, EOS, MASK) == (0, 1, 2, 32) and token_id("L") == 4 and token_id("-") == 30
    odd = "XBUZO.-"
    ids, unknown = encode(odd)
    assert ids.tolist() == [0, 24, 25, 26, 27, 28, 29, 30, 2] and unknown == 0 and ids.dtype == np.int32
    assert decode(ids) == odd and decode(ids, special=True) == f"<cls>{odd}<eos>"
    assert encode("acdy")[0].tolist() == encode("ACDY")[0].tolist()
    # One token a letter, whatever the letter: J is not in the vocabulary, ß must not become two, 😀 is one.
    assert encode("AJ*1ß😀\ud800", special=False)[0].tolist() == [5, 3, 3, 3, 3, 3, 3] and encode("AJ*1ß😀")[1] == 5
    assert encode("")[0].tolist() == [0, 2] and decode([MASK, 31]) == "<mask><null_1>"
    with pytest.raises(UserError, match="id 33 is not in this vocabulary"):
        decode([33])
    with pytest.raises(UserError, match="'J' is not a token"):
        token_id("J")
    with pytest.raises(UserError, match="row 0 has 6 tokens, more than the length 4"):
        pad_batch([encode("ACDE")[0]], 4)


@pytest.mark.parametrize("name", ["esm2", *(pytest.param(n, marks=pytest.mark.long) for n in ("esm1b", "roberta"))])
def test_a_protein_alone_padded_and_packed(name):
    """The same logits to 1e-5, with masked tokens: their compensation is each protein's own."""
    model, batch = random_esm(CONFIGS[name]), padded(T)
    together = np.asarray(model(batch)[0])
    tokens, segments, places = packed(44)
    row = np.asarray(model(tokens, segments=segments)[0])[0]
    shuffled = np.array([0, 7, 2, 5])[segments]  # any ids of the proteins
    assert np.array_equal(np.asarray(model(tokens, segments=shuffled)[0])[0][segments[0] > 0], row[segments[0] > 0])
    for i, (alone, place) in enumerate(zip(rows(), places, strict=True)):
        logits = np.asarray(model(alone[None])[0])[0]
        assert logits.shape == (len(alone), V)
        assert apart(together[i, :len(alone)], logits) < 1e-5
        assert apart(row[place], logits) < 1e-5


def test_padding_is_never_looked_at(esm2):
    """A mask hides whatever stands there; without one, padding is what is <pad>."""
    tokens = padded(T)
    mask = tokens != PAD
    logits = np.asarray(esm2(tokens)[0])
    junk = np.where(mask, tokens, MASK)
    assert np.array_equal(np.asarray(esm2(junk, mask=mask)[0])[mask], np.asarray(esm2(tokens, mask=mask)[0])[mask])
    assert np.array_equal(np.asarray(esm2(tokens, mask=mask)[0])[mask], logits[mask])
    # A mask of ones makes <pad> a token like any other (transformers without attention_mask).
    assert apart(np.asarray(esm2(tokens, mask=np.ones_like(mask))[0])[mask], logits[mask]) > 0.01
    nothing = np.full((1, T), PAD, np.int32)
    assert np.isfinite(np.asarray(esm2(np.concatenate([nothing, tokens[:2]]))[0])).all()


def test_masked_tokens_are_compensated(esm2):
    """Embeddings times 0.88 / (1 - m/n), rows of <mask> 0 (spec of token dropout); 0.88 without masks."""
    embed = np.asarray(esm2.embed[...])
    for tokens, m in ((rows()[0], 2), (rows(masked=False)[0], 0), (np.array([0, MASK, MASK, MASK, 2], np.int32), 3)):
        _, aux = esm2(pad_batch([tokens], T), taps=Taps(record=("embedding",)), output="none")
        expected = embed[tokens] * (tokens != MASK)[:, None] * 0.88 / (1 - m / len(tokens))
        assert np.allclose(aux["embedding"][0, :len(tokens)], expected, rtol=1e-6, atol=1e-7)
        assert not np.asarray(aux["embedding"])[0, len(tokens):].any()
    # Nothing but masks: no 0/0.
    assert np.isfinite(np.asarray(esm2(np.full((1, T), MASK, np.int32))[0])).all()
    plain = random_esm(tiny(token_dropout=False))
    _, aux = plain(pad_batch([rows()[0]], T), taps=Taps(record=("embedding",)), output="none")
    assert np.array_equal(aux["embedding"][0, 3], np.asarray(plain.embed[...])[MASK])


def test_the_head_is_tied():
    """One array, with gradient from both of its uses."""
    model = random_esm(tiny(ffn_widths=(F,)))
    assert [path for path, leaf in leaves(model).items() if leaf.shape in ((V, D), (D, V))] == [("embed",)]
    graphdef, state = nnx.split(model)
    tokens = padded(T)

    @jax.jit
    @jax.grad
    def gradient(state, through_input, through_head):
        model = nnx.merge(graphdef, state)
        kept = jax.lax.stop_gradient(model.embed[...])
        embed = model.embed[...]
        model.embed[...] = embed * through_input + kept * (1 - through_input)
        hidden, _ = model.forward(tokens, output="hidden")
        logits = model.lm_head(hidden, embed * through_head + kept * (1 - through_head))
        return jax.nn.logsumexp(logits).sum()

    whole, first, second = (np.asarray(gradient(state, *uses)["embed"][...])
                            for uses in ((1.0, 1.0), (1.0, 0.0), (0.0, 1.0)))
    assert np.allclose(whole, first + second, rtol=1e-3, atol=1e-4 * np.abs(whole).max())
    seen = np.unique(tokens[(tokens != MASK) & (tokens != PAD)])
    assert (np.abs(first).max(1) > 0).nonzero()[0].tolist() == seen.tolist()  # never <mask>, whose row is dropped
    assert (np.abs(second).max(1) > 0).all()


def test_positions_are_relative(esm2):
    tokens = padded(T)
    taps = Taps(record=("attention.probability",))
    positions = np.tile(np.arange(T, dtype=np.int32), (3, 1))
    logits, aux = esm2(tokens, positions=positions, taps=taps)
    shifted, other = esm2(tokens, positions=positions + 9, taps=taps)
    assert apart(shifted, logits) < 1e-4
    assert np.abs(np.asarray(aux["attention.probability"]) - np.asarray(other["attention.probability"])).max() < 1e-5
    assert apart(esm2(tokens, positions=positions * 2, taps=taps)[0], logits) > 1e-3
    assert np.array_equal(np.asarray(esm2(tokens, taps=taps)[0]), np.asarray(logits))


def test_frequencies_of_the_checkpoint_or_exact():
    exact = EsmConfig.tiny().frequencies
    assert np.allclose(exact, 10_000.0 ** (-np.arange(4) / 4))
    rounded = tuple(exact.astype(np.float16).astype(float))
    assert tuple(EsmConfig.tiny(inv_freq=rounded).frequencies) == rounded
    assert np.array_equal(EsmConfig.tiny(inv_freq=rounded, rope_inv_freq="exact").frequencies, exact)


def test_a_learned_table_has_an_end():
    model = random_esm(tiny(position="learned", max_positions=12))
    tokens = encode("ACDEFGHI")[0][None]  # 10 tokens, rows 2..11
    assert np.isfinite(np.asarray(model(tokens)[0])).all()
    with pytest.raises(UserError, match="rows of 11 tokens are longer than the 10"):
        model(encode("ACDEFGHIK")[0][None])
    # In packed rows the length of a protein is known on the device only: NaN, not the last row once more.
    long = np.concatenate([encode("ACDEFGHI")[0], encode("ACD")[0]])[None]
    fits, does_not = ([[1] * n + [2] * (15 - n)] for n in (10, 11))
    assert np.isfinite(np.asarray(model(long, segments=np.array(fits, np.int32))[0])).all()
    assert np.isnan(np.asarray(model(long, segments=np.array(does_not, np.int32))[0])).any()


@pytest.mark.long
def test_soft_tokens_that_are_certain_are_ids(esm2):
    """With masks, padding and odd letters, padded and packed; the gradient reaches every letter."""
    tokens, segments, _ = packed(44)
    batch = padded(T)
    soft = np.eye(V, dtype=np.float32)[batch]
    taps = Taps(record=("residual",))

    def same(ours, theirs, real):
        assert apart(np.asarray(ours[1]["residual"])[:, real], np.asarray(theirs[1]["residual"])[:, real]) < 1e-5
        return ours[0], theirs[0]

    hard = esm2(batch, output="class", taps=taps)
    assert apart(*same(esm2(soft=soft, output="class", taps=taps), hard, batch != PAD)) < 1e-5
    hard = esm2(tokens, segments=segments, output="none", taps=taps)
    same(esm2(soft=np.eye(V, dtype=np.float32)[tokens], segments=segments, output="none", taps=taps), hard,
         segments > 0)
    # Half a <mask> counts half: the embedding is linear in the distribution up to the compensation.
    half = soft.copy()
    half[0, 1] = 0
    half[0, 1, [5, MASK]] = 0.5
    _, aux = esm2(soft=half, output="class", taps=taps)
    n, m = 19, 2.5
    expected = np.asarray(esm2.embed[...])[5] * 0.5 * 0.88 / (1 - m / n)
    assert np.allclose(aux["residual"][0, 0, 1], expected, rtol=1e-5, atol=1e-7)

    @jax.jit
    @jax.grad
    def slope(soft):
        return shallow.forward(batch, soft=soft)[0][0, 4, 7]  # ids say where padding is

    shallow = random_esm(tiny(ffn_widths=(F,)))
    gradient = np.asarray(slope(jnp.asarray(soft)))
    assert np.isfinite(gradient).all() and (np.abs(gradient[0, 1:18]).max(-1) > 0).all() and not gradient[1:].any()


@pytest.mark.parametrize("how", ["mean", pytest.param("cls", marks=pytest.mark.long)])
def test_the_classifier(how):
    """Alone, padded and packed; the mean is over residues, without <cls>, <eos> and padding."""
    model = random_esm(tiny(pool=how))
    batch = padded(T)
    hidden = np.asarray(model(batch, output="hidden")[0])
    pooled = np.stack([h[1:len(row) - 1].mean(0) if how == "mean" else h[0]
                       for h, row in zip(hidden, rows(), strict=True)])
    head = {path[-1]: np.asarray(leaf) for path, leaf in leaves(model).items() if path[0] == "classifier"}
    expected = np.tanh(pooled @ head["dense"] + head["dense_bias"]) @ head["out"] + head["out_bias"]
    classes = np.asarray(model(batch, output="class")[0])
    assert classes.shape == (3, 5) and apart(classes, expected) < 1e-5
    tokens, segments, _ = packed(44)
    row = np.asarray(model(tokens, segments=segments, output="class", num_segments=4)[0])
    assert row.shape == (1, 4, 5) and apart(row[0, :3], expected) < 1e-5
    empty = np.tanh(head["dense_bias"]) @ head["out"] + head["out_bias"]  # a segment that is not there
    assert np.allclose(row[0, 3], empty, atol=1e-5)
    with pytest.raises(UserError, match="segments are given, num_segments is None; packed rows need both"):
        model(tokens, segments=segments, output="class")


def shapes():
    heads = {"query": (3, T, N, H), "key": (3, T, N, H), "value": (3, T, N, H), "probability": (3, N, T, T),
             "output": (3, T, D)}
    return {"embedding": (3, T, D), "residual": (3, T, D), "ffn.up": (3, T, F), "ffn.hidden": (3, T, F),
            "ffn.output": (3, T, D), **{f"attention.{name}": shape for name, shape in heads.items()}}


def lead(point):
    return {"embedding": (), "residual": (L + 1,)}.get(point, (L,))


@pytest.mark.parametrize("name", ["esm2", pytest.param("roberta", marks=pytest.mark.long)])
def test_every_point_records_and_edits(name):
    model = random_esm(CONFIGS[name])
    tokens = padded(T)
    logits = np.asarray(model(tokens)[0])
    recorded, aux = model(tokens, taps=Taps(record=POINTS))
    assert apart(recorded, logits) < 1e-5 and aux.keys() == set(POINTS)
    assert {point: value.shape for point, value in aux.items()} == {p: lead(p) + s for p, s in shapes().items()}
    # One program: `which` chooses the point that gets noise, or is halved.
    graphdef, state = nnx.split(model)
    noise = {p: jnp.asarray(np.random.default_rng(1).normal(size=lead(p) + s), jnp.float32)
             for p, s in shapes().items()}

    @jax.jit
    def edited(add, scale):
        taps = Taps(add={p: add[i] * noise[p] for i, p in enumerate(POINTS)}, record=("ffn.hidden", "residual"),
                    scale={p: jnp.broadcast_to(scale[i], (1,) * (len(s) + (p != "embedding"))) for i, (p, s) in
                           enumerate((p, shapes()[p]) for p in POINTS)})
        return nnx.merge(graphdef, state).forward(tokens, taps=taps)

    zeros, ones = jnp.zeros(len(POINTS)), jnp.ones(len(POINTS))
    mask = tokens != PAD
    assert apart(edited(zeros, ones)[0], recorded) < 1e-5
    for i, point in enumerate(POINTS):
        out, _ = edited(zeros.at[i].set(0.3), ones)
        assert apart(np.asarray(out)[mask], logits[mask]) > 1e-3, point
        out, _ = edited(zeros, ones.at[i].set(0.5))
        assert apart(np.asarray(out)[mask], logits[mask]) > 1e-3, point
    _, aux = edited(zeros.at[POINTS.index("ffn.hidden")].set(1.0), zeros)
    assert np.allclose(aux["ffn.hidden"], noise["ffn.hidden"], atol=1e-6)


def test_points_show_what_they_say(esm2):
    tokens = padded(T)
    _, aux = esm2(tokens, taps=Taps(record=POINTS))
    aux = {point: np.asarray(value) for point, value in aux.items()}
    assert np.array_equal(aux["embedding"], aux["residual"][0])
    added = aux["attention.output"] + aux["ffn.output"]
    assert np.allclose(aux["residual"][1:], aux["residual"][:-1] + added, atol=1e-5)
    erf = np.vectorize(__import__("math").erf)
    assert np.allclose(aux["ffn.hidden"], aux["ffn.up"] * 0.5 * (1 + erf(aux["ffn.up"] / 2 ** 0.5)), atol=1e-6)
    p = aux["attention.probability"]
    assert np.allclose(p.sum(-1), 1, atol=1e-5) and not p[:, :, :, :, :][:, 2][..., 9:].any()
    # query: the bare projection of the normed residual stream
    parts = {path[-2:]: np.asarray(leaf) for path, leaf in leaves(esm2).items() if path[0] == "groups"}
    x = aux["residual"][0]
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    x = x * parts["attention_norm", "scale"][0] + parts["attention_norm", "bias"][0]
    query = np.einsum("btd,dnh->btnh", x, parts["attention", "query"][0]) + parts["attention", "query_bias"][0]
    assert np.allclose(aux["attention.query"][0], query, atol=1e-4)


def test_proteins_in_a_row_do_not_see_each_other(esm2):
    tokens, segments, places = packed(44)
    _, aux = esm2(tokens, segments=segments, taps=Taps(record=("attention.probability",)), output="none")
    p = np.asarray(aux["attention.probability"])[:, 0]
    inside = segments[0][:, None] == segments[0]
    real = segments[0] > 0
    assert (p[..., ~inside & real[:, None]] == 0).all() and (p[..., inside & real[:, None]] > 0).all()


def test_contacts(esm2):
    tokens = padded(T)
    contacts = np.asarray(esm2.contacts(tokens))
    assert contacts.shape == (3, T - 2, T - 2) and contacts.dtype == np.float32
    assert np.allclose(contacts, contacts.swapaxes(1, 2), atol=1e-6) and ((contacts > 0) & (contacts < 1)).all()
    alone = np.asarray(esm2.contacts(rows()[1][None]))[0]
    assert np.allclose(alone, contacts[1, :7, :7], atol=1e-5)
    _, aux = esm2(tokens, taps=Taps(record=("attention.probability",)), output="none")
    maps = np.asarray(corrected_maps(aux["attention.probability"][0], jnp.asarray((tokens != PAD) & (tokens != EOS))))
    assert maps.shape == (3, N, T - 2, T - 2) and np.abs(maps.sum(-1)).max() < 1e-5
    assert not maps[2, :, 7:].any() and not maps[2, ..., 7:].any()
    with pytest.raises(UserError, match="no contact head"):
        random_esm(CONFIGS["roberta"]).contacts(tokens)
    with pytest.raises(UserError, match="rows of 2 tokens have no residue"):
        esm2.contacts(tokens[:, :2])


@pytest.mark.parametrize("length, heads, kv_heads, packed_row", [(5, 4, 4, True), (300, 4, 2, True),
                                                                (515, 2, 2, False)])
def test_attention_in_blocks(length, heads, kv_heads, packed_row):
    """What runs a few heads and a block of queries at a time on CPU is the plain formula, its gradient too."""
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.normal(size=(2, length, heads, 8)), jnp.float32)
    k, v = (jnp.asarray(rng.normal(size=(2, kv_heads, length, 8)), jnp.float32) for _ in range(2))
    valid = np.arange(length) < length - 2
    allowed = np.broadcast_to(valid[None, None], (2, 1, length))
    if packed_row:
        segments = np.arange(length) * 3 // length
        allowed = np.broadcast_to(allowed & (segments[:, None] == segments), (2, length, length))

    def run(taps):
        def out(q, k, v):
            y = attend(q, k, v, jnp.asarray(allowed), taps.probe(jnp.ones((2, length), bool)), causal=False)
            return (y ** 2).sum(), y
        return jax.jit(jax.grad(out, (0, 1, 2), has_aux=True))(q, k, v)

    (gradient, y), (expected, plain) = run(NO_TAPS), run(Taps(record=("attention.probability",)))
    assert apart(y, plain) < 1e-5
    assert all(apart(a, b) < 1e-4 for a, b in zip(gradient, expected, strict=True))


def test_scanned_unrolled_and_recomputed_layers_agree(esm2):
    tokens = padded(T)
    logits = esm2(tokens)[0]
    arrays = leaves(esm2)
    split = {}
    for path, leaf in arrays.items():
        for i in range(L) if path[0] == "groups" else ():
            split["groups", i, *path[2:]] = leaf[i:i + 1]
    other = {path: leaf for path, leaf in arrays.items() if path[0] != "groups"}
    unrolled = build(tiny(scan_layers=False), split | other)
    assert unrolled.cfg.groups == ((0, 1), (1, 2), (2, 3)) and apart(unrolled(tokens)[0], logits) < 1e-5
    for remat in ("nothing_saveable", "products_saveable"):
        again = build(tiny(remat=remat), arrays)
        assert apart(again(tokens)[0], logits) < 1e-5
        gradients = [jax.tree.leaves(jax.grad(lambda state, model=model: nnx.merge(nnx.split(model)[0], state).forward(
            tokens)[0].sum())(nnx.state(model))) for model in (again, esm2)]
        assert all(np.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(*gradients, strict=True))
    block = esm2.block(1)
    assert np.array_equal(block.ffn.up[...], arrays["groups", 0, "ffn", "up"][1])


def test_compute_dtype(esm2):
    exact = np.asarray(esm2(padded(T))[0])
    rough = build(dataclasses.replace(esm2.cfg, dtype="bfloat16"), leaves(esm2))
    logits, aux = rough(padded(T), taps=Taps(record=("residual",)))
    assert logits.dtype == np.float32 and aux["residual"].dtype == jnp.bfloat16
    assert 0 < np.sqrt(np.mean((np.asarray(logits) - exact) ** 2)) < 0.1 * exact.std()


def test_a_sharded_batch_on_eight_devices(esm2):
    tokens = np.concatenate([padded(T)] * 3)[:8]
    expected = esm2(tokens)[0]
    mesh = Mesh(np.array(jax.devices()), ("data",))
    graphdef, state = nnx.split(esm2)
    placed = nnx.merge(graphdef, jax.device_put(state, NamedSharding(mesh, PartitionSpec())))
    out, _ = placed(jax.device_put(tokens, NamedSharding(mesh, PartitionSpec("data"))))
    assert apart(out, expected) < 1e-5 and {len(s.data) for s in out.addressable_shards} == {1}


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_name_their_logical_axes(name):
    for path, variable in nnx.to_flat_state(nnx.state(random_esm(CONFIGS[name]))):
        names = variable.get_metadata("out_sharding")
        assert len(names) == variable[...].ndim, path
        assert (names[0] == "layers") == (path[0] == "groups"), path


@pytest.mark.parametrize("call, words", [
    (lambda m: m(np.array([[0, 33, 2]], np.int32)), "token id 33 is not in the vocabulary; ids are 0 to 32"),
    (lambda m: m(np.array([[0, -1, 2]], np.int32)), "token id -1 is not"),
    (lambda m: m.forward(np.zeros(5, np.int32)), r"tokens are int32\[5\]; a batch of rows is needed: int32\[B, T\]"),
    (lambda m: m.forward(np.zeros((2, 5))), "tokens are float"),
    (lambda m: m(np.zeros((0, 5), np.int32)), r"tokens are int32\[0, 5\]; a batch of rows is needed"),
    (lambda m: m(np.zeros((2, 0), np.int32)), r"tokens are int32\[2, 0\]; a batch of rows is needed"),
    (lambda m: m.forward(soft=np.zeros((2, 5, 20), np.float32)), r"float\[B, T, 33\]"),
    (lambda m: m.forward(), "neither tokens nor soft tokens are given"),
    (lambda m: m(padded(T), output="logit"), "output 'logit' is not one of logits, hidden, class, none"),
    (lambda m: m(padded(T), taps=Taps(record=("ffn.gate",))), "'ffn.gate' is not a point of this model"),
    (lambda m: random_esm(tiny(lm_head=False, classes=0))(padded(T)), "no masked-LM head"),
    (lambda m: random_esm(tiny(lm_head=False, classes=0))(padded(T), output="class"), "no classifier"),
    (lambda m: EsmConfig.tiny(num_heads=5), "d_model 32 is not a multiple of num_heads 5"),
    (lambda m: EsmConfig.tiny(num_heads=32), "a head of width 1 is odd"),
    (lambda m: EsmConfig.tiny(pool="max"), "pool 'max' is not one of mean, cls"),
    (lambda m: EsmConfig.tiny(inv_freq=(1.0,)), "inv_freq has 1 frequencies; heads of width 8 need 4"),
    (lambda m: EsmConfig.tiny(classes=-1), "classes -1"),
])  # fmt: skip
def test_bad_input_is_told(esm2, call, words):
    with pytest.raises(UserError, match=words):
        call(esm2)


def test_an_id_beyond_the_vocabulary_on_a_device_gives_nan(esm2):
    """Not the logits of the nearest token, silently."""
    logits = np.asarray(esm2(jnp.array([[0, 33, 2]], jnp.int32))[0])
    assert np.isnan(logits).any()


def test_proteins_of_the_tests_have_odd_letters():
    assert set("XBUZO.-") <= set(PROTEINS[0])

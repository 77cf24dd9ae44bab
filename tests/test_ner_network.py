"""CNN-CNN-LSTM and its CRF: exact inference, padding, histories, beams, dropout, taps."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmodels import Taps
from jaxmodels.cnn_cnn_lstm.config import CnnCnnLstmConfig
from jaxmodels.cnn_cnn_lstm.network import END, START, CnnCnnLstm, TagLstm, is_word
from jaxmodels.errors import UserError
from jaxmodels.layers import crf
from jaxmodels.layers.recurrent import Lstm

CFG = CnnCnnLstmConfig.tiny()
V, T, M = CFG.tags, 24, 6


def sentence(n, seed):
    """Word ids [n + 2] and their characters."""
    r = np.random.default_rng(seed)
    words = np.array([START, *r.integers(END + 1, CFG.words, n), END], np.int32)
    chars = r.integers(1, CFG.chars, (n + 2, M)).astype(np.int32)
    chars[np.arange(M) >= r.integers(1, M + 1, n + 2)[:, None]] = 0
    chars[[0, -1]] = 0
    return words, chars


def row(*placed):
    """(words, chars) of one row of T with sentences at places."""
    words, chars = np.zeros((1, T), np.int32), np.zeros((1, T, M), np.int32)
    for at, (ids, letters) in placed:
        words[0, at:at + len(ids)], chars[0, at:at + len(ids)] = ids, letters
    return words, chars


def rows(*parts):
    return tuple(np.concatenate(arrays) for arrays in zip(*parts, strict=True))


@pytest.fixture(scope="module", params=["lstm", "crf"])
def model(request):
    return CnnCnnLstm(dataclasses.replace(CFG, head=request.param), rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def lstm_model():
    return CnnCnnLstm(CFG, rngs=nnx.Rngs(0))


decode = nnx.jit(lambda model, words, chars: model.decode(words, chars))


def test_neighbours_and_padding_change_nothing(model):
    """Alone, at the end of a row, and between two neighbours as near as they may be."""
    one, left, right = sentence(5, 0), sentence(4, 1), sentence(6, 2)
    gap = CFG.reach
    at = 6 + gap
    words, chars = rows(row((0, one)), row((T - 7, one)), row((0, left), (at, one), (at + 7 + gap, right)))
    logits, _ = model(words, chars)
    decoded = decode(model, words, chars)
    for place, r in ((T - 7, 1), (at, 2)):
        np.testing.assert_allclose(logits[r, place + 1:place + 6], logits[0, 1:6], atol=1e-5)
        assert decoded.tags[r, place + 1:place + 6].tolist() == decoded.tags[0, 1:6].tolist()
        np.testing.assert_allclose(decoded.log_prob[r, place + 1:place + 6], decoded.log_prob[0, 1:6], atol=1e-5)
    assert not np.asarray(decoded.tags)[~np.asarray(is_word(words))].any()
    near = rows(row((0, one)), row((0, one)), row((0, left), (at - gap, one)))  # without a gap they do see each other
    assert np.abs(model(*near)[0][2, at - gap + 1:at - gap + 6] - logits[0, 1:6]).max() > 1e-3


def test_a_loss_is_that_of_its_sentences(model):
    parts = [row((0, sentence(5, 0))), row((0, sentence(8, 1))), row((0, sentence(5, 0)), (9, sentence(8, 1)))]
    tags = np.random.default_rng(0).integers(0, V, (3, T)).astype(np.int32)
    tags[2, 1:6], tags[2, 10:18] = tags[0, 1:6], tags[1, 1:9]
    loss = nnx.jit(lambda model, words, chars, tags: model.loss({"words": words, "chars": chars, "tags": tags}, None))
    (a, sums), (b, _), (both, joined) = (loss(model, *part, tags[i:i + 1]) for i, part in enumerate(parts))
    np.testing.assert_allclose(a + b, both, rtol=1e-5)
    assert sums["weight"] == 5 and joined["weight"] == 13
    scored = nnx.jit(lambda model, words, chars, tags: model.score(words, chars, tags))(model, *parts[2], tags[2:])
    np.testing.assert_allclose(-scored.total[0], both, rtol=1e-5)


def test_tags_are_scored_as_they_are_decoded(model):
    words, chars = rows(row((0, sentence(9, 3))), row((2, sentence(4, 4))))
    found = decode(model, words, chars)
    again = nnx.jit(lambda model, *a: model.score(*a))(model, words, chars, found.tags)
    np.testing.assert_allclose(again.total, found.total, rtol=1e-4)
    np.testing.assert_allclose(again.log_prob, found.log_prob, atol=1e-5)
    assert (found.entropy >= 0).all() and found.total.max() < 0


# The LSTM decoder


def test_history_is_what_stands_before(lstm_model):
    words, chars = row((0, sentence(8, 0)))
    tags = np.zeros((1, T), np.int32)
    changed = tags.copy()
    changed[0, 4] = 3
    a, b = (np.asarray(lstm_model(words, chars, t)[0]) for t in (tags, changed))
    assert np.array_equal(a[0, :5], b[0, :5]) and np.abs(a[0, 5] - b[0, 5]).max() > 1e-5


def test_perfect_logits_give_gold_tags():
    """A decoder whose state shows the tag that its input shows: greedy and beam find it."""
    cfg = CnnCnnLstmConfig.tiny(tags=4, word_filters=4, char_filters=1, d_word=1, d_hidden=4)
    decoder = TagLstm(cfg, rngs=nnx.Rngs(0))
    gate = np.zeros((cfg.d_enc + cfg.d_tag, 4, 4), np.float32)  # of inputs, to i f g o
    gate[:4, 2] = 10 * np.eye(4)
    decoder.lstm.input[...] = jnp.asarray(gate.reshape(-1, 16))
    decoder.lstm.hidden[...] = jnp.zeros((4, 16))
    decoder.lstm.bias[...] = jnp.repeat(jnp.array([10.0, -10.0, 0.0, 10.0]), 4)
    decoder.out[...] = 10 * jnp.eye(4)
    run = nnx.jit(lambda decoder, h, gold, real: (decoder.greedy(decoder.inputs(h), real), decoder.beam(h, real, 3),
                                                  decoder.forced(h, gold, real)[0]))
    gold = np.array([[0, 3, 1, 1, 2, 0, 0]])
    real = np.array([[1, 1, 1, 1, 1, 0, 0]], bool)
    h_enc = np.zeros((1, 7, cfg.d_enc), np.float32)
    h_enc[0, np.arange(7), gold[0]] = 1
    (tags, logits), wide, forced = run(decoder, h_enc, gold, real)
    assert tags[real].tolist() == wide[real].tolist() == gold[real].tolist()
    np.testing.assert_allclose(np.asarray(forced)[real], np.asarray(logits)[real], atol=1e-5)


def test_a_beam_is_never_below_greedy_and_a_wide_one_finds_the_best():
    """Three tags, three words: 9 hypotheses lose nothing."""
    cfg = CnnCnnLstmConfig.tiny(tags=3, dropout=0.0)
    words, chars = rows(*[row((0, sentence(n, 10 + n))) for n in (1, 2, 3)])
    every = np.zeros((27, T), np.int32)
    every[:, 1:4] = list(itertools.product(range(3), repeat=3))

    @nnx.jit
    def run(model):
        h_enc, real = model.encode(words, chars)[0], is_word(words)
        totals = model.score_encoded(jnp.repeat(h_enc[2:], 27, 0), real[[2] * 27], every).total
        return model.decode_encoded(h_enc, real), model.decode_encoded(h_enc, real, beam=9), totals

    gained = 0.0
    for seed in range(3):
        model = CnnCnnLstm(cfg, rngs=nnx.Rngs(seed))
        model.tags.out[...] = model.tags.out[...] * 4  # so that histories matter
        greedy, best, totals = run(model)
        assert (best.total >= greedy.total - 1e-6).all()
        gained += float((best.total - greedy.total).sum())
        np.testing.assert_allclose(best.total[2], totals.max(), rtol=1e-5)
        assert best.tags[2].tolist() == every[int(totals.argmax())].tolist()
        np.testing.assert_allclose(np.exp(totals).sum(), 1, rtol=1e-4)  # locally normalised
    assert gained > 0.01
    with pytest.raises(UserError, match="beam=0"):
        model.decode(words, chars, beam=0)


def test_dropout_is_on_with_a_key_alone(lstm_model):
    words, chars = row((0, sentence(9, 0)))
    run = nnx.jit(lambda model, key, decoder: model.decode_encoded(
        model.encode(words, chars, key=key)[0], is_word(words), key=decoder, probabilities=True).log_probs)
    a, b = jax.random.key(0), jax.random.key(1)
    assert np.array_equal(run(lstm_model, a, b), run(lstm_model, a, b))
    assert not np.allclose(run(lstm_model, a, a), run(lstm_model, a, b))
    assert not np.allclose(run(lstm_model, a, a), run(lstm_model, b, a))
    batch = {"words": words, "chars": chars, "tags": np.zeros_like(words)}
    loss = nnx.jit(lambda model, key: model.loss(batch, key)[0])
    assert loss(lstm_model, a) != loss(lstm_model, b)


def test_dropout_keeps_means_and_word_drop_keeps_characters():
    words, chars = row((0, sentence(9, 0)))
    cfg = dataclasses.replace(CFG, dropout=0.0, word_drop=0.996)
    model = CnnCnnLstm(cfg, rngs=nnx.Rngs(0))
    batch = {"words": words, "chars": chars, "tags": np.zeros_like(words)}
    unknown = {**batch, "words": np.where(words > END, 1, words)}
    loss = nnx.jit(lambda model, batch, key: model.loss(batch, key)[0])
    dropped = loss(model, batch, jax.random.key(3))
    np.testing.assert_allclose(dropped, loss(model, unknown, jax.random.key(3)), rtol=1e-5)
    assert abs(dropped - loss(model, {**batch, "chars": np.zeros_like(chars)}, jax.random.key(3))) > 1e-3


@pytest.mark.parametrize("changes", [
    {"dtype": "bfloat16"}, pytest.param({"d_tag": 0}, marks=pytest.mark.long),
    *(pytest.param({"char_layers": 2, "residual": residual}, marks=pytest.mark.long)
      for residual in ("auto", "project", "none")),
])
def test_options(changes):
    words, chars = row((0, sentence(9, 0)))
    model = CnnCnnLstm(dataclasses.replace(CFG, **changes), rngs=nnx.Rngs(0))
    logits, _ = model(words, chars)
    assert logits.dtype == jnp.float32 and np.isfinite(logits).all()
    if "dtype" in changes:
        tags = np.ones_like(words)
        whole = CnnCnnLstm(CFG, rngs=nnx.Rngs(0))(words, chars, tags)[0]
        near = model(words, chars, tags)[0]
        assert 1e-6 < np.abs(near - whole)[0, 1:10].max() < 0.05


@pytest.mark.parametrize("changes, told", [
    ({"word_width": 4}, "word_width=4 must be odd"), ({"dropout": 1.0}, "dropout=1.0"), ({"tags": 0}, "tags=0"),
    ({"dropout": -0.1}, "dropout=-0.1"), ({"d_tag": -1}, "d_tag=-1"),
])
def test_bad_sizes(changes, told):
    with pytest.raises(UserError, match=told):
        dataclasses.replace(CFG, **changes)


# Taps


def test_taps_record_and_change(lstm_model):
    words, chars = row((0, sentence(9, 0)))
    tags = np.zeros_like(words)
    plain, aux = lstm_model(words, chars, tags, taps=Taps(record=("embedding", "char.conv", "word.conv",
                                                                  "decoder.state")))
    shapes = {name: value.shape for name, value in aux.items()}
    assert shapes == {"embedding": (1, T, 12), "char.conv": (1, 1, T, M, 10), "word.conv": (2, 1, T, 16),
                      "decoder.state": (1, 1, T, 12)}
    off = np.ones((2, 1, 1, 16), bool)
    off[0, ..., 3] = False
    cut, aux = lstm_model(words, chars, tags, taps=Taps(record=("word.conv",), mask={"word.conv": off}))
    assert not aux["word.conv"][0, ..., 3].any() and np.abs(cut - plain).max() > 1e-5
    state = jax.tree.map(np.asarray, lstm_model(words, chars, tags, taps=Taps(add={"decoder.state": 0.1}))[0])
    assert np.abs(state - plain).max() > 1e-4
    with pytest.raises(UserError, match="'word.konv' is not a point of this model; did you mean 'word.conv'"):
        lstm_model(words, chars, tags, taps=Taps(record=("word.konv",)))
    with pytest.raises(UserError, match="an edited decoder.state would choose other tags"):
        lstm_model(words, chars, taps=Taps(add={"decoder.state": 0.1}))


# The layers


def test_lstm_forgets_at_the_first_word_and_has_the_gradient_of_its_steps():
    lstm = Lstm(3, 4, rngs=nnx.Rngs(0))
    r = np.random.default_rng(0)
    z = jnp.asarray(r.normal(size=(2, 6, 16)), jnp.float32)
    first = np.zeros((2, 6), bool)
    first[:, 0] = first[0, 3] = True
    assert lstm.bias[...][4:8].tolist() == [1.0] * 4 and not lstm.bias[...][8:].any()

    graphdef, params = nnx.split(lstm)

    def by_steps(weight, z):
        lstm = nnx.merge(graphdef, params, copy=True)
        lstm.hidden[...] = weight
        out, state = [], lstm.start(2)
        for t in range(6):
            state = jax.tree.map(lambda s: jnp.where(first[:, t, None], 0, s), state)
            state = lstm.step(z[:, t], state)
            out.append(state.h)
        return jnp.stack(out, axis=1)

    def scanned(weight, z):
        lstm = nnx.merge(graphdef, params, copy=True)
        lstm.hidden[...] = weight
        return lstm(z, first)

    weight = lstm.hidden[...]
    mix = jnp.asarray(r.normal(size=(2, 6, 4)), jnp.float32)
    for a, b in zip(*(jax.jit(jax.value_and_grad(lambda w, z: (f(w, z) * mix).sum(), argnums=(0, 1)))(weight, z)
                      for f in (by_steps, scanned)), strict=True):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), a, b)


@pytest.mark.long
@pytest.mark.torch
def test_lstm_is_that_of_torch():
    import torch

    lstm = Lstm(3, 4, rngs=nnx.Rngs(1))
    other = torch.nn.LSTM(3, 4, batch_first=True)
    with torch.no_grad():
        other.weight_ih_l0.copy_(torch.tensor(np.asarray(lstm.input[...]).T))
        other.weight_hh_l0.copy_(torch.tensor(np.asarray(lstm.hidden[...]).T))
        other.bias_ih_l0.copy_(torch.tensor(np.asarray(lstm.bias[...])))
        other.bias_hh_l0.zero_()
    x = np.random.default_rng(0).normal(size=(2, 5, 3)).astype(np.float32)
    first = np.arange(5) == np.zeros((2, 1))
    np.testing.assert_allclose(lstm(lstm.project(jnp.asarray(x)), first), other(torch.tensor(x))[0].detach().numpy(),
                               atol=1e-6)


def test_crf_against_enumeration():
    """4 words, 3 tags; the second row holds a sentence of 2 and one of 1."""
    r = np.random.default_rng(0)
    w = crf.CrfWeights(*(jnp.asarray(r.normal(size=shape), jnp.float32) for shape in (3, (3, 3), 3)))
    e = jnp.asarray(r.normal(size=(2, 4, 3)), jnp.float32)
    real = np.array([[1, 1, 1, 1], [1, 1, 0, 1]], bool)

    def by_hand(tags, row, places):
        tags = list(tags)
        total = w.start[tags[0]] + w.stop[tags[-1]] + sum(e[row, p, t] for p, t in zip(places, tags, strict=True))
        return float(total + sum(w.between[a, b] for a, b in zip(tags, tags[1:], strict=False)))

    partition, best, marginal = map(np.asarray, jax.jit(lambda *a: (crf.log_partition(*a), crf.viterbi(*a),
                                                                    crf.marginals(*a)))(w, e, real))
    totals = np.zeros(2)
    for row_, places in ((0, [0, 1, 2, 3]), (1, [0, 1]), (1, [3])):
        every = list(itertools.product(range(3), repeat=len(places)))
        scores = np.array([by_hand(tags, row_, places) for tags in every])
        log_z = np.log(np.exp(scores).sum())
        totals[row_] += log_z
        assert best[row_, places].tolist() == list(every[int(scores.argmax())])
        p = np.exp(scores - log_z)
        for i, place in enumerate(places):
            mine = [p[[tags[i] == v for tags in every]].sum() for v in range(3)]
            np.testing.assert_allclose(marginal[row_, place], mine, atol=1e-5)
    np.testing.assert_allclose(partition, totals, rtol=1e-5)
    tags = np.array([[2, 0, 1, 1], [0, 2, 7, 1]])
    expected = [by_hand(tags[0], 0, [0, 1, 2, 3]), by_hand(tags[1, :2], 1, [0, 1]) + by_hand(tags[1, 3:], 1, [3])]
    np.testing.assert_allclose(crf.score(w, e, tags, real), expected, rtol=1e-5)

"""What to label next: scores on hand-made numbers, budgets, representatives (ner_active_learning.md tests 3, 4, 8)."""

import tracemalloc
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from analysis.active_learning import acquisition, selection, strategies
from jaxmodels.cnn_cnn_lstm.config import CnnCnnLstmConfig
from jaxmodels.cnn_cnn_lstm.network import END, PAD, START, UNK
from jaxmodels.cnn_cnn_lstm.passes import _passes
from jaxmodels.errors import UserError

LOG = np.log(np.array([[0.9, 0.9, 0.9, np.nan], [0.5, 0.5, 0.9, np.nan], [0.9, 0.9, 0.9, 0.9], [np.nan] * 4]))
MASK = np.array([[1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]], bool)


def test_mnlp_on_hand_made_probabilities():
    found = -acquisition.mnlp(LOG, MASK)  # the paper's sign
    np.testing.assert_allclose(found[:3], [-0.10536, -0.49722, -0.10536], atol=5e-6)
    assert found[3] == np.inf


def test_least_confidence_orders_as_the_probability_does_and_prefers_the_long():
    found = acquisition.least_confidence(LOG, MASK)
    np.testing.assert_allclose(-np.expm1(-found[:3]), [1 - 0.729, 1 - 0.225, 1 - 0.6561])
    assert found[2] > found[0] and acquisition.mnlp(LOG, MASK)[2] == pytest.approx(acquisition.mnlp(LOG, MASK)[0])
    long = acquisition.least_confidence(np.full((2, 300), -1.0), np.arange(300) < np.array([[299], [300]]))
    assert long[1] > long[0]  # as probabilities both are 1.0


def test_padding_changes_nothing():
    wide = np.pad(LOG, ((0, 0), (0, 3)), constant_values=-7.0)
    mask = np.pad(MASK, ((0, 0), (0, 3)))
    for score in (acquisition.mnlp, acquisition.least_confidence, acquisition.token_entropy):
        np.testing.assert_array_equal(score(wide, mask), score(LOG, MASK))


def test_bald_counts_votes():
    same = np.full((10, 1, 3), 4)
    mask = np.array([[1, 1, 0]], bool)
    split = same.copy()
    split[:4, 0, 0] = 2  # 60 to 40 at the first word
    split[:9, 0, 2] = np.arange(9)  # where no word is
    assert acquisition.bald_vote(same, mask)[0] == 0
    np.testing.assert_allclose(acquisition.bald_vote(split, mask), [0.4 / 2])
    np.testing.assert_allclose(acquisition.bald_vote(split, mask[:, :1] & [[True, False, False]]), [0.4])
    np.testing.assert_allclose(acquisition.whole_sequence(split, mask), [-0.6])


class Stub(nnx.Module):
    """Passes that are equally in doubt, or sure of one tag each, by the key."""

    def __init__(self, torn):
        self.torn, self.cfg = torn, CnnCnnLstmConfig.tiny(tags=2)

    def words(self, words, vectors, key):
        return vectors, None

    def decode_encoded(self, h, real, key, probabilities):
        tags = jax.random.bernoulli(key, shape=real.shape).astype(jnp.int16)
        p = jnp.full((*real.shape, 2), 0.5) if self.torn else jax.nn.one_hot(tags, 2)
        return SimpleNamespace(tags=tags, log_probs=jnp.log(jnp.maximum(p, 1e-30)))


def test_information_of_passes():
    words, keys = jnp.array([[START, END + 1, UNK, END, PAD]]), jax.random.split(jax.random.key(0), 20).reshape(5, 4)
    found = [_passes(*nnx.split(Stub(torn)), words, jnp.zeros((1, 5, 3)), keys, "all", True) for torn in (True, False)]
    assert found[0][0].shape == (20, 1, 5)
    np.testing.assert_allclose(found[0][1], np.zeros((1, 5)), atol=1e-6)  # nothing to be learned of any
    share = np.asarray(found[1][0])[:, 0, 1:3].mean(0)  # of passes that are sure of tag 1: all doubt is between them
    assert ((share > 0) & (share < 1)).all()
    wanted = -share * np.log(share) - (1 - share) * np.log(1 - share)
    np.testing.assert_allclose(found[1][1], [[0, *wanted, 0, 0]], atol=1e-5)


def test_entropy_of_words():
    mask = np.ones((1, 2), bool)
    np.testing.assert_allclose(acquisition.token_entropy(np.array([[1.0, 3.0]]), mask), [2.0])
    np.testing.assert_allclose(acquisition.token_entropy(np.array([[1.0, 3.0]]), mask, mean=False), [4.0])


def test_a_diverged_model_is_told_of():
    with pytest.raises(ValueError, match="1 of 4 scores are NaN"):
        acquisition.mnlp(np.where(np.arange(4)[:, None] == 1, np.nan, LOG), MASK)


def test_representatives_are_looked_for_among_what_fits(monkeypatch):
    pool = [["w"] * n for n in (10, 10, 3, 4)]  # the first two are in most doubt, and fill four budgets
    monkeypatch.setattr(strategies, "scores", lambda *_, **__: np.array([4.0, 3, 2, 1]))
    monkeypatch.setattr(strategies, "vectors", lambda tagger, sentences: np.eye(4)[:len(sentences)])
    chosen = [strategies.choose("submod", None, pool, 5, overshoot=overshoot) for overshoot in (False, True)]
    assert set(chosen[0]) <= {2, 3} and len(chosen[0]) == 1 and set(chosen[1]) <= {0, 1}
    with pytest.raises(UserError, match="a budget of 2 words is below the shortest sentence of the pool, 3 words"):
        strategies.choose("submod", None, pool, 2, overshoot=False)


SCORES = np.array([0.1, 0.9, 0.5, 0.5, 0.5, 0.9])
LENGTHS = np.array([3, 10, 4, 4, 4, 50])


def test_budgets_are_kept():
    first = selection.by_score(SCORES, LENGTHS, 12, seed=1)
    assert set(first) <= {1, 5, 2, 3, 4} and LENGTHS[first].sum() >= 12 and LENGTHS[first[:-1]].sum() < 12
    strict = selection.by_score(SCORES, LENGTHS, 18, seed=1, overshoot=False)
    assert LENGTHS[strict].sum() <= 18 and 5 not in strict and strict[0] == 1 and len(set(strict)) == len(strict)
    available = np.array([1, 0, 1, 1, 0, 0], bool)
    assert set(selection.by_score(SCORES, LENGTHS, 99, available=available)) == {0, 2, 3}


def test_equal_scores_are_drawn_and_not_taken_in_the_order_of_the_corpus():
    equal, lengths = np.zeros(50), np.ones(50, int)
    a, b, c = (selection.by_score(equal, lengths, 10, seed=seed) for seed in (0, 0, 1))
    assert a.tolist() == b.tolist() != c.tolist() and a.tolist() != list(range(10))


def pool():
    r = np.random.default_rng(0)
    centres = np.array([[0, 0], [10, 0], [0, 10]])
    return np.concatenate([c + r.normal(size=(20, 2)) / 10 for c in centres]), np.full(60, 5)


@pytest.mark.parametrize("choose", [selection.facility_location, selection.k_means_pp, selection.core_set])
def test_representatives_come_from_everywhere(choose):
    vectors, lengths = pool()
    found = choose(vectors, lengths, 15)
    assert len(found) == 3 and {int(i) // 20 for i in found} == {0, 1, 2}
    assert found.tolist() == choose(vectors, lengths, 15).tolist()
    mixed = np.where(np.arange(60) % 2, 5, 9)
    strict = choose(vectors, mixed, 22, overshoot=False)
    assert 18 <= mixed[strict].sum() <= 22 and len(set(strict)) == len(strict)
    assert sorted(choose(vectors, lengths, 10_000)) == list(range(60))  # all, each once


def test_lazy_greedy_is_greedy():
    vectors, _ = pool()
    lengths = np.random.default_rng(1).integers(3, 9, 60)
    distance = np.linalg.norm(vectors[:, None] - vectors[None], axis=-1)
    w = distance.max() - distance
    covered, plain, left = np.zeros(60), [], set(range(60))
    while lengths[plain].sum() < 40:
        gains = {k: np.maximum(w[:, k] - covered, 0).sum() / lengths[k] for k in left}
        k = max(gains, key=gains.get)
        plain.append(k)
        left.remove(k)
        covered = np.maximum(covered, w[:, k])
    assert selection.facility_location(vectors, lengths, 40).tolist() == plain
    few = selection.facility_location(vectors, lengths, 20, candidates=np.array([3, 30, 31]))
    assert set(few) <= {3, 30, 31}


def test_core_set_stays_away_from_what_is_labelled():
    vectors, lengths = pool()
    assert selection.core_set(vectors, lengths, 10, labelled=vectors[:20])[0] >= 20


def test_core_set_holds_no_distances_between_all_pairs():
    r = np.random.default_rng(0)
    vectors, labelled = r.normal(size=(3000, 4)), r.normal(size=(3000, 4))
    tracemalloc.start()
    try:
        first = selection.core_set(vectors, np.ones(3000, int), 1, labelled=labelled)[0]
        assert tracemalloc.get_traced_memory()[1] < 50e6  # 72 MB are one array of all of them
    finally:
        tracemalloc.stop()
    assert first == max(range(3000), key=lambda i: ((labelled - vectors[i]) ** 2).sum(1).min())


@pytest.mark.parametrize("choose, told", [
    (lambda: selection.by_score(SCORES, LENGTHS, 2, overshoot=False), "a budget of 2 words is below the shortest"),
    (lambda: selection.by_score(SCORES, LENGTHS, 0), "a budget of 0 words"),
    (lambda: selection.by_score(SCORES, LENGTHS, 9, available=np.zeros(6, bool)), "no unlabelled sentence is left"),
    (lambda: selection.core_set(np.zeros((2, 2)), [0, 0], 9), "no unlabelled sentence is left"),
])
def test_what_cannot_be_chosen(choose, told):
    with pytest.raises(UserError, match=told):
        choose()

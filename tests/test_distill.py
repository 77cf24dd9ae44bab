"""Distillation of a pruned decoder: the divergence is the real one, and it falls."""

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax

import jaxmodels
from jaxmodels import DecoderConfig, UserError
from tests.tiny_models import random_model
from train.distill import _divergence, distill, teacher_targets

RNG = np.random.default_rng(0)
TOKENS = RNG.integers(0, 97, (6, 16)).astype(np.int32)
MASK = np.arange(16) < np.asarray([16, 16, 10, 16, 3, 16])[:, None]


@pytest.fixture(scope="module")
def teacher():
    return random_model(DecoderConfig.tiny(ffn_widths=(32, 32)))


def test_with_all_tokens_it_is_the_kl_divergence():
    p, q = RNG.normal(size=(2, 5, 7)), RNG.normal(size=(2, 5, 7))
    mask = np.asarray([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], bool)
    ids = np.tile(np.arange(7), (2, 5, 1))
    log_p, log_q = log_softmax(p, -1), log_softmax(q, -1)
    exact = (np.exp(log_p) * (log_p - log_q)).sum(-1)[mask].mean()
    found = _divergence(jnp.asarray(q), jnp.asarray(ids), jnp.asarray(log_p), jnp.asarray(mask))
    np.testing.assert_allclose(found, exact, rtol=1e-4, atol=2e-5)


@pytest.mark.long
def test_a_student_comes_nearer_and_an_equal_one_stays(teacher):
    targets = teacher_targets(teacher, TOKENS, MASK, top=32)
    assert targets.ids.shape == (6, 16, 32) and (np.diff(targets.log_p) <= 0).all()
    keep = np.zeros((2, 32), bool)
    keep[:, ::2] = True
    pruned = jaxmodels.prune(teacher, keep)
    student, losses = distill(pruned, targets, TOKENS, MASK, steps=60, batch=4, learning_rate=3e-3)
    assert len(losses) == 60 and np.mean(losses[-5:]) < 0.5 * losses[0]
    assert student.cfg == pruned.cfg
    _, same = distill(teacher, targets, TOKENS, MASK, steps=1)
    assert abs(same[0]) < 1e-4


@pytest.mark.long
def test_it_repeats_bit_for_bit_and_stops_in_time(teacher):
    targets = teacher_targets(teacher, TOKENS, MASK, top=16)
    keep = np.arange(32) < np.asarray([[16], [8]])
    runs = [distill(jaxmodels.prune(teacher, keep), targets, TOKENS, MASK, steps=5, seed=1)[1] for _ in range(2)]
    assert runs[0] == runs[1]
    assert len(distill(jaxmodels.prune(teacher, keep), targets, TOKENS, MASK, steps=50, minutes=0.0)[1]) == 1


def test_a_diverging_rate_is_named(teacher):
    targets = teacher_targets(teacher, TOKENS, MASK, top=8)
    with pytest.raises(UserError, match="learning rate"):
        distill(teacher, targets._replace(log_p=np.full_like(targets.log_p, np.nan)), TOKENS, MASK, steps=1)

"""Scores of entities against hand cases and against the rule of the CoNLL script; calibration of confidences."""

import importlib.util

import numpy as np
import pytest

from jaxmodels.cnn_cnn_lstm.schemes import entities
from jaxmodels.cnn_cnn_lstm.tagger import Calibration, Tagged, confidence
from train import entity_metrics, tag_confidence


def tags(*rows):
    return [row.split() for row in rows]


def test_hand_cases():
    truth = tags("B-X I-X O B-Y", "B-X B-X", "O O", "I-Y O")
    said = tags("B-X I-X O O", "B-X I-X", "B-Y O", "B-Y O")  # adjacent ones joined, one from nothing
    found = entity_metrics.entity_scores(truth, said)
    assert found["precision"] == 2 / 4 and found["recall"] == 2 / 5 and found["f1"] == 4 / 9
    assert found["X.f1"] == 2 / 5 and found["Y.precision"] == 1 / 2 and found["Y.recall"] == 1 / 2
    assert found["macro_f1"] == pytest.approx((2 / 5 + 1 / 2) / 2) and found["token_accuracy"] == 6 / 10
    assert entity_metrics.f1(truth, said) == found["f1"] and entity_metrics.f1(truth, truth) == 1


@pytest.mark.parametrize("truth, said, right", [
    ("B-X B-X", "B-X B-X", 2),  # adjacent
    ("B-X I-X", "B-X B-X", 0),  # an end too early, a beginning too late
    ("B-X I-X I-X", "B-X I-Y I-X", 0),  # another type within
    ("B-X I-X", "I-X E-X", 1),  # other letters, the same entity
    ("B-X O", "O O", 0),
])
def test_ends_and_types_have_to_be_right(truth, said, right):
    a, b = tags(truth), tags(said)
    found = entity_metrics.entity_scores(a, b)
    assert found["recall"] == right / len(entities(a[0]))


def test_nothing_said_and_nothing_there():
    empty = entity_metrics.entity_scores(tags("O O"), tags("O O"))
    assert empty["f1"] == empty["precision"] == empty["macro_f1"] == 0 and empty["token_accuracy"] == 1
    assert entity_metrics.entity_scores(tags("B-X"), tags("O"))["recall"] == 0
    with pytest.raises(ValueError, match="a sentence of 2 tags and 1"):
        entity_metrics.entity_scores(tags("O O"), tags("O"))
    with pytest.raises(ValueError, match="shorter"):
        entity_metrics.entity_scores(tags("O", "O"), tags("O"))


def test_sentences_do_not_touch():
    assert entity_metrics.f1(tags("B-X", "I-X"), tags("B-X", "B-X")) == 1


def test_surfaces_count_once():
    words = [["a", "b"], ["a", "c"], ["d", "d"]]
    truth, said = tags("B-X O", "B-X B-Y", "B-Y O"), tags("B-X O", "O B-X", "B-Y O")
    found = entity_metrics.surface_f1(words, truth, said)
    assert found["surface_precision"] == 2 / 3 and found["surface_recall"] == 2 / 3


def test_errors_by_kind():
    truth, said = tags("B-X I-X O B-Y O B-X I-X O B-Z O", "B-Y I-Y O B-Y O B-X O B-Q O O")
    assert entity_metrics.errors(truth, said) == [
        ("type", (0, 2, "X"), (0, 2, "Y")), ("boundary", (5, 7, "X"), (5, 6, "X")), ("missed", (8, 9, "Z"), None),
        ("spurious", None, (7, 8, "Q"))]
    assert entity_metrics.errors(["B-X", "I-X"], ["B-Y", "O"]) == [("both", (0, 2, "X"), (0, 1, "Y"))]


def test_against_the_definition_on_random_tags():
    """Counting sets of (sentence, start, end, type), found by a pass of its own over the tags."""
    r = np.random.default_rng(0)
    letters = ["O", "B-X", "I-X", "B-Y", "I-Y"]
    truth, said = ([[letters[i] for i in r.integers(0, 5, 7)] for _ in range(60)] for _ in range(2))

    def spans(rows):
        found = set()
        for n, row in enumerate(rows):
            i = 0
            while i < len(row):
                if row[i] == "O":
                    i += 1
                    continue
                j = i + 1
                while j < len(row) and row[j] == f"I-{row[i][2:]}":
                    j += 1
                found.add((n, i, j, row[i][2:]))
                i = j
        return found

    a, b = spans(truth), spans(said)
    assert entity_metrics.f1(truth, said) == pytest.approx(2 * len(a & b) / (len(a) + len(b)))
    if importlib.util.find_spec("seqeval"):
        from seqeval.metrics import f1_score

        assert entity_metrics.f1(truth, said) == pytest.approx(f1_score(truth, said))
    low, high = entity_metrics.f1_interval(truth, said, 300)
    assert low < entity_metrics.f1(truth, said) < high < low + 0.3
    assert entity_metrics.f1_interval(tags("O"), tags("O")) == (0.0, 0.0)
    assert entity_metrics.f1_interval(truth, truth) == (1.0, 1.0)


# Confidences


def test_confidence_is_a_probability():
    assert confidence(np.log([0.2, 0.9])).tolist() == pytest.approx([0.2, 0.9])
    assert confidence(0.0) == pytest.approx(1) and confidence(-800.0) == pytest.approx(0)
    assert confidence(np.log(0.9), (0.5, 0.0)) == pytest.approx(0.75)  # odds 9 to 3


def test_calibration_finds_what_was_done_to_probabilities():
    r = np.random.default_rng(0)
    p = r.uniform(0.05, 0.999, 20_000)
    right = r.random(len(p)) < p
    log_odds = (np.log(p / (1 - p)) - 0.4) / 0.5  # twice too sure, and shifted
    events = tag_confidence.Events(-np.log1p(np.exp(-log_odds)), right)
    scale, shift = tag_confidence.fit(events)
    assert scale == pytest.approx(0.5, abs=0.03) and shift == pytest.approx(0.4, abs=0.08)
    before, after = (tag_confidence.calibration_error(confidence(events.log_prob, pair), right)
                     for pair in ((1.0, 0.0), (scale, shift)))
    assert before > 0.05 and after < 0.015
    table = tag_confidence.reliability(confidence(events.log_prob, (scale, shift)), right)
    assert sum(line["n"] for line in table) == len(p)
    assert all(abs(line["confidence"] - line["right"]) < 0.05 for line in table)


def test_equal_confidences_are_in_one_bin():
    """Else the order of the corpus would make bins of what is right and what is wrong."""
    p = np.repeat([0.5, 1.0], 50)
    right = np.concatenate([np.arange(50) < 25, np.arange(50) < 40])
    assert tag_confidence.calibration_error(p, right) == pytest.approx(0.1)
    assert tag_confidence.calibration_error(p, right[::-1]) == pytest.approx(0.5 * 0.3 + 0.5 * 0.5)


def test_events_of_sentences():
    found = [Tagged(["B-X", "O"], np.log([0.5, 0.8]), np.zeros(2), float(np.log(0.4))),
             Tagged(["B-X", "I-X"], np.log([0.5, 0.4]), np.zeros(2), float(np.log(0.2)))]
    events = tag_confidence.events([["B-X", "B-X"], ["B-X", "I-X"]], found)
    assert events["entity"].right.tolist() == [True, True] and events["sentence"].right.tolist() == [False, True]
    np.testing.assert_allclose(events["entity"].log_prob, np.log([0.5, 0.2]))
    np.testing.assert_allclose(events["sentence"].log_prob, np.log([0.4, 0.2]))
    assert tag_confidence.fitted([["B-X", "B-X"], ["B-X", "I-X"]], found) == Calibration()  # too little to fit
    assert np.isnan(tag_confidence.calibration_error(np.zeros(0), np.zeros(0, bool)))

"""Scores of predicted codes, against scikit-learn and by hand."""

import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, f1_score, precision_score

from jaxmodels.text2tree.tree import LabelTree
from train import text_metrics as tm
from train.data.coded_texts import CodedTexts, Part
from train.text_floors import tfidf

RNG = np.random.default_rng(0)
N, K = 60, 9
TRUTH = RNG.random((N, K)) < np.linspace(0.02, 0.6, K)
TRUTH[:, 0] = False  # a class that is not in the test set
SCORES = np.clip(RNG.random((N, K)) * 0.6 + 0.3 * TRUTH, 0, 1)
TREE = LabelTree.from_codes(["A1.1", "A1.2", "B2.1", "B2.2", "B2"])


def test_f1_is_that_of_scikit_learn():
    said = SCORES >= 0.5
    found = tm.f1(tm.counts(TRUTH, said))
    there = TRUTH.any(0)
    assert not there[0] and said[:, 0].any()
    assert np.isclose(found["micro_f1"], f1_score(TRUTH, said, average="micro", zero_division=0))
    assert np.isclose(found["macro_f1_all"], f1_score(TRUTH, said, average="macro", zero_division=0))
    assert np.isclose(found["macro_f1"], f1_score(TRUTH[:, there], said[:, there], average="macro", zero_division=0))
    nothing = tm.f1(tm.counts(np.zeros((3, 2), bool), np.zeros((3, 2), bool)))
    assert all(value == 0 for value in nothing.values())


def test_the_threshold_is_the_best_one():
    t = tm.tuned_threshold(TRUTH, SCORES)
    there = TRUTH.any(0)
    each = [f1_score(TRUTH[:, there], SCORES[:, there] >= x, average="macro", zero_division=0) for x in tm.THRESHOLDS]
    assert np.isclose(each[tm.THRESHOLDS.index(t)], max(each)) and len(set(each)) > 5


def test_rankings_are_those_of_scikit_learn():
    found = tm.ranking(TRUTH, SCORES, (1, 5))
    some = TRUTH.any(1)
    assert not some.all()
    assert np.isclose(found["map"], average_precision_score(TRUTH[some], SCORES[some], average="samples"))
    top = np.argsort(-SCORES[some], 1)
    first = np.zeros((some.sum(), K), bool)
    np.put_along_axis(first, top[:, :5], True, 1)
    assert np.isclose(found["p_at_5"], precision_score(TRUTH[some], first, average="samples"))
    exact = [TRUTH[some][i, row[:n]].mean() for i, (row, n) in enumerate(zip(top, TRUTH[some].sum(1), strict=True))]
    assert np.isclose(found["r_precision"], np.mean(exact))
    assert np.isnan(tm.ranking(np.zeros((2, 3), bool), np.zeros((2, 3)))["map"])


def test_buckets():
    masks = tm.buckets(np.array([700, 3, 60, 10, 11, 120, 0, 50, 500]))
    assert {name: np.flatnonzero(mask).tolist() for name, mask in masks.items()} == {
        "tail": [1, 3, 6], "middle": [2, 4, 7], "head": [0, 5, 8],
        "1_10": [1, 3], "11_50": [4, 7], "51_100": [2], "101_500": [5, 8], "501_up": [0]}
    counted = tm.counts(TRUTH, SCORES >= 0.5)
    found = tm.bucket_f1(counted, tm.buckets(np.arange(K)))
    expected = f1_score(TRUTH[:, 1:3], SCORES[:, 1:3] >= 0.5, average="macro", zero_division=0)
    assert np.isclose(found["macro_f1_tail"], expected) and "macro_f1_501_up" not in found  # class 0 is not there


def test_scores_along_the_tree():
    truth = np.eye(5, dtype=bool)[[0, 2]]  # classes: A1.1 A1.2 B2 B2.1 B2.2
    assert TREE.classes == ("A1.1", "A1.2", "B2", "B2.1", "B2.2")
    said = np.eye(5, dtype=bool)[[1, 3]]
    found = tm.hierarchical(truth, said, TREE.ancestors())
    # gold: A A1 A1.1, B B2; said: A A1 A1.2, B B2 B2.1: four right.
    assert np.isclose(found["hierarchical_precision"], 4 / 6) and np.isclose(found["hierarchical_recall"], 4 / 5)
    assert np.isclose(found["hierarchical_f1"], 8 / 11)
    levels = tm.level_accuracy(np.array([0, 2, 4]), np.array([1, 3, 0]), TREE.paths)
    assert levels == {"accuracy_level_1": 2 / 3, "accuracy_level_2": 2 / 3, "accuracy_level_3": 0.0}


def test_tables():
    counts = np.arange(K) * 20
    found = tm.multi_label(TRUTH, SCORES, 0.4, counts)
    assert {"threshold", "map", "p_at_8", "macro_f1", "tuned_macro_f1", "tuned_macro_f1_tail", "micro_f1"} <= set(found)
    assert all(isinstance(value, float) for value in found.values())
    truth, said = RNG.integers(0, 5, 40), RNG.integers(0, 5, 40)
    found = tm.multi_class(truth, said, np.arange(5), TREE.paths, TREE.ancestors())
    assert np.isclose(found["micro_f1"], (truth == said).mean()) and np.isclose(found["accuracy"], found["micro_f1"])
    assert np.isclose(found["macro_f1"], f1_score(truth, said, average="macro", zero_division=0))
    assert {"accuracy_level_1", "hierarchical_f1", "macro_f1_tail"} <= set(found)


@pytest.mark.parametrize("metric", ["macro_f1", "micro_f1", "macro_f1_tail"])
def test_paired_bootstrap(metric):
    good, bad, masks = SCORES >= 0.5, RNG.random((N, K)) < 0.3, {"tail": np.arange(K) < 3}

    def compared(a, b, draws=250):
        whole = [{**tm.f1(counted), **tm.bucket_f1(counted, masks)}[metric]
                 for counted in (tm.counts(TRUTH, a), tm.counts(TRUTH, b))]
        drawn = [tm.resampled_f1(TRUTH, said, masks, draws=draws)[metric] for said in (a, b)]
        return tm.paired_bootstrap(whole[0] - whole[1], *drawn)

    found = compared(good, bad)
    assert found["low"] < found["difference"] < found["high"]
    assert found["p"] < 0.01 and compared(bad, good)["p"] > 0.99
    same = compared(good, good, 100)
    assert same["difference"] == 0 and same["p"] == 1


def test_the_draws_are_those_of_texts():
    """One by one with repeated rows; both methods on the same."""
    said, masks = SCORES >= 0.5, {"tail": np.arange(K) < 3}
    found = tm.resampled_f1(TRUTH, said, masks, draws=2, seed=3)
    times = np.random.default_rng(3).multinomial(N, np.full(N, 1 / N), size=2)
    for draw in range(2):
        rows = np.repeat(np.arange(N), times[draw])
        counted = tm.counts(TRUTH[rows], said[rows])
        for name, value in {**tm.f1(counted), **tm.bucket_f1(counted, masks)}.items():
            assert name == "macro_f1_all" or np.isclose(found[name][draw], value)


def test_tfidf_of_texts_without_a_common_word():
    """Nothing sets words apart here, and a run would end in an error after all its training."""
    texts = ("患者发热三天", "持续发热三天", "左肺肿瘤", "右肺肿瘤")
    labels = np.array([[1, 0], [1, 0], [0, 1], [0, 1]], bool)
    parts = dict.fromkeys(("train", "dev", "test"), Part(texts, texts, labels))
    found = tfidf(CodedTexts(parts, LabelTree.from_codes(["A1", "B2"]), True, {}))
    assert np.array_equal(found["test"] > 0.5, labels) and found["dev"].dtype == np.float32


def test_the_nearest_phrase_takes_no_memory_of_classes_by_classes():
    texts = ("fever for three days", "a broken arm", "a tumour of the lung")
    parts = dict.fromkeys(("train", "dev", "test"), Part(texts, texts, np.array([19_999, 7, 0])))
    tracemalloc.start()
    found = tfidf(SimpleNamespace(parts=parts, tree=SimpleNamespace(num_classes=20_000), multi_label=False))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found["test"].argmax(1).tolist() == [19_999, 7, 0] and found["test"].dtype == np.float32
    assert found["test"].sum() == 3 and peak < 100e6

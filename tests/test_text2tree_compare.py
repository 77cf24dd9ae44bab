"""Intervals, calibration, and the comparison of the methods of a sweep."""

import numpy as np
import pytest

from train import text_metrics


def some(n=60, K=6, seed=0):
    r = np.random.default_rng(seed)
    truth = r.random((n, K)) < np.linspace(0.1, 0.6, K)
    return truth, truth ^ (r.random((n, K)) < 0.1), truth ^ (r.random((n, K)) < 0.3)


def test_intervals_hold_the_value_and_shrink_with_texts():
    masks = {"tail": np.arange(6) < 2, "none": np.zeros(6, bool)}
    widths = []
    for n in (60, 600):
        truth, said, _ = some(n)
        found = text_metrics.bootstrap_f1(truth, said, masks, draws=200)
        whole = text_metrics.f1(text_metrics.counts(truth, said))
        tail = text_metrics.bucket_f1(text_metrics.counts(truth, said), masks)["macro_f1_tail"]
        for name, value in {**whole, "macro_f1_tail": tail}.items():
            assert name == "macro_f1_all" or found[name][0] <= value <= found[name][1]
        assert np.isnan(found["macro_f1_none"]).all()
        widths.append(found["macro_f1"][1] - found["macro_f1"][0])
    assert widths[1] < widths[0] / 2
    assert text_metrics.bootstrap_f1(truth, truth, masks, draws=20)["macro_f1"] == (1, 1)


def test_seeds_side_by_side_are_their_mean():
    """The comparison lays the seeds of a method beside each other as further classes."""
    truth, good, bad = some()
    both = text_metrics.paired_bootstrap(np.tile(truth, 2), np.hstack([good, bad]), np.hstack([bad, bad]), draws=200)
    one = text_metrics.paired_bootstrap(truth, good, bad, draws=200)
    assert both["difference"] == pytest.approx(one["difference"] / 2)
    assert both["low"] == pytest.approx(one["low"] / 2, abs=1e-6) and both["p"] == one["p"] < 0.05


def test_calibration():
    r = np.random.default_rng(0)
    scores = r.random(20000)
    right = text_metrics.calibration(r.random(20000) < scores, scores)
    assert right["ece"] < 0.02 and right["count"].sum() == 20000 and len(right["score"]) == 10
    assert text_metrics.calibration([True, False], [1.0, 1.0])["ece"] == pytest.approx(0.5)
    assert text_metrics.calibration([True, False], [0.95, 0.05], bins=2)["ece"] == pytest.approx(0.05)

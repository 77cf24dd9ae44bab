"""Intervals, calibration, and the comparison of the methods of a sweep."""

import dataclasses
import json

import numpy as np
import pytest

from analysis import text2tree_compare
from jaxmodels.text2tree.tree import LabelTree
from train import sweep, text_metrics
from train.text_labels import tree_arrays


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


def test_calibration():
    r = np.random.default_rng(0)
    scores = r.random(20000)
    right = text_metrics.calibration(r.random(20000) < scores, scores)
    assert right["ece"] < 0.02 and right["count"].sum() == 20000 and len(right["score"]) == 10
    assert text_metrics.calibration([True, False], [1.0, 1.0])["ece"] == pytest.approx(0.5)
    assert text_metrics.calibration([True, False], [0.95, 0.05], bins=2)["ece"] == pytest.approx(0.05)


CODES = ("A41.0", "A41.9", "B20", "B20.1", "C11.5", "C12")


def trial(folder, method, seed, truth, said, dev=0.5, status="complete", chunks=1, **changed):
    folder.mkdir(parents=True)
    config = {"method": {"name": method, **changed}, "data": {"length": 128, "chunks": chunks}, "seed": seed}
    (folder / "config.json").write_text(json.dumps({"name": "text2tree", "config": config}))
    masks = text_metrics.buckets(np.arange(1, 7))
    results = {"status": status, "seconds": 60.0, "chosen_step": 1, "test.model.threshold": 0.15 + 0.05 * seed,
               "test.tfidf.p_at_5": 0.5}
    for name, one in (("model", said), ("tfidf", truth)):
        counted = text_metrics.counts(truth, one)
        numbers = text_metrics.f1(counted) | text_metrics.bucket_f1(counted, masks)
        results |= {f"test.{name}.tuned_{key}": float(value) for key, value in numbers.items()}
        results |= {f"test.{name}.{key}": float(value) / 2 for key, value in numbers.items()}  # at 0.5
        results |= {f"test.{name}.p_at_5": 0.25 + 0.05 * seed} if name == "model" else {}
    (folder / "results.json").write_text(json.dumps(results))
    lines = [{"step": 1, "dev_macro_f1": dev}, {"step": 2, "dev_macro_f1": 0.99}]  # ldam_drw may not choose the best
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    np.savez(folder / "predictions.npz", labels=truth, counts=np.arange(1, 7), model_said=said, tfidf_said=truth)
    np.savez(folder / "classes.npz", **tree_arrays(LabelTree.from_codes(CODES)))


@pytest.fixture
def swept(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"config": {"experiment": "text2tree", "grid": "methods"}}))
    (tmp_path / "results.json").write_text(json.dumps({"trials": 7}))
    for seed in range(3):
        truth, good, bad = some(120)
        flip = np.random.default_rng(seed).random(truth.shape) < 0.02
        trial(tmp_path / "plain" / f"seed-{seed}", "plain", seed, truth, bad ^ flip)
        trial(tmp_path / "gamma=0.1" / f"seed-{seed}", "text2tree", seed, truth, bad ^ flip, dev=0.4)
        trial(tmp_path / "gamma=0.2" / f"seed-{seed}", "text2tree", seed, truth, good ^ flip, dev=0.6)
    trial(tmp_path / "focal" / "seed-0", "focal", 0, truth[:60], good[:60])  # other test texts
    trial(tmp_path / "db" / "seed-0", "db", 0, truth, good, status="interrupted")
    return tmp_path


def found_in(folder):
    return text2tree_compare.read_methods(folder, text2tree_compare.sweep_report.read_trials(folder)[0])


def test_a_sweep_is_compared_method_by_method(swept):
    assert text2tree_compare.sweep_report.read_trials(swept)[1] == ["db/seed-0"]
    found = found_in(swept)
    assert list(found.methods) == ["plain", "text2tree", "TF-IDF"] and found.tree.classes == CODES
    assert [one.variant for one in found.variants] == ["plain", "gamma=0.1", "gamma=0.2"]
    plain, ours, tfidf = map(text2tree_compare.row, found.methods.values())
    assert plain["seeds"] == 3 and plain["± macro-F1"] > 0
    assert (ours["settings tried"], ours["setting"]) == (2, "gamma=0.2")
    assert tfidf["macro-F1"] == 1 and tfidf["seeds"] == 1 and tfidf["± macro-F1"] is None
    assert ours["P@5"] == pytest.approx(0.3) and ours["± P@5"] == pytest.approx(0.05) and tfidf["P@5"] == 0.5
    assert text2tree_compare.spread(found.methods["plain"], tuned=False)["macro-F1"] == plain["macro-F1"] / 2
    assert "as expected" in text2tree_compare.verdict(ours, plain)
    assert "not as expected" in text2tree_compare.verdict(plain, ours)
    assert "says little" not in text2tree_compare.verdict(ours, plain)
    assert "with 1 seed this says little" in text2tree_compare.verdict(ours, plain | {"seeds": 1})


@pytest.mark.parametrize("number", text2tree_compare.TESTED)
def test_differences_are_those_of_the_means(swept, number):
    plain, ours, tfidf = found_in(swept).methods.values()
    better = text2tree_compare.compared(ours, plain, number)
    means = [text2tree_compare.row(one)[number] for one in (ours, plain, tfidf)]
    assert better["difference"] == pytest.approx(means[0] - means[1])
    assert better["low"] < better["difference"] < better["high"] and better["p"] < 0.01
    worse = text2tree_compare.compared(plain, tfidf, number)  # no seed is TF-IDF's: against all three
    assert worse["difference"] == pytest.approx(means[1] - means[2]) and worse["p"] > 0.99
    for seeds in ("01", "2"):  # what one lacks, the other's mean is without too
        fewer = {name: {seed: getattr(ours, name)[seed] for seed in seeds} for name in ("results", "drawn")}
        some = text2tree_compare.compared(dataclasses.replace(ours, **fewer), plain, number)
        assert some["difference"] == pytest.approx(np.mean([one.values(text2tree_compare.NUMBERS[number], seeds=seeds)
                                                            for one in (ours, plain)], 1) @ [1, -1])
    none = {name: {"7": getattr(ours, name)["0"], "8": getattr(ours, name)["1"]} for name in ("results", "drawn")}
    assert text2tree_compare.compared(dataclasses.replace(ours, **none), plain, number) is None


def test_the_page(swept):
    page = text2tree_compare.build(swept).read_text()
    assert "gamma=0.2" in page and "db/seed-0" in page and "coloured by its gain" in page and "as expected" in page
    for told in ("the best of 19 for macro-F1 on the development part", "do not hold the spread over seeds", "P@5",
                 "Each p is by itself",
                 "From plain fine-tuning.", "From TF-IDF.", "At a threshold of 0.5", "development macro-F1",
                 "their first 128 tokens", "Differences from plain.", "<td>gamma=0.1</td>"):
        assert told in page, told


def test_a_test_part_without_rare_codes(tmp_path):
    """The tail third is in no table then, and nothing is claimed of it."""
    (tmp_path / "config.json").write_text(json.dumps({"config": {"experiment": "text2tree", "grid": "methods"}}))
    truth, good, bad = some(120)
    truth[:, :2] = False
    trial(tmp_path / "plain" / "seed-0", "plain", 0, truth, bad)
    trial(tmp_path / "text2tree" / "seed-0", "text2tree", 0, truth, good)
    page = text2tree_compare.build(tmp_path).read_text()
    assert "no code of the tail third" in page and "as expected" not in page and "tail macro-F1" not in page
    assert "From plain fine-tuning." in page


def test_variants_of_one_method_stand_side_by_side(tmp_path):
    """grid=data.chunks=1,8 has no plain: the first variant is what the other is compared with."""
    (tmp_path / "config.json").write_text(json.dumps({"config": {"experiment": "text2tree", "grid": "chunks"}}))
    truth, good, bad = some(120)
    trial(tmp_path / "data.chunks=1" / "seed-0", "text2tree", 0, truth, bad)
    trial(tmp_path / "data.chunks=8" / "seed-0", "text2tree", 0, truth, good, chunks=8)
    page = text2tree_compare.build(tmp_path).read_text()
    assert "Differences from data.chunks=1." in page and "Without a trial of method.name=plain" in page
    assert "From plain fine-tuning." not in page and "2 of 2 trials complete" in page


def test_grids():
    planned = sweep.plan("text2tree_mesh", ["grid=methods", "preset=tiny", "seeds=2"])
    names = [trial.config.method.name for trial in planned.trials]
    assert names[0] == "plain" and len(names) == 2 * len(set(names)) == 36 and "oversampling" not in names
    assert planned.config["report"] == "analysis.text2tree_compare:build"
    paper = sweep.plan("text2tree_codiesp", ["grid=paper"]).trials
    assert len(paper) == 17 and {trial.config.method.tau for trial in paper} == {0.5, 1, 2, 3}
    labels = sweep.plan("text2tree_mesh", ["grid=labels"]).trials
    assert [trial.config.method.label_encoder for trial in labels] == ["cascade", "gcn", *["cascade"] * 3]
    assert "db" not in [t.variant for t in sweep.plan("text2tree_icd_phrases", ["grid=methods"]).trials]
    main = sweep.plan("text2tree_mesh", ["grid=main", "preset=tiny", "seeds=2"])
    assert [trial.variant for trial in main.trials[:6]] == ["plain", "text2tree", "ssl", "dml", "focal", "db"]
    assert {trial.folder: trial.config for trial in main.trials}.items() <= {
        trial.folder: trial.config for trial in planned.trials}.items()
    assert "grid" in main.operational and len(sweep.plan("text2tree_icd_phrases", ["grid=main"]).trials) == 5

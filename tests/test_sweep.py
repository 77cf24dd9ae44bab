"""Sweeps: what is run, in which order, what happens to a trial that fails or is interrupted, and the report."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from analysis import sweep_report
from jaxmodels import cli
from jaxmodels.errors import UserError
from tests import tiny_experiment
from train import sweep
from train.runtime.signals import stop

ROOT = Path(__file__).resolve().parents[1]
TINY = "tests.tiny_experiment"


def results(folder):
    return json.loads((folder / "results.json").read_text())


def test_seeds_are_the_outer_loop():
    planned = sweep.plan(TINY, ["grid=sizes", "seeds=2", "units=1", "seed=7"])
    assert [(t.variant, t.seed, t.config.inner.size, t.config.seed) for t in planned.trials] == [
        ("small", 7, 2, 7), ("large", 7, 5, 7), ("small", 8, 2, 8), ("large", 8, 5, 8)]
    assert all(t.config.units == 1 for t in planned.trials)


def test_a_grid_may_be_written_out():
    planned = sweep.plan(TINY, ["grid=inner.size=2,3;inner.kind=sum,mean", "preset=tiny"])
    assert [t.variant for t in planned.trials] == [
        f"inner.size={size},inner.kind={kind}" for size in (2, 3) for kind in ("sum", "mean")]
    assert planned.trials[0].config.units == 2  # the preset's
    assert len(sweep.plan(TINY, ["grid=inner.size=2", "inner.size=2"]).trials) == 1  # said twice, and alike


@pytest.mark.parametrize(("words", "told"), [
    (["seeds=2"], "give grid=NAME \\(sizes\\)"),
    (["grid=sizez"], "did you mean 'sizes'"),
    (["grid=inner.size="], "is not key=value,value"),
    (["grid=inner.sice=2,3"], "did you mean 'inner.size'"),
    (["grid=inner.size=2,x"], "expected int"),
    (["grid=inner.size=2;inner.size=3"], "inner.size is there twice"),
    (["grid=note=a/b,a_b"], "two variants are called note=a_b"),
    (["grid=seed=1,2"], "seeds are no variants; seeds=N"),  # seeds=1 would give both the first
    (["grid=sizes", "inner.size=3"], "the grid gives every variant its own inner.size"),
    (["grid=preset=tiny,default", "preset=tiny"], "the grid gives every variant its own preset"),
    (["grid=sizes", "seeds=0"], "seeds=0 must be a whole number"),
    (["grid=sizes", "units"], "is not key=value"),
    (["grid=sizes", "together=two"], "together=two must be a whole number"),
])
def test_bad_plans(words, told):
    with pytest.raises(UserError, match=told):
        sweep.plan(TINY, words)


def test_seeds_of_a_variant_are_grouped():
    planned = sweep.plan(TINY, ["grid=sizes", "seeds=3", "together=2"])
    assert [[(t.variant, t.seed) for t in group] for group in planned.groups] == [
        [("small", 0), ("small", 1)], [("large", 0), ("large", 1)], [("small", 2)], [("large", 2)]]
    with pytest.raises(UserError, match="together=2: lm_moe_pretrain trains its trials one by one only"):
        sweep.plan("lm_moe_pretrain", ["grid=twins", "seeds=2", "together=2"])


def test_groups_go_on_and_may_be_cut_otherwise(tmp_path):
    out = tmp_path / "s"
    words = ["sweep", TINY, "grid=sizes", "preset=tiny", "--out", str(out)]
    assert cli.main([*words, "seeds=2"]) == 0
    alone = (out / "small" / "seed-0" / "results.json").read_bytes()
    assert cli.main([*words, "seeds=5", "together=4"]) == 0  # of the first four two are complete
    assert (out / "small" / "seed-0" / "results.json").read_bytes() == alone
    found = [results(out / "small" / f"seed-{seed}") for seed in range(5)]
    assert [one.get("together") for one in found] == [None, None, 2, 2, None]
    assert [one["total"] for one in found] == [1 + 3 + seed for seed in range(5)]
    assert {one["status"] for one in found} == {"complete"}
    assert all((out / "small" / f"seed-{seed}" / "report.html").exists() for seed in range(5))


def test_one_of_a_group_fails(tmp_path, capsys):
    out = tmp_path / "s"
    words = ["grid=inner.size=2", "note=odd bug", "seeds=3", "together=3", "--out", str(out)]
    assert cli.main(["sweep", TINY, *words]) == 1
    assert "1 of 3 trials failed, inner.size=2/seed-1 first: an odd bug" in capsys.readouterr().err
    found = [results(out / "inner.size=2" / f"seed-{seed}") for seed in range(3)]
    assert [one["status"] for one in found] == ["complete", "failed", "complete"]
    assert "total" in found[2] and found[1]["error"] == "ZeroDivisionError: an odd bug"


def test_a_title_names_what_long_grids_vary():
    about = {"config": {"experiment": "x", "grid": "main"}}
    assert sweep_report.title(about, {}) == "x: main"
    assert sweep_report.title(about, {"grids": ["main", "a=1,2"]}) == "x: main and a=1,2"
    long = [f"a={','.join(map(str, range(40)))};b=3", "a=7", "main"]
    assert sweep_report.title(about, {"grids": long}) == "x: a, b, main"


def test_the_report_leaves_out_what_no_trial_changes(tmp_path):
    """Of two, how many units were computed; of a single trial nothing is left out."""
    for grid, there in (("inner.size=2,5", False), ("inner.size=2", True)):
        out = tmp_path / grid
        assert cli.main(["sweep", TINY, f"grid={grid}", "preset=tiny", "--out", str(out)]) == 0
        page = (out / "report.html").read_text()
        assert "total" in page and ("computed" in page) == there and ("is left out" in page) != there


def test_one_folder_one_report_and_more_seeds_later(tmp_path, capsys):
    out = tmp_path / "s"
    assert cli.main(["sweep", TINY, "grid=sizes", "preset=tiny", "--out", str(out)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(out / "report.html")
    assert results(out)["trials"] == 2 and results(out / "large" / "seed-0")["total"] == 10 + 15
    page = (out / "report.html").read_text()
    assert "2 of 2 trials complete" in page and "small" in page and "large − small" in page
    before = (out / "small" / "seed-0" / "results.json").read_bytes()
    assert cli.main(["sweep", TINY, "grid=sizes", "preset=tiny", "seeds=3", "--out", str(out)]) == 0
    assert (out / "small" / "seed-0" / "results.json").read_bytes() == before  # not run again
    assert results(out / "small" / "seed-2")["total"] == 1 + 3 + 2
    assert cli.main(["sweep", TINY, "grid=sizes", "preset=tiny", "units=1", "--out", str(out)]) == 2
    assert "another config" in capsys.readouterr().err


def test_several_grids_in_one_folder(tmp_path, capsys, monkeypatch):
    """Where the experiment allows it: trials are shared by name, and the report is over all."""
    out = tmp_path / "s"
    one = {"few": {"small": {"inner.size": 2}, "medium": {"inner.size": 3}}, "odd": {"small": {"inner.size": 4}}}
    monkeypatch.setattr(tiny_experiment, "GRIDS", {**tiny_experiment.GRIDS, **one})
    words = ["sweep", TINY, "preset=tiny", "--out", str(out)]
    assert cli.main([*words, "grid=sizes"]) == 0
    assert cli.main([*words, "grid=few"]) == 2
    assert "another config (grid: 'sizes' -> 'few')" in capsys.readouterr().err
    monkeypatch.setattr(tiny_experiment.Config, "share_grids", True, raising=False)
    before = (out / "small" / "seed-0" / "results.json").read_bytes()
    assert cli.main([*words, "grid=few", "seeds=2"]) == 0
    assert (out / "small" / "seed-0" / "results.json").read_bytes() == before
    assert sorted(str(path.relative_to(out)) for path in out.glob("*/seed-*")) == [
        "large/seed-0", "medium/seed-0", "medium/seed-1", "small/seed-0", "small/seed-1"]
    assert results(out)["trials"] == 5 and results(out)["grids"] == ["sizes", "few"]
    page = (out / "report.html").read_text()
    assert "5 of 5 trials complete" in page and "tiny_experiment: sizes and few" in page and "medium − small" in page
    capsys.readouterr()
    assert cli.main([*words, "grid=few", "units=1"]) == 2
    assert "another config" in capsys.readouterr().err
    assert cli.main([*words, "grid=odd"]) == 2  # a variant of the same name that is another
    assert "inner.size: 2 -> 4" in capsys.readouterr().err


def test_a_trial_that_fails_does_not_stop_the_others(tmp_path, capsys):
    out = tmp_path / "s"
    assert cli.main(["sweep", TINY, "grid=note=bug,plain", "preset=tiny", "--out", str(out)]) == 1
    told = capsys.readouterr()
    assert "1 of 2 trials failed, note=bug/seed-0 first: a bug" in told.err
    assert "note=bug/seed-0 failed: a bug" in told.err  # at once, not only at the end of hours
    assert results(out / "note=plain" / "seed-0")["status"] == "complete" and results(out)["failed_trials"] == 1
    assert "1 of 2 trials complete, 1 failed; not: note=bug/seed-0" in (out / "report.html").read_text()


def test_a_report_that_failed_is_built_again(tmp_path, monkeypatch):
    words = ["sweep", TINY, "grid=inner.size=2", "preset=tiny", "--out", str(tmp_path / "s")]
    trial = tmp_path / "s" / "inner.size=2" / "seed-0"
    with monkeypatch.context() as patch:
        patch.setattr(tiny_experiment, "report", lambda directory: 1 / 0)
        assert [cli.main(words), cli.main(words)] == [1, 1] and results(trial)["status"] == "complete"
    assert cli.main(words) == 0 and (trial / "report.html").exists() and results(trial)["computed"] == 2


def test_an_interrupted_sweep_goes_on_where_it_was(tmp_path):
    out = tmp_path / "s"
    words = [sys.executable, "-m", "jaxmodels", "sweep", TINY, "grid=sizes", "pause=0.3", "units=6", "--out", out]
    process = subprocess.Popen(list(map(str, words)), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True, env=os.environ)
    until = time.monotonic() + 60
    while not (out / "large" / "seed-0" / "units" / "1.npz").exists():
        assert time.monotonic() < until and process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 75
    assert results(out)["status"] == "interrupted" and results(out / "small" / "seed-0")["status"] == "complete"
    done = subprocess.run(list(map(str, words)), cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert 0 < results(out / "large" / "seed-0")["computed"] < 6 and results(out)["status"] == "complete"


def test_a_signal_reaches_all_of_a_group(tmp_path, monkeypatch):
    words = ["sweep", TINY, "grid=inner.size=2", "seeds=3", "together=3", "--out", str(tmp_path / "s")]
    log = tiny_experiment.run

    def signalled(config, folder):
        if config.seed == 1:
            stop.requested = "SIGTERM"
        log(config, folder)

    monkeypatch.setattr(tiny_experiment, "run", signalled)
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert cli.main(words) == 75
    finally:
        signal.signal(signal.SIGTERM, before)  # a command that was stopped keeps it from its process, which ends
    folders = [tmp_path / "s" / "inner.size=2" / f"seed-{seed}" for seed in range(3)]
    assert [results(folder)["status"] for folder in folders] == ["complete", "interrupted", "interrupted"]
    monkeypatch.setattr(tiny_experiment, "run", log)
    assert cli.main(words) == 0
    assert [results(folder)["computed"] for folder in folders] == [3, 2, 2]


def test_summary_and_paired_differences():
    numbers = {"loss": {"a": {"0": 1.0, "1": 3.0}, "b": {"0": 2.0, "1": 5.0, "2": 9.0}}, "steps": {"a": {"0": 4.0}}}
    first, second, _ = sweep_report.summary(numbers, ["loss", "steps"])
    assert first == {"number": "loss", "variant": "a", "mean": 2.0, "spread": pytest.approx(2**0.5), "smallest": 1.0,
                     "largest": 3.0, "seeds": 2}
    assert second["seeds"] == 3 and second["mean"] == pytest.approx(16 / 3)
    (row,) = sweep_report.paired(numbers, ["loss", "steps"])
    assert row == {"number": "loss", "variants": "b − a", "mean difference": 1.5, "smallest": 1.0, "largest": 2.0,
                   "seeds": 2, "same sign in all": True}


def test_more_variants_than_colours_are_told_apart():
    lines = [{"step": 1, "weight": 4, "loss": 2.0}, {"step": 2, "weight": 4, "loss": 1.0}]
    trials = {f"v{i}": {"0": ({}, []), "1": ({"step_seconds_median": 60}, lines)} for i in range(9)}
    drawn = []
    report = SimpleNamespace(section=lambda *_: None, figure=lambda figure, *_: drawn.append(figure))
    sweep_report._curves(report, trials)
    assert len(drawn) == 2
    for figure in drawn:
        shown = figure.axes[0].get_lines()
        assert len({(line.get_color(), line.get_linestyle()) for line in shown}) == len(shown) == 9
        # the first seed of each has no curve, and the second then has the name
        assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == list(trials)


@pytest.mark.parametrize("more, unit, places", [
    ({"tokens": 9}, "tokens read", [9, 18]),  # of which 4 are asked for
    ({}, "examples or tokens trained on", [4, 8]),
])
def test_curves_lie_over_what_was_read(more, unit, places):
    lines = [{"step": step, "weight": 4, "loss": 1.0, **more} for step in (1, 2)]
    drawn = []
    report = SimpleNamespace(section=lambda *_: None, figure=lambda figure, *_: drawn.append(figure))
    sweep_report._curves(report, {"a": {"0": ({}, lines)}})
    (axes,) = drawn[0].axes
    assert axes.get_xlabel() == unit and axes.get_lines()[0].get_xdata().tolist() == places

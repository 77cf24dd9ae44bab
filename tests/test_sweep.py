"""Sweeps: what is run, in which order, what happens to a trial that fails or is interrupted, and the report."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from analysis import sweep_report
from jaxmodels import cli
from jaxmodels.errors import UserError
from train import sweep

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


@pytest.mark.parametrize(("words", "told"), [
    (["seeds=2"], "give grid=NAME \\(sizes\\)"),
    (["grid=sizez"], "did you mean 'sizes'"),
    (["grid=inner.size="], "is not key=value,value"),
    (["grid=inner.sice=2,3"], "did you mean 'inner.size'"),
    (["grid=inner.size=2,x"], "expected int"),
    (["grid=sizes", "seeds=0"], "seeds=0 must be a whole number"),
    (["grid=sizes", "units"], "is not key=value"),
])
def test_bad_plans(words, told):
    with pytest.raises(UserError, match=told):
        sweep.plan(TINY, words)


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


def test_a_trial_that_fails_does_not_stop_the_others(tmp_path, capsys):
    out = tmp_path / "s"
    assert cli.main(["sweep", TINY, "grid=note=bug,plain", "preset=tiny", "--out", str(out)]) == 1
    told = capsys.readouterr()
    assert "1 of 2 trials failed, note=bug/seed-0 first: a bug" in told.err
    assert "note=bug/seed-0 failed: a bug" in told.err  # at once, not only at the end of hours
    assert results(out / "note=plain" / "seed-0")["status"] == "complete" and results(out)["failed_trials"] == 1
    assert "1 of 2 trials complete, 1 failed; not: note=bug/seed-0" in (out / "report.html").read_text()


def test_an_interrupted_sweep_goes_on_where_it_was(tmp_path):
    out = tmp_path / "s"
    words = [sys.executable, "-m", "jaxmodels.cli", "sweep", TINY, "grid=sizes", "pause=0.3", "units=6", "--out", out]
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


def test_summary_and_paired_differences():
    numbers = {"loss": {"a": {"0": 1.0, "1": 3.0}, "b": {"0": 2.0, "1": 5.0, "2": 9.0}}, "steps": {"a": {"0": 4.0}}}
    first, second, _ = sweep_report.summary(numbers, ["loss", "steps"])
    assert first == {"number": "loss", "variant": "a", "mean": 2.0, "spread": pytest.approx(2**0.5), "smallest": 1.0,
                     "largest": 3.0, "seeds": 2}
    assert second["seeds"] == 3 and second["mean"] == pytest.approx(16 / 3)
    (row,) = sweep_report.paired(numbers, ["loss", "steps"])
    assert row == {"number": "loss", "variants": "b − a", "mean difference": 1.5, "smallest": 1.0, "largest": 2.0,
                   "seeds": 2, "same sign in all": True}

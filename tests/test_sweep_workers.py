"""Sweeps in several processes: equal numbers, failures, signals, deaths, and what trials share is made once."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from jaxmodels import cli
from jaxmodels.errors import Interrupted, UserError
from train import experiment, sweep, sweep_workers
from train.runtime.run_folder import Follower, RunFolder, is_complete
from train.runtime.signals import stop

ROOT = Path(__file__).resolve().parents[1]
TINY = "tests.tiny_experiment"


def results(folder):
    return json.loads((folder / "results.json").read_text())


def started(*words):
    command = [sys.executable, "-m", "jaxmodels", "sweep", TINY, *map(str, words)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(condition, process=None):
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until, "it took too long"
        assert process is None or process.poll() is None, process.communicate()
        time.sleep(0.05)


def owner(trial):
    """The process that runs a trial."""
    return int((trial / ".lock").read_text())


def is_gone(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_the_same_numbers_and_a_trial_that_fails(tmp_path, capsys):
    words = ["sweep", TINY, "grid=inner.size=2,5", "seeds=2", "note=odd bug", "--out"]
    told = "2 of 4 trials failed, inner.size={}/seed-1 first: an odd bug"
    assert cli.main([*words, str(tmp_path / "one")]) == 1
    assert told.format(2) in capsys.readouterr().err
    assert cli.main([*words, str(tmp_path / "two"), "workers=2"]) == 1
    printed = capsys.readouterr()
    assert any(told.format(size) in printed.err for size in (2, 5))  # whichever was first
    assert "inner.size=5/seed-1 failed: an odd bug" in printed.err and "trials: 4/4 in" in printed.err
    assert printed.out == f"{tmp_path / 'two' / 'report.html'}\n"  # what trials print is in their worker's log
    logs = "".join(path.read_text() for path in (tmp_path / "two" / "logs").glob("worker-[12].log"))
    assert logs.count("unit 2") == 2 and "in run\n" in logs and "ZeroDivisionError: an odd bug" in logs
    for out in (tmp_path / "one", tmp_path / "two"):
        assert "2 of 4 trials complete, 2 failed" in (out / "report.html").read_text()
        assert results(out)["order"] == [f"inner.size={size}/seed-{seed}" for seed in (0, 1) for size in (2, 5)]
    for trial in results(tmp_path / "one")["order"]:
        one, two = (results(tmp_path / name / trial) for name in ("one", "two"))
        assert {**one, "seconds": 0} == {**two, "seconds": 0}
        assert (tmp_path / "two" / trial / "report.html").exists() == (one["status"] == "complete")


def test_interrupted_and_continued_with_other_workers(tmp_path, monkeypatch):
    out = tmp_path / "s"
    words = ["grid=sizes", "pause=0.5", "units=40", "--out", out]  # long enough for a second worker that begins late
    trials = [out / "small" / "seed-0", out / "large" / "seed-0"]
    process = started(*words, "workers=2")
    wait_for(lambda: all((trial / "units" / "1.npz").exists() for trial in trials), process)
    workers = {owner(trial) for trial in trials}
    assert len(workers) == 2 and process.pid not in workers
    process.send_signal(signal.SIGUSR1)  # save and go on: no trial may die of it
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 75, process.communicate()
    assert "ended with" not in process.communicate()[1]
    assert all(map(is_gone, workers))
    assert [results(folder)["status"] for folder in (out, *trials)] == ["interrupted"] * 3
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    assert cli.main(["sweep", TINY, *map(str, words)]) == 0
    assert all(0 < results(trial)["computed"] < 40 for trial in trials)
    assert [results(trial)["total"] for trial in trials] == [40 ** 2, 5 * 780 + 10 * 40]


def test_a_worker_that_dies(tmp_path, capsys):
    """Another goes on with its trial, from where it was; a trial that no worker survives has failed, and no other."""
    out = tmp_path / "s"
    words = ["sweep", TINY, "grid=note=kill,kill always,plain", "workers=9", "--out", str(out)]
    assert cli.main(words) == 1
    told = capsys.readouterr().err
    assert "workers=9 is more than there is to run; 3 started" in told
    assert re.search(f"worker (.) ended with SIGKILL .see {out}/logs/worker-\\1.log. in note=kill/seed-0\n", told)
    assert "1 of 3 trials failed, note=kill always/seed-0 first: worker " in told and "as one before it" in told
    assert [results(out / f"note={note}" / "seed-0").get("computed") for note in ("kill", "kill always", "plain")] == [
        1, None, 3]
    assert results(out)["failed_trials"] == 1


def test_no_worker_outlives_the_sweep(tmp_path):
    trial = tmp_path / "s" / "inner.size=2" / "seed-0"
    process = started("grid=inner.size=2", "workers=2", "units=600", "pause=0.1", "--out", tmp_path / "s")
    wait_for((trial / "units" / "1.npz").exists, process)
    worker = owner(trial)
    process.kill()
    wait_for(lambda: is_gone(worker))
    assert results(trial)["status"] == "interrupted"  # it has saved


def test_workers_that_do_not_start(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sweep_workers.sys, "executable", "/bin/false")
    assert cli.main(["sweep", TINY, "grid=sizes", "workers=2", "--out", str(tmp_path / "s")]) == 1
    told = capsys.readouterr().err
    assert told.count("before it ran anything") == 2 and "2 of 2 trials failed, small/seed-0 first: no worker" in told


def test_complete_trials_need_no_worker(tmp_path, monkeypatch):
    words = ["sweep", TINY, "grid=sizes", "preset=tiny", "--out", str(tmp_path / "s")]
    assert cli.main(words) == 0
    monkeypatch.setattr(sweep_workers.sys, "executable", "/bin/false")
    assert cli.main([*words, "workers=2"]) == 0


def test_bad_plans(monkeypatch):
    for number in ("0", "-1", "two"):
        with pytest.raises(UserError, match=f"workers={number} must be a whole number of at least 1"):
            sweep.plan(TINY, ["grid=sizes", f"workers={number}"])
    for name, value in (("JAX_COORDINATOR_ADDRESS", "a:1"), ("JAX_NUM_PROCESSES", "2"), ("JAX_PROCESS_ID", "0")):
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="workers=2 are processes of one machine, and this is one of several"):
        sweep.plan(TINY, ["grid=sizes", "workers=2"])
    assert sweep.plan(TINY, ["grid=sizes", "workers=1"]).workers == 1


def test_a_tpu_is_for_one_process(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("jax.default_backend", lambda: "tpu")
    assert cli.main(["sweep", TINY, "grid=sizes", "workers=2", "--out", str(tmp_path / "s")]) == 2
    assert "workers=2: a TPU belongs to one process" in capsys.readouterr().err


@pytest.mark.parametrize(("have", "count", "sizes"), [
    (range(16), 4, [4, 4, 4, 4]), (range(4, 9), 2, [2, 3]), ((3, 7), 2, [1, 1]), ((3, 7), 5, [1] * 5)])
def test_cores_are_divided(monkeypatch, have, count, sizes):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(have), raising=False)
    parts = [sweep_workers.cores(place, count) for place in range(count)]
    assert [len(part) for part in parts] == sizes and set().union(*parts) == set(have)
    assert max(sum(core in part for part in parts) for core in have) == -(-count // len(have))


@pytest.mark.parametrize(("given", "found"), [
    ({}, {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.3000", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}),
    ({"XLA_CLIENT_MEM_FRACTION": ".2"}, {"XLA_CLIENT_MEM_FRACTION": ".2"}),  # jax refuses both
    ({"XLA_PYTHON_CLIENT_MEM_FRACTION": ".1"}, {"XLA_PYTHON_CLIENT_MEM_FRACTION": ".1"})])
def test_memory_is_divided_unless_the_user_has(tmp_path, monkeypatch, given, found):
    names = (*sweep_workers.FRACTIONS, "XLA_PYTHON_CLIENT_PREALLOCATE")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    seen = {}
    before = os.sched_getaffinity(0)
    with RunFolder(tmp_path / "s", {}) as folder, monkeypatch.context() as patch:
        patch.setattr(subprocess, "Popen", lambda command, env, **_: seen.update(env, cores=os.sched_getaffinity(0)))
        sweep_workers.Worker(1, 3, (TINY, "grid=sizes"), folder)
    assert {name: seen[name] for name in names if name in seen} == found
    assert seen["cores"] == set(sweep_workers.cores(1, 3)) and os.sched_getaffinity(0) == before


# What trials share


def test_what_is_shared_is_made_once(tmp_path):
    made = []

    def prepare(data):
        made.append(data)
        time.sleep(0.3)
        (data / "records").mkdir(parents=True)
        (data / "records" / "files.json").write_text("{}")

    with RunFolder(tmp_path / "s", {}) as folder, folder.stage("a") as one, folder.stage("b") as two:
        threads = [threading.Thread(target=experiment.prepared, args=(trial, {}, prepare)) for trial in (one, two)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(made) == 1 and made[0].parent == tmp_path / "s"


def test_who_waits_can_be_stopped(tmp_path, monkeypatch):
    with RunFolder(tmp_path / "s", {}) as folder, folder.alone(folder.dir / "a"):
        with folder.alone(folder.dir / "b"), Follower(folder.dir, {}).alone(folder.dir / "a"):
            pass  # another thing; and a process whose first one may hold the lock
        monkeypatch.setattr(stop, "requested", "SIGTERM")
        with pytest.raises(Interrupted), folder.alone(folder.dir / "a"):
            pass


def test_bad_input_leaves_nothing_though_it_held_a_lock(tmp_path):
    with pytest.raises(UserError), RunFolder(tmp_path / "s", {}) as folder, folder.alone(folder.dir / "a"):
        raise UserError("bad input")
    assert not (tmp_path / "s").exists() and not is_complete(tmp_path / "s")

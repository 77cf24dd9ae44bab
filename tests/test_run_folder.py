"""The run folder: locks, torn lines, atomic files, signals; with real processes where a process is the subject."""

import json
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest

from jaxmodels.errors import Interrupted, UserError
from train.runtime import files
from train.runtime.run_folder import RunFolder
from train.runtime.signals import stop

ROOT = Path(__file__).resolve().parents[1]
CONFIG = {"size": 3, "inner": {"rate": 0.5}}


def start(code: str, *arguments: object) -> subprocess.Popen:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


HOLD = """
import sys, time
from train.runtime.run_folder import RunFolder
with RunFolder(sys.argv[1], {"size": 3, "inner": {"rate": 0.5}}) as run:
    print("open", flush=True)
    time.sleep(600)
"""


def test_same_config_finds_its_own_folder(tmp_path):
    with RunFolder.open("study", CONFIG, root=tmp_path) as run:
        first = run.dir
        assert not run.resumed
    with RunFolder.open("study", dict(reversed(CONFIG.items())), root=tmp_path) as run:
        assert run.dir == first and run.resumed
    with RunFolder.open("study", CONFIG | {"size": 4}, root=tmp_path) as run:
        assert run.dir != first
    assert first.name.startswith("study-")


def test_config_json_says_on_what_it_ran(tmp_path):
    with RunFolder(tmp_path / "r", {**CONFIG, "pair": (1, 2)}):
        about = json.loads((tmp_path / "r/config.json").read_text())
    assert about["config"] == {**CONFIG, "pair": [1, 2]}
    assert about["versions"]["jax"] and about["device"]["platform"] == "cpu" and about["hash"]
    assert "git" in about


def test_another_process_is_refused_and_a_killed_one_leaves_no_lock(tmp_path):
    process = start(HOLD, tmp_path / "r")
    try:
        assert process.stdout.readline() == "open\n"
        with pytest.raises(UserError, match=f"in use by process {process.pid}"):
            RunFolder(tmp_path / "r", CONFIG)
    finally:
        process.kill()
        process.wait()
    with RunFolder(tmp_path / "r", CONFIG) as run:
        assert run.resumed


def test_one_process_cannot_open_a_folder_twice(tmp_path):
    with RunFolder(tmp_path / "r", CONFIG), pytest.raises(UserError, match=f"in use by process {os.getpid()}"):
        RunFolder(tmp_path / "r", CONFIG)


def test_another_config_and_a_strangers_folder_are_refused(tmp_path):
    with RunFolder(tmp_path / "r", CONFIG):
        pass
    with pytest.raises(UserError, match="inner.rate: 0.5 -> 0.25"):
        RunFolder(tmp_path / "r", {"size": 3, "inner": {"rate": 0.25}})
    with pytest.raises(UserError, match="name 'run'"):
        RunFolder(tmp_path / "r", CONFIG, name="other")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/cat.jpg").write_bytes(b"")
    with pytest.raises(UserError, match="not a run folder: it holds 'cat.jpg'"):
        RunFolder(tmp_path / "photos", CONFIG)
    with RunFolder(tmp_path / "r", CONFIG):  # the refusals freed the lock
        pass


def test_unwritable_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write run folder"):
        RunFolder(tmp_path / "file/r", CONFIG)


def test_bad_input_leaves_nothing_but_an_old_run_stays(tmp_path):
    with pytest.raises(UserError), RunFolder(tmp_path / "new", CONFIG):
        raise UserError("no such language")
    assert not (tmp_path / "new").exists()
    with RunFolder(tmp_path / "old", CONFIG) as run:
        run.write_results({"r": 0.5})
    with pytest.raises(UserError), RunFolder(tmp_path / "old", CONFIG):
        raise UserError("the data went away")
    results = json.loads((tmp_path / "old/results.json").read_text())
    assert results["r"] == 0.5 and results["status"] == "failed" and "the data went away" in results["error"]
    with RunFolder(tmp_path / "old", CONFIG):
        pass
    results = json.loads((tmp_path / "old/results.json").read_text())
    assert results["status"] == "complete" and "error" not in results


def test_metrics_once_a_step_and_truncated_on_resume(tmp_path):
    with RunFolder(tmp_path / "r", CONFIG) as run:
        for step in range(5):
            run.log(step, loss=np.float32(1 / (step + 1)), nan=float("nan"), note="x")
        with pytest.raises(ValueError, match="step 4 is not after"):
            run.log(4, loss=0.0)
    with RunFolder(tmp_path / "r", CONFIG) as run:
        with pytest.raises(ValueError, match="truncate_metrics"):
            run.log(3, loss=0.0)
        run.truncate_metrics(2)
        run.log(3, loss=9.0)
    lines = [json.loads(line) for line in (tmp_path / "r/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    assert lines[0] == {"step": 0, "loss": 1.0, "nan": None, "note": "x"} and lines[3] == {"step": 3, "loss": 9.0}
    assert list((tmp_path / "r/tensorboard").glob("events.out.tfevents.*"))


@pytest.mark.parametrize("torn", [b'{"step": 2, "lo', b'{"step": 2, "loss": 1.0}', b"\x00\xff\x00", b"{}garbage\n"])
def test_a_torn_last_line_is_dropped(tmp_path, torn):
    with RunFolder(tmp_path / "r", CONFIG) as run:
        run.log(0, loss=1.0)
        run.log(1, loss=0.5)
    with open(tmp_path / "r/metrics.jsonl", "ab") as file:
        file.write(torn)
    with RunFolder(tmp_path / "r", CONFIG) as run:
        assert [line["step"] for line in run.metrics()] == [0, 1]
        run.log(2, loss=0.25)
        assert [line["step"] for line in run.metrics()] == [0, 1, 2]


def test_npz_round_trip_and_every_kind_of_damage(tmp_path):
    with RunFolder(tmp_path / "r", CONFIG) as run:
        arrays = {"counts": np.arange(6).reshape(2, 3), "mask": np.array([True, False])}
        path = run.save_npz("layers/07", **arrays)
        loaded = run.load_npz("layers/07")
        assert all(np.array_equal(loaded[name], value) for name, value in arrays.items())
        assert run.load_npz("layers/08") is None
        whole = path.read_bytes()
        flipped = bytearray(whole)
        flipped[whole.index(b"\x93NUMPY") + 130] ^= 1  # a bit of the first array's values
        for damaged in (whole[: len(whole) // 2], b"", b"PK\x03\x04", bytes(flipped)):
            path.write_bytes(damaged)
            with pytest.warns(UserWarning, match="damaged"):
                assert run.load_npz("layers/07") is None
        with pytest.raises(TypeError, match="object"):
            run.save_npz("bad", values=np.array([{}]))


def test_a_pickle_in_npz_is_not_loaded(tmp_path):
    np.savez(tmp_path / "p.npz", x=np.array([{}], dtype=object))
    with pytest.warns(UserWarning, match="damaged"):
        assert files.load_npz(tmp_path / "p.npz") is None


def test_a_failed_write_keeps_the_old_file(tmp_path):
    path = files.write_json(tmp_path / "a.json", {"x": 1})

    def full_disk(file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(files.CannotSave, match="No space left") as error:
        files.write_atomic(path, full_disk)
    assert error.value.exit_code == 74
    assert files.read_json(path) == {"x": 1} and [entry.name for entry in tmp_path.iterdir()] == ["a.json"]


WRITE = """
import sys
import numpy as np
from pathlib import Path
from train.runtime.files import save_npz
path, round = Path(sys.argv[1]), 0
while True:
    save_npz(path, {"a": np.full(200_000, round), "b": np.full(3, round)})
    round += 1
    print(round, flush=True)
"""


def test_kill_9_while_writing_leaves_a_whole_file(tmp_path):
    path = tmp_path / "state.npz"
    for attempt in range(6):
        process = start(WRITE, path)
        for _ in range(2 + attempt):
            reported = int(process.stdout.readline())
        time.sleep(0.0017 * attempt)  # another point of the cycle each time
        process.kill()
        process.wait()
        arrays = files.load_npz(path)  # pytest turns no warning into None: a torn file would fail here
        assert arrays is not None and len(set(arrays["a"]) | set(arrays["b"])) == 1
        assert arrays["b"][0] >= reported - 1
        path.unlink()


STOPPABLE = """
import sys, time
from jaxmodels.errors import Interrupted
from train.runtime.run_folder import RunFolder
from train.runtime.signals import stop
with stop.listening(), RunFolder(sys.argv[1], {}) as run:
    print("open", flush=True)
    try:
        while True:
            time.sleep(0.01)
            if len(sys.argv) < 3:
                run.check_stop()
    except Interrupted:
        assert stop.requested
        print("saved", flush=True)
        raise
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_between_units(tmp_path, number):
    process = start(STOPPABLE, tmp_path / "r")
    assert process.stdout.readline() == "open\n"
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert out == "saved\n" and number.name in err and process.returncode == 1
    assert json.loads((tmp_path / "r/results.json").read_text())["status"] == "interrupted"


def test_a_key_that_a_later_version_adds(tmp_path):
    """At its default it is the same run, in the same folder; at another value it is another run."""
    older, defaults = {"inner": {"rate": 0.5}, "size": 4}, {"inner": {"rate": 0.1, "kind": "sum"}, "size": 3}
    newer = {"inner": {"rate": 0.5, "kind": "sum"}, "size": 4}
    with RunFolder.open("s", older, root=tmp_path, defaults={"inner": {"rate": 0.1}, "size": 3}) as run:
        before = run.dir
    with RunFolder.open("s", newer, root=tmp_path, defaults=defaults) as run:
        assert run.dir == before and run.resumed
    other = {"inner": {"rate": 0.5, "kind": "mean"}, "size": 4}
    with RunFolder.open("s", other, root=tmp_path, defaults=defaults) as run:
        assert run.dir != before
    with pytest.raises(UserError, match="inner.kind: 'sum' -> 'mean'"):
        RunFolder(before, other, "s", defaults=defaults)


def test_a_second_interrupt_ends_a_deaf_process_at_once(tmp_path):
    process = start(STOPPABLE, tmp_path / "r", "deaf")
    assert process.stdout.readline() == "open\n"
    process.send_signal(signal.SIGINT)
    while "(Ctrl-C: at once)" not in process.stderr.readline():
        pass
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == -signal.SIGINT
    assert json.loads((tmp_path / "r/results.json").read_text())["status"] == "running"


def test_the_flag_is_the_process_and_goes_with_the_block(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    with stop.listening(), RunFolder(tmp_path / "r", CONFIG) as run:
        stage = run.stage("pretrain")
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Interrupted, match="SIGTERM"):
            stage.check_stop()
    assert stop.requested is None and signal.getsignal(signal.SIGTERM) is before


def test_a_second_sigterm_on_the_way_out_changes_nothing():
    before = signal.getsignal(signal.SIGTERM)
    try:
        with stop.listening(ends=True):
            pass
        assert signal.getsignal(signal.SIGTERM) is before  # nobody asked it to stop
        with stop.listening(ends=True):
            os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # would end this process
        assert stop.requested is None
    finally:
        signal.signal(signal.SIGTERM, before)


def test_stages_hold_the_same_files(tmp_path):
    with RunFolder(tmp_path / "r", CONFIG) as run:
        with run.stage("pretrain", {"steps": 2}) as stage:
            stage.log(0, loss=1.0)
            stage.write_results({"loss": 1.0})
        assert json.loads((tmp_path / "r/pretrain/results.json").read_text())["status"] == "complete"
    assert json.loads((tmp_path / "r/pretrain/config.json").read_text())["config"] == {"steps": 2}
    with RunFolder(tmp_path / "r", CONFIG) as run, run.stage("pretrain", {"steps": 2}) as stage:
        assert stage.resumed and len(stage.metrics()) == 1


def test_progress_without_a_terminal_is_plain(tmp_path, capfd):
    with RunFolder(tmp_path / "r", CONFIG) as run, run.progress(3, "layers", done=1) as advance:
        advance()
        advance(note="last")
    err = capfd.readouterr().err
    assert "layers: 3/3" in err and "\x1b" not in err


def test_bad_input_is_told_though_the_folder_cannot_go(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "r").symlink_to("disk")
    with pytest.raises(UserError, match="no such text"), RunFolder(tmp_path / "r", CONFIG):
        raise UserError("no such text")
    assert not any((tmp_path / "disk").iterdir())


def test_a_line_that_is_cut_short_is_not_written_on(tmp_path, monkeypatch):
    """The disk takes a part and tells no error; the next start drops that part, and loses no line behind it."""
    with RunFolder(tmp_path / "r", CONFIG) as run:
        run.log(1, loss=0.5)
        file = run._metrics
        monkeypatch.setattr(run, "_metrics", types.SimpleNamespace(write=lambda line: file.write(line[:9]),
                                                                   close=file.close))
        with pytest.raises(files.CannotSave, match="No space left"):
            run.log(2, loss=0.4)
    with RunFolder(tmp_path / "r", CONFIG) as run:
        run.log(2, loss=0.4)
        assert [line["step"] for line in run.metrics()] == [1, 2]

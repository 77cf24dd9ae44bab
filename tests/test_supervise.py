"""Restarts, as real processes: small scripts stand for the run, and nothing here needs jax."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from train import supervise

ROOT = Path(__file__).resolve().parents[1]

# Fake run: argv[1] is a folder that counts its starts; the rest says how each start ends, the last one ever after.
# "75": exit code; "SIGKILL": by that signal; "75+10": after committing step 10; "sleep": until it is told to stop.
SCRIPT = """
import os, signal, sys, time
from pathlib import Path
folder = Path(sys.argv[1])
starts = len(list(folder.glob("start-*")))
(folder / f"start-{starts}").write_text(repr(time.time()))
ends = [word for word in sys.argv[2:] if not word.startswith("-")]
ends = ends[:ends.index("end")] if "end" in ends else ends
what, _, step = ends[min(starts, len(ends) - 1)].partition("+")
def told(number, frame):
    with (folder / "told").open("a") as file:
        file.write(signal.Signals(number).name + "\\n")
    if number != signal.SIGUSR1:
        sys.exit(75)
if step:
    made = folder / "run" / "checkpoints" / step
    made.mkdir(parents=True)
    (made / "commit_success.txt").touch()
if what == "sleep":
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, told)
    (folder / "ready").touch()
    while True:
        time.sleep(0.05)
if what.startswith("SIG"):
    signal.signal(signal.SIGABRT, signal.SIG_DFL)
    os.kill(os.getpid(), signal.Signals[what])
    time.sleep(10)
sys.exit(int(what))
"""


@pytest.fixture
def fake(tmp_path):
    """(command, folder): the words before the ends."""
    script = tmp_path / "fake.py"
    script.write_text(SCRIPT)
    return [sys.executable, str(script), str(tmp_path)], tmp_path


def start(*arguments, **options):
    return subprocess.Popen([sys.executable, "-m", "train.supervise", *map(str, arguments)], cwd=ROOT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def run(*arguments):
    process = start(*arguments)
    out, err = process.communicate(timeout=60)
    return process.returncode, err.splitlines()


def starts(folder):
    return sorted(float(path.read_text()) for path in folder.glob("start-*"))


def wait_for(path):
    end = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < end, f"{path} never came"
        time.sleep(0.02)


def test_it_imports_nothing_heavy():
    code = "import sys, train.supervise; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {"jax", "numpy", "orbax", "flax"} & set(run.stdout.split())


def test_it_looks_for_the_marker_that_checkpoints_have():
    from train.runtime import checkpoint_folder, run_folder

    assert supervise.COMMITTED == checkpoint_folder.COMMITTED and supervise.RESULTS == run_folder.RESULTS


@pytest.mark.parametrize("code", [0, 1, 2, 65, 66, 74, 3, 139])
def test_other_codes_are_the_end_and_passed_on(fake, code):
    command, folder = fake
    assert run("--backoff", 0, "--", *command, code) == (code, []) and len(starts(folder)) == 1


@pytest.mark.parametrize(("end", "told"), [
    ("75", r"75 \(preempted and saved\)"), ("134", r"134 \(SIGABRT\)"), ("137", r"137 \(SIGKILL\)"),
    ("143", r"143 \(SIGTERM\)"), ("SIGABRT", r"134 \(SIGABRT\)"), ("SIGKILL", r"137 \(SIGKILL\)"),
    ("SIGTERM", r"143 \(SIGTERM\)")])
def test_preempted_and_killed_runs_start_again(fake, end, told):
    command, folder = fake
    code, lines = run("--backoff", 0, "--run", folder / "run", "--", *command, end, 0)
    assert code == 0 and len(starts(folder)) == 2
    (line,) = lines
    assert re.fullmatch(rf"supervise: the command ended with {told}; restart 1 of 10 in 0 s", line)


def test_the_back_off_doubles_and_is_capped(fake, monkeypatch):
    command, folder = fake
    code, lines = run("--backoff", 0.1, "--max-restarts", 4, "--", *command, 75)
    assert code == 75 and [line.rpartition(" in ")[2] for line in lines[1:-1]] == ["0.1 s", "0.2 s", "0.4 s", "0.8 s"]
    assert "is not checked" in lines[0]  # once: there is no run folder
    assert "4 restarts are used up" in lines[-1] and len(lines) == 6
    waits = [after - before for before, after in zip(starts(folder), starts(folder)[1:], strict=False)]
    assert all(wait >= delay for wait, delay in zip(waits, (0.1, 0.2, 0.4, 0.8), strict=True))
    seconds = []
    monkeypatch.setattr(supervise._Signals, "wait", lambda self, s: seconds.append(s) or iter(()))
    monkeypatch.setattr(supervise, "_run_once", lambda command, signals: 75)
    assert supervise.main(["--max-restarts", "10", "--", "x"]) == 75
    assert seconds == [1, 2, 4, 8, 16, 32, 60, 60, 60, 60]


def test_no_restarts(fake):
    command, folder = fake
    code, lines = run("--max-restarts", 0, "--", *command, "SIGKILL")
    assert code == 137 and len(starts(folder)) == 1 and "0 restarts are used up" in lines[0]


@pytest.mark.parametrize("how", [["--out", "RUN"], ["--out=RUN"]])
def test_it_stops_when_no_step_is_committed_twice_running(fake, how):
    command, folder = fake
    words = [word.replace("RUN", str(folder / "run")) for word in how]
    # committed, nothing, committed, nothing, nothing: stop
    ends = ["137+5", "137", "137+10", "137", "137", "0"]
    code, lines = run("--backoff", 0.01, "--", *command, *ends, "end", *words)
    assert code == 137 and len(starts(folder)) == 5
    assert len(lines) == 5 and "committed no new step" in lines[-1] and str(folder / "run") in lines[-1]
    # a commit resets the delay
    assert [line.rpartition(" in ")[2] for line in lines[:-1]] == ["0.01 s", "0.02 s", "0.01 s", "0.02 s"]


def test_only_finished_checkpoints_count(tmp_path):
    folder, local = tmp_path / "checkpoints", tmp_path / "local"
    assert supervise.committed([folder]) == set()
    for name in ("5", "7.corrupt", "9.orbax-checkpoint-tmp", "x"):
        (folder / name).mkdir(parents=True)
    for name in ("7.corrupt", "x"):
        (folder / name / supervise.COMMITTED).touch()
    assert supervise.committed([folder]) == set()
    (folder / "5" / supervise.COMMITTED).touch()
    (local / "6").mkdir(parents=True)
    (local / "6" / supervise.COMMITTED).touch()
    before = supervise.committed([folder, local])
    assert {path for path, _ in before} == {str(folder / "5"), str(local / "6")}
    # the same step made anew, after a damaged one was set aside, is progress
    (folder / "5").rename(folder / "5.corrupt")
    (folder / "5").mkdir()
    (folder / "5" / supervise.COMMITTED).touch()
    os.utime(folder / "5" / supervise.COMMITTED, ns=(1, 1))
    assert {path for path, _ in supervise.committed([folder, local]) - before} == {str(folder / "5")}


def test_a_sweep_that_gets_on_is_not_given_up(fake):
    """Its checkpoints are those of its trials, and a trial at its end may leave none."""
    command, folder = fake
    trials = folder / "run" / "small"
    ends = [f"137+{trials / 'seed-0' / 'checkpoints' / str(step)}" for step in (5, 10, 15, 20)]
    code, lines = run("--backoff", 0, "--", *command, *ends, 0, "end", "--out", folder / "run")
    assert code == 0 and len(lines) == 4 and (trials / "seed-0" / "checkpoints" / "20").is_dir()
    before = supervise.committed([folder / "run"])
    for status in ("running", "complete"):
        (trials / "results.json").write_text(f'{{"status": "{status}"}}')
        new = supervise.committed([folder / "run"]) - before
        assert [path for path, _ in new] == [str(trials / "results.json")] * (status == "complete")


def test_the_run_folder_comes_from_the_command():
    find = supervise._folders
    assert find(["jaxmodels", "run", "x", "--out", "a"], None) == [Path("a")]
    assert find(["jaxmodels", "run", "x", "--out", "a"], "b") == [Path("b")]
    assert find(["run", "--out=a", "loop.local_dir=/l"], None) == [Path("a"), Path("/l")]
    assert find(["run", "loop.local_dir=/l"], None) == find(["run", "--out"], None) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_is_passed_on_and_ends_the_supervisor(fake, number):
    command, folder = fake
    process = start("--", *command, "sleep")
    wait_for(folder / "ready")
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 75 and err == "" and len(starts(folder)) == 1
    assert (folder / "told").read_text().split() == [number.name]


def test_ctrl_c_reaches_the_run_once(fake):
    """A terminal signals the whole process group; the run must not take that for a second, impatient signal."""
    command, folder = fake
    process = start("--", *command, "sleep", start_new_session=True)
    wait_for(folder / "ready")
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 75 and (folder / "told").read_text().split() == ["SIGINT"]


def test_sigusr1_is_passed_on_and_changes_nothing(fake):
    command, folder = fake
    process = start("--", *command, "sleep")
    wait_for(folder / "ready")
    process.send_signal(signal.SIGUSR1)
    wait_for(folder / "told")
    process.send_signal(signal.SIGHUP)  # a closed terminal: told as SIGTERM
    process.communicate(timeout=30)
    assert process.returncode == 75 and (folder / "told").read_text().split() == ["SIGUSR1", "SIGTERM"]


def test_a_stop_during_the_back_off_is_at_once(fake):
    command, folder = fake
    process = start("--backoff", 50, "--run", folder, "--", *command, "SIGKILL")
    assert "restart 1 of 10 in 50 s" in process.stderr.readline()
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 137 and time.monotonic() - began < 10 and len(starts(folder)) == 1


@pytest.mark.parametrize(("arguments", "told"), [
    ([], "no command; write it after --"), (["--"], "no command; write it after --"),
    (["--max-restarts", "3"], "no command"),
    (["--", "/no/such/command"], "cannot start /no/such/command: No such file or directory"),
    (["--", str(ROOT)], "Permission denied"),
    (["--max-restarts", "x", "--", "true"], "invalid int value: 'x'"), (["--ru", "x", "--", "true"], "unrecognized"),
    (["--max-restarts", "-1", "--", "true"], "must be at least 0"), (["--backoff", "nan", "--", "true"], "at least 0"),
])
def test_bad_usage_is_one_line_and_exit_2(arguments, told, capfd):
    assert supervise.main(arguments) == 2
    err = capfd.readouterr().err
    assert told in err and err.count("\n") == 1 and err.startswith("supervise: ")

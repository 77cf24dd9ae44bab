"""The command, as a real process: exit codes, one-line errors, resuming, and what it does not import."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxmodels import cli
from jaxmodels.cache import cache_folder

ROOT = Path(__file__).resolve().parents[1]
TINY = "tests.tiny_experiment"


def jaxmodels(*arguments: object, stdin: str = "", **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "jaxmodels", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, **environment},
        input=stdin,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def test_a_request_to_save_before_there_is_anything_to_save():
    """SIGUSR1 ends a process that does not say otherwise; a run handles it only from its first step on."""
    code = ("import os, signal; from jaxmodels import cli; "
            "cli.main = lambda: os.kill(os.getpid(), signal.SIGUSR1) or 0; cli.entry()")
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False, timeout=120).returncode == 0


def test_run_ends_with_the_path_of_the_report_and_resumes(tmp_path):
    out = tmp_path / "r"
    first = jaxmodels("run", TINY, "--out", out, "preset=tiny")
    assert first.returncode == 0, first.stderr
    assert first.stdout.splitlines()[-1] == str(out / "report.html") and (out / "report.html").exists()
    assert results(out)["status"] == "complete" and results(out)["computed"] == 2
    again = jaxmodels("run", TINY, "preset=tiny", "--out", out)
    assert again.returncode == 0 and "resuming" in again.stderr
    assert results(out)["computed"] == 0 and results(out)["total"] == 1 + 3


def test_runs_go_to_a_folder_named_by_the_config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["run", TINY, "units=1"]) == 0
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("tiny_experiment-")
    assert cli.main(["report", str(folder)]) == 2  # not an experiment of configs/: the folder may not say which
    assert cli.main(["report", str(folder), "--experiment", TINY]) == 0


def test_a_run_folder_does_not_choose_what_builds_its_report(tmp_path, capsys):
    for name, words, told in (
            ("other", [], "r is a run of 'other', which is none of the experiments here"),
            ("a.b-sweep", [], "r is a run of 'a.b', which is none of the experiments here"),
            ("other", ["--experiment", TINY], "r is a run of 'other', not of 'tiny_experiment'"),
            ("text2tree", [], "")):
        about = {"name": name, "config": {"report": "shutil:rmtree"}}
        (tmp_path / "r").mkdir(exist_ok=True)
        (tmp_path / "r" / "config.json").write_text(json.dumps(about))
        code = cli.main(["report", str(tmp_path / "r"), *words])
        assert (tmp_path / "r" / "config.json").exists()
        assert told in capsys.readouterr().err and (code == 2 or not told)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["rum", "atlas"], "unknown command 'rum'; did you mean 'run'?"),
        (["run", "tests.tiny_experimen"], "unknown experiment"),
        (["run", "atlsa"], "unknown experiment 'atlsa'"),
        (["run", TINY, "unit=3"], "did you mean 'units'?"),
        (["run", TINY, "units=x"], "expected int"),
        (["run", TINY, "--ot", "x"], "unrecognized arguments: --ot"),
        (["run"], "required: NAME"),
        (["report", "nowhere"], "nowhere is not a run folder"),
        (["bench", "nothing"], "benchmark"),
        (["split", "m", "--out", "tests"], "is not an empty folder"),
        (["prune", "m", "--keep", "LICENSE", "--out", "nowhere"], "cannot read LICENSE"),
        (["prune", "m", "--keep", "missing.npy", "--out", "nowhere"], "cannot read missing.npy"),
        (["generate", "m", "--prompt", ""], "empty prompt"),
        (["generate", "m", "--prompt", "a", "--top-p", "1.5"], "--top-p 1.5: it must be above 0"),
        (["generate", "m", "--prompt", "a", "--max-new-tokens", "0"], "must be at least 1"),
    ],
)
def test_bad_usage_is_one_line_and_exit_2(arguments, told, capsys):
    assert cli.main(arguments) == 2
    err = capsys.readouterr().err
    assert told in err and err.count("\n") == 1 and "Traceback" not in err


def test_bad_input_inside_a_run_leaves_no_folder(tmp_path):
    run = jaxmodels("run", TINY, "note=bad input", "--out", tmp_path / "r")
    assert run.returncode == 2 and "note 'bad input' is not accepted" in run.stderr.splitlines()[-1]
    assert "Traceback" not in run.stderr and not (tmp_path / "r").exists()


def test_a_bug_is_one_line_unless_debug(tmp_path):
    run = jaxmodels("run", TINY, "note=bug", "--out", tmp_path / "r")
    assert run.returncode == 1 and "ZeroDivisionError: a bug" in run.stderr and "Traceback" not in run.stderr
    assert results(tmp_path / "r")["status"] == "failed"
    run = jaxmodels("run", TINY, "note=bug", "--debug", "--out", tmp_path / "r")
    assert run.returncode == 1 and "Traceback" in run.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_exits_75_and_goes_on(tmp_path, number):
    command = [sys.executable, "-m", "jaxmodels", "run", TINY, "pause=0.2", "units=12", "--out", tmp_path / "r"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "unit 0\n"
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75 and "the same command goes on" in err
    assert results(tmp_path / "r")["status"] == "interrupted"
    again = jaxmodels(*command[3:])
    assert again.returncode == 0
    assert 0 < results(tmp_path / "r")["computed"] < 12 and results(tmp_path / "r")["status"] == "complete"
    undisturbed = jaxmodels("run", TINY, "pause=0", "units=12", "--out", tmp_path / "u")
    assert undisturbed.returncode == 0 and results(tmp_path / "u")["total"] == results(tmp_path / "r")["total"]


def test_a_killed_run_goes_on(tmp_path):
    command = ("run", TINY, "note=kill", "--out", tmp_path / "r")
    assert jaxmodels(*command).returncode == -signal.SIGKILL
    assert results(tmp_path / "r")["status"] == "running"
    assert jaxmodels(*command).returncode == 0
    assert results(tmp_path / "r")["computed"] == 1 and results(tmp_path / "r")["status"] == "complete"


def test_help_of_an_experiment_lists_its_keys():
    run = jaxmodels("run", TINY, "inner.size=9", "--help")
    assert run.returncode == 0 and "Adds numbers slowly" in run.stdout and "presets: default, tiny" in run.stdout
    (line,) = [line for line in run.stdout.splitlines() if line.startswith("inner.size")]
    assert line.split(maxsplit=3) == ["inner.size", "int", "9", "numbers added in a unit"]


@pytest.mark.parametrize("arguments", [["list"], ["--help"], ["run", "--help"], ["run", TINY, "--help"]])
def test_light_commands_import_nothing_heavy(arguments):
    code = f"import sys; from jaxmodels.cli import main; main({arguments!r}); print(*sys.modules, file=sys.stderr)"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    heavy = {"jax", "flax", "transformers", "sklearn", "matplotlib", "scipy", "tensorflow_datasets", "torch"}
    assert run.stdout and not heavy & set(run.stderr.split())


def test_list_names_every_experiment_and_whether_its_data_is_here():
    run = jaxmodels("list")
    names = {path.stem for path in (ROOT / "configs").glob("[!_]*.py")}
    rows = run.stdout.splitlines()
    assert run.returncode == 0 and names == {row.split()[0] for row in rows[1:]}
    assert "experiment" in rows[0] and "\x1b" not in run.stdout and "…" not in run.stdout


def test_a_closed_pipe_is_quiet():
    command = f"{sys.executable} -m jaxmodels run {TINY} --help | head -n 1"
    run = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.stderr == ""


def test_keep_files_are_checked_before_the_model(tmp_path, capsys):
    np.save(tmp_path / "keep.npy", np.ones((2, 3)))
    assert cli.main(["prune", "m", "--keep", str(tmp_path / "keep.npy"), "--out", str(tmp_path / "o")]) == 2
    assert "must hold bool[layers, experts]" in capsys.readouterr().err


def test_where_compiled_programs_go(monkeypatch):
    monkeypatch.setenv("JAXMODELS_CACHE", "/a")
    assert cache_folder() == Path("/a")
    monkeypatch.delenv("JAXMODELS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert cache_folder() == Path("/b/jaxmodels")


@pytest.mark.parametrize(
    ("need", "told"), [("gettext", "here"), ("path:nowhere", "missing"), ("no-such-model", "missing")]
)
def test_needs_are_looked_up(need, told):
    assert cli._whether_here(need) == told

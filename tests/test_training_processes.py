"""Real processes: signals, kills, bad input, several processes (training_runtime.md sections 6 and 8).

Most are long: every one of them starts jax several times.
"""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Compiled programs that the processes of this file share."""
    return os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(tmp_path_factory.mktemp("cache"))


def environment(cache, devices=1, **more):
    env = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_"))}
    return env | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
                  "JAX_CPU_ENABLE_ASYNC_DISPATCH": "false", "JAX_COMPILATION_CACHE_DIR": cache,
                  "PYTHONUNBUFFERED": "1"} | more


def command(out, *overrides):
    return [sys.executable, "-m", "jaxmodels", "run", "tests.toy_training", "--out", str(out), *overrides]


def begin(out, cache, *overrides, devices=1, **env):
    return subprocess.Popen(command(out, *overrides), cwd=ROOT, env=environment(cache, devices, **env),
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def end(process, limit=120):
    """(exit code, stderr)."""
    _, told = process.communicate(timeout=limit)
    return process.returncode, told


def run(out, cache, *overrides, **options):
    return end(begin(out, cache, *overrides, **options))


def lines(out):
    path = out / "metrics.jsonl"
    whole = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in whole if line.endswith("\n")]


def stable(line):
    return {key: value for key, value in line.items() if key not in ("step_seconds", "tokens_per_second", "mfu")}


def committed(out):
    return sorted(int(p.name) for p in (out / "checkpoints").iterdir() if p.name.isdigit())


def wait_for(condition, process, limit=90):
    until = time.monotonic() + limit
    while not condition():
        assert process.poll() is None, end(process)
        assert time.monotonic() < until, "the moment never came"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def whole(cache, tmp_path_factory):
    """A run that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert run(out, cache)[0] == 0
    return [stable(line) for line in lines(out)]


@pytest.mark.long
@pytest.mark.parametrize("moment", ["step", "evaluation", "data", "compile"])
def test_sigterm(moment, whole, cache, tmp_path):
    out = tmp_path / "run"
    process = begin(out, cache, *([] if moment == "compile" else [f"slow={moment}"]),
                    **({"JAX_ENABLE_COMPILATION_CACHE": "false"} if moment == "compile" else {}))
    if moment == "compile":  # the folder appears just before it
        wait_for(lambda: (out / "config.json").exists(), process)
    else:
        wait_for(lambda: len(lines(out)) >= {"step": 3, "evaluation": 9, "data": 3}[moment], process)
        time.sleep(3.0 if moment == "data" else 1.0)  # readers work ahead: their stall begins a few batches later
    process.send_signal(signal.SIGTERM)
    sent = time.monotonic()
    time.sleep(0.1)
    process.send_signal(signal.SIGTERM)  # who signals every process of a job reaches it twice, once by the supervisor
    code, told = end(process)
    taken = time.monotonic() - sent
    assert code == 75, told
    assert "is saved; the same command goes on" in told
    results = json.loads((out / "results.json").read_text())
    assert results["status"] == "interrupted"
    last = committed(out)[-1]
    logged = [line["step"] for line in lines(out)]
    if moment == "evaluation":
        assert last == 10 and logged == list(range(1, 10))  # step 10 is finished, its evaluation is dropped
    else:
        assert logged == list(range(1, last + 1))  # nothing finished was lost
    if moment != "compile":
        assert taken < 15  # a step, a save and two seconds; generous, for machines are shared
    assert run(out, cache)[0] == 0
    assert [stable(line) for line in lines(out)] == whole


@pytest.mark.long
def test_sigusr1_saves_and_goes_on(whole, cache, tmp_path):
    out = tmp_path / "run"
    process = begin(out, cache, "slow=step", "loop.save_every=100")
    wait_for(lambda: len(lines(out)) >= 2, process)
    process.send_signal(signal.SIGUSR1)
    assert end(process)[0] == 0
    early = [step for step in committed(out) if step < 20]
    assert len(early) == 1
    assert [stable(line) for line in lines(out)] == whole


@pytest.mark.long
def test_kill_9_under_the_supervisor(whole, cache, tmp_path):
    """The run completes, every step was taken, and every example was seen once among the committed steps."""
    out = tmp_path / "run"
    supervised = subprocess.Popen(
        [sys.executable, "-m", "train.supervise", "--backoff", "0.1", "--", *command(out, "nap=0.01")], cwd=ROOT,
        env=environment(cache), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for step in (4, 12):
        wait_for(lambda step=step: len(lines(out)) >= step, supervised)
        children = subprocess.run(["pgrep", "-P", str(supervised.pid)], capture_output=True, text=True).stdout.split()
        os.kill(int(children[0]), signal.SIGKILL)
        time.sleep(0.5)
    code, told = end(supervised)
    assert code == 0, told
    assert [stable(line) for line in lines(out)] == whole  # ids included
    assert json.loads((out / "goodput.json").read_text())["starts"] >= 2


@pytest.mark.long
@pytest.mark.soak
def test_a_hundred_kills(whole, cache, tmp_path):
    """Random moments, saves and starts included: no committed step is ever lost, the numbers are those of one run."""
    moments = random.Random(0)
    survived = runs = 0
    while survived < 100:
        out = tmp_path / f"run{runs}"
        runs += 1
        while True:
            before = committed(out)[-1] if (out / "checkpoints").is_dir() and committed(out) else 0
            process = begin(out, cache, "nap=0.004", "loop.save_every=1")
            try:
                process.communicate(timeout=moments.uniform(0.5, 9.0))
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
                survived += 1
            steps = committed(out) if (out / "checkpoints").is_dir() else []
            assert (steps[-1] if steps else 0) >= before, "a committed step was lost"
            if process.returncode == 0:
                break
            assert process.returncode == -signal.SIGKILL, process.returncode
        assert [stable(line) for line in lines(out)] == whole
    print(f"{survived} kills survived over {runs} runs")


# Several processes


def begin_several(count, out, cache, *overrides, **env):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    join = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": str(count)}
    return [begin(out, cache, *overrides, **join, **({"JAXMODELS_HEARTBEAT": "10"} | env), JAX_PROCESS_ID=str(i))
            for i in range(count)]


def begin_two(out, cache, *overrides, **env):
    return begin_several(2, out, cache, "mesh.data=2", *overrides, **env)


@pytest.mark.long
def test_two_processes_agree_with_one(cache, tmp_path):
    """G2 for processes: the same examples and losses equal to rounding. (Without dropout: rows change places.)"""
    for process in begin_two(tmp_path / "two", cache, "family=decoder"):
        code, told = end(process)
        assert code == 0, told
    assert run(tmp_path / "one", cache, "family=decoder")[0] == 0
    two, one = lines(tmp_path / "two"), lines(tmp_path / "one")
    assert [sorted(line["ids"]) for line in two] == [sorted(line["ids"]) for line in one]
    assert two[0]["loss"] == pytest.approx(one[0]["loss"], rel=1e-6)
    assert [line["loss"] for line in two] == pytest.approx([line["loss"] for line in one], rel=1e-3)
    assert (tmp_path / "two" / "report.html").exists()


@pytest.mark.long
@pytest.mark.parametrize("mesh", [pytest.param(("mesh.data=4",), marks=pytest.mark.soak),
                                  ("mesh.data=1", "mesh.fsdp=2", "mesh.expert=2")])
def test_four_processes_agree_with_one(mesh, cache, tmp_path):
    """The same over four processes, with a mixture of experts that travels between them."""
    for process in begin_several(4, tmp_path / "four", cache, *mesh, "family=moe", "loop.steps=4"):
        code, told = end(process)
        assert code == 0, told
    assert run(tmp_path / "one", cache, "family=moe", "loop.steps=4")[0] == 0
    four, one = lines(tmp_path / "four"), lines(tmp_path / "one")
    assert [sorted(line["ids"]) for line in four] == [sorted(line["ids"]) for line in one]
    assert four[0]["loss"] == pytest.approx(one[0]["loss"], rel=1e-6)
    assert [line["loss"] for line in four] == pytest.approx([line["loss"] for line in one], rel=1e-3)


@pytest.mark.long
def test_sigterm_to_one_of_two(cache, tmp_path):
    """Both save the same step and leave with 75; one process alone then goes on."""
    out = tmp_path / "run"
    pair = begin_two(out, cache, "slow=step")
    wait_for(lambda: len(lines(out)) >= 3, pair[0])
    pair[1].send_signal(signal.SIGTERM)
    found = [end(process) for process in pair]
    assert [code for code, _ in found] == [75, 75], found
    steps = {told.partition(" at step ")[2].split(",")[0] for _, told in found}
    assert len(steps) == 1 and committed(out)[-1] == int(steps.pop())
    assert run(out, cache)[0] == 0
    assert [line["step"] for line in lines(out)] == list(range(1, 21))


@pytest.mark.long
def test_kill_9_of_one_of_two(cache, tmp_path):
    out = tmp_path / "run"
    pair = begin_two(out, cache, "slow=step", "loop.save_every=2")
    wait_for(lambda: len(lines(out)) >= 5, pair[0])
    pair[1].kill()
    killed = time.monotonic()
    code, told = end(pair[0], limit=60)
    assert code not in (0, 75), told
    assert time.monotonic() - killed < 10 + 10 + 10  # heartbeat + 10 s, and what a shared machine needs
    pair[1].communicate()
    before = committed(out)[-1]
    assert before >= 2
    for process in begin_two(out, cache):
        code, told = end(process)
        assert code == 0, told
    assert [line["step"] for line in lines(out)] == list(range(1, 21))


# Bad input: exit code and one line


@pytest.mark.parametrize("overrides, told", [
    (["mesh.data=3"], "needs 3 devices, there are 1"),
    (["batch=12", "loop.accumulate=8"], "batch 12 is not divisible by accumulate 8"),
    (["family=big"], "family=big does not fit"),
    (["loop.steps=0"], "loop.steps=0 must be at least 1"),
    (["loop.stepz=3"], "did you mean 'loop.steps'?"),
    (["records=4"], "4 records are fewer than a batch of 8"),
])
def test_bad_values(overrides, told, cache, tmp_path):
    code, stderr = run(tmp_path / "run", cache, *overrides)
    assert code == 2 and told in stderr
    assert stderr.strip().splitlines()[-1].startswith("jaxmodels: ")
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize("overrides, told", [
    (["model.remat=some"], "remat policy 'some' is unknown; choose from none, nothing_saveable"),
    (["data.batch=7", "loop.accumulate=2"], "batch 7 is not divisible by accumulate 2"),
    (["data.source=path:nowhere"], "nowhere is not a folder"),
    (["data.vocab_size=10"], "data.vocab_size=10 must be at least 258"),
])
def test_bad_values_of_pretraining(overrides, told, cache, tmp_path):
    words = [sys.executable, "-m", "jaxmodels", "run", "lm_moe_pretrain", "preset=tiny", *overrides]
    done = subprocess.run([*words, "--out", str(tmp_path / "run")], cwd=ROOT, env=environment(cache), text=True,
                          capture_output=True, timeout=120)
    assert done.returncode == 2 and told in done.stderr.splitlines()[-1], done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.long
def test_changed_data_and_seed(cache, tmp_path):
    """The run's own folder refuses another config; a checkpoint refuses other data, and names what changed."""
    out = tmp_path / "run"
    assert run(out, cache, "loop.steps=20")[0] == 0
    code, stderr = run(out, cache, "seed=1")
    assert code == 2 and "seed: 0 -> 1" in stderr
    record = json.loads((out / "config.json").read_text())
    record["config"]["records"] = 60  # as if the files had grown since
    (out / "config.json").write_text(json.dumps(record))
    before = committed(out)
    code, stderr = run(out, cache, "records=60")
    assert code == 2 and "records" in stderr.splitlines()[-1] and "loop.on_change" in stderr.splitlines()[-1], stderr
    assert committed(out) == before


@pytest.mark.long
def test_a_file_that_is_not_text(cache, tmp_path):
    """It is left out, counted and named: replaced characters would be learned."""
    for name in ("a", "b"):
        (tmp_path / "text" / name).mkdir(parents=True)
        (tmp_path / "text" / name / "good.txt").write_text("some words to read, again and again. " * 400)
    (tmp_path / "text" / "a" / "bad.txt").write_bytes(bytes(range(128, 256)) * 50)
    words = [sys.executable, "-m", "jaxmodels", "run", "lm_dense_pretrain", "preset=tiny", "data.vocab_size=262",
             "data.batch=2", "loop.steps=2", "samples=0", f"data.source=path:{tmp_path / 'text'}"]
    done = subprocess.run([*words, "--out", str(tmp_path / "run")], cwd=ROOT, env=environment(cache), text=True,
                          capture_output=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "1 files are not UTF-8 and are left out: a/bad.txt" in done.stderr


def test_unwritable_folder(cache, tmp_path):
    (tmp_path / "file").write_text("")
    code, stderr = run(tmp_path / "file" / "run", cache)
    assert code == 2 and "choose a writable --out" in stderr


@pytest.mark.long
def test_damaged_checkpoints(whole, cache, tmp_path):
    """The newest cut short: the one before it, and the numbers come out the same. All of them: exit 66, nothing lost.

    (Flipped bits: tests/test_checkpoint.py.)
    """
    out = tmp_path / "run"
    assert run(out, cache)[0] == 0

    def damage(step):
        for file in (out / "checkpoints" / str(step) / "state").rglob("d/*"):  # of some there are spare copies
            file.write_bytes(file.read_bytes()[:-100])

    damage(20)
    code, stderr = run(out, cache)
    assert code == 0 and "20.corrupt" in stderr and (out / "checkpoints" / "20.corrupt").is_dir()
    assert [stable(line) for line in lines(out)] == whole
    for step in committed(out):
        damage(step)
    code, stderr = run(out, cache)
    assert code == 66 and "start from scratch" in stderr
    assert run(out, cache)[0] == 66  # and it stays so: a restart never begins from scratch on its own


@pytest.mark.long
def test_not_a_number(cache, tmp_path):
    out = tmp_path / "run"
    code, stderr = run(out, cache, "records=500", "nan_from=5", "nan_batches=12")
    assert code == 65 and "not finite in 10 steps in a row, up to step 15" in stderr
    assert [line["step"] for line in lines(out)] == list(range(1, 16))
    assert (out / "bad_examples.json").exists()


@pytest.mark.long
def test_another_model_in_the_folder(cache, tmp_path):
    out = tmp_path / "run"
    assert run(out, cache)[0] == 0
    code, stderr = run(out, cache, "family=decoder")
    assert code == 2 and "family: 'perceptron' -> 'decoder'" in stderr
    config = json.loads((out / "config.json").read_text())
    config["config"]["family"] = "decoder"
    (out / "config.json").write_text(json.dumps(config))
    code, stderr = run(out, cache, "family=decoder")
    assert code == 2 and "checkpoint" in stderr and "embed" in stderr
    assert committed(out) == [10, 15, 20]


@pytest.mark.long
def test_full_disk(cache, tmp_path):
    """A file-size limit stands in for the disk: no checkpoint can be written, twice in a row ends the run with 74."""
    out = tmp_path / "run"
    shell = "ulimit -f 4; exec \"$@\""
    process = subprocess.Popen(["bash", "-c", shell, "bash", *command(out, "family=decoder")], cwd=ROOT,
                               env=environment(cache, JAX_ENABLE_COMPILATION_CACHE="false"), stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)
    code, stderr = end(process)
    assert code == 74 and "free space" in stderr, (code, stderr)
    code, stderr = run(out, cache, "family=decoder")
    assert code == 0, stderr
    assert [line["step"] for line in lines(out)] == list(range(1, 21))

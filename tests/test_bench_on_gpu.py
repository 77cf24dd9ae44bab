"""What runs the benchmarks on a GPU, without one: steps that fail and hang, the lock, and every line of the checks."""

import functools
import json
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import _alone, _grouped_peers, _hopper, _shapes, hopper_compile, hopper_run, on_gpu, train_step
from benchmarks._alone import Room
from benchmarks._shapes import Layer, Point
from benchmarks.on_gpu import Step
from jaxmodels.errors import UserError

TOY = Layer("toy", 24, 16, 6, 2, 120)
WRITES = "import json, sys; json.dump({'step': 1}, open(sys.argv[1], 'w')); "


def step(stage, name, code, seconds=20.0):
    return Step(stage, name, ("-c", code, "{out}"), seconds)


def test_a_step_costs_only_itself(tmp_path, capsys):
    """Done, failed, hanging and not to be started are told apart; what each wrote until then is kept."""
    steps = (step("one", "fine", WRITES + "print('hello')"),
             step("one", "fails", WRITES + "raise OSError('no such GPU')"),
             step("one", "hangs", WRITES + "print('begun', flush=True); import time; time.sleep(60)", 3.0),
             Step("one", "absent", ("-m", "no_such_module"), 20.0),
             step("two", "after", "import os; assert os.environ['XLA_CLIENT_MEM_FRACTION'] == '0.9'"),
             step("two", "silent", "pass"))  # fmt: skip
    out = tmp_path / "out.json"
    assert not on_gpu.main(str(out), 30.0, folder=str(tmp_path / "steps"), steps=steps)
    told = json.loads(out.read_text())["steps"]
    states = {name: one["state"] for name, one in told.items()}
    assert states == {"fine": "done", "fails": "failed", "hangs": "killed", "absent": "failed", "after": "done",
                      "silent": "done"}  # fmt: skip
    assert all(told[name]["result"] == {"step": 1} for name in ("fine", "fails", "hangs"))
    assert told["silent"]["result"] is None and told["hangs"]["printed"] == ["begun"]
    assert told["fails"]["printed"][-1] == "OSError: no such GPU" and told["fails"]["status"] == 1
    assert 3 <= told["hangs"]["seconds"] < 10
    printed = capsys.readouterr().out
    assert "-- killed: hangs" in printed and "no such GPU" in printed and "    failed" in printed.splitlines()[-5]


def test_what_is_told_of_a_step():
    rows = [{"result": "right"}, {"result": "compiled"}, {"result": "right", "note": "odd"}, {"result": "wrong"},
            {"side": "kernel", "result": "timed", "ms": 0.12345, "samples": {}}]  # fmt: skip
    assert on_gpu.brief({"rows": rows}) == ["1 compiled, 1 right", "right; odd", "wrong", "kernel; timed; ms 0.123"]
    assert on_gpu.brief(None) == on_gpu.brief([1]) == []


def test_no_time_left(tmp_path, capsys):
    steps = (step("one", "hangs", "import time; time.sleep(60)"), step("two", "late", "pass"),
             step("three", "not asked for", "pass"))  # fmt: skip
    start = time.monotonic()
    assert not on_gpu.main(str(tmp_path / "out.json"), 1.0, ["one", "two"], steps=steps)
    assert time.monotonic() - start < 8
    told = json.loads((tmp_path / "out.json").read_text())["steps"]
    assert {name: one["state"] for name, one in told.items()} == {"hangs": "killed", "late": "skipped"}
    assert "-- skipped: late: no time left" in capsys.readouterr().out
    with pytest.raises(UserError, match="--out is needed"):
        on_gpu.main(None)
    with pytest.raises(UserError, match="stage 'four' is unknown; choose from one, two, three"):
        on_gpu.main(str(tmp_path / "out.json"), stages=["four"], steps=steps)


def test_the_steps_are_well_formed():
    """Each writes a file of its own, and those that run together leave the device some memory."""
    assert len({one.name for one in on_gpu.STEPS}) == len(on_gpu.STEPS)
    for stage in {one.stage for one in on_gpu.STEPS}:
        together = [one for one in on_gpu.STEPS if one.stage == stage]
        assert sum(one.memory for one in together if "torch" not in one.name) <= 0.9
        assert all(one.argv.count("{out}") == 1 for one in together)


def test_the_compiler_is_found(tmp_path, monkeypatch):
    """Beside nvcc or where toolkits are installed; not asked for where $PATH has it all."""
    folder = tmp_path / "cuda-13.0" / "bin"
    folder.mkdir(parents=True)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert on_gpu.toolkit([str(tmp_path)]) == []
    (folder / "ptxas").touch(0o755)
    assert on_gpu.toolkit([str(tmp_path)]) == [str(folder)]
    (folder / "nvlink").touch(0o755)
    monkeypatch.setenv("PATH", str(folder))
    assert on_gpu.toolkit([str(tmp_path)]) == []


def test_one_measures_when_the_others_are_done(tmp_path, monkeypatch):
    """Shared until `alone`; whoever still works is waited for, but not for ever."""
    monkeypatch.setenv(_alone.VARIABLE, str(tmp_path / "lock"))
    first, second = Room(), Room()
    with first.alone(0.05) as alone:
        assert not alone, "the second still compiles"
    order = []

    def measure(room, name):
        with room.alone(10) as alone:
            order.append((name, "in", alone))
            time.sleep(0.1)
            order.append((name, "out", alone))

    threads = [threading.Thread(target=measure, args=pair) for pair in ((first, "first"), (second, "second"))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [what for _, what, _ in order] == ["in", "out"] * 2 and all(alone for *_, alone in order)
    third = Room()
    third.leave()
    with first.alone(0.05) as alone:
        assert alone
    monkeypatch.delenv(_alone.VARIABLE)
    with Room().alone(0) as alone:
        assert alone, "without a lock there is nobody else"


def operands(product, shape, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal(one), dtype) for one in _hopper.operand_shapes(product, shape)]


@pytest.mark.parametrize("product", _hopper.PRODUCTS)
def test_both_references_and_the_peer_agree(product):
    """The loop over groups and lax.ragged_dot with NumPy in float64; rows past the last group may be NaN."""
    shape = Point(TOY).shape
    arrays = operands(product, shape)
    sizes = np.array([0, 100, 1, 64, 0, 60], np.int32)
    wanted = hopper_run.float64(product, arrays, sizes)
    poisoned = [hopper_run._poison(a, int(sizes.sum())) if a.ndim == 2 else a for a in arrays]
    looped = hopper_run._tuple(jax.jit(_hopper.loop(product))(*poisoned, sizes))
    peer = hopper_run._tuple(jax.jit(_hopper.ragged_dot(product))(*arrays, sizes))
    assert len(looped) == len(peer) == len(wanted)
    for one, other, true in zip(looped, peer, wanted, strict=True):
        np.testing.assert_allclose(one, true, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(other, true, rtol=1e-4, atol=1e-4)
    matrices = [a if a.ndim == 2 else a[0] for a in arrays]
    assert _hopper.flop(product, shape) == 2 * 240 * 24 * 16 * (2 if "glu" in product else 1)
    dense = hopper_run._tuple(jax.jit(_hopper.dense(product))(*matrices, sizes))
    assert len(dense) == len(wanted) and dense[0].shape == wanted[0].shape[-2:]


@pytest.mark.parametrize("layer", [TOY, *_shapes.SMALL.values(), *_shapes.LAYERS.values()], ids=lambda one: one.name)
def test_row_counts(layer):
    """The hard ones have empty groups, of one row, cut by a tile, and rows that belong to none."""
    if layer.tokens > 20_000:
        pytest.skip("seconds for nothing")
    for distribution in hopper_run.CHECKED:
        sizes = hopper_run.row_counts(distribution, layer)
        assert sizes.dtype == np.int32 and sizes.shape == (layer.experts,) and sizes.min() >= 0
        loose = distribution in ("ragged", "few rows")
        assert sizes.sum() < layer.rows if loose else sizes.sum() == layer.rows
        if distribution == "ragged":
            assert {0, 1, 63, 65} <= set(sizes.tolist()) or layer is TOY


def near(product, **options):
    """In place of the kernel: the peer, and zero past the last group as the kernel has it."""
    peer = _hopper.ragged_dot(product)

    def run(x, w, sizes):
        inside = jnp.arange(len(x))[:, None] < sizes.sum()
        x = jnp.where(inside, x, 0)
        return peer(x, jnp.where(inside, w, 0) if product == "dw" else w, sizes)

    return run if product in ("forward", "dx", "dw") else (
        lambda x, gate, up, sizes: peer(jnp.where(jnp.arange(len(x))[:, None] < sizes.sum(), x, 0), gate, up, sizes))


def rows_of(tmp_path, monkeypatch, kernel, **options):
    monkeypatch.setattr(hopper_run, "POINTS", {"toy": Point(TOY)})
    monkeypatch.setattr(hopper_run, "unfit", lambda: None)
    monkeypatch.setattr(hopper_run, "TURN", 1e-6)
    monkeypatch.setattr(_hopper, "kernel", kernel)
    out = tmp_path / "out.json"
    good = hopper_run.main(str(out), points="toy", **options)
    return good, json.loads(out.read_text())["rows"]


def test_the_checks_and_times(tmp_path, monkeypatch, capsys):
    """A row for each step; right results are right, by both references."""
    for small in (0, 1e9):
        monkeypatch.setattr(hopper_run, "SMALL_FLOP", small)
        products = "dx,glu_kept,dw" if small else "forward,glu"
        good, rows = rows_of(tmp_path, monkeypatch, near, products=products)
        assert good, rows
        for product in products.split(","):
            mine = [row for row in rows if row["product"] == product]
            checks = [row for row in mine if row["step"].startswith("check")]
            assert len(checks) == len(hopper_run.CHECKED)
            assert all(row["result"] == "right" and row["error"] < 5e-3 for row in checks)
            timed = {row["step"]: row for row in mine if row["step"].startswith("time")}
            assert timed.keys() == {"time kernel", "time dense", "time ragged_dot"}
            assert timed["time dense"]["of dense"] == 1 and all(row["ms"] > 0 for row in timed.values())
    assert "check ragged; " in capsys.readouterr().out


def test_what_needs_more_memory_than_there_is_does_not_run():
    def of(name, **values):
        return type(name, (), values)()

    planned = of("Planned", temp_size_in_bytes=3 * 2**30, output_size_in_bytes=0, argument_size_in_bytes=2**30)
    program = of("Program", memory_analysis=lambda self: planned)
    for limit, reason in ((4, "needs 5.0 GiB, 4.0 are there"), (6, None)):
        device = of("Device", memory_stats=lambda self, limit=limit: {"bytes_limit": limit * 2**30})
        assert hopper_run.too_large(program, device) == reason
    assert hopper_run.too_large(program, of("Device", memory_stats=lambda self: None)) is None


def spoiled(place):
    """A kernel that gets something wrong."""

    def kernel(product, **options):
        return lambda *operands: place(near(product)(*operands), operands[-1])

    return kernel


WRONG = {
    "a row": lambda y, sizes: y.at[7].add(1),
    "one NaN": lambda y, sizes: y.at[0, 0].set(jnp.nan),
    "past the last group": lambda y, sizes: jnp.where(jnp.arange(len(y))[:, None] < sizes.sum(), y, 1),
    "the next group's": lambda y, sizes: jnp.roll(y, 1, 0),
}


@pytest.mark.parametrize("how", WRONG)
def test_what_is_wrong_is_seen(how, tmp_path, monkeypatch):
    good, rows = rows_of(tmp_path, monkeypatch, spoiled(WRONG[how]), products="forward")
    results = {row["step"]: row["result"] for row in rows}
    assert not good and results["check ragged"] == "wrong"
    assert results["check random"] == ("right" if how == "past the last group" else "wrong")


def test_a_broken_kernel_and_no_time(tmp_path, monkeypatch):
    def broken(product, **options):
        return lambda *operands: jnp.zeros(3) @ jnp.zeros(4)

    good, rows = rows_of(tmp_path, monkeypatch, broken, products="forward")
    results = {row["step"]: row["result"] for row in rows}
    assert not good and results["compile"] == "failed" and results["time dense"] == "timed"
    assert results["check zipf"] == "skipped" and "time kernel" not in results
    good, rows = rows_of(tmp_path, monkeypatch, near, products="forward", seconds=0)
    assert good and {row["result"] for row in rows} == {"skipped"} and len(rows) == 3 + len(hopper_run.CHECKED)
    with pytest.raises(UserError, match="product 'gul' is unknown; choose from forward, dx"):
        hopper_run.main(None, "gul", "toy")


def test_a_hanging_kernel_ends_its_process(tmp_path):
    """Waiting for a device, Python hears no signal: the system ends it, and the file says where."""
    code = """
import sys, time
from benchmarks import hopper_run
hopper_run.unfit, hopper_run.HANGS = (lambda: None), 1
hopper_run.Work.compile = lambda self: [{"result": "compiled"}]
hopper_run.Work.check = lambda self, distribution: time.sleep(60)
hopper_run.main(sys.argv[1], "forward", "E=12 top-3")
"""
    steps = (Step("one", "hangs", ("-c", code, "{out}"), 60.0),)
    assert not on_gpu.main(str(tmp_path / "out.json"), steps=steps)
    told = json.loads((tmp_path / "out.json").read_text())["steps"]["hangs"]
    assert told["state"] == "failed" and told["status"] == -14 and told["seconds"] < 50
    assert [row["result"] for row in told["result"]["rows"]] == ["compiled", "running"]


def test_without_a_gpu_it_says_so(tmp_path, capsys):
    assert not hopper_run.main(str(tmp_path / "out.json"), "forward")
    assert "only on a CUDA GPU of compute capability 9.x, this is cpu" in capsys.readouterr().out


def test_the_kernels_are_what_is_compiled(monkeypatch):
    """`hopper_compile` and `hopper_run` mean the same by a product, with what the kernel chooses by itself."""
    for product in _hopper.PRODUCTS:
        shape = hopper_compile.SHAPES["Qwen3-30B-A3B"]
        config = _hopper.default_config(product, shape)
        abstract = [jax.ShapeDtypeStruct(one, jnp.bfloat16) for one in _hopper.operand_shapes(product, shape)]
        abstract.append(jax.ShapeDtypeStruct(shape[3:], jnp.int32))
        texts = {str(jax.make_jaxpr(_hopper.kernel(product, **options))(*abstract)) for options in
                 ({}, {"config": config})}  # fmt: skip
        shapes = jax.eval_shape(_hopper.kernel(product), *abstract)
        wanted = jax.eval_shape(_hopper.loop(product), *abstract)
        assert len(texts) == 1
        assert jax.tree.leaves(jax.tree.map(lambda a: a.shape, list(hopper_run._tuple(shapes)))) == jax.tree.leaves(
            jax.tree.map(lambda a: a.shape, list(hopper_run._tuple(wanted))))


@pytest.mark.torch
def test_pytorch_alone(tmp_path, monkeypatch, capsys):
    torch = pytest.importorskip("torch")
    if not hasattr(torch.nn.functional, "grouped_mm"):
        pytest.skip("this PyTorch has no grouped_mm")
    monkeypatch.setattr(_grouped_peers, "ACCELERATOR", (Point(Layer("toy", 32, 16, 4, 2, 32)),))
    out = tmp_path / "out.json"
    _grouped_peers.alone(["toy"], ["zipf"], ["fwd"], 0.0, str(out), device="cpu")
    (row,) = json.loads(out.read_text())["rows"]
    assert row["key"] == ["toy", "zipf", "fwd"] and row["ms"] > 0 and row["alone"]
    assert "toy; zipf; fwd; ms " in capsys.readouterr().out


def test_some_sizes_of_the_training_step(monkeypatch, capsys):
    measured = []
    monkeypatch.setattr(train_step, "measure", lambda size, device, peers, **options: measured.append(
        (size.name, size.fits, peers, options["repeats"], options["steps"])) or [])  # fmt: skip
    train_step.main(None, sizes=["8 experts top-2"], batch=3, repeats=2, no_peers=True)
    assert measured == [("8 experts top-2", ((3, "none"),), {}, 2, 1)]
    with pytest.raises(UserError, match="size '8 experts' is unknown on this device; choose from dense 5M, 8 experts"):
        train_step.main(None, sizes=["8 experts"])


def test_the_commands_parse():
    """Every step's own options are ones that its module has."""
    for one in on_gpu.STEPS:
        module = one.argv[1]
        argv = [sys.executable, "-m", module, "--help"]
        done = run_help(tuple(argv))
        assert all(word in done for word in one.argv[2:] if word.startswith("--")), one.name


@functools.cache
def run_help(argv):
    import subprocess

    return subprocess.run(argv, capture_output=True, text=True, cwd=on_gpu.ROOT, check=True).stdout

"""The Hopper kernels without a GPU: under the interpreter on CPU, lowered for CUDA, compiled for sm_90a where possible.

jax 0.10's interpreter reads no transposed operand, so there only the forward product runs; jax 0.12's runs all. Neither
simulates tiles in shared memory, copies in flight or their order: what only a GPU shows, test_on_the_gpu asks of one of
compute capability 9.x: JAX_PLATFORMS=cuda pytest this file.
"""

import functools
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from glu_reference import ACTS, check_glu, draw_glu

from benchmarks.hopper_compile import SHAPES
from jaxmodels.errors import UserError
from jaxmodels.kernels import grouped_matmul, grouped_outer
from jaxmodels.kernels.grouped_matmul import Implementation, api, hopper, register, tilemap

plgpu = pytest.importorskip("jax.experimental.pallas.mosaic_gpu")
CompilerParams = plgpu.CompilerParams
NEW = hasattr(plgpu, "InterpretGPUParams")
needs_new = pytest.mark.skipif(not NEW, reason="the GPU interpreter of this jax reads no transposed wgmma operands")
SMALL = hopper.Config(columns=64, stages=2, band=2, blocks=2)
# Alone, under 8, 8 and more, one half, a half and one row, a tile and one; empty in front, between and behind.
SIZES = np.array([0, 1, 7, 0, 9, 64, 65, 129, 0])


def numpy_products(x, w, dy, sizes):
    """y, dx, dw of y = grouped(x, w), in float64."""
    x, w, dy = (np.asarray(a, np.float64) for a in (x, w, dy))
    y, dx, dw = np.zeros((len(x), w.shape[2])), np.zeros_like(x), np.zeros_like(w)
    ends = np.cumsum(sizes)
    for e, (start, stop) in enumerate(zip(ends - sizes, ends, strict=True)):
        y[start:stop], dx[start:stop] = x[start:stop] @ w[e], dy[start:stop] @ w[e].T
        dw[e] = x[start:stop].T @ dy[start:stop]
    return y, dx, dw


def draw(rng, rows, k, n, groups, dtype=jnp.bfloat16):
    x, w = rng.normal(size=(rows, k)), rng.normal(size=(groups, k, n)) / np.sqrt(k)
    return [jnp.asarray(a, dtype) for a in (x, w, rng.normal(size=(rows, n)))]


def nan_tail(a, sizes):
    return jnp.where(jnp.arange(len(a))[:, None] < sizes.sum(), a, jnp.nan)


def close(value, expected, limit):
    value = np.asarray(value, np.float64)
    assert value.shape == expected.shape
    assert np.linalg.norm(value - expected) <= limit * np.linalg.norm(expected)


def same(value, expected):
    """But for a rounding here and there: the interpreter's products on a CPU are not the same to the bit in two calls
    (on an AMD EPYC 9005, 2 of 56,800 values in float16 were not). A GPU's are: test_on_the_gpu."""
    assert value.dtype == expected.dtype
    close(value, np.asarray(expected, np.float64), max(float(jnp.finfo(value.dtype).eps), 1e-6))


def int32(sizes):
    return jnp.asarray(sizes, jnp.int32)


def interpreter(**options):
    """What a bulk copy reads past an edge is zero, as on the GPU."""
    home = plgpu if NEW else pytest.importorskip("jax._src.pallas.mosaic_gpu.interpret.params")
    options = {"out_of_bounds_reads": "uninitialized", "uninitialized_memory": "zero"} | options
    return home.InterpretGPUParams(**options)


@pytest.fixture
def interpreted(monkeypatch):
    """Name of the kernels under the interpreter."""
    interpret = interpreter()
    matmul, outer = (functools.partial(fn, interpret=interpret) for fn in (hopper.matmul, hopper.outer))
    monkeypatch.setattr(api, "_IMPLEMENTATIONS", dict(api._IMPLEMENTATIONS))
    register("hopper_interpreted", Implementation(matmul, outer, takes_config=True))
    yield "hopper_interpreted"
    reset()


def reset():
    # After an exception the interpreter keeps its simulated memory; the next test would find it.
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

    gpu_callbacks.reset_gpu_interpret_mode_state()


@pytest.mark.parametrize("rows", [300, 280, 64])
def test_halves_cover_each_row_of_a_group_and_no_other(rows):
    rng = np.random.default_rng(0)
    even = np.ones(9) / 9
    cases = [SIZES, np.zeros(9, int), rows * np.eye(9, dtype=int)[4], np.r_[np.ones(8, int), 0]]
    cases += [rng.multinomial(rows - spare, even) for spare in (0, 0, 1, 20)]
    for sizes in (s for s in cases if s.sum() <= rows):
        count, table = (np.asarray(a) for a in hopper.halves(int32(sizes), rows))
        owner = np.r_[np.repeat(np.arange(9), sizes), np.full(rows - sizes.sum(), 9)]
        times = np.zeros(rows, int)
        blocks = tilemap.make_blocks(int32(np.r_[sizes, rows - sizes.sum()]), rows, 128)
        assert count[0] == blocks.count <= table.shape[1]
        assert np.array_equal(table[2, : count[0]] // 16, blocks.group[: count[0]])
        for *first, code in table[:, : count[0]].T:
            group, second, stored = code // 16, code // 8 % 2, 2 ** (code % 8)
            for start in first[: 1 + second]:
                assert start >= 0 and (owner[start : start + stored] == group).all()
                assert start + stored <= rows
                times[start : start + stored] += 1
        assert (times >= 1).all() and (times <= 2).all()


def test_leftovers_and_whole_blocks_are_each_row_once():
    rng = np.random.default_rng(0)
    rows = 600
    cases = [SIZES, rng.multinomial(rows, np.ones(9) / 9), rng.multinomial(rows - 9, np.ones(9) / 9)]
    for sizes in (*cases, np.array([5, 70, 71, 72, 73, 133, 134, 0, 8]), rows * np.eye(9, dtype=int)[2]):
        (aligned, whole, steps), row, exists = (np.asarray(a) for a in hopper.leftovers(int32(sizes), rows))
        owner = np.r_[np.repeat(np.arange(9), sizes), np.full(rows - sizes.sum(), 9)]
        assert (aligned % 8 == 0).all()
        for e in range(9):
            inside = np.arange(aligned[e], aligned[e] + 64 * whole[e])
            own = np.sort(np.r_[inside, row[e][exists[e]]])
            assert np.array_equal(own, np.flatnonzero(owner == e))
            others = exists[e].sum()
            assert exists[e][:others].all() and steps[e] == whole[e] + -(-others // 64)


def test_forward_under_the_interpreter(interpreted):
    rng = np.random.default_rng(1)
    x, w, _ = draw(rng, 284, 128, 64, len(SIZES))
    traces = []

    @jax.jit
    def run(x, w, sizes):
        traces.append(sizes)
        return grouped_matmul(x, w, sizes, implementation=interpreted, config=SMALL, out_dtype=jnp.float32)

    few = 5 * np.eye(9, dtype=int)
    for sizes in (SIZES, few[2], few[8]) if NEW else (SIZES,):
        y = run(nan_tail(x, sizes), w, int32(sizes))
        close(y, numpy_products(x, w, x[:, :64], sizes)[0], 2e-6)
        assert (np.asarray(y)[sizes.sum() :] == 0).all(), "rows past the last group are exactly zero"
    assert len(traces) <= 2, "group sizes are data"  # 2: jax 0.12 traces anew after the interpreter's first use


@needs_new
@pytest.mark.parametrize("dtype", [jnp.bfloat16, pytest.param(jnp.float16, marks=pytest.mark.long)])
def test_gradients_under_the_interpreter(interpreted, dtype):
    rng = np.random.default_rng(2)
    sizes = np.array([0, 3, 70, 0, 64])
    x, w, dy = draw(rng, 150, 72, 72, len(sizes), dtype)  # a second tile of 8 in each direction

    @jax.jit
    def run(x, w, dy, sizes):
        y, vjp = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes, implementation=interpreted, config=SMALL), x, w)
        return y, *vjp(dy)

    got = run(nan_tail(x, sizes), w, nan_tail(dy, sizes), int32(sizes))
    for value, expected, limit in zip(got, numpy_products(x, w, dy, sizes), (2.5e-3, 1e-2, 1e-2), strict=True):
        assert value.dtype == dtype
        close(value, expected, limit)
    y, dx, dw = (np.asarray(a) for a in got)
    assert (y[137:] == 0).all() and (dx[137:] == 0).all()
    assert (dw[sizes == 0] == 0).all(), "empty groups have an exactly zero gradient"


@needs_new
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_outer_in_float32_and_bad_rows_stay_in_their_group(interpreted):
    rng = np.random.default_rng(3)
    sizes = np.array([5, 66, 0, 30])
    x, w, dy = draw(rng, 110, 64, 64, len(sizes))
    run = jax.jit(functools.partial(grouped_outer, implementation=interpreted, config=SMALL))
    clean = np.asarray(run(x, dy, int32(sizes)))
    assert clean.dtype == np.float32
    close(clean, numpy_products(x, w, dy, sizes)[2], 2e-6)
    for bad in (np.nan, np.inf):
        # The first row of group 1 follows the last of group 0, the last of group 1 precedes the first of group 3.
        for a, b in ((x.at[5].set(bad).at[70].set(bad), dy), (x, dy.at[5].set(bad).at[70].set(bad))):
            spoiled = np.asarray(run(a, b, int32(sizes)))
            same(spoiled[[0, 2, 3]], clean[[0, 2, 3]])
            assert not np.isfinite(spoiled[1]).all()


@needs_new
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_forward_bad_rows_and_odd_sizes(interpreted):
    rng = np.random.default_rng(4)
    run = functools.partial(grouped_matmul, implementation=interpreted, config=SMALL)
    x, w, _ = draw(rng, 40, 13, 9, 3)  # narrower than a tile, strides no bulk copy takes
    sizes = np.array([8, 20, 5])
    clean = np.asarray(run(x, w, int32(sizes)))
    close(clean, numpy_products(x, w, clean, sizes)[0], 2.5e-3)
    spoiled = np.asarray(run(x.at[9].set(jnp.nan), w.at[2].set(jnp.inf), int32(sizes)))
    others = np.r_[0:9, 10:28, 33:40]
    same(spoiled[others], clean[others])
    assert np.isnan(spoiled[9]).all()
    for shape in ((0, 8, 8), (3, 8, 0), (3, 0, 8)):
        x, w, _ = draw(rng, *shape, 1)
        assert not np.asarray(run(x, w, int32([shape[0]]))).any()


@needs_new
@pytest.mark.long
def test_no_races_and_nothing_uninitialised():
    """Between loads, products and stores. In these groups no row is stored twice, which is a race to one value.

    Memory is NaN until written, also past the edges, which no result may touch here: all of the output is written.
    """
    sizes = np.array([64, 0, 1, 32])
    x, w, dy = draw(np.random.default_rng(9), 161, 64, 192, len(sizes))
    config = hopper.Config(columns=128, stages=2, band=2, blocks=1)
    interpret = interpreter(detect_races=True, on_race="raise", uninitialized_memory="nan")
    common = {"config": config, "interpret": interpret}
    try:
        y = hopper.matmul(x, w, int32(sizes), transpose_w=False, out_dtype=x.dtype, **common)
        dx = hopper.matmul(dy, w, int32(sizes), transpose_w=True, out_dtype=x.dtype, **common)
        dw = hopper.outer(x, dy, int32(sizes), out_dtype=jnp.float32, **common)
        h, g, u = hopper.glu(x, w, w, int32(sizes), activation="relu", keep=True, **common)
    finally:
        reset()
    for value, expected in zip((y, dx, dw), numpy_products(x, w, dy, sizes), strict=True):
        close(value, expected, 2.5e-3)
    assert not np.asarray(y)[97:].any() and not np.asarray(dw)[1].any()
    same(g, y)
    same(u, y)
    g = np.asarray(g, np.float64)
    close(h, np.maximum(g, 0) * g, 1e-2)


@needs_new
@pytest.mark.long
def test_wide_tiles_and_several_bands(interpreted):
    rng = np.random.default_rng(5)
    sizes = np.array([130, 1, 0, 200])
    x, w, dy = draw(rng, 340, 192, 320, len(sizes))
    config = hopper.Config(columns=192, stages=3, band=2, blocks=3)
    y, dx, dw = numpy_products(x, w, dy, sizes)
    common = {"implementation": interpreted, "config": config, "out_dtype": jnp.float32}
    close(grouped_matmul(x, w, int32(sizes), **common), y, 2e-6)
    close(grouped_matmul(dy, w, int32(sizes), transpose_w=True, **common), dx, 2e-6)
    close(grouped_outer(x, dy, int32(sizes), **common), dw, 2e-6)


@pytest.fixture
def glu_interpreted():
    """`hopper.glu` under the interpreter, compiled for one activation."""

    def compiled(activation, keep, config=SMALL):
        run = functools.partial(hopper.glu, activation=activation, keep=keep, config=config, interpret=interpreter())
        return jax.jit(run)

    yield compiled
    reset()


# A second half that slides back, rows past the last group; one group with all rows.
@pytest.mark.parametrize("activation, keep, sizes", [("gelu", True, [0, 3, 70, 0]), ("silu", False, [0, 0, 76, 0])])
def test_glu_under_the_interpreter(glu_interpreted, activation, keep, sizes):
    x, gate, up = draw_glu(np.random.default_rng(10), 76, 72, 40, 4, jnp.bfloat16)
    check_glu(glu_interpreted(activation, keep), x, gate, up, sizes, activation, 2.5e-3)


@pytest.mark.long
@pytest.mark.parametrize("activation, dtype, limit", [
    pytest.param("relu", jnp.bfloat16, 2.5e-3, marks=pytest.mark.soak), ("gelu", jnp.bfloat16, 2.5e-3),
    pytest.param("gelu_tanh", jnp.bfloat16, 2.5e-3, marks=pytest.mark.soak), ("silu", jnp.float16, 5e-4),
    pytest.param("silu", jnp.bfloat16, 2.5e-3, marks=pytest.mark.soak),
])  # fmt: skip
def test_glu_of_wide_tiles_and_many_groups(glu_interpreted, activation, dtype, limit):
    x, gate, up = draw_glu(np.random.default_rng(11), 284, 136, 200, len(SIZES), dtype)
    config = hopper.Config(columns=256, stages=3, band=2, blocks=3)  # the forward product's: half as wide for two
    kept, alone = (glu_interpreted(activation, keep, config) for keep in (True, False))
    for sizes in (284 * np.eye(9, dtype=int)[3], np.zeros(9, int), SIZES):
        h, g, u = check_glu(kept, x, gate, up, sizes, activation, limit)
        assert h.dtype == g.dtype == u.dtype == dtype
    same(h, check_glu(alone, x, gate, up, sizes, activation, limit)[0])


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_bad_values_of_a_glu_stay_in_their_group(glu_interpreted):
    x, gate, up = draw_glu(np.random.default_rng(12), 90, 64, 64, 4, jnp.bfloat16)
    sizes, others = int32([35, 4, 0, 40]), np.r_[0:35, 39:90]
    run = glu_interpreted("silu", True)
    clean = run(x, gate, up, sizes)
    spoiled = run(x.at[36].set(jnp.nan), gate.at[1, 3].set(jnp.nan), up.at[1, 5].set(jnp.inf), sizes)
    for before, after in zip(clean, spoiled, strict=True):
        same(before[others], after[others])
        assert not np.isfinite(np.asarray(after[36])).any()


FEW = ("DeepSeek-V3", "gpt-oss-20b")


@pytest.mark.parametrize("name", [n if n in FEW else pytest.param(n, marks=pytest.mark.long) for n in SHAPES])
def test_lowers_for_cuda(name):
    rows, k, n, groups = SHAPES[name]
    array = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)  # noqa: E731
    x, w, dy, sizes = array(rows, k), array(groups, k, n), array(rows, n), jax.ShapeDtypeStruct((groups,), jnp.int32)
    products = (
        (lambda x, w, sizes: hopper.matmul(x, w, sizes, transpose_w=False, out_dtype=x.dtype), x, w),
        (lambda dy, w, sizes: hopper.matmul(dy, w, sizes, transpose_w=True, out_dtype=dy.dtype), dy, w),
        (lambda x, dy, sizes: hopper.outer(x, dy, sizes, out_dtype=jnp.float32), x, dy),
        (lambda x, w, sizes: hopper.glu(x, w, w, sizes, activation="gelu", keep=True), x, w),
    )
    for product, left, right in products:
        text = jax.jit(product).trace(left, right, sizes).lower(lowering_platforms=("cuda",)).as_text()
        assert "mosaic_gpu" in text
        # No operand is transposed or copied whole on its way to the kernel; fewer rows than 64 are padded.
        assert "stablehlo.transpose" not in text and ("stablehlo.pad" not in text or rows < 64)


@needs_new
def test_copies_begin_where_tiles_do(monkeypatch):
    """A copy into tiles of eight rows that begins between them copies other bytes, and only a GPU would show it. jax
    0.12's other lowering asks for a proof that it does not; the kernels pass, and fail without the view for any row."""
    monkeypatch.setattr(plgpu, "CompilerParams", lambda **_: CompilerParams())
    kernel = importlib.import_module("jaxmodels.kernels.grouped_matmul._hopper_kernel")
    array = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)  # noqa: E731
    x, w, dy, sizes = array(304, 128), array(3, 128, 256), array(304, 256), jax.ShapeDtypeStruct((3,), jnp.int32)
    products = (
        (lambda x, w, sizes: hopper.matmul(x, w, sizes, transpose_w=False, out_dtype=x.dtype), x, w),
        (lambda dy, w, sizes: hopper.matmul(dy, w, sizes, transpose_w=True, out_dtype=dy.dtype), dy, w),
        (lambda x, dy, sizes: hopper.outer(x, dy, sizes, out_dtype=jnp.float32), x, dy),
        (lambda x, w, sizes: hopper.glu(x, w, w, sizes, activation="silu", keep=True), x, w),
    )
    for product, left, right in products:
        jax.jit(product).trace(left, right, sizes).lower(lowering_platforms=("cuda",))
    build = kernel.build
    monkeypatch.setattr(kernel, "build", lambda **options: build(**options | {"rows_anywhere": False}))
    with pytest.raises(ValueError, match="divisibility|multiple of its tiling"):
        untraced = functools.partial(products[0][0])
        jax.jit(untraced).trace(x, w, sizes).lower(lowering_platforms=("cuda",))


def test_lowers_inside_shard_map_and_vmap():
    mesh = jax.make_mesh((4,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])
    cut, whole = jax.sharding.PartitionSpec("rows"), jax.sharding.PartitionSpec()
    x, w, dy = draw(np.random.default_rng(6), 512, 64, 64, 2)
    sizes = int32([[60, 60]] * 4)

    def loss(x, w, dy, sizes):
        w = jax.lax.pcast(w, ("rows",), to="varying")
        y = hopper.matmul(x, w, sizes.reshape(-1), transpose_w=False, out_dtype=x.dtype)
        dw = hopper.outer(x, dy, sizes.reshape(-1), out_dtype=jnp.float32)
        h = hopper.glu(x, w, w, sizes.reshape(-1), activation="gelu_tanh", keep=False)
        return jax.lax.psum(y.astype(jnp.float32).sum() + dw.sum() + h.astype(jnp.float32).sum(), "rows")

    mapped = jax.shard_map(loss, mesh=mesh, in_specs=(cut, whole, cut, cut), out_specs=whole)
    assert "mosaic_gpu" in jax.jit(mapped).trace(x, w, dy, sizes).lower(lowering_platforms=("cuda",)).as_text()
    batched = jax.vmap(lambda s: hopper.matmul(x, w, s, transpose_w=False, out_dtype=x.dtype))
    assert "mosaic_gpu" in jax.jit(batched).trace(sizes).lower(lowering_platforms=("cuda",)).as_text()


def test_config_and_defaults():
    assert hopper.Config().shared_bytes() <= hopper.SHARED_BYTES
    for n, columns in ((2880, 192), (2048, 256), (7168, 256), (1536, 256), (768, 256), (128, 128), (8, 64)):
        config = hopper.default_config(n)
        assert config.columns == columns and config.shared_bytes() <= hopper.SHARED_BYTES and config.stages >= 4
    # Two weights: two accumulators of 128 columns are the registers of one of 256, and their stages its shared memory.
    for n, columns in ((2880, 128), (2048, 128), (768, 128), (192, 64), (128, 128), (8, 64)):
        config = hopper.glu_config(n)
        assert config.columns == columns and config.shared_bytes(2) <= hopper.SHARED_BYTES and config.stages >= 4
    assert hopper.glu_config(2048, hopper.Config(192, 4, band=4, blocks=99)) == hopper.Config(128, 4, 4, 99)
    assert hopper.glu_config(2048, SMALL) == SMALL
    with pytest.raises(UserError, match="columns=96; a wgmma takes"):
        hopper.Config(columns=96)
    with pytest.raises(UserError, match="bytes of shared memory, 232448 are there; choose fewer stages"):
        hopper.Config(stages=6)
    with pytest.raises(UserError, match="at least 2 stages"):
        hopper.Config(stages=1)


def test_says_what_it_cannot_do(monkeypatch):
    x, w, _ = draw(np.random.default_rng(7), 8, 8, 8, 2)
    sizes = int32([4, 4])
    monkeypatch.setattr(api, "_IMPLEMENTATIONS", dict(api._IMPLEMENTATIONS))
    register("hopper_here", Implementation(hopper.matmul, hopper.outer, hopper.unfit, takes_config=True))
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    with pytest.raises(UserError, match="compute capability 9.x, this is tpu"):
        grouped_matmul(x, w, sizes, implementation="hopper_here")
    with pytest.raises(UserError, match="takes bfloat16 and float16, not float32"):
        grouped_matmul(x.astype(jnp.float32), w, sizes, implementation="hopper_here")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    fake = type("Device", (), {"device_kind": "A100", "compute_capability": "8.0"})
    monkeypatch.setattr(jax, "devices", lambda: [fake()])
    assert hopper.unfit((8, 8), 2, jnp.bfloat16) == "only on compute capability 9.x, A100 has 8.0"
    fake.compute_capability = "9.0"
    assert hopper.unfit((8, 8), 2, jnp.float16) is None
    monkeypatch.setitem(sys.modules, "jax.experimental.pallas.mosaic_gpu", None)
    assert "does not import" in hopper.unfit((8, 8), 2, jnp.float16)
    with pytest.raises(UserError, match="for both, not bfloat16 and float32"):
        hopper.matmul(x, w.astype(jnp.float32), sizes, transpose_w=False, out_dtype=x.dtype)
    with pytest.raises(UserError, match="for both, not bfloat16 and float32"):
        hopper.glu(x, w, w.astype(jnp.float32), sizes, activation="silu", keep=False)
    with pytest.raises(UserError, match="the kernels compute silu, relu, gelu, gelu_tanh, not 'tanh'"):
        hopper.glu(x, w, w, sizes, activation="tanh", keep=False)
    assert all(hopper.glu_unsupported(activation) is None for activation in ACTS)
    for h in (*hopper.glu(x[:0], w, w, sizes, activation="silu", keep=True),
              hopper.glu(x[:, :0], w[:, :0], w[:, :0], sizes, activation="silu", keep=False)):  # fmt: skip
        assert h.shape[1] == 8 and not np.asarray(h).any()
    with pytest.raises(UserError, match="writes bfloat16, float16 and float32, not int8"):
        hopper.outer(x, x, sizes, out_dtype=jnp.int8)


@pytest.mark.long
def test_compiles_for_sm_90a():
    if not any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)):
        pytest.skip('the CUDA plug-in is not installed (pip install "jax[cuda13]", 4.6 GB)')
    root = Path(__file__).resolve().parents[1]
    environment = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    command = [sys.executable, "-m", "benchmarks.hopper_compile", "--shapes", "DeepSeek-V3,Qwen3-235B-A22B T=16"]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("  compiled  230400 ") == 10 and "failed" not in done.stdout, done.stdout


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU of compute capability 9.x")
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("shape", [(1000, 512, 640, 9), (3000, 2880, 200, 16), (64, 256, 256, 4), (5, 64, 96, 3)])
def test_on_the_gpu(shape, dtype):
    if reason := hopper.unfit(shape[:2], shape[3], dtype):
        pytest.skip(reason)
    rng = np.random.default_rng(8)
    rows, k, n, groups = shape
    x, w, dy = draw(rng, rows, k, n, groups, dtype)
    matmul = lambda x, w, s, t: hopper.matmul(x, w, s, transpose_w=t, out_dtype=dtype)  # noqa: E731
    run = jax.jit(lambda x, w, dy, s: (matmul(x, w, s, False), matmul(dy, w, s, True),
                                       hopper.outer(x, dy, s, out_dtype=jnp.float32)))  # fmt: skip
    _, gate, up = draw_glu(rng, rows, k, n, groups, dtype)
    glus = {(activation, keep): jax.jit(functools.partial(hopper.glu, activation=activation, keep=keep))
            for activation in ACTS for keep in (True, False)}  # fmt: skip
    for sizes in (rng.multinomial(rows, np.ones(groups) / groups), rng.multinomial(rows // 2, np.ones(groups) / groups),
                  rows * np.eye(groups, dtype=int)[1], np.zeros(groups, int), np.ones(groups, int)):  # fmt: skip
        for (activation, _), glu in glus.items():
            check_glu(glu, x, gate, up, sizes, activation, 2.5e-3)
        got = run(nan_tail(x, sizes), w, nan_tail(dy, sizes), int32(sizes))
        again = run(nan_tail(x, sizes), w, nan_tail(dy, sizes), int32(sizes))
        for value, other, expected in zip(got, again, numpy_products(x, w, dy, sizes), strict=True):
            close(value, expected, 2.5e-3)
            assert np.array_equal(value, other), "two runs agree to the bit"
        assert not np.asarray(got[0])[sizes.sum() :].any() and not np.asarray(got[2])[sizes == 0].any()

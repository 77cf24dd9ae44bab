"""The grouped products against a float64 NumPy loop: forward, both gradients, empty groups, tails, NaN."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify
from jax.sharding import PartitionSpec
from jax.test_util import check_grads

from jaxmodels.errors import UserError
from jaxmodels.kernels import grouped_glu, grouped_matmul, grouped_outer
from jaxmodels.kernels.grouped_matmul import (
    Implementation,
    api,
    cpu,
    lowering_for,
    native,
    proof,
    register,
    tilemap,
)

needs_compiler = pytest.mark.skipif(native.unavailable() is not None, reason=f"native: {native.unavailable()}")
# cpu.py with few places and small blocks, so that small cases meet its batched product and its loop.
register("cpu-places", Implementation(functools.partial(cpu.matmul, config=cpu.Config(2, 3)),
                                      functools.partial(cpu.outer, config=cpu.Config(2, 3))))
CHOICES = ["cpu-places", "reference", "xla", "cpu", pytest.param("native", marks=needs_compiler), "loop", None]


def numpy_products(x, w, dy, sizes):
    """y, dx, dw of y = grouped(x, w), in float64."""
    x, w, dy = (np.asarray(a, np.float64) for a in (x, w, dy))
    y, dx, dw = np.zeros((len(x), w.shape[2])), np.zeros_like(x), np.zeros_like(w)
    ends = np.cumsum(sizes)
    for e, (start, stop) in enumerate(zip(ends - sizes, ends, strict=True)):
        y[start:stop], dx[start:stop] = x[start:stop] @ w[e], dy[start:stop] @ w[e].T
        dw[e] = x[start:stop].T @ dy[start:stop]
    return y, dx, dw


def draw(rng, rows, k, n, groups):
    x, w = rng.normal(size=(rows, k)), rng.normal(size=(groups, k, n)) / np.sqrt(k)
    return (jnp.asarray(a, jnp.float32) for a in (x, w, rng.normal(size=(rows, n))))


def close(value, expected, limit=2e-6):
    value, expected = np.asarray(value, np.float64), np.asarray(expected)
    assert value.shape == expected.shape
    assert np.linalg.norm(value - expected) <= limit * np.linalg.norm(expected)


def products(implementation, transpose_w=False):
    """One compiled function for y, dx and dw."""

    def run(x, w, dy, sizes):
        fn = lambda x, w: grouped_matmul(x, w, sizes, transpose_w=transpose_w, implementation=implementation)  # noqa: E731
        y, vjp = jax.vjp(fn, x, jnp.swapaxes(w, 1, 2) if transpose_w else w)
        dx, dw = vjp(dy)
        return y, dx, jnp.swapaxes(dw, 1, 2) if transpose_w else dw

    return jax.jit(run)


@pytest.mark.parametrize("implementation", CHOICES)
@pytest.mark.parametrize("transpose_w", [False, True])
def test_every_pattern_of_empty_groups_in_one_compilation(implementation, transpose_w):
    rng = np.random.default_rng(0)
    rows = 24
    x, w, dy = draw(rng, rows, 5, 7, 8)
    run = products(implementation, transpose_w)
    patterns = [np.array(p) * 3 for p in itertools.product([0, 1], repeat=8)]  # the rest of the 24 rows is tail
    patterns += list(24 * np.eye(8, dtype=int)) + [np.ones(8, int), np.array([7, 0, 2, 3, 0, 5, 1, 6])]
    for sizes in patterns:
        used = sizes.sum()
        nan_tail = jnp.where(jnp.arange(rows)[:, None] < used, x, jnp.nan)
        got = run(nan_tail, w, jnp.where(jnp.arange(rows)[:, None] < used, dy, jnp.nan), jnp.asarray(sizes, jnp.int32))
        for value, expected in zip(got, numpy_products(x, w, dy, sizes), strict=True):
            if value.ndim == 2:
                assert (np.asarray(value[used:]) == 0).all(), "tail rows are exactly zero"
            else:
                assert (np.asarray(value)[sizes == 0] == 0).all(), "empty groups have an exactly zero gradient"
            close(value, expected)
    assert run._cache_size() == 1


@pytest.mark.parametrize("implementation", CHOICES)
@pytest.mark.parametrize("shape", [(1, 3, 2, 4), (0, 3, 2, 4), (13, 200, 8, 3), (13, 8, 200, 1)])
def test_odd_shapes(implementation, shape):
    rng = np.random.default_rng(1)
    rows, k, n, groups = shape
    x, w, dy = draw(rng, *shape)
    sizes = np.bincount(rng.integers(groups, size=rows), minlength=groups)
    got = products(implementation)(x, w, dy, jnp.asarray(sizes, jnp.int32))
    for value, expected in zip(got, numpy_products(x, w, dy, sizes), strict=True):
        close(value, expected)


ACTIVATED = {
    "silu": lambda z: z / (1 + np.exp(-z)), "relu": lambda z: np.maximum(z, 0),
    "gelu": lambda z: z * (1 + np.vectorize(math.erf)(z / 2**0.5)) / 2,
    "gelu_tanh": lambda z: z * (1 + np.tanh((2 / np.pi) ** 0.5 * (z + 0.044715 * z**3))) / 2,
}


@pytest.mark.parametrize("implementation", ["xla", "cpu", pytest.param("native", marks=needs_compiler), None])
@pytest.mark.parametrize("activation", ACTIVATED)
@pytest.mark.parametrize("shape", [(24, 5, 7, 8), (420, 400, 70, 3)])
def test_gate_and_up_in_one_product(implementation, activation, shape):
    rng = np.random.default_rng(0)
    rows, _, _, groups = shape
    x, gate, dh = draw(rng, *shape)
    up = jnp.flip(gate, 0) * 3
    users = {"xla_backend_optimization_level": 3}  # the suite's own compilation rounds erf otherwise in each program
    run = jax.jit(lambda x, gate, up, dh, sizes: (lambda h, vjp: (h, *vjp(dh)))(
        *jax.vjp(lambda *a: grouped_glu(*a, sizes, activation=activation, implementation=implementation), x, gate, up)),
        compiler_options=users)
    alone = jax.jit(lambda *a: grouped_glu(*a, activation=activation, implementation=implementation),
                    compiler_options=users)
    for pattern in ([1] * groups, [0] * (groups - 1) + [groups], [2, 0] + [1] * (groups - 2)):
        sizes = np.array(pattern) * (rows // groups - 1)  # the rest is tail
        ends, tail = np.cumsum(sizes), np.arange(rows)[:, None] >= sizes.sum()
        spoiled = jnp.where(tail, jnp.nan, x), gate, up, jnp.where(tail, jnp.nan, dh), jnp.asarray(sizes, jnp.int32)
        h, dx, dgate, dup = run(*spoiled)
        g, u = (numpy_products(x, w, dh, sizes)[0] for w in (gate, up))
        close(h, ACTIVATED[activation](g) * u)
        assert np.array_equal(alone(*spoiled[:3], spoiled[4]), h) and not np.asarray(h)[ends[-1]:].any()
        slope = (ACTIVATED[activation](g + 1e-7) - ACTIVATED[activation](g - 1e-7)) / 2e-7
        dg, du = np.asarray(dh) * u * slope, np.asarray(dh) * ACTIVATED[activation](g)
        (_, dx1, dw1), (_, dx2, dw2) = (numpy_products(x, w, d, sizes) for w, d in ((gate, dg), (up, du)))
        for value, truth in ((dx, dx1 + dx2), (dgate, dw1), (dup, dw2)):
            close(value, truth, 1e-5)
        assert not np.asarray(dgate)[sizes == 0].any() and not np.asarray(dup)[sizes == 0].any()


@needs_compiler
def test_exponentials_of_the_compiled_activations_over_their_whole_range():
    z = np.concatenate([np.linspace(-120, 120, 30_001), [np.nan, np.inf]]).astype(np.float32)
    x, one, sizes = jnp.asarray(z[:, None]), jnp.ones((1, 1, 1)), jnp.array([len(z)], jnp.int32)
    square = grouped_glu(x, one, one, sizes, activation="silu", implementation="native")[:, 0]  # silu(z) z
    truth = z[:-2].astype(np.float64) ** 2 / (1 + np.exp(-z[:-2].astype(np.float64)))
    inner = np.abs(z[:-2]) < 80  # beyond, float32 ends
    np.testing.assert_allclose(square[:-2][inner], truth[inner], rtol=1e-6)
    np.testing.assert_allclose(square[:-2], truth, rtol=1e-6, atol=1e-30)
    assert np.isnan(square[-2]) and square[-1] == np.inf


@pytest.mark.long
@pytest.mark.parametrize("implementation", CHOICES[:-2])
def test_gradients_of_all_orders(implementation):
    x, w, dy = draw(np.random.default_rng(2), 7, 3, 4, 3)
    sizes = jnp.array([2, 0, 4], jnp.int32)
    # Tangents come from transposing twice; forward mode is not defined for custom_vjp.
    for product, operands in ((grouped_matmul, (x, w)), (grouped_outer, (x, dy))):
        fn = lambda a, b: product(jnp.asarray(a), jnp.asarray(b), sizes, implementation=implementation)  # noqa: B023, E731
        check_grads(jax.jit(fn), operands, 2, ["rev"], rtol=2e-2)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("implementation", CHOICES)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_bad_rows_stay_in_their_group(implementation, bad):
    rng = np.random.default_rng(3)
    x, w, dy = draw(rng, 20, 6, 5, 4)
    sizes = jnp.array([5, 4, 0, 9], jnp.int32)
    run = products(implementation)
    clean = run(x, w, dy, sizes)
    spoiled = run(x.at[6].set(bad), w, dy.at[7].set(bad), sizes)
    for before, after in zip(clean[:2], spoiled[:2], strict=True):
        others = np.r_[0:5, 9:20]
        assert np.array_equal(before[others], after[others])
    assert np.array_equal(clean[2][jnp.array([0, 2, 3])], spoiled[2][jnp.array([0, 2, 3])])
    assert not np.isfinite(spoiled[0][6]).any() and not np.isfinite(spoiled[2][1]).all()


@pytest.mark.parametrize("implementation", [choice for choice in CHOICES if choice != "xla"])
def test_bad_weights_stay_in_their_group(implementation):
    # ragged_dot on CPU does not promise this: it multiplies other groups' rows by zero.
    x, w, dy = draw(np.random.default_rng(4), 9, 6, 5, 3)
    sizes = jnp.array([3, 4, 2], jnp.int32)
    y = grouped_matmul(x, w.at[1].set(jnp.nan), sizes, implementation=implementation)
    assert np.isnan(y[3:7]).all() and np.isfinite(y[:3]).all() and np.isfinite(y[7:]).all()


@pytest.mark.parametrize("implementation", [*CHOICES[:-2], None])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_accumulates_in_float32(implementation, dtype):
    rng = np.random.default_rng(5)
    x, w, dy = (a.astype(dtype) for a in draw(rng, 30, 64, 16, 3))
    sizes = np.array([10, 0, 20])
    y, dx, dw = products(implementation)(x, w, dy, jnp.asarray(sizes, jnp.int32))
    assert (y.dtype, dx.dtype, dw.dtype) == (dtype, dtype, dtype)
    expected = numpy_products(x, w, dy, sizes)
    close(y, expected[0], 2.5e-3)
    close(dx, expected[1], 1e-2)
    close(dw, expected[2], 1e-2)
    wide = grouped_matmul(x, w, jnp.asarray(sizes), out_dtype=jnp.float32, implementation=implementation)
    close(wide, expected[0])
    assert grouped_outer(x, dy, jnp.asarray(sizes), implementation=implementation).dtype == jnp.float32


@pytest.mark.parametrize("implementation", CHOICES)
def test_vmap_scan_and_remat(implementation):
    x, w, dy = draw(np.random.default_rng(6), 8, 4, 4, 2)
    sizes = jnp.array([[3, 5], [8, 0], [1, 2]], jnp.int32)
    fn = lambda s: grouped_matmul(x, w, s, implementation=implementation)  # noqa: E731
    single = jnp.stack([jax.jit(fn)(s) for s in sizes])
    assert np.allclose(jax.jit(jax.vmap(fn))(sizes), single, atol=1e-6)
    assert np.allclose(jax.lax.scan(lambda c, s: (c, fn(s)), 0, sizes)[1], single, atol=1e-6)
    if implementation != "loop":  # a host callback cannot be rematerialised
        loss = lambda w: (grouped_matmul(x, w, sizes[0], implementation=implementation) ** 2).sum()  # noqa: E731
        assert np.allclose(jax.jit(jax.grad(jax.checkpoint(loss)))(w), jax.jit(jax.grad(loss))(w), atol=1e-5)


def test_permuting_groups_permutes_the_gradient():
    x, w, dy = draw(np.random.default_rng(7), 12, 4, 5, 3)
    sizes, order = np.array([2, 6, 4]), np.array([2, 0, 1])
    rows = np.concatenate([np.arange(12)[(np.cumsum(sizes) - sizes)[e] : np.cumsum(sizes)[e]] for e in order])
    y, dx, dw = products(None)(x, w, dy, jnp.asarray(sizes, jnp.int32))
    y2, dx2, dw2 = products(None)(x[rows], w[order], dy[rows], jnp.asarray(sizes[order], jnp.int32))
    close(y2, y[rows])
    close(dx2, dx[rows])
    close(dw2, dw[order])


def test_named_implementations_run_or_say_why(monkeypatch):
    x, w, _ = draw(np.random.default_rng(8), 6, 4, 5, 2)
    sizes = jnp.array([2, 4], jnp.int32)
    with pytest.raises(UserError, match="'cuda' is unknown; choose from .*reference"):
        grouped_matmul(x, w, sizes, implementation="cuda")
    monkeypatch.setattr(api, "_IMPLEMENTATIONS", dict(api._IMPLEMENTATIONS))
    base = api._IMPLEMENTATIONS["reference"]
    register("picky", Implementation(base.matmul, base.outer, unfit=lambda shape, groups, dtype: "needs 7 rows"))
    with pytest.raises(UserError, match="picky: needs 7 rows"):
        grouped_matmul(x, w, sizes, implementation="picky")
    y = grouped_matmul(x, w, sizes, implementation=("picky", "xla"))
    assert np.allclose(y, grouped_matmul(x, w, sizes), atol=1e-6)
    with pytest.raises(UserError, match="takes no config"):
        grouped_matmul(x, w, sizes, implementation="xla", config={"tile": 8})


def test_shape_errors():
    x, w, _ = draw(np.random.default_rng(9), 6, 4, 5, 2)
    with pytest.raises(UserError, match="should be equal"):
        grouped_matmul(x, w, jnp.array([2, 4]), transpose_w=True)
    with pytest.raises(UserError, match="3 group sizes for 2 matrices"):
        grouped_matmul(x, w, jnp.array([2, 2, 2]))
    with jax.enable_checks(True), pytest.raises(UserError, match="add up to 9 rows where x has 6"):
        grouped_matmul(x, w, jnp.array([5, 4]))


def test_cpu_blocks_cover_every_row_once():
    rng = np.random.default_rng(10)
    for rows, size in ((40, 16), (16, 16), (33, 7)):
        even = np.ones(5) / 5
        for sizes in (rng.multinomial(rows, even), rng.multinomial(rows // 2, even), np.zeros(5, int),
                      rows * np.eye(5, dtype=int)[2]):  # fmt: skip
            blocks = tilemap.make_blocks(jnp.asarray(sizes, jnp.int32), rows, size)
            group, start, stop = (np.asarray(a)[: blocks.count] for a in blocks[1:])
            owner = np.repeat(np.arange(5), sizes)
            covered = [r for a, b in zip(start, stop, strict=True) for r in range(a, b)]
            assert covered == list(range(sizes.sum())) and (stop - start <= size).all()
            assert all((owner[a:b] == e).all() for e, a, b in zip(group, start, stop, strict=True))
            assert blocks.count <= len(blocks.group)
    assert [cpu.block_rows(*shape) for shape in ((4096, 8), (2048, 48), (64, 8))] == [128, 32, 16]


@pytest.mark.parametrize("implementation", [*CHOICES[:-2], None])
def test_inside_shard_map(implementation):
    """Every device its own rows and sizes; the weights' gradient is summed over devices once."""
    rng = np.random.default_rng(11)
    parts = 4
    x, w, dy = draw(rng, 8 * parts, 3, 4, 3)
    sizes = jnp.asarray(rng.multinomial(7, np.ones(3) / 3, parts), jnp.int32)

    def loss(x, w, dy, sizes):
        w = jax.lax.pcast(w, ("rows",), to="varying")
        y = grouped_matmul(x, w, sizes.reshape(-1), implementation=implementation)
        return jax.lax.psum((y * dy).sum(), "rows")

    mesh = jax.make_mesh((parts,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:parts])
    cut = PartitionSpec("rows")
    mapped = jax.shard_map(loss, mesh=mesh, in_specs=(cut, PartitionSpec(), cut, cut), out_specs=PartitionSpec())
    dx, dw = jax.jit(jax.grad(mapped, (0, 1)))(x, w, dy, sizes)
    each = [numpy_products(*(np.asarray(a)[8 * i : 8 * i + 8] if a is not w else w for a in (x, w, dy)), sizes[i])
            for i in range(parts)]  # fmt: skip
    close(dx, np.concatenate([one[1] for one in each]))
    close(dw, sum(one[2] for one in each))


def test_bad_sizes_under_checkify():
    x, w, _ = draw(np.random.default_rng(9), 6, 4, 5, 2)
    product = functools.partial(grouped_matmul, implementation="cpu")  # `native` looks by itself, always
    checked = jax.jit(checkify.checkify(product, errors=checkify.user_checks))
    assert checked(x, w, jnp.array([2, 4]))[0].get() is None
    assert "a group size is negative: [-1  3]" in checked(x, w, jnp.array([-1, 3]))[0].get()
    assert "add up to more than the 6 rows of x" in checked(x, w, jnp.array([5, 4]))[0].get()


def test_naming_another_implementation_compiles_nothing(monkeypatch):
    def compiles():
        raise AssertionError("native was asked for")

    monkeypatch.setattr(native, "unavailable", compiles)
    x, w, _ = draw(np.random.default_rng(9), 6, 4, 5, 2)
    y = jax.grad(lambda w: grouped_matmul(x, w, jnp.array([2, 4]), implementation="cpu").sum())(w)
    assert y.shape == w.shape
    with pytest.raises(AssertionError, match="native was asked for"):
        grouped_matmul(x, w, jnp.array([2, 4]))


@needs_compiler
def test_native_refuses_sizes_that_would_leave_the_array():
    x, w, _ = draw(np.random.default_rng(9), 6, 4, 5, 2)
    for sizes, told in (([5, 4], "ends at row 9, x has 6"), ([-1, 3], "of -1 rows")):
        # Which of the two jax raises depends on whether the call waits for its result.
        with pytest.raises((ValueError, jax.errors.JaxRuntimeError), match=told):
            grouped_matmul(x, w, jnp.array(sizes, jnp.int32), implementation="native").block_until_ready()


def test_bad_dtypes_and_ranks():
    x, w, dy = draw(np.random.default_rng(9), 6, 4, 5, 2)
    sizes = jnp.array([2, 4], jnp.int32)
    for arguments, told in (((x.astype(jnp.int8), w, sizes), "x has dtype int8"), ((x, w[0], sizes), "w has shape"),
                            ((x, w, sizes.astype(jnp.float32)), "group_sizes has dtype float32"),
                            ((x, w, sizes[None]), "group_sizes has shape"), ((x[0], w, sizes), "x has shape")):
        with pytest.raises(UserError, match=told):
            grouped_matmul.__wrapped__(*arguments) if hasattr(grouped_matmul, "__wrapped__") else \
                grouped_matmul(*arguments)


def test_without_a_compiler_it_says_so(monkeypatch, tmp_path):
    monkeypatch.setenv("JAXMODELS_CACHE", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    native.unavailable.cache_clear()
    try:
        assert "no C++ compiler" in native.unavailable()
        x, w, _ = draw(np.random.default_rng(9), 6, 4, 5, 2)
        sizes = jnp.array([2, 4], jnp.int32)
        assert np.allclose(grouped_matmul(x, w, sizes), grouped_matmul(x, w, sizes, implementation="reference"))
        with pytest.raises(UserError, match="native: no C\\+\\+ compiler"):
            grouped_matmul(x, w, sizes, implementation="native")
    finally:
        native.unavailable.cache_clear()


@pytest.mark.parametrize("implementation", CHOICES)
def test_two_runs_are_equal_bit_for_bit(implementation):
    rng = np.random.default_rng(15)
    x, w, dy = draw(rng, 300, 70, 40, 6)
    sizes = jnp.asarray(rng.multinomial(290, np.ones(6) / 6), jnp.int32)
    run = products(implementation)
    for one, two in zip(run(x, w, dy, sizes), run(x, w, dy, sizes), strict=True):
        assert np.array_equal(one, two)


def test_default_by_size_and_platform(monkeypatch):
    monkeypatch.setattr(native, "unavailable", lambda: "not here")
    choice = lambda m, k, n, g, outer=False: api._on_cpu(jnp.zeros((m, k)), n, g, outer=outer)  # noqa: E731
    assert choice(4096, 256, 384, 8) == choice(2048, 576, 32, 48) == choice(4096, 256, 384, 8, True) == "cpu"
    assert choice(8, 64, 128, 8) == "xla" and choice(8, 128, 64, 8) == "reference"
    assert choice(8, 576, 32, 48) == "cpu" and choice(8, 576, 32, 48, True) == "xla"
    # A program lowered on this CPU for a TPU holds the TPU's product and no loop over blocks.
    x, w, _ = draw(np.random.default_rng(12), 256, 64, 32, 4)
    sizes = jnp.array([100, 0, 56, 90], jnp.int32)
    with lowering_for("tpu"):
        traced = jax.jit(lambda *a: grouped_matmul(*a)).trace(x, w, sizes)
    here, there = traced.lower().as_text(), traced.lower(lowering_platforms=("tpu",)).as_text()
    assert "stablehlo.while" in here and "ragged_dot" not in here and "tpu_custom_call" not in here
    assert "tpu_custom_call" in there and "dynamic_update_slice" not in there  # the loop over blocks writes by those


def test_cpu_implementation_says_where_it_runs(monkeypatch):
    x, w, _ = draw(np.random.default_rng(13), 6, 4, 5, 2)
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    with pytest.raises(UserError, match="cpu: only on the CPU backend, this is tpu"):
        grouped_matmul(x, w, jnp.array([2, 4], jnp.int32), implementation="cpu")


def test_cpu_in_float64():
    with jax.enable_x64(True):
        rng = np.random.default_rng(14)
        x, w, dy = (jnp.asarray(rng.normal(size=shape)) for shape in ((40, 6), (3, 6, 5), (40, 5)))
        sizes = np.array([20, 0, 18])
        got = products("cpu")(x, w, dy, jnp.asarray(sizes))
        for value, expected in zip(got, numpy_products(x, w, dy, sizes), strict=True):
            assert value.dtype == jnp.float64
            close(value, expected, 1e-14)


def test_a_kernel_proves_itself_before_it_is_the_default(monkeypatch):
    """What is off, wrong only in its tail, or does not run is told and replaced; what is right is kept."""
    good = api._IMPLEMENTATIONS["reference"]
    assert proof.wrong(good.matmul, good.outer, jnp.float32) is None

    def off(*operands, **keywords):
        return good.matmul(*operands, **keywords) * 1.1

    def dirty(x, w, sizes, **keywords):
        return good.matmul(x, w, sizes, **keywords).at[-1].set(1e-6)

    def broken(*operands, **keywords):
        raise RuntimeError("no such instruction")

    assert "forward is off by 1.0e-01" in proof.wrong(off, good.outer, jnp.float32)
    assert "forward is not zero where it should be" in proof.wrong(dirty, good.outer, jnp.float32)
    assert "dW is off" in proof.wrong(good.matmul, lambda *a, **k: 0 * good.outer(*a, **k), jnp.float32)
    monkeypatch.setattr(api, "_IMPLEMENTATIONS", dict(api._IMPLEMENTATIONS))
    register("tpu", Implementation(broken, good.outer))
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    for cached in (api._wrong, api._fall_back, api._tell):
        cached.cache_clear()
    try:
        x, w, _ = draw(np.random.default_rng(16), 8, 4, 5, 2)
        with pytest.warns(UserWarning, match="'tpu' cannot: RuntimeError: no such instruction"):
            y = jax.jit(lambda *a: grouped_matmul(*a))(x, w, jnp.array([3, 4], jnp.int32))  # while it is traced
        assert y.shape == (8, 5)
    finally:
        for cached in (api._wrong, api._fall_back, api._tell):
            cached.cache_clear()


@pytest.mark.parametrize("implementation", ["cpu", pytest.param("native", marks=needs_compiler)])
@pytest.mark.parametrize(("sizes", "k", "n"), [
    ((191, 192, 193, 0, 1), 385, 65),  # chunks of rows, a panel's depth and width, one more and one less
    ((5, 6, 7, 11, 13), 384, 64),
    ((37, 0, 41), 200, 200),
    ((4, 3), 8, 2880),
])
def test_at_the_edges_of_tiles(implementation, sizes, k, n):
    rng = np.random.default_rng(17)
    rows = sum(sizes) + 9
    x, w, dy = draw(rng, rows, k, n, len(sizes))
    got = products(implementation)(x.at[-9:].set(jnp.nan), w, dy.at[-9:].set(jnp.nan), jnp.asarray(sizes, jnp.int32))
    expected = numpy_products(x, w, dy, np.array(sizes))
    for value, wanted in zip(got, expected, strict=True):
        close(value, wanted)
    ends = np.cumsum(sizes)
    for e, (start, stop) in enumerate(zip(ends - sizes, ends, strict=True)):  # and no group hides behind the others
        for value, wanted in (*((got[i][start:stop], expected[i][start:stop]) for i in (0, 1)),
                              (got[2][e], expected[2][e])):
            close(value, wanted)

"""The TPU kernels under the interpreters (uninitialised memory NaN, races detected), against a float64 NumPy loop."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxmodels.errors import UserError
from jaxmodels.kernels import grouped_matmul, grouped_outer
from jaxmodels.kernels.grouped_matmul import Implementation, api, register, tpu

pltpu = pytest.importorskip("jax.experimental.pallas.tpu")
SMALL = tpu.Config(rows=32, inner=128, columns=128)
K, N = 200, 136  # two tiles each, the second partial


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Several pieces a tile, as at the real sizes."""
    monkeypatch.setattr(tpu, "_PIECE", 16)


@pytest.fixture(params=["plain", "races"])
def implementation(request, monkeypatch):
    """Registered for one test: the plain interpreter, and the one that simulates memory and finds races."""
    return registered(request.param, monkeypatch)


@pytest.fixture
def plain(monkeypatch):
    return registered("plain", monkeypatch)


def registered(kind, monkeypatch):
    interpret = kind == "plain" or pltpu.InterpretParams(uninitialized_memory="nan", detect_races=True)
    matmul, outer = (functools.partial(fn, interpret=interpret) for fn in (tpu.matmul, tpu.outer))
    monkeypatch.setattr(api, "_IMPLEMENTATIONS", dict(api._IMPLEMENTATIONS))
    register(f"tpu_{kind}", Implementation(matmul, outer, takes_config=True))
    return f"tpu_{kind}"


def assert_no_races(implementation):
    if implementation == "tpu_races":
        from jax._src.pallas.mosaic.interpret import interpret_pallas_call

        assert interpret_pallas_call.races is not None and not interpret_pallas_call.races.races_found


def numpy_products(x, w, dy, sizes):
    """y, dx, dw of y = grouped(x, w), in float64."""
    x, w, dy = (np.asarray(a, np.float64) for a in (x, w, dy))
    y, dx, dw = np.zeros((len(x), w.shape[2])), np.zeros_like(x), np.zeros_like(w)
    for e, (start, stop) in enumerate(bounds(sizes)):
        y[start:stop], dx[start:stop] = x[start:stop] @ w[e], dy[start:stop] @ w[e].T
        dw[e] = x[start:stop].T @ dy[start:stop]
    return y, dx, dw


def bounds(sizes):
    ends = np.cumsum(sizes)
    return list(zip((ends - sizes).tolist(), ends.tolist(), strict=True))


def draw(rng, rows, k, n, groups):
    x, w = rng.normal(size=(rows, k)), rng.normal(size=(groups, k, n)) / np.sqrt(k)
    return tuple(jnp.asarray(a, jnp.float32) for a in (x, w, rng.normal(size=(rows, n))))


def products(implementation, config=SMALL, transpose_w=False):
    """One compiled function for y, dx and dw."""

    def run(x, w, dy, sizes):
        fn = functools.partial(grouped_matmul, transpose_w=transpose_w, implementation=implementation, config=config)
        y, vjp = jax.vjp(lambda x, w: fn(x, w, sizes), x, jnp.swapaxes(w, 1, 2) if transpose_w else w)
        dx, dw = vjp(dy)
        return y, dx, jnp.swapaxes(dw, 1, 2) if transpose_w else dw

    return jax.jit(run)


def close(value, expected, limit):
    value, expected = np.asarray(value, np.float64), np.asarray(expected)
    assert value.shape == expected.shape
    assert np.linalg.norm(value - expected) <= limit * np.linalg.norm(expected)


def check(run, x, w, dy, sizes, limits=(2e-6, 2e-6, 2e-6)):
    """Against NumPy, overall and in each group; NaN in the tail rows of both inputs; exact zeros where promised."""
    used = sizes.sum()
    tail = jnp.arange(len(x))[:, None] >= used
    x_nan, dy_nan = (jnp.where(tail, jnp.nan, a).astype(a.dtype) for a in (x, dy))
    got = run(x_nan, w, dy_nan, jnp.asarray(sizes, jnp.int32))
    expected = numpy_products(x, w, dy, sizes)
    for value, true, limit in zip(got, expected, limits, strict=True):
        close(value, true, limit)
        for e, (start, stop) in enumerate(bounds(sizes)):
            close(*((value[e], true[e]) if value.ndim == 3 else (value[start:stop], true[start:stop])), limit)
    assert (np.asarray(got[0][used:]) == 0).all() and (np.asarray(got[1][used:]) == 0).all(), "tail rows are zero"
    assert (np.asarray(got[2])[sizes == 0] == 0).all(), "empty groups have a zero gradient"
    return got


def patterns_of(rows):
    """Group sizes for eight groups: one gets all, all equal, one each, around the tile of 32 rows, primes, a tail."""
    return [*rows * np.eye(8, dtype=int)[[0, 3, 7]], np.full(8, rows // 8), np.ones(8, int), np.zeros(8, int),
            np.array([31, 32, 33, 0, 0, 0, 0, 0]), np.array([0, 33, 0, 31, 32, 0, 0, 0]),
            np.array([2, 3, 5, 7, 11, 13, 17, 19]), np.array([0, 0, 61, 0, 0, 0, 5, 0])]  # fmt: skip


def test_group_patterns(implementation):
    rows = 104
    x, w, dy = draw(np.random.default_rng(0), rows, K, N, 8)
    run = products(implementation)
    for sizes in patterns_of(rows):
        check(run, x, w, dy, sizes)
        assert_no_races(implementation)
    assert run._cache_size() == 1


@pytest.mark.parametrize("transpose_w", [False, True])
def test_every_pattern_of_empty_groups_in_one_compilation(plain, transpose_w):
    rng = np.random.default_rng(1)
    x, w, dy = draw(rng, 80, K, N, 8)
    run = products(plain, transpose_w=transpose_w)
    for pattern in itertools.product([0, 1], repeat=8):
        check(run, x, w, dy, np.array(pattern) * rng.integers(1, 11, 8))
    assert run._cache_size() == 1


@pytest.mark.long
def test_every_pattern_of_empty_groups_without_races(monkeypatch):
    rng = np.random.default_rng(2)
    x, w, dy = draw(rng, 80, K, N, 8)
    implementation = registered("races", monkeypatch)
    run = products(implementation)
    for pattern in itertools.product([0, 1], repeat=8):
        check(run, x, w, dy, np.array(pattern) * rng.integers(1, 11, 8))
        assert_no_races(implementation)


@pytest.mark.parametrize("shape", [(0, 3, 2, 4), (1, 3, 2, 4), (1, 8, 2880, 3), (13, 200, 8, 3), (31, 8, 200, 1),
                                   (40, 2880, 16, 2), (33, 129, 127, 2)])  # fmt: skip
def test_odd_shapes(plain, shape):
    rng = np.random.default_rng(3)
    x, w, dy = draw(rng, *shape)
    sizes = np.bincount(rng.integers(shape[3], size=shape[0]), minlength=shape[3])
    for config in (SMALL, None):
        check(products(plain, config), x, w, dy, sizes)


def test_odd_shapes_without_races(monkeypatch):
    rng = np.random.default_rng(4)
    implementation = registered("races", monkeypatch)
    for shape, sizes in (((1, 8, 130, 3), [0, 1, 0]), ((45, 129, 8, 2), [33, 0])):
        x, w, dy = draw(rng, *shape)
        check(products(implementation), x, w, dy, np.array(sizes))
        assert_no_races(implementation)


def test_the_tiles_of_real_use(plain, monkeypatch):
    monkeypatch.undo()  # pieces of 128 rows
    plain = registered("plain", monkeypatch)
    x, w, dy = draw(np.random.default_rng(5), 1100, 136, 72, 5)
    for sizes in ([300, 0, 513, 7, 205], [0, 511, 1, 512, 0], [129, 130, 127, 128, 383]):
        check(products(plain, None), x, w, dy, np.array(sizes))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_bad_values_stay_in_their_group(plain, bad):
    x, w, dy = draw(np.random.default_rng(6), 90, K, N, 4)
    sizes = jnp.array([35, 4, 0, 40], jnp.int32)
    run = products(plain)
    clean = run(x, w, dy, sizes)
    spoiled = run(x.at[36].set(bad), w.at[1, 3].set(bad), dy.at[37].set(bad), sizes)
    others = np.r_[0:35, 39:90]
    for before, after in zip(clean[:2], spoiled[:2], strict=True):
        assert np.array_equal(before[others], after[others])
    assert np.array_equal(clean[2][jnp.array([0, 2, 3])], spoiled[2][jnp.array([0, 2, 3])])
    assert not np.isfinite(spoiled[0][36]).any() and not np.isfinite(spoiled[2][1]).all()


def test_bfloat16_accumulates_in_float32(implementation):
    x, w, dy = (a.astype(jnp.bfloat16) for a in draw(np.random.default_rng(7), 100, 520, N, 4))
    sizes = np.array([33, 0, 50, 9])
    y, dx, dw = check(products(implementation), x, w, dy, sizes, (2.5e-3, 1e-2, 1e-2))
    assert y.dtype == dx.dtype == dw.dtype == jnp.bfloat16
    both = {"implementation": implementation, "config": SMALL}
    wide = grouped_matmul(x, w, jnp.asarray(sizes), out_dtype=jnp.float32, **both)
    close(wide, numpy_products(x, w, dy, sizes)[0], 2e-6)
    full = grouped_outer(x, dy, jnp.asarray(sizes), **both)
    assert full.dtype == jnp.float32
    close(full, numpy_products(x, w, dy, sizes)[2], 2e-6)
    assert_no_races(implementation)


def test_one_compilation_and_the_same_bits_twice(plain):
    rng = np.random.default_rng(8)
    x, w, dy = draw(rng, 90, K, N, 5)
    run = products(plain)
    for _ in range(20):
        sizes = rng.multinomial(rng.integers(91), rng.dirichlet(np.ones(5) / 2))
        first = check(run, x, w, dy, sizes)
        again = check(run, x, w, dy, sizes)
        assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert run._cache_size() == 1


def test_gradients_of_all_orders(plain):
    x, w, dy = draw(np.random.default_rng(9), 7, 3, 4, 3)
    sizes = jnp.array([2, 0, 4], jnp.int32)
    for product, operands in ((grouped_matmul, (x, w)), (grouped_outer, (x, dy))):
        fn = lambda a, b: product(jnp.asarray(a), jnp.asarray(b), sizes, implementation=plain)  # noqa: B023, E731
        check_grads(jax.jit(fn), operands, 2, ["rev"], rtol=2e-2)


def test_vmap_scan_and_remat(plain):
    x, w, dy = draw(np.random.default_rng(10), 8, 4, 4, 2)
    sizes = jnp.array([[3, 5], [8, 0], [1, 2]], jnp.int32)
    fn = lambda s: grouped_matmul(x, w, s, implementation=plain)  # noqa: E731
    single = jnp.stack([jax.jit(fn)(s) for s in sizes])
    assert np.allclose(jax.jit(jax.vmap(fn))(sizes), single, atol=1e-6)
    assert np.allclose(jax.lax.scan(lambda c, s: (c, fn(s)), 0, sizes)[1], single, atol=1e-6)
    loss = lambda w: (grouped_matmul(x, w, sizes[0], implementation=plain) ** 2).sum()  # noqa: E731
    assert np.allclose(jax.jit(jax.grad(jax.checkpoint(loss)))(w), jax.jit(jax.grad(loss))(w), atol=1e-5)


def test_refusals():
    x, w, _ = draw(np.random.default_rng(11), 8, 4, 4, 2)
    sizes = jnp.array([3, 5], jnp.int32)
    run = functools.partial(tpu.matmul, transpose_w=False, out_dtype=jnp.float32, interpret=True)
    with pytest.raises(UserError, match="operands are float32 and bfloat16; the TPU kernels need one dtype"):
        run(x, w.astype(jnp.bfloat16), sizes)
    with pytest.raises(UserError, match="bfloat16 and float32 only, x is float16"):
        run(x.astype(jnp.float16), w.astype(jnp.float16), sizes)
    with pytest.raises(UserError, match="MiB of VMEM, .*give a config of smaller rows"):
        big = jnp.zeros((8192, 4096)), jnp.zeros((2, 4096, 4096))
        jax.eval_shape(functools.partial(run, config=tpu.Config(8192, 4096, 4096)), *big, sizes)
    assert tpu.unfit((8, 4), 2, jnp.float32) == "only on a TPU, this is cpu"


def test_what_a_tpu_may_not_fit(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert tpu.unfit((131072, 7168), 256, jnp.bfloat16) is None
    assert "float16" in tpu.unfit((8, 4), 2, jnp.float16)
    assert "scalar memory takes" in tpu.unfit((8, 4), 100_000, jnp.bfloat16)
    monkeypatch.setattr(tpu, "_MISSING", "no such module")
    assert "cannot be imported (no such module)" in tpu.unfit((8, 4), 2, jnp.bfloat16)


def test_vmem_of_the_default_tiles():
    half = tpu.vmem_bytes(tpu.Config(), "matmul", jnp.bfloat16, jnp.bfloat16)
    assert half == 2 * 2 * (512 * 1024 + 1024 * 1024 + 512 * 1024) + 4 * 512 * 1024
    assert tpu.vmem_bytes(tpu.Config(), "outer", jnp.bfloat16, jnp.float32) == 2 * 2 * 2 * 512 * 1024 + 12 * 1024**2
    assert all(tpu.vmem_bytes(tpu.Config(), product, jnp.float32, jnp.float32) <= tpu._VMEM
               for product in ("matmul", "outer"))  # fmt: skip

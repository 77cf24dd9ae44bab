"""The tuner picks the fastest right candidate, its tables survive a round trip, and damaged ones are ignored."""

import dataclasses
import json
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodels.errors import UserError
from jaxmodels.kernels import grouped_matmul, grouped_outer
from jaxmodels.kernels.grouped_matmul import Implementation, api, cpu, hopper, reference, register, tpu, tuning
from jaxmodels.kernels.grouped_matmul.tuning import tables, tuner

SHAPE = {"rows": 48, "inner": 16, "columns": 8, "groups": 4, "dtype": "float32"}
KIND = tables.device_kind()


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "cache_folder", lambda: tmp_path)  # the compiled C++ stays in the real one
    monkeypatch.delenv("JAXMODELS_TUNING", raising=False)
    tables._table.cache_clear()
    yield
    tables._table.cache_clear()


@dataclasses.dataclass(frozen=True)
class Config:
    speed: int = 1


@pytest.fixture
def fake(monkeypatch):
    """An implementation whose time is 1 / speed as the tuner's clock tells it; speed 7 is wrong, speed 13 breaks."""
    built = []

    def matmul(x, w, group_sizes, *, transpose_w, out_dtype, config=None):
        config = config or Config()
        built.append(config)
        if config.speed == 13:
            raise NotImplementedError("no such\nspeed")
        y = reference.matmul(x, w, group_sizes, transpose_w=transpose_w, out_dtype=out_dtype)
        return y * 1.01 if config.speed == 7 else y

    def outer(*arguments, config=None, **keywords):
        return reference.outer(*arguments, **keywords)

    name = f"{api.__package__}.fake"
    monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(
        Config=Config, candidates=lambda *_: [Config(s) for s in (2, 5, 7, 13)]))
    monkeypatch.setattr(api, "_IMPLEMENTATIONS", dict(api._IMPLEMENTATIONS))
    register("fake", Implementation(matmul, outer, takes_config=True))
    return built


@pytest.fixture
def clock(monkeypatch):
    """Every configuration takes what its speed says, no matter what this machine does."""
    runner = tuner._runner

    def named(implementation, product, config, operands, sizes):
        run = runner(implementation, product, config, operands, sizes)
        run.seconds = 0.01 / (config or Config()).speed
        return run

    monkeypatch.setattr(tuner, "_runner", named)
    monkeypatch.setattr(tuner, "_turn", lambda run, kind, calls: run.seconds * (2 if kind == "zipf" else 1))


@pytest.mark.parametrize("product", ["fwd", "dX"])
def test_the_fastest_right_one_wins(fake, clock, product):
    tuned = tuning.tune(product, 48, 16, 8, 4, jnp.float32, "fake", repeats=4)
    assert tuned.config == Config(5)
    assert tuned.ms == pytest.approx({"even": 2, "zipf": 4}) and tuned.default_ms["even"] == pytest.approx(10)
    assert tuned.tried.keys() == {"None", "Config(speed=2)", "Config(speed=5)"}
    assert tuned.discarded["Config(speed=7)"].startswith("wrong: differs from the default by 1.0e-02")
    assert tuned.discarded["Config(speed=13)"] == "failed: no such speed"


def test_the_default_may_be_the_fastest(fake, clock):
    tuned = tuning.tune("fwd", **SHAPE, implementation="fake", candidates=[Config(7)])
    assert tuned.config is None and tuned.ms == tuned.default_ms
    tuning.record([tuned])
    assert tuning.lookup("fake", "fwd", *SHAPE.values(), KIND) is None


def test_what_cannot_be_tuned_is_refused(fake):
    for arguments, message in (
        (("up", *SHAPE.values(), "fake"), "product 'up' is unknown"),
        (("fwd", *SHAPE.values(), "xla"), "'xla' takes no config; tune one of cpu, tpu, hopper, fake"),
        (("fwd", *SHAPE.values(), "tpu"), "'tpu' cannot run here: .* this is cpu"),
    ):
        with pytest.raises(UserError, match=message):
            tuning.tune(*arguments)


@pytest.mark.parametrize("product", ["fwd", "dX", "dW"])
def test_a_real_implementation(product):
    """Really timed, so only that something was; recorded and found by a call of about as many rows."""
    candidates = [cpu.Config(0, 16), cpu.Config(8, 16)]
    tuned = tuning.tune(product, **SHAPE, implementation="cpu", candidates=candidates, repeats=2)
    assert tuned.config in (None, *candidates) and tuned.discarded == {} and len(tuned.tried) == 3
    assert all(ms > 0 for times in tuned.tried.values() for ms in times.values())


def tuned_as(config, rows=48, implementation="fake", product="fwd", **others):
    shape = SHAPE | {"rows": rows} | others
    return tuner.Tuned(implementation, product, **shape, config=config, ms={"even": 1.0}, default_ms={"even": 2.0},
                       tried={}, discarded={})


def test_tables_round_trip(fake):
    path = tuning.record([tuned_as(Config(5)), tuned_as(Config(2), rows=4096), tuned_as(None, columns=24)])
    tuning.record([tuned_as(Config(3), rows=4096), tuned_as(cpu.Config(None, 16), implementation="cpu")])
    content = json.loads(path.read_text())
    assert content["schema"] == 1 and content["device"] == KIND and len(content["entries"]) == 4
    assert {"jax", "date", "ms", "default_ms"} <= content["entries"][0].keys()

    def found(rows, name="fake", **others):
        return tuning.lookup(name, "fwd", *(SHAPE | {"rows": rows} | others).values(), KIND)

    assert found(48) == Config(5) and found(80) == Config(5)  # 64 is nearest to all three
    assert found(4096) == Config(3) and found(3000) == Config(3)
    assert found(100) is None and found(1) is None and found(0) is None and found(48, columns=24) is None
    assert found(48, inner=17) is None and found(48, dtype="bfloat16") is None
    assert found(48, "cpu") == cpu.Config(None, 16)
    assert tuning.lookup("fake", "fwd", *SHAPE.values(), "another device") is None
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_the_users_table_goes_before_the_shipped(fake, tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "SHIPPED", tmp_path / "shipped")
    shipped = tuning.record([tuned_as(Config(2)), tuned_as(Config(3), rows=4096)])
    (tmp_path / "shipped").mkdir()
    shipped.rename(tmp_path / "shipped" / shipped.name)
    tuning.record([tuned_as(Config(5))])
    values = list(SHAPE.values())
    assert tuning.lookup("fake", "fwd", *values, KIND) == Config(5)
    assert tuning.lookup("fake", "fwd", 4096, *values[1:], KIND) == Config(3)


def test_what_is_shipped_is_whole():
    for path in tables.SHIPPED.glob("*.json"):
        assert tables._read(path, json.loads(path.read_text())["device"])


def entry(**changes):
    whole = {"implementation": "fake", "product": "fwd", **SHAPE, "config": {"speed": 5}, "ms": {"even": 1.0},
             "default_ms": {"even": 2.0}}
    return {"schema": 1, "device": KIND, "entries": [whole | changes]}


@pytest.mark.parametrize("content, problem", [
    ("{", "is not JSON"),
    ("\x00\xff", "is not JSON"),
    ("[" * 100_000, "is not JSON"),
    ([], "has schema 'list'"),
    (entry() | {"schema": 2}, "has schema 2, this version reads 1"),
    (entry() | {"device": "NVIDIA H100"}, "is of 'NVIDIA H100'"),
    (entry() | {"entries": {}}, "has no list of entries"),
    (entry() | {"entries": ["fwd"]}, "wrong entry 0"),
    (entry(rows=-1), "rows is -1"),
    (entry(inner=16.0), "inner is 16.0"),
    (entry(groups=True), "groups is True"),
    (entry(product="up"), "product is 'up'"),
    (entry(dtype=None), "dtype is None"),
    (entry(ms={"even": float("nan")}), "ms is"),
    (entry(ms={}), "ms is {}"),
    (entry(config={"speed": 0}), "config.speed is 0"),
    (entry(config={"speed": 2.0}), "config.speed is 2.0"),
    (entry(config={"speed": True}), "config.speed is True"),
    (entry(config={"speed": None}), "config.speed is None"),
    (entry(config={"tile": 5}), "Config has speed"),
    (entry(config=[5]), "Config has speed"),
    (entry(implementation="os"), "'os' takes no config"),
    (entry(implementation="../../x"), "takes no config"),
    (entry(implementation="hopper", config={"columns": 100}), "config is refused: columns=100"),
    (entry(implementation="tpu", config={"whole": 1}), "config.whole is 1"),
])  # fmt: skip
def test_damaged_and_foreign_tables_warn_once(fake, content, problem):
    path = tables.user_table(KIND)
    path.parent.mkdir(parents=True)
    path.write_bytes(content.encode("latin-1") if isinstance(content, str) else json.dumps(content).encode())
    with pytest.warns(UserWarning, match="is ignored") as caught:
        for _ in range(3):
            assert tuning.lookup("fake", "fwd", *SHAPE.values(), KIND) is None
    assert len(caught) == 1 and problem in str(caught[0].message) and str(path) in str(caught[0].message)
    with pytest.warns(UserWarning, match="is replaced"):
        tuning.record([tuned_as(Config(5))])
    assert tuning.lookup("fake", "fwd", *SHAPE.values(), KIND) == Config(5)


@pytest.mark.long
def test_a_call_looks_up_and_never_times(fake, monkeypatch):
    def never(*_):
        raise AssertionError("timed")

    monkeypatch.setattr(tuner, "_turn", never)
    monkeypatch.setattr(tuner, "tune", never)
    tuning.record([tuned_as(Config(5)), tuned_as(Config(3), product="dX", inner=8, columns=16)])
    x, w, sizes = jnp.ones((48, 16)), jnp.ones((4, 16, 8)), jnp.array([12, 0, 30, 6])
    y = grouped_matmul(x, w, sizes, implementation="fake")
    np.testing.assert_array_equal(y, np.full((48, 8), 16.0))
    grouped_matmul(y, w, sizes, transpose_w=True, implementation="fake")
    grouped_outer(x, y, sizes, implementation="fake")
    grouped_matmul(x[:3], w, sizes // 12, implementation="fake")  # no entry for so few rows
    grouped_matmul(x, w, sizes, implementation="fake", config=Config(11))
    monkeypatch.setenv("JAXMODELS_TUNING", "0")
    grouped_matmul(x, w, sizes, implementation="fake")
    assert fake == [Config(5), Config(3), Config(1), Config(11), Config(1)]
    for name in ("cpu", None):
        np.testing.assert_allclose(grouped_matmul(x, w, sizes, implementation=name), y)


def test_without_the_device_nothing_is_looked_up():
    x, w, sizes = jnp.ones((48, 16)), jnp.ones((4, 16, 8)), jnp.array([48, 0, 0, 0])
    assert tuning.for_call("tpu", "matmul", x, w, sizes, False) is None
    assert tuning._kind("tpu") is None and tuning._kind("cpu") == tuning._kind(None) == KIND


@pytest.mark.parametrize("product", ["fwd", "dX", "dW"])
def test_candidates_fit(product):
    qwen = (131_072, 4096, 1536, 128, jnp.dtype("bfloat16"))
    kernel, wide = "outer" if product == "dW" else "matmul", jnp.dtype("float32")  # of results: the most VMEM
    for shape in (qwen, (2_097_152, *qwen[1:]), (8, *qwen[1:])):
        found = tuner.candidates_of("tpu", product, *shape)
        assert len(found) > 3 and tpu.Config() in found or shape != qwen
        for config in found:
            tiles = tpu.tiles(kernel, shape[:3], qwen[4], wide, config)
            tpu.vmem_limit(tpu.vmem_bytes(kernel, 4096, qwen[4], wide, tiles))
    found = tuner.candidates_of("hopper", product, *qwen)
    assert len(set(found)) == len(found) > 10 and all(one.shared_bytes() <= hopper.SHARED_BYTES for one in found)
    assert {config.columns for config in tuner.candidates_of("hopper", product, 8, 64, 72, 4, qwen[4])} == {64, 128}
    found = tuner.candidates_of("cpu", product, 2048, 576, 128, 64, jnp.dtype("float32"))
    assert {config.room for config in found} > {0, cpu.batch_room(2048, 64)} and {16, 128} < {c.block for c in found}


def test_a_config_is_of_its_implementation():
    x, w, sizes = jnp.ones((8, 4)), jnp.ones((2, 4, 4)), jnp.array([3, 5])
    y = grouped_matmul(x, w, sizes, implementation="cpu", config=cpu.Config(2, 3))
    np.testing.assert_array_equal(y, np.full((8, 4), 4.0))
    with pytest.raises(UserError, match=r"'cpu' takes its own Config"):
        cpu._cut(tpu.Config(), 8, 2)
    with pytest.raises(UserError, match="block at least 1"):
        cpu.Config(block=0)

"""The benchmark of the grouped products at a toy size: distributions, rows, what is wrong is told and not timed."""

import dataclasses
import importlib
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import _grouped_peers, _shapes, grouped_matmul, tune_grouped_matmul
from benchmarks._shapes import Layer, Point
from jaxmodels.errors import UserError
from jaxmodels.kernels.grouped_matmul import native, tuning, xla
from jaxmodels.kernels.grouped_matmul.tuning import tables, tuner

TOY = Layer("toy", 24, 16, 6, 2, 20)
POINT = Point(TOY, dtype="float32", distributions=("even", "half empty"))
QUICK = {"seconds": 0.0, "cache": 1}
KIND = tables.device_kind()


@pytest.mark.parametrize("distribution", _shapes.DISTRIBUTIONS)
@pytest.mark.parametrize("layer", [*_shapes.LAYERS.values(), *_shapes.SMALL.values(), TOY, Layer("one", 8, 8, 1, 1, 5),
                                   _shapes.decode("Qwen3-235B-A22B", 1)], ids=lambda layer: layer.name)  # fmt: skip
def test_distributions(distribution, layer):
    """Every row has an expert, draws repeat, and each distribution is what its name says."""
    if distribution == "random" and layer.tokens > 20_000:
        layer = dataclasses.replace(layer, tokens=20_000)  # seconds for nothing
    sizes = _shapes.draw_sizes(distribution, layer)
    assert sizes.dtype == np.int32 and sizes.shape == (layer.experts,)
    assert sizes.sum() == layer.rows and sizes.min() >= 0
    np.testing.assert_array_equal(sizes, _shapes.draw_sizes(distribution, layer))
    mean, busiest = layer.rows / layer.experts, sizes.max()
    if distribution == "even":
        assert busiest - sizes.min() <= 1
    elif distribution == "random":
        assert busiest <= layer.tokens
    elif distribution == "jitter":
        assert 0.4 * mean - 1 <= sizes.min() and busiest <= 1.8 * mean + 1
    elif distribution == "zipf":
        share = 1 / (1 / np.arange(1, layer.experts + 1)).sum()
        assert busiest == pytest.approx(share * layer.rows, abs=1)
    elif distribution == "60 % in one":
        assert busiest == (round(0.6 * layer.rows) if layer.experts > 1 else layer.rows)
    elif distribution == "all in one":
        assert busiest == layer.rows
    elif distribution == "half empty":
        assert (sizes > 0).sum() == min(-(-layer.experts // 2), layer.rows)


def test_points():
    """Names tell them apart, and the layers are those of moe_split.md 8.1."""
    for points in (_shapes.CPU, _shapes.ACCELERATOR):
        assert len({point.name for point in points}) == len(points)
        assert all(set(point.distributions) <= set(_shapes.DISTRIBUTIONS) for point in points)
    assert Point(_shapes.SMALL["E=64 top-4"], "down").shape == (2048, 128, 576, 64)
    assert {point.name: point.shape for point in _shapes.ACCELERATOR}["DeepSeek-V3"] == (131_072, 7168, 2048, 256)
    assert _shapes.LAYERS["SonicMoE point"].rows == 2_097_152


def wrong_when_empty(point, product):
    """lax.ragged_dot, but the gradient of an expert without rows is not written."""
    if product != "dW":
        return {"": grouped_matmul._ours("xla", point, product)[""]}
    return {"": lambda x, dy, sizes: xla.outer(x, dy, sizes, out_dtype="float32") + (sizes == 0)[:, None, None]}


def drops_the_last(point, product):
    if product != "fwd":
        raise grouped_matmul.Skipped("only forward")
    return {"": lambda x, w, sizes: jax.lax.ragged_dot(x[:, :-1], w[:, :-1], sizes)}


def broken(point, product):
    def function(left, right, sizes):
        raise NotImplementedError("no such\ntile")

    return {"a": function}


def variants(point, product):
    return broken(point, product) | {"b": grouped_matmul._ours("xla", point, product)[""]}


@pytest.mark.parametrize("looped, products", [(False, grouped_matmul.PRODUCTS), (True, ("dW",))])
def test_measure(looped, products):
    """A row for each side, distribution and product, with every column; the wrong and the broken are told once."""
    makers = {name: lambda point, product, name=name: grouped_matmul._ours(name, point, product)
              for name in ("cpu", "xla")}  # fmt: skip
    makers |= {"empty": wrong_when_empty, "drops": drops_the_last, "broken": broken, "variants": variants,
               "absent": lambda point, product: importlib.import_module("no_such_peer")}
    rows = grouped_matmul.measure(POINT, makers, products=products, looped=looped, **QUICK)
    timed = {(row["rows on experts"], row["product"], row["side"]): row for row in rows if "samples" in row}
    notes = {row["side"]: row for row in rows if "samples" not in row and row["note"] != "only forward"}
    sides = {side for _, _, side in timed}
    assert sides == {"dense", "cpu", "xla", "empty", "variants"}
    assert notes["absent"]["note"] == "fails: ModuleNotFoundError: No module named 'no_such_peer'"
    assert notes.keys() == {"empty", "broken", "absent"} | ({"drops"} if "fwd" in products else set())
    assert len(timed) == 5 * 2 * len(products) - 1
    for (_, product, side), row in timed.items():
        assert row.keys() >= set(grouped_matmul.COLUMNS) and row["p10"] <= row["ms"] <= row["p90"]
        assert row["flop"] == 2 * 40 * 24 * 16 and row["TFLOP/s"] == pytest.approx(row["flop"] / row["ms"] / 1e9)
        assert (row["of dense"] is None) == (side == "dense") and row["of peak"] is None
        assert row["samples"]["repeats"] == 3 and row["temporary MiB"] >= 0 and row["calls_per_turn"] >= 1
        assert row["note"] == ("b" if side == "variants" else "")
        dense = timed[row["rows on experts"], product, "dense"]
        assert side == "dense" or row["of dense"] == pytest.approx(dense["ms"] / row["ms"])
    assert notes["empty"]["note"] == "wrong: the gradient of an expert without rows is not zero"
    assert (notes["empty"]["rows on experts"], notes["empty"]["product"]) == ("half empty", "dW")
    if "fwd" in products:
        told = notes["drops"]["note"]
        assert told.startswith("wrong: differs from float64 by") and told.endswith("limit 1e-05")
    assert notes["broken"]["note"] == "does not compile: NotImplementedError: no such tile"
    assert notes["broken"]["product"] == ", ".join(products)


@pytest.mark.parametrize("product", grouped_matmul.PRODUCTS)
def test_the_check_sees(product):
    """Right results pass under every distribution; swapped experts, NaN, zeros and a wrong shape do not."""
    point = Point(TOY, dtype="float32", distributions=tuple(_shapes.DISTRIBUTIONS))
    inputs = grouped_matmul.Inputs(point, product, cache=1)
    left, right, _ = inputs.sets[0]
    function = jax.jit(grouped_matmul._ours("xla", point, product)[""])
    for distribution in point.distributions:
        sizes = _shapes.draw_sizes(distribution, TOY)
        inputs.set_sizes(sizes)
        result = function(left, right, jnp.asarray(sizes))
        assert grouped_matmul.check(inputs, sizes, result) is None
        for bad, message in ((result.at[..., -1].set(jnp.nan), "not finite"), (result[:-1], "shape"),
                             (jnp.zeros_like(result), "differs"), (result[::-1], "differs")):  # fmt: skip
            assert grouped_matmul.check(inputs, sizes, bad).startswith(message), (distribution, message)


@pytest.mark.long
def test_inputs_exceed_the_cache():
    """Twice its size, and experts that only few rows read are rotated."""
    point = Point(_shapes.decode("E=64 top-4", 1), dtype="float32", distributions=("random",))
    inputs = grouped_matmul.Inputs(point, "fwd", cache=16 * 2**20)
    assert len(inputs.sets) == 2 and inputs.sets[0][1].shape == (64, 576, 128)
    inputs.set_sizes(_shapes.draw_sizes("random", point.layer))
    assert len(inputs.sizes) >= 13 and len({tuple(sizes.tolist()) for sizes in inputs.sizes}) == len(inputs.sizes)
    assert all(int(sizes.sum()) == 4 for sizes in inputs.sizes)


@pytest.mark.parametrize("product", grouped_matmul.PRODUCTS)
def test_the_loop_computes_every_time(product):
    """Even the dense product, which depends on nothing that a plain loop would change: no product before the loop."""
    inputs = grouped_matmul.Inputs(POINT, product, cache=1)
    side = grouped_matmul.Side("dense", grouped_matmul._dense(POINT, product), inputs, looped=True)
    operands = [[part] for part in side._operands(0)]
    program = grouped_matmul._looped(side.variants[""][0], 1).lower(3, *operands, jnp.ones((2, 6), jnp.int32)).compile()
    before, _, entry = program.as_text().partition("\nENTRY")
    assert " dot(" in before and " dot(" not in entry
    before = [np.asarray(part[0]) for part in operands]
    inputs.set_sizes(_shapes.draw_sizes("even", TOY))
    side.prepare(_shapes.draw_sizes("even", TOY))
    side.turn()
    for now, then in zip(side._operands(0), before, strict=True):
        np.testing.assert_array_equal(now, then)


def test_slow_sides_have_fewer_turns_spread_over_the_others():
    order = []
    functions = {name: lambda name=name: order.append(name) for name in ("fast", "slow")}
    samples = grouped_matmul._turns(functions, {"fast": 12, "slow": 3})
    assert len(samples["fast"].seconds) == 12 and len(samples["slow"].elsewhere) == 3
    places = [i for i, name in enumerate(order) if name == "slow"]
    assert min(np.diff(places)) >= 4


def test_what_is_not_worth_running_says_so():
    olmoe = Point(_shapes.LAYERS["OLMoE-1B-7B"], dtype="float32")
    with pytest.raises(grouped_matmul.Skipped, match="expands to all experts, 35 TFLOP a product"):
        grouped_matmul._ours("xla", olmoe, "fwd")
    with pytest.raises(grouped_matmul.Skipped, match="are 75,497,472 numbers"):
        grouped_matmul._ours("reference", _shapes.CPU[1], "fwd")
    with pytest.raises(UserError, match="'E=65' is unknown on this device; choose from E=64 top-4"):
        grouped_matmul.choose(_shapes.CPU, ["E=65"])
    with pytest.raises(UserError, match="where the plot goes"):
        grouped_matmul.main("x.html")


def test_the_whole(tmp_path, monkeypatch, capsys):
    """One command: table, JSON and the page with the plot."""
    monkeypatch.setattr(grouped_matmul, "CPU", (POINT,))
    monkeypatch.setitem(os.environ, "XLA_CLIENT_MEM_FRACTION", "")
    grouped_matmul.main(str(tmp_path / "out.json"), products=("fwd",), seconds=1e-6)
    told = capsys.readouterr().out
    assert all(column in told for column in grouped_matmul.COLUMNS) and "half empty" in told
    assert "tpu does not run here: only on a TPU, this is cpu" in told and "torch grouped_mm does not run here" in told
    content = json.loads((tmp_path / "out.json").read_text())
    sides = {row["side"] for row in content["rows"]}
    assert sides == {"dense", "cpu", "xla", "reference", *["native"] * (native.unavailable() is None)}
    assert content["about"]["versions"]["jax"] == jax.__version__ and content["about"]["processor"]
    page = (tmp_path / "out.html").read_text()
    assert "share of dense" in page and "<svg" in page and "href=\"http" not in page


@pytest.mark.torch
@pytest.mark.long
def test_pytorch_does_the_same_work():
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        done = subprocess.run([sys.executable, "-m", "benchmarks._grouped_peers"], input="[]", capture_output=True,
                              text=True, cwd=_grouped_peers.ROOT, check=True)  # fmt: skip
        assert json.loads(done.stdout) == "this PyTorch has no GPU to run on"
    if not hasattr(torch.nn.functional, "grouped_mm"):
        pytest.skip("this PyTorch has no grouped_mm")
    layer = Layer("toy", 32, 16, 4, 2, 32)
    cases = [{"key": ["toy", "zipf", product], "shape": Point(layer).shape, "dtype": "bfloat16",
              "sizes": _shapes.draw_sizes("zipf", layer).tolist()} for product in grouped_matmul.PRODUCTS]  # fmt: skip
    for found in _grouped_peers.torch_cases(cases, device="cpu"):
        assert found.get("samples"), found["note"]
        assert found["dense_median_s"] > 0 and found["note"] == "own process; writes bfloat16"
    rows = grouped_matmul.measure(Point(layer, distributions=("zipf",)), {}, products=("fwd",), **QUICK,
                                  torch={("toy", "zipf", "fwd"): found})  # fmt: skip
    assert [row["side"] for row in rows] == ["dense", "torch grouped_mm"] and rows[1]["of dense"] > 0


@pytest.mark.long
def test_the_tuning_command(tmp_path, monkeypatch, capsys):
    """Times two candidates, records them for later calls, and goes on where one point cannot be tuned."""
    monkeypatch.setattr(tables, "cache_folder", lambda: tmp_path)
    monkeypatch.setitem(tuner._CANDIDATES, "cpu", lambda module, *_: [module.Config(0, 16), module.Config(8, 16)])
    monkeypatch.setattr(tune_grouped_matmul, "CPU", (POINT, Point(Layer("no", 8, 8, 2, 1, 4), dtype="complex64"),
                                                    Point(_shapes.LAYERS["OLMoE-1B-7B"])))  # fmt: skip
    tune_grouped_matmul.main(str(tmp_path / "out.json"), products=("dX",), repeats=2)
    told = capsys.readouterr().out
    assert "not tuned: seconds a call" in told and "recorded in" in told
    one, failed, _ = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert (one["inner"], one["columns"], one["tried"], len(one["all"])) == (16, 24, 3, 3) and one["even ms"] > 0
    assert failed["note"].startswith("not tuned:")
    (table,) = (tmp_path / "tuning").iterdir()
    (entry,) = json.loads(table.read_text())["entries"]
    assert entry["product"] == "dX" and str(tuning.lookup("cpu", "dX", 40, 16, 24, 6, "float32", KIND)) == one["config"]

"""The pre-training experiments, tiny, through the command; and what dispatching a step costs."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from flax import nnx

import jaxmodels
from jaxmodels.decoder.model import Decoder
from jaxmodels.hub.tokenizer import load_tokenizer
from tests.tiny_training import NextToken, decoder, plan_of, token_batch
from train.runtime.mesh import use_mesh
from train.runtime.step import TrainStep, make_step

ROOT = Path(__file__).resolve().parents[1]
PROBE = """
import sys
from jaxmodels.cli import main
code = main(sys.argv[1:])
assert "tensorflow" not in sys.modules
sys.exit(code)
"""


def start(*arguments):
    env = {name: value for name, value in os.environ.items() if not name.startswith("XLA_")}
    return subprocess.run([sys.executable, "-c", PROBE, "run", *arguments], cwd=ROOT, env=env, capture_output=True,
                          text=True, timeout=300)


@pytest.fixture(scope="module", params=[pytest.param(name, marks=pytest.mark.long) for name in (
    "lm_dense_pretrain", "lm_moe_pretrain")])
def run(request, tmp_path_factory):
    """A tiny run over folders of text that anybody can read in a glance; no TensorFlow in the whole of it."""
    text = tmp_path_factory.mktemp("text")
    for package in range(20):
        (text / f"p{package}").mkdir()
        lines = "\n".join(f"def f{i}(x):\n    return x + {i * package}\n" for i in range(60))
        (text / f"p{package}" / "code.py").write_text(lines)
    out = tmp_path_factory.mktemp("run") / "out"
    arguments = [request.param, "preset=tiny", f"data.source=path:{text}", "data.vocab_size=300", "loop.steps=40",
                 "data.validation_rows=8", "--out", str(out)]
    done = start(*arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(out / "report.html")
    return request.param, out, arguments


def test_what_a_run_leaves(run):
    name, out, _ = run
    results = json.loads((out / "results.json").read_text())
    assert results["status"] == "complete" and results["steps"] == 40
    assert results["validation_loss"] < 4.5  # ln 300 = 5.7: it has learned something
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 41))
    assert {line["step"] for line in lines if "validation_loss" in line} == {20, 40}
    if name == "lm_moe_pretrain":
        load = np.array(lines[-1]["router.load"])
        assert load.shape == (2, 8) and load.sum(1) == pytest.approx(1)
        assert 0 <= results["router.entropy"] <= 1
    page = (out / "report.html").read_text()
    assert "held-out packages" in page and "What it writes" in page
    assert ("Load of the experts" in page) == (name == "lm_moe_pretrain")


def test_the_model_loads_and_gives_the_same_loss(run):
    _, out, _ = run
    model, tokenizer = jaxmodels.load(out / "model"), load_tokenizer(out / "model")
    ids = np.array([tokenizer.encode("def f3(x):\n    return x + 6\n")])
    logits, _ = model(ids)
    likely = np.asarray(logits[0, :-1]).argmax(-1)
    assert (likely == ids[0, 1:]).mean() > 0.2
    results = json.loads((out / "results.json").read_text())
    assert results["samples"][0].startswith("def ")


def test_a_finished_run_is_not_trained_again(run):
    _, out, arguments = run
    before = (out / "metrics.jsonl").read_bytes()
    done = start(*arguments)
    assert done.returncode == 0 and "training:" not in done.stderr
    assert (out / "metrics.jsonl").read_bytes() == before


@pytest.mark.torch
def test_transformers_loads_the_dense_model(run):
    name, out, _ = run
    if name != "lm_dense_pretrain":
        pytest.skip("transformers knows no balancing bias")
    import torch
    from transformers import AutoModelForCausalLM

    ids = np.arange(1, 40)[None]
    theirs = AutoModelForCausalLM.from_pretrained(out / "model")
    with torch.no_grad():
        want = theirs(torch.tensor(ids)).logits.numpy()
    got = np.asarray(jaxmodels.load(out / "model")(ids)[0])
    np.testing.assert_allclose(got, want, atol=2e-4 * want.std())


@pytest.mark.long
def test_dispatching_the_state_costs_little():
    """Calling the step on its nested dict takes at most 3 times what the same leaves in one flat list take.

    24 unrolled blocks. Both programs do nothing, so that only the call is timed; the best of many.
    """
    cfg = decoder(ffn_widths=(16,) * 24, scan_layers=False)
    plan, mesh = plan_of(lambda key: Decoder(cfg, rngs=nnx.Rngs(params=key)), optax.adamw(1e-3))
    state = plan.init()
    flat = jax.tree.leaves(state)
    assert len(flat) > 24 * 9 * 3
    nested, floor = jax.jit(lambda state: state["step"]), jax.jit(lambda leaves: leaves[-1])

    def best(function, argument):
        function(argument)
        times = []
        for _ in range(60):
            start = time.perf_counter()
            function(argument)
            times.append(time.perf_counter() - start)
        return min(times)

    ratios = [best(nested, state) / best(floor, flat) for _ in range(3)]
    assert min(ratios) <= 3, ratios
    step = make_step(TrainStep(plan.graphdef, NextToken(), optax.adamw(1e-3)), plan, mesh)
    with use_mesh(mesh):  # and it is the real step's state that was timed
        step.lower(plan.abstract, jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), token_batch()))

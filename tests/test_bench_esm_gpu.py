"""The benchmark of ESM on a GPU, at a toy size: its steps run, and one that fails or has no time harms no other."""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from benchmarks import esm_gpu
from jaxmodels.errors import UserError


def record(tmp_path, seconds=1000.0):
    return esm_gpu.Record(str(tmp_path / "out.json"), time.time() + seconds)


def steps(tmp_path):
    return json.loads((tmp_path / "out.json").read_text())["steps"]


def test_a_step_may_fail_or_be_left_out(tmp_path, capsys):
    def broken():
        raise OSError("no\nkernel")

    kept = record(tmp_path, 10)
    assert kept.attempt("first", 1, lambda: {"ms": 1.5}) == {"ms": 1.5}
    assert kept.attempt("second", 1, broken) is None and kept.attempt("third", 20, broken) is None
    assert esm_gpu.Record(kept.out, 0).steps == steps(tmp_path)  # the next process goes on in the file
    first, second, third = steps(tmp_path)
    assert first["ms"] == 1.5 and second["failed"] == "OSError: no kernel" and third["skipped"] == "20 s are needed"
    assert [json.loads(line)["step"] for line in capsys.readouterr().out.splitlines()] == ["first", "second", "third"]


def test_rows(monkeypatch):
    """Without the corpus random proteins, and it says so; counts are those of the rows."""
    def absent(name):
        raise UserError("not here")

    monkeypatch.setattr("train.data.proteins.protein_source", absent)
    rows = esm_gpu.packed_rows(esm_gpu.H100, 5)
    assert rows.about["source"].startswith("random proteins") and rows.about["rows"] == 5
    assert {name: array.shape for name, array in rows.of(4).items()} == dict.fromkeys(
        ("tokens", "segments", "targets"), (4, 1024))
    assert 0.1 < (rows.arrays["targets"] >= 0).mean() < 0.2 and (rows.arrays["tokens"] == 32).any()
    about = esm_gpu.census(np.array([[1, 1, 1, 2, 0, 0], [1] * 6]))
    assert about == {"tokens": 10, "mean keys": (9 + 1 + 36) / 10, "most proteins": 2, "padding": 2 / 12}


def test_the_step_is_that_of_the_command():
    """`jaxmodels run esm_pretrain` with these settings resolves to the configuration that is measured."""
    from train.runtime.config import resolve

    told = resolve("esm_pretrain", [
        "model.size=esm2_650m", "model.dtype=bfloat16", "model.remat=products_saveable", "model.attention=cudnn",
        "data.length=1024", "data.batch=32", "mesh.data=1", "optimizer.learning_rate=4e-4"])
    found = esm_gpu.configuration(esm_gpu.H100, esm_gpu.Variant("cudnn", "products_saveable", 32))
    assert found.model == told.model and found.optimizer == told.optimizer and found.data.length == told.data.length
    assert found.loop.accumulate == told.loop.accumulate == 1 and found.loop.style == told.loop.style
    assert (found.masking, found.mesh, found.plan) == (told.masking, told.mesh, told.plan)


@pytest.mark.long
def test_the_whole_program(tmp_path):
    """Every side in its process; kernels that a CPU lacks fail, the rest is measured."""
    out = tmp_path / "out.json"
    done = subprocess.run([sys.executable, "-m", "benchmarks.esm_gpu", "--tiny", "--seconds", "400", "--out", str(out)],
                          cwd=esm_gpu.ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    found = {step["step"]: step for step in steps(tmp_path)}
    failed = {name for name, step in found.items() if "failed" in step}
    assert failed - {"train, transformers"} == {"attention cudnn", "attention cudnn_packed", "attention triton"}, found
    assert found["attention xla"]["agrees"] and found["machine"]["versions"]["jax"]
    for name in ("train xla, products_saveable, batch 2", "train xla, none, batch 2"):
        step = found[name]
        assert step["tokens/s"] > 0 and step["MFU"] is None and step["skipped_steps"] == 0 and len(step["losses"]) >= 2
        assert step["TFLOP/s"] * 1e12 == pytest.approx(step["model_flops_per_token"] * step["tokens/s"])
    gate, site = found["attribution, gate"], found["attribution, site"]
    assert found["attribution, model"]["neurons"] == gate["values"] == 3 * 9 * 32
    assert gate["relative error"] < 0.05 and gate["nodes used"] == 20 and gate["seconds"] > 0
    assert found["attribution, gate, doubled"]["relative error"] < 0.01
    assert site["measured"] == "18 of 18 sites" and site["seconds"] >= site["measured_s"]
    assert site["relative error, median"] < 0.01
    if "failed" not in found["train, transformers"]:
        assert found["train, transformers"]["tokens/s"] > 0


def test_time_that_is_over(tmp_path, capsys):
    esm_gpu.main(str(tmp_path / "out.json"), seconds=1, tiny=True)
    assert "train: left out, no time" in capsys.readouterr().out


@pytest.mark.skipif(Path("/dev/nvidia0").exists(), reason="an NVIDIA GPU is here")
def test_without_a_gpu(tmp_path):
    with pytest.raises(UserError, match="needs an NVIDIA GPU"):
        esm_gpu.main(str(tmp_path / "out.json"))
    assert not (tmp_path / "out.json").exists()

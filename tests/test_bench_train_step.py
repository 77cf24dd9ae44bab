"""The training benchmark at a toy size: its measuring functions run and its rows say what they must."""

import dataclasses
import importlib.util
import json

import jax
import pytest

from benchmarks import _report, train_step
from train.pretrain_config import ModelConfig

TOY = train_step.Size("toy", ModelConfig(d_model=32, layers=2, heads=2, kv_heads=1, head_dim=16, active_width=48),
                      260, 16, ((4, "none"),))
MOE = dataclasses.replace(TOY, name="toy experts", model=dataclasses.replace(TOY.model, experts=4))
HAS_TORCH = all(map(importlib.util.find_spec, ("torch", "transformers")))
SAID = {"tokens/s", "ms", "p10", "p90", "TFLOP/s", "of matmul", "precision", "length", "batch", "parameters",
        "active_matmul_parameters", "model_flops_per_step", "flop_formula", "samples", "first_loss", "memory"}


@pytest.fixture(autouse=True)
def small_matmul(monkeypatch):
    """The bound is measured with 256 x 256: seconds, not minutes."""
    class Small(train_step.Matmul):
        def __init__(self, dtype, device):
            self.count, self.flop = 1, 2.0 * 256**3
            self.x = jax.numpy.ones((256, 256), dtype) / 256
            self.product = jax.jit(lambda x: x @ x)

    monkeypatch.setattr(train_step, "Matmul", Small)


def broken(size, batch, weights, steps):
    assert (weights / "config.json").exists()
    raise OSError("no compiler\nfound")


@pytest.mark.long
@pytest.mark.parametrize("size", [TOY, MOE], ids=lambda size: size.name)
def test_rows(size, tmp_path, capsys):
    """Ours, PyTorch's if it is here, and a note for a peer that is absent or breaks."""
    peers = {"absent": "not here", "broken": broken}
    if HAS_TORCH:
        peers["torch eager"] = train_step._peers("cpu", False)["torch eager"]
    ours, *theirs, absent, failed = rows = train_step.measure(size, jax.devices()[0], peers, repeats=3, steps=2)
    assert absent == {"model": size.name, "side": "absent", "note": "skipped: not here"}
    assert failed == {"model": size.name, "side": "broken", "note": "skipped: OSError: no compiler found"}
    for row in (ours, *theirs):
        assert row.keys() >= SAID and row["p10"] <= row["ms"] <= row["p90"] and row["samples"]["repeats"] == 3
        assert row["tokens/s"] == pytest.approx(4 * 16 / (row["ms"] / 1e3))
        assert row["TFLOP/s"] * 1e12 == pytest.approx(row["model_flops_per_step"] / (row["ms"] / 1e3))
        assert row["MFU"] is None and row["of matmul"] > 0  # this processor has no peak in the table
        assert row["first_loss"] == pytest.approx(ours["first_loss"], rel=1e-4)
    assert ours["first_loss"] == pytest.approx(5.56, abs=0.5)  # log 260: nothing learned yet
    assert ours["dispatch_over_floor"] == pytest.approx(ours["dispatch ms"] / ours["floor ms"])
    assert ours["memory MiB"] > ours["parameters"] * 12 / 2**20 and ours["arrays"] > 30
    assert ours["ours/it"] is None and len(theirs) == HAS_TORCH
    for row in theirs:
        assert row["ours/it"] == pytest.approx(ours["tokens/s"] / row["tokens/s"])
    about = _report.machine(("torch", "transformers", "accelerate"))
    _report.publish("toy", rows, train_step.COLUMNS, about, ["a note"], str(tmp_path / "out.json"))
    told = capsys.readouterr().out
    assert all(column in told for column in train_step.COLUMNS) and "skipped: not here" in told
    content = json.loads((tmp_path / "out.json").read_text())
    assert content["rows"][0]["precision"] == "float32" and content["about"]["device"]["platform"] == "cpu"


@pytest.mark.long
@pytest.mark.torch
def test_trainer_takes_its_turns():
    pytest.importorskip("accelerate")
    ours, theirs = train_step.measure(TOY, jax.devices()[0], {"HF Trainer": train_step.Trainer}, repeats=2, steps=2)
    assert theirs["first_loss"] == pytest.approx(ours["first_loss"], rel=1e-4)


def test_a_peer_with_other_work_is_an_error():
    with pytest.raises(RuntimeError, match="did not do the same work"):
        train_step._check_agreement(TOY, {"jaxmodels": 4.16, "other": 4.2})


class SmallDevice:
    """A device that says how much memory it has."""

    def __init__(self, limit):
        self.device, self.limit = jax.devices()[0], limit

    def memory_stats(self):
        return {"bytes_limit": self.limit, "peak_bytes_in_use": 5}

    def __getattr__(self, name):
        return getattr(self.device, name)


def test_the_batch_is_what_fits(monkeypatch):
    compiled = []

    def compile_(self, size, device):
        compiled.append((self.batch, self.remat))
        self.memory = {"peak_bytes": 100 * self.batch}

    monkeypatch.setattr(train_step.Ours, "_compile", compile_)
    size = dataclasses.replace(TOY, fits=((8, "none"), (4, "none"), (2, "nothing_saveable")))
    (row,) = train_step.measure(size, SmallDevice(150), {}, repeats=1, steps=1)
    assert compiled == list(size.fits)
    assert row["note"].startswith("skipped: batch 2 with remat nothing_saveable does not fit")


def test_sizes_are_what_their_names_say():
    for size, parameters in zip(train_step.ACCELERATOR, (124e6, 360e6, 1.2e9, 294e6), strict=True):
        from train.runtime import flops

        decoder = size.model.decoder(size.vocab, size.length)
        active = flops.active_matmul_parameters(decoder)
        experts = decoder.experts
        total = active if experts is None else active + sum(decoder.ffn_widths) * 3 * 768 * (8 - experts.top_k)
        assert total == pytest.approx(parameters, rel=0.03), size.name

"""Attribution of all neurons of all sites of an encoder, beside captum on the same weights in transformers.

    jaxmodels bench attribution [--out FILE]           # two CPU cores: about twenty minutes; needs captum, torch

One protein, every site (attention q, k, v, output; FFN hidden and output) of every layer, the same Gauss-Legendre nodes
and the same baseline, the activations of the masked protein (captum knows no other: its baseline is an input). captum's
LayerIntegratedGradients goes from one module to the next, all nodes in one batch (its default; one by one it was as
fast). `gate` is another path (all sites at once), `site` is captum's. Error: the worst difference
between the sum over a site and what the target changes by when that site alone is patched, in the share of the change;
for `gate`, of all sites together. Memory is the peak of a process that does nothing else (of `site` and captum: the
FFN's hidden neurons in all layers), less what it held before.
"""

import functools
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jaxmodels
from analysis.attribution import SITES, class_probability, integrated_gradients, record
from benchmarks._report import check_out, machine, publish
from benchmarks._timing import cores, take_turns
from jaxmodels.errors import UserError
from jaxmodels.esm.config import EsmConfig
from jaxmodels.esm.model import Esm

COLUMNS = ("side", "s", "p10", "p90", "times captum", "bar", "result", "worst error", "memory MiB")
BARS = {"gate": 15.0, "site": 1.1}  # times as fast as captum
MODULES = {"q": "attention.self.query", "k": "attention.self.key", "v": "attention.self.value",
           "o": "attention.output.dense", "fc1": "intermediate", "fc2": "output.dense"}
LENGTH, STEPS, LABEL = 350, 20, 2
POINTS = tuple(SITES.values())
ROOT = Path(__file__).resolve().parents[1]


def main(out: str | None) -> None:
    """Measures, prints a table, and writes ``out``."""
    check_out(out)
    for name in ("torch", "transformers", "captum"):
        if importlib.util.find_spec(name) is None:
            raise UserError(f"{name} is not installed; pip install 'jaxmodels[bench]'")
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(folder))
    title = f"attribution of {9 * 6 * 320:,} neurons, {LENGTH} residues, {STEPS} nodes"
    elsewhere = max(row["samples"]["elsewhere"] for row in rows)
    notes = [f"other processes took up to {elsewhere:.0%} of the cores meanwhile",
             " ".join((__doc__ or "").split("\n\n", 2)[2].split())]
    publish(title, rows, COLUMNS, machine(("torch", "transformers", "captum")), notes, out)


def measure(folder: Path, config: EsmConfig | None = None, length: int = LENGTH, repeats: int = 3
            ) -> list[dict[str, Any]]:
    """A row for each side. folder: for the weights, which the sides and the memory's processes load."""
    config = config or EsmConfig.esm2_8m(classes=7, pool="cls")
    jaxmodels.save(Esm(config, rngs=nnx.Rngs(0)), folder / "model")
    np.save(folder / "tokens.npy", protein(length))
    sides = {name: make(folder, POINTS) for name, make in SIDES.items()}
    samples = take_turns(sides, repeats, warmup=1)
    errors, best, rows = completeness(), samples["captum"].median, []
    for name, sample in samples.items():
        ratio, bar = best / sample.median, BARS.get(name)
        rows.append({"side": name, "s": sample.median, "p10": sample.summary()["p10_s"],
                     "p90": sample.summary()["p90_s"], "times captum": ratio, "bar": bar,
                     "result": None if bar is None else "met" if ratio >= bar else "missed",
                     "worst error": errors[name], "memory MiB": peak(folder, name), "samples": sample.summary()})
    return rows


def protein(length: int) -> np.ndarray:
    """int32[1, length + 2]: <cls>, residues, <eos>."""
    residues = np.random.default_rng(0).integers(4, 24, length)
    return np.concatenate([[0], residues, [2]])[None].astype(np.int32)


def masked(tokens: np.ndarray) -> np.ndarray:
    return np.where(tokens > 3, 32, tokens)


def ours(folder: Path, points: Sequence[str], mode: str) -> Callable[[], Any]:
    model, tokens = jaxmodels.load(folder / "model", pool="cls"), jnp.asarray(np.load(folder / "tokens.npy"))
    options = {"output": "class"}
    target = class_probability([LABEL])

    def run() -> Any:
        baseline = record(model, masked(np.asarray(tokens)), points, options)  # captum computes its own, too
        found = integrated_gradients(model, tokens, point=points, target=target, mode=mode, steps=STEPS,
                                     max_steps=STEPS, options=options, baseline=baseline)
        LAST[mode] = jax.block_until_ready(found)

    return run


def theirs(folder: Path, points: Sequence[str]) -> Callable[[], Any]:
    import captum.attr
    import torch
    from transformers import EsmForSequenceClassification

    torch.set_num_threads(cores())
    model = EsmForSequenceClassification.from_pretrained(folder / "model", attn_implementation="sdpa").eval()
    tokens = torch.tensor(np.load(folder / "tokens.npy").astype(np.int64))
    mask = torch.ones_like(tokens)

    def target(ids: Any) -> Any:
        return torch.softmax(model(ids, attention_mask=mask.expand(len(ids), -1)).logits, -1)[:, LABEL]

    def run() -> None:
        found = LAST["captum"] = {}
        for site, path in ((site, MODULES[site]) for site, point in SITES.items() if point in points):
            for layer, block in enumerate(model.esm.encoder.layer):
                explainer = captum.attr.LayerIntegratedGradients(target, block.get_submodule(path))
                got = explainer.attribute(tokens, torch.tensor(masked(tokens.numpy())), n_steps=STEPS,
                                          method="gausslegendre")
                found[f"{layer}.{site}"] = got.detach().numpy()

    return run


SIDES: dict[str, Callable[[Path, Sequence[str]], Callable[[], Any]]] = {
    "gate": functools.partial(ours, mode="gate"), "site": functools.partial(ours, mode="site"), "captum": theirs}
LAST: dict[str, Any] = {}  # what each side found in its last turn


def completeness() -> dict[str, float]:
    """The worst relative error of each side. Of captum's sums by the change that `site` found for the same patch."""
    site, gate, captum = LAST["site"], LAST["gate"], LAST["captum"]
    worst = {"gate": float(gate.error[0] / abs(gate.end[0] - gate.start[0])), "site": 0.0, "captum": 0.0}
    for name, point in SITES.items():
        for layer, start in enumerate(np.asarray(site.start[point])[:, 0]):
            change = float(site.end[0]) - float(start)
            errors = {"site": float(site.error[point][layer, 0]),
                      "captum": abs(float(captum[f"{layer}.{name}"].sum(dtype=np.float64)) - change)}
            worst |= {side: max(worst[side], error / abs(change)) for side, error in errors.items()}
    return worst


def peak(folder: Path, side: str) -> float:
    """MiB that a process of its own needs for a side, above what it held with the model loaded."""
    done = subprocess.run([sys.executable, "-m", "benchmarks.attribution", str(folder), side], capture_output=True,
                          text=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)
    return float(json.loads(done.stdout.splitlines()[-1]))


def _child(folder: str, side: str) -> None:
    run = SIDES[side](Path(folder), POINTS if side == "gate" else ("ffn.hidden",))
    before = _high_water()
    run()
    print(json.dumps((_high_water() - before) / 1024))


def _high_water() -> int:
    """KiB of the most memory this process has held. (getrusage counts what its parent held when it forked.)"""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


if __name__ == "__main__":
    _child(*sys.argv[1:])

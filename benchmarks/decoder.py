"""The decoder against transformers on PyTorch: same weights, same tokens, float32, this machine's processor.

    jaxmodels bench decoder [--out FILE]      (make bench installs PyTorch's CPU build first)

Weights: SmolLM2-135M-Instruct. Text: the licence of this repository. Forward: 4 x 512 tokens, all logits returned.
Decoding: prompts of 64 tokens continued greedily by 64, prefill included, no stop token; tokens/s counts new tokens.
Peer: LlamaForCausalLM, default attention (sdpa), eager ``generate``. FLOP of a forward pass: 2 x (parameters that
multiply, the tied head once) x tokens + attention's 2 x 2 x L x N x H x T²; the part above the diagonal, which neither
side computes in full, is counted. Memory: of processes of their own that load one model and do one kind of work.
"""

import functools
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks._report import check_out, machine, publish
from benchmarks._timing import cores, take_turns
from jaxmodels.errors import UserError

MODEL = "smollm2-135m-instruct"
ROOT = Path(__file__).resolve().parents[1]
BATCH, LENGTH, PROMPT, NEW = 4, 512, 64, 64
TARGETS = {"forward": 1.0, "decode batch 1": 2.0, "decode batch 8": 1.3, "memory forward": 1.0, "memory decode": 1.0}
COLUMNS = ("what", "jaxmodels", "transformers", "unit", "ratio", "target", "reached")


def main(out: str | None) -> None:
    """Measures, prints a table, and writes ``out``. Takes about four minutes on two quiet cores."""
    check_out(out)
    peer = all(map(importlib.util.find_spec, ("torch", "transformers")))
    about = machine()
    with tempfile.TemporaryDirectory() as folder:
        _save(folder)
        rows = [*_speed(folder, peer), *_memory(folder, peer)]
    notes = ["ratio: above 1 is in our favour; medians of interleaved repeats, the JSON holds p10 and p90"]
    if not peer:
        notes.append("no peer: PyTorch and transformers are not installed here (make bench installs them)")
    elsewhere = max(side["elsewhere"] for row in rows for side in row.get("samples", {}).values())
    notes.append(f"other processes took up to {elsewhere:.0%} of the cores meanwhile")
    publish("jaxmodels decoder, SmolLM2-135M, float32", rows, COLUMNS, about, notes, out)


def _save(folder: str) -> None:
    import jaxmodels

    jaxmodels.save(jaxmodels.load(MODEL), Path(folder) / "model")


def _tokens() -> np.ndarray:
    """int32[BATCH, LENGTH] of English text."""
    from jaxmodels.hub.resolve import resolve
    from jaxmodels.hub.tokenizer import load_tokenizer

    ids = load_tokenizer(resolve(MODEL)).encode((ROOT / "LICENSE").read_text("utf-8"))
    return np.resize(np.asarray(ids, np.int32), (BATCH, LENGTH))


def _prompts(batch: int) -> np.ndarray:
    return _tokens().reshape(-1, PROMPT)[:batch]


# Speed


def _speed(folder: str, peer: bool) -> list[dict]:
    work = {"forward": (_tokens(), 7)} | {f"decode batch {b}": (_prompts(b), 7) for b in (1, 8)}
    sides = {"jaxmodels": _Ours(folder)} | ({"transformers": _Theirs(folder)} if peer else {})
    rows = []
    for what, (tokens, repeats) in work.items():
        runs = {name: functools.partial(side.run, what, tokens) for name, side in sides.items()}
        samples = take_turns(runs, repeats)
        amount = BATCH * LENGTH if what == "forward" else len(tokens) * NEW
        row = {"what": what, "unit": "tokens/s", "samples": {name: s.summary() for name, s in samples.items()}}
        row |= {name: amount / s.median for name, s in samples.items()}
        if what == "forward":
            row["flop"] = _forward_flop(sides["jaxmodels"].model.cfg)
        if peer:
            row |= _verdict(what, row["jaxmodels"] / row["transformers"])
            row |= _agreement(what, *[np.asarray(run()) for run in runs.values()])
        rows.append(row)
    return rows


class _Ours:
    """Layers unrolled, as for every model that is used and not trained."""

    def __init__(self, folder: str):
        import jaxmodels

        self.model = jaxmodels.load(Path(folder) / "model", scan_layers=False)

    def run(self, what: str, tokens: np.ndarray):
        import jax

        from jaxmodels.decoder.generate import generate

        if "forward" in what:
            return jax.block_until_ready(self.model(tokens)[0])
        return generate(self.model, tokens.tolist(), NEW, stop_ids=())


class _Theirs:
    def __init__(self, folder: str):
        import torch
        import transformers

        torch.set_num_threads(cores())
        transformers.logging.disable_progress_bar()
        self.torch = torch
        self.model = transformers.LlamaForCausalLM.from_pretrained(Path(folder) / "model", dtype=torch.float32).eval()
        self.model.generation_config = transformers.GenerationConfig(do_sample=False, max_new_tokens=NEW,
                                                                     pad_token_id=0)

    def run(self, what: str, tokens: np.ndarray):
        with self.torch.inference_mode():
            ids = self.torch.from_numpy(tokens).long()
            if "forward" in what:
                return self.model(ids).logits
            return self.model.generate(ids, attention_mask=self.torch.ones_like(ids))[:, PROMPT:].tolist()


def _verdict(what: str, ratio: float) -> dict:
    return {"ratio": ratio, "target": TARGETS[what], "reached": ratio >= TARGETS[what]}


def _agreement(what: str, ours: np.ndarray, theirs: np.ndarray) -> dict:
    """That both did the same work: an answer that differs would make the ratio worthless."""
    if ours.shape != theirs.shape:
        raise RuntimeError(f"{what}: shapes {ours.shape} and {theirs.shape} differ: the two did not do the same work")
    if what == "forward":
        return {"largest_difference_in_std": float(np.abs(ours - theirs).max() / theirs.std())}
    return {"equal_tokens": float((ours == theirs).mean())}


def _forward_flop(cfg) -> float:
    attention = cfg.d_model * cfg.head_dim * 2 * (cfg.num_heads + cfg.num_kv_heads)
    layers = sum(attention + 3 * cfg.d_model * width for width in cfg.ffn_widths)
    scores = 4 * cfg.num_layers * cfg.num_heads * cfg.head_dim * LENGTH**2 * BATCH
    return float(2 * (layers + cfg.d_model * cfg.vocab_size) * BATCH * LENGTH + scores)


# Memory


def _memory(folder: str, peer: bool) -> list[dict]:
    rows = []
    for what in ("memory forward", "memory decode"):
        sides = {name: _in_own_process(name, what, folder) for name in ("jaxmodels", *["transformers"] * peer)}
        row = {"what": what, "unit": "MiB resident", "processes": sides}
        row |= {name: side["resident"] for name, side in sides.items()}
        if peer:
            row |= _verdict(what, row["transformers"] / row["jaxmodels"])
        rows.append(row)
    return rows


def _in_own_process(side: str, what: str, folder: str) -> dict[str, float]:
    if not Path("/proc/self/status").exists():
        raise UserError("bench decoder reads memory from /proc/self/status, which only Linux has; run it on Linux")
    command = [sys.executable, "-m", "benchmarks.decoder", side, what, folder]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise RuntimeError(f"measuring the memory of {side} failed: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _print_memory(side: str, what: str, folder: str) -> None:
    """Runs in a process of its own: works three times, lets go of the results, and prints what stays resident.

    Both runtimes free large results on threads of their own, some time after the call: hence the pause.
    """
    model = _Ours(folder) if side == "jaxmodels" else _Theirs(folder)
    tokens = _tokens() if "forward" in what else _prompts(8)
    for _ in range(3):
        model.run(what, tokens)
    time.sleep(1)
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    mebibytes = {name: int(fields[key].split()[0]) / 1024 for name, key in (("resident", "VmRSS"), ("peak", "VmHWM"))}
    print(json.dumps(mebibytes))


if __name__ == "__main__":
    _print_memory(*sys.argv[1:])

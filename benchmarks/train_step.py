"""A training step on one device: tokens/s, model FLOP/s, MFU, dispatch and memory, beside PyTorch in the same run.

    jaxmodels bench train_step [--out FILE]                                    # two CPU cores: about three minutes
    JAX_OPTIMIZATION_LEVEL=O1 jaxmodels bench train_step --out h100.json       # one H100 (PyTorch with CUDA: peers too)
    python -m benchmarks.train_step --sizes "dense 124M" --batch 8 --repeats 5 --steps 5 --no-peers   # some, quicker

What runs is what ``jaxmodels run lm_dense_pretrain`` (``lm_moe_pretrain``) compiles: its blueprint, objective, AdamW,
clipping and the guard against non-finite steps. Parameters and moments are float32 everywhere. Peers start from the
same weights and train on the same rows: the Hugging Face model of the family with AdamW (fused), clipping and, in
bfloat16, autocast, as a plain loop (eager, torch.compile) and, on a CPU, under transformers' Trainer (if accelerate is
there). Not the same: the peers' MoE has no balancing (z-loss, biases), and the peers count no correct tokens. Model
FLOPs count no recomputation; MFU is of the dense bf16 peak, and ``of matmul`` the share of what one large matrix
product in the compute dtype reached in the same run.
"""

import argparse
import dataclasses
import functools
import gc
import importlib.util
import math
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks._alone import Room
from benchmarks._report import check_out, machine, publish
from benchmarks._timing import Samples, cores, take_turns
from jaxmodels.errors import UserError
from train.pretrain_config import DataConfig, ModelConfig, PretrainConfig
from train.runtime import flops
from train.settings import LoopConfig, MeshConfig, OptimizerConfig

FORMULA = ("model FLOPs of a token = 6 x active matmul parameters (top-k experts, router, head; no look-up) "
           "+ 12 x layers x heads x head width x mean keys seen (train/runtime/flops.py)")
COLUMNS = ("model", "side", "tokens/s", "ms", "p10", "p90", "TFLOP/s", "MFU", "of matmul", "ours/it", "dispatch ms",
           "floor ms", "memory MiB", "note")
AGREE = {"float32": 1e-3, "bfloat16": 2e-2}  # relative difference of the first loss, above which work differed
PATIENCE = 40  # seconds to wait for other benchmarks on the device
ROOM = 0.92  # of a device's memory: the allocator needs a little, and fragments


@dataclasses.dataclass(frozen=True)
class Size:
    """A model, its rows, and (batch, remat) in the order in which they are tried until one fits the device."""

    name: str
    model: ModelConfig
    vocab: int
    length: int
    fits: tuple[tuple[int, str], ...]


_CPU = ModelConfig(d_model=256, layers=4, heads=4, kv_heads=4, active_width=768)
CPU = tuple(Size(name, model, 4096, 256, ((8, "none"),)) for name, model in (
    ("dense 5M", _CPU), ("8 experts top-2", dataclasses.replace(_CPU, experts=8))))

_124M = ModelConfig(d_model=768, layers=12, heads=12, kv_heads=12, active_width=2048, dtype="bfloat16")
_FITS = ((32, "none"), (16, "none"), (8, "none"), (8, "nothing_saveable"), (4, "nothing_saveable"),
         (1, "nothing_saveable"))
ACCELERATOR = tuple(Size(name, model, 50_304, 2048, _FITS) for name, model in (
    ("dense 124M", _124M),  # GPT-2 small (Radford et al. 2019, table 2) with a gated layer of 8/3 d
    ("dense 350M", dataclasses.replace(_124M, d_model=1024, layers=24, heads=16, kv_heads=16, active_width=2816)),
    ("dense 1B", dataclasses.replace(_124M, d_model=2048, layers=18, heads=32, kv_heads=8, active_width=8192)),
    ("8 experts top-2, 124M active", dataclasses.replace(_124M, experts=8))))


class Skipped(Exception):
    """Why a contestant does not run here; becomes the note of its row."""


def main(out: str | None, *, sizes: Sequence[str] = (), batch: int | None = None, repeats: int | None = None,
         steps: int | None = None, no_peers: bool = False) -> None:
    """Measures, prints a table, and writes ``out``. sizes: names; default: all. batch: the only one that is tried,
    without remat."""
    check_out(out)
    room = Room()
    torch_on_gpu = not no_peers and _torch_has_cuda()
    if torch_on_gpu:  # read when jax starts its backend: by default it takes three quarters of the memory at once
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        if "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ:  # the older name; both at once are an error
            os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", "0.5")
    about = machine(("torch", "transformers", "accelerate"))
    device = jax.devices()[0]
    on_cpu = device.platform == "cpu"
    chosen = _chosen(CPU if on_cpu else ACCELERATOR, sizes, batch)
    peers = {} if no_peers else _peers(device.platform, torch_on_gpu)
    repeats, steps = repeats or (9 if on_cpu else 15), steps or (1 if on_cpu else 10)
    rows = []
    for size in chosen:
        rows += measure(size, device, peers, repeats=repeats, steps=steps, room=room)
    elsewhere = max((row["samples"]["elsewhere"] for row in rows if "samples" in row), default=math.nan)
    notes = [FORMULA, "ms: one step, median; p10, p90: over the repeats, in which the sides take turns. ours/it: above "
             "1 is in our favour", "dispatch ms: host time to hand over a step, the device idle; floor ms: a program "
             "that does nothing with as many arrays", "memory: ours as the compiler plans a step (the JSON has more)",
             f"other processes took up to {elsewhere:.0%} of the cores meanwhile"]
    publish("a training step on one device", rows, COLUMNS, about, notes, out)


def _chosen(known: Sequence[Size], names: Sequence[str], batch: int | None) -> list[Size]:
    by_name = {size.name: size for size in known}
    for name in names:
        if name not in by_name:
            raise UserError(f"size {name!r} is unknown on this device; choose from {', '.join(by_name)}")
    chosen = [by_name[name] for name in names or by_name]
    return [dataclasses.replace(size, fits=((batch, "none"),)) for size in chosen] if batch else chosen


def measure(size: Size, device: Any, peers: dict[str, Callable[..., Any] | str], *, repeats: int, steps: int,
            room: Room | None = None) -> list[dict[str, Any]]:
    """A row for each side on one size; peers: name -> (size, batch, weights, device) -> side, or why there is none."""
    skipped: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        try:
            ours = Ours(size, device, steps)
            first = {"jaxmodels": ours.run()}
        except Skipped as reason:
            return [{"model": size.name, "side": "jaxmodels", "note": f"skipped: {reason}"}]
        except jax.errors.JaxRuntimeError as error:
            return [{"model": size.name, "side": "jaxmodels", "note": f"skipped: {_one_line(error)}"}]
        sides: dict[str, Any] = {"jaxmodels": ours}
        for name, make in peers.items():
            if isinstance(make, str):
                skipped[name] = make
                continue
            try:
                start = time.perf_counter()
                side = make(size, ours.batch, ours.save(Path(folder) / "model"), steps)
                first[name] = side.run()
                side.compile_seconds = time.perf_counter() - start
                sides[name] = side
            except Skipped as reason:
                skipped[name] = str(reason)
            except Exception as error:  # whatever a peer cannot do here is no reason to lose the other figures
                skipped[name] = f"{type(error).__name__}: {_one_line(error)}"
    _check_agreement(size, first)
    matmul = Matmul(size.model.dtype, device)
    ours.dispatch_seconds.clear()
    runs = {name: side.run for name, side in sides.items()} | {"matmul": matmul.run}
    with (room or Room()).alone(PATIENCE) as alone:
        samples = take_turns(runs, repeats, warmup=1)
    ours.note += "" if alone else "; not alone on the device"
    bound = matmul.flop / samples.pop("matmul").median
    rows = [_row(size, name, side, samples[name], ours, samples["jaxmodels"], bound, steps, first[name], device)
            for name, side in sides.items()]
    rows += [{"model": size.name, "side": name, "note": f"skipped: {why}"} for name, why in skipped.items()]
    for side in sides.values():
        side.close()
    del ours, sides, runs, matmul
    gc.collect()
    return rows


def _row(size: Size, name: str, side: Any, samples: Samples, ours: "Ours", our_samples: Samples, bound: float,
         steps: int, first_loss: float, device: Any) -> dict[str, Any]:
    summary = samples.summary()
    seconds = summary["median_s"] / steps
    rate = ours.flops / seconds
    row = {
        "model": size.name, "side": name, "tokens/s": ours.tokens / seconds, "ms": seconds * 1e3,
        "p10": summary["p10_s"] / steps * 1e3, "p90": summary["p90_s"] / steps * 1e3, "TFLOP/s": rate / 1e12,
        "MFU": flops.mfu(ours.flops, seconds, 1, device), "of matmul": rate / bound,
        "ours/it": None if side is ours else samples.median / our_samples.median,
        "memory MiB": side.memory.get("peak_bytes", 0) / 2**20 or None, "note": side.note,
        # only in the JSON
        "precision": size.model.dtype, "length": size.length, "batch": ours.batch, "remat": ours.remat,
        "parameters": ours.parameters, "active_matmul_parameters": ours.active, "model_flops_per_step": ours.flops,
        "flop_formula": FORMULA, "matmul_flops_per_s": bound, "memory": side.memory, "first_loss": first_loss,
        "steps_per_repeat": steps, "first_step_s": side.compile_seconds, "samples": summary,
    }
    if side is ours:
        dispatch, floor = statistics.median(ours.dispatch_seconds), ours.floor()
        row |= {"dispatch ms": dispatch * 1e3, "floor ms": floor * 1e3, "dispatch_over_floor": dispatch / floor,
                "arrays": ours.arrays}
    return row


def _check_agreement(size: Size, first: dict[str, float]) -> None:
    """That all did the same work: same weights and rows give the same loss before the first update."""
    for name, loss in first.items():
        if not abs(loss - first["jaxmodels"]) <= AGREE[size.model.dtype] * abs(first["jaxmodels"]):
            raise RuntimeError(f"{size.name}: the first loss of {name} is {loss:.5f}, ours {first['jaxmodels']:.5f}: "
                               "they did not do the same work")


# Our side


class Ours:
    """The step as the training loop compiles and calls it. Raises Skipped if no batch fits the device."""

    def __init__(self, size: Size, device: Any, steps: int = 1):
        limit = (device.memory_stats() or {}).get("bytes_limit")
        start = time.perf_counter()
        for self.batch, self.remat in size.fits:
            try:
                self._compile(size, device)
                if limit is None or self.memory["peak_bytes"] <= ROOM * limit:
                    break
            except jax.errors.JaxRuntimeError as error:  # TPUs find out while they compile
                if "RESOURCE_EXHAUSTED" not in str(error):
                    raise
        else:
            gib = f"{limit / 2**30:.1f} GiB" if limit else "the device's memory"
            raise Skipped(f"batch {self.batch} with remat {self.remat} does not fit {gib}")
        self.compile_seconds, self.steps, self.device = time.perf_counter() - start, steps, device
        self.note = f"batch {self.batch} x {size.length}, {size.model.dtype}, remat {self.remat}"
        self.dispatch_seconds: list[float] = []
        self.state = jax.block_until_ready(self.plan.init())
        self.parameters = sum(leaf.size for leaf in jax.tree.leaves(self.state["params"]))
        rows = {"tokens": _tokens(size, self.batch), "segments": np.ones((self.batch, size.length), np.int32),
                "bytes": np.full((self.batch,), size.length, np.int32)}
        self.rows = jax.tree.map(jax.device_put, rows, {name: s.sharding for name, s in self.placed.items()})

    def _compile(self, size: Size, device: Any) -> None:
        from train import pretrain
        from train.runtime.loop import abstract_batch
        from train.runtime.mesh import make_mesh, use_mesh
        from train.runtime.step import make_step

        cfg = PretrainConfig(
            model=dataclasses.replace(size.model, remat=self.remat), mesh=MeshConfig(data=1),
            data=DataConfig(vocab_size=size.vocab, length=size.length, batch=self.batch),
            # a rate with which random rows stay harmless over all repeats
            optimizer=OptimizerConfig(learning_rate=1e-4, schedule="constant", warmup=0, decay=0), loop=LoopConfig())
        decoder = cfg.model.decoder(size.vocab, size.length)
        mesh = make_mesh(cfg.mesh, [device])
        with use_mesh(mesh):
            self.plan = pretrain.make_plan(cfg, decoder, mesh)
            self.placed = abstract_batch(pretrain.batch_shapes(cfg), mesh, 1)
            step = make_step(pretrain.train_step(cfg, self.plan, decoder), self.plan, mesh)
            lowered = step.lower(self.plan.abstract, self.placed)
            self.compiled = lowered.compile()
        self.arrays = len(jax.tree.leaves(self.plan.abstract))
        self.tokens = self.batch * size.length
        self.flops = flops.train_flops_per_token(decoder, size.length) * self.tokens
        self.active = flops.active_matmul_parameters(decoder)
        self.memory = _planned_memory(self.compiled)

    def run(self) -> float:
        """`steps` steps, the device idle before and after; the first step's loss."""
        start = time.perf_counter()
        self.state, metrics = self.compiled(self.state, self.rows)
        self.dispatch_seconds.append(time.perf_counter() - start)
        loss = metrics["loss"]
        for _ in range(self.steps - 1):
            self.state, metrics = self.compiled(self.state, self.rows)
        jax.block_until_ready((self.state, metrics))
        stats = self.device.memory_stats() or {}
        if "peak_bytes_in_use" in stats:  # since the process started: of all sizes so far
            self.memory["device_peak_bytes_so_far"] = stats["peak_bytes_in_use"]
        return float(loss)

    def floor(self, repeats: int = 50) -> float:
        """Seconds to dispatch a program that hands as many (tiny) donated arrays back as a flat list."""
        arrays = [jax.device_put(np.float32(i), self.device) for i in range(self.arrays)]
        nothing = jax.jit(lambda arrays: arrays, donate_argnums=0).lower(arrays).compile()
        seconds = []
        for _ in range(repeats):
            jax.block_until_ready(arrays)
            start = time.perf_counter()
            arrays = nothing(arrays)
            seconds.append(time.perf_counter() - start)
        return statistics.median(seconds)

    def save(self, folder: Path) -> Path:
        """The initial weights, for the peers: under Hugging Face names. (The state has moved on by then.)"""
        if not folder.exists():
            import jaxmodels

            jaxmodels.save(self.plan.model(self.plan.init()), folder)
        return folder

    def close(self) -> None:
        del self.state, self.compiled, self.rows


def _planned_memory(compiled: Any) -> dict[str, int]:
    """What the compiler plans for one step on one device; {} where it does not tell."""
    planned = compiled.memory_analysis()
    if planned is None:
        return {}
    kinds = ("argument", "output", "temp", "alias")
    sizes = {f"{kind}_bytes": int(getattr(planned, f"{kind}_size_in_bytes")) for kind in kinds}
    peak = sizes["argument_bytes"] + sizes["output_bytes"] + sizes["temp_bytes"] - sizes["alias_bytes"]
    return {"peak_bytes": peak, **sizes}


def _tokens(size: Size, batch: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, size.vocab, (batch, size.length), dtype=np.int32)


class Matmul:
    """A large square matrix product: what the device reaches where nothing but the product matters."""

    def __init__(self, dtype: str, device: Any):
        n, self.count = (2048, 2) if device.platform == "cpu" else (8192, 20)
        self.flop = 2.0 * n**3 * self.count
        x = jax.device_put((np.random.default_rng(0).standard_normal((n, n)) / math.sqrt(n)).astype(np.float32), device)
        self.x = x.astype(dtype)
        self.product = jax.jit(lambda x: jax.lax.fori_loop(0, self.count, lambda i, y: jnp.dot(y, x), x))

    def run(self) -> None:
        jax.block_until_ready(self.product(self.x))


# Peers


def _peers(platform: str, torch_on_gpu: bool) -> dict[str, Callable[..., Any] | str]:
    names = ("torch eager", "torch compile", *["HF Trainer"] * (platform == "cpu"))
    if not all(map(importlib.util.find_spec, ("torch", "transformers"))):
        return dict.fromkeys(names, "PyTorch or transformers is not installed here (make torch installs them)")
    if platform != "cpu" and not (platform == "gpu" and torch_on_gpu):
        return dict.fromkeys(names, f"this PyTorch has no {platform} to run on")
    device = "cpu" if platform == "cpu" else "cuda"
    found: dict[str, Callable[..., Any] | str] = {
        "torch eager": functools.partial(Torch, device=device),
        "torch compile": functools.partial(Torch, device=device, compiled=True)}
    if platform == "cpu":
        found["HF Trainer"] = (Trainer if importlib.util.find_spec("accelerate") else
                               "transformers.Trainer needs accelerate, which is not installed here")
    return found


class Torch:
    """A plain loop over the Hugging Face model: forward, backward, clip, AdamW."""

    def __init__(self, size: Size, batch: int, weights: Path, steps: int, *, device: str, compiled: bool = False):
        import torch

        self.torch, self.device, self.steps, self.note, self.memory = torch, device, steps, "", {}
        self.model = _load_torch(weights, device)
        rate = {"lr": 1e-4, "betas": (0.9, 0.95), "weight_decay": 0.1}
        try:
            self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=True, **rate)
        except RuntimeError:
            self.optimizer, self.note = torch.optim.AdamW(self.model.parameters(), **rate), "AdamW not fused"
        self.ids = torch.from_numpy(_tokens(size, batch)).long().to(device)
        self.autocast = functools.partial(torch.autocast, device, torch.bfloat16, size.model.dtype == "bfloat16")
        self.forward = torch.compile(self.model) if compiled else self.model

    def run(self) -> float:
        losses = [self._step() for _ in range(self.steps)]
        if self.device == "cuda":
            self.torch.cuda.synchronize()
            self.memory["peak_bytes"] = self.torch.cuda.max_memory_allocated()
        return float(losses[0])

    def _step(self) -> Any:
        with self.autocast():
            loss = self.forward(input_ids=self.ids, labels=self.ids, use_cache=False).loss
        loss.backward()
        self.torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def close(self) -> None:
        del self.model, self.forward, self.optimizer
        self.torch.compiler.reset()
        if self.device == "cuda":
            gc.collect()
            self.torch.cuda.empty_cache()
            self.torch.cuda.reset_peak_memory_stats()


class Trainer:
    """transformers.Trainer on a CPU, one step for each call: it trains on a thread of its own and waits for its turn at
    the end of every step, so that a turn holds all that Trainer does for a step, the next batch included."""

    note = ""

    def __init__(self, size: Size, batch: int, weights: Path, steps: int):
        import torch
        import transformers

        self.steps, self.memory, self.losses, self.error = steps, {}, [], None
        self.go, self.done = threading.Semaphore(0), threading.Semaphore(0)
        self.over = self.stopping = False
        ids = torch.from_numpy(_tokens(size, batch)).long()
        data = _Repeated([{"input_ids": row, "labels": row} for row in ids])
        self.folder = tempfile.TemporaryDirectory()
        arguments = transformers.TrainingArguments(
            self.folder.name, per_device_train_batch_size=batch, max_steps=1_000_000, learning_rate=1e-4,
            adam_beta2=0.95, weight_decay=0.1, max_grad_norm=1.0, lr_scheduler_type="constant", use_cpu=True,
            report_to=[], disable_tqdm=True, save_strategy="no", logging_strategy="no")
        trainer_of = _trainer_class(self)
        model = _load_torch(weights, "cpu")
        self.trainer = trainer_of(model, arguments, train_dataset=data, callbacks=[_turns(self)])
        self.trainer.remove_callback(transformers.PrinterCallback)  # it would print between our lines

        def work() -> None:
            torch.set_num_threads(cores())  # is of a thread
            self.go.acquire()
            try:
                self.trainer.train()
            except BaseException as error:
                self.error = error
            self.over = True
            self.done.release()

        self.thread = threading.Thread(target=work, name="trainer", daemon=True)
        self.thread.start()

    def run(self) -> float:
        before = len(self.losses)
        for _ in range(self.steps):
            self.go.release()
            self.done.acquire()
            if self.over:
                raise RuntimeError("Trainer ended early") from self.error
        return float(self.losses[before])

    def close(self) -> None:
        self.stopping = True
        self.go.release()
        self.thread.join(timeout=60)
        self.folder.cleanup()


def _turns(side: Trainer) -> Any:
    import transformers

    class Turns(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            side.done.release()
            side.go.acquire()
            control.should_training_stop = side.stopping

    return Turns()


def _trainer_class(side: Trainer) -> Any:
    import torch
    import transformers

    class Recording(transformers.Trainer):
        def training_step(self, *arguments, **keywords):
            loss = super().training_step(*arguments, **keywords)
            side.losses.append(loss.detach())
            return loss

        def _get_train_sampler(self, *arguments, **keywords):
            return torch.utils.data.SequentialSampler(self.train_dataset)  # the same rows as everyone, in order

    return Recording


class _Repeated:
    """A data set that never ends, of the same few rows."""

    def __init__(self, rows: Sequence[Any]):
        self.rows = rows

    def __len__(self) -> int:
        return 1_000_000 * len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.rows[index % len(self.rows)]


def _load_torch(weights: Path, device: str) -> Any:
    import torch
    import transformers

    torch.set_num_threads(cores())
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()  # its report that balancing biases have no place in its model
    return transformers.AutoModelForCausalLM.from_pretrained(weights, dtype=torch.float32).to(device).train()


def _torch_has_cuda() -> bool:
    if importlib.util.find_spec("torch") is None:
        return False
    import torch

    return torch.cuda.is_available()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", help="a JSON file for the table")
    parser.add_argument("--sizes", nargs="+", default=(), help="names in the table's first column; default: all")
    parser.add_argument("--batch", type=int, help="the only batch that is tried, without remat")
    parser.add_argument("--repeats", type=int, help="turns of every side (default 15, on a CPU 9)")
    parser.add_argument("--steps", type=int, help="steps of a turn (default 10, on a CPU 1)")
    parser.add_argument("--no-peers", action="store_true", help="ours alone")
    try:
        main(**vars(parser.parse_args()))
    except UserError as error:
        sys.exit(str(error))

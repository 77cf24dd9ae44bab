"""ESM-2 650M on one GPU: a training step (tokens/s, MFU) and the attribution of all its 380,160 neurons.

    python3 -m benchmarks.esm_gpu [--seconds 120] [--out FILE] [--variants ATTENTION:REMAT:BATCH,...] [--tiny]

The training step is what ``jaxmodels run esm_pretrain model.size=esm2_650m model.dtype=bfloat16 data.length=1024``
compiles: its blueprint, objective, AdamW, clipping and the guard against non-finite steps; parameters and moments are
float32. Rows are packed from uniprot20k ($JAXMODELS_DATA) and masked as in training; without it, from random proteins
of such lengths. Tokens are those that are no padding; model FLOPs count the keys that a query sees in its own protein
and no recomputation; MFU is of the dense bf16 peak, `of matmul` of what a large product reached in the same run.
First, attention alone is timed by every implementation (both ways); the fastest that agrees is trained with.

Attribution: one protein of 350 residues, every site of every layer, Gauss-Legendre nodes, float32 at highest precision,
the probability of a residue at one position. `gate` is one path for all sites; `site` one for each, of which every n-th
layer is run, as many as there is time for (at two of the six points, if it is short), and the seconds are those of all
sites if the others cost as much.

Every step may fail or be left out for lack of time without harm to the others; FILE is written after each. Work is done
by processes of their own, one after the other, which are ended when the time is over: training, attribution, the other
variants of training, then transformers' EsmForMaskedLM (sdpa, bfloat16 autocast, fused AdamW, clipping) on 16 rows of
one protein each. (`compile_s` is little where an earlier call on the machine left the program in jax's cache.)
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxmodels._platform import prepare_jax
from jaxmodels.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
TARGETS = {"tokens/s": 90_000.0, "attribution seconds": 10.0}  # of the 650M configuration on one H100
SITE, GATE = 25, 30  # seconds of the time that are kept for attribution
FEW = 45  # seconds below which `site` is measured at two points
SAFE = "cudnn:products_saveable:24"  # what is trained with when the first choice leaves no result
NODES, LABEL, POSITION = 20, 5, 100  # nodes of a path; the residue asked for, and where


@dataclasses.dataclass(frozen=True)
class Variant:
    """How a step is trained. attention: "best" is the fastest one that agreed."""

    attention: str
    remat: str
    batch: int


@dataclasses.dataclass(frozen=True)
class Size:
    """What is measured. chunk: nodes at once, of gate and of site. repeats: of three steps, after two to warm up."""

    model: str
    dtype: str
    length: int
    variants: tuple[Variant, ...]
    residues: int
    chunk: tuple[int, int]
    attention_batch: int
    repeats: int
    options: dict[str, int] = dataclasses.field(default_factory=dict)


H100 = Size("esm2_650m", "bfloat16", 1024,
            (Variant("best", "products_saveable", 32), Variant("best", "none", 16),
             Variant("best", "products_saveable", 56), Variant("cudnn", "products_saveable", 32),
             Variant("xla", "products_saveable", 16)),
            350, (21, 21), 16, 4)
TINY = Size("own", "float32", 64, (Variant("best", "products_saveable", 2), Variant("xla", "none", 2)), 20, (3, 3), 2,
            1, {"d_model": 32, "layers": 3, "heads": 2})


class Record:
    """What was found so far: printed as it comes, and in a file."""

    def __init__(self, out: str | None, deadline: float):
        self.out, self.deadline = out, deadline
        self.steps: list[dict[str, Any]] = []
        if out and Path(out).exists():
            self.steps = json.loads(Path(out).read_text("utf-8"))["steps"]

    def left(self) -> float:
        return self.deadline - time.time()

    def add(self, name: str, **found: Any) -> None:
        self.steps.append({"step": name, "seconds left": round(self.left(), 1), **found})
        print(json.dumps(self.steps[-1]), flush=True)
        if self.out:
            part = Path(f"{self.out}.part")
            part.write_text(json.dumps({"steps": self.steps}, indent=2) + "\n", "utf-8")
            part.replace(self.out)

    def attempt(self, name: str, needs: float, work: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
        """What ``work`` found, or None where it failed or less than ``needs`` seconds are left."""
        if self.left() < needs:
            self.add(name, skipped=f"{needs:.0f} s are needed")
            return None
        start = time.perf_counter()
        try:
            found = work()
        except Exception as error:  # whatever fails here is no reason to lose what follows
            self.add(name, failed=f"{type(error).__name__}: {' '.join(str(error).split())[:600]}",
                     wall_s=time.perf_counter() - start)
            return None
        self.add(name, **found, wall_s=time.perf_counter() - start)
        return found


def main(out: str | None = None, seconds: float = 120, tiny: bool = False, variants: str = "") -> None:
    """Measures in processes of their own, one after the other; each is ended when its time is over."""
    if not tiny and not Path("/dev/nvidia0").exists():
        raise UserError("esm_gpu needs an NVIDIA GPU, and there is none; --tiny tries the program on a CPU")
    prepare_jax()  # of the children: what is compiled once is there for the next call on this machine
    with tempfile.TemporaryDirectory() as folder:
        file = Path(out or Path(folder) / "found.json").resolve()
        file.unlink(missing_ok=True)
        end = time.time() + seconds

        def run(side: str, until: float, variants: str = "", *, at_most: float = end) -> None:
            """Begins no step after `until`, and is ended at `at_most`."""
            name = f"{side} {variants}".strip()
            if until - time.time() < 5:
                print(f"{name}: left out, no time", flush=True)
                return
            command = [sys.executable, "-m", "benchmarks.esm_gpu", "--side", side, "--deadline", str(until), "--out",
                       str(file), "--variants", variants, *(["--tiny"] if tiny else [])]
            try:
                left = at_most - time.time()
                code = subprocess.run(command, cwd=ROOT, env=_environment(), timeout=left).returncode
                print(f"{name}: ended with {code}", flush=True)
            except subprocess.TimeoutExpired:
                print(f"{name}: the time is over", flush=True)

        if variants:
            run("train", end, variants)
        else:
            # A step that compiles for longer than planned may cost attribution its `site`, but not its `gate`.
            run("train", end - SITE - GATE, at_most=end - GATE)
            if not any("tokens/s" in step for step in _read(file)):
                # A kernel that reads where it must not leaves its whole process without a GPU.
                run("train", end - SITE - GATE, SAFE, at_most=end - GATE)
            run("attribution", end)
            run("train", end, "others")
        run("peer", end)


def _environment() -> dict[str, str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    if not {"XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"} & environment.keys():
        environment["XLA_CLIENT_MEM_FRACTION"] = "0.93"  # by default jax takes three quarters
    return environment


def _read(file: Path) -> list[dict[str, Any]]:
    return json.loads(file.read_text("utf-8"))["steps"] if file.exists() else []


# A training step


def train_side(record: Record, size: Size, variants: str) -> None:
    """variants: ATTENTION:REMAT:BATCH,...; nothing: attention alone, and the first variant with the fastest; "others":
    the rest."""
    import jax

    from benchmarks._report import machine

    device, state = jax.devices()[0], Found()
    chosen = size.variants[:1]
    if variants == "others":
        chosen = size.variants[1:]
        state.attention = {step["step"].split()[1]: step["ms"] for step in record.steps if step.get("agrees")}
        state.bound = next((step["TFLOP/s"] * 1e12 for step in record.steps if step["step"] == "matmul"), None)
    elif variants:
        chosen = tuple(Variant(*one.split(":")[:2], int(one.split(":")[2])) for one in variants.split(","))
    if variants != "others":
        record.attempt("machine", 0, lambda: {"deadline": record.deadline, **machine(("torch", "transformers"))})
        record.attempt("matmul", 0, functools.partial(matmul, size, device, state))
    most = max(size.attention_batch, *(variant.batch for variant in chosen))
    rows = packed_rows(size, most)
    if variants != "others":
        record.add("rows", **rows.about)
    if not variants:
        for name in ("xla", "cudnn", "cudnn_packed"):
            record.attempt(f"attention {name}", 30, functools.partial(attention, size, rows, name, state))
        if not {"cudnn", "cudnn_packed"} & state.attention.keys():
            record.attempt("attention triton", 30, functools.partial(attention, size, rows, "triton", state))
    done = {step["step"] for step in record.steps}
    for variant in chosen:
        name = state.fastest() if variant.attention == "best" else variant.attention
        label = f"train {name}, {variant.remat}, batch {variant.batch}"
        if label not in done:
            one = dataclasses.replace(variant, attention=name)
            record.attempt(label, 25, functools.partial(train, size, one, rows, device, state))


@dataclasses.dataclass
class Found:
    """What later steps need of earlier ones."""

    bound: float | None = None  # FLOP/s of a large product
    reference: Any = None  # what XLA's attention gives
    attention: dict[str, float] = dataclasses.field(default_factory=dict)  # seconds, of those that agree

    def fastest(self) -> str:
        return min(self.attention, key=self.attention.__getitem__) if self.attention else "auto"


@dataclasses.dataclass
class Rows:
    """Arrays int32[B, T] by field, and what they are."""

    arrays: dict[str, Any]
    about: dict[str, Any]

    def of(self, batch: int) -> dict[str, Any]:
        return {name: array[:batch] for name, array in self.arrays.items()}


def packed_rows(size: Size, count: int) -> Rows:
    """Rows as training sees them, at random among those of the corpus."""
    import numpy as np

    from jaxmodels.esm.alphabet import CLS, EOS, PAD, STANDARD, encode
    from train.data.masking import Masking
    from train.data.packing import pack_whole
    from train.data.proteins import crops, distinct, protein_source

    rng = np.random.default_rng(0)
    try:
        proteins = distinct(protein_source("uniprot20k").proteins)[::8]
        pieces = [encode(piece)[0] for protein in proteins for piece in crops(protein.sequence, size.length - 2)]
        source = f"uniprot20k, every 8th of the distinct proteins, {len(pieces)} pieces"
    except UserError:  # the same median and tail as uniprot20k's, whose logarithm is near normal
        lengths = np.clip(np.exp(rng.normal(np.log(345), 0.75, 2400)), 10, size.length - 2).astype(int)
        pieces = [np.concatenate([[CLS], rng.integers(STANDARD[0], STANDARD[-1] + 1, n), [EOS]]).astype(np.int32)
                  for n in lengths]
        source = "random proteins of lognormal length, median 345 residues"
    packed = pack_whole(pieces, size.length, PAD, 0)
    chosen = rng.permutation(len(packed["tokens"]))[:count]
    if len(chosen) < count:
        raise UserError(f"{len(chosen)} rows are there, {count} are needed")
    masked = [Masking()({name: packed[name][row] for name in ("tokens", "segments")}, rng) for row in chosen]
    arrays = {name: np.stack([row[name] for row in masked]).astype(np.int32) for name in ("tokens", "segments",
                                                                                         "targets")}
    return Rows(arrays, {"source": source, "rows": count, "length": size.length, **census(arrays["segments"])})


def census(segments: Any) -> dict[str, float]:
    """tokens that are no padding, the mean number of keys that one of them sees, the most proteins of a row."""
    import numpy as np

    sizes = np.concatenate([np.bincount(row)[1:] for row in segments]).astype(float)
    return {"tokens": int(sizes.sum()), "mean keys": float((sizes**2).sum() / sizes.sum()),
            "most proteins": int(segments.max()), "padding": float((segments == 0).mean())}


def matmul(size: Size, device: Any, state: Found) -> dict[str, Any]:
    from benchmarks.train_step import Matmul

    product = Matmul(size.dtype, device)
    product.run()
    state.bound = product.flop / min(timed(product.run) for _ in range(3))
    return {"TFLOP/s": state.bound / 1e12}


def timed(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def attention(size: Size, rows: Rows, name: str, state: Found) -> dict[str, Any]:
    """Forward and backward of one layer's attention, on the rows' own proteins."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jaxmodels.layers import flash
    from jaxmodels.layers.attention import attend
    from jaxmodels.taps import NO_TAPS

    config = encoder(size)
    N, H = config.num_heads, config.head_dim
    segments = jnp.asarray(rows.of(size.attention_batch)["segments"])
    B, T = segments.shape
    real = (segments > 0)[:, :, None, None]
    q, k, v, weight = jax.random.normal(jax.random.key(0), (4, B, T, N, H), jnp.dtype(size.dtype))

    @jax.jit
    def both(q, k, v, segments):
        groups = flash.groups(segments, name == "cudnn_packed")
        allowed = (segments[:, :, None] == segments[:, None, :]) & (segments > 0)[:, None, :]

        def total(q, k, v):
            y = attend(q, k.swapaxes(1, 2), v.swapaxes(1, 2), allowed, NO_TAPS.probe(segments > 0), causal=False,
                       implementation=name, groups=groups)
            return jnp.where(real, y * weight, 0).astype(jnp.float32).sum(), y

        (_, y), gradient = jax.value_and_grad(total, (0, 1, 2), has_aux=True)(q, k, v)
        return [jnp.where(real, part, 0) for part in (y, *gradient)]

    start = time.perf_counter()
    compiled = both.lower(q, k, v, segments).compile()
    compile_seconds = time.perf_counter() - start
    found = [np.asarray(part, np.float32) for part in compiled(q, k, v, segments)]
    run = lambda: jax.block_until_ready([compiled(q, k, v, segments) for _ in range(5)])  # noqa: E731
    run()
    seconds = min(timed(run) for _ in range(3)) / 5
    if name == "xla":
        state.reference = found
    apart = None
    if state.reference is not None:
        apart = [float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(found, state.reference, strict=True)]
    agrees = apart is not None and max(apart) < 3e-2
    if agrees:
        state.attention[name] = seconds
    census_ = census(np.asarray(segments))
    return {"ms": seconds * 1e3, "compile_s": compile_seconds, "apart from xla (y, dq, dk, dv)": apart,
            "agrees": agrees, "model TFLOP/s": 12 * N * H * census_["mean keys"] * census_["tokens"] / seconds / 1e12,
            "temporary MiB": compiled.memory_analysis().temp_size_in_bytes / 2**20}


def encoder(size: Size) -> Any:
    from train.protein_config import EncoderConfig

    return EncoderConfig(size=size.model, dtype=size.dtype, **size.options).encoder()


def configuration(size: Size, variant: Variant) -> Any:
    """What ``jaxmodels run esm_pretrain`` would be told."""
    from train.protein_config import EncoderConfig, ProteinDataConfig, ProteinPretrainConfig
    from train.settings import LoopConfig, MeshConfig, OptimizerConfig

    model = EncoderConfig(size=size.model, dtype=size.dtype, remat=variant.remat, attention=variant.attention,
                          **size.options)
    # 4e-4, 0.98 and 0.01: Lin et al. 2023
    return ProteinPretrainConfig(
        model=model, data=ProteinDataConfig(length=size.length, batch=variant.batch), mesh=MeshConfig(data=1),
        optimizer=OptimizerConfig(learning_rate=4e-4, beta2=0.98, weight_decay=0.01), loop=LoopConfig())


def lowered_step(size: Size, variant: Variant, device: Any) -> tuple[Any, Any, Any]:
    """(blueprint, where a batch lies, the lowered step), as the training loop compiles and calls it."""
    from train import protein_pretrain
    from train.runtime.loop import abstract_batch
    from train.runtime.mesh import make_mesh, use_mesh
    from train.runtime.step import make_step

    cfg = configuration(size, variant)
    mesh, config = make_mesh(cfg.mesh, [device]), cfg.model.encoder()
    with use_mesh(mesh):
        plan = protein_pretrain.make_plan(cfg, config, mesh)
        placed = abstract_batch(protein_pretrain.batch_shapes(cfg), mesh, 1)
        step = make_step(protein_pretrain.train_step(cfg, plan, config), plan, mesh)
        return plan, placed, step.lower(plan.abstract, placed)


def train(size: Size, variant: Variant, rows: Rows, device: Any, state: Found) -> dict[str, Any]:
    import jax

    from benchmarks.train_step import _planned_memory
    from train.runtime import flops

    start = time.perf_counter()
    plan, placed, lowered = lowered_step(size, variant, device)
    lower_seconds = time.perf_counter() - start
    compiled = lowered.compile()
    compile_seconds = time.perf_counter() - start - lower_seconds
    arrays = rows.of(variant.batch)
    batch = jax.tree.map(jax.device_put, arrays, {name: s.sharding for name, s in placed.items()})
    start = time.perf_counter()
    current = jax.block_until_ready(plan.init())
    init_seconds = time.perf_counter() - start
    losses, seconds = [], []

    def run(steps: int) -> None:
        nonlocal current
        found = []
        for _ in range(steps):
            current, metrics = compiled(current, batch)
            found.append(metrics)
        jax.block_until_ready((current, found))
        losses.extend(float(metrics["loss"]) for metrics in found)

    run(2)
    for _ in range(size.repeats):
        seconds.append(timed(lambda: run(3)) / 3)
    skipped = int(current["skipped"])
    about = census(arrays["segments"])
    cost = flops.encoder_train_flops_per_token(encoder(size), about["mean keys"]) * about["tokens"]
    second = statistics.median(seconds)
    stats = device.memory_stats() or {}
    rate = about["tokens"] / second
    return {
        "tokens/s": rate, "target": TARGETS["tokens/s"], "met": rate >= TARGETS["tokens/s"], "ms": second * 1e3,
        "ms of each": [round(s * 1e3, 2) for s in seconds], "MFU": flops.mfu(cost, second, 1, device),
        "TFLOP/s": cost / second / 1e12, "of matmul": state.bound and cost / second / state.bound,
        "model_flops_per_token": cost / about["tokens"], **about, "variant": dataclasses.asdict(variant),
        "precision": size.dtype, "parameters": sum(leaf.size for leaf in jax.tree.leaves(current["params"])),
        "losses": [round(loss, 4) for loss in losses], "skipped_steps": skipped, "lower_s": lower_seconds,
        "compile_s": compile_seconds, "init_s": init_seconds, "planned": _planned_memory(compiled),
        "device_peak_bytes_so_far": stats.get("peak_bytes_in_use"), "bytes_limit": stats.get("bytes_limit")}


# Attribution


def attribution(record: Record, size: Size, variants: str = "") -> None:
    """Steps of their own, on one protein and a model with random weights."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from analysis.attribution import SITES, token_probability
    from benchmarks.attribution import protein
    from jaxmodels.esm.model import Esm

    del variants
    made: dict[str, Any] = {}
    position = min(POSITION, size.residues // 2)
    target = token_probability(jnp.asarray([position]), jnp.asarray([LABEL]))
    points = tuple(SITES.values())

    def build() -> dict[str, Any]:
        config = dataclasses.replace(encoder(size), dtype="float32")
        graphdef, _ = nnx.split(nnx.eval_shape(lambda: Esm(config, rngs=nnx.Rngs(0))))
        # One program, hardly optimised: it runs once (as train/runtime/state.py does it).
        make = jax.jit(lambda: nnx.split(Esm(config, rngs=nnx.Rngs(0)))[1],
                       compiler_options={"xla_backend_optimization_level": 0})
        made["model"] = nnx.merge(graphdef, jax.block_until_ready(make()))
        made["tokens"] = jnp.asarray(protein(size.residues))
        neurons = config.num_layers * (5 * config.d_model + config.ffn_widths[0])
        return {"neurons": neurons, "residues": size.residues, "nodes": NODES, "dtype": config.dtype}

    if record.attempt("attribution, model", 5, build) is None:
        return
    one = (size, made["model"], made["tokens"], target, points)
    record.attempt("attribution, gate", 10, lambda: gate(*one))
    record.attempt("attribution, gate, doubled", 10, lambda: gate(*one, max_steps=80))
    record.attempt("attribution, site", 15, lambda: site(record, *one))


def gate(size: Size, model: Any, tokens: Any, target: Any, points: tuple[str, ...], max_steps: int = NODES
         ) -> dict[str, Any]:
    """All sites on one path; max_steps: up to how many nodes are taken where the error asks for it."""
    import jax

    from analysis.attribution import integrated_gradients

    def run() -> None:
        nonlocal found
        found = jax.block_until_ready(integrated_gradients(
            model, tokens, point=points, target=target, mode="gate", steps=NODES, max_steps=max_steps, tokens="sum",
            chunk=size.chunk[0]))

    found: Any = None
    first = timed(run)
    seconds = [timed(run) for _ in range(2)]
    change = abs(float(found.end[0] - found.start[0]))
    return {"seconds": min(seconds), "first_call_s": first, "target": TARGETS["attribution seconds"],
            "met": min(seconds) <= TARGETS["attribution seconds"], "nodes used": int(found.steps[0]),
            "completeness error": float(found.error[0]), "change": change,
            "relative error": float(found.error[0]) / change, "values": int(sum(a.size for a in found.values.values())),
            **_memory()}


def site(record: Record, size: Size, model: Any, tokens: Any, target: Any, points: tuple[str, ...]) -> dict[str, Any]:
    """Every site for itself. All points are compiled at once (two alone where there is no time for six programs), then
    as many layers run as there is time for."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from analysis import attribution as engine

    layers, sites = model.cfg.num_layers, model.cfg.num_layers * len(points)
    if record.left() < FEW:
        points = ("attention.key", "ffn.hidden")
    alphas = engine._chunks(engine.nodes("gauss", NODES), size.chunk[1])
    highest = functools.partial(jax.default_matmul_precision, "highest")
    start = time.perf_counter()
    with highest():
        run = engine._Run(model, tokens, points, target, "sum", None, {}, "zero", False, "site")
    record_seconds = time.perf_counter() - start

    def arguments(point: str, layer: int) -> tuple[Any, ...]:
        return (run.state, run.inputs, run.target, jnp.int32(layer), run.aux["residual"][layer],
                run.activation(point)[layer], run.base[point][0], None, *alphas)

    start = time.perf_counter()
    with highest():
        # One by one: threads that trace one function fail ("Store occupied"). Compiling is outside Python's lock.
        lowered = [engine._site.lower(run.program, point, "sum", "suffix", *arguments(point, 0)) for point in points]
    with concurrent.futures.ThreadPoolExecutor(len(points)) as pool:
        programs = dict(zip(points, pool.map(lambda one: one.compile(), lowered), strict=True))

    def one(point: str, layer: int) -> tuple[float, float]:
        """(error, change) of a site; what `integrated_gradients` does for it, without doubling."""
        _, total, begin = programs[point](*arguments(point, layer))
        change = float(run.end[0] - begin[0])
        return abs(float(total[0]) - change), change

    for point in points:
        one(point, layers - 1)
    compile_seconds = time.perf_counter() - start
    full = timed(lambda: one(points[0], 0)) * sites / 2  # a site costs what follows it
    room = max(record.left() - 4, 1)
    step = next((n for n in range(1, layers) if full / n <= room), layers)
    chosen = range((layers - 1) % step // 2, layers, step)
    errors: dict[str, list[float]] = {}
    shares: list[float] = []
    start, done = time.perf_counter(), 0
    for point in points:
        if record.left() < 2:
            break
        for layer in chosen:
            error, change = one(point, layer)
            errors.setdefault(point, []).append(error)
            shares.append(error / max(abs(change), 1e-3 * abs(float(run.end[0]))))
            done += 1
    seconds = time.perf_counter() - start
    whole = seconds * sites / done + record_seconds
    return {"seconds": whole, "measured": f"{done} of {sites} sites", "measured_s": seconds,
            "record_s_with_compile": record_seconds, "compile_s": compile_seconds, "layers": list(chosen),
            "target": TARGETS["attribution seconds"], "met": whole <= TARGETS["attribution seconds"],
            "worst error": {point: max(found) for point, found in errors.items()},
            "target's value": float(run.end[0]), "relative error, median": float(np.median(shares)),
            "relative error, worst": max(shares), "above 1 %": sum(share > 0.01 for share in shares), **_memory()}


def _memory() -> dict[str, Any]:
    import jax

    stats = jax.devices()[0].memory_stats() or {}
    return {"device_peak_bytes_so_far": stats.get("peak_bytes_in_use")}


# PyTorch


def peer(record: Record, size: Size, variants: str = "") -> None:
    del variants
    record.attempt("train, transformers", 15, lambda: transformers(record, size))


def transformers(record: Record, size: Size) -> dict[str, Any]:
    """A plain loop over rows of one protein each, as long as a row: what sdpa is fastest at."""
    import torch
    from transformers import EsmConfig, EsmForMaskedLM

    from train.runtime import flops

    config = encoder(size)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    batch = 16 if device == "cuda" else 2
    with torch.device(device):
        model = EsmForMaskedLM(EsmConfig(
            vocab_size=config.vocab_size, hidden_size=config.d_model, num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads, intermediate_size=config.ffn_widths[0], pad_token_id=1,
            mask_token_id=32, position_embedding_type="rotary", token_dropout=True, emb_layer_norm_before=False,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, layer_norm_eps=1e-5,
            max_position_embeddings=1026, attn_implementation="sdpa")).train()
        tokens = torch.randint(4, 24, (batch, size.length))
        asked = torch.rand(tokens.shape) < 0.15
    labels, tokens = tokens.masked_fill(~asked, -100), tokens.masked_fill(asked, 32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.98), weight_decay=0.01, fused=True)

    def steps(count: int) -> float:
        for _ in range(count):
            with torch.autocast(device, torch.bfloat16, size.dtype == "bfloat16"):
                loss = model(input_ids=tokens, labels=labels).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    steps(2)
    seconds = []
    while len(seconds) < 3 and (record.left() > 3 or not seconds):
        seconds.append(timed(lambda: steps(2)) / 2)
    second = statistics.median(seconds)
    cost = flops.encoder_train_flops_per_token(config, size.length) * tokens.numel()
    found = {"tokens/s": tokens.numel() / second, "ms": second * 1e3, "TFLOP/s": cost / second / 1e12, "batch": batch,
             "MFU of 989 TFLOP/s": cost / second / 989e12, "loss": steps(1), "mean keys": size.length}
    if device == "cuda":
        found["peak_bytes"] = torch.cuda.max_memory_allocated()
    return found


SIDES: dict[str, Callable[..., None]] = {"train": train_side, "attribution": attribution, "peer": peer}


def _has_gpu(side: str) -> bool:
    if side == "peer":
        import torch

        return torch.cuda.is_available()
    import jax

    return jax.default_backend() == "gpu"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=120, help="of all, compilation too")
    parser.add_argument("--out", help="a JSON file for what is found")
    parser.add_argument("--tiny", action="store_true", help="a toy size, to try the program itself")
    parser.add_argument("--variants", default="", help="ATTENTION:REMAT:BATCH,... to train with, and nothing else")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--deadline", type=float, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    told = _arguments()
    if told.side is None:
        try:
            main(told.out, told.seconds, told.tiny, told.variants)
        except UserError as error:
            sys.exit(str(error))
    elif told.tiny or _has_gpu(told.side):
        SIDES[told.side](Record(told.out, told.deadline), TINY if told.tiny else H100, told.variants)
    else:
        sys.exit(f"{told.side}: there is no GPU here; --tiny tries the program on a CPU")

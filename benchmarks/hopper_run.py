"""The Hopper kernels of the grouped products on a GPU: each checked at full size, then timed, one program for both.

    python -m benchmarks.hopper_run [--products glu,...] [--points "Qwen3-30B-A3B,..."] [--seconds 60] [--out FILE]

Checked under several distributions of rows, of which "ragged" has groups of 0, 1, 63, 64, 65 ... rows; rows past the
last group are NaN in x and dy. The reference: a product of all rows with every matrix, of which each row's own is kept,
summed in float32; where the product is small, float64 NumPy. "row error" is the worst of a row (of dw: of a matrix),
"error" of the whole, in relative Frobenius norm. Two runs must give the same bits.

Timed under "random", in turns with one dense product of the same FLOPs and with `jax.lax.ragged_dot`: calls in a row,
waited for once. --out is written before and after every step; one that hangs ends the process after HANGS seconds and
stays there as "running". After --seconds no further step begins.
"""

import argparse
import dataclasses
import functools
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import _hopper
from benchmarks._alone import Room
from benchmarks._grouped_peers import LIMIT, one_line
from benchmarks._hopper import PRODUCTS
from benchmarks._report import check_out, machine, publish
from benchmarks._shapes import LAYERS, SMALL, Layer, Point, draw_sizes
from benchmarks._timing import take_turns
from benchmarks.grouped_matmul import _driver
from jaxmodels.errors import UserError
from jaxmodels.kernels.grouped_matmul import hopper
from train.runtime import flops

POINTS = {name: Point(layer) for name, layer in (SMALL | LAYERS).items()}
DEFAULT = ("E=64 top-4", "Qwen3-30B-A3B", "Mixtral-8x7B")
CHECKED = ("ragged", "random", "zipf", "half empty", "all in one", "few rows")
TIMED = "random"
COLUMNS = ("point", "product", "step", "result", "row error", "error", "ms", "TFLOP/s", "of peak", "of dense",
           "seconds", "note")  # fmt: skip
SMALL_FLOP = 1e9  # of a product that NumPy computes in float64
FLOAT32 = 1e-3  # error of what is written in float32: tensor cores truncate, and a group may have all rows
HANGS = 25  # seconds of a step: a compilation takes up to 10 on a busy core
TURN, TURNS, MOST_CALLS = 0.04, 7, 50  # seconds of a turn, turns of a side, calls of a turn
SHORT = 1e-4  # seconds of a call under which handing it over counts
# Dense products through cuBLAS: quick to compile, and at these sizes nothing else is faster.
CUBLAS = {"xla_gpu_enable_triton_gemm": False}


def main(
    out: str | None, products: str | None = None, points: str | None = None, seconds: float = math.inf
) -> bool:  # fmt: skip
    """Prints and writes a row for each step; False where something was wrong or failed."""
    check_out(out)
    room = Room()
    names = _chosen("point", points, POINTS, DEFAULT)
    works = [Work(product, POINTS[name]) for name in names for product in _chosen("product", products, PRODUCTS)]
    about = machine(("jax-cuda12-plugin", "jax-cuda13-plugin")) | _driver()
    steps = Steps(out, about, time.monotonic() + seconds)
    if (reason := unfit()) is not None:
        steps.rows.append({"step": "start", "result": "failed", "note": reason})
        works = []
    for work in works:
        steps.do(work, "compile", work.compile)
        for distribution in CHECKED:
            steps.do(work, f"check {distribution}", functools.partial(work.check, distribution))
        steps.do(work, "compile peers", work.compile_peers)
        work.forget()
    with room.alone(max(steps.end - time.monotonic() - 10, 0)) as alone:
        for work in works:
            steps.do(work, "time", functools.partial(work.time, alone))
            work.forget()
    notes = ["FLOPs of each product: 2 x rows x inner x columns, each row once; of glu twice that",
             "of dense: the time of one dense product of the same FLOPs by the side's; above 1 is faster"]  # fmt: skip
    publish("Hopper grouped products", steps.rows, COLUMNS, about, notes, out)
    return not any(row["result"] in ("wrong", "failed") for row in steps.rows)


def unfit() -> str | None:
    return hopper.unfit((8, 64), 1, jnp.bfloat16)


def _chosen(what: str, words: str | None, known: Any, default: Any = None) -> list[str]:
    names = list(default or known) if words is None else words.split(",")
    for name in names:
        if name not in known:
            raise UserError(f"{what} {name!r} is unknown; choose from {', '.join(known)}")
    return names


class Steps:
    """Does one after the other until `end`, and tells and writes each."""

    def __init__(self, out: str | None, about: Mapping[str, Any], end: float):
        self.out, self.about, self.end, self.rows = out, about, end, []

    def do(self, work: "Work", step: str, run: Callable[[], Sequence[dict[str, Any]]]) -> None:
        start = time.monotonic()
        row: dict[str, Any] = {"point": work.point.name, "product": work.product, "step": step}
        if start >= self.end:
            found: Sequence[dict[str, Any]] = [{"result": "skipped", "note": "no time left"}]
        else:
            self._write([*self.rows, row | {"result": "running"}])
            signal.alarm(HANGS)  # not handled: waiting for a device, Python would not come to it
            try:
                found = run()
            except Exception as error:  # what a kernel may raise that ran nowhere yet; the other steps still count
                found = [{"result": "failed", "note": f"{type(error).__name__}: {one_line(error)}"}]
            signal.alarm(0)
        for one in found:
            self.rows.append({**row, "seconds": time.monotonic() - start, **one})
            told = (f"{key} {value:.3g}" if isinstance(value, float) else str(value)
                    for key, value in self.rows[-1].items() if key in COLUMNS and value not in ("", None))  # fmt: skip
            print("; ".join(told), flush=True)
        self._write(self.rows)

    def _write(self, rows: Sequence[dict[str, Any]]) -> None:
        """In one go: whoever reads meanwhile finds the state before."""
        if self.out is not None:
            part = Path(f"{self.out}.part")
            part.write_text(json.dumps({"title": "unfinished", "about": self.about, "rows": rows}) + "\n", "utf-8")
            os.replace(part, self.out)


@dataclasses.dataclass
class Work:
    """One product at one point."""

    product: str
    point: Point

    def __post_init__(self) -> None:
        self.shape, self.flop = self.point.shape, _hopper.flop(self.product, self.point.shape)
        self.sides: dict[str, Any] = {}
        self.operands: list[jax.Array] = []
        self.reference: Any = None

    def compile(self) -> Sequence[dict[str, Any]]:
        start = time.monotonic()
        lowered = jax.jit(_hopper.kernel(self.product)).lower(*self._abstract())
        traced = time.monotonic() - start
        self.sides["kernel"] = lowered.compile()
        return [{"result": "compiled", "lowering_seconds": traced}]

    def check(self, distribution: str) -> Sequence[dict[str, Any]]:
        if "kernel" not in self.sides:
            return [{"result": "skipped", "note": "not compiled"}]
        numbers = row_counts(distribution, self.point.layer)
        used, sizes = int(numbers.sum()), jnp.asarray(numbers)
        operands = [_poison(a, used) if a.ndim == 2 else a for a in self._drawn()]
        found = _tuple(self.sides["kernel"](*operands, sizes))
        again = _tuple(self.sides["kernel"](*operands, sizes))
        if self.flop <= SMALL_FLOP:
            wanted = [jnp.asarray(a, jnp.float32) for a in float64(self.product, self._drawn(), numbers)]
        else:
            if self.reference is None:
                self.reference = _compiled(_hopper.loop(self.product), self._abstract())
            wanted = _tuple(self.reference(*operands, sizes))
        parts = [jax.device_get(_compare(*arrays)) for arrays in zip(found, again, wanted, strict=True)]
        row = {"row error": max(float(part["row"]) for part in parts),
               "error": max(float(part["whole"]) for part in parts)}  # fmt: skip
        limit = FLOAT32 if found[0].dtype == jnp.float32 else LIMIT[found[0].dtype.name]
        problems = [f"differs by {row['error']:.1e}, limit {limit:g}"] * (not row["error"] <= limit)
        problems += [f"a row differs by {row['row error']:.1e}"] * (not row["row error"] <= 2 * limit)
        problems += ["not finite"] * (not all(part["finite"] for part in parts))
        problems += ["two runs differ"] * (not all(part["same"] for part in parts))
        return [row | {"result": "wrong" if problems else "right", "note": "; ".join(problems)}]

    def compile_peers(self) -> Sequence[dict[str, Any]]:
        m, *_ = self.shape
        whole = [a if len(a.shape) == 2 else jax.ShapeDtypeStruct(a.shape[1:], a.dtype) for a in self._abstract()[:-1]]
        self.sides["dense"] = _compiled(_hopper.dense(self.product), [*whole, self._abstract()[-1]])
        try:
            ragged = jax.jit(_hopper.ragged_dot(self.product)).lower(*self._abstract()).compile()
        except Exception as error:
            return [{"result": "compiled", "note": f"without ragged_dot: {one_line(error)}"}]
        if (reason := too_large(ragged, jax.devices()[0])) is not None:
            return [{"result": "compiled", "note": f"without ragged_dot: {reason}"}]
        self.sides["ragged_dot"] = ragged
        return [{"result": "compiled"}]

    def time(self, alone: bool) -> Sequence[dict[str, Any]]:
        """A row for each side."""
        if not self.sides:
            return [{"result": "skipped", "note": "not compiled"}]
        sizes, rows, turns, calls = jnp.asarray(draw_sizes(TIMED, self.point.layer)), [], {}, {}
        one = [a if a.ndim == 2 else jnp.copy(a[0]) for a in self._drawn()]
        for name, program in self.sides.items():
            run = functools.partial(program, *(one if name == "dense" else self._drawn()), sizes)
            try:
                jax.block_until_ready(run())
                start = time.perf_counter()
                jax.block_until_ready(run())
                calls[name] = min(max(round(TURN / (time.perf_counter() - start)), 1), MOST_CALLS)
                turns[name] = functools.partial(_in_a_row, run, calls[name])
            except Exception as error:
                rows.append({"step": f"time {name}", "result": "failed", "note": one_line(error)})
        samples = {name: sample.summary() for name, sample in take_turns(turns, TURNS, warmup=1).items()}
        dense = samples["dense"]["median_s"] / calls["dense"] if "dense" in samples else None
        for name, summary in samples.items():
            seconds = summary["median_s"] / calls[name]
            notes = ["not alone on the device"] * (not alone)
            notes += ["short: handing a call over counts"] * (seconds < SHORT)
            rows.append({
                "step": f"time {name}", "result": "timed", "ms": 1e3 * seconds, "TFLOP/s": self.flop / seconds / 1e12,
                "of peak": flops.mfu(self.flop, seconds, 1, jax.devices()[0]),
                "of dense": dense and dense / seconds, "note": "; ".join(notes), "samples": summary,
                "calls_per_turn": calls[name], "rows on experts": TIMED, "M, K, N, G": self.shape, "flop": self.flop,
            })  # fmt: skip
        return rows

    def forget(self) -> None:
        """The operands and the program of the reference: the next point needs the memory."""
        self.operands, self.reference = [], None

    def _abstract(self) -> list[jax.ShapeDtypeStruct]:
        shapes = _hopper.operand_shapes(self.product, self.shape)
        return [jax.ShapeDtypeStruct(shape, self.point.dtype) for shape in shapes] + [
            jax.ShapeDtypeStruct(self.shape[3:], jnp.int32)]  # fmt: skip

    def _drawn(self) -> list[jax.Array]:
        if not self.operands:
            keys = jax.random.split(jax.random.key(0, impl="rbg"), 3)
            shapes = _hopper.operand_shapes(self.product, self.shape)
            # Of matrices so that products are of order one: silu bends there.
            self.operands = [_draw(key, shape, self.point.dtype, 1.0 if len(shape) == 2 else self.shape[1] ** -0.5)
                             for key, shape in zip(keys, shapes, strict=False)]  # fmt: skip
        return self.operands


def too_large(program: Any, device: Any) -> str | None:
    """Why it is not run: XLA's products expand to all groups, and running out of memory takes the allocator long."""
    planned, limit = program.memory_analysis(), (device.memory_stats() or {}).get("bytes_limit")
    if planned is None or limit is None:
        return None
    needed = planned.temp_size_in_bytes + planned.output_size_in_bytes + 2 * planned.argument_size_in_bytes
    gib = 2**30
    return f"needs {needed / gib:.1f} GiB, {limit / gib:.1f} are there" if needed > 0.95 * limit else None


def row_counts(distribution: str, layer: Layer) -> np.ndarray:
    """int32[experts]; "ragged" and "few rows" leave rows past the last group."""
    rng = np.random.default_rng(1)
    if distribution == "few rows":
        return (np.arange(layer.experts) % 3).astype(np.int32)
    if distribution != "ragged":
        return draw_sizes(distribution, layer)
    first = np.array([0, 1, 63, 65, 7, 64, 129, 0, 8, 127, 128, 200, 9])[: layer.experts - 1]
    others = layer.experts - len(first)
    rest = rng.multinomial(layer.rows - first.sum() - 37, np.ones(others) / others)
    return rng.permutation(np.concatenate([first, rest])).astype(np.int32)


def float64(product: str, operands: Sequence[jax.Array], sizes: np.ndarray) -> list[np.ndarray]:
    """What the kernel gives, by NumPy."""
    left, *rights = (np.asarray(a, np.float64) for a in operands)
    ends = np.cumsum(sizes)
    groups = [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]
    if product == "dw":
        return [np.stack([left[own].T @ rights[0][own] for own in groups])]
    products = []
    for w in rights:
        w = w.swapaxes(1, 2) if product == "dx" else w
        products.append(np.zeros((len(left), w.shape[2])))
        for group, own in enumerate(groups):
            products[-1][own] = left[own] @ w[group]
    if not product.startswith("glu"):
        return products
    g, u = products
    h = g / (1 + np.exp(-g)) * u
    return [h, g, u] if product == "glu_kept" else [h]


def _compiled(function: Callable[..., Any], operands: Sequence[Any]) -> Any:
    options = CUBLAS if jax.default_backend() == "gpu" else None
    return jax.jit(function).lower(*operands).compile(compiler_options=options)


def _in_a_row(run: Callable[[], Any], calls: int) -> None:
    for _ in range(calls):
        result = run()
    jax.block_until_ready(result)


def _tuple(value: Any) -> tuple[jax.Array, ...]:
    return tuple(value) if isinstance(value, tuple | list) else (value,)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _draw(key: jax.Array, shape: tuple[int, ...], dtype: str, scale: float) -> jax.Array:
    return jax.random.normal(key, shape, dtype) * jnp.asarray(scale, dtype)


@jax.jit
def _poison(a: jax.Array, used: int) -> jax.Array:
    return jnp.where(jnp.arange(len(a))[:, None] < used, a, jnp.nan)


@jax.jit
def _compare(found: jax.Array, again: jax.Array, wanted: jax.Array) -> dict[str, jax.Array]:
    """Errors relative to `wanted`, of the whole and of the worst along the first axis. What should be zero must be."""
    square = lambda a: (a * a).sum(axis=tuple(range(1, a.ndim)))  # noqa: E731
    off, size = square(found.astype(jnp.float32) - wanted), square(wanted)
    row = jnp.where(size > 0, jnp.sqrt(off / size), jnp.where(off == 0, 0.0, jnp.inf))
    return {"whole": jnp.sqrt(off.sum() / size.sum()), "row": row.max(), "finite": jnp.isfinite(found).all(),
            "same": (found == again).all()}  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", help="a JSON file for the rows, written after every step")
    parser.add_argument("--products", help=f"comma-separated, of: {', '.join(PRODUCTS)}")
    parser.add_argument("--points", help=f"comma-separated, of: {', '.join(POINTS)}; default: {', '.join(DEFAULT)}")
    parser.add_argument("--seconds", type=float, default=math.inf, help="after these no further step begins")
    try:
        sys.exit(0 if main(**vars(parser.parse_args())) else 1)
    except UserError as error:
        sys.exit(str(error))

"""Grouped products of sparse experts: every implementation that runs here, beside one dense product of the same FLOPs.

    jaxmodels bench grouped_matmul [--out FILE.json]                # a table; with --out also FILE.html with a plot
    python -m benchmarks.grouped_matmul --points "E=64 top-4" --seconds 0.2 [--out FILE.json]       # some, or quicker

Sides: ours by the name that `implementation=` takes ("xla" is `jax.lax.ragged_dot`), jax's megablox on a TPU and its
Hopper sample on a GPU, tokamax if it is installed, and, in a process of its own, PyTorch's grouped_mm on a GPU. Points
and distributions of rows: _shapes.py. Products: fwd, and the gradients dX and dW (moe_split.md 6.2); dW in float32,
but for peers that write only the dtype of the operands, whose note says so.

Operands are standard normal, and several take turns, so that they are read from memory and not from a cache. Each side
is checked against float64 on a sample of every result, and not timed if it is wrong. The sides take turns. On a CPU a
program is called; elsewhere a turn is one compiled loop, each call of which depends on the one before. Temporary bytes:
what the compiler plans for one call besides operands and result.
"""

import argparse
import functools
import gc
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._grouped_peers import (
    CALLS,
    FEWEST,
    LIMIT,
    MOST,
    SECONDS,
    Function,
    Maker,
    Skipped,
    choose,
    one_line,
    out_dtype,
    peers,
    torch_times,
)
from benchmarks._report import check_out, machine, publish
from benchmarks._shapes import ACCELERATOR, CPU, Point, draw_sizes
from benchmarks._timing import Samples, take_turns
from jaxmodels.errors import UserError

FORMULA = "FLOPs of each product: 2 x rows x inner x columns, each row once"
PRODUCTS = ("fwd", "dX", "dW")
COLUMNS = ("point", "rows on experts", "product", "side", "ms", "p10", "p90", "TFLOP/s", "of dense", "of peak",
           "temporary MiB", "note")  # fmt: skip
# How large those that work on every row with every expert may get: FLOPs, and numbers in memory.
MOST_FLOPS = {"cpu": 1e12, "gpu": 1e15}
MOST_NUMBERS = {"cpu": 2**22}
CACHE = {"gpu": 64 * 2**20, "tpu": 128 * 2**20}  # L2 of an H100: 50 MiB; VMEM of a v5e or v6e: 128 MiB
SLOW = 0.3  # seconds of a call above which its check is all the warm-up


def main(out: str | None, points: Sequence[str] = (), products: Sequence[str] = PRODUCTS,
         seconds: float | None = None) -> None:  # fmt: skip
    """Measures, prints a table, and writes ``out`` and a page with a plot beside it. points: names; default: all."""
    check_out(out)
    if out is not None and Path(out).suffix == ".html":
        raise UserError(f"--out {out} is where the plot goes; give the JSON file another ending")
    torch, why_no_torch = torch_times(points, products)  # first: jax would take the GPU's memory
    if not {"XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"} & os.environ.keys():
        os.environ["XLA_CLIENT_MEM_FRACTION"] = "0.92"  # read when jax starts its backend; by default 0.75
    import jax

    device = jax.devices()[0]
    about = machine(("torch", "tokamax", "libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin")) | _driver()
    chosen = choose(CPU if device.platform == "cpu" else ACCELERATOR, points)
    makers, absent = sides(device.platform)
    absent |= {"torch grouped_mm": why_no_torch} if why_no_torch else {}
    rows = []
    for point in chosen:
        rows += measure(point, makers, products=products, seconds=seconds or SECONDS[device.platform], torch=torch)
        print(".", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    notes = _notes(rows, absent)
    publish("grouped products", rows, COLUMNS, about, notes, out)
    if out is not None:
        _plot(rows, notes, about, Path(out).with_suffix(".html"))


def measure(point: Point, makers: Mapping[str, Maker], *, products: Sequence[str] = PRODUCTS, seconds: float = 1.0,
            torch: Mapping[tuple[str, str, str], dict] | None = None, looped: bool | None = None,
            cache: int | None = None) -> list[dict[str, Any]]:  # fmt: skip
    """A row for each distribution, product and side, the dense product first.

    seconds: for the turns of a side. looped: see `_looped`; default: not on a CPU. cache: bytes that the inputs exceed.
    """
    import jax

    platform = jax.default_backend()
    looped = platform != "cpu" if looped is None else looped
    found = []
    for product in products:
        inputs = Inputs(point, product, cache or _cache_bytes(platform))
        running: dict[str, Side] = {}
        skipped: dict[str, str] = {}
        for name, make in ({"dense": _dense} | dict(makers)).items():
            try:
                running[name] = Side(name, make(point, product), inputs, looped)
            except Skipped as reason:
                skipped[name] = str(reason)
            except Exception as error:  # a peer that does not import here
                skipped[name] = f"fails: {type(error).__name__}: {one_line(error)}"
        for distribution in point.distributions:
            sizes = draw_sizes(distribution, point.layer)
            found += _cell(point, distribution, product, inputs, sizes, running, skipped, seconds, torch or {})
        del running, inputs
        gc.collect()
    return _merged(found)


def _cell(point, distribution, product, inputs, sizes, running, skipped, seconds, torch) -> list[dict[str, Any]]:
    """Rows of one product under one distribution."""
    import jax

    about = {"point": point.name, "rows on experts": distribution, "product": product}
    inputs.set_sizes(sizes)
    ready, notes = {}, dict(skipped)
    for name, side in running.items():
        try:
            side.prepare(sizes)
            ready[name] = side
        except Skipped as reason:
            notes[name] = str(reason)
    repeats = {name: min(max(int(seconds / side.turn_seconds), FEWEST), MOST) for name, side in ready.items()}
    samples = _turns({name: side.turn for name, side in ready.items()}, repeats)
    rows, (m, k, n, groups) = [], point.shape
    more = {"rows": m, "inner": k, "columns": n, "groups": groups, "dtype": point.dtype, "flop": inputs.flop,
            "matrix": point.matrix, "input_sets": len(inputs.sets), "busiest": int(sizes.max()),
            "empty": int((sizes == 0).sum())}  # fmt: skip
    times = {name: {key: value if key in ("repeats", "elsewhere") else value / ready[name].calls
                    for key, value in one.summary().items()} for name, one in samples.items()}  # fmt: skip
    temporary = {name: side.temporary for name, side in ready.items()}
    words = {name: side.note for name, side in ready.items()}
    calls = {name: side.calls for name, side in ready.items()}
    if (theirs := torch.get((point.name, distribution, product))) is not None:
        if "samples" in theirs:
            times["torch grouped_mm"], words["torch grouped_mm"] = theirs["samples"], theirs["note"]
            more["torch_dense_ms"] = 1e3 * theirs["dense_median_s"]
        else:
            notes["torch grouped_mm"] = theirs["note"]
    for name, summary in times.items():
        median = summary["median_s"]
        row = about | {"side": name, "ms": 1e3 * median, "p10": 1e3 * summary["p10_s"], "p90": 1e3 * summary["p90_s"],
                       "TFLOP/s": inputs.flop / median / 1e12, "of dense": None, "of peak": None,
                       "temporary MiB": temporary.get(name), "note": words[name]}  # fmt: skip
        if name != "dense" and "dense" in times:
            row["of dense"] = times["dense"]["median_s"] / median
        row["of peak"] = _of_peak(inputs.flop, median, jax.devices()[0])
        if (row["of peak"] or 0) > 1:
            row["note"] = "above the peak of the device: the compiler left work out"
        rows.append(row | more | {"samples": summary, "calls_per_turn": calls.get(name)})
    return rows + [about | {"side": name, "note": why} | more for name, why in notes.items()]


def _merged(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row, at the end, for all products and distributions that a side did not run for the same reason."""
    told: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        if "samples" not in row:
            one = told.setdefault((row["side"], row["note"]), row | {"product": [], "rows on experts": []})
            for key in ("product", "rows on experts"):
                one[key] += [] if row[key] in one[key] else [row[key]]
    joined = [one | {key: ", ".join(one[key]) for key in ("rows on experts", "product")} for one in told.values()]
    return [row for row in rows if "samples" in row] + joined


def _turns(functions: Mapping[str, Callable[[], Any]], repeats: Mapping[str, int]) -> dict[str, Samples]:
    """`take_turns` where slow sides have fewer turns, spread over the others'."""
    samples = {name: Samples() for name in functions}
    rounds = max(repeats.values(), default=0)
    for turn in range(rounds):
        due = [name for name in functions if (turn + 1) * repeats[name] // rounds > turn * repeats[name] // rounds]
        first = turn % len(due)
        one = take_turns({name: functions[name] for name in due[first:] + due[:first]}, 1, warmup=0)
        for name, found in one.items():
            samples[name].seconds += found.seconds
            samples[name].elsewhere += found.elsewhere
    return samples


def _of_peak(flop: float, seconds: float, device: Any) -> float | None:
    from train.runtime import flops

    return flops.mfu(flop, seconds, 1, device)


# Inputs


class Inputs:
    """Operands of one product: `sets` of [left, right, matrix of the dense product], and vectors of group sizes.

    fwd: x [M, K], w [G, K, N]; dX: dy [M, N], w; dW: x, dy. The sets together exceed twice the cache. The group sizes
    are rotated among the experts from call to call, as a few rows would otherwise find their matrices in the cache.
    """

    def __init__(self, point: Point, product: str, cache: int):
        import jax
        import jax.numpy as jnp

        self.product, dtype = product, jnp.dtype(point.dtype)
        m, k, n, groups = point.shape
        self.flop, self.cache = 2.0 * m * k * n, cache
        self.point = point
        left, right = {"fwd": ((m, k), (groups, k, n)), "dX": ((m, n), (groups, k, n)), "dW": ((m, k), (m, n))}[product]
        count = math.prod(left) + math.prod(right)
        number = min(max(math.ceil(2 * cache / (count * dtype.itemsize)), 1), 8)
        # Its generator is fast on every backend: a point has up to ten billion numbers.
        draw = jax.jit(lambda key, shape: jax.random.normal(key, shape, dtype), static_argnums=1)
        keys = jax.random.split(jax.random.key(0, impl="rbg"), 2 * number)
        self.sets = []
        for i in range(number):
            a, b = draw(keys[2 * i], left), draw(keys[2 * i + 1], right)
            self.sets.append(jax.block_until_ready([a, b, None if product == "dW" else jnp.copy(b[0])]))
        self.itemsize = dtype.itemsize

    def set_sizes(self, sizes: np.ndarray) -> None:
        import jax.numpy as jnp

        m, k, n, groups = self.point.shape
        touched = self.itemsize * (m * (k + n) + int((sizes > 0).sum()) * k * n) * len(self.sets)
        count = min(max(math.ceil(2 * self.cache / touched), 1), 16)
        self.sizes = [jnp.asarray(np.roll(sizes, i * max(groups // count, 1))) for i in range(count)]


class Side:
    """One implementation of one product, compiled. Raises Skipped with the reason if it cannot be."""

    def __init__(self, name: str, variants: Mapping[str, Function], inputs: Inputs, looped: bool):
        import jax.numpy as jnp

        self.name, self.inputs, self.looped, self.note = name, inputs, looped, ""
        # The dense product's matrix is an operand of its own; for dW, both products take the same two.
        self.right = 2 if name == "dense" and inputs.product != "dW" else 1
        self.variants: dict[str, tuple[Function, Any]] = {}
        self.calls = self.next = 0
        self.turn_seconds, self.temporary, self.turn_program = math.nan, None, None
        sizes = jnp.zeros(inputs.point.shape[3], jnp.int32)
        reasons = []
        for label, function in variants.items():
            try:
                self.variants[label] = function, _compile(function, *self._operands(0), sizes)
            except Exception as error:  # peers raise what they like
                reasons.append(f"{type(error).__name__}: {one_line(error)}")
        if not self.variants:
            raise Skipped(f"does not compile: {reasons[0]}")

    def prepare(self, sizes: np.ndarray) -> None:
        """Runs, checks the result, chooses the fastest variant and how many calls make a turn."""
        speed, problems = {}, []
        for label, (_, program) in self.variants.items():
            try:
                start = time.perf_counter()
                result = self._call(program, 0)
                first = time.perf_counter() - start
                if self.name != "dense" and (problem := check(self.inputs, sizes, result)) is not None:
                    problems.append(f"wrong: {problem}")
                    continue
                del result
                speed[label] = first if first > SLOW else min(self._seconds(program) for _ in range(2))
            except Exception as error:
                problems.append(f"fails: {type(error).__name__}: {one_line(error)}")
        if not speed:
            raise Skipped(problems[0])
        label = min(speed, key=speed.__getitem__)
        function, self.program = self.variants[label]
        self.note = label
        if result_dtype(self.program) != self._wanted_dtype():
            self.note = f"{label}; writes {result_dtype(self.program)}".removeprefix("; ")
        planned = self.program.memory_analysis()
        self.temporary = None if planned is None else planned.temp_size_in_bytes / 2**20
        # A dispatch costs a good part of a short call on a CPU, and on an accelerator there is a loop.
        self.calls = min(max(int((0.5 if self.looped else 2e-3) / speed[label]), 1), CALLS)
        if self.looped:
            self.calls = -(-self.calls // len(self.inputs.sets)) * len(self.inputs.sets)
            if self.turn_program is None or self.turn_program[0] != label:
                self.turn_program = label, _looped(function, len(self.inputs.sets))
            self._loop(1)
        self.turn_seconds = speed[label] * self.calls

    def turn(self) -> None:
        if self.looped:
            self._loop(self.calls // len(self.inputs.sets))
            return
        for _ in range(self.calls):
            self.next += 1
            self._call(self.program, self.next)

    def _call(self, program: Any, number: int) -> Any:
        import jax

        # The next sizes after all operands had a turn: stepping through both at once, the same would always meet.
        sizes, count = self.inputs.sizes, len(self.inputs.sets)
        return jax.block_until_ready(program(*self._operands(number % count), sizes[number // count % len(sizes)]))

    def _loop(self, iterations: int) -> None:
        import jax
        import jax.numpy as jnp

        lefts, rights = ([one[place] for one in self.inputs.sets] for place in (0, self.right))
        results, lefts, rights = self.turn_program[1](iterations, lefts, rights, jnp.stack(self.inputs.sizes))
        for one, left, right in zip(self.inputs.sets, lefts, rights, strict=True):
            one[0], one[self.right] = left, right
        jax.block_until_ready((results, lefts, rights))

    def _operands(self, number: int) -> tuple[Any, Any]:
        one = self.inputs.sets[number]
        return one[0], one[self.right]

    def _seconds(self, program: Any) -> float:
        start = time.perf_counter()
        self._call(program, 1)
        return time.perf_counter() - start

    def _wanted_dtype(self) -> str:
        return "float32" if self.inputs.product == "dW" else self.inputs.point.dtype


def result_dtype(program: Any) -> str:
    return str(program.out_info.dtype)


def _compile(function: Function, left: Any, right: Any, sizes: Any) -> Any:
    import jax

    return jax.jit(function).lower(left, right, sizes).compile()


def _looped(function: Function, count: int) -> Any:
    """A program of (iterations, lefts, rights, sizes [S, G]) that calls once an iteration with each of `count` pairs.

    A call waits for the one before: every operand's first number grows by one where that gave a NaN, which is never.
    Without this, XLA computes once, before the loop, what is the same in every iteration, and no optimization_barrier
    stops it. The operands are donated and handed back, so that they change in place. The results are carried, as of one
    that only its first number is read from, XLA might compute just that.
    """
    import jax
    import jax.numpy as jnp

    def run(iterations, lefts, rights, sizes):
        def body(i, carry):
            nan, results, lefts, rights = carry
            lefts, rights, made = list(lefts), list(rights), []
            for place in range(count):
                result = function(lefts[place], rights[place], sizes[(i * count + place) % sizes.shape[0]] + nan)
                nan = jnp.isnan(result[(0,) * result.ndim]).astype(jnp.int32)
                made.append(result)
                for operands in (lefts, rights):
                    first = (0,) * operands[place].ndim
                    operands[place] = operands[place].at[first].add(nan.astype(operands[place].dtype))
            return nan, made, lefts, rights

        shapes = [jax.eval_shape(function, left, right, sizes[0]) for left, right in zip(lefts, rights, strict=True)]
        start = jnp.int32(0), [jnp.zeros(shape.shape, shape.dtype) for shape in shapes], lefts, rights
        _, results, lefts, rights = jax.lax.fori_loop(0, iterations, body, start)
        return results, lefts, rights

    return jax.jit(run, donate_argnums=(1, 2))


def check(inputs: Inputs, sizes: np.ndarray, result: Any) -> str | None:
    """What is wrong with the first set's result, or None: a sample of up to eight groups against float64."""
    import jax.numpy as jnp

    left, right, _ = inputs.sets[0]
    m, k, n, groups = inputs.point.shape
    shape = {"fwd": (m, n), "dX": (m, k), "dW": (groups, k, n)}[inputs.product]
    if result.shape != shape:
        return f"shape {result.shape}, not {shape}"
    if not bool(jnp.isfinite(result).all()):
        return "not finite"
    ends = np.cumsum(sizes)
    busy = sorted(np.flatnonzero(sizes), key=lambda group: sizes[group])
    busy = [busy[i] for i in np.unique(np.linspace(0, len(busy) - 1, 8).astype(int))]
    # A processor's arrays are read where they lie; of an accelerator's, only the sample is copied.
    near = np.asarray if next(iter(result.devices())).platform == "cpu" else lambda a: a
    left, right, sampled = near(left), near(right), near(result)
    some_k, some_n = (np.linspace(0, size - 1, 16).astype(int) for size in (k, n))
    worst = 0.0
    for group in busy:
        start, stop = int(ends[group] - sizes[group]), int(ends[group])
        if inputs.product == "dW":
            found = _float64(sampled[group][some_k][:, some_n])
            wanted = _float64(left[start:stop, some_k]).T @ _float64(right[start:stop, some_n])
        else:
            some = np.linspace(start, stop - 1, 8).astype(int)
            matrix = _float64(right[group])
            found = _float64(sampled[some])
            wanted = _float64(left[some]) @ (matrix.T if inputs.product == "dX" else matrix)
        worst = max(worst, float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted)))
    if inputs.product == "dW" and (sizes == 0).any() and bool((result[int(np.argmin(sizes))] != 0).any()):
        return "the gradient of an expert without rows is not zero"
    limit = LIMIT[inputs.point.dtype]
    return None if worst <= limit else f"differs from float64 by {worst:.1e} (relative Frobenius norm), limit {limit:g}"


def _float64(array: Any) -> np.ndarray:
    return np.asarray(array).astype(np.float64)


def _cache_bytes(platform: str) -> int:
    """Of the last level."""
    if platform != "cpu":
        return CACHE[platform]
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size[:-1]) * 2**10 for size in sizes if size.endswith("K")), default=32 * 2**20)


# Sides


def sides(platform: str) -> tuple[dict[str, Maker], dict[str, str]]:
    """Those that may run on this platform, and why others cannot."""
    import jax.numpy as jnp

    from jaxmodels.kernels.grouped_matmul import api

    makers: dict[str, Maker] = {}
    absent: dict[str, str] = {}
    for name in ("native", "cpu", "tpu", "hopper", "xla", "reference"):
        reason = api._IMPLEMENTATIONS[name].unfit((8, 64), 1, jnp.dtype(jnp.bfloat16))  # which all of them take
        if reason is None:
            makers[name] = functools.partial(_ours, name)
        else:
            absent[name] = reason
    theirs, missing = peers(platform)
    return makers | theirs, absent | missing


def _dense(point: Point, product: str) -> dict[str, Function]:
    """One product of as many FLOPs: all rows with one matrix."""
    import jax

    contract = {"fwd": ((1,), (0,)), "dX": ((1,), (1,)), "dW": ((0,), (0,))}[product]
    dtype = out_dtype(point, product)
    return {"": lambda left, right, sizes: jax.lax.dot_general(
        left, right, (contract, ((), ())), preferred_element_type="float32").astype(dtype)}  # fmt: skip


def _ours(name: str, point: Point, product: str) -> dict[str, Function]:
    import jax

    from jaxmodels.kernels.grouped_matmul import api, tuning

    m, k, n, groups = point.shape
    platform = jax.default_backend()
    if name in ("xla", "reference") and 2.0 * m * k * n * groups > MOST_FLOPS.get(platform, math.inf):
        raise Skipped(f"not run: expands to all experts, {2e-12 * m * k * n * groups:,.0f} TFLOP a product")
    if name == "reference" and m * max(k, n) * groups > MOST_NUMBERS.get(platform, 2**28):
        raise Skipped(f"not run: rows x experts x columns are {m * max(k, n) * groups:,} numbers")
    if (why := api._IMPLEMENTATIONS[name].unfit((m, n if product == "dX" else k), groups, np.dtype(point.dtype))):
        raise Skipped(why)
    inner, columns = (n, k) if product == "dX" else (k, n)
    kind = tuning.tables.device_kind()
    config = tuning.lookup(name, product, m, inner, columns, groups, point.dtype, kind)
    label = f"tuned: {config}" if config else ""
    if product == "dW":
        return {label: functools.partial(api.grouped_outer, implementation=name)}
    return {label: functools.partial(api.grouped_matmul, implementation=name, transpose_w=product == "dX")}


# What is told


def _notes(rows: list[dict], absent: dict[str, str]) -> list[str]:
    shares = [(row["samples"]["elsewhere"], row["samples"]["median_s"] * row["samples"]["repeats"])
              for row in rows if "samples" in row]  # fmt: skip
    # The system counts in hundredths of a second: of a short turn alone it says nothing.
    elsewhere = sum(share * weight for share, weight in shares) / max(sum(weight for _, weight in shares), 1e-9)
    return [
        FORMULA,
        "dense: all rows with one matrix, the same FLOPs, in the same turns; of dense: its time by the side's, above 1 "
        "is faster than dense. With few rows it reads one matrix where the others read one an expert",
        "ms: one call, median; p10, p90: over turns of up to 20 calls, 25 turns, fewer of what is slow (the JSON has "
        "both numbers)",
        f"other processes took about {elsewhere:.0%} of the cores meanwhile",
        *(f"{name} does not run here: {why}" for name, why in absent.items()),
    ]


def _driver() -> dict[str, Any]:
    """The GPU's driver, and what limits its speed, as nvidia-smi tells them."""
    if shutil.which("nvidia-smi") is None:
        return {}
    fields = ("driver_version", "power.limit", "clocks.max.sm", "clocks.sm", "ecc.mode.current", "mig.mode.current")
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.SubprocessError):
        return {}
    lines = done.stdout.strip().splitlines()
    return {"gpu": dict(zip(fields, map(str.strip, lines[0].split(",")), strict=False))} if lines else {}


def _plot(rows: list[dict], notes: list[str], about: dict[str, Any], path: Path) -> None:
    """A page with the share of the dense product by side and point: a dot for the median over the distributions, a
    line from the worst to the best of them."""
    from analysis.report import style
    from analysis.report.html import Report

    shown = [row for row in rows if row.get("of dense")]
    points, names = (list(dict.fromkeys(row[key] for row in shown)) for key in ("point", "side"))
    products = list(dict.fromkeys(row["product"] for row in shown))
    where = f"{about['device']['kind']}, {about['processor']}; jax {about['versions']['jax']}"
    report = Report("Grouped products", where)
    if shown:
        figure, axes = style.new_figure(8, 1 + 2.2 * len(products), len(products), 1, sharex=True, squeeze=False)
        for ax, product in zip(axes[:, 0], products, strict=True):
            for place, name in enumerate(names):
                colour, mark = style.PALETTE[place % len(style.PALETTE)], "os^Dv"[place // len(style.PALETTE) % 5]
                for at, point in enumerate(points):
                    shares = [row["of dense"] for row in shown
                              if (row["point"], row["side"], row["product"]) == (point, name, product)]  # fmt: skip
                    if shares:
                        x = at + 0.7 * ((place + 0.5) / len(names) - 0.5)
                        ax.vlines(x, min(shares), max(shares), color=colour)
                        ax.plot(x, np.median(shares), mark, color=colour, label=name)
            ax.axhline(1, color=style.INK, linewidth=0.8)
            ax.set(yscale="log", title=product, ylabel="share of dense")
        axes[-1, 0].set_xticks(range(len(points)), labels=points, rotation=30, ha="right")
        labels: dict[str, Any] = {}
        for ax in axes[:, 0]:
            for handle, name in zip(*ax.get_legend_handles_labels(), strict=True):
                labels.setdefault(name, handle)
        figure.legend(labels.values(), labels.keys(), loc="outside upper left", ncols=6)
        keys = ("point", "rows on experts", "product", "side", "of dense")
        data = [{key: row[key] for key in keys} for row in shown]
        report.section("Share of the dense product", "1 is the speed of one dense product of the same FLOPs, measured "
                       "in the same turns. Dots: the median over distributions of rows; lines: their range.")
        report.figure(figure, "Share of the dense product by implementation and point", data, "share-of-dense")
    report.section("All times")
    report.table(rows, COLUMNS, name="grouped-products")
    report.text("\n".join(f"- {note}" for note in notes))
    report.save(path)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", help="a JSON file; a page with a plot goes beside it")
    parser.add_argument("--points", nargs="+", default=(), help="names in the table's first column; default: all")
    parser.add_argument("--products", nargs="+", default=PRODUCTS, choices=PRODUCTS)
    parser.add_argument("--seconds", type=float, help="for all turns of one side on one product")
    return parser.parse_args()


if __name__ == "__main__":
    try:
        main(**vars(_parse()))
    except UserError as error:
        sys.exit(str(error))

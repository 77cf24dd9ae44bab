"""What the benchmark of the grouped products sets beside ours: jax's own kernels, tokamax, and PyTorch's.

PyTorch runs in a process of its own (``python -m benchmarks._grouped_peers``: cases as JSON in, times out), before jax
takes the memory of the GPU. Alone, and only some of it:

    python -m benchmarks._grouped_peers --points Mixtral-8x7B --distributions zipf --seconds 0.2 [--out FILE]
"""

import argparse
import functools
import importlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._alone import Room
from benchmarks._shapes import ACCELERATOR, Point, draw_sizes
from benchmarks._timing import take_turns
from jaxmodels.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
LIMIT = {"float32": 1e-5, "bfloat16": 5e-3, "float16": 2e-3}  # relative Frobenius norm, a group (moe_split.md 7)
CALLS = 20  # of a turn on an accelerator
SECONDS = {"cpu": 0.8, "gpu": 1.5, "tpu": 1.5}  # for all turns of one side on one product
PATIENCE = 40  # seconds to wait for other benchmarks on the device
FEWEST, MOST = 3, 25  # turns of a side


class Skipped(Exception):
    """Why a side does not run here; becomes the note of its row."""


# A side makes its function for a point and a product; several: they are tried, and the fastest takes part.
Function = Callable[[Any, Any, Any], Any]  # operands and group sizes to the result
Maker = Callable[[Point, str], Mapping[str, Function]]


def choose(points: Sequence[Point], names: Sequence[str]) -> list[Point]:
    known = {point.name: point for point in points}
    for name in names:
        if name not in known:
            raise UserError(f"point {name!r} is unknown on this device; choose from {', '.join(known)}")
    return [known[name] for name in names] if names else list(points)


def out_dtype(point: Point, product: str) -> str:
    return "float32" if product == "dW" else point.dtype


# In this process


def peers(platform: str) -> tuple[dict[str, Maker], dict[str, str]]:
    """Those that may run on this platform, and why others cannot."""
    import jax

    makers: dict[str, Maker] = {}
    absent: dict[str, str] = {}
    if platform == "tpu":
        makers["megablox"] = _megablox
    if platform == "gpu" and str(getattr(jax.devices()[0], "compute_capability", "")).startswith("9."):
        makers["jax Hopper sample"] = _hopper_sample
    for name in {"gpu": ("mosaic", "triton"), "tpu": ("mosaic", "mosaic_tpu_v2")}.get(platform, ()):
        makers[f"tokamax {name}"] = functools.partial(_tokamax, name)
    if platform == "cpu":
        absent |= {"megablox": "only on a TPU", "jax Hopper sample": "only on a GPU of compute capability 9.x",
                   "tokamax": "on a CPU it calls lax.ragged_dot, which is here as xla"}  # fmt: skip
    elif importlib.util.find_spec("tokamax") is None:
        absent |= {"tokamax": "not installed (pip install tokamax)"}
        makers = {name: make for name, make in makers.items() if not name.startswith("tokamax")}
    return makers, absent


def _megablox(point: Point, product: str) -> dict[str, Function]:
    """jax.experimental.pallas.ops.tpu.megablox with its default tiles and some that are near what people tune to."""
    backend = importlib.import_module("jax.experimental.pallas.ops.tpu.megablox.gmm")
    (m, *_), dtype, found = point.shape, out_dtype(point, product), {}
    for tiling in ((128, 128, 128), (512, 512, 512), (256, 1024, 1024), (512, 1024, 1024), (512, 2048, 512)):
        if m % tiling[0] and m % 8:
            continue
        tiling = (tiling[0] if m % tiling[0] == 0 else 8, *tiling[1:])
        if product == "dW":
            found[f"tiles {tiling}"] = lambda x, dy, sizes, tiling=tiling: backend.tgmm(x.T, dy, sizes, dtype, tiling)
        else:
            found[f"tiles {tiling}"] = lambda x, w, sizes, tiling=tiling: backend.gmm(
                x, w, sizes, dtype, tiling, transpose_rhs=product == "dX")  # fmt: skip
    if not found:
        raise Skipped(f"{m} rows are not a multiple of 8")
    return found


def _hopper_sample(point: Point, product: str) -> dict[str, Function]:
    """jax.experimental.pallas.ops.gpu, with some of the tiles among which its own main() looks for the fastest."""
    folder, found = "jax.experimental.pallas.ops.gpu", {}
    try:
        matmul = importlib.import_module(f"{folder}.ragged_dot_mgpu").ragged_dot
        outer = importlib.import_module(f"{folder}.transposed_ragged_dot_mgpu").transposed_ragged_dot
    except ImportError as error:
        raise Skipped(f"does not import: {error}") from None
    for rows, columns, band in ((128, 128, 1), (128, 128, 4), (128, 192, 1), (128, 192, 4)):
        tiles = {"block_m": rows, "block_n": columns, "block_k": 64, "max_concurrent_steps": 4, "grid_block_n": band}
        if product == "dW":
            function = lambda x, dy, sizes, tiles=tiles: outer(x, dy, group_sizes=sizes, **tiles)  # noqa: E731
        else:
            function = lambda x, w, sizes, tiles=tiles: matmul(  # noqa: E731
                x, w, group_sizes=sizes, transpose_rhs=product == "dX", **tiles)
        found[f"tiles {rows} x {columns}, band {band}"] = function
    return found


def _tokamax(name: str, point: Point, product: str) -> dict[str, Function]:
    """tokamax.ragged_dot_general with the configuration that it chooses by itself (its heuristics and its cache)."""
    import jax
    import tokamax

    # Lists, as its own constants have them: it tells the three products apart by comparing with those.
    sides = {"fwd": ([1], [1]), "dX": ([1], [2]), "dW": ([0], [0])}[product]
    numbers = jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(sides, ([], [])), lhs_ragged_dimensions=[0],
        rhs_group_dimensions=[] if product == "dW" else [0])  # fmt: skip
    dtype = np.dtype(out_dtype(point, product))
    return {"": lambda left, right, sizes: tokamax.ragged_dot_general(
        left, right, sizes, numbers, preferred_element_type=dtype, implementation=name)}  # fmt: skip


# PyTorch, in a process of its own


def torch_times(points: Sequence[str], products: Sequence[str]) -> tuple[dict[tuple[str, str, str], dict], str | None]:
    """By (point, distribution, product): times, or a note that says why not; or why there is none of it."""
    if importlib.util.find_spec("torch") is None:
        return {}, "PyTorch is not installed here"
    if shutil.which("nvidia-smi") is None and not Path("/dev/kfd").exists():
        return {}, "this machine has no GPU for PyTorch"
    try:
        chosen = choose(ACCELERATOR, points)
    except UserError:  # names of points of a CPU
        return {}, "no such point"
    cases = _torch_cases_of(chosen, products)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, "-m", "benchmarks._grouped_peers"], input=json.dumps(cases),
                          capture_output=True, text=True, env=environment, check=False, timeout=3600)  # fmt: skip
    if done.returncode:
        return {}, f"its process failed: {done.stderr.strip().splitlines()[-1][:200] if done.stderr.strip() else ''}"
    found = json.loads(done.stdout.splitlines()[-1])
    return ({}, found) if isinstance(found, str) else ({tuple(one.pop("key")): one for one in found}, None)


def _torch_cases_of(points: Sequence[Point], products: Sequence[str], distributions: Sequence[str] = ()) -> list[dict]:
    return [{"key": [point.name, distribution, product], "shape": point.shape, "dtype": point.dtype,
             "sizes": draw_sizes(distribution, point.layer).tolist()}
            for point in points for distribution in distributions or point.distributions
            for product in products]  # fmt: skip


def torch_cases(cases: list[dict], device: str = "cuda", seconds: float = SECONDS["gpu"]) -> str | Iterator[dict]:
    """What each case took, as `torch_times` hands it on; why nothing runs, where nothing does."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        return "this PyTorch has no GPU to run on"
    product_of = getattr(torch.nn.functional, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)
    if product_of is None:
        return f"torch {torch.__version__} has no grouped_mm"
    return (_torch_case(torch, product_of, case, device, seconds) for case in cases)


def _torch_case(torch: Any, product_of: Any, case: dict, device: str, seconds: float) -> dict[str, Any]:
    (m, k, n, groups), product = case["shape"], case["key"][2]
    options = {"device": device, "dtype": getattr(torch, case["dtype"])}
    try:
        sizes = torch.tensor(case["sizes"])
        ends = torch.cumsum(sizes, 0).to(device, torch.int32)
        left = torch.randn(m, n if product == "dX" else k, **options)
        right = torch.randn(*((m, n) if product == "dW" else (groups, k, n)), **options)
        one = right if product == "dW" else right[0].clone()
        if product == "fwd":
            functions = {"grouped": lambda: product_of(left, right, offs=ends), "dense": lambda: left @ one}
        elif product == "dX":
            functions = {"grouped": lambda: product_of(left, right.transpose(-2, -1), offs=ends),
                         "dense": lambda: left @ one.T}  # fmt: skip
        else:
            functions = {"grouped": lambda: product_of(left.T, right, offs=ends), "dense": lambda: left.T @ one}
        result, group = functions["grouped"](), int(sizes.argmax())
        stop = int(sizes[: group + 1].sum())
        rows = slice(stop - int(sizes[group]), stop)
        if product == "dW":
            found, wanted = result[group, :16].double(), left[rows, :16].double().T @ right[rows].double()
        else:
            matrix = right[group].double()
            found = result[rows][:8].double()
            wanted = left[rows][:8].double() @ (matrix.T if product == "dX" else matrix)
        wrong = float((found - wanted).norm() / wanted.norm())
        if not wrong <= LIMIT[case["dtype"]]:
            return {"key": case["key"], "note": f"wrong: differs from float64 by {wrong:.1e}"}
        wait = torch.cuda.synchronize if device == "cuda" else lambda: None

        def turn(function: Callable[[], Any], calls: int) -> Callable[[], None]:
            def run() -> None:
                for _ in range(calls):
                    function()
                wait()

            return run

        calls = CALLS if device == "cuda" else 1
        once = take_turns({name: turn(function, 1) for name, function in functions.items()}, 1, warmup=2)
        slowest = max(one.median for one in once.values()) * calls
        repeats = min(max(int(seconds / slowest), FEWEST), MOST)
        samples = take_turns({name: turn(function, calls) for name, function in functions.items()}, repeats)
        summary = {key: value if key in ("repeats", "elsewhere") else value / calls
                   for key, value in samples["grouped"].summary().items()}  # fmt: skip
        note = f"own process; writes {str(result.dtype).removeprefix('torch.')}"
        return {"key": case["key"], "samples": summary, "dense_median_s": samples["dense"].median / calls, "note": note}
    except (RuntimeError, ValueError, TypeError) as error:
        return {"key": case["key"], "note": f"fails: {one_line(error)}"}


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def alone(points: Sequence[str], distributions: Sequence[str], products: Sequence[str], seconds: float,
          out: str | None = None, device: str = "cuda") -> None:  # fmt: skip
    """PyTorch's cases, each printed, and written to `out`, when it is there."""
    room = Room()
    cases = _torch_cases_of(choose(ACCELERATOR, points), products, distributions)
    answer = torch_cases(cases, device, seconds)
    if isinstance(answer, str):
        raise UserError(answer)
    found = []
    with room.alone(PATIENCE) as nobody_else:
        for one, case in zip(answer, cases, strict=True):
            m, k, n, _ = case["shape"]
            if "samples" in one:
                ms = 1e3 * one["samples"]["median_s"], 1e3 * one["dense_median_s"]
                one |= {"ms": ms[0], "dense ms": ms[1], "TFLOP/s": 2e-9 * m * k * n / ms[0], "alone": nobody_else}
            found.append(one)
            print(*one["key"], *(f"{name} {one[name]:.3g}" for name in ("ms", "dense ms", "TFLOP/s") if name in one),
                  one["note"], sep="; ", flush=True)  # fmt: skip
            if out is not None:
                Path(out).write_text(json.dumps({"rows": found}) + "\n", "utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--points", nargs="+", help="without these: cases as JSON on stdin")
    parser.add_argument("--distributions", nargs="+", default=("random",))
    parser.add_argument("--products", nargs="+", default=("fwd", "dX", "dW"))
    parser.add_argument("--seconds", type=float, default=SECONDS["gpu"], help="for all turns of one side")
    parser.add_argument("--out", help="a JSON file, written after every case")
    arguments = parser.parse_args()
    if arguments.points is None:
        answer = torch_cases(json.load(sys.stdin))
        print(json.dumps(answer if isinstance(answer, str) else list(answer)))
    else:
        try:
            alone(**vars(arguments))
        except UserError as error:
            sys.exit(str(error))

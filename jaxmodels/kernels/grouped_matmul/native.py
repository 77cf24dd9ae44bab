"""The grouped products on CPU in C++ (native.cc), called through XLA's FFI and on XLA's own threads.

XLA has no product on CPU that walks through groups: what it offers (cpu.py) pads them or copies their matrices. The
source is compiled once a machine, at its first use, with the C++ compiler that is there; without one, cpu.py does the
work. $JAXMODELS_NATIVE=0 leaves it out.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxmodels.cache import cache_folder
from jaxmodels.kernels.varying import vary, varying_axes

SOURCE = Path(__file__).with_name("native.cc")
FLAGS = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-w")
_TARGETS = ("jaxmodels_grouped_matmul", "jaxmodels_grouped_outer", "jaxmodels_grouped_glu")
_ACTIVATIONS = ("silu", "relu", "gelu_tanh")  # numbered as in native.cc


def unfit(shape, groups, dtype) -> str | None:
    here = jax.default_backend()
    return unavailable() if here == "cpu" else f"only on the CPU backend, this is {here}"


@functools.cache
def unavailable() -> str | None:
    """Why the compiled code cannot be used on this machine, or None; compiles it if nobody has yet."""
    if os.environ.get("JAXMODELS_NATIVE") == "0":
        return "JAXMODELS_NATIVE=0 is set"
    try:
        library = ctypes.CDLL(str(_library()))
    except OSError as error:
        return " ".join(str(error).split())[:300]
    for target in _TARGETS:
        jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(getattr(library, target)), platform="cpu")
    return None


def matmul(
    x: Float[Array, "M K"], w: Float[Array, "G _ _"], group_sizes: Int[Array, "G"], *, transpose_w: bool, out_dtype
) -> Float[Array, "M N"]:
    """Rows of each group times its matrix, in float32 whatever the operands are."""
    shape = (x.shape[0], w.shape[1 if transpose_w else 2])
    return _call(_TARGETS[0], [shape], x, w, group_sizes, transpose=transpose_w)[0].astype(out_dtype)


def outer(
    x: Float[Array, "M K"], dy: Float[Array, "M N"], group_sizes: Int[Array, "G"], *, out_dtype
) -> Float[Array, "G K N"]:
    """x_e^T dy_e for each group e; exactly zero for an empty one."""
    shape = (group_sizes.shape[0], x.shape[1], dy.shape[1])
    return _call(_TARGETS[1], [shape], x, dy, group_sizes)[0].astype(out_dtype)


def glu_unsupported(activation: str) -> str | None:
    return None if activation in _ACTIVATIONS else f"no activation {activation!r} in native.cc"


def glu(
    x: Float[Array, "M K"], gate: Float[Array, "G K N"], up: Float[Array, "G K N"], group_sizes: Int[Array, "G"], *,
    activation: str, keep: bool,
) -> Float[Array, "M N"] | tuple[Float[Array, "M N"], Float[Array, "M N"], Float[Array, "M N"]]:
    """a(x_e gate[e]) * (x_e up[e]), with `keep` also both products, in the dtype of x."""
    shape, number = (x.shape[0], gate.shape[2]), np.int64(_ACTIVATIONS.index(activation))
    out = _call(_TARGETS[2], [shape] * (3 if keep else 1), x, gate, up, group_sizes, activation=number)
    out = tuple(a.astype(x.dtype) for a in out)
    return out if keep else out[0]


def _call(target: str, shapes: list[tuple[int, ...]], *operands: Array, **attributes: Any) -> list[Array]:
    """operands: float arrays, then the group sizes."""
    if any(0 in shape for shape in shapes):
        return [jnp.zeros(shape, jnp.float32) for shape in shapes]
    *floats, group_sizes = operands
    arrays = [a.astype(jnp.float32) for a in floats] + [group_sizes.astype(jnp.int32)]
    # Inside shard_map operands must vary alike, and jax does not know that the results vary as they do.
    axes = varying_axes(*arrays)
    results = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    call = jax.ffi.ffi_call(target, results, vmap_method="sequential")
    return [vary(a, axes) for a in call(*(vary(a, axes) for a in arrays), **attributes)]


def _library() -> Path:
    """The shared library for this processor, compiled if it is not in the cache. Raises OSError saying why not."""
    source = SOURCE.read_bytes()
    about = (source, FLAGS, jax.lib.__version__, _processor())
    path = cache_folder() / "native" / f"grouped-{hashlib.sha256(repr(about).encode()).hexdigest()[:16]}.so"
    if path.exists():
        return path
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX") or "c++", "g++", "clang++"))), None)
    if compiler is None:
        raise OSError("no C++ compiler (c++, g++ or clang++); install one, for example Debian's package g++")
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / path.name
        command = [compiler, *FLAGS, f"-I{jax.ffi.include_dir()}", str(SOURCE), "-o", str(made)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        except subprocess.TimeoutExpired as error:
            raise OSError(f"{compiler} did not finish in {error.timeout:.0f} s") from error
        if done.returncode:
            first = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr[:200])
            raise OSError(f"{compiler} failed: {first.strip()}")
        os.replace(made, path)  # of two processes at once, the second's stands
    return path


def _processor() -> str:
    """What -march=native depends on: a cache on a shared disk serves machines of several kinds."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())

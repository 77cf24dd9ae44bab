"""The Hopper kernels of the grouped products, lowered and, where the CUDA plug-in is installed, compiled for sm_90a.

    python -m benchmarks.hopper_compile [--shapes NAME,...] [--products glu,...] [--dtype bfloat16]
        [--activation silu] [--out FILE]

Needs neither GPU nor driver: pip install "jax[cuda13]" absl-py (4.6 GB), and do not set JAX_PLATFORMS. Without the
plug-in it only lowers. Shapes: the first product of each layer of moe_split.md 8.1, the second where its sides differ
much. "glu" is gate and up with the activation, "glu_kept" stores both products as well. Registers and spills are
ptxas's, shared bytes what the configuration reckons with. A compile says nothing about speed.
"""

import argparse
import contextlib
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from typing import Any

# Read when jax starts: the driver's version would be checked, and ptxas's words about each kernel printed.
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
os.environ.setdefault("MOSAIC_GPU_DUMP_PTXAS", "1")

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks._hopper import PRODUCTS, default_config, kernel, operand_shapes
from benchmarks._report import check_out, machine, publish
from benchmarks._shapes import LAYERS, Point, decode
from jaxmodels.errors import UserError

POINTS = [
    *(Point(layer) for layer in LAYERS.values()),
    *(Point(LAYERS[name], "down") for name in ("Mixtral-8x7B", "DeepSeek-V3")),
    *(Point(decode("Qwen3-235B-A22B", tokens)) for tokens in (1, 16, 128)),
]
SHAPES = {point.name: point.shape for point in POINTS}  # M, K, N, G
COLUMNS = ("shape", "product", "tile", "stages", "lowered", "compiled", "shared bytes", "registers", "spill bytes",
           "side bytes", "seconds")  # fmt: skip

# One H100 SXM5 as XLA describes it (jax.experimental.topologies wants the text of a GpuTargetConfigProto).
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048 fpus_per_core: 128
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  core_count: 132 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 84978434048
  registers_per_core_limit: 65536 registers_per_block_limit: 65536 cuda_compute_capability { major: 9 minor: 0 }
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 patch: 0 } runtime_version { major: 13 minor: 0 patch: 0 }
device_description_str: "sm_90"
"""


def main(
    out: str | None = None, shapes: str | None = None, dtype: str = "bfloat16", products: str | None = None,
    activation: str = "silu",
) -> bool:  # fmt: skip
    """Prints the table and writes ``out``; False when something did not lower or compile. About 5 s a product."""
    check_out(out)
    names, kinds = _chosen("shape", shapes, SHAPES), _chosen("product", products, PRODUCTS)
    device, why = _h100()
    rows = [_row(name, product, dtype, activation, device) for name in names for product in kinds]
    notes = ["side bytes: what the compiled program needs beside operands and result"]
    if why:
        notes.append(f"not compiled: {why}")
    publish(f"Hopper grouped products, {dtype}", rows, COLUMNS, machine(()), notes, out)
    return not any("failed" in str(row.get(key)) for row in rows for key in ("lowered", "compiled"))


def _chosen(what: str, words: str | None, known: Iterable[str]) -> list[str]:
    names = list(known) if words is None else words.split(",")
    for name in names:
        if name not in known:
            raise UserError(f"{what} {name!r} is unknown; choose from {', '.join(known)}")
    return names


def _h100() -> tuple[Any, str | None]:
    try:
        return topologies.get_topology_desc("h100", "cuda", target_config=H100, topology="1x1x1").devices[0], None
    except Exception as error:  # jax raises whatever the plug-in's absence led to
        return None, f"{type(error).__name__}: {str(error).splitlines()[0]}"


def _row(name: str, product: str, dtype: str, activation: str, device: Any) -> dict[str, Any]:
    shape, weights = SHAPES[name], 2 if product.startswith("glu") else 1
    config = default_config(product, shape)
    row = {"shape": name, "product": product, "tile": f"128x{config.columns}x64", "stages": config.stages,
           "M, K, N, G": shape, "shared bytes": config.shared_bytes(weights)}  # fmt: skip
    sharding = device and NamedSharding(Mesh(np.array([device]), ("one",)), PartitionSpec())
    array = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)  # noqa: E731
    operands = [array(one, dtype) for one in operand_shapes(product, shape)] + [array(shape[3:], jnp.int32)]
    function = kernel(product, dw_dtype=dtype, activation=activation, config=config)
    started = time.perf_counter()
    try:
        traced = jax.jit(function).trace(*operands)
        lowered = traced.lower(lowering_platforms=("cuda",)) if device is None else traced.lower()
    except Exception as error:
        return row | {"lowered": f"failed: {error}"}
    row |= {"lowered": "lowered"}
    if device is not None:
        with _native_output() as words:
            try:
                compiled = lowered.compile()
                row |= {"compiled": "compiled", "side bytes": compiled.memory_analysis().temp_size_in_bytes}
            except Exception as error:
                row |= {"compiled": f"failed: {error}"}
        row |= _ptxas(words[0])
    return row | {"seconds": time.perf_counter() - started}


def _ptxas(words: str) -> dict[str, int]:
    """Of the kernel that Mosaic compiled: XLA's own ones are not among these words."""
    registers = re.findall(r"Used (\d+) registers", words)
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", words)
    found = {"registers": max(map(int, registers))} if registers else {}
    return found | ({"spill bytes": max(int(a) + int(b) for a, b in spills)} if spills else {})


@contextlib.contextmanager
def _native_output() -> Iterator[list[str]]:
    """What native code prints meanwhile; sys.stdout does not see it. One string, filled at the end."""
    words: list[str] = []
    sys.stdout.flush()
    sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            yield words
        finally:
            os.dup2(kept[0], 1)
            os.dup2(kept[1], 2)
            for descriptor in kept:
                os.close(descriptor)
            file.seek(0)
            words.append(file.read())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", help="a JSON file for the table")
    parser.add_argument("--shapes", help=f"comma-separated, of: {', '.join(SHAPES)}")
    parser.add_argument("--products", help=f"comma-separated, of: {', '.join(PRODUCTS)}")
    parser.add_argument("--activation", default="silu", choices=("silu", "relu", "gelu", "gelu_tanh"))
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16"])
    sys.exit(0 if main(**vars(parser.parse_args())) else 1)

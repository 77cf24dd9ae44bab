"""The TPU kernels of the grouped products at the sizes of published models, compiled for TPUs that are not here.

    python -m benchmarks.tpu_compile [--out FILE] [--generations v5e v6e] [--shapes Mixtral] [--products fwd dX]
        [--activation silu]

Needs libtpu (pip install 'jaxmodels[tpu]'), no TPU. All of it: 320 programs of 3 to 10 seconds on two cores. Says what
the compiler says: whether it compiles, VMEM it lays out, registers it spills and how many instruction bundles its
schedule has with and without them. No number here is a speed.

Shapes: moe_split.md 8.1, bf16, gradient of the weights float32. "glu" is gate and up with the activation, "glu_kept"
stores both products as well; there are none for "down". A program whose arrays exceed the memory of one chip is
compiled for an eighth of the rows and the experts instead, as on one of eight chips (column `part`).
"""

import argparse
import os
import re
import shutil
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks._report import check_out, machine, publish
from benchmarks._shapes import LAYERS, Point
from jaxmodels.errors import UserError

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "v7x": "tpu7x:2x2x1"}
GLU = ("glu", "glu_kept")
PRODUCTS = ("fwd", "dX", "dW", *GLU)
COLUMNS = ("shape", "matrix", "product", "chip", "compiled", "part", "vmem_mib", "blocks_mib", "limit_mib",
           "spilled_registers", "bundles", "bundles_unspilled", "seconds", "why")  # fmt: skip
_ALLOCATION = re.compile(r"#allocation\w+ \[shape = '[^']*', space=vmem, size = (0x[0-9a-f]+), scoped, tag = '([^']*)'")
_MIB = 2**20


def main(
    out: str | None = None, generations=tuple(TOPOLOGIES), shapes=tuple(LAYERS), products=PRODUCTS, activation="silu"
) -> list[dict]:
    """Compiles, prints a table, and writes `out`."""
    check_out(out)
    with tempfile.TemporaryDirectory() as folder:
        _prepare(folder)
        rows = []
        for generation in generations:
            device = _device(generation)
            for shape in shapes:
                for matrix in ("gate/up", "down"):
                    for product in (p for p in products if p not in GLU or matrix == "gate/up"):
                        found = compile_product(device, shape, matrix, product, Path(folder), activation)
                        rows.append({"shape": shape, "matrix": matrix, "product": product, "chip": generation, **found})
                        print(".", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    notes = ["vmem: all that the compiler lays out; blocks: what vmem_bytes of tpu.py foresees; limit: asked for",
             "spilled_registers: of 4 KiB each, inside vmem; unspilled: the schedule if there were registers enough"]
    publish("Grouped products compiled for TPU", rows, COLUMNS, machine(peers=("libtpu",)), notes, out)
    return rows


def compile_product(
    device: Any, shape: str, matrix: str, product: str, dumps: Path, activation: str = "silu"
) -> dict[str, Any]:
    """One program for one chip, or for its eighth where it does not fit, and what the compiler tells of it."""
    rows, inner, columns, experts = Point(LAYERS[shape], matrix).shape
    found = _compile(device, rows, inner, columns, experts, product, dumps, activation)
    if "memory of the chip" in found.get("why", ""):
        part = rows // 8, inner, columns, -(-experts // 8)
        found = _compile(device, *part, product, dumps, activation) | {"part": "1/8"}
    return found


def _compile(device, rows, inner, columns, experts, product, dumps, activation) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.experimental.layout import Format, Layout
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from jaxmodels.kernels.grouped_matmul import tpu

    one = NamedSharding(Mesh(np.array([device]), ("chip",)), PartitionSpec())

    def array(*shape: int, dtype=jnp.bfloat16):
        # Row-major: by default a program's own boundary may choose to pad the fewest bytes, and then copies.
        return jax.ShapeDtypeStruct(shape, dtype, sharding=Format(Layout(tuple(range(len(shape)))), one))

    weights, sizes = array(experts, inner, columns), array(experts, dtype=jnp.int32)
    if product == "dW":
        dtype = jnp.float32
        function = lambda x, dy, s: tpu.outer(x, dy, s, out_dtype=dtype)  # noqa: E731
        operands = array(rows, inner), array(rows, columns), sizes
    elif product in GLU:
        dtype, keep = jnp.bfloat16, product == "glu_kept"
        function = lambda x, g, u, s: tpu.glu(x, g, u, s, activation=activation, keep=keep)  # noqa: E731
        operands = array(rows, inner), weights, weights, sizes
    else:
        back, dtype = product == "dX", jnp.bfloat16
        function = lambda x, w, s: tpu.matmul(x, w, s, transpose_w=back, out_dtype=dtype)  # noqa: E731
        operands = array(rows, columns if product == "dX" else inner), weights, sizes
    results = jax.eval_shape(function, *operands)
    for old in dumps.iterdir():
        shutil.rmtree(old) if old.is_dir() else old.unlink()
    start = time.perf_counter()
    layout = jax.tree.map(lambda result: Format(Layout(tuple(range(result.ndim))), one), results)
    try:
        program = jax.jit(function, out_shardings=layout).lower(*operands).compile()
    except jax.errors.JaxRuntimeError as error:
        hbm = re.search(r"memory required .*? \(([\d.]+\w)\) exceeds available HBM \(([\d.]+\w)\)", str(error))
        why = f"needs {hbm[1]}, memory of the chip {hbm[2]}" if hbm else str(error).splitlines()[0][:200]
        return {"compiled": False, "why": why}
    kernel = {"fwd": "matmul", "dX": "matmul", "dW": "outer"}.get(product, product)
    sides = (columns, inner) if product == "dX" else (inner, columns)
    tiles = tpu.tiles(kernel, (rows, *sides), jnp.bfloat16, dtype)
    blocks = tpu.vmem_bytes(kernel, sides[0], jnp.bfloat16, dtype, tiles)
    temporary = program.memory_analysis().temp_size_in_bytes
    return {"compiled": True, "seconds": time.perf_counter() - start, "blocks_mib": blocks / _MIB,
            "limit_mib": tpu.vmem_limit(blocks) / _MIB, "temporary_bytes": temporary, "tiles": asdict(tiles),
            "rows": rows, "inner": sides[0], "columns": sides[1], "experts": experts, **_told(dumps)}  # fmt: skip


def _told(dumps: Path) -> dict[str, Any]:
    """What the compiler wrote about the kernel; nothing where this libtpu does not know the flag."""
    after, spilled, unspilled = (
        [path for path in dumps.rglob("*grouped_*") if re.search(pattern, path.name)]
        for pattern in (r"-\d+-post-ra\.txt$", r"analysis_packed-bundles-post-ra\.txt$",
                        r"analysis_packed-bundles-no-spills-fills\.txt$")
    )  # fmt: skip
    if not (after and spilled and unspilled):
        return {}
    found = [(int(size, 16), tag) for size, tag in _ALLOCATION.findall(after[0].read_text())]
    bundles = [int(re.search(r"total scheduled bundles:\s+(\d+)", files[0].read_text())[1])
               for files in (spilled, unspilled)]  # fmt: skip
    return {"vmem_mib": sum(size for size, _ in found) / _MIB, "bundles": bundles[0], "bundles_unspilled": bundles[1],
            "spilled_registers": sum("spilled" in tag for _, tag in found)}  # fmt: skip


def _prepare(dumps: str) -> None:
    # Without the first, libtpu asks a cloud's metadata server; with the second, others may load it as well: no chip is
    # taken. The rest it insists on.
    for setting in ("TPU_SKIP_MDS_QUERY=1", "ALLOW_MULTIPLE_LIBTPU_LOAD=1", "TPU_ACCELERATOR_TYPE=v5litepod-8",
                    "TPU_WORKER_HOSTNAMES=localhost", "TPU_WORKER_ID=0", "TPU_MIN_LOG_LEVEL=3"):  # fmt: skip
        os.environ.setdefault(*setting.split("="))
    flags = f"--xla_jf_dump_to={dumps} --xla_jf_dump_llo_text=true"
    os.environ["LIBTPU_INIT_ARGS"] = f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {flags}".strip()
    import jax

    jax.config.update("jax_platforms", "cpu")


def _device(generation: str) -> Any:
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[generation]).devices[0]
    except (RuntimeError, ImportError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        remedy = "pip install 'jaxmodels[tpu]' brings libtpu"
        raise UserError(f"cannot compile for {generation}: {reason}; {remedy}") from None


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out")
    for option, choices in (("generations", TOPOLOGIES), ("shapes", LAYERS), ("products", PRODUCTS)):
        parser.add_argument(f"--{option}", nargs="+", default=tuple(choices), choices=tuple(choices))
    parser.add_argument("--activation", default="silu", choices=("silu", "relu", "gelu", "gelu_tanh"))
    try:
        main(**vars(parser.parse_args()))
    except UserError as error:
        sys.exit(str(error))

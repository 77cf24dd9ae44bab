"""Compile a training experiment's real step for a TPU slice that is not here (architecture.md section 6).

What comes out is the compiler's: memory for each device, the collectives, and an estimate of the step's time. An
estimate is no measurement; nothing here yields a speed that may be quoted. Runs in a process of its own (``python -m
train.runtime.aot``), because libtpu looks for a TPU, and says so, in whatever process loads it.
"""

import collections
import dataclasses
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from jaxmodels.errors import UserError

# What libtpu must be told on a machine without a TPU: not to ask a metadata server, and that it is one host.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-8", "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0", "TPU_STDERR_LOG_LEVEL": "3", "TPU_MIN_LOG_LEVEL": "3", "JAX_PLATFORMS": "cpu",
}
# HBM of one chip and its bandwidth (cloud.google.com/tpu/docs/system-architecture-tpu-vm, one page a generation).
CHIPS = {"v4": (32 * 2**30, 1.2e12), "v5e": (16 * 2**30, 0.82e12), "v5p": (95 * 2**30, 2.77e12),
         "v6e": (32 * 2**30, 1.64e12)}
USABLE = 0.97  # of the HBM: the runtime keeps a little
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4,
          "s64": 8, "u64": 8, "f64": 8}
WHOLE = 2**20  # bytes above which an all-gather of a whole parameter is worth a warning


@dataclasses.dataclass(frozen=True)
class Planned:
    """A step to compile: `lower()` gives the lowered program; parameters: path -> (shape, sharding)."""

    lowered: Any
    parameters: dict[str, Any]
    flops: float  # model FLOPs of one step
    tokens: int


@dataclasses.dataclass(frozen=True)
class Collective:
    """Collectives of one kind in a step: how many run, and the bytes of their results on one device."""

    kind: str
    count: int
    bytes: int


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler says about a step. Bytes are of one device."""

    topology: str
    devices: int
    seconds_to_compile: float
    argument_bytes: int
    temporary_bytes: int
    output_bytes: int
    total_bytes: int
    limit_bytes: int
    estimated_seconds: float
    estimated_mfu: float
    collectives: list[Collective]
    warnings: list[str]

    @property
    def fits(self) -> bool:
        return self.total_bytes <= self.limit_bytes


def check_topology(topology: str) -> str:
    """The chip of ``v5e:2x4``. Raises UserError for a malformed name or an unknown chip."""
    chip, _, shape = topology.partition(":")
    if chip not in CHIPS or not re.fullmatch(r"\d+x\d+(x\d+)?", shape):
        raise UserError(f"--topology {topology!r} is not CHIP:SHAPE with a chip of {', '.join(CHIPS)}; "
                        "write it as v5e:2x4 or v5p:4x4x4")
    return chip


def compile_in_child(experiment: str, overrides: Sequence[str], topology: str) -> Compiled:
    """`compile_step` in a process that may load libtpu. Raises UserError with the child's message."""
    check_topology(topology)
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("compile needs libtpu, which is not installed; pip install 'jaxmodels[tpu]' (about 700 MB)")
    request = json.dumps({"experiment": experiment, "overrides": list(overrides), "topology": topology})
    # -P and the path: it imports what this process does, and nothing that lies in the current folder instead
    paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
    done = subprocess.run([sys.executable, "-P", "-m", "train.runtime.aot", request], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": paths, **ENVIRONMENT})
    answer = done.stdout.rpartition("\nRESULT ")[2] if "\nRESULT " in done.stdout else ""
    if not answer:
        tail = " ".join(done.stderr.split())[-600:]
        raise RuntimeError(f"the compiler's process ended with {done.returncode}: {tail}")
    found = json.loads(answer)
    if "error" in found:
        raise UserError(found["error"])
    found["collectives"] = [Collective(**one) for one in found["collectives"]]
    return Compiled(**found)


def compile_step(experiment: str, overrides: Sequence[str], topology: str) -> Compiled:
    """Compiles the step that ``jaxmodels run EXPERIMENT overrides`` would run on this slice."""
    import jax

    jax.config.update("jax_platforms", "cpu")
    from jax.experimental import topologies

    from jaxmodels.kernels.grouped_matmul import lowering_for
    from train.runtime.config import load_function, resolve
    from train.runtime.flops import peak
    from train.runtime.mesh import make_mesh, use_mesh

    chip = check_topology(topology)
    config = resolve(experiment, overrides)
    if not getattr(config, "plan", None):
        raise UserError(f"{experiment} is no training experiment: there is no step to compile")
    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except Exception as error:  # libtpu's own kinds
        told = " ".join(str(error).split())[:200]
        raise UserError(f"libtpu does not know the topology {topology} ({told}); v5e:2x4 and v5p:4x4x4 work") from error
    mesh = make_mesh(config.mesh, devices)
    with use_mesh(mesh, parts=config.mesh.parts, ragged=config.mesh.ragged), lowering_for("tpu"):
        planned = load_function(config.plan)(config, mesh)
        start = time.monotonic()
        try:
            compiled = planned.lowered.compile()
        except Exception as error:
            if "RESOURCE_EXHAUSTED" in str(error) or "hbm" in str(error).lower():
                told = " ".join(str(error).split())[:300]
                raise UserError(f"the step does not fit {topology}: {told}") from error
            raise
    seconds = time.monotonic() - start
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis() or {}
    total = (memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes
             - memory.alias_size_in_bytes)
    hbm, bandwidth = CHIPS[chip]
    top = peak(devices[0])
    estimated = cost.get("optimal_seconds", -1.0)
    if not estimated > 0:  # then the roofline of what XLA counts
        estimated = max(cost.get("flops", 0.0) / top, cost.get("bytes accessed", 0.0) / bandwidth, 1e-12)
    found, gathers = collectives(compiled.as_text())
    return Compiled(
        topology, len(devices), round(seconds, 1), memory.argument_size_in_bytes, memory.temp_size_in_bytes,
        memory.output_size_in_bytes, total, int(USABLE * hbm), estimated,
        planned.flops / (estimated * len(devices) * top), found, whole_gathers(gathers, planned.parameters))


def collectives(text: str) -> tuple[list[Collective], list[tuple[str, int, int]]]:
    """(collectives by kind, all-gathers as (shape, elements, bytes)) of an optimised HLO module.

    What stands in the body of a loop counts as often as the loop runs (its known_trip_count).
    """
    bodies, entry = _computations(text)
    runs: collections.Counter[str] = collections.Counter()

    def walk(name: str, times: int) -> None:
        runs[name] += times
        for line in bodies.get(name, ()):
            for match in re.finditer(r"(?:body|condition|to_apply|calls|branch_computations=\{)=?%?([\w.\-]+)", line):
                trips = re.search(r'known_trip_count[^0-9]*(\d+)', line) if "body=" in line else None
                if match.group(1) in bodies:
                    walk(match.group(1), times * (int(trips.group(1)) if trips else 1))

    walk(entry, 1)
    count, size, gathers = collections.Counter(), collections.Counter(), []
    kinds = "|".join(map(re.escape, COLLECTIVES))
    for name, lines in bodies.items():
        for line in lines:
            match = re.search(rf"= (.*?) ({kinds})(-start)?\(", line)
            if not match or not runs[name]:
                continue
            shapes = re.findall(r"(\w+)\[([\d,]*)\]", match.group(1))
            if match.group(3) and len(shapes) > 1:
                shapes = shapes[len(shapes) // 2:]  # a -start op returns its operands, then its results
            sizes = [(math.prod(map(int, filter(None, dims.split(",")))), _BYTES.get(kind, 4)) for kind, dims in shapes]
            count[match.group(2)] += runs[name]
            size[match.group(2)] += runs[name] * sum(n * width for n, width in sizes)
            if match.group(2) == "all-gather":
                gathers += [(f"{kind}[{dims}]", n, n * width)
                            for (kind, dims), (n, width) in zip(shapes, sizes, strict=True)]
    return [Collective(kind, count[kind], size[kind]) for kind in COLLECTIVES if count[kind]], gathers


def whole_gathers(gathers: list[tuple[str, int, int]], parameters: dict[str, Any]) -> list[str]:
    """Warnings for parameters that are gathered whole although no rule asks for it.

    fsdp gathers one layer at a time; a gather of all layers, or of a parameter that only tensor or expert cuts, undoes
    the sharding.
    """
    found = []
    for path, leaf in parameters.items():
        axes = {axis for part in leaf.sharding.spec for axis in ([part] if isinstance(part, str) else part or ())
                if leaf.sharding.mesh.shape[axis] > 1}
        stacked = "groups" in path.split("/") and leaf.shape[0] > 1
        if not axes or (axes == {"fsdp"} and not stacked):
            continue
        for shape, elements, size in gathers:
            if elements == math.prod(leaf.shape) and size >= WHOLE:
                found.append(f"{path} {list(leaf.shape)} is gathered whole ({shape}, {size / 2**20:.0f} MiB)")
                break
    return found


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """Name -> lines of every computation, and the name of the entry."""
    bodies: dict[str, list[str]] = {}
    entry = name = ""
    for line in text.splitlines():
        head = re.match(r"(ENTRY )?%?([\w.\-]+) .*\{\s*$", line)
        if head and not line.startswith(" "):
            name = head.group(2)
            bodies[name] = []
            entry = name if head.group(1) else entry
        elif line.startswith("}"):
            name = ""
        elif name:
            bodies[name].append(line)
    return bodies, entry


def main(request: str) -> None:
    asked = json.loads(request)
    try:
        answer = dataclasses.asdict(compile_step(asked["experiment"], asked["overrides"], asked["topology"]))
    except UserError as error:
        answer = {"error": str(error)}
    print("\nRESULT " + json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])

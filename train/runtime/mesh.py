"""The device mesh, and the rules that map logical axes to it (training_runtime.md section 2).

Parameters carry logical names (embed, mlp, heads, expert, vocab); nothing else in the library mentions a mesh.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxmodels.errors import UserError
from jaxmodels.experts.parallel import exchange
from jaxmodels.layers.axes import axis_rules
from train.settings import AXES, MeshConfig

BATCH = ("data", "fsdp", "expert")  # the axes that split a batch
RULES: Mapping[str, Any] = {
    "batch": BATCH, "embed": "fsdp", "mlp": "tensor", "heads": "tensor", "vocab": "tensor", "expert": "expert",
}


def make_mesh(cfg: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of `devices` (default: all there are) with Auto axes. Raises UserError if the sizes do not fit.

    The axis types are spelt out: jax.make_mesh makes Explicit ones, with which an embedding look-up fails.
    """
    devices = jax.devices() if devices is None else list(devices)
    shape, auto = cfg.shape(len(devices)), (AxisType.Auto,) * len(AXES)
    if cfg.slices == 1:
        if any(device is not other for device, other in zip(devices, jax.devices(), strict=False)):
            return Mesh(np.asarray(devices).reshape(shape), AXES, axis_types=auto)  # a topology that is not here
        return jax.make_mesh(shape, AXES, axis_types=auto, devices=devices)
    from jax.experimental import mesh_utils

    if shape[0] % cfg.slices:
        raise UserError(f"mesh.slices={cfg.slices} must divide mesh.data={shape[0]}: only data crosses slices")
    grid = mesh_utils.create_hybrid_device_mesh(
        (shape[0] // cfg.slices, *shape[1:]), (cfg.slices, 1, 1, 1), devices,
        process_is_granule=not hasattr(devices[0], "slice_index"))
    return Mesh(grid, AXES, axis_types=auto)


def partition(names: Sequence[str | None], shape: Sequence[int], mesh: Mesh, *, what: str,
              rules: Mapping[str, Any] = RULES) -> NamedSharding:
    """The sharding of an array whose dimensions carry these logical names; unknown names are replicated.

    Raises UserError if a dimension does not divide, naming the array (`what`), the dimension and the axis.
    """
    names = (*names, *[None] * (len(shape) - len(names)))
    spec = tuple(rules.get(name) if name else None for name in names)
    for dimension, (size, axes) in enumerate(zip(shape, spec, strict=True)):
        axes = (axes,) if isinstance(axes, str) else axes or ()
        pieces = math.prod(mesh.shape[axis] for axis in axes)
        if size % pieces:
            raise UserError(f"{what}: dimension {dimension} ({names[dimension]}) has size {size}, which mesh axis "
                            f"{'*'.join(axes)} = {pieces} does not divide; choose a mesh.{axes[-1]} that does")
    return NamedSharding(mesh, PartitionSpec(*spec))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh, accumulate: int = 1) -> NamedSharding:
    """Rows over data, fsdp and expert; with accumulation a leading axis of micro-batches stays whole."""
    return NamedSharding(mesh, PartitionSpec(None, BATCH) if accumulate > 1 else PartitionSpec(BATCH))


def batch_pieces(mesh: Mesh) -> int:
    """Into how many parts a (micro-)batch is cut."""
    return math.prod(mesh.shape[axis] for axis in BATCH)


def check_batch(batch: int, accumulate: int, mesh: Mesh) -> None:
    """Raises UserError unless a global batch divides into micro-batches and devices; names sizes that do."""
    unit = accumulate * batch_pieces(mesh)
    if accumulate < 1 or batch < 1 or batch % unit:
        below = max(batch // unit, 1) * unit if unit > 0 else 1
        parts = "*".join(f"{axis} {mesh.shape[axis]}" for axis in BATCH)
        raise UserError(f"batch {batch} is not divisible by accumulate {accumulate} * {parts} = {unit}; "
                        f"set data.batch to {below} or {below + unit}")


@contextlib.contextmanager
def use_mesh(mesh: Mesh, rules: Mapping[str, Any] = RULES, *, parts: int = 1, ragged: bool = False) -> Iterator[None]:
    """Inside, models place their activations and spread their experts over `mesh`. (Not for style=pmap.) parts, ragged:
    see `MeshConfig`."""
    if ragged and mesh.devices.flat[0].platform == "cpu":
        raise UserError("mesh.ragged=True needs TPUs or GPUs: XLA cannot exchange ragged parts on CPU; leave it False")
    with jax.set_mesh(mesh), axis_rules(rules), exchange(parts, ragged):
        yield

"""Experts spread over devices: tokens travel to their experts and back, no token is dropped (training_runtime.md 2).

The mesh is the ambient one (`jax.set_mesh`), so that model files name none. On its axes
  data, fsdp, expert   cut the batch;
  expert               cuts the experts as well: each device holds E / P of them and serves the P devices of its row;
  tensor               cuts the hidden width: each device computes a part of the down product, the parts are summed.

Per device: sort the token copies by expert, hence by device; exchange; sort what arrived by expert; grouped products;
exchange back; weighted sum. Each step is a gather whose gradient is a gather, so runs repeat bit for bit.

The exchanged buffer is as large as the worst case, every copy to the same device: [P, tokens * min(k, E / P), D], where
balanced routing fills a P-th. This is the price of dropping nothing under static shapes: a capacity factor would save
memory and lose tokens. The rows that stay empty come last on the receiving side, past the last group, where a grouped
product does no work; they cost their bytes in the activations, and on the wire unless `exchange(ragged=True)` sends
only what is there, by `jax.lax.ragged_all_to_all` (TPU and GPU; XLA has none for CPU).
"""

import contextlib
import contextvars
import math
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array, Float, Int

from jaxmodels.errors import UserError
from jaxmodels.experts.layer import apply_experts
from jaxmodels.kernels.expert_ffn import dispatch, expert_rows, gather_rows
from jaxmodels.kernels.varying import vary, varying_axes

BATCH = ("data", "fsdp", "expert")
_exchange_by: contextvars.ContextVar[tuple[int, bool]] = contextvars.ContextVar("exchange", default=(1, False))
_SPECS = {
    "gate": ("expert", None, "tensor"), "up": ("expert", None, "tensor"), "down": ("expert", "tensor", None),
    "gate_bias": ("expert", "tensor"), "up_bias": ("expert", "tensor"),
}  # fmt: skip


@contextlib.contextmanager
def exchange(parts: int = 1, ragged: bool = False) -> Iterator[None]:
    """Inside, a device's tokens travel in so many parts, each with buffers of its own: while one is on the wire the
    compiler may run the products of another. More parts mean smaller messages and smaller groups. ragged: empty places
    of the buffers do not travel."""
    token = _exchange_by.set((parts, ragged))
    try:
        yield
    finally:
        _exchange_by.reset(token)


def run_experts(
    experts: Mapping[str, Array],
    x: Float[Array, "B T D"],
    *,
    activation: str,
    active: Int[Array, "B T k"],
    weights: Float[Array, "B T k"] | None,
    num_shared: int = 0,
    implementation: str | None = None,
) -> Float[Array, "B T D"]:
    """`layer.apply_experts`, spread over the ambient mesh where there is one that cuts experts, widths or the batch."""
    if not _spreads(x.shape[0]):
        return apply_experts(experts, x, activation=activation, active=active, weights=weights, num_shared=num_shared,
                             implementation=implementation)[0]  # fmt: skip
    if num_shared:
        always = jnp.broadcast_to(jnp.arange(num_shared, dtype=active.dtype), (*active.shape[:-1], num_shared))
        active = jnp.concatenate([always, active], -1)
        if weights is not None:
            weights = jnp.concatenate([jnp.ones(always.shape, weights.dtype), weights], -1)
    return apply_experts_parallel(
        experts, x, activation=activation, active=active, weights=weights, implementation=implementation
    )


def apply_experts_parallel(
    experts: Mapping[str, Array],
    x: Float[Array, "B T D"],
    *,
    activation: str,
    active: Int[Array, "B T k"],
    weights: Float[Array, "B T k"] | None,
    implementation: str | None = None,
) -> Float[Array, "B T D"]:
    """`layer.apply_experts` with `active`, over the devices of the ambient mesh.

    gate, up [E, D, s] are cut along E by `expert` and along s by `tensor`, down [E, s, D] likewise, x along B.
    Raises UserError for sizes that do not divide.
    """
    sizes = _axis_sizes()
    batch_axes = tuple(axis for axis in BATCH if axis in sizes)
    _check(experts, x, sizes, batch_axes)
    names = sorted(name for name in experts if name in _SPECS)
    weights = jnp.ones(active.shape, x.dtype) if weights is None else weights
    cut = PartitionSpec(batch_axes)
    specs = [PartitionSpec(*(axis if axis in sizes else None for axis in _SPECS[name])) for name in names]

    def body(x, active, weights, *parts):
        local = dict(zip(names, parts, strict=True))
        y = _on_device(local, x.reshape(-1, x.shape[-1]), active.reshape(-1, active.shape[-1]),
                       weights.reshape(-1, weights.shape[-1]), sizes, activation, implementation)  # fmt: skip
        return y.reshape(x.shape)

    mapped = jax.shard_map(body, in_specs=(cut, cut, cut, *specs), out_specs=cut, axis_names=set(sizes))
    y = mapped(x, active, weights, *(experts[name] for name in names))
    return y + experts.get("down_bias", 0)


def _on_device(experts, x, active, weights, sizes, activation, implementation):
    """One device's tokens [t, D] through the experts of all devices of its row."""
    # Every operand varies over every axis from here on. The cotangents of custom_vjp functions must have the type of
    # their operands; and what was replicated gets its gradients summed by the transpose of this very cast.
    x, active, weights, experts = jax.tree.map(lambda a: vary(a, tuple(sizes)), (x, active, weights, experts))
    if (devices := sizes.get("expert", 1)) > 1:
        parts = math.gcd(_exchange_by.get()[0], len(x))
        done = [_travel(experts, *cut, devices, activation, implementation)
                for cut in zip(*(jnp.split(a, parts) for a in (x, active, weights)), strict=True)]  # fmt: skip
        y = jnp.concatenate(done)
    else:
        y = apply_experts(experts, x, activation=activation, active=active, weights=weights,
                          implementation=implementation)[0].astype(jnp.float32)  # fmt: skip
    if "tensor" in sizes:
        y = jax.lax.psum(y, "tensor")  # after the sum over copies: k times less to send
    return y.astype(x.dtype)


def _travel(experts, x, active, weights, devices, activation, implementation):
    """The weighted sums of the tokens' copies, float32[t, D], each copy computed where its expert lives."""
    local, D = experts["up"].shape[0], x.shape[1]
    tokens, k = active.shape
    room = tokens * min(k, local)  # the experts of a token are distinct, so no more of its copies fit on a device

    plan = dispatch(active, devices * local)
    counts = plan.group_sizes.reshape(devices, local)
    starts, sent = _starts(counts.sum(1)), counts.sum(1)
    # Slot (device, c) of the buffer holds sorted row starts[device] + c; past the end, `_move` reads zeros.
    c = jnp.arange(room)
    rows = jnp.where(c < sent[:, None], starts[:, None] + c, tokens * k).reshape(-1)
    places = plan.order.at[rows].get(mode="fill", fill_value=tokens * k)  # slot -> flat place t * k + c
    owner = jnp.minimum(active // local, devices - 1)
    slots = owner * room + plan.inverse.reshape(tokens, k) - starts[owner]  # place -> slot
    slots = jnp.where(active < devices * local, slots, devices * room)

    buffer = _move(x, jnp.where(places < tokens * k, places // k, tokens), slots)
    arrived = _exchange(counts)  # [source device, local expert]
    received = arrived.sum(1)
    buffer = _exchange_rows(buffer.reshape(devices, room, D), sent, received)
    # Every source sent its rows in the order of the experts: the expert of a row is how many ends lie before it.
    expert = (c[:, None] >= jnp.cumsum(arrived, 1)[:, None]).sum(-1, dtype=jnp.int32)  # [source device, slot]
    inner = dispatch(expert.reshape(-1, 1), local)
    sorted_rows = gather_rows(buffer.reshape(-1, D), inner)
    done, _ = expert_rows(experts, sorted_rows, inner.group_sizes, activation, implementation)
    done = _move(done, inner.inverse, inner.order[:, None])
    done = _exchange_rows(done.reshape(devices, room, D), received, sent).reshape(-1, D)
    copies = _move(done, slots.reshape(-1), places[:, None]).reshape(tokens, k, D)
    return jnp.einsum("tk,tkd->td", weights.astype(jnp.float32), copies.astype(jnp.float32))


@jax.custom_vjp
def _move(rows: Float[Array, "N D"], sources: Int[Array, "M"], readers: Int[Array, "N r"]) -> Float[Array, "M D"]:
    """rows[sources], zero where a source is N. `readers` are the places that read each row (M: none), so that the
    gradient is a gather too."""
    return rows.at[sources].get(mode="fill", fill_value=0)


def _move_forward(rows, sources, readers):
    return _move(rows, sources, readers), readers


def _move_backward(readers, dy):
    copies = dy.at[readers].get(mode="fill", fill_value=0)
    return copies.astype(jnp.float32).sum(1).astype(dy.dtype), None, None


_move.defvjp(_move_forward, _move_backward)


def _exchange(parts: Array) -> Array:
    """parts[p] goes to device p of the expert axis; what device p sent arrives at [p]."""
    return jax.lax.all_to_all(parts, "expert", split_axis=0, concat_axis=0, tiled=True)


def _exchange_rows(parts: Float[Array, "P room D"], sent: Int[Array, "P"], received: Int[Array, "P"]
                   ) -> Float[Array, "P room D"]:
    """`_exchange` of buffers of which the first sent[p] rows count, and arrive as the first received[p] rows of [p].
    The others are zero on both sides."""
    if not _exchange_by.get()[1]:
        return _exchange(parts)
    devices, room, D = parts.shape
    flat = parts.reshape(-1, D)
    starts = vary(room * jnp.arange(devices, dtype=jnp.int32), varying_axes(flat))
    me = jnp.full_like(starts, room) * jax.lax.axis_index("expert")  # where my rows begin on every receiver
    return jax.lax.ragged_all_to_all(flat, jnp.zeros_like(flat), starts, sent, me, received,
                                     axis_name="expert").reshape(parts.shape)


def _starts(sizes: Int[Array, "P"]) -> Int[Array, "P"]:
    return jnp.cumsum(sizes) - sizes


def _axis_sizes() -> dict[str, int]:
    """The axes of the ambient mesh that this file knows; none without a mesh, and none inside a shard_map (Manual
    axes), where every array is a device's own and experts are applied as on one device."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or any(kind != AxisType.Auto for kind in mesh.axis_types):
        return {}
    return {axis: mesh.shape[axis] for axis in (*BATCH, "tensor") if axis in mesh.axis_names}


def _spreads(batch: int) -> bool:
    """Whether this mesh wants the layer spread. Without experts or widths to cut, a batch that does not divide is not
    cut either, and the plain layer is right for it."""
    sizes = _axis_sizes()
    pieces = math.prod(sizes.get(axis, 1) for axis in BATCH)
    return sizes.get("expert", 1) > 1 or sizes.get("tensor", 1) > 1 or (pieces > 1 and batch % pieces == 0)


def _check(experts: Mapping[str, Array], x: Array, sizes: Mapping[str, int], batch_axes: tuple[str, ...]) -> None:
    if not sizes:
        raise UserError("experts are spread over the mesh of jax.set_mesh, with Auto axes among data, fsdp, expert and "
                        "tensor; there is none here: set one, or use apply_experts")
    pieces = math.prod(sizes[axis] for axis in batch_axes)
    if (batch := x.shape[0]) % pieces:
        parts = " * ".join(f"{axis} {sizes[axis]}" for axis in batch_axes)
        raise UserError(f"batch {batch} is not divisible by {parts} = {pieces}; "
                        f"set the batch to {-(-batch // pieces) * pieces}")
    (count, _, width) = experts["up"].shape
    for name, size, axis in (("experts", count, "expert"), ("neurons of an expert", width, "tensor")):
        if size % sizes.get(axis, 1):
            raise UserError(f"{size} {name} are not divisible by mesh axis {axis} = {sizes[axis]}; "
                            f"set mesh.{axis} to a divisor of {size}")

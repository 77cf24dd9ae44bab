"""One training step as a pure function, and its three styles (training_runtime.md sections 1 and 3).

    step = make_step(train_step(blueprint, objective, optimizer), blueprint, mesh, style="auto")
    state, metrics = step(state, batch)

An objective returns *sums* over its tokens, never means: sums of micro-batches, devices and hosts add, and one division
at the end gives the mean that one device with the whole batch would have found.
"""

import dataclasses
import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxmodels.errors import UserError
from jaxmodels.kernels.varying import vary
from train.runtime.mesh import BATCH, batch_sharding, replicated
from train.runtime.state import Blueprint, State, merge, split
from train.settings import AXES, Style

Sums = dict[str, Any]


class Objective(Protocol):
    """What a model is trained for."""

    def loss(self, model: Any, batch: dict[str, jax.Array], key: jax.Array) -> tuple[jax.Array, Sums]:
        """(sum of the losses that are minimised, sums); sums has `weight`, what the sum is divided by (tokens)."""

    def metrics(self, loss: jax.Array, sums: Sums) -> dict[str, jax.Array]:
        """What is worth logging, from the summed loss and sums of a whole step."""

    def update(self, rest: Any, sums: Sums) -> Any:
        """State that follows other rules than the gradient (balancing biases); most return it as it is."""


@dataclasses.dataclass(frozen=True)
class TrainStep:
    """``(state, batch) -> (state, metrics)``, pure. `axes`: mesh axes to sum over, where each device sees its part."""

    graphdef: Any
    objective: Objective
    optimizer: optax.GradientTransformation
    accumulate: int = 1
    schedule: Callable[[Any], Any] | None = None

    def __call__(self, state: State, batch: dict[str, jax.Array], axes: tuple[str, ...] = ()):
        key = jax.random.fold_in(state["rng"], state["step"])
        for axis in axes:
            key = jax.random.fold_in(key, jax.lax.axis_index(axis))
        gradient, loss, sums, rest = self._gradient(state, batch, key, axes)
        if axes:
            gradient, loss, sums = jax.lax.psum((gradient, loss, sums), axes)
        weight = jnp.maximum(sums["weight"].astype(jnp.float32), 1.0)
        gradient = jax.tree.map(lambda g: g / weight, gradient)
        norm = optax.tree.norm(gradient)
        updates, opt = self.optimizer.update(gradient, state["opt"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        rest = self.objective.update(rest, sums)
        # A step with a non-finite loss or gradient changes nothing but the counters and the random stream.
        ok = jnp.isfinite(loss) & jnp.isfinite(norm)
        old = {name: state[name] for name in ("params", "rest", "opt")}
        kept = jax.tree.map(functools.partial(_choose, ok), {"params": params, "rest": rest, "opt": opt}, old)
        bad = jnp.where(ok, 0, state["bad"] + 1)
        skipped = state["skipped"] + ~ok
        metrics = {
            **self.objective.metrics(loss, sums), "gradient_norm": norm, "update_norm": optax.tree.norm(updates),
            "skipped": skipped, "bad": bad, "weight": sums["weight"],
        }
        if self.schedule is not None:
            metrics["learning_rate"] = jnp.asarray(self.schedule(state["step"]), jnp.float32)
        return {**kept, "step": state["step"] + 1, "rng": state["rng"], "skipped": skipped, "bad": bad}, metrics

    def _gradient(self, state: State, batch: dict[str, jax.Array], key: jax.Array, axes: tuple[str, ...]):
        """Gradient of the summed loss, the loss, the sums and the new rest, over all micro-batches."""
        def loss_of(params, rest, batch, key):
            model = merge(self.graphdef, params, rest)
            loss, sums = self.objective.loss(model, batch, key)
            return loss.astype(jnp.float32), (sums, split(model)[2])

        gradient_of = jax.value_and_grad(loss_of, has_aux=True)
        # Under shard_map the gradient of a replicated parameter would be summed over devices at once, and the sum in
        # the step would then multiply it by their number. A parameter that varies has a gradient of its own.
        params = _vary(state["params"], axes)
        if self.accumulate == 1:
            (loss, (sums, rest)), gradient = gradient_of(params, state["rest"], batch, key)
            return jax.tree.map(lambda g: g.astype(jnp.float32), gradient), loss, sums, rest

        def one(carry, inputs):
            total, rest = carry
            micro, key = inputs
            (loss, (sums, rest)), gradient = gradient_of(params, rest, micro, key)
            part = jax.tree.map(lambda g: g.astype(jnp.float32), (gradient, loss)), sums
            return (jax.tree.map(jnp.add, total, part), rest), None

        keys = jax.random.split(key, self.accumulate)
        first = jax.tree.map(lambda a: a[0], batch)
        (_, (sums, _)), _ = jax.eval_shape(gradient_of, params, state["rest"], first, keys[0])
        zero = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params), jnp.zeros((), jnp.float32)
        sums = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), sums)
        total = _vary((zero, sums), axes)
        (((gradient, loss), sums), rest), _ = jax.lax.scan(one, (total, state["rest"]), (batch, keys))
        return gradient, loss, sums, rest


def make_step(step: TrainStep, blueprint: Blueprint, mesh: Mesh, style: Style = "auto") -> Callable:
    """Compiles `step` for a mesh. The batch's leading axis is the global batch [B, ...], or, with accumulation, the
    micro-batches [accumulate, B / accumulate, ...].

    ``auto``: jit and shardings, every kind of parallelism. ``per_device``: shard_map, the body sums over devices
    itself; data parallel. ``pmap``: the literal jax.pmap on stacked arrays (see `replicate` and `shard_batch`), for
    scripts that expect it.
    Raises UserError for an unknown style, and for a mesh that a data-parallel style cannot use.
    """
    if style == "auto":
        shardings = blueprint.shardings, batch_sharding(mesh, step.accumulate)
        # out_shardings are mandatory: without them the second step compiles again, for shardings that XLA chose.
        return jax.jit(step, donate_argnums=0, in_shardings=shardings,
                       out_shardings=(blueprint.shardings, replicated(mesh)))
    if style not in ("per_device", "pmap"):
        raise UserError(f"style {style!r} is unknown; choose from auto, per_device, pmap")
    split_axes = [axis for axis in AXES[1:] if mesh.shape[axis] > 1]
    if split_axes:
        raise UserError(f"style={style} copies the model to every device, but mesh.{split_axes[0]} = "
                        f"{mesh.shape[split_axes[0]]} cuts it; set mesh.{split_axes[0]}=1 or style=auto")
    if style == "per_device":
        spec = PartitionSpec(None, BATCH) if step.accumulate > 1 else PartitionSpec(BATCH)

        mapped = jax.shard_map(lambda state, batch: step(state, batch, BATCH), mesh=mesh,
                               in_specs=(PartitionSpec(), spec), out_specs=PartitionSpec())
        return jax.jit(mapped, donate_argnums=0)
    warnings.warn("style=pmap is kept for old scripts; style=per_device does the same under jit", stacklevel=2)
    mapped = jax.pmap(lambda state, batch: step(state, batch, ("data",)), axis_name="data", donate_argnums=0,
                      in_axes=(0, 1 if step.accumulate > 1 else 0), out_axes=(0, None), devices=mesh.devices.flat)
    return mapped


def _vary(tree: Any, axes: tuple[str, ...]) -> Any:
    return jax.tree.map(lambda a: vary(a, axes), tree)


def _choose(ok: jax.Array, new: jax.Array, old: jax.Array) -> jax.Array:
    if jnp.issubdtype(new.dtype, jax.dtypes.prng_key):
        return new  # random streams go on even where a step is skipped
    return jnp.where(ok, new, old)


# Several runs of equal shape in one step


def make_step_together(step: TrainStep, blueprint: Blueprint, mesh: Mesh, runs: int) -> Callable:
    """`make_step` (style auto) for several runs: (states, `Stacked`; a batch of each) -> (states, metrics of each).

    The axis of the runs, [runs, ...], is not cut; everything behind it lies as it does for one run.
    """
    def together(states: State, batches: Sequence[dict[str, jax.Array]]):
        states, metrics = jax.vmap(step)(states, jax.tree.map(lambda *parts: jnp.stack(parts), *batches))
        return states, [jax.tree.map(lambda m: m[i], metrics) for i in range(runs)]

    stacked = stacked_shardings(blueprint)
    return jax.jit(together, donate_argnums=0, in_shardings=(stacked, batch_sharding(mesh, step.accumulate)),
                   out_shardings=(stacked, replicated(mesh)))


def stacked_shardings(blueprint: Blueprint) -> Any:
    """Of states with an axis of runs before all others."""
    return jax.tree.map(lambda one: NamedSharding(one.mesh, PartitionSpec(None, *one.spec)), blueprint.shardings)


def stacked_abstract(blueprint: Blueprint, runs: int) -> State:
    """`Blueprint.abstract` of several states."""
    return jax.tree.map(lambda one, sharding: jax.ShapeDtypeStruct((runs, *one.shape), one.dtype, sharding=sharding),
                        blueprint.abstract, stacked_shardings(blueprint))


class Stacked:
    """The states of several runs, [runs, ...]: `states` is what `make_step_together` takes and gives."""

    def __init__(self, blueprint: Blueprint, states: Sequence[State]):
        stacked = stacked_shardings(blueprint)
        pick = lambda states, at: jax.tree.map(lambda a: a[at], states)  # noqa: E731
        self._one, self._some = jax.jit(pick, out_shardings=blueprint.shardings), jax.jit(pick, out_shardings=stacked)
        self.states = jax.jit(lambda *each: jax.tree.map(lambda *parts: jnp.stack(parts), *each),
                              out_shardings=stacked)(*states)

    def one(self, place: int) -> State:
        """The state of one run, a copy."""
        return self._one(self.states, np.int32(place))

    def keep(self, places: Sequence[int]) -> None:
        """Drops all runs but these."""
        self.states = self._some(self.states, np.asarray(places, np.int32))


# Helpers of the pmap style. (jax.device_put_replicated and _sharded are gone.)


def replicate(state: State, mesh: Mesh) -> State:
    """A copy of every leaf for each device, stacked: [devices, ...]."""
    stacked = NamedSharding(Mesh(mesh.devices.reshape(-1), ("data",)), PartitionSpec("data"))  # pmap's own
    return jax.tree.map(
        lambda leaf: jax.device_put(jnp.broadcast_to(leaf, (mesh.devices.size, *leaf.shape)), stacked), state)


def unreplicate(state: State) -> State:
    """The first device's copy; x[0] would gather all of them."""
    return jax.tree.map(lambda leaf: leaf.addressable_shards[0].data[0], state)


def shard_batch(batch: Any, mesh: Mesh, accumulate: int = 1) -> Any:
    """[B, ...] -> [devices, B / devices, ...]; micro-batches [A, B, ...] -> [A, devices, B / devices, ...]."""
    count = mesh.devices.size
    lead = 1 if accumulate > 1 else 0
    return jax.tree.map(
        lambda a: a.reshape(*a.shape[:lead], count, a.shape[lead] // count, *a.shape[lead + 1:]), batch)

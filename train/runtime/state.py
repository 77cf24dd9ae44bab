"""What a training run carries from step to step: one nested dict of arrays (training_runtime.md section 1).

    params   {...}   trained, float32
    rest     {...}   everything else the model holds: counters of random streams, balancing biases
    opt      ...     the optimizer's moments, sharded as their parameters
    step     int32   steps taken, skipped ones included
    rng      key     of this run; every step folds its number in
    skipped  int32   steps that a non-finite loss or gradient left without effect; `bad`: how many of them in a row

A plain pytree dispatches within a small factor of the floor, where a jitted module object takes ten times as long.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from train.runtime.mesh import RULES, partition, replicated

State = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Blueprint:
    """How a state looks and where it lies, before any array exists.

    graphdef: the model's static half. abstract: the state as jax.ShapeDtypeStruct with shardings. init: makes the
    state in place, each device its own part.
    """

    graphdef: Any
    abstract: State
    shardings: Any
    init: Callable[[], State]

    def model(self, state: State) -> Any:
        """The model that a state holds."""
        return merge(self.graphdef, state["params"], state["rest"])


def merge(graphdef: Any, params: Any, rest: Any) -> Any:
    """A model from its parts; copied, or counters inside it could not be advanced under a nested transform."""
    return nnx.merge(graphdef, nnx.State(params), nnx.State(rest), copy=True)


def split(model: Any) -> tuple[Any, Any, Any]:
    """(graphdef, params, rest), the latter as pure dicts."""
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    return graphdef, nnx.to_pure_dict(params), nnx.to_pure_dict(rest)


def blueprint(build: Callable[[jax.Array], Any], optimizer: optax.GradientTransformation, mesh: Mesh, *, seed: int = 0,
              rules: Mapping[str, Any] = RULES) -> Blueprint:
    """Plans the state of `build(key)` (a function that returns an nnx.Module) under `optimizer` on `mesh`.

    Raises UserError if a parameter does not divide over its mesh axis.
    """
    graphdefs = []

    def make() -> State:
        key = jax.random.key(seed)
        graphdef, params, rest = split(build(key))
        graphdefs.append(graphdef)
        zero = jnp.zeros((), jnp.int32)
        return {"params": params, "rest": rest, "opt": optimizer.init(params), "step": zero,
                "rng": jax.random.fold_in(key, 1), "skipped": zero, "bad": zero}

    names = _logical_names(build, seed)
    shapes = jax.eval_shape(make)
    whole = replicated(mesh)

    def place(path: Any, leaf: Any) -> Any:
        text = path_text(path)
        return partition(names[text], leaf.shape, mesh, what=text, rules=rules) if names.get(text) else whole

    params, rest = (jax.tree_util.tree_map_with_path(place, shapes[part]) for part in ("params", "rest"))
    by_path = {path_text(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}

    def follow(path: Any, leaf: Any) -> Any:
        """A moment lies where its parameter does: the tail of its path is the parameter's path."""
        parts = path_text(path).split("/")
        tails = ("/".join(parts[i:]) for i in range(len(parts)))
        owner = next((tail for tail in tails if tail in by_path), None)
        return by_path[owner] if owner and len(by_path[owner].spec) == leaf.ndim else whole

    opt = jax.tree_util.tree_map_with_path(follow, shapes["opt"])
    shardings = {**dict.fromkeys(shapes, whole), "params": params, "rest": rest, "opt": opt}
    abstract = jax.tree.map(lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding),
                            shapes, shardings)
    # One program with the shardings as its result: no array ever exists whole on one device. It runs once, so
    # compiling it is what takes time, most of it in optimising the sampling of every parameter.
    quickly = {"xla_backend_optimization_level": 0}
    init = jax.jit(make, out_shardings=shardings, compiler_options=quickly)
    return Blueprint(graphdefs[0], abstract, shardings, init)


def path_text(path: Any) -> str:
    """``groups/0/ffn/up`` of a jax key path."""
    return "/".join(str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in path)


def _logical_names(build: Callable[[jax.Array], Any], seed: int) -> dict[str, tuple[str | None, ...]]:
    """Path -> logical axis names, read from the variables; nothing is computed."""
    found = {}

    def look() -> Any:
        graph_state = nnx.state(build(jax.random.key(seed)))
        for path, variable in graph_state.flat_state():
            found["/".join(map(str, path))] = variable.get_metadata().get("out_sharding") or ()
        return 0

    jax.eval_shape(look)
    return found

"""Experts spread over 8 simulated devices against one device: outputs, all gradients, extreme routing, errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxmodels import DecoderConfig
from jaxmodels.decoder.config import ExpertConfig
from jaxmodels.errors import UserError
from jaxmodels.experts import parallel
from jaxmodels.experts.layer import apply_experts
from jaxmodels.experts.parallel import apply_experts_parallel, run_experts
from tests.tiny_models import random_model
from train.runtime import mesh as runtime

D, E, S, B, T, K = 6, 8, 4, 8, 3, 2
AXES = ("data", "fsdp", "expert", "tensor")
MESHES = [(1, 1, 8, 1), (2, 1, 4, 1), (2, 2, 2, 1), (1, 1, 4, 2), (8, 1, 1, 1)]


def make_mesh(shape, kind=AxisType.Auto):
    devices = jax.devices()[: int(np.prod(shape))]
    return jax.make_mesh(shape, AXES, axis_types=(kind,) * 4, devices=devices)


@functools.cache
def inputs():
    rng = np.random.default_rng(0)
    shapes = {"gate": (E, D, S), "up": (E, D, S), "down": (E, S, D), "gate_bias": (E, S), "up_bias": (E, S),
              "down_bias": (D,)}  # fmt: skip
    experts = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
    x, target = (jnp.asarray(rng.normal(size=(B, T, D)), jnp.float32) for _ in range(2))
    return experts, x, jnp.asarray(rng.random((B, T, K)), jnp.float32), target


def routings():
    """int32[B, T, K] by name: random with empty places, everything to two experts, experts that nobody uses."""
    rng = np.random.default_rng(1)
    some = np.stack([rng.permutation(E)[:K] for _ in range(B * T)]).reshape(B, T, K)
    some[0, 1], some[3, 0, 1] = E, E  # a token without experts, a token with one
    few = np.stack([rng.permutation(3)[:K] for _ in range(B * T)]).reshape(B, T, K) + 4
    routings = {"random": some, "one device": np.broadcast_to([6, 7], (B, T, K)), "one expert": np.full((B, T, K), E),
                "empty experts": few}  # fmt: skip
    routings["one expert"][..., 0] = 3
    return {name: jnp.asarray(active, jnp.int32) for name, active in routings.items()}


def values_and_gradients(apply):
    """One compilation for every routing: outputs, then gradients in experts, x and weights."""
    def loss(experts, x, weights, active, target):
        y = apply(experts, x, activation="silu", active=active, weights=weights)
        return (y * target).sum(), y

    return jax.jit(lambda *a: jax.grad(loss, (0, 1, 2), has_aux=True)(*a)[::-1])


@functools.cache
def expected():
    experts, x, weights, target = inputs()
    run = values_and_gradients(lambda *a, **k: apply_experts(*a, **k)[0])
    return {name: run(experts, x, weights, active, target) for name, active in routings().items()}


def close(got, wanted, limit=1e-6):
    for (path, a), (_, b) in zip(*map(jax.tree_util.tree_leaves_with_path, (got, wanted)), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.linalg.norm(a - b) <= limit * np.linalg.norm(b), jax.tree_util.keystr(path)


@pytest.mark.parametrize("parts", [3, 2])  # 3 tokens a device do not divide by 2: then they travel together
def test_in_parts_it_is_the_same(parts):
    experts, x, weights, target = inputs()
    mesh = make_mesh((1, 1, 8, 1))
    batch = NamedSharding(mesh, PartitionSpec(AXES[:3]))
    cut = [jax.device_put(a, batch) for a in (x, weights, target)]
    with jax.set_mesh(mesh), parallel.exchange(parts):
        run = values_and_gradients(apply_experts_parallel)
        for name, active in routings().items():
            close(run(experts, cut[0], cut[1], jax.device_put(active, batch), cut[2]), expected()[name])
        text = jax.jit(lambda *a: apply_experts_parallel(experts, a[0], activation="silu", active=a[1], weights=a[2])
                       ).lower(cut[0], jax.device_put(active, batch), cut[1]).as_text()  # fmt: skip
    assert text.count("stablehlo.all_to_all") == 3 * (parts if parts == 3 else 1)  # rows, their counts, and back


def emulated(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name):
    """`jax.lax.ragged_all_to_all` as its documentation defines it, from whole copies: XLA has none on CPU."""
    me, room = jax.lax.axis_index(axis_name), len(output)
    told = [jax.lax.all_gather(a, axis_name) for a in (operand, input_offsets, send_sizes, output_offsets)]
    row = jnp.arange(room)
    for source in range(len(input_offsets)):
        rows, (first, size, to) = told[0][source], (a[source, me] for a in told[1:])
        here = (row >= to) & (row < to + jnp.where(size == recv_sizes[source], size, 0))
        output = jnp.where(here[:, None], rows[jnp.clip(row - to + first, 0, len(rows) - 1)], output)
    return output


@pytest.mark.parametrize(("devices", "parts"), [(8, 3), (4, 1)])
def test_ragged_exchange_is_the_same(monkeypatch, devices, parts):
    calls = []
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", lambda *a, **k: calls.append(len(a)) or emulated(*a, **k))
    experts, x, weights, target = inputs()
    mesh = make_mesh((1, 8 // devices, devices, 1))
    batch = NamedSharding(mesh, PartitionSpec(AXES[:3]))
    put = functools.partial(jax.device_put, device=batch)
    with jax.set_mesh(mesh), parallel.exchange(parts, ragged=True):
        run = values_and_gradients(apply_experts_parallel)
        for name, active in routings().items():
            close(run(experts, put(x), put(weights), put(active), put(target)), expected()[name])
    assert len(calls) == 2 * parts  # there and back, in one compilation


def test_no_ragged_exchange_on_cpu():
    with pytest.raises(UserError, match="mesh.ragged=True needs TPUs or GPUs"), \
            runtime.use_mesh(make_mesh((1, 1, 8, 1)), ragged=True):
        pass


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_same_as_one_device(shape):
    """All routings through one compiled program: the sizes are data, not shapes."""
    experts, x, weights, target = inputs()
    mesh = make_mesh(shape)
    cuts = {"gate": PartitionSpec("expert", "fsdp", "tensor"), "down": PartitionSpec("expert", "tensor", "fsdp")}
    placed = {n: jax.device_put(w, NamedSharding(mesh, cuts.get(n, PartitionSpec()))) for n, w in experts.items()}
    batch = NamedSharding(mesh, PartitionSpec(AXES[:3]))
    run = values_and_gradients(apply_experts_parallel)
    with jax.set_mesh(mesh):
        put = functools.partial(jax.device_put, device=batch)
        for name, active in routings().items():
            got = run(placed, put(x), put(weights), put(active), put(target))
            close(got, expected()[name])
            assert got[0].sharding.is_equivalent_to(batch, 3)
    assert run._cache_size() == 1


def test_implementations_and_half_precision():
    """The reference product inside shard_map; bfloat16 in, bfloat16 out."""
    experts, x, weights, _ = inputs()
    active = routings()["random"]
    with jax.set_mesh(make_mesh((1, 1, 4, 2))):
        run = jax.jit(apply_experts_parallel, static_argnames=("activation", "implementation"))
        y = run(experts, x, activation="silu", active=active, weights=weights, implementation="reference")
        close(y, expected()["random"][0])
        half = run({n: w.astype(jnp.bfloat16) for n, w in experts.items()}, x.astype(jnp.bfloat16), activation="silu",
                   active=active, weights=weights)  # fmt: skip
    assert half.dtype == jnp.bfloat16
    close(half, y, 2e-2)


def test_plain_layers_shared_experts_and_no_weights():
    """As `Experts` calls it for a split model: no gate, weights None, the first expert always on."""
    experts, x, _, _ = inputs()
    experts = {name: w for name, w in experts.items() if not name.startswith("gate")}
    active = jnp.where(routings()["random"] == 0, E, routings()["random"])  # expert 0 is shared: not chosen
    run = jax.jit(functools.partial(run_experts, activation="relu", weights=None, num_shared=1))
    wanted = run(experts, x, active=active)
    with jax.set_mesh(make_mesh((2, 2, 2, 1))):
        close(run(experts, x, active=active), wanted)


@pytest.mark.long
def test_models_use_the_ambient_mesh():
    """A whole decoder, scanned, with balancing biases: the same logits and gradients under a mesh as without one."""
    from flax import nnx

    config = DecoderConfig.tiny(experts=ExpertConfig(num_experts=4, top_k=2, balance_bias=True), ffn_widths=(8, 8),
                                remat="nothing_saveable")
    graphdef, state = nnx.split(random_model(config))
    tokens = jnp.asarray(np.random.default_rng(2).integers(0, 97, (4, 5)), jnp.int32)

    def run(state):
        def loss(state):
            logits = nnx.merge(graphdef, state).forward(tokens)[0]
            return (logits ** 2).mean(), logits
        return jax.value_and_grad(loss, has_aux=True)(state)

    (_, wanted), wanted_gradient = jax.jit(run)(state)
    with jax.set_mesh(make_mesh((1, 1, 4, 1))):
        compiled = jax.jit(run).lower(state).compile()
        (_, logits), gradient = compiled(state)
    assert "all-to-all" in compiled.as_text(), "the experts were not spread"
    close(logits, wanted, 5e-6)
    for got, want in zip(jax.tree.leaves(gradient), jax.tree.leaves(wanted_gradient), strict=True):
        assert np.linalg.norm(got - want) <= 2e-5 * max(np.linalg.norm(want), 1e-6)


def test_where_the_layer_is_spread():
    experts, x, weights, _ = inputs()
    run = functools.partial(run_experts, experts, activation="silu", active=routings()["random"], weights=weights)
    count = lambda: str(jax.make_jaxpr(run)(x)).count("shard_map[")  # noqa: E731
    assert not parallel._spreads(B) and count() == 0
    with jax.set_mesh(make_mesh((8, 1, 1, 1))):
        assert parallel._spreads(8) and not parallel._spreads(3) and count() == 1
    with jax.set_mesh(make_mesh((1, 1, 1, 8))):
        assert parallel._spreads(3)
    with jax.set_mesh(make_mesh((1, 1, 1, 1))):
        assert count() == 0
    with jax.set_mesh(make_mesh((1, 1, 8, 1), AxisType.Explicit)):
        assert not parallel._spreads(8)


def test_inside_shard_map_the_plain_layer_runs():
    """Every device its own rows and a copy of the experts, as a per-device training step has them. Never nested."""
    experts, x, weights, target = inputs()
    experts = {name: w for name, w in experts.items() if name != "down_bias"}
    active = routings()["random"]

    def loss(experts, x, active, target):
        experts = jax.tree.map(lambda w: jax.lax.pcast(w, AXES[:3], to="varying"), experts)
        y = run_experts(experts, x, activation="silu", active=active, weights=None)
        return jax.lax.psum((y * target).sum(), AXES[:3])

    alone = jax.jit(jax.grad(lambda e: (run_experts(
        e, x, activation="silu", active=active, weights=None) * target).sum()))(experts)
    rows = PartitionSpec(AXES[:3])
    mesh = make_mesh((2, 1, 4, 1))
    mapped = jax.shard_map(loss, mesh=mesh, in_specs=(PartitionSpec(), rows, rows, rows), out_specs=PartitionSpec())
    with jax.set_mesh(mesh):
        close(jax.jit(jax.grad(mapped))(experts, x, active, target), alone)


def test_errors_name_value_limit_and_remedy():
    experts, x, weights, _ = inputs()
    active = routings()["random"]
    run = functools.partial(run_experts, activation="silu", weights=None)
    with pytest.raises(UserError, match="there is none here"):
        apply_experts_parallel(experts, x, activation="silu", active=active, weights=weights)
    with jax.set_mesh(make_mesh((2, 1, 4, 1))):
        with pytest.raises(UserError, match=r"batch 6 is not divisible by data 2 \* .* expert 4 = 8; set .* to 8"):
            run(experts, x[:6], active=active[:6])
        fewer = {name: w[:6] if w.ndim > 1 else w for name, w in experts.items()}
        with pytest.raises(UserError, match="6 experts are not divisible by mesh axis expert = 4; set mesh.expert"):
            run(fewer, x, active=active)
    with jax.set_mesh(make_mesh((1, 1, 1, 8))), pytest.raises(UserError, match="4 neurons of an expert .* tensor = 8"):
        run(experts, x, active=active)
